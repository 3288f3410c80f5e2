"""Policies side by side: every figure of a row against a plain computation, on fixed resamples."""

import json
import time
from typing import Any

import numpy as np
import pytest
import torch

from choose.schedulers import Geometric
from choose.synthetic import classify, costs_of, dense
from offramp.choose.compare import UNTOUCHED, Comparison, compare
from offramp.choose.replay import replay
from offramp.choose.schedule import schedule
from offramp.errors import OfframpError
from offramp.functional.metrics import mean_iou
from offramp.policies.lesson import lesson
from offramp.policies.limits import no_information, oracle
from offramp.policies.thresholds import Thresholds
from offramp.table import ExitTable
from offramp.types import Evidence, Plan


def two(make: Any = classify, **more: Any) -> tuple[ExitTable, ExitTable]:
    parts = make(600 if make is classify else 40, **more).split_rows({"fit": 0.5, "test": 0.5})
    return parts["fit"], parts["test"]


def test_a_row_is_the_plan_of_the_fit_split_replayed_on_the_other() -> None:
    fit, test = two()
    found = compare(test, {"geometric": Geometric()}, [600, "0.5x"], fit=fit, timed=False)
    assert [row.budget for row in found.of("geometric")] == [500, 600] and found.notes == ()
    for row in found.of("geometric"):
        assert row.budget is not None
        plan = schedule(fit, Geometric(), budget=row.budget)
        done = replay(test, plan)
        assert row.planned == plan.predicted["cost"] <= row.budget and row.realised == float(done.macs.mean())
        assert row.quality == done.quality and row.notes == done.notes and row.decision_ms is None
        assert row.exceeds == (row.realised > row.budget) == any("exceeded" in note for note in row.notes)
        assert row.shares == {name: share for name, share in zip(done.names, done.shares, strict=True) if share}
        assert done.drop is not None and row.difference == pytest.approx(-done.drop)
        taught = lesson(test)
        low, high = (find(taught, row.realised).quality for find in (no_information, oracle))
        assert row.room == pytest.approx((row.quality - low) / (high - low)) and 0 < row.room < 1
    assert (found.split, found.fit_split, found.samples) == ("calibration/test", "calibration/fit", 300)


@pytest.mark.parametrize("make", [classify, dense])
def test_intervals_and_paired_differences_are_the_bootstraps(make: Any) -> None:
    fit, test = two(make)
    plans = {budget: schedule(fit, Geometric(), budget=budget) for budget in (500.0, 700.0)}
    never = Plan(exits=("block0",), policy=Thresholds(thresholds=(0.4,)), task=test.task)
    found = compare(test, {"other": lambda budget: never, "base": plans.__getitem__}, list(plans), fit=fit, repeats=50,
                    seed=3, reference="base", timed=False)
    drawn = np.random.default_rng(3).multinomial(len(test), np.full(len(test), 1 / len(test)), size=50)

    def quality(plan: Plan, weights: Any) -> float:
        rows = test.slice(np.repeat(np.arange(len(test)), weights))
        value = replay(rows, plan).quality
        assert value is not None
        return value

    for budget, plan in plans.items():
        (row,) = (row for row in found.of("other") if row.budget == budget)
        apart = [quality(never, weights) - quality(plan, weights) for weights in drawn]
        assert row.difference_interval == pytest.approx(tuple(np.quantile(apart, [0.025, 0.975])))
        (base,) = (row for row in found.of("base") if row.budget == budget)
        alone = [quality(plan, weights) for weights in drawn]
        assert base.interval == pytest.approx(tuple(np.quantile(alone, [0.025, 0.975]))) and base.difference == 0
        assert row.difference == pytest.approx(row.quality - base.quality) and row.planned is None
        (best,) = (row for row in found.of("oracle") if row.budget == budget)
        assert best.difference == pytest.approx(best.quality - base.quality)
    assert [row.method for row in found.rows[-4:]] == ["other"] * 2 + ["base"] * 2, "in the order given"
    assert all(np.isnan(row.difference) for row in found.rows if row.budget is None)


def test_controls_and_limits() -> None:
    table = classify(600)
    found = compare(table, {}, [600, 100], limits=True)
    assert "one half" in found.notes[0] and found.samples == 300
    test = table.split_rows({"fit": 0.5, "held": 0.5})["held"]
    assert test.labels is not None and test.logits is not None
    accuracy = (test.logits.argmax(-1) == test.labels[:, None]).double().mean(0).tolist()
    controls = [(row.method, row.realised) for row in found.rows if row.budget is None]
    assert controls == [(UNTOUCHED, 1000), ("all at block0", 280), ("all at block1", 530), ("all at block2", 780)]
    assert [row.quality for row in found.rows[:4]] == pytest.approx([accuracy[-1], *accuracy[:-1]])
    assert [(row.kind, row.difference) for row in found.rows[:1]] == [("untouched", 0.0)]
    best, die = found.of("oracle")[1], found.of("no information")[1]
    assert best.quality == oracle(lesson(test), 600).quality > die.quality == no_information(lesson(test), 600).quality
    below = found.of("oracle")[0]
    assert np.isnan(below.quality) and "at least 280" in below.notes[0]


def test_a_dense_tables_quality_is_of_the_mixture() -> None:
    fit, test = two(dense)
    (row,) = compare(test, {"geometric": Geometric()}, [700], fit=fit, timed=False, limits=False).of("geometric")
    done = replay(test, schedule(fit, Geometric(), budget=700))
    assert done.confusion is not None and row.quality == pytest.approx(float(mean_iou(done.confusion)))


def test_a_budget_without_a_plan_keeps_its_row() -> None:
    fit, test = two()
    found = compare(test, {"geometric": Geometric()}, [100, 600], fit=fit, timed=False)
    poor, rich = found.of("geometric")
    assert np.isnan(poor.quality) and "at least 280" in poor.notes[0] and rich.quality > 0.5
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["rows"][-2]["quality"] is None
    lines = found.table().splitlines()
    assert lines[0].startswith("method") and any("at least 280" in line for line in lines if line.startswith("! "))
    assert sum(line.startswith("geometric") for line in lines) == 2


class Dear:
    """All leave at the first exit; the second would take its time."""

    def decide(self, exit_index: int, evidence: Evidence) -> torch.Tensor:
        time.sleep(0.005 + 0.04 * exit_index)
        return torch.ones(len(evidence), dtype=torch.bool)


def test_times_are_of_the_exits_passed_and_counted_in_milliseconds() -> None:
    fit, test = two()
    (row,) = compare(test, {"geometric": Geometric()}, [8.0], fit=fit, unit="latency_ms").of("geometric")
    assert row.decision_ms is not None and row.decision_share == pytest.approx(row.decision_ms / 10.0)
    done = replay(test, schedule(fit, Geometric(), budget=8.0, unit="latency_ms"))
    assert done.latency_ms is not None and row.realised == pytest.approx(done.budget["realised"], rel=0.5)
    first = Plan(exits=("block0", "block1"), policy=Dear(), task="classify")
    (row,) = compare(test, {"dear": lambda budget: first}, [8.0], fit=fit, unit="latency_ms").of("dear")
    assert row.decision_ms is not None and row.decision_ms < 30, "nobody passes the second exit"
    assert row.realised >= 2.5 + 0.5 + 4, "a plan of another making is timed all the same"
    bare = classify(200, costs=costs_of(3, latency=False))
    (row,) = compare(bare, {"geometric": Geometric()}, [600]).of("geometric")
    assert row.decision_ms is not None and row.decision_share is None


def test_labels_are_the_truth_where_both_splits_have_them() -> None:
    fit, test = two()
    blind = classify(300, labels=False, seed=2)
    assert compare(test, {}, [600], fit=fit).quality == "accuracy"
    for found in (compare(blind, {}, [600], fit=fit), compare(test, {}, [600], fit=blind),
                  compare(test, {}, [600], fit=fit, against="backbone")):
        assert found.quality == "agreement" and found.rows[0].quality == 1.0


def test_progress_and_what_is_asked_amiss() -> None:
    seen: list[tuple[float, str]] = []
    fit, test = two()
    compare(test, {"a": Geometric(), "b": Geometric(skip=1)}, [500, 600], fit=fit, timed=False,
            progress=lambda part, name: seen.append((part, name)))
    assert seen == [(0.0, "a"), (0.25, "a"), (0.5, "b"), (0.75, "b"), (1.0, "")]
    with pytest.raises(OfframpError, match="among a"):
        compare(test, {"a": Geometric()}, [500], fit=fit, reference="c")
    own = compare(test, {"a": Geometric()}, [500], fit=test, timed=False)
    assert any("very split" in note for note in own.of("a")[0].notes) and isinstance(own, Comparison)

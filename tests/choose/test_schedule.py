"""Plans of schedulers: the budget is kept as planned, told as realised, and what a policy takes to decide is in it."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from choose.schedulers import Geometric
from choose.synthetic import classify, costs_of, dense
from offramp.choose.plan import load_plan, save_plan
from offramp.choose.replay import replay
from offramp.choose.schedule import Fitted, budget_of, decision_ms, schedule
from offramp.errors import OfframpError, PlanError
from offramp.functional.confidence import top
from offramp.policies.lesson import lesson
from offramp.policies.thresholds import Thresholds
from offramp.types import Evidence, Plan


@pytest.mark.parametrize("make", [classify, dense])
@pytest.mark.parametrize("budget", [450.0, 700.0, 5000.0])
def test_the_plan_keeps_the_budget_and_prices_itself_as_samples_paid(make: Any, budget: float) -> None:
    table = make()
    plan = schedule(table, Geometric(), budget=budget)
    scores = [plan.policy.score(k, table.evidence([table.index(name)])).tolist()  # type: ignore[attr-defined]
              for k, name in enumerate(plan.exits)]
    paid = []
    for row in zip(*scores, strict=True) if scores else [()] * len(table):
        macs = 0.0
        for k, (score, threshold) in enumerate(zip(row, plan.policy.thresholds, strict=True)):  # type: ignore
            macs = table.costs.macs[table.index(plan.exits[k])] + 30 * (k + 1)
            if score >= threshold:
                break
        else:
            macs = 1000 + 30 * len(plan.exits)
        paid.append(macs)
    assert plan.predicted["cost"] == pytest.approx(sum(paid) / len(paid)) and plan.predicted["cost"] <= budget
    assert plan.asked["budget"] == budget and plan.fingerprints == table.fingerprints
    assert plan.predicted["macs"] == plan.predicted["cost"] and plan.predicted["decision_ms"] == []


def test_an_exit_that_lets_nobody_go_is_left_out_and_its_head_unpaid() -> None:
    table = classify(300, 3)
    plan = schedule(table, Geometric(skip=1), budget=600)
    assert plan.exits == ("block0", "block2")
    alone = schedule(table.select(plan.exits), Geometric(), budget=600)
    assert alone.policy == plan.policy and alone.predicted == plan.predicted
    assert 590 < plan.predicted["cost"] <= 600, "what the head cost is spent elsewhere"


def test_with_no_exit_left_the_whole_network_runs() -> None:
    @dataclass(frozen=True)
    class Never:
        def fit(self, lesson: Any) -> Any:
            return lambda budget: Thresholds(thresholds=(None,) * (lesson.exits - 1))

    plan = schedule(classify(50), Never(), budget=5000)
    assert plan.exits == () and plan.predicted["cost"] == 1000 and "whole network" in plan.notes[0]
    with pytest.raises(PlanError, match="keeps 600"):
        schedule(classify(50), Never(), budget=600)


def test_a_scheduler_that_spends_too_much_is_held_back_or_refused() -> None:
    plan = schedule(classify(), Geometric(over=1.1), budget=600)
    assert plan.predicted["cost"] <= 600
    with pytest.raises(PlanError, match="at least 280 macs"):
        schedule(classify(), Geometric(), budget=100)


def test_a_budget_in_parts_of_the_untouched_network() -> None:
    table = classify()
    assert schedule(table, Geometric(), budget="0.6x").asked["budget"] == 600
    assert budget_of(table, "0.5x", "latency_ms", 32) == pytest.approx(0.5 * 10 * 32**0.9 / 32)
    for wrong in ("0.5 x of it", "x", -1.0, float("nan")):
        with pytest.raises(OfframpError, match="positive budget"):
            budget_of(table, wrong, "macs")
    with pytest.raises(OfframpError, match="latency_ms"):
        schedule(table, Geometric(), budget=1, unit="param_bytes")


def test_realised_is_told_beside_asked_and_noted_where_exceeded(tmp_path: Path) -> None:
    table = classify(2000)
    plan = load_plan(save_plan(schedule(table, Geometric(), budget=600), tmp_path / "plan.json"))
    parts = table.split_rows({"a": 0.5, "b": 0.5})
    found = [replay(part, plan) for part in parts.values()]
    for done in found:
        over = float(done.macs.mean()) > 600
        assert done.budget == {"unit": "macs", "batch": 1, "asked": 600.0, "planned": plan.predicted["cost"],
                               "realised": float(done.macs.mean())}
        assert any("budget is exceeded" in note for note in done.notes) == over
    assert {done.budget["realised"] > 600 for done in found} == {True, False}
    (worse,) = (done for done in found if done.budget["realised"] > 600)
    error = float(worse.macs.std()) / 1000**0.5 / 600
    assert f"(standard error {error:.2%}; planned {plan.predicted['cost']:.6g})" in worse.notes[-1]
    assert replay(table, replace(plan, asked={"max_drop": 0.01})).budget == {}


def test_times_that_a_table_lacks_are_noted() -> None:
    plan = schedule(classify(), Geometric(), budget=8.0, unit="latency_ms")
    bare = replay(classify(seed=1, costs=costs_of(3, latency=False)), plan)
    assert "cannot be held against" in bare.notes[-1] and bare.budget == {}


@dataclass(frozen=True)
class Slow:
    thresholds: tuple[float | None, ...]
    seconds: float = 0.004

    def decide(self, exit_index: int, evidence: Evidence) -> torch.Tensor:
        time.sleep(self.seconds)
        assert evidence.logits is not None and evidence.logits.shape[1] == exit_index + 1
        return top(evidence.logits[:, -1]) >= (self.thresholds[exit_index] or 2.0)


def test_a_policys_own_time_a_row_and_what_it_adds_to_the_table() -> None:
    table = classify()
    for batch in (1, 4):
        found = decision_ms(Slow((0.5,) * 2), table, exits=("block0", "block2"), batch=batch, repeats=3)
        assert all(4 / batch <= one < 80 / batch for one in found.decide_ms)
        assert all(0 < whole - added < 8 / batch for whole, added in zip(*found, strict=True))
    quick = decision_ms(Thresholds(thresholds=(0.5,) * 3), table)
    assert all(added < whole for whole, added in zip(*quick, strict=True)), "top is timed with the head"
    pixels = decision_ms(Thresholds(thresholds=(0.5,) * 2), dense())
    assert pixels.added_ms == pixels.decide_ms, "of a dense exit only the summaries are timed with the head"
    assert decision_ms(Slow(()), table, exits=()) == ((), ())


def test_a_timed_policy_is_left_as_found() -> None:
    class Counts:
        asked = 0

        def decide(self, exit_index: int, evidence: Evidence) -> torch.Tensor:
            self.asked += 1
            return torch.ones(len(evidence), dtype=torch.bool)

    policy = Counts()
    decision_ms(policy, classify(), repeats=1)
    assert policy.asked == 0


def test_a_budget_in_milliseconds_counts_the_policys_own() -> None:
    seen = []

    @dataclass(frozen=True)
    class Slowly:
        def fit(self, lesson: Any) -> Any:
            seen.append(lesson.cost)
            at = Geometric().fit(lesson)
            return lambda budget: Slow(at(budget).thresholds)  # type: ignore[attr-defined]

    costs = costs_of(3)
    times = replace(costs.latency[0], backbone_p50_ms=(250.0, 500.0, 750.0, 1000.0), head_p50_ms=(50.0,) * 3 + (0.0,))
    table = classify(costs=replace(costs, latency=(times,)))
    plan = schedule(table, Slowly(), budget=600.0, unit="latency_ms")
    done = replay(table, plan)
    added = plan.predicted["decision_ms"]
    assert len(added) == len(plan.exits) and all(3 < one < 80 for one in added)
    passed = torch.tensor([sum(added[: int(k) + 1]) for k in done.exit_index], dtype=torch.float64)
    assert done.latency_ms is not None
    assert plan.predicted["cost"] == pytest.approx(float((done.latency_ms + passed).mean()))
    assert done.budget["realised"] == plan.predicted["cost"] and 580 < plan.predicted["cost"] <= 600
    assert [one for cost in seen for one in (cost[1:] - cost[:-1]).tolist()][:3] == [300, 300, 250]
    whole = [300 + added[0], 600 + sum(added[:2]), 900 + sum(added), 1150 + sum(added)]
    assert seen[1].tolist() == pytest.approx(whole), "what is learned from counts it too"


def test_one_fit_serves_all_budgets() -> None:
    fits = []

    @dataclass(frozen=True)
    class Counted:
        def fit(self, lesson: Any) -> Any:
            fits.append(lesson.exits)
            return Geometric(skip=1).fit(lesson)

    fitted = Fitted(classify(), Counted())
    assert [fitted.plan(budget).predicted["cost"] <= budget for budget in (500, 600, 700)] == [True] * 3
    assert fits == [4, 3]


def test_against_the_backbone_where_there_are_no_labels() -> None:
    plan = schedule(classify(labels=False), Geometric(), budget=600)
    assert plan.asked["against"] == "backbone" == lesson(classify(labels=False)).against
    assert isinstance(plan, Plan) and plan.asked["scheduler"] == "Geometric(skip=None, over=1.0)"

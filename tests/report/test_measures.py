"""The numbers of a report, each against a witness that does not share its code."""

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from offramp.choose.replay import replay
from offramp.choose.search import search
from offramp.policies.thresholds import Thresholds
from offramp.report.curve import Curve, Point, curve, static_at
from offramp.report.measures import categories, hit_rates, quality_of, reliability, scores_of
from offramp.types import Plan
from report import tables


def plan_of(table, thresholds=(0.8, 0.8, None), **more) -> Plan:
    return Plan(exits=tables.EXITS[:-1], policy=Thresholds(thresholds=thresholds, **more), task=table.task,
                fingerprints=tables.marks("calibration", 1), split="calibration")


def test_quality_is_the_replays_quality() -> None:
    for table in (tables.classify(), tables.dense()):
        done = replay(table, plan_of(table))
        assert quality_of(table).mean(done.column_of.numpy()) == pytest.approx(done.quality)


def test_dense_quality_is_sklearns_jaccard() -> None:
    table = tables.dense(n=3)
    assert table.confusion is not None
    counts = table.confusion[:, 1].sum(0).numpy()
    truth, said = (np.repeat(index, counts.flatten()) for index in np.indices(counts.shape).reshape(2, -1))
    mine = quality_of(table).mean(np.ones(3, int))
    assert mine == pytest.approx(jaccard_score(truth, said, average="macro"))


def test_without_labels_quality_is_agreement() -> None:
    table = tables.classify(labels=False)
    quality = quality_of(table)
    assert quality.name == "agreement"
    assert quality.mean(np.full(len(table), 3)) == 1.0
    assert quality_of(tables.dense(labels=False)).mean(np.full(60, 3)) == pytest.approx(1.0)


def test_interval_covers_the_value_and_narrows_with_more_samples() -> None:
    few, many = (quality_of(tables.classify(n)) for n in (100, 1600))
    widths = []
    for quality, n in ((few, 100), (many, 1600)):
        column = np.zeros(n, int)
        low, high = quality.interval(column)
        assert low <= quality.mean(column) <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2.5
    p = few.mean(np.zeros(100, int))
    assert widths[0] == pytest.approx(2 * 1.96 * (p * (1 - p) / 100) ** 0.5, rel=0.2)  # the normal approximation


def test_a_plan_without_early_exits_has_no_drop_at_all() -> None:
    quality = quality_of(tables.classify())
    assert quality.interval(np.full(300, 3), minus=3) == (0.0, 0.0)


def test_hit_rates_at_the_ends_and_by_hand() -> None:
    table = tables.classify()
    plan = plan_of(table)
    one = hit_rates(table, plan)[0]
    assert one.hit[0] < one.hit[-1] == 1.0, "the lowest threshold lets all leave"
    threshold = one.thresholds[20]
    probs = table.logits[:, 0].softmax(-1)
    kept = probs.amax(-1).double().numpy() >= threshold
    assert one.hit[20] == pytest.approx(kept.mean())
    assert one.quality[20] == pytest.approx((probs.argmax(-1) == table.labels).numpy()[kept].mean())
    assert one.chosen == 0.8 and hit_rates(table, plan)[2].chosen is None


def test_ece_against_a_plain_loop_and_a_perfect_exit() -> None:
    table = tables.classify(600)
    one = reliability(table, bins=6)[0]
    probs = table.logits[:, 0].double().softmax(-1)
    sure, right = probs.amax(-1), (probs.argmax(-1) == table.labels).double()
    order = sure.argsort(stable=True)
    witness = sum(abs(float(sure[part].mean() - right[part].mean())) * len(part) / 600 for part in order.chunk(6))
    assert one.ece == pytest.approx(witness)


def test_temperature_shows_before_and_after() -> None:
    table = tables.classify(600)
    before, *_ = reliability(table, [2.0, 1.0, 1.0])
    assert before.after is not None and before.after.temperature == 2.0
    assert before.after.confidence.mean() < before.confidence.mean()
    assert reliability(table, [2.0, 1.0, 1.0])[1].after is None


def test_categories_add_up_to_who_left() -> None:
    for table in (tables.classify(), tables.dense()):
        done = replay(table, plan_of(table))
        for k, one in enumerate(categories(table, plan_of(table), done.exit_index.numpy())):
            parts = (one.both_right, one.helped, one.hurt, one.same_wrong, one.other_wrong)
            assert sum(parts) == one.left == done.counts[k]
    assert categories(tables.classify(labels=False), plan_of(table), done.exit_index.numpy()) == ()


def test_dense_categories_by_hand() -> None:
    table = tables.dense()
    right = table.confusion.diagonal(dim1=2, dim2=3).sum(2)  # of the 400 pixels of an image: 0.4 is a tenth of a point
    more = (right[:, 2] - right[:, -1]).numpy()
    one = categories(table, plan_of(table), np.full(len(table), 2))[2]
    assert (one.helped, one.hurt) == ((more > 0.4).sum(), (more < -0.4).sum())
    assert one.left > one.hurt > 0, "or the test shows nothing"


def test_scores_are_the_policys_own() -> None:
    table = tables.classify()
    plan = plan_of(table, temperatures=(2.0, 1.0, 0.5))
    assert np.allclose(scores_of(table, plan)[:, 2], (table.logits[:, 2] / 0.5).softmax(-1).amax(-1))


def test_curve_holds_the_plan_and_the_untouched_network() -> None:
    fitted, test = tables.classify(split="calibration", seed=1), tables.classify(seed=2)
    plan = search(fitted, max_drop=0.02)
    found = curve(fitted, test, plan, tolerances=(0.0, 0.02, 0.1))
    done = replay(test, plan)
    assert found.chosen.macs == pytest.approx(float(done.macs.mean()))
    assert found.chosen.quality == pytest.approx(done.quality)
    assert any(one.macs == pytest.approx(found.chosen.macs) for one in found.plans), "its own tolerance is on the curve"
    assert found.backbone.macs == test.costs.macs[-1]
    assert [one.macs for one in found.plans] == sorted(one.macs for one in found.plans)
    assert found.cut[1].macs == test.costs.macs[1] + test.costs.head_macs[1], "one head alone, not those before it"


def test_static_at_is_the_upper_hull() -> None:
    def point(macs: float, quality: float) -> Point:
        return Point(name="", macs=macs, quality=quality)

    found = Curve(quality="accuracy", plans=(), chosen=point(3, 0.9), backbone=point(4, 0.9),
                  cut=(point(1, 0.5), point(2, 0.55)))
    assert static_at(found, 3) == pytest.approx(0.5 + 0.4 * 2 / 3), "the coin between 1 and 4 beats the exit at 2"
    assert static_at(found, 0.5) is None
    assert static_at(found, 9) == 0.9


def test_a_stranger_policy_is_reported_too() -> None:
    class Never:
        def decide(self, exit_index: int, evidence) -> torch.Tensor:
            return torch.zeros(len(evidence), dtype=torch.bool)

    table = tables.classify()
    plan = Plan(exits=tables.EXITS[:1], policy=Never(), task="classify", fingerprints=tables.marks("calibration", 1))
    assert hit_rates(table, plan)[0].chosen is None
    assert scores_of(table, plan).shape == (300, 1)

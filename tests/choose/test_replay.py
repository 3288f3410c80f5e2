from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import jaccard_score

from choose.synthetic import classify, dense, pixels
from offramp.choose import replay as replay_module
from offramp.choose.categories import categories, curve, score
from offramp.choose.replay import replay
from offramp.errors import OfframpError, PlanError
from offramp.policies.thresholds import Thresholds
from offramp.table import ExitTable
from offramp.types import Evidence, Plan


def plan_of(table: ExitTable, exits: tuple[str, ...] = ("block0", "block2"), **policy: object) -> Plan:
    given = {"thresholds": (0.8,) * len(exits), **policy}
    return Plan(exits=exits, policy=Thresholds(**given), task=table.task)  # type: ignore[arg-type]


def test_against_one_sample_at_a_time_in_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_module, "_CHUNK", 37)
    table = classify(200, 3, 5)
    done = replay(table, plan_of(table, temperatures=(1.5, 0.7)))
    assert table.logits is not None and table.labels is not None
    path = {0: 250 + 30, 1: 750 + 60, 2: 1000 + 60}
    right = agree = 0
    for n in range(200):
        at, column = 2, 3
        for k, (e, temperature) in enumerate(((0, 1.5), (2, 0.7))):
            if softmax(table.logits[n, e].double().numpy() / temperature).max() >= 0.8:
                at, column = k, e
                break
        said = int(table.logits[n, column].argmax())
        assert done.exit_index[n] == at and done.column_of[n] == column
        assert done.predictions is not None and done.predictions[n] == said
        assert done.macs[n] == path[at]
        right += said == int(table.labels[n])
        agree += said == int(table.logits[n, 3].argmax())
    assert done.quality == pytest.approx(right / 200)
    assert done.disagreement == pytest.approx(1 - agree / 200)
    assert done.drop == pytest.approx(
        float((table.logits[:, 3].argmax(1) == table.labels).double().mean()) - right / 200)
    assert sum(done.counts) == 200 and 0 < done.counts[0] < 200
    assert done.figures()["latency_batch"] == 1


def test_dense_against_the_pixels() -> None:
    table, (logits, labels) = dense(30, 2), pixels(30, 2)
    done = replay(table, plan_of(table, ("block1",), thresholds=(0.97,), pixel_thresholds=(0.5,)))
    assert 0 < done.counts[0] < 30
    mixed = torch.stack([logits[n, done.column_of[n]].argmax(0) for n in range(30)])
    kept = labels != 255
    assert done.quality == pytest.approx(jaccard_score(labels[kept], mixed[kept], average="macro"))
    told = logits[:, -1].argmax(1)
    assert done.disagreement == pytest.approx(1 - jaccard_score(told.flatten(), mixed.flatten(), average="macro"))
    np.testing.assert_allclose(done.agrees, (mixed == told).flatten(1).double().mean(1), atol=1e-6)
    assert replay(dense(30, 2, labels=False), plan_of(table, ("block1",))).quality is None


def test_no_exit_is_the_backbone() -> None:
    table = classify(50, 2)
    done = replay(table, plan_of(table, ()))
    assert done.drop == 0 and done.disagreement == 0
    assert (done.macs == done.backbone_macs).all() and done.shares == (1.0,)


@dataclass(frozen=True)
class Spy:
    """Leaves every third row; keeps what it was shown."""

    seen: list[tuple[int, torch.Size]]

    def decide(self, exit_index: int, evidence: Evidence) -> torch.Tensor:
        assert evidence.logits is not None
        self.seen.append((exit_index, evidence.logits.shape))
        return torch.arange(len(evidence)) % 3 == 0


def test_a_policy_sees_the_chosen_exits_so_far_and_nobody_who_left() -> None:
    table, spy = classify(30, 3, 5), Spy([])
    done = replay(table, Plan(exits=("block0", "block2"), policy=spy, task="classify"))
    assert spy.seen == [(0, torch.Size([30, 1, 5])), (1, torch.Size([20, 2, 5]))]
    assert done.counts == (10, 7, 13)


def test_labels_change_no_decision() -> None:
    table = classify(60, 3)
    plan = plan_of(table)
    assert torch.equal(replay(table, plan).exit_index, replay(replace(table, labels=None), plan).exit_index)
    assert replay(replace(table, labels=None), plan).drop is None


def test_the_very_split_is_flagged_and_other_networks_are_refused() -> None:
    table = classify(60, 3)
    plan = replace(plan_of(table), fingerprints=table.fingerprints, split=table.split)
    assert "very split" in replay(table, plan).notes[0]
    assert replay(classify(60, 3, seed=1), plan).notes == ()
    with pytest.raises(PlanError, match="network"):
        replay(replace(table, fingerprints={**table.fingerprints, "model": "m9"}), plan)
    with pytest.raises(PlanError, match="exits among"):
        replay(table, replace(plan, exits=("block0", "block7")))
    with pytest.raises(PlanError, match="order of depth"):
        replay(table, replace(plan, exits=("block2", "block0")))
    with pytest.raises(PlanError, match="task"):
        replay(dense(4, 2), plan)


def test_a_policy_that_broadcasts_is_refused() -> None:
    class Broadcast:
        def decide(self, exit_index: int, evidence: Evidence) -> torch.Tensor:
            return torch.ones(len(evidence), 1, dtype=torch.bool)

    with pytest.raises(OfframpError, match="bool"):
        replay(classify(8, 2), Plan(exits=("block0",), policy=Broadcast(), task="classify"))


def test_table_1_against_a_loop() -> None:
    table = classify(300, 3, 5)
    plan = plan_of(table)
    done, rows = replay(table, plan), categories(table, plan)
    assert table.labels is not None and table.logits is not None and done.predictions is not None
    for index, row in enumerate(rows):
        counted = dict.fromkeys(("both", "exit_hurts", "exit_helps", "same_error", "different_error"), 0)
        for n in range(300):
            if done.exit_index[n] != index:
                continue
            c, b, truth = int(done.predictions[n]), int(table.logits[n, -1].argmax()), int(table.labels[n])
            kind = ("both" if c == truth else "exit_hurts") if b == truth else \
                "exit_helps" if c == truth else "same_error" if b == c else "different_error"
            counted[kind] += 1
        for kind, count in counted.items():
            assert getattr(row, kind) == pytest.approx(count / 300), kind
    assert [row.hit_rate for row in rows] == pytest.approx(list(done.shares))
    assert -sum(row.effect for row in rows) == pytest.approx(done.drop)  # Eq. 2, summed
    assert sum(row.bound for row in rows) == pytest.approx(done.disagreement)  # Eq. 3, summed
    for row in rows:
        assert row.bound == pytest.approx(row.hit_rate * (1 - row.agreement))
        assert -row.effect <= row.bound
    with pytest.raises(PlanError, match="labels"):
        categories(replace(table, labels=None), plan)


def test_score_is_the_exact_saving_in_macs() -> None:
    table = classify(300, 3, 5)
    plan = plan_of(table)
    done = replay(table, plan)
    assert score(table, plan) == pytest.approx(300 * done.backbone_macs - float(done.macs.sum()))
    assert score(table, plan_of(table, ())) == 0


def test_curve_of_one_exit() -> None:
    table = classify(300, 2, 5)
    found = curve(table, "block0", thresholds=[0.0, 0.5, 0.9, 2.0])
    assert found.threshold.tolist() == [2.0, 0.9, 0.5, 0.0]
    assert table.logits is not None and table.labels is not None
    sure = table.logits[:, 0].softmax(1).max(1).values >= 0.9
    said, told = table.logits[:, 0].argmax(1), table.logits[:, -1].argmax(1)
    assert found.hit_rate[1] == pytest.approx(float(sure.double().mean()))
    half = table.logits[:, 0].softmax(1).max(1).values >= 0.5
    assert found.agreement[2] == pytest.approx(float((said == told)[half].double().mean()))
    assert found.hit_rate[[0, 3]].tolist() == [0.0, 1.0]
    assert found.agreement[1] == pytest.approx(float((said == told)[sure].double().mean()))
    assert found.accuracy is not None and found.backbone_accuracy is not None
    assert found.accuracy[1] == pytest.approx(float((said == table.labels)[sure].double().mean()))
    assert found.backbone_accuracy[3] == pytest.approx(float((told == table.labels).double().mean()))
    assert np.isnan(found.agreement[0])
    assert curve(replace(table, labels=None), "block0").accuracy is None
    wide = curve(dense(6, 2), "block1", pixel_threshold=0.5)
    assert wide.hit_rate.shape == (101,) and wide.hit_rate[-1] == 1

"""Baselines keep every scheduler's contract, and do what their papers say."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest, spearmanr

from choose.synthetic import classify, dense, pixels
from offramp.errors import DataError, OfframpError
from offramp.policies.lesson import Lesson, Scheduler, lesson
from offramp.policies.quotas import geometric, leave, mean_cost, thresholds_for
from offramp.policies.rules import Agreement, Geometric, Pabee, Patience, Random, Swept, TopShare, scores_of
from offramp.policies.thresholds import Thresholds
from offramp.testing import SchedulerContract
from offramp.types import Evidence, Task

SCHEDULERS: dict[str, tuple[Scheduler, float]] = {  # and how much of a budget it may leave
    "msdnet": (Geometric(), 0.05), "branchynet": (Geometric(confidence="entropy"), 0.05),
    "margin": (Geometric(confidence="margin"), 0.05), "swept": (Swept(), 0.05), "top share": (TopShare(), 0.05),
    "random": (Geometric(confidence="random"), 0.05), "pabee": (Pabee(), 1.0),
    "agreement": (Geometric(confidence="repeats"), 1.0), "vote": (Geometric(confidence="vote"), 1.0),
    "swept vote": (Swept(confidence="vote"), 1.0),
}
DENSE = ("msdnet", "swept", "random", "pabee", "agreement")  # the others differ in what is not the table's
CONTRACT = [name for name in dir(SchedulerContract) if name.startswith("test_")]


def suite(name: str, kind: Task) -> SchedulerContract:
    class Suite(SchedulerContract):
        task, samples = kind, 80 if kind == "classify" else 40
        unspent = SCHEDULERS[name][1] * (1 if kind == "classify" else 2)

        def scheduler(self) -> Scheduler:
            return SCHEDULERS[name][0]

    return Suite()


@pytest.mark.parametrize("test", CONTRACT)
@pytest.mark.parametrize(("name", "task"), [*((name, "classify") for name in SCHEDULERS),
                                            *((name, "dense") for name in DENSE)])
def test_every_baseline_keeps_the_contract(name: str, task: Task, test: str) -> None:
    getattr(suite(name, task), test)()


# ---- what each paper says -----------------------------------------------------------------------------------------


def confidences(taught: Lesson, name: str) -> torch.Tensor:
    return torch.stack([getattr(one, name) for one in taught.signals], 1).float()


@pytest.mark.parametrize("name", ["top", "margin", "entropy"])
def test_geometric_is_the_dearest_of_msdnets_sweep_below_the_budget(name: str) -> None:
    taught = lesson(classify(150, 3))
    scores = confidences(taught, name)
    sweep = [mean_cost(scores, thresholds_for(scores, geometric(ratio, 4)), taught.cost)
             for ratio in np.exp(np.linspace(-8, 8, 400))]
    for budget in (400.0, 650.0, 900.0):
        policy = Geometric(confidence=name).fit(taught)(budget)
        assert isinstance(policy, Thresholds) and policy.confidence == name
        spent = mean_cost(scores, policy.thresholds, taught.cost)
        assert max(cost for cost in sweep if cost <= budget) <= spent <= budget


def test_one_threshold_for_all_is_the_highest_that_the_budget_allows() -> None:
    taught = lesson(classify(60, 3))
    scores = confidences(taught, "top")
    for budget in (300.0, 650.0, 1000.0):
        policy = Swept().fit(taught)(budget)
        assert isinstance(policy, Thresholds) and len(set(policy.thresholds)) == 1
        every = [mean_cost(scores, (float(one),) * 3, taught.cost) for one in scores.flatten()]
        spent = mean_cost(scores, policy.thresholds, taught.cost)
        assert spent == max(cost for cost in every if cost <= budget)


def test_the_top_share_counts_all_samples_at_each_exit() -> None:
    taught = lesson(classify(101, 3))
    policy = TopShare(confidence="margin").fit(taught)(700.0)
    assert isinstance(policy, Thresholds)
    scores = scores_of(policy, taught)
    counts = [int((scores[:, e] >= float(policy.thresholds[e] or 0)).sum()) for e in range(3)]
    assert len(set(counts)) == 1 and 0 < counts[0] < 101
    more = tuple(float(scores[:, e].sort(descending=True).values[counts[0]]) for e in range(3))
    assert mean_cost(scores, policy.thresholds, taught.cost) <= 700 <= mean_cost(scores, more, taught.cost) + 30


def pabee(names: list[int], patience: int) -> int:
    """Where PABEE stops: a counter of repeats that a change of mind sets back to 0."""
    count = 0
    for e, name in enumerate(names[:-1]):
        count = count + 1 if e and name == names[e - 1] else 0
        if count >= patience:
            return e
    return len(names) - 1


@pytest.mark.parametrize("patience", [0, 1, 2, 3, 4])
def test_patience_is_pabees_counter(patience: int) -> None:
    table = classify(80, 4, 3, skill=(0.1, 0.8))
    assert table.logits is not None
    scores = scores_of(Agreement(by="repeats", thresholds=(None,) * 4), lesson(table)) - 1
    policy = Patience(patience=patience)
    taken = torch.stack([policy.decide(e, table.evidence(range(e + 1))) for e in range(4)], 1)
    wanted = [pabee(one, patience) for one in table.logits.argmax(2).tolist()]
    assert leave(taken.double(), (1.0,) * 4).tolist() == wanted == leave(scores, (patience,) * 4).tolist()
    assert len(set(wanted)) > 1 or patience in (0, 4)


def test_pabee_takes_the_longest_patience_within_the_budget() -> None:
    table = classify(80, 4, 3, skill=(0.1, 0.8))
    assert table.logits is not None
    taught = lesson(table)
    costs = [float(np.mean([float(taught.cost[pabee(one, t)]) for one in table.logits.argmax(2).tolist()]))
             for t in range(5)]
    assert costs == sorted(set(costs))
    for budget in (*costs, *(0.5 * (a + b) for a, b in zip(costs, costs[1:], strict=False)), 2 * costs[-1]):
        wanted = max(t for t in range(5) if costs[t] <= budget * (1 + 1e-9))
        assert Pabee().fit(taught)(budget * (1 + 1e-9)) == Patience(patience=wanted)


def test_an_image_is_repeated_where_its_pixels_are() -> None:
    names = pixels(30, 2)[0].argmax(2)
    same = [(names[:, e] == names[:, 1]).double().mean((1, 2)) for e in range(2)]
    alike = float(same[0].median())
    table = dense(30, 2)
    found = Patience(patience=1, alike=alike).decide(1, table.evidence([0, 1]))
    clear = (same[0] - alike).abs() > 1e-6
    assert found[clear].tolist() == (same[0] > alike)[clear].tolist() and 0 < int(found.sum()) < 30


def test_agreement_as_a_score_reaches_what_shares_allow() -> None:
    # the first exit's scores are all equal: its quota must pass on, or nobody would leave before the end
    taught = lesson(classify(200, 3, skill=(1.0, 1.5)))
    for name in ("vote", "repeats"):
        policy = Geometric(confidence=name).fit(taught)(800.0)
        assert isinstance(policy, Agreement) and policy.thresholds[0] is None and policy.thresholds[1] is not None
        assert 560 <= mean_cost(scores_of(policy, taught), policy.thresholds, taught.cost) <= 800


# ---- chance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classify", "two classes", "dense"])
def test_chance_is_uniform_and_knows_nothing(kind: str) -> None:
    if kind == "dense":
        said = torch.randn(3000, 2, 4, generator=torch.Generator().manual_seed(1)).softmax(2)
        shown, sure = [Evidence(probs=said[:, : e + 1]) for e in range(2)], said.amax(2)
    else:
        table = classify(3000, 1, 5 if kind == "classify" else 2)
        assert table.logits is not None
        shown, sure = [table.evidence(range(e + 1)) for e in range(2)], table.logits.softmax(2).amax(2)
    dice = [Random(thresholds=(None, None), seed=seed).score(e, shown[e]) for seed in (0, 1) for e in range(2)]
    for one in dice:
        assert kstest(one.numpy(), "uniform").pvalue > 1e-3
        assert max(abs(spearmanr(one, sure[:, e]).statistic) for e in range(2)) < 0.08  # four standard errors
    for other in dice[1:]:
        assert abs(spearmanr(dice[0], other).statistic) < 0.08
    part = Evidence(logits=shown[0].logits[5:6]) if shown[0].logits is not None else Evidence(probs=said[5:6, :1])
    assert float(Random(thresholds=(None,)).score(0, part)) == pytest.approx(float(dice[0][5]), abs=1e-9)


def test_chance_outlives_the_last_bit() -> None:
    logits = classify(3000, 1).logits
    assert logits is not None
    policy = Random(thresholds=(0.5, 0.5))
    moved = policy.decide(0, Evidence(logits=logits[:, :1] * (1 + 1e-7)))
    assert int((moved != policy.decide(0, Evidence(logits=logits[:, :1]))).sum()) <= 3


def test_faults_are_told() -> None:
    with pytest.raises(OfframpError, match="'mode'"):
        Agreement(by="mode", thresholds=(None,))  # type: ignore[arg-type]
    with pytest.raises(OfframpError, match="patience >= 0"):
        Patience(patience=-1)
    with pytest.raises(OfframpError, match="'sure'"):
        Geometric(confidence="sure").fit(lesson(classify(10, 2)))
    with pytest.raises(DataError, match="row 0"):
        Patience(patience=0).decide(0, Evidence(logits=torch.full((1, 1, 3), torch.nan)))

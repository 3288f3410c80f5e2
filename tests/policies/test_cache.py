"""Selectors and precision bars, against scikit-learn, plain loops and brute force."""

import itertools
import math
from typing import Literal

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from choose.synthetic import classify, dense
from offramp.errors import OfframpError
from offramp.policies.cache import LearnedCache, precise, selector_loss
from offramp.policies.lesson import Scheduler, lesson
from offramp.policies.mamlstop import inputs
from offramp.policies.quotas import leave, mean_cost
from offramp.testing import SchedulerContract
from offramp.types import Evidence


class TestSchedules(SchedulerContract):
    samples = 40
    unspent = 0.4  # shares of hits fall in steps, and one bar moves all exits at once

    def scheduler(self) -> Scheduler:
        return LearnedCache(steps=10, hidden=4)


class TestSchedulesDense(TestSchedules):
    task = "dense"


def test_hits_and_misses_weigh_alike() -> None:
    logits, right = torch.randn(8, 2, dtype=torch.float64), torch.rand(8, 2, dtype=torch.float64)
    said = 0.0
    for e in range(2):
        hits = float(right[:, e].sum())
        for n in range(8):
            p, r = 1 / (1 + math.exp(-float(logits[n, e]))), float(right[n, e])
            said -= 0.5 * (r * math.log(p) / hits + (1 - r) * math.log(1 - p) / (8 - hits))
    assert float(selector_loss(logits, right)) == pytest.approx(said)


def test_a_linear_selector_is_a_balanced_logistic_regression() -> None:
    taught = lesson(classify(100, 2, 3))
    policy = LearnedCache(hidden=0, steps=800, decay=0.1).fit(taught)(float(taught.cost[1]))
    for e in range(2):
        x = inputs(taught.signals[e], vote=False)
        standard = ((x - x.mean(0)) / x.std(0, correction=0).clamp(min=0.05)).numpy()
        witness = LogisticRegression(C=1 / (0.1 * 100), class_weight="balanced", max_iter=1000, tol=1e-8).fit(
            standard, taught.right[:, e])
        np.testing.assert_allclose(policy.score(e, taught.evidence(e)).sigmoid(), witness.predict_proba(standard)[:, 1],
                                   atol=1e-3)


@pytest.mark.parametrize("bar", [0.0, 0.4, 0.7, 0.8, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_as_many_leave_as_the_bar_allows(seed: int, bar: float) -> None:
    draw = np.random.default_rng(seed)
    scores, right = np.round(draw.random((30, 3)), 1), (draw.random((30, 3)) < 0.7).astype(float)
    found = leave(torch.from_numpy(scores), precise(torch.from_numpy(scores), torch.from_numpy(right), bar))
    here = np.arange(30)
    for e in range(3):
        sets = [here[scores[here, e] >= level] for level in np.unique(scores[here, e])]
        best = max((one for one in sets if right[one, e].mean() >= bar - 1e-12), key=len, default=here[:0])
        assert sorted(np.flatnonzero(found == e)) == sorted(best)
        here = np.setdiff1d(here, best)


@pytest.mark.parametrize("precision", [0.5, 0.8, 0.9, 0.97, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_other_choice_of_caches_is_cheaper(seed: int, precision: float) -> None:
    table = classify(120, 4, 4, seed=seed, skill=(0.5, 3.0))
    table = type(table)(**{**vars(table), "costs": table.costs.__class__(
        **{**vars(table.costs), "head_macs": (20, 150, 90, 60, 0), "latency": ()})})
    kept = LearnedCache(steps=40, hidden=4)
    taught = lesson(table)
    _, scores = kept._selectors(taught)
    spent = {}
    for size in range(5):
        for chosen in itertools.combinations(range(4), size):
            paid = torch.from_numpy(table.costs.path((*chosen, 4)))
            own = scores[:, list(chosen)]
            spent[chosen] = mean_cost(own, precise(own, taught.right[:, list(chosen)], precision), paid)
    names = kept.compose(taught, precision=precision)
    assert spent[tuple(map(table.index, names))] == pytest.approx(min(spent.values()), rel=1e-12)
    assert len(names) == min(len(one) for one, cost in spent.items() if cost <= min(spent.values()) * (1 + 1e-12))


def test_too_many_exits_to_try_all_are_refused() -> None:
    with pytest.raises(OfframpError, match="at most 12 early exits, but got 13"):
        LearnedCache().compose(lesson(classify(20, 13, 3)), precision=0.9)


@pytest.mark.parametrize("against", ["labels", "backbone"])
@pytest.mark.parametrize("task", ["classify", "dense"])
def test_every_seed_tells_hits_from_misses(task: str, against: Literal["labels", "backbone"]) -> None:
    make = classify if task == "classify" else dense
    taught, other = (lesson(make(150, 2, seed=seed), against=against) for seed in (0, 1))
    for seed in range(4):
        policy = LearnedCache(steps=80, seed=seed).fit(taught)(float(taught.cost[1]))
        for e in range(2):
            hit = other.right[:, e] > other.right[:, e].median() if task == "dense" else other.right[:, e] > 0
            assert roc_auc_score(hit, policy.score(e, other.evidence(e))) > 0.65, (seed, e)


def test_a_selector_hears_its_own_exit_alone() -> None:
    taught = lesson(classify(40, 2, 3))
    policy = LearnedCache(steps=20).fit(taught)(float(taught.cost[1]))
    logits = taught.evidence(1).logits
    assert logits is not None
    other = torch.stack([logits[:, 0].flip(1), logits[:, 1]], dim=1)
    assert torch.equal(policy.score(1, Evidence(logits=logits)), policy.score(1, Evidence(logits=other)))


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(OfframpError, match="negative"):
        LearnedCache(hidden=-1)

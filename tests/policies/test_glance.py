"""One row in plain arithmetic decides as the tensors do, which are the witness, and mostly without them."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from choose.synthetic import classify, dense
from offramp.errors import DataError, OfframpError
from offramp.policies import EENet, EENetPolicy, Stopping, StoppingPolicy, Swept, Thresholds
from offramp.policies.glance import glance
from offramp.policies.lesson import lesson
from offramp.types import Evidence

KINDS = ["top", "margin", "entropy", "warm", "eenet", "stopping"]


def fitted(kind: str, exits: int = 3, classes: int = 10) -> Any:
    if kind == "warm":
        return Thresholds(thresholds=(0.8, 0.6, 0.5)[:exits], temperatures=(1.7, 0.6, 1.1)[:exits])
    taught = lesson(classify(300, exits, classes, skill=(1.5, 4.0)))
    budget = 0.6 * float(taught.cost[-1])
    if kind == "eenet":
        return EENet(rounds=1).fit(taught)(budget)
    if kind == "stopping":
        return Stopping(points=8).fit(taught)._policy(4.3)
    return Swept(confidence=kind).fit(taught)(budget)


def hard(exits: int = 3, classes: int = 10) -> torch.Tensor:
    """(n, E, K): like those of the lesson; saturated; all but equal; equal; with a class out of reach."""
    draw = torch.Generator().manual_seed(1)
    own = classify(150, exits, classes, seed=5, skill=(1.5, 4.0)).logits
    assert own is not None
    rows = torch.randn(60, exits, classes, generator=draw) * torch.logspace(-6, 3, 60)[:, None, None]
    masked = own[:20, :-1].clone()
    masked[..., 1] = -torch.inf
    return torch.cat([own[:, :-1], rows, torch.zeros(1, exits, classes), masked])


def shown(logits: torch.Tensor, e: int) -> Evidence:
    return Evidence(logits=logits[:, : e + 1])


def of_row(policy: Any, e: int) -> Any:
    return policy._of_row(e) if isinstance(policy, StoppingPolicy) else lambda rows: policy._glance(e, rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("exits", "classes"), [(3, 10), (1, 2), (2, 40)])
def test_it_is_off_by_far_less_than_it_allows_for(kind: str, exits: int, classes: int) -> None:
    policy, logits = fitted(kind, exits, classes), hard(exits, classes)
    settled = 0
    for e in range(exits):
        truth = policy.score(e, shown(logits, e)).double()
        for i, row in enumerate(logits[:, : e + 1].double().tolist()):
            score, slack = of_row(policy, e)(row)
            if score == score:
                settled += 1
                assert abs(score - float(truth[i])) <= slack / 4, (e, i, score, float(truth[i]), slack)
    assert settled > 0.6 * exits * len(logits), "masked and saturated ones are left to the tensors, not all"


@pytest.mark.parametrize("kind", KINDS)
def test_no_decision_differs_however_near_the_threshold(kind: str) -> None:
    policy, logits = fitted(kind), hard()
    for e in range(3):
        scores = policy.score(e, shown(logits, e))
        for i in range(0, len(logits), 7):
            for away in (0.0, 1e-16, -1e-16, 1e-12, 1e-9, -1e-9, 1e-7, -1e-7, 1e-3, -1e-3):
                asked = replace(policy, thresholds=(float(scores[i]) * (1 + away) + away,) * 3)
                alone = asked.decide(e, shown(logits[i : i + 1], e))
                assert torch.equal(alone, scores[i : i + 1] >= asked.thresholds[e]), (e, i, away)


@pytest.mark.parametrize("kind", KINDS)
def test_most_rows_need_no_tensors(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = fitted(kind)
    logits = hard()[:150]
    expected = [policy.decide(e, shown(logits, e)) for e in range(3)]
    asked = []
    own = type(policy).score
    monkeypatch.setattr(type(policy), "score", lambda self, e, seen: asked.append(e) or own(self, e, seen))
    alone = [torch.cat([policy.decide(e, shown(row, e)) for row in logits.split(1)]) for e in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(alone, expected, strict=True))
    assert len(asked) < 0.05 * 3 * len(logits)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_judged_is_refused_as_ever(kind: str) -> None:
    policy, logits = fitted(kind), hard()[:1].clone()
    for broken in (torch.nan, torch.inf):
        for e, place in ((0, 0), (2, 2)):
            spoilt = logits.clone()
            spoilt[0, place, 4] = broken
            for asked in (policy, replace(policy, thresholds=(None,) * 3)):
                with pytest.raises(DataError, match="NaN"):
                    asked.decide(e, shown(spoilt, e))
    if kind in ("eenet", "stopping"):
        with pytest.raises(OfframpError if kind == "eenet" else RuntimeError):
            policy.decide(0, shown(logits[:, :, :7], 0))


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_the_callers_own(kind: str) -> None:
    policy = fitted(kind)
    logits = hard()[:40]
    for row in logits.split(1):
        first = policy.decide(1, shown(row, 1))
        before = bool(first)
        first.logical_not_()
        assert bool(policy.decide(1, shown(row, 1))) is before
    assert not bool(replace(policy, thresholds=(None,) * 3).decide(1, shown(logits[:1], 1)))


def test_it_leaves_to_the_tensors_what_is_not_its_own() -> None:
    def never(rows: list[list[float]]) -> tuple[float, float]:
        raise AssertionError(rows)

    seen = dense(2, 1).evidence([0], torch.tensor([0]))
    two, wide = torch.zeros(2, 1, 5), torch.zeros(1, 1, 1000)
    for evidence in (seen, shown(two, 0), shown(wide, 0), shown(two[:1].bfloat16(), 0), shown(two[:0], 0)):
        assert glance(evidence, 0.5, never) is None
    one = shown(two[:1], 0)
    assert glance(one, 0.5, lambda rows: (0.5001, 1e-3)) is None
    assert glance(one, 0.5, lambda rows: (0.6, 1e-3)).tolist() == [True]  # type: ignore[union-attr]
    assert glance(one, 0.5, lambda rows: (0.4, 1e-3)).tolist() == [False]  # type: ignore[union-attr]
    assert glance(one, None, lambda rows: (float("nan"), 0.0)) is None


def test_weights_of_another_layout_are_left_to_the_tensors() -> None:
    odd = EENetPolicy(weights=((0.1,) * 13, (0.1,) * 13), thresholds=(0.5, 0.5))
    row = hard(2)[:1]
    assert torch.equal(odd.decide(0, shown(row, 0)), odd.score(0, shown(row, 0)) >= 0.5)
    with pytest.raises(ValueError):
        odd.decide(1, shown(row, 1))
    grown = EENetPolicy(weights=((0.1,) * 13, (0.1,) * 14), thresholds=(0.5, 0.42))
    few = shown(row, 0)  # asked at the second exit, shown one
    assert torch.equal(grown.decide(1, few), grown.score(1, few) >= 0.42)
    assert math.isnan(grown._glance(1, [[0.0] * 10])[0])

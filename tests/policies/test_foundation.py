"""What every scheduler stands on: signals, lessons and quotas, each against a witness of its own."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from torch import Tensor

from choose.synthetic import classify, costs_of, dense, pixels
from offramp.errors import DataError, OfframpError, PlanError
from offramp.functional.metrics import accuracy, mean_iou
from offramp.policies.lesson import lesson
from offramp.policies.quotas import between, geometric, leave, mean_cost, threshold_of, thresholds_for, within
from offramp.policies.signals import signals
from offramp.types import Evidence

# ---- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exit_index", [0, 1, 3])
def test_signals_of_logits(exit_index: int) -> None:
    table = classify(60, 3, 4, skill=(0.2, 1.0))
    said, logits = signals(table.evidence(range(exit_index + 1))), table.logits
    assert logits is not None
    probs = torch.softmax(logits[:, exit_index].double(), 1)
    torch.testing.assert_close(said.probs, probs)
    ranked = probs.sort(descending=True).values
    for name, wanted in (("top", ranked[:, 0]), ("margin", ranked[:, 0] - ranked[:, 1]),
                         ("entropy", torch.from_numpy(1 - entropy(probs, axis=1) / math.log(4)))):
        torch.testing.assert_close(getattr(said, name), wanted, atol=1e-6, rtol=0)
    for n in range(60):
        names = [int(logits[n, e].argmax()) for e in range(exit_index + 1)]
        row = 0
        for name in reversed(names):
            if name != names[-1]:
                break
            row += 1
        assert said.vote[n] == names.count(names[-1]) / len(names) and said.repeats[n] == row
    every = ("probs", "top", "margin", "entropy", "vote", "repeats")
    assert {getattr(said, name).dtype for name in every} == {torch.float64}
    assert said.columns().shape == (60, 8) and torch.equal(said.columns()[:, 4], said.top)


def test_signals_of_pixels() -> None:
    logits, _ = pixels(6, 2)
    said = signals(dense(6, 2).evidence(range(3)))
    probs = logits.double().softmax(2)
    torch.testing.assert_close(said.probs, probs[:, 2].mean((2, 3)), atol=1e-6, rtol=0)
    ranked = probs[:, 2].sort(dim=1, descending=True).values
    scores = {"top": ranked[:, 0], "margin": ranked[:, 0] - ranked[:, 1],
              "entropy": 1 - torch.from_numpy(entropy(probs[:, 2], axis=1)) / math.log(4)}
    for name, wanted in scores.items():
        torch.testing.assert_close(getattr(said, name), wanted.mean((1, 2)), atol=1 / 2048 + 1e-6, rtol=0)
    names = logits.argmax(2)
    same = [(names[:, e] == names[:, 2]).double().mean((1, 2)) for e in range(3)]
    torch.testing.assert_close(said.vote, sum(same) / 3, atol=1e-6, rtol=0)
    torch.testing.assert_close(said.repeats, 1 + same[1] + same[1] * same[0], atol=1e-6, rtol=0)


def test_signals_refuse_nan_and_tell_what_lacks() -> None:
    with pytest.raises(DataError, match="row 1 of 2"):
        signals(Evidence(logits=torch.tensor([[[0.0, 1.0]], [[torch.nan, 1.0]]])))
    table = dense(4, 2)
    with pytest.raises(OfframpError, match="agreement=True"):
        signals(replace(table, agreement=None).evidence([0]))
    with pytest.raises(OfframpError, match="margin"):
        signals(replace(table, histograms={"top": table.histograms["top"]}).evidence([0]))


# ---- lessons ------------------------------------------------------------------------------------------------------


def test_a_lesson_pays_for_the_heads_on_the_way() -> None:
    table = classify(20, 3)  # macs 250 500 750 1000, heads of 30
    assert lesson(table).cost.tolist() == [280, 560, 840, 1090]
    ms = lesson(table, unit="latency_ms", batch=32).cost  # 0.01 * macs * 32^0.9 + 0.5 * 32^0.5, a sample's share
    wanted = [(0.01 * macs * 32**0.9 + heads * 0.5 * 32**0.5) / 32 for macs, heads in
              ((250, 1), (500, 2), (750, 3), (1000, 3))]
    np.testing.assert_allclose(ms, wanted)


def test_what_is_right_and_its_value_of_classes() -> None:
    table = classify(80, 2)
    assert table.logits is not None and table.labels is not None
    for against, truth in (("labels", table.labels), ("backbone", table.logits[:, -1].argmax(1))):
        taught = lesson(table, against=against)  # type: ignore[arg-type]
        for e in range(3):
            assert float(taught.value[:, e].mean()) == accuracy(table.logits[:, e].argmax(1), truth)
            assert taught.right[:, e].tolist() == (table.logits[:, e].argmax(1) == truth).double().tolist()
    assert lesson(table).against == "labels" and lesson(classify(9, 2, labels=False)).against == "backbone"


@pytest.mark.parametrize("against", ["labels", "backbone"])
def test_what_is_right_and_its_value_of_pixels(against: str) -> None:
    table = dense(30, 2, seed=1)
    logits, truth = pixels(30, 2, seed=1)
    taught = lesson(table, against=against)  # type: ignore[arg-type]
    names = logits.argmax(2)
    held = truth if against == "labels" else names[:, -1]
    for e in range(3):
        right = [(names[n, e] == held[n])[held[n] != 255].double().mean() for n in range(30)]
        torch.testing.assert_close(taught.right[:, e], torch.stack(right))
    matrices = table.confusion if against == "labels" else table.agreement_confusion
    assert matrices is not None
    whole = float(mean_iou(matrices[:, -1].sum(0)))
    assert float(taught.value[:, -1].mean()) == pytest.approx(whole, abs=1e-12)  # exact at the backbone

    def miou(weights: Tensor) -> float:
        """Of the mixture in which image n counts its exit e with weight w (N, E)."""
        return float(mean_iou((matrices * weights[:, :, None, None]).sum((0, 1))))

    # the value of exit e for image n is the slope of mIoU as the image moves there from the backbone
    last = torch.zeros(30, 3, dtype=torch.float64)
    last[:, -1] = 1
    for n, e in ((0, 0), (7, 1), (29, 0)):
        step = torch.zeros_like(last)
        step[n, e], step[n, -1] = 1e-4, -1e-4
        slope = (miou(last + step) - miou(last - step)) / 2e-4
        assert slope == pytest.approx(float(taught.value[n, e] - taught.value[n, -1]) / 30, abs=1e-9)
    few = last.clone()
    few[:2], few[:2, 1] = 0, 1  # two of thirty images leave
    linear = float((few * taught.value).sum() / 30)
    assert abs(linear - miou(few)) < 0.05 * abs(whole - miou(few)) + 1e-3


def test_lessons_that_cannot_be_taught_are_refused() -> None:
    table = classify(10, 2)
    taught = lesson(table)
    assert taught.feasible(float(taught.cost[0])) == float(taught.cost[0]) and taught.feasible(1e9) == 1e9
    for budget in (0.999 * float(taught.cost[0]), float("nan")):
        with pytest.raises(PlanError, match="cost of the first exit"):
            taught.feasible(budget)
    with pytest.raises(PlanError, match="against='backbone'"):
        lesson(classify(10, 2, labels=False), against="labels")
    with pytest.raises(OfframpError, match="an early exit"):
        lesson(table.select(["final"]))
    with pytest.raises(OfframpError, match="0 samples"):
        lesson(table.slice(slice(0)))
    twice = replace(table, columns=(table.columns[0], replace(table.columns[1], site="block0"), table.columns[2]))
    with pytest.raises(OfframpError, match="one head a site"):
        lesson(twice)
    with pytest.raises(OfframpError, match="'truth'"):
        lesson(table, against="truth")  # type: ignore[arg-type]


def test_a_lesson_shows_what_a_policy_would_see() -> None:
    taught = lesson(classify(10, 2))
    shown = taught.evidence(1, torch.tensor([3, 4]))
    assert shown.logits is not None and taught.table.logits is not None
    assert torch.equal(shown.logits, taught.table.logits[3:5, :2])
    assert len(taught) == 10 and taught.exits == 3 and len(taught.signals) == 2
    assert costs_of(2).path(range(3)).tolist() == taught.cost.tolist()


# ---- quotas -------------------------------------------------------------------------------------------------------


def algorithm_1(scores: list[list[float]], shares: list[float]) -> list[list[int]]:
    """EENet, Algorithm 1, lines 8-18, sample by sample: who leaves at each exit. Quotas by floor, 0 disables."""
    samples, exits = len(scores), len(scores[0])
    gone = [0] * samples
    left: list[list[int]] = []
    for k in range(exits):
        order = sorted(range(samples), key=lambda n: -scores[n][k])
        quota, count, here = math.floor(shares[k] * samples + 1e-9), 0, []
        for n in order:
            if count == quota:
                break
            if gone[n] == 0:
                count += 1
                gone[n] = 1
                here.append(n)
        left.append(sorted(here))
    return left


def leavers(scores: Tensor, thresholds: tuple[float | None, ...]) -> list[list[int]]:
    at = leave(scores, thresholds)
    return [(at == e).nonzero().flatten().tolist() for e in range(scores.shape[1])]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 10_000), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60, deadline=None)
def test_thresholds_are_algorithm_1_where_scores_differ(samples: int, exits: int, seed: int, kind: torch.dtype) -> None:
    draw = np.random.default_rng(seed)
    scores = torch.from_numpy(np.stack([draw.permutation(samples) for _ in range(exits)], 1) / samples).to(kind)
    shares = draw.dirichlet(np.full(exits + 1, 0.6))
    found = thresholds_for(scores, torch.from_numpy(shares))
    assert leavers(scores, found) == algorithm_1(scores.tolist(), shares.tolist())
    assert all(one is None for one, share in zip(found, shares, strict=False) if math.floor(share * samples) == 0)


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_equal_scores_stay_together_within_the_quotas(samples: int, exits: int, levels: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    scores = torch.from_numpy(draw.integers(0, levels, (samples, exits)) / 4)
    shares = draw.dirichlet(np.ones(exits + 1))
    quotas = [math.floor(share * samples) for share in shares[:exits]]
    found = leavers(scores, thresholds_for(scores, torch.from_numpy(shares)))
    gone: list[int] = []
    for e, here in enumerate(found):
        alive = [n for n in range(samples) if n not in gone]
        allowed = sum(quotas[: e + 1]) - len(gone) if quotas[e] else 0
        best: list[int] = []  # the largest set of the surest, equals together, that the quota and its debt allow
        for level in sorted({float(scores[n, e]) for n in alive}, reverse=True):
            reached = [n for n in alive if scores[n, e] >= level]
            best = reached if len(reached) <= allowed else best
        assert here == best
        gone += here


def test_a_quota_of_zero_disables_even_where_scores_are_one() -> None:
    scores = torch.ones(10, 2)
    assert thresholds_for(scores, torch.tensor([0.0, 0.0])) == (None, None)
    assert thresholds_for(scores, torch.tensor([0.09, 1.0]))[0] is None  # floor(0.9) is nobody
    assert leave(scores, (None, None)).tolist() == [2] * 10


def test_what_ties_leave_of_a_quota_passes_on_but_not_past_a_zero() -> None:
    scores = torch.tensor([[1.0, one, 1.0] for one in (1, 1, 1, 1, 1, 1, 0, 0, 0, 0)])
    assert leave(scores, thresholds_for(scores, torch.tensor([0.5, 0.2, 0.3]))).tolist() == [1] * 6 + [2] * 4
    assert thresholds_for(scores, torch.tensor([0.5, 0.0, 0.5]))[:2] == (None, None)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_neighbouring_floats_are_parted(kind: torch.dtype) -> None:
    low = torch.tensor(0.7, dtype=kind)
    for _ in range(4):
        high = torch.nextafter(low, torch.tensor(2.0, dtype=kind))
        threshold = between(low, high)
        assert (torch.stack([low, high]) >= threshold).tolist() == [False, True]
        assert threshold_of(torch.stack([high, low]), 1) == threshold
        low = high


def test_geometric_shares() -> None:
    np.testing.assert_allclose(geometric(0.5, 4), np.array([8, 4, 2, 1]) / 15)
    np.testing.assert_allclose(geometric(3.0, 3), np.array([1, 3, 9]) / 13)
    assert geometric(math.exp(40), 30)[-1] == 1 and geometric(math.exp(-40), 30)[0] == 1  # 30 exits overflow no float


@given(st.floats(0.0, 1.2), st.integers(0, 1000), st.booleans())
@settings(max_examples=60, deadline=None)
def test_within_takes_the_dearest_that_keeps_the_budget(share: float, seed: int, rising: bool) -> None:
    draw = np.random.default_rng(seed)
    steps = np.sort(draw.random(20)) if rising else draw.random(20)
    steps[0] = steps.min()  # the cheap end
    costs = {(float(i),): float(steps[i]) for i in range(20)}
    budget = float(steps[0] + share * (steps.max() - steps[0]))
    found = within(budget, lambda place: (float(int(place)),), lambda one: costs[one], low=0, high=19)  # type: ignore[index]
    spent = costs[found]  # type: ignore[index]
    assert spent <= budget * (1 + 1e-12)
    if rising:
        assert spent == max(cost for cost in costs.values() if cost <= budget * (1 + 1e-12))


def test_within_looks_around_before_it_bisects() -> None:
    costs = [1.0, *[9.0] * 5, 5.0, 5.5, *[9.0] * 12]  # halving visits places 9, 4, 2 ...: all too dear
    found = within(6, lambda place: (float(int(place)),), lambda one: costs[int(one[0] or 0)], low=0, high=19)
    assert found == (7.0,)


def test_mean_cost_by_hand() -> None:
    scores, cost = torch.tensor([[0.9, 0.9], [0.2, 0.8], [0.1, 0.1]]), torch.tensor([1.0, 10.0, 100.0])
    assert mean_cost(scores, (0.5, 0.5), cost) == 111 / 3
    assert mean_cost(scores, (None, 0.1), cost) == 10

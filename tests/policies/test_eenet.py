"""EENet against plain loops, numeric optima, and each place where public code for it breaks."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from choose.synthetic import classify, dense
from offramp.choose.replay import Replay, replay
from offramp.errors import OfframpError, PlanError
from offramp.functional.confidence import top
from offramp.policies import eenet_fit
from offramp.policies.eenet import EENet, EENetPolicy, course_of, likelihood, read
from offramp.policies.eenet_fit import assign, assignment_loss, chain, cost_loss, fit_scores, score_loss, target
from offramp.policies.lesson import Lesson, lesson
from offramp.policies.quotas import geometric, mean_cost, thresholds_for, within
from offramp.policies.signals import signals
from offramp.table import ExitTable
from offramp.testing import PolicyContract, SchedulerContract
from offramp.types import Evidence, Plan, Policy

WEIGHTS = ((0.1, -0.2, 0.3, 0.0, 0.1, 0.9, -0.4, 0.2), (0.0, 0.3, 0.0, -0.3, 0.1, 1.4, -0.5, 0.1, -0.3))


def shy(samples: int, exits: int = 3, classes: int = 10, *, seed: int = 0, timid: float = 0.35) -> ExitTable:
    """Exits are as often right on half of the classes, but less sure of it (the paper's Fig. 4)."""
    table = classify(samples, exits, classes, seed=seed)
    assert table.logits is not None
    said = table.logits.argmax(dim=2, keepdim=True) < classes // 2
    return replace(table, logits=torch.where(said, table.logits * timid, table.logits))


def obeyed(table: ExitTable, policy: Policy) -> Replay:
    return replay(table, Plan(exits=table.names[:-1], policy=policy, task=table.task))


def between(cost: torch.Tensor, share: float) -> float:
    return float(cost[0] + share * (cost[-1] - cost[0]))


# ---- the policy -----------------------------------------------------------------------------------------------


class TestPolicy(PolicyContract):
    def policy(self) -> Policy:
        return EENetPolicy(weights=WEIGHTS, thresholds=(0.5, 0.8))


@cache
def fitted(task: str) -> EENetPolicy:
    taught = lesson(classify(120, 3, 4) if task == "classify" else dense(40, 2))
    return EENet().fit(taught)(between(taught.cost, 0.4))


class TestFitted(PolicyContract):
    exits, classes = 3, 4

    def policy(self) -> Policy:
        return replace(fitted("classify"))


class TestDense(PolicyContract):
    task, classes = "dense", 4

    def policy(self) -> Policy:
        return replace(fitted("dense"))


class TestScheduler(SchedulerContract):
    def scheduler(self) -> EENet:
        return EENet(rounds=1)

    def budgets(self, taught: Lesson) -> Sequence[float]:
        return super().budgets(taught)[::2]


class TestSchedulerDense(TestScheduler):
    task = "dense"


def test_each_exit_is_read_as_the_signals_say() -> None:
    logits = torch.randn(50, 4, 3) * 3
    for table in (classify(20, 3, 5), dense(12, 2)):
        for e in range(len(table.columns)):
            shown = table.evidence(range(e + 1))
            said, found = signals(shown), read(shown)[:, -1]
            wanted = torch.cat([said.probs, torch.stack([said.top, said.entropy, said.vote], 1)], 1)
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    whole = read(Evidence(logits=logits))
    for e in range(4):
        assert torch.equal(whole[:, e, -1], signals(Evidence(logits=logits[:, : e + 1])).vote)


def test_the_score_is_the_papers_sum_with_clamped_scores_fed_forward() -> None:
    logits = torch.randn(40, 2, 5) * 4
    policy = EENetPolicy(weights=WEIGHTS, thresholds=(None, None))
    found = [policy.score(e, Evidence(logits=logits[:, : e + 1])) for e in range(2)]
    over = 0
    for n in range(40):
        fed: list[float] = []
        for k in range(2):
            p = logits[n, k].double().softmax(0)
            statistics = [float(p.max()), 1 + float((p * p.log()).sum()) / math.log(5),
                          1.0 if k == 0 else float(logits[n, 0].argmax() == logits[n, 1].argmax()) / 2 + 0.5]
            inputs = [*p.tolist(), *statistics, *fed]
            raw = sum(w * x for w, x in zip(WEIGHTS[k], inputs, strict=True))
            assert float(found[k][n]) == pytest.approx(raw, abs=1e-12)
            over += raw > 1
            fed.append(min(max(raw, 0.0), 1.0))
    assert over, "no score was above 1: the clamp was not looked at"
    assert found[0].shape == found[1].shape == (40,)


def test_all_faults_of_a_policy_are_told() -> None:
    with pytest.raises(OfframpError) as caught:
        EENetPolicy(weights=((0.1, math.inf), (0.1,) * 9, (0.1,)), thresholds=(math.nan,))
    for part in ("weights of 3 exits for 1", "[2, 9, 1] weights", "weight inf", "threshold nan"):
        assert part in str(caught.value)
    with pytest.raises(OfframpError) as caught:
        EENet(beta=0.0, rounds=-1, scores="best", distribution="normal")  # type: ignore[arg-type]
    for part in ("beta 0.0", "rounds -1", "'best'", "'normal'"):
        assert part in str(caught.value)


# ---- losses ---------------------------------------------------------------------------------------------------


def drawn(rows: int = 7, exits: int = 3) -> Any:
    draw = torch.Generator().manual_seed(3)
    return (torch.rand(rows, exits, generator=draw, dtype=torch.float64) for _ in range(3))


def test_the_loss_of_scores_is_eq_6_with_its_sign_put_back() -> None:
    scores, right, weight = drawn()
    scores = 0.02 + 0.96 * scores
    right[::2] = (right[::2] > 0.5).double()
    total = 0.0
    for n in range(7):
        for k in range(3):
            q, said = float(right[n, k]), float(scores[n, k])
            total -= float(weight[n, k]) * (q * math.log(said) + (1 - q) * math.log(1 - said)) / 3
    assert float(score_loss(scores, right, weight)) == pytest.approx(total, rel=1e-12)


def test_a_sure_and_wrong_score_is_still_pulled_back() -> None:
    raw = torch.tensor([[3.0], [-2.0], [1.7], [-0.4]], dtype=torch.float64, requires_grad=True)
    loss = score_loss(raw, torch.tensor([[0.0], [1.0], [1.0], [0.0]]), torch.ones(4, 1))
    assert math.isfinite(loss.item())
    loss.backward()
    assert raw.grad is not None and raw.grad[:, 0].sign().tolist() == [1, -1, 0, 0]
    line = torch.linspace(-1, 2, 301, dtype=torch.float64)[:, None]
    for q in (0.0, 0.3, 1.0):
        along = torch.stack([score_loss(z[None], torch.full((1, 1), q), torch.ones(1, 1)) for z in line])
        assert bool((along.diff().diff() >= -1e-9).all()), "not convex"


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_the_target_is_the_optimum_of_eq_7(beta: float) -> None:
    scores = torch.tensor([[0.9, 0.5, 0.7], [0.05, 0.2, 0.99]], dtype=torch.float64)
    for row, found in zip(scores, target(scores, beta), strict=True):
        def worth(free: Any, row: Any = row) -> float:
            p = np.exp(free - np.logaddexp.reduce(free))
            return float(-(p @ np.log(row.numpy()) - beta * p @ np.log(p)))

        best = minimize(worth, np.zeros(3), tol=1e-12).x
        np.testing.assert_allclose(found, np.exp(best - np.logaddexp.reduce(best)), atol=1e-4)


def test_where_every_score_is_0_every_exit_is_as_good() -> None:
    assert target(torch.zeros(2, 4, dtype=torch.float64), 0.5).tolist() == [[0.25] * 4] * 2


def test_the_loss_of_assignments_is_eqs_9_and_10() -> None:
    raw, wanted, _ = drawn()
    wanted[0, 0] = 0.0  # 0 log 0 is 0
    wanted /= wanted.sum(1, keepdim=True)
    cost, said = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64), []
    kl = paid = 0.0
    for n in range(7):
        powers = [math.exp(float(raw[n, k])) for k in range(3)]
        said.append([power / sum(powers) for power in powers])
        for k in range(3):
            if float(wanted[n, k]):
                kl += float(wanted[n, k]) * math.log(float(wanted[n, k]) / said[n][k]) / 21
            paid += said[n][k] * float(cost[k]) / 7
    assert float(cost_loss(torch.tensor(said, dtype=torch.float64), cost, 3.0)) == pytest.approx(abs(3 - paid) / 3)
    assert float(assignment_loss(raw, wanted, cost, 3.0, 10.0)) == pytest.approx(kl + 10 * abs(3 - paid) / 3)


def test_gradients_are_those_of_finite_differences() -> None:
    scores, right, weight = drawn()
    raw = (scores * 1.6 - 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: score_loss(z, right, weight), (raw,))
    cost = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: assignment_loss(z, target(right, 0.7), cost, 3.0, 10.0), (raw,))


# ---- learning -------------------------------------------------------------------------------------------------


def test_scores_are_learned_to_the_minimum_that_scipy_finds() -> None:
    course = course_of(lesson(shy(150, 1, 3)))
    weight = torch.rand(course.right.shape, dtype=torch.float64)
    weight /= weight.sum(dim=0)
    found = fit_scores(course, weight, course.start, spread=0.3)
    read_, right, w = course.inputs[0].double().numpy(), course.right[:, 0].numpy(), weight[:, 0].numpy()

    def objective(psi: Any) -> float:
        def surprise(p: Any) -> Any:
            return np.where(p < 0.01, 1 - p / 0.01 - math.log(0.01), -np.log(np.clip(p, 0.01, 1)))

        z = read_ @ psi
        loss = (w * (right * surprise(z) + (1 - right) * surprise(1 - z))).sum()
        return float(loss + ((psi - course.start[0].numpy()) ** 2).sum() / (2 * 0.3**2 * 150))

    best = minimize(objective, course.start[0].numpy(), method="Powell", options={"xtol": 1e-9, "ftol": 1e-13})
    assert objective(found[0].numpy()) <= best.fun + 1e-5
    assert objective(course.start[0].numpy()) > best.fun + 1e-3, "there was nothing to learn"


def test_what_is_fed_forward_in_training_is_what_a_policy_feeds() -> None:
    taught = lesson(shy(200, 3, 4))
    policy = EENet().fit(taught)(between(taught.cost, 0.3))
    course = course_of(taught)
    rows = [*(torch.tensor(row, dtype=torch.float64) for row in policy.weights), course.start[-1]]
    trained = chain(course, rows)
    assert bool((trained[:, :-1] > 1).any()), "no score was clamped: nothing was shown"
    for e in range(3):
        torch.testing.assert_close(policy.score(e, taught.evidence(e)), trained[:, e], atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_assignments_reach_the_whole_range_of_budgets(share: float) -> None:
    course = course_of(lesson(classify(200)))
    budget = between(course.cost, share)
    given = assign(course, chain(course, course.start).clamp(0, 1), budget, beta=1.0, alpha_cost=10.0, hidden=0.5,
                   seed=0)
    assert given.shape == (200, 4) and torch.allclose(given.sum(dim=1), torch.ones(200, dtype=torch.float64))
    assert float((given @ course.cost).mean()) == pytest.approx(budget, rel=0.03)


def test_assignments_are_learned_and_not_only_tilted() -> None:
    side = torch.tensor([[1.0], [-1.0]]).repeat(60, 1)
    scores = torch.cat([side, -side], dim=1).double() * 0.4 + 0.5
    course = eenet_fit.Course(inputs=(side, side), start=(torch.zeros(1), torch.zeros(1)), right=scores,
                              cost=torch.tensor([1.0, 2.0], dtype=torch.float64))
    given = assign(course, scores, 1.5, beta=1.0, alpha_cost=10.0, hidden=8.0, seed=0)
    torch.testing.assert_close(given, target(scores, 1.0), atol=0.1, rtol=0)


def test_the_best_assignment_is_kept_and_not_what_became_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    course = course_of(lesson(classify(100)))
    scores = chain(course, course.start).clamp(0, 1)
    seen: list[float] = []

    def watched(raw: torch.Tensor, *rest: Any) -> torch.Tensor:
        loss = assignment_loss(raw, *rest)
        if len(raw) == 100:
            seen.append(float(loss))
        return loss

    monkeypatch.setattr(eenet_fit, "assignment_loss", watched)
    given = assign(course, scores, 500.0, beta=1.0, alpha_cost=10.0, hidden=0.5, seed=0, batch=64, rate=1.0)
    cost = course.cost / course.cost[-1]
    kept = float(assignment_loss(given.log(), target(scores, 1.0), cost, 500 / float(course.cost[-1]), 10.0))
    assert kept <= min(seen) * 1.002 and seen[-1] > kept * 1.01


@pytest.mark.parametrize("make", [EENet(), EENet(scores="top"), EENet(distribution="geometric")])
@pytest.mark.parametrize("table", [classify(150), dense(40)], ids=["classify", "dense"])
def test_every_budget_is_kept_and_nearly_used(make: EENet, table: ExitTable) -> None:
    taught = lesson(table)
    at, widest = make.fit(taught), float(taught.cost.diff().max())
    for share in (0.0, 0.05, 0.5, 1.0, 1.5):
        budget = between(taught.cost, share)
        seen = obeyed(table, at(budget))
        assert float(seen.macs.mean()) <= budget * (1 + 1e-12)
        steps = (min(budget, float(taught.cost[-1])) - float(seen.macs.mean())) * len(table) / widest
        assert steps <= 3, f"{steps:.1f} samples more could have gone one exit further"
        if share == 0.0:
            assert seen.counts[0] == len(table)
        if share >= 1.0:
            assert at(budget).thresholds == (None,) * (taught.exits - 1) and seen.counts[-1] == len(table)
    with pytest.raises(PlanError, match="first exit"):
        at(float(taught.cost[0]) * 0.99)


def test_it_is_better_where_classes_differ_whatever_the_seed() -> None:
    gains = []
    for seed in range(10):
        taught, held = lesson(shy(500, 2, 6, seed=seed)), shy(4000, 2, 6, seed=100 + seed)
        budget = between(taught.cost, 0.35)
        made = [option.fit(taught)(budget) for option in
                (EENet(seed=seed), EENet(scores="top", distribution="geometric"))]
        ours, plain = (obeyed(held, policy) for policy in made)
        assert ours.quality is not None and plain.quality is not None
        slope = 1e-4  # quality a mac, generously: held-out costs differ a little
        gains.append(ours.quality - plain.quality - slope * max(0.0, float((ours.macs - plain.macs).mean())))
    assert min(gains) > -0.005 and float(np.mean(gains)) > 0.01, gains


def test_fitted_twice_it_is_the_same_in_any_order_of_budgets() -> None:
    taught = lesson(classify(150))
    at, again = EENet(seed=4).fit(taught), EENet(seed=4).fit(taught)
    budgets = [between(taught.cost, 0.2), between(taught.cost, 0.6)]
    assert [at(budget) for budget in budgets] == [again(budget) for budget in reversed(budgets)][::-1]


@pytest.mark.parametrize("right", [False, True])
def test_a_lesson_with_nothing_to_tell_apart(right: bool) -> None:
    table = classify(60, 2, 4)
    assert table.labels is not None and table.logits is not None
    logits = table.logits.clone()
    logits[torch.arange(60), :, table.labels] = 9.0 if right else -9.0
    taught = lesson(replace(table, logits=logits))
    budget = between(taught.cost, 0.5)
    assert float(obeyed(taught.table, EENet().fit(taught)(budget)).macs.mean()) <= budget


def test_without_labels_the_backbone_teaches() -> None:
    taught = lesson(classify(100, labels=False))
    assert EENet().fit(taught)(500.0).thresholds != (None, None, None)


def test_the_distribution_alone_and_the_scores_alone() -> None:
    table = shy(200, 2, 4)
    taught = lesson(table)
    budget = between(taught.cost, 0.4)
    alone = EENet(scores="top").fit(taught)(budget)
    assert all(sum(row) == row[4] == 1 for row in alone.weights)
    assert table.logits is not None
    scores = torch.stack([top(table.logits[:, e].double()) for e in range(2)], dim=1)
    both = EENet(scores="top", distribution="geometric").fit(taught)(budget)
    msdnet = within(budget, lambda t: thresholds_for(scores, geometric(math.exp(t), 3)),
                    lambda found: mean_cost(scores, found, taught.cost), low=-60.0, high=60.0)
    assert both.thresholds == pytest.approx(msdnet, abs=1e-6) and both.thresholds != alone.thresholds
    learned = EENet(distribution="geometric").fit(taught)
    assert learned(budget).weights == learned(budget * 1.2).weights != both.weights


# ---- regression -----------------------------------------------------------------------------------------------


def regression(samples: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Features that tell how hard a sample is, in their own units, and errors that fall with depth."""
    draw = np.random.default_rng(seed)
    hard = draw.gamma(1.0, 1.0, samples)
    told = [np.stack([100 + 30 * (hard + draw.normal(0, 0.3, samples)), draw.normal(size=samples)], 1)
            for _ in range(3)]
    errors = np.stack([np.abs(draw.normal(0, 1, samples)) * hard / (1 + 2 * e) for e in range(3)], axis=1)
    return [torch.from_numpy(one).float() for one in told], torch.from_numpy(errors)


def test_a_regression_sends_on_what_is_hard() -> None:
    cost = torch.tensor([1.0, 2.0, 3.0])
    features, errors = regression(600, 0)
    policy = EENet().fit_errors(features, errors, cost)(1.6)
    held, missed = regression(4000, 1)
    at = torch.full((4000,), 2)
    for e in (1, 0):
        at[policy.decide(e, held[: e + 1])] = e
    paid = float(cost[at].mean())
    mean = [float(one) for one in (missed**2).mean(dim=0)]
    blind = mean[0] + (paid - 1) / 2 * (mean[2] - mean[0])  # a draw between the first exit and the last, at this cost
    assert paid == pytest.approx(1.6, abs=0.1)
    assert float((missed[torch.arange(4000), at] ** 2).mean()) < 0.6 * blind


def test_units_of_features_do_not_matter_and_budgets_are_kept() -> None:
    cost = torch.tensor([1.0, 2.0, 3.0])
    features, errors = regression(300, 0)
    other = [one.double() * 0.01 - 7 for one in features]
    at, again = EENet().fit_errors(features, errors, cost), EENet().fit_errors(other, errors, cost)
    assert torch.equal(at(1.0).decide(0, features[:1]), torch.ones(300, dtype=torch.bool))
    assert at(3.0).thresholds == (None, None)
    ours, theirs = at(1.7), again(1.7)
    for e in range(2):
        torch.testing.assert_close(ours.score(e, features), theirs.score(e, other), atol=2e-3, rtol=0)
    boosted = EENet(spread=1e-4).fit_errors(features, errors, cost)(1.7)
    assert boosted.weights[1] == pytest.approx((0, 0, 0, 1), abs=1e-3), "a score does not start as the one before it"
    with pytest.raises(PlanError, match="first exit"):
        at(0.9)
    with pytest.raises(OfframpError, match="2 features, 3 costs, 3 exits"):
        EENet().fit_errors(features[:2], errors, cost)


def test_a_small_error_is_likelier_than_a_large_one() -> None:
    found = likelihood(torch.tensor([[0.0, 1.0, 2.0]]))
    variance = 5 / 3
    assert found[0].tolist() == pytest.approx([1, math.exp(-1 / (2 * variance)), math.exp(-4 / (2 * variance))])
    assert likelihood(torch.zeros(2, 2)).tolist() == [[1, 1], [1, 1]]

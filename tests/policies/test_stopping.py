"""Optimal stopping against a tabular dynamic program, all rules that there are, and other people's regressions."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SklearnRidge

from choose.synthetic import classify, costs_of
from offramp.choose.replay import replay
from offramp.errors import OfframpError
from offramp.policies.lesson import lesson
from offramp.policies.quotas import leave
from offramp.policies.rules import Swept
from offramp.policies.stopping import Stopping, StoppingPolicy
from offramp.policies.thresholds import Thresholds
from offramp.policies.values import Ridge, fit_voices, log_probs, posterior, read
from offramp.table import ExitTable
from offramp.testing import SchedulerContract
from offramp.types import Plan


class TestStopping(SchedulerContract):
    def scheduler(self) -> Stopping:
        return Stopping(points=16)


class TestDense(SchedulerContract):
    task = "dense"
    samples = 60

    def scheduler(self) -> Stopping:
        return Stopping(points=16)


# ---- the optimum where it is known ----------------------------------------------------------------------------

STATES, EXITS = 3, 3
SURE = torch.tensor([2.0, 0.9, 0.3])  # how an exit speaks in each state
RIGHT = np.array([[0.4, 0.15, 0.05], [0.2, 0.3, 0.05], [0.15, 0.3, 0.1]])  # exit, state: those in the last stay lost
MOVES = np.array([[[0.9, 0.1, 0.0], [0.3, 0.6, 0.1], [0.0, 0.05, 0.95]],
                  [[1.0, 0.0, 0.0], [0.2, 0.8, 0.0], [0.0, 0.0, 1.0]]])
START = np.array([0.4, 0.4, 0.2])


def walks(samples: int, seed: int = 0) -> ExitTable:
    """Samples that walk between three states; exit e always names class e, so that it tells its state and no more."""
    draw = np.random.default_rng(seed)
    state = np.empty((samples, EXITS), int)
    state[:, 0] = draw.choice(STATES, samples, p=START)
    for e in range(1, EXITS):
        chance = MOVES[e - 1, state[:, e - 1]].cumsum(axis=1)
        state[:, e] = (draw.random(samples)[:, None] > chance).sum(axis=1).clip(max=STATES - 1)
    chance = RIGHT[np.arange(EXITS), state].cumsum(axis=1)
    label = (draw.random(samples)[:, None] > chance).sum(axis=1)  # class 3: no exit is right
    logits = SURE[torch.from_numpy(state)][:, :, None] * torch.eye(EXITS, EXITS + 1)
    table = classify(samples, EXITS - 1, EXITS + 1)
    return replace(table, logits=logits, labels=torch.from_numpy(label), costs=costs_of(EXITS - 1))


def states_of(table: ExitTable) -> np.ndarray:
    assert table.logits is not None
    return (table.logits.amax(dim=2)[:, :, None] - SURE).abs().argmin(dim=2).numpy()


def every_rule(table: ExitTable) -> list[tuple[float, float]]:
    """(mean value, mean cost) of every rule that stays or goes by the state: 2^6 of them."""
    taught, state = lesson(table), states_of(table)
    right, cost, every = taught.right.numpy(), taught.cost.numpy(), np.arange(len(table))
    found = []
    for rule in product((0, 1), repeat=STATES * (EXITS - 1)):
        stops = np.array(rule).reshape(EXITS - 1, STATES)
        at = np.full(len(table), EXITS - 1)
        for e in range(EXITS - 2, -1, -1):
            at[stops[e, state[:, e]] == 1] = e
        found.append((float(right[every, at].mean()), float(cost[at].mean())))
    return found


def tabular(price: float) -> float:
    """The optimal value by dynamic programming over the chain's own probabilities."""
    cost = lesson(walks(4)).cost.numpy()
    value = RIGHT[-1] - price * cost[-1]
    for e in range(EXITS - 2, -1, -1):
        value = np.maximum(RIGHT[e] - price * cost[e], MOVES[e] @ value)
    return float(START @ value)


def test_backward_induction_finds_the_rules_that_are_best_of_all() -> None:
    path, held = Stopping(points=32).fit(lesson(walks(3000))), walks(20_000, seed=1)
    taught = lesson(held)
    ends = []
    for budget in torch.linspace(float(taught.cost[0]), float(taught.cost[-1]), 15).tolist():
        policy = path(budget)
        scores = torch.stack([policy.score(e, taught.evidence(e)) for e in range(EXITS - 1)], dim=1)
        ends.append(leave(scores, policy.thresholds)[:, None])
    at = torch.cat(ends, dim=1)
    rules = every_rule(held)
    for price in (5e-5, 1.5e-4, 3e-4):
        best = max(value - price * cost for value, cost in rules)
        assert best == pytest.approx(tabular(price), abs=8e-3)  # the enumeration against the closed form
        reached = float((taught.right.gather(1, at) - price * taught.cost[at]).mean(dim=0).max())
        assert best - 4e-3 <= reached <= best + 4e-3


def test_of_two_exits_the_better_is_found_where_thresholds_on_confidence_cannot() -> None:
    # lost samples are the least sure, and going on gains them nothing: whoever leaves by confidence sends them on
    held = walks(20_000, seed=1)
    taught = lesson(held)
    budget = float(taught.cost[0] + 0.25 * (taught.cost[-1] - taught.cost[0]))
    policy = Stopping().fit(lesson(walks(3000)))(budget)
    leaves = policy.decide(0, held.evidence([0]))
    share = [float(leaves[torch.from_numpy(states_of(held)[:, 0] == state)].double().mean()) for state in range(3)]
    assert share[2] == 1 and share[1] < 1
    assert isinstance(policy, StoppingPolicy)


def test_where_confidence_says_all_it_is_one_threshold() -> None:
    # exits of a made table differ in nothing but how sure they are: what more was learned is the samples' noise
    for seed in range(2):
        taught = lesson(classify(300, 3, 5, seed=seed))
        budget = 0.5 * float(taught.cost[-1])
        policy = Stopping().fit(taught)(budget)
        assert policy == Swept().fit(taught)(budget)
        assert isinstance(policy, Thresholds)


# ---- its parts ------------------------------------------------------------------------------------------------


def test_leave_one_out_is_what_leaving_one_out_gives() -> None:
    draw = torch.Generator().manual_seed(0)
    design = torch.randn(30, 6, generator=draw, dtype=torch.float64)
    targets = design[:, :2] + torch.randn(30, 2, generator=draw, dtype=torch.float64)
    ours = Ridge(design)
    coefficients, constants = ours.solve(targets, 3.0)
    theirs = SklearnRidge(alpha=3.0).fit(design, targets)
    np.testing.assert_allclose(coefficients.T, theirs.coef_, atol=1e-9)
    np.testing.assert_allclose(constants, theirs.intercept_, atol=1e-9)
    for n in (0, 7, 29):
        others = np.arange(30) != n
        # the centre stays that of all samples' design: a shift of it alone, which the constant takes up
        left_out = SklearnRidge(alpha=3.0).fit(design[others], targets[others]).predict(design[n : n + 1])
        np.testing.assert_allclose(ours.left_out(targets, 3.0)[n], left_out[0], atol=1e-9)


def test_voices_are_the_likeliest_as_scikit_learn_finds_them() -> None:
    table = classify(400, 1, 3)
    assert table.logits is not None and table.labels is not None
    told = log_probs(table.logits)
    weight, bias = fit_voices(told[:, :1], table.labels, prior=1e-6)
    theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=5000).fit(told[:, 0].numpy(), table.labels)
    def nll(logits: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits, table.labels))
    ours = nll(weight * told[:, 0] + bias)
    full = nll(torch.from_numpy(theirs.decision_function(told[:, 0].numpy())))
    assert full - 1e-9 <= ours < nll(told[:, 0])  # theirs has a whole matrix where ours has one weight
    for step in (-0.02, 0.02):  # no neighbour is likelier
        assert nll((weight + step) * told[:, 0] + bias) > ours
        for k in range(3):
            moved = bias.clone()
            moved[k] += step
            assert nll(weight * told[:, 0] + moved) > ours


def test_hindsight_is_calibrated() -> None:
    table = classify(3000, 3, 5)
    assert table.logits is not None and table.labels is not None
    hoped = posterior(table.logits, table.labels, prior=2.0)
    right = lesson(table).right
    assert float((hoped.mean(dim=0) - right.mean(dim=0)).abs().max()) < 0.02
    assert float((hoped - right).square().mean()) < float((right.mean(dim=0) - right).square().mean())


def test_a_masked_class_and_a_saturated_softmax_stay_finite() -> None:
    table = classify(200, 2, 4)
    assert table.logits is not None
    logits = table.logits * 1e3
    logits[:, :, 0] = -torch.inf
    path = Stopping(points=8).fit(lesson(replace(table, logits=logits)))
    policy = path(600.0)
    for e in range(2):
        assert bool(policy.score(e, replace(table, logits=logits).evidence(range(e + 1))).isfinite().all())


def test_what_is_foreseen_is_near_what_comes() -> None:
    fit, held = classify(1500, 3, 5), classify(8000, 3, 5, seed=1)
    path, taught = Stopping(points=24).fit(lesson(fit)), lesson(held)
    for budget in (400.0, 700.0):
        policy = path(budget)
        scores = torch.stack([policy.score(e, taught.evidence(e)) for e in range(3)], dim=1)
        at = leave(scores, policy.thresholds)
        value, cost = path.foreseen(budget)
        assert value == pytest.approx(float(taught.right.gather(1, at[:, None]).mean()), abs=0.03)
        assert cost == pytest.approx(float(taught.cost[at].mean()), rel=0.05)


def test_what_is_foreseen_is_of_the_policy_that_is_given() -> None:
    """With few samples that is one threshold, of which the lesson itself tells all."""
    table = classify(60, 3, 5)
    taught = lesson(table)
    path = Stopping(points=8).fit(taught)
    kinds = set()
    for share in (0.4, 0.5, 0.6, 0.7, 0.8):
        policy = path(budget := share * float(taught.cost[-1]))
        kinds.add(type(policy))
        if isinstance(policy, Thresholds):
            done = replay(table, Plan(exits=table.names[:-1], policy=policy, task="classify"))
            assert done.correct is not None
            value, cost = path.foreseen(budget)
            assert value == pytest.approx(float(done.correct.double().mean()))
            assert cost == pytest.approx(float(done.macs.mean()))
    assert Thresholds in kinds


def test_the_evidence_of_one_voice_is_the_exits_own_confidence() -> None:
    table = classify(50, 1, 4)
    assert table.logits is not None
    voices = torch.tensor([[1.0]], dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    stats = read(table.evidence([0]), voices).stats
    probs = table.logits[:, 0].double().softmax(dim=1).sort(descending=True).values
    np.testing.assert_allclose(stats[:, 0], (probs[:, 0] / (1 - probs[:, 0])).log(), atol=1e-6)
    np.testing.assert_allclose(stats[:, 1], (probs[:, 0] / probs[:, 1]).log().clamp(max=14), atol=1e-6)
    np.testing.assert_allclose(stats[:, 2], torch.special.entr(probs).sum(dim=1), atol=1e-9)


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OfframpError, match="1 constants for 2 thresholds"):
        StoppingPolicy(thresholds=(0.0, 0.0), constants=(0.0,), weights=((), ()), centres=((), ()), spreads=((), ()),
                       bent=((), ()), knots=((), ()), levels=((), ()), slopes=((), ()), probs=((), ()))
    with pytest.raises(OfframpError, match="points"):
        Stopping(points=1)

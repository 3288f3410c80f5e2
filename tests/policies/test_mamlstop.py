"""Stop networks and what trains them, against closed forms, plain loops and scikit-learn."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from sklearn.linear_model import LogisticRegression

from choose.synthetic import classify, dense
from offramp.errors import OfframpError, PlanError
from offramp.policies.lesson import Lesson, Scheduler, lesson
from offramp.policies.mamlstop import (
    MamlStop,
    StopNets,
    _Dual,
    free_energy,
    imitation,
    inputs,
    multiplier,
    oracle,
    relative_loss,
    stop_at,
    train_nets,
)
from offramp.policies.quotas import leave
from offramp.testing import PolicyContract, SchedulerContract
from offramp.types import Evidence, Policy

QUICK: dict[str, Any] = {"steps": 10, "tune_steps": 5, "hidden": 4}


class TestKeepsTheContract(PolicyContract):
    def policy(self) -> Policy:
        draw = torch.Generator().manual_seed(0)
        nets = [[torch.randn(size, generator=draw).tolist() for size in ((3, 10), (1, 4))] for _ in range(2)]
        return StopNets(thresholds=(0.5, None), nets=nets)  # type: ignore[arg-type]  # as JSON gives them


class TestSchedules(SchedulerContract):
    samples = 40

    def scheduler(self) -> Scheduler:
        return MamlStop(**QUICK)


class TestSchedulesDense(TestSchedules):
    task = "dense"


def stacked(taught: Lesson) -> torch.Tensor:
    return torch.stack([inputs(said, vote=True) for said in taught.signals])


def outcome(policy: StopNets, taught: Lesson) -> tuple[float, float]:
    """(value, cost), means over the lesson's samples."""
    scores = torch.stack([policy.score(e, taught.evidence(e)) for e in range(taught.exits - 1)], dim=1)
    at = leave(scores, policy.thresholds)
    return float(taught.value[torch.arange(len(taught)), at].mean()), float(taught.cost[at].mean())


def test_objectives_are_those_of_plain_loops() -> None:
    logits, losses = torch.randn(6, 3, dtype=torch.float64), torch.rand(6, 4, dtype=torch.float64)
    target, beta, kl, energy = oracle(losses, 0.3), 0.3, 0.0, 0.0
    for row, lost, wanted in zip(logits.tolist(), losses.tolist(), target.tolist(), strict=True):
        left, whole = 1.0, sum(math.exp(-one / beta) for one in lost)
        for k, lose in enumerate(lost):
            stop = 1 / (1 + math.exp(-row[k])) if k < 3 else 1.0
            q, left = left * stop, left * (1 - stop)
            assert wanted[k] == pytest.approx(math.exp(-lose / beta) / whole)
            kl += wanted[k] * math.log(wanted[k] / q) / 6
            energy += q * (lose + beta * math.log(q)) / 6
    assert float(imitation(target, stop_at(logits))) == pytest.approx(kl)
    assert float(free_energy(losses, stop_at(logits), beta)) == pytest.approx(energy)


def test_the_oracle_is_the_optimum_and_what_is_lost_is_the_reverse_kl() -> None:
    losses, log_q, beta = torch.rand(50, 4).double(), torch.randn(50, 4).double().log_softmax(1), 0.2
    best = oracle(losses, beta)
    least = -beta * (-losses / beta).logsumexp(dim=1).mean()
    torch.testing.assert_close(free_energy(losses, best.log(), beta), least)
    torch.testing.assert_close(free_energy(losses, log_q, beta) - least, beta * imitation(log_q.exp(), best.log()))


def test_a_loss_of_nothing_sure_is_no_nan() -> None:
    target = torch.tensor([[1.0, 0.0]])
    assert float(imitation(target, stop_at(torch.tensor([[200.0]])))) == pytest.approx(0)
    assert float(free_energy(torch.zeros(1, 2), stop_at(torch.tensor([[200.0]])), 1.0)) == pytest.approx(0)


def test_a_linear_network_imitates_as_weighted_logistic_regressions_do() -> None:
    taught = lesson(classify(100, 2, 3))
    x, decay, target = stacked(taught), 0.01, oracle(relative_loss(taught), 0.3)
    nets = train_nets(x, lambda logits: imitation(target.float(), stop_at(logits)), hidden=0, steps=800, decay=decay,
                      seed=0)
    policy = StopNets(thresholds=(None, None), nets=nets)
    for e in range(2):
        standard = ((x[e] - x[e].mean(0)) / x[e].std(0, correction=0).clamp(min=0.05)).numpy()
        weight = np.concatenate([target[:, e], target[:, e + 1 :].sum(1)])
        witness = LogisticRegression(C=1 / (decay * 100), max_iter=1000, tol=1e-8).fit(
            np.tile(standard, (2, 1)), np.repeat([1, 0], 100), weight)
        np.testing.assert_allclose(policy.score(e, taught.evidence(e)).sigmoid(), witness.predict_proba(standard)[:, 1],
                                   atol=1e-3)


def test_lambda_is_where_the_oracle_spends_the_budget() -> None:
    losses, cost = torch.rand(80, 3).double(), torch.tensor([0.2, 0.5, 1.0]).double()

    def spends(price: float) -> float:
        return float((oracle(losses + price * cost, 0.1) @ cost).mean())

    assert multiplier(losses, cost, 0.4, 0.1) == pytest.approx(brentq(lambda p: spends(p) - 0.4, 0, 100), rel=1e-9)
    assert multiplier(losses, cost, 1.0, 0.1) == 0
    assert spends(multiplier(losses, cost, 0.2, 0.1)) == pytest.approx(0.2)


def test_in_the_last_stage_the_distribution_spends_the_budget() -> None:
    taught = lesson(classify(200, 2, 3))
    losses, share = relative_loss(taught).float(), (taught.cost / taught.cost[-1]).float()
    seen = []
    dual = _Dual(losses, share, 0.55, 0.1, 0.0)

    def watched(logits: torch.Tensor) -> torch.Tensor:
        seen.append(float((stop_at(logits.detach()).exp() @ share).mean()))
        return dual(logits)

    train_nets(stacked(taught), watched, hidden=4, steps=200, decay=0.01, seed=0)
    assert abs(seen[0] - 0.55) > 0.03 and seen[-1] == pytest.approx(0.55, abs=0.01) and dual.price > 0


@pytest.mark.parametrize("against", ["labels", "backbone"])
@pytest.mark.parametrize("task", ["classify", "dense"])
def test_every_seed_trains_beyond_chance_and_keeps_budgets(task: str, against: Literal["labels", "backbone"]) -> None:
    make = classify if task == "classify" else dense
    taught, other = (lesson(make(120, 2, seed=seed), against=against) for seed in (0, 1))
    budget = float(taught.cost[0] + taught.cost[-1]) / 2
    for seed in range(3):
        policy = MamlStop(steps=60, tune_steps=30, seed=seed).fit(taught)(budget)
        assert outcome(policy, taught)[1] <= budget
        value, cost = outcome(policy, other)
        chance = np.interp(cost, other.cost, other.value.mean(0))  # the same cost, who leaves drawn by lot
        assert value > chance + (0.02 if task == "classify" else 0.001), seed


def test_scores_have_the_same_bits_in_any_batch() -> None:
    taught = lesson(classify(33, 2, 5))
    policy = MamlStop(**QUICK).fit(taught)(float(taught.cost[1]))
    for e in range(2):
        alone = [policy.score(e, taught.evidence(e, torch.tensor([n]))) for n in range(33)]
        assert torch.equal(torch.cat(alone), policy.score(e, taught.evidence(e)))


def test_inputs_end_with_the_vote() -> None:
    said = lesson(classify(20, 2, 5)).signals[1]
    assert torch.equal(inputs(said, vote=True)[:, -1], said.vote)
    assert torch.equal(inputs(said, vote=False), inputs(said, vote=True)[:, :-1])


def test_it_trains_where_gradients_are_off() -> None:
    taught = lesson(classify(40, 2, 3))
    budget = float(taught.cost[1])
    with torch.no_grad():
        inside = MamlStop(**QUICK).fit(taught)(budget)
    assert inside == MamlStop(**QUICK).fit(taught)(budget)
    assert inside.nets != MamlStop(**QUICK, seed=1).fit(taught)(budget).nets


def test_what_cannot_decide_is_refused() -> None:
    row = (0.0, 1.0)
    for nets, fault in [((), "0 networks for 1"), ((((row, row),),), "do not fit"), ((((row,), (row, row)),), "do not"),
                        (((((0.0,), row),),), "do not fit")]:
        with pytest.raises(OfframpError, match=fault):
            StopNets(thresholds=(0.5,), nets=nets)
    with pytest.raises(OfframpError, match="threshold nan"):
        StopNets(thresholds=(math.nan,), nets=(((row,),),))
    with pytest.raises(OfframpError, match="expected 1 inputs, but got 6"):
        StopNets(thresholds=(0.5,), nets=(((row,),),)).decide(0, Evidence(logits=torch.zeros(3, 1, 2)))
    with pytest.raises(OfframpError, match="beta"):
        MamlStop(beta=0)
    taught = lesson(classify(30, 2, 3))
    with pytest.raises(PlanError, match="budget"):
        MamlStop(**QUICK).fit(taught)(0.5 * float(taught.cost[0]))

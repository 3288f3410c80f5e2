"""The two limits against linear programs, all assignments, and closed forms."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from choose.synthetic import classify, dense
from offramp.errors import OfframpError, PlanError
from offramp.functional.metrics import mean_iou
from offramp.policies.lesson import Lesson, lesson
from offramp.policies.limits import no_information, oracle, room_taken


def budgets(taught: Lesson, shares: tuple[float, ...] = (0.0, 0.1, 0.35, 0.5, 0.8, 1.0, 1.5)) -> list[float]:
    return [float(taught.cost[0] + share * (taught.cost[-1] - taught.cost[0])) for share in shares]


def program(cost: np.ndarray, value: np.ndarray, budget: float) -> float:
    """The best mean value of a mixture, sample by sample, as a linear program."""
    samples, exits = value.shape
    found = linprog(-value.ravel() / samples, A_ub=np.tile(cost / samples, samples)[None], b_ub=[budget],
                    A_eq=np.kron(np.eye(samples), np.ones(exits)), b_eq=np.ones(samples), bounds=(0, 1))
    return -float(found.fun)


@pytest.mark.parametrize("task", ["classify", "dense"])
def test_the_oracle_is_the_optimum_of_the_linear_program(task: str) -> None:
    taught = lesson(classify(60, 3) if task == "classify" else dense(24, 3))
    for budget in budgets(taught):
        found = oracle(taught, budget)
        assert found.value == pytest.approx(program(taught.cost.numpy(), taught.value.numpy(), budget), abs=1e-9)
        assert found.cost <= budget * (1 + 1e-9)
        assert found.exit_index is not None
        assert float(taught.cost[found.exit_index].mean()) <= budget * (1 + 1e-9)


def test_whole_samples_come_within_one_of_the_best_of_all_assignments() -> None:
    taught = lesson(classify(7, 2, seed=3))
    cost, value, every = taught.cost.numpy(), taught.value.numpy(), np.arange(7)
    for budget in budgets(taught):
        best = max(value[every, list(at)].mean() for at in product(range(3), repeat=7)
                   if cost[list(at)].mean() <= budget + 1e-9)
        found = oracle(taught, budget)
        assert found.quality <= best + 1e-12 <= found.value + 1e-9
        assert best - found.quality <= 1 / 7 + 1e-12


def test_a_dense_oracle_tells_the_true_miou_of_its_mixture() -> None:
    taught = lesson(dense(24, 2))
    found = oracle(taught, budgets(taught)[3])
    assert found.exit_index is not None and taught.table.confusion is not None
    mixed = taught.table.confusion[torch.arange(24), found.exit_index].sum(dim=0)
    assert found.quality == pytest.approx(float(mean_iou(mixed)))


def test_a_die_reaches_the_hull_of_the_exits() -> None:
    taught = lesson(classify(300, 3))
    cost, mean = taught.cost.numpy(), taught.value.mean(dim=0).numpy()
    for budget in budgets(taught):
        found = no_information(taught, budget)
        b = min(budget, cost[-1])
        # closed form: the best chord over the budget, or point below it, between two exits
        chords = [mean[i] + (mean[j] - mean[i]) * (b - cost[i]) / (cost[j] - cost[i])
                  for i in range(4) for j in range(4) if cost[i] <= b < cost[j]]
        assert found.value == pytest.approx(max([*chords, *(mean[cost <= b])]))
        assert float(found.shares.sum()) == pytest.approx(1) and float(found.shares.min()) >= 0
        assert float(found.shares @ taught.cost) <= budget * (1 + 1e-9)
        assert found.quality == pytest.approx(found.value)


def test_an_exit_under_the_hull_takes_nobody() -> None:
    table = classify(200, 2)
    assert table.logits is not None
    table.logits[:, 1] = -table.logits[:, 1]  # exit 1 is as wrong as can be
    taught = lesson(table)
    for budget in budgets(taught):
        assert float(no_information(taught, budget).shares[1]) == 0


def test_the_room_between_them() -> None:
    taught = lesson(classify(200, 3))
    budget = budgets(taught)[3]
    low, high = no_information(taught, budget).quality, oracle(taught, budget).quality
    assert room_taken(taught, budget, low) == 0
    assert room_taken(taught, budget, (3 * high + low) / 4) == pytest.approx(0.75)
    with pytest.raises(OfframpError, match="no room|room between"):
        wrong = classify(5, 1)
        assert wrong.logits is not None
        wrong.logits[:, 0] = wrong.logits[:, 1]
        room_taken(lesson(wrong), 1e9, 0.5)


def test_a_budget_below_the_first_exit_is_refused() -> None:
    taught = lesson(classify(20))
    for limit in (oracle, no_information):
        with pytest.raises(PlanError, match="first exit"):
            limit(taught, 0.9 * float(taught.cost[0]))

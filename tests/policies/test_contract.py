"""Our own policy keeps the contract, and the contracts catch policies and schedulers that do not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from offramp.policies.lesson import Lesson, Scheduler
from offramp.policies.rules import Geometric
from offramp.policies.thresholds import Thresholds
from offramp.testing import PolicyContract, SchedulerContract
from offramp.types import Evidence, Policy


class TestTop(PolicyContract):
    def policy(self) -> Policy:
        return Thresholds(thresholds=(0.7, None), temperatures=(1.3, 0.8))


class TestEntropy(PolicyContract):
    exits, classes = 3, 2

    def policy(self) -> Policy:
        return Thresholds(confidence="entropy", thresholds=(0.3, 0.5, 0.9))


class TestDense(PolicyContract):
    task = "dense"

    def policy(self) -> Policy:
        return Thresholds(confidence="margin", thresholds=(0.4, 0.6), pixel_thresholds=(0.5, None))


@dataclass(frozen=True)
class Broken:
    """Breaks the contract in one way."""

    way: str = ""

    def decide(self, exit_index: int, evidence: Evidence) -> Any:
        assert evidence.logits is not None
        score = evidence.logits[:, -1].softmax(1).amax(1)
        if self.way == "write":
            evidence.logits.mul_(2)
        return {
            "float": lambda: (score > 0.6).float(), "broadcast": lambda: (score > 0.6)[:, None].expand(-1, 2),
            "batch": lambda: score > score.mean(), "dice": lambda: torch.rand(len(score)) < 0.5,
            "first": lambda: torch.arange(len(score)) == 0, "nan": lambda: score > 0.6, "write": lambda: score > 0.6,
        }[self.way]()


@pytest.mark.parametrize(("way", "test"), [
    ("float", "test_one_bool_a_row"), ("broadcast", "test_one_bool_a_row"), ("batch", "test_a_row_is_judged_alone"),
    ("dice", "test_asked_twice_it_says_the_same"), ("first", "test_equal_evidence_gets_equal_answers"),
    ("nan", "test_nan_is_refused"), ("write", "test_evidence_is_left_as_found"),
    ("dice", "test_saved_and_loaded_it_decides_the_same"), ("float", "test_a_saturated_softmax_is_judged"),
    ("batch", "test_replayed_on_a_table_without_labels_it_decides_as_live"),
])
def test_a_broken_policy_is_caught(way: str, test: str) -> None:
    class Suite(PolicyContract):
        def policy(self) -> Policy:
            return Broken(way)

    with pytest.raises(AssertionError):
        getattr(Suite(), test)()


@dataclass(frozen=True)
class Careless:
    """A scheduler that breaks the contract in one way."""

    way: str

    def fit(self, taught: Lesson) -> Callable[[float], Policy]:
        low, high = float(taught.cost[0]), float(taught.cost[-1])
        at, early = Geometric().fit(taught), taught.exits - 1
        if self.way == "nan" and bool((taught.right == taught.right[:, :1]).all()):
            return lambda budget: Thresholds(thresholds=(None,) * early)
        if self.way == "write" and taught.table.logits is not None:
            taught.table.logits.mul_(1.5)
        noise = float(torch.rand(())) / 4 if self.way == "dice" else 0.0
        truth = taught.table.labels
        asked: list[float] = []

        def made(budget: float) -> Policy:
            asked.append(budget)
            return {
                "over": lambda: at(1.05 * budget), "miser": lambda: at(low), "any": lambda: at(max(budget, low)),
                "dice": lambda: at(max(low, budget - noise * (high - low))), "write": lambda: at(budget),
                "first": lambda: at(min(asked)), "batch": lambda: Broken("batch"), "nan": lambda: at(budget),
                "peek": lambda: at(low if truth is not None else budget),
            }[self.way]()

        return made


@pytest.mark.parametrize(("way", "test"), [
    ("over", "test_budgets_are_kept"), ("over", "test_one_sample"), ("over", "test_all_equal_scores"),
    ("over", "test_a_saturated_softmax"), ("over", "test_a_masked_class"), ("miser", "test_budgets_are_used"),
    ("any", "test_a_budget_below_the_first_exit_is_refused"), ("batch", "test_its_policies_keep_the_contract"),
    ("batch", "test_live_equals_replay"), ("dice", "test_fitted_twice_it_is_the_same"),
    ("first", "test_fitted_twice_it_is_the_same"), ("dice", "test_the_process_is_left_as_found"),
    ("write", "test_the_table_is_left_as_found"), ("nan", "test_exits_that_are_never_right_or_always"),
    ("peek", "test_without_labels_it_learns_from_the_backbone"),
])
def test_a_careless_scheduler_is_caught(way: str, test: str) -> None:
    class Suite(SchedulerContract):
        def scheduler(self) -> Scheduler:
            return Careless(way)

    with pytest.raises(AssertionError):
        getattr(Suite(), test)()

"""Our own policy keeps the contract, and the contract catches those that do not."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from offramp.policies.thresholds import Thresholds
from offramp.testing import PolicyContract
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
])
def test_a_broken_policy_is_caught(way: str, test: str) -> None:
    class Suite(PolicyContract):
        def policy(self) -> Policy:
            return Broken(way)

    with pytest.raises(AssertionError):
        getattr(Suite(), test)()

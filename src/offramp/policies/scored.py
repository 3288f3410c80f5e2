"""What most policies share: a score at each exit, held against a threshold. n rows, E early exits."""

from typing import Protocol

import torch
from torch import Tensor

from offramp.errors import DataError, OfframpError
from offramp.types import Evidence

__all__ = ["Scored", "checked", "leave_above"]


class Scored(Protocol):
    """A policy whose rows leave where ``score >= threshold``; what a scheduler fits thresholds to."""

    @property
    def thresholds(self) -> tuple[float | None, ...]:
        """One an exit, the backbone left out; None: no row leaves."""
        ...

    def score(self, exit_index: int, evidence: Evidence) -> Tensor:
        """What is held against the threshold: (n,), larger leaves sooner."""
        ...

    def decide(self, exit_index: int, evidence: Evidence) -> Tensor: ...


def leave_above(threshold: float | None, score: Tensor, exit_index: int) -> Tensor:
    """Bool (n,): the rows that leave. Raises DataError on NaN, which no threshold can judge."""
    if bool(score.isnan().any()):
        raise DataError(
            expected="confidences between 0 and 1", where=f"exit {exit_index}",
            got=f"NaN in row {int(score.isnan().nonzero()[0])} of {len(score)}",
            todo="look at that input, and at the exit's head.",
        )
    if threshold is None:
        return torch.zeros(len(score), dtype=torch.bool, device=score.device)
    return score >= threshold


def checked(leaves: Tensor, rows: int, exit_index: int) -> Tensor:
    """A policy's answer, refused where it is not bool (n,): a broadcast there would mix samples."""
    if leaves.dtype != torch.bool or tuple(leaves.shape) != (rows,):
        raise OfframpError(
            expected=f"bool ({rows},) from the policy", got=f"{leaves.dtype} {tuple(leaves.shape)}",
            where=f"exit {exit_index}", todo="decide() gives one True or False a row.",
        )
    return leaves

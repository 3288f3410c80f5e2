"""What a scheduler learns from: a table's evidence, how right each exit is, and what leaving there costs.

N samples, E exits, the last being the backbone. A scheduler is fitted once to a lesson and then gives a policy for each
budget: :class:`Scheduler`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from offramp.errors import OfframpError, PlanError
from offramp.policies.signals import Signals, signals
from offramp.table import ExitTable, Unit
from offramp.table.payload import payload, quality
from offramp.types import Evidence, Policy

__all__ = ["Lesson", "Scheduler", "lesson"]


class Scheduler(Protocol):
    """Something that learns who should leave where: fitted to a lesson once, it gives a policy for each budget."""

    def fit(self, lesson: "Lesson", /) -> Callable[[float], Policy]:
        """``at(budget)`` is a policy whose mean cost on the lesson's samples is at most the budget."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """One head a site: of a table with more, ``select`` the columns first."""

    table: ExitTable
    against: Literal["labels", "backbone"]
    unit: Unit
    batch: int

    def __len__(self) -> int:
        return len(self.table)

    @property
    def exits(self) -> int:
        """E, the backbone counted."""
        return len(self.table.columns)

    @cached_property
    def cost(self) -> Tensor:
        """(E,) float64 rising: what a sample pays that leaves at each exit, the heads passed on the way counted."""
        columns = range(self.exits)
        return torch.from_numpy(self.table.costs.path(columns, self.unit, batch=self.batch).copy())

    @cached_property
    def right(self) -> Tensor:
        """(N, E) float64 in [0, 1]: whether an exit is right, or on what share of the image's counted pixels."""
        if self.table.task == "classify":
            return torch.from_numpy(payload(self.table, self.against)[0][:, :, 0])
        matrices = self.table.confusion if self.against == "labels" else self.table.agreement_confusion
        assert matrices is not None, "lesson() looked"
        counted = matrices.sum(dim=(2, 3)).double()
        return matrices.diagonal(dim1=2, dim2=3).sum(dim=2).double() / counted.clamp(min=1)

    @cached_property
    def value(self) -> Tensor:
        """(N, E) float64: what a sample adds to the quality N times over, so that a mixture's mean is its quality.

        Classification: ``right``. Dense: mIoU made linear at the backbone's own sums (exact there and to first order
        around), since mIoU of a mixture is no mean over images.
        """
        if self.table.task == "classify":
            return self.right
        hit, union = payload(self.table, self.against)
        own, all_of = hit[:, -1].sum(axis=0), union[:, -1].sum(axis=0)
        there = all_of > 0
        slope = np.divide(1.0, all_of, out=np.zeros_like(all_of), where=there) / max(int(there.sum()), 1)
        ratio = np.divide(own, all_of, out=np.zeros_like(own), where=there)
        gains = (hit * slope - union * (slope * ratio)).sum(axis=2)
        return torch.from_numpy(len(self) * gains + float(quality(own, all_of)))

    def evidence(self, exit_index: int, rows: Tensor | None = None) -> Evidence:
        """What a policy sees at an exit, having passed all before it."""
        return self.table.evidence(range(exit_index + 1), rows)

    @cached_property
    def signals(self) -> tuple[Signals, ...]:
        """Of each early exit, of all samples."""
        return tuple(signals(self.evidence(e)) for e in range(self.exits - 1))

    def feasible(self, budget: float) -> float:
        """The budget, or PlanError where even the first exit for everyone costs more."""
        if not budget >= float(self.cost[0]) * (1 - 1e-9):
            raise PlanError(
                expected=f"a budget of at least {float(self.cost[0]):g} {self.unit}, the cost of the first exit",
                got=f"{budget:g}", where="a scheduler", todo="raise the budget, or train an earlier exit.")
        return budget


def lesson(table: ExitTable, *, unit: Unit = "macs", batch: int = 1,
           against: Literal["auto", "labels", "backbone"] = "auto") -> Lesson:
    """What ``table`` teaches: costs in ``unit`` ("macs", or "latency_ms" at ``batch``), answers held against labels.

    "auto" takes the backbone's own answers where the table has no labels.
    """
    if against not in ("auto", "labels", "backbone"):
        raise OfframpError(expected="against 'auto', 'labels' or 'backbone'", got=repr(against), where="lesson()")
    if len({column.site for column in table.columns}) < len(table.columns):
        raise OfframpError(expected="one head a site", got=f"{len(table.columns)} columns, several at a site",
                           where="lesson()", todo="choose some: table.select(plan.exits).")
    if len(table) == 0 or len(table.columns) < 2:
        raise OfframpError(expected="samples, and an early exit", where="lesson()",
                           got=f"{len(table)} samples, {len(table.columns) - 1} early exits")
    if against == "labels" and not table.has_labels:
        raise PlanError(expected="a table with labels", got="one without", where="lesson(against='labels')",
                        todo="take against='backbone'.")
    chosen: Literal["labels", "backbone"] = "labels" if against != "backbone" and table.has_labels else "backbone"
    return Lesson(table=table, against=chosen, unit=unit, batch=batch)

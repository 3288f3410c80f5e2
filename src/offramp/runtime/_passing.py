"""One forward pass, as a policy that keeps an account of what is spent sees it (``policies.switch.Switch``)."""

from typing import Any

import torch

from offramp.types import Plan, Policy

__all__ = ["Passing"]


class Passing:
    """The policy in force from the first row to the last, told at the end where all of them left.

    A plan's policy with ``begin(rows)`` gives each pass a policy of its own, which has ``observe(exit_index)``. Rows
    whose fate stays open, as the caller stopped listening or an input was refused, are charged the exit they reached.
    """

    def __init__(self, plan: Plan, rows: int) -> None:
        begin = getattr(plan.policy, "begin", None) if plan.setting == "input_dependent" else None
        self._turn: Any = None if begin is None else begin(rows)
        self.policy: Policy = plan.policy if self._turn is None else self._turn
        self._exits: list[tuple[int, int]] = []
        self._rows = rows
        self.reached = -1

    def left(self, exit_index: int, rows: int) -> None:
        """The exit was reached, and so many rows left there."""
        self.reached = exit_index
        self._exits.append((exit_index, rows))
        self._rows -= rows

    def end(self) -> None:
        """Say where the rows left; a pass that broke off before its first exit says of none."""
        if self._turn is not None:
            known = self._exits if self.reached < 0 else [*self._exits, (self.reached, self._rows)]
            self._turn.observe(torch.tensor([k for k, rows in known for _ in range(rows)], dtype=torch.int64))

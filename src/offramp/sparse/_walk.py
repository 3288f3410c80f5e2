"""One batch on its way: which of its images run sparsely, each in a runner of its own, and which still densely."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from offramp.graph import State
from offramp.sparse.lower import Lowered
from offramp.sparse.plain import Runner

__all__ = ["Walk", "resized"]

Dense = Callable[[int, State, fx.GraphModule | None], tuple[State | None, Tensor]]


class Walk:
    """Goes from exit to exit. An image that runs sparsely does so to the end: masks only shrink."""

    def __init__(self, lowered: Lowered, lend: Callable[[], Runner], dense: Dense, state: State, above: float) -> None:
        """dense: runs a stage on all places; of images whose mask is denser than ``above``."""
        self._lowered, self._lend, self._dense, self._above = lowered, lend, dense, above
        self._state: State | None = state
        self._rows = list(range(state.rows))  # that run densely
        self._runners: dict[int, Runner] = {}

    @torch.inference_mode()
    def go_on(self, k: int, mask: Tensor, carried: Tensor, stop: Tensor | None, deadline_ns: int | None
              ) -> Tensor | None:
        """Exit k's logits under the mask of the exit before, whose own are ``carried``; None where it was stopped."""
        self._sparsen(k, mask)
        at = self._lowered.logits[k - 1]
        program = self._lowered.program
        level = program.levels[program.maps[at].level]
        out = resized(carried, (level.height, level.width)).clone(memory_format=torch.contiguous_format)
        if self._rows:
            if (stop is not None and bool(stop)) or (deadline_ns is not None and time.monotonic_ns() >= deadline_ns):
                return None
            assert self._state is not None
            self._state, fresh = self._dense(k, self._state, self._lowered.end)
            rows = torch.tensor(self._rows, device=out.device)
            out[rows] = torch.where(resized(mask[rows], out.shape[2:]), fresh, out[rows])
        for n, runner in self._runners.items():
            if bool(mask[n].any()):
                runner.settle(mask[n, 0])
                if not runner.run(k - 1, stop, deadline_ns):
                    return None
                runner.read_active(at, out[n])
        return out

    def _sparsen(self, k: int, mask: Tensor) -> None:
        """Hand images with few active places over to runners, and forget those with none."""
        state = self._state
        if not self._rows or state is None:
            return
        shares = mask.flatten(1).float().mean(1).tolist()
        stay = [n for n in self._rows if shares[n] > self._above]
        if stay and len(stay) < len(self._rows) and state.why_not:
            stay = []  # the network would run another program for fewer rows
        for i, n in enumerate(self._rows):
            if n not in stay and shares[n] > 0:
                self._runners[n] = runner = self._lend()
                tensors = (*state.tensors, *state.carried)
                for map_, tensor in zip(self._lowered.frontiers[k - 1], tensors, strict=True):
                    if map_ is not None:
                        runner.write(map_, tensor[i])
        if len(stay) < len(self._rows):
            left = torch.tensor([self._rows.index(n) for n in stay], device=mask.device)
            self._state, self._rows = state.select(left) if stay else None, stay


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """A mask or what it was read off, brought to a size by nearest."""
    if x.shape[2:] == tuple(size):
        return x
    if x.dtype == torch.bool:
        return F.interpolate(x.to(torch.uint8), tuple(size), mode="nearest").bool()
    return F.interpolate(x, tuple(size), mode="nearest")

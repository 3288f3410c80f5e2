"""One batch on its way: which of its images run sparsely, each in a runner of its own, and which still densely."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from offramp import _kernel
from offramp.graph import State
from offramp.nn.masked import Masked, Resizing
from offramp.sparse.lower import Lowered
from offramp.sparse.plain import Runner
from offramp.types import Stop

__all__ = ["Walk", "enlarged", "hand_over", "onward", "resized"]

Dense = Callable[[int, State, fx.GraphModule | None], tuple[State | None, Tensor]]


class Walk:
    """Goes from exit to exit: for each ``prepare``, then ``run``.

    An image that runs sparsely does so to the end, for masks only shrink.
    """

    def __init__(self, lowered: Lowered, lend: Callable[[], Runner], dense: Dense, state: State, above: Sequence[float]
                 ) -> None:
        """dense: runs a stage on all places; of images whose mask is denser than ``above`` of that stage."""
        self._lowered, self._lend, self._dense, self._above = lowered, lend, dense, above
        self._state: State | None = state
        self._mask: Tensor | None = None
        self.rows = list(range(state.rows))
        """The images that run densely."""
        self._runners: dict[int, Runner] = {}
        """Of the images that run sparsely; those with nothing left to do have none."""

    @torch.inference_mode()
    def prepare(self, k: int, mask: Tensor) -> int:
        """From here on this mask, of exit k - 1; the MACs of what it leaves to do until exit k, all images together."""
        self._mask = mask
        fresh = self._sparsen(k, mask)
        costs, levels = self._lowered.costs[k - 1], self._lowered.program.levels
        places = {level: levels[level].height * levels[level].width for level in costs}
        macs = len(self.rows) * sum(cost * places[level] for level, cost in costs.items())
        for n, runner in list(self._runners.items()):
            if not bool(mask[n].any()):
                del self._runners[n]
                continue
            if n not in fresh:
                runner.settle(mask[n, 0])
            macs += round(sum(cost * places[level] * runner.density(level) for level, cost in costs.items()))
        return macs

    @torch.inference_mode()
    def run(self, k: int, carried: Tensor, stop: Stop | None) -> Tensor | None:
        """Exit k's logits, at settled places those of the exit before, ``carried``; None where it was stopped."""
        at = self._lowered.logits[k - 1]
        program = self._lowered.program
        level = program.levels[program.maps[at].level]
        # place by place: what is read off it, and its resizing, are two to three times as fast as plane by plane
        out = resized(carried, (level.height, level.width)).clone(memory_format=torch.channels_last)
        if self.rows:
            if stop is not None and stop():
                return None
            assert self._state is not None and self._mask is not None
            self._state, fresh = self._dense(k, self._state, self._lowered.end)
            rows = torch.tensor(self.rows, device=out.device)
            out[rows] = torch.where(resized(self._mask[rows], out.shape[2:]), fresh, out[rows])
        for n, runner in self._runners.items():
            if not runner.run(k - 1, *((None, None) if stop is None else (stop.flag, stop.due_ns))):
                return None
            runner.read_active(at, out[n])
        return out

    def _sparsen(self, k: int, mask: Tensor) -> list[int]:
        """Hand images with few active places over to runners, and forget those with none; the former."""
        state, fresh = self._state, list[int]()
        if not self.rows or state is None:
            return fresh
        shares = mask.flatten(1).float().mean(1).tolist()
        stay = [n for n in self.rows if shares[n] > self._above[k - 1]]
        if stay and len(stay) < len(self.rows) and state.why_not:
            stay = []  # the network would run another program for fewer rows
        for i, n in enumerate(self.rows):
            if n not in stay and shares[n] > 0:
                self._runners[n] = runner = self._lend()
                hand_over(self._lowered, runner, k, state, i, mask[n, 0])
                fresh.append(n)
        if len(stay) < len(self.rows):
            left = torch.tensor([self.rows.index(n) for n in stay], device=mask.device)
            self._state, self.rows = state.select(left) if stay else None, stay
        return fresh


def hand_over(lowered: Lowered, runner: Runner, k: int, state: State, row: int, mask: Tensor) -> None:
    """Make a runner go on from exit k - 1 with one row of a state, under a mask (h, w)."""
    for earlier in range(k - 1):  # a runner goes through all segments; with nothing active that costs none
        runner.settle(torch.zeros_like(mask))
        runner.run(earlier)
    runner.settle(mask)
    for map_, tensor in zip(lowered.frontiers[k - 1], (*state.tensors, *state.carried), strict=True):
        if map_ is not None:
            runner.write_region(map_, tensor[row])  # later masks lie within this one


def onward(masked: Masked, coarse: Tensor, k: int, before: Tensor | None) -> Tensor:
    """``masked.goes_on(coarse, k)`` within ``before``, the mask of the exit before if any; looked for nowhere else.

    The kernel looks at most places, where it can; those whose confidence is all but the threshold are asked as ever.
    """
    before = None if before is None else resized(before, coarse.shape[2:])
    if masked.share is not None or masked.grid or coarse.device.type != "cpu":
        return masked.goes_on(coarse, k) if before is None else masked.goes_on(coarse, k) & before
    if masked.confidence == "top" and masked.threshold is not None and _kernel.enlarges(coarse):
        found, left = _kernel.unsure(coarse, masked.threshold, before)
    elif before is None:
        return masked.goes_on(coarse, k)
    else:
        found, left = torch.zeros_like(before), before
    at = left.flatten().nonzero()[:, 0]
    if len(at):
        said = coarse.permute(0, 2, 3, 1).flatten(0, 2)[at].T[None, :, None]
        found.view(-1)[at] = masked.goes_on(said, k).flatten()
    return found


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """A mask or what it was read off, brought to a size by nearest."""
    if x.shape[2:] == tuple(size):
        return x
    if x.dtype == torch.bool:
        return F.interpolate(x.to(torch.uint8), tuple(size), mode="nearest").bool()
    return F.interpolate(x, tuple(size), mode="nearest")


def enlarged(coarse: Tensor, resize: Resizing) -> Tensor:
    """``resize(coarse)``, by the kernel where that can: logits of all places are most of what a sparse call writes."""
    if len(resize.steps) == 1 and resize.steps[0][1] == "bilinear" and _kernel.enlarges(coarse):
        (size, _, align_corners), = resize.steps
        return _kernel.enlarge(coarse, size, align_corners=bool(align_corners))
    return resize(coarse)

"""What leads to the first exit, on the compiled kernel with every place active: faster than layer by layer."""

from collections.abc import Callable

import torch
from torch import Tensor

from offramp._kernel import Kernel
from offramp._kernel.ops import Program
from offramp.errors import OfframpError
from offramp.graph import State
from offramp.nn.masked import Resizing
from offramp.nn.multiexit import MultiExit
from offramp.sparse._shelf import Shelf
from offramp.sparse.lower import First, lower_first

__all__ = ["Front"]


class Front:
    """``front(state)`` of the inputs: the state at the first exit, its logits, and what resizes them.

    None where that is no program, or none that ``suits``.
    """

    def __init__(self, net: MultiExit, suits: Callable[[Program], bool], make: Callable[[Program], Kernel]) -> None:
        self._net, self._suits, self._make = net, suits, make
        self._shelf = Shelf(self._ready)

    def __call__(self, state: State) -> tuple[State, Tensor, Resizing] | None:
        key = state.program, tuple((t.shape[1:], t.dtype) for t in state.tensors), tuple(map(repr, state.values))
        first, lend = self._shelf.open(key, lambda: self._lowered(state))
        if first is None:
            return None
        loan = lend()
        images = [_run(first, loan.runner, [t[n] for t in state.tensors], copies=state.rows > 1)
                  for n in range(state.rows)]
        coarse, *tensors = (_together(maps) for maps in zip(*images, strict=True))
        for tensor in tensors:  # which may lie in the runner's memory: nobody else has it before they are gone
            vars(tensor)["_offramp_loan"] = loan
        after = State(tensors=tuple(tensors), values=first.values, program=state.program,
                      why_not=self._net.sites[0].why_not)
        return after, coarse, first.resize

    def _lowered(self, state: State) -> First | None:
        try:
            with torch.inference_mode(False), torch.no_grad():
                first = lower_first(self._net, state)
        except OfframpError:  # it runs layer by layer then
            return None
        return first if self._suits(first.program) else None

    def _ready(self, program: Program) -> Kernel:
        runner = self._make(program)
        runner.settle(torch.ones(1, 1, dtype=torch.bool))
        return runner


def _run(first: First, runner: Kernel, tensors: list[Tensor], *, copies: bool) -> list[Tensor]:
    """Logits, and what goes on, of one image; the latter where the runner has it unless these are to be copies."""
    for at, tensor in zip(first.inputs, tensors, strict=True):
        if at is not None:
            runner.write(at, tensor)
    runner.run(0)
    read = runner.read if copies else runner.view
    return [runner.read(first.logits), *(tensors[at] if as_it_is else read(at) for as_it_is, at in first.live)]


def _together(maps: tuple[Tensor, ...]) -> Tensor:
    """(C, H, W) each -> (N, C, H, W), place by place as they are; strides of one image as those of several, for torch
    looks at them where it chooses how to resize."""
    places = [one.permute(1, 2, 0) for one in maps]
    return (places[0][None] if len(places) == 1 else torch.stack(places)).permute(0, 3, 1, 2)

"""A network over several devices: each runs its piece and hands the frontier on (EENet, 3.1 and C)."""

from typing import Any, cast, final

import torch
from torch import Tensor, nn

from offramp.errors import OfframpError, PlanError
from offramp.graph import State
from offramp.nn.multiexit import MultiExit
from offramp.runtime._legs import Build, Legs, build_legs
from offramp.runtime.budgeted import Kept, reads

__all__ = ["Piece", "piece"]

_PLAIN = Build(engine="eager", dtype=None, channels_last=False, fold=False)


@final
class Piece(nn.Module):
    """From the inputs, or from a frontier, to an exit or to the end; holds the weights of this stretch alone.

    A piece that ends at an exit gives ``(logits, frontier)``: what the exit says, and a tuple of tensors (and numbers)
    that the next piece takes: ``rest(*frontier)``. Rows may be dropped from its tensors in between, where the site is
    ``shrinkable``: those that need no second opinion. A last piece gives the network's own output. Pieces chained say
    what the whole network says, bit for bit. Inputs of another kind than the example may be of another size, as long as
    they take the same way through the network.
    """

    def __init__(self, legs: Legs, k: int, live: int) -> None:
        super().__init__()
        self._leg, self._legs, self._first = legs.legs[k], legs, k == 0
        self._live, self._why_not = live, "" if k == 0 or legs.legs[k - 1].may_shrink else "rows need each other here"
        heads = [] if self._leg.head is None else [self._leg.head]
        guest = cast(nn.ModuleList, legs.module)[0]
        self.body = Kept(nn.ModuleList([guest, *heads]), {id(tensor) for tensor in reads(self._leg.plain.module())})
        self.training = False

    @torch.inference_mode()
    def forward(self, *given: Any, **kwargs: Any) -> Any:
        """The network's inputs, or the frontier that the piece before gave."""
        program = self._legs.traced.program
        if self._first:
            state = self._legs.begin(*given, **kwargs)
            if state.program is not program:
                raise OfframpError(
                    expected="inputs that take the way through the network that its example took", where="net.part()",
                    got="inputs that take another", todo="attach the network with such inputs as the example.")
        else:
            if kwargs or len(given) < self._live or not all(isinstance(one, Tensor) for one in given[: self._live]):
                raise OfframpError(expected=f"a frontier of {self._live} tensors, and what came with them",
                                   got=f"{len(given)} values", where="net.rest()", todo="call rest(*frontier).")
            state = State(tensors=given[: self._live], values=given[self._live :], program=program,
                          why_not=self._why_not)
        if self._leg.head is None:
            return self._leg.only_stage(state)
        after, logits, _ = self._leg.run(state)
        return logits, (*after.tensors, *after.values)

    def train(self, mode: bool = True) -> "Piece":
        """A piece stays in eval mode; train the network that it came from."""
        return self


def piece(net: MultiExit, *, after: str | None = None, upto: str | None = None) -> Piece:
    """The stretch of ``net`` from the site of column ``after`` (nothing: the inputs) to the exit ``upto`` (nothing: the
    end), sharing its weights with ``net``. PlanError where these are no exits, or out of order."""
    known = {column.name: column.site for column in net.columns[:-1]}
    order = [site.name for site in net.sites]
    ends = [name for name in (after, upto) if name is not None]
    if missing := [name for name in ends if name not in known]:
        raise PlanError(expected=f"exits among {', '.join(known)}", got=", ".join(missing),
                        where="net.part(), net.rest()")
    if len(ends) == 2 and order.index(known[ends[0]]) >= order.index(known[ends[1]]):
        raise PlanError(expected="an exit that lies deeper than " + ends[0], got=ends[1], where="net.rest()")
    live = 0 if after is None else len(net.sites[order.index(known[after])].live)
    return Piece(build_legs(net, ends, _PLAIN, None), 0 if after is None else 1, live)

"""A deployed network exit by exit, for all rows of a call: what anytime answers are made from."""

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from offramp.graph import State
from offramp.runtime._legs import Call, Leg
from offramp.runtime._output import rows_of
from offramp.runtime._passing import Passing
from offramp.runtime._stops import GivenUp
from offramp.types import Ahead, Step, Stop

if TYPE_CHECKING:
    from offramp.runtime.adaptive import Adaptive

__all__ = ["stepwise"]


def stepwise(fast: "Adaptive", call: Call, stop: Stop) -> Generator[Ahead | Step, None, None]:
    """Work and answers in turn, as ``types.Stepwise`` has them; where the plan is input-dependent, rows that its policy
    settled keep their answer, and the answers end once all are settled."""
    with torch.inference_mode():
        state = fast.begin(*call[0], **call[1])
    turn = Passing(fast.plan, state.rows)
    try:
        yield from _steps(fast, state, call, stop, turn)
    except GivenUp:
        return
    finally:
        turn.end()


def _steps(fast: "Adaptive", state: Any, call: Call, stop: Stop, turn: Passing
           ) -> Generator[Ahead | Step, None, None]:
    count = state.rows
    whole, exits = None, torch.zeros(count, dtype=torch.int64)
    rows: Tensor | None = None  # as in Adaptive: places of the unsettled rows in the call, and in the state
    alive: Tensor | None = None
    parts: list[Any] = []
    for k, leg in enumerate(fast.legs):
        if leg.fresh is not None:
            with torch.inference_mode():
                state, alive = leg.fresh(call, rows), None
        yield Ahead(_kind(k, state), max(1, fast.macs[k]) * max(1, state.rows), _asks(leg, state))
        ask, leaves = stop if _asks(leg, state) else None, None
        with torch.inference_mode():
            before = state
            if k == len(fast.legs) - 1:
                output = leg.only_stage(state, ask)
                turn.reached = k
            else:
                state, logits, score = leg.run(state, ask)
                output = fast.answer(logits)
                if fast.plan.setting == "input_dependent" and count:
                    if alive is not None:
                        logits, score = logits[alive], None if score is None else score[alive]
                    leaves = fast.ask(k, logits, score, parts, turn.policy)
                    turn.left(k, int(leaves.sum()))
            if rows is None:
                whole, exits = output, torch.full((count,), k)
            else:
                whole = _replaced(whole, rows, rows_of(output, alive))
                exits = exits.index_fill(0, rows.cpu(), k)
            _wait(before)
        yield Step(whole, k, exits)
        if leaves is None or not bool(leaves.any()):
            continue
        if bool(leaves.all()):
            return
        with torch.inference_mode():
            stay = (~leaves).nonzero().squeeze(1)
            parts[:] = [fast.gather.keep(part, stay) for part in parts]
            rows = stay if rows is None else rows[stay]
            alive = stay if alive is None else alive[stay]
            # Whether a copy pays is not measured here: that would take from somebody's deadline.
            if leg.may_shrink and fast.shrink is not False:
                state, alive = state.select(alive), None


def _asks(leg: Leg, state: State) -> bool:
    """Whether a leg can be given up between its layers; a GPU is only told of them, and would be told the same."""
    return leg.asking is not None and state.tensors[0].device.type == "cpu"


def _replaced(whole: Any, rows: Tensor, output: Any) -> Any:
    """A copy with some rows replaced: whoever holds an earlier answer may keep it."""
    leaves, spec = pytree.tree_flatten(whole)
    fresh = [leaf.index_copy(0, rows, new) if isinstance(leaf, Tensor) else leaf
             for leaf, new in zip(leaves, pytree.tree_leaves(output), strict=True)]
    return pytree.tree_unflatten(fresh, spec)


def _wait(state: State) -> None:
    device = state.tensors[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _kind(leg: int, state: State) -> Any:
    first = state.tensors[0]
    return leg, tuple(first.shape), first.dtype, first.device

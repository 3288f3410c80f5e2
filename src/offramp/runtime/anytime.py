"""Anytime: ever better answers until a deadline (MESS, arXiv:2106.03527, 5.1 and 6.4). Times are wall-clock ms."""

import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from offramp.errors import OfframpError
from offramp.graph import State
from offramp.runtime._legs import Call
from offramp.runtime._output import rows_of
from offramp.runtime._passing import Passing

if TYPE_CHECKING:
    from offramp.runtime.adaptive import Adaptive

__all__ = ["Anytime", "Pace", "Refined"]

_KEPT, _ENOUGH = 15, 3


class Refined(NamedTuple):
    """The best answer so far, for all rows of the call."""

    output: Any
    """Of the type and keys of the untouched network's output."""
    exit_index: int
    """The exit that spoke last, into the plan's exits; ``len(plan.exits)`` is the backbone."""
    exits: Tensor
    """The exit that each row's answer comes from (n,) int64."""
    elapsed_ms: float
    """Since the call."""


class Pace:
    """How long each leg takes, learnt from the calls: a running median for each shape of the batch before it.

    The first run on a shape traces, compiles or warms up and is not kept. Until a leg has been timed three times, the
    call's own pace so far (ms per MAC of the backbone) stands in where it promises a shorter time, so that one slow run
    cannot rule a leg out for good.
    """

    def __init__(self, macs: Sequence[int]) -> None:
        self.macs = tuple(max(1, one) for one in macs)
        self._known: dict[Any, deque[float]] = {}
        self._lock = threading.Lock()

    def expect(self, leg: int, state: State, rate: float) -> float:
        """Milliseconds that a leg should take; ``rate`` is the ms per MAC and row of this call so far."""
        guess = rate * self.macs[leg] * max(1, state.rows)
        with self._lock:
            known = self._known.get(_kind(leg, state), ())
            median = statistics.median(known) if known else guess
            return median if len(known) >= _ENOUGH else min(median, guess)

    def note(self, leg: int, state: State, ms: float) -> None:
        """A leg took so long from this state."""
        with self._lock:
            known = self._known.get(_kind(leg, state))
            if known is None:
                self._known[_kind(leg, state)] = deque(maxlen=_KEPT)
            else:
                known.append(ms)


class Anytime(Iterator[Refined]):
    """Answers for all rows, each better than the one before; made by ``fast.anytime(x, deadline_ms=...)``.

    Any thread may read ``latest`` or call ``stop()`` when a result is needed now.
    """

    def __init__(self, fast: "Adaptive", state: State, call: Call, deadline_ms: float | None, start: float) -> None:
        if deadline_ms is not None and deadline_ms != deadline_ms:
            raise OfframpError(expected="deadline_ms as a number", got=repr(deadline_ms), where="anytime()")
        self.latest: Refined | None = None
        """The best answer so far."""
        self._stopped = threading.Event()
        self._answers = _refine(fast, state, call, deadline_ms, start, self._stopped)

    def __next__(self) -> Refined:
        self.latest = next(self._answers)
        return self.latest

    def stop(self) -> None:
        """Start no further leg."""
        self._stopped.set()


def _refine(fast: "Adaptive", state: Any, call: Call, deadline_ms: float | None, start: float,
            stopped: threading.Event) -> Iterator[Refined]:
    turn = Passing(fast.plan, state.rows)
    try:
        yield from _steps(fast, state, call, deadline_ms, start, stopped, turn)
    finally:
        turn.end()


def _steps(fast: "Adaptive", state: Any, call: Call, deadline_ms: float | None, start: float,
           stopped: threading.Event, turn: Passing) -> Iterator[Refined]:
    count, pace, spent, work = state.rows, fast.pace, 0.0, 0.0
    whole, exits = None, torch.zeros(count, dtype=torch.int64)
    rows: Tensor | None = None  # as in Adaptive: places of the unsettled rows in the call, and in the state
    alive: Tensor | None = None
    parts: list[Any] = []
    for k, leg in enumerate(fast.legs):
        if leg.fresh is not None:
            with torch.inference_mode():
                state, alive = leg.fresh(call, rows), None
        before = state
        if k:
            expected = pace.expect(k, before, spent / work)
            if stopped.is_set() or (deadline_ms is not None and now() - start + expected > deadline_ms):
                return
        began, leaves = now(), None
        with torch.inference_mode():
            if k == len(fast.legs) - 1:
                output = leg.only_stage(state)
                turn.reached = k
            else:
                state, logits, score = leg.run(state)
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
        took = now() - began
        pace.note(k, before, took)
        spent, work = spent + took, work + pace.macs[k] * max(1, before.rows)
        yield Refined(whole, k, exits, now() - start)
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


def now() -> float:
    """A clock in milliseconds."""
    return time.perf_counter() * 1e3

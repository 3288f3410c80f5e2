"""What an anytime call knows of the clock: how long work should take, when to give it up, and how often it was late.

Times are wall-clock milliseconds.
"""

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Hashable
from numbers import Real
from typing import Any

import torch

from offramp.errors import OfframpError
from offramp.types import Ahead

__all__ = ["Cancel", "Deadlines", "Pace", "Watch", "deadline_of", "now"]

_KEPT, _PATIENCE = 64, 16
_SURE, _SUREST = 0.95, 0.99


def now() -> float:
    """A clock in milliseconds."""
    return time.perf_counter() * 1e3


def deadline_of(deadline_ms: Any, where: str) -> float | None:
    """A deadline as a number, or None for none; OfframpError on anything else.

    >>> deadline_of(30, "anytime()")
    30.0
    """
    if deadline_ms is None:
        return None
    if isinstance(deadline_ms, Real) and not isinstance(deadline_ms, bool) and float(deadline_ms) >= 0:
        return float(deadline_ms)
    raise OfframpError(expected="deadline_ms as a number >= 0 of milliseconds, or None", got=repr(deadline_ms),
                       where=where, todo="0 gives the first exit's answer.")


class Pace:
    """How long the work before each answer takes, learnt from the calls.

    Of each kind of work its last 64 runs are kept, the very first not counted: it traces, compiles or warms up. A run
    counts as its ms per MAC over that of the same call so far, since what slows a machine down slows all of a call.
    What is foretold is the call's own pace, times the work's MACs, times a high quantile of these ratios: 0.95, or 0.99
    (of 64 runs the slowest) for work that cannot be given up on its way. It never exceeds what the slowest of the kept
    runs took, so that a pause at a call's beginning does not rule out the rest. A kind that is turned down 16 times in
    a row forgets its slowest run: bad luck cannot rule it out for good.

    Until something is known, MACs foretell.
    """

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Kind] = {}
        self._lock = threading.Lock()

    def expect(self, ahead: Ahead, rate: float) -> float:
        """Milliseconds that work should take at most; ``rate`` is the ms per MAC of this call so far."""
        guess = rate * ahead.macs
        with self._lock:
            kind = self._kinds.get(ahead.kind)
            if kind is None or not kind.runs:
                return guess
            ratios = sorted(ratio for ratio, _ in kind.runs)
            sure = _SURE if ahead.may_stop else _SUREST
            ratio = ratios[math.ceil(sure * len(ratios)) - 1]
            return min(guess * ratio, ahead.macs * max(slow for _, slow in kind.runs))

    def note(self, ahead: Ahead, ms: float, rate: float) -> None:
        """Work took so long, in a call that had gone at ``rate`` before; 0 where it was the first."""
        slow = ms / max(1.0, ahead.macs)
        with self._lock:
            kind = self._kinds.get(ahead.kind)
            if kind is None:
                self._kinds[ahead.kind] = _Kind()
            else:
                kind.runs.append((slow / rate if rate else 1.0, slow))
                kind.refused = 0

    def refuse(self, ahead: Ahead) -> None:
        """Work was not begun, as it should have ended late."""
        with self._lock:
            kind = self._kinds.get(ahead.kind)
            if kind is None:
                return
            kind.refused += 1
            if kind.refused >= _PATIENCE and kind.runs:
                kind.refused = 0
                kind.runs.remove(max(kind.runs))

    def rest(self, ahead: Ahead) -> tuple[list[float], float]:
        """Of each place where the work asks whether to go on, the share of its time still to come; and the least time
        that one of the kept runs took."""
        with self._lock:
            kind = self._kinds.get(ahead.kind)
            if kind is None or not kind.runs:
                return [], 0.0
            return kind.rest, ahead.macs * min(slow for _, slow in kind.runs)

    def share(self, ahead: Ahead, rest: list[float]) -> None:
        """Such were the shares in a run; the mean of the latest ones is kept."""
        with self._lock:
            kind = self._kinds.get(ahead.kind)
            if kind is not None and kind.runs:
                same = len(kind.rest) == len(rest)
                kind.rest = [0.9 * old + 0.1 * new for old, new in zip(kind.rest, rest, strict=True)] if same else rest


class _Kind:
    def __init__(self) -> None:
        self.runs: deque[tuple[float, float]] = deque(maxlen=_KEPT)  # over the call's own pace, and ms per MAC
        self.rest: list[float] = []
        self.refused = 0


class Watch:
    """When one call gives work up (``offramp.types.Stop``): asked between its operations, ``watch()`` says True once
    nothing can come of it.

    That is when the deadline would pass even if the rest took as short as ever, and when somebody wished for what there
    is. The first answer is given up for neither, only where the watch is closed. Any thread may wish and close.
    """

    def __init__(self, until: float) -> None:
        self.until = until
        self.due_ns = None if until == math.inf else time.monotonic_ns() + round(1e6 * (until - now()))
        self.flag = torch.zeros(1, dtype=torch.int32)
        self.wished = self.closed = False
        self._marks: list[float] = []
        self._due: list[float] = []
        self._first = True

    def wish(self) -> None:
        """Somebody wants what there is."""
        self.wished = True
        self.flag.fill_(1)

    def close(self) -> None:
        """Nobody wants an answer any more."""
        self.closed = True
        self.wish()

    def begin(self, first: bool, rest: list[float], least: float) -> None:
        """Work begins, such as :meth:`Pace.rest` knows."""
        self._marks, self._first = [], first
        self._due = [self.until - share * least for share in rest]

    def __call__(self) -> bool:
        time, at, due = now(), len(self._marks), self._due
        self._marks.append(time)
        if self._first:
            return self.closed
        return self.wished or time > (due[at] if at < len(due) else self.until)

    def shares(self, began: float, ended: float) -> list[float]:
        """Of each time it was asked, the share of the work that was still to come."""
        took = max(ended - began, 1e-9)
        return [(ended - mark) / took for mark in self._marks]


class Cancel:
    """A handle for other threads: ``fast.predict(x, stop=cancel)``, and elsewhere ``cancel.set()`` for what there is.

    Work under way is given up at its next operation; the first answer still comes. One handle may serve any number of
    calls, at once or in turn: once it is set, all of them stop at their first answer.
    """

    def __init__(self) -> None:
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._set = False

    def set(self) -> None:
        """Wish for what there is by now."""
        with self._lock:
            self._set = True
            for watch in self._watches:
                watch.wish()

    def is_set(self) -> bool:
        """Whether somebody did."""
        return self._set

    def tell(self, watch: Watch) -> None:
        """A call that is to hear of it."""
        with self._lock:
            self._watches.add(watch)
            if self._set:
                watch.wish()


class Deadlines:
    """How many calls had a deadline, and how many of them missed it; any thread may count and read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = self._missed = 0

    def note(self, missed: bool) -> None:
        """A call with a deadline kept it, or not."""
        with self._lock:
            self._calls += 1
            self._missed += missed

    def reset(self) -> tuple[int, int]:
        """Start again from none; says how many calls and misses there were."""
        with self._lock:
            found = self._calls, self._missed
            self._calls = self._missed = 0
        return found

    @property
    def calls(self) -> int:
        """With a deadline."""
        return self._calls

    @property
    def missed(self) -> int:
        """Whose answer came late, or whose work was given up only after the deadline."""
        return self._missed

    def __repr__(self) -> str:
        with self._lock:
            return f"{self._missed} of {self._calls} missed"

"""Programs of the last few sizes of inputs, and runners of each that wait for a call."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from offramp._kernel.ops import Program
from offramp.sparse.plain import Runner

__all__ = ["Loan", "Shelf"]

_SIZES = 4  # of inputs, whose programs are kept
_IDLE = 2  # runners of each that wait for a call


class _Lowered(Protocol):
    @property
    def program(self) -> Program: ...


T = TypeVar("T", bound=_Lowered | None)
R = TypeVar("R", bound=Runner)


class Loan(Generic[R]):
    """A runner, until nobody holds this any more."""

    def __init__(self, runner: R) -> None:
        self.runner = runner


class Shelf(Generic[R]):
    """Lends runners to any number of threads, each to one call at a time."""

    def __init__(self, make: Callable[[Program], R]) -> None:
        self._make = make
        self._held: OrderedDict[Any, tuple[Any, list[R]]] = OrderedDict()
        self._lock = threading.RLock()

    def open(self, key: Any, lower: Callable[[], T]) -> tuple[T, Callable[[], Loan[R]]]:
        """The program of a key, lowered where it is new, and a function that lends one runner of it after another."""
        with self._lock:
            if key not in self._held:
                self._held[key] = lower(), []
            self._held.move_to_end(key)
            while len(self._held) > _SIZES:
                self._held.popitem(last=False)
            lowered, idle = self._held[key]

        def lend() -> Loan[R]:
            assert lowered is not None
            with self._lock:
                loan = Loan(idle.pop() if idle else self._make(lowered.program))
            weakref.finalize(loan, self._give_back, loan.runner, idle).atexit = False
            return loan

        return lowered, lend

    @contextmanager
    def lent(self, key: Any, lower: Callable[[], T]) -> Iterator[tuple[T, Callable[[], R]]]:
        """As ``open``, of runners that come back at the end of the context."""
        lowered, lend = self.open(key, lower)
        loans: list[Loan[R]] = []

        def one() -> R:
            loans.append(lend())
            return loans[-1].runner

        try:
            yield lowered, one
        finally:
            loans.clear()

    def _give_back(self, runner: R, idle: list[R]) -> None:
        with self._lock:
            if len(idle) < _IDLE:
                idle.append(runner)

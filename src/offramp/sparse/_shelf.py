"""Programs of the last few sizes of inputs, and runners of each that wait for a call."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from offramp._kernel.ops import Program
from offramp.sparse.plain import Runner

__all__ = ["Shelf"]

_SIZES = 4  # of inputs, whose programs are kept
_IDLE = 2  # runners of each that wait for a call


class _Lowered(Protocol):
    @property
    def program(self) -> Program: ...


T = TypeVar("T", bound=_Lowered | None)


class Shelf:
    """Lends runners to any number of threads, each to one call at a time."""

    def __init__(self, make: Callable[[Program], Runner]) -> None:
        self._make = make
        self._held: OrderedDict[Any, tuple[Any, list[Runner]]] = OrderedDict()
        self._lock = threading.RLock()

    @contextmanager
    def lent(self, key: Any, lower: Callable[[], T]) -> Iterator[tuple[T, Callable[[], Runner]]]:
        """The program of a key, lowered where it is new, and a function that lends one runner of it after another."""
        with self._lock:
            if key not in self._held:
                self._held[key] = lower(), []
            self._held.move_to_end(key)
            while len(self._held) > _SIZES:
                self._held.popitem(last=False)
            lowered, idle = self._held[key]
        lent: list[Runner] = []

        def lend() -> Runner:
            assert lowered is not None
            with self._lock:
                lent.append(idle.pop() if idle else self._make(lowered.program))
            return lent[-1]

        try:
            yield lowered, lend
        finally:
            with self._lock:
                idle += lent[: max(0, _IDLE - len(idle))]

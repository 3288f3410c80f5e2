"""Does it pay to drop rows? Answered by the clock, once for each stage of a deployed network."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from offramp.graph import State

__all__ = ["Crossover", "Shrinker"]


@dataclass(frozen=True)
class Crossover:
    """A stage takes about ``start_ms + row_ms * rows``; dropping to n rows costs ``copy_ms * n`` first."""

    start_ms: float
    row_ms: float
    copy_ms: float

    def pays(self, rows: int, left: int) -> bool:
        """Whether to go on with ``left`` rows of ``rows``.

        >>> Crossover(start_ms=1.0, row_ms=2.0, copy_ms=0.1).pays(32, 31)
        False
        >>> Crossover(start_ms=1.0, row_ms=2.0, copy_ms=0.1).pays(32, 30)
        True
        """
        return self.row_ms * (rows - left) > self.copy_ms * left


class Shrinker:
    """Decides for each stage whether a smaller batch is worth its copy; measures when first asked, if told to."""

    def __init__(self, mode: bool | Literal["auto"], stages: int) -> None:
        self.mode = mode
        self._known: list[Crossover | None] = [None] * stages
        self._lock = threading.Lock()

    @property
    def crossovers(self) -> tuple[Crossover | None, ...]:
        """Of each stage; None where nothing was measured yet."""
        return tuple(self._known)

    def pays(self, stage: int, rows: int, left: int, state: State, run: Callable[[State], Any]) -> bool:
        """Whether this stage, which ``run`` runs, should see ``left`` rows instead of the ``rows`` of ``state``."""
        if self.mode != "auto":
            return bool(self.mode)
        known = self._known[stage]
        if known is None:
            with self._lock:
                known = self._known[stage]
                if known is None:
                    known = self._known[stage] = measure_crossover(state, run)
        return known.pays(rows, left)


def measure_crossover(state: State, run: Callable[[State], Any]) -> Crossover:
    """Time a stage at all and at half of the rows, and the copy of that half; a second or so at most is spent."""
    rows = state.rows
    if rows < 2:
        return Crossover(0.0, 1.0, 0.0)
    device = state.tensors[0].device
    half = torch.arange(rows // 2, device=device)
    full, small = state.select(torch.arange(rows, device=device)), state.select(half)
    full_ms, half_ms = _least_ms(lambda: run(full), device), _least_ms(lambda: run(small), device)
    row_ms = max(0.0, (full_ms - half_ms) / (rows - rows // 2))
    copy_ms = _least_ms(lambda: state.select(half), device) / len(half)
    return Crossover(start_ms=max(0.0, full_ms - row_ms * rows), row_ms=row_ms, copy_ms=copy_ms)


def _least_ms(fn: Callable[[], Any], device: torch.device, repeats: int = 3, budget_ms: float = 200.0) -> float:
    """The least of a few times: what other programs add is never negative."""
    least, spent = float("inf"), 0.0
    fn()
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = (time.perf_counter() - start) * 1e3
        least, spent = min(least, took), spent + took
        if spent > budget_ms:
            break
    return least

"""What an exhaustive search is asked: one objective, hard constraints, and the certificate it hands back."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from offramp.errors import OfframpError
from offramp.table import Unit

__all__ = ["Goal", "Ledger", "Minimise"]

Minimise = Literal["macs", "latency_ms", "peak_bytes", "param_bytes", "drop"]
_SLACK = 1e-12  # of a fraction: what rounding may add to a quality that meets its goal exactly
Progress = Callable[[float, float], None]
"""(share of the space that is settled, best objective so far)."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Minimise one figure of a plan under limits on the others."""

    minimise: Minimise
    min_quality: float = -np.inf
    """Fraction: mIoU or accuracy."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """"macs" and "latency_ms" a sample, "bytes": parameters and peak together."""
    batch: int = 1

    def __post_init__(self) -> None:
        if self.minimise not in ("macs", "latency_ms", "peak_bytes", "param_bytes", "drop"):
            raise OfframpError(expected="minimise 'macs', 'latency_ms', 'peak_bytes', 'param_bytes' or 'drop'",
                               got=repr(self.minimise), where="search()")

    @property
    def units(self) -> tuple[Unit, ...]:
        """Additive costs that the objective or a limit names."""
        named = {self.minimise, *self.limits}
        return tuple(unit for unit in ("macs", "latency_ms") if unit in named)

    def meets(self, quality: NDArray[np.float64], costs: Mapping[str, Any]) -> NDArray[np.bool_]:
        """Which of many plans keep every constraint; ``costs`` by unit."""
        within: NDArray[np.bool_] = np.asarray(quality >= self.min_quality - _SLACK)
        for unit, most in self.limits.items():
            spent = costs["param_bytes"] + costs["peak_bytes"] if unit == "bytes" else costs[unit]
            within = within & (spent <= most * (1 + 1e-12))
        return within

    def objective(self, quality: NDArray[np.float64], costs: Mapping[str, Any]) -> NDArray[np.float64]:
        """What is minimised, of many plans; for "drop" the quality's negative."""
        return np.asarray(-quality if self.minimise == "drop" else costs[self.minimise], np.float64)


@dataclass
class Ledger:
    """Counts what became of every configuration, and the time."""

    time_limit_s: float | None = None
    progress: Progress | None = None
    configurations: int = 0
    pruned: dict[str, int] = field(default_factory=dict)
    evaluated: int = 0
    gap: float = 0.0
    """What an unexplored configuration could still gain, as a share of the objective."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def out_of_time(self) -> bool:
        return self.spent > 1

    @property
    def spent(self) -> float:
        """The share of the time limit that is gone; 0 without one."""
        if self.time_limit_s is None:
            return 0.0
        return self.seconds / self.time_limit_s if self.time_limit_s > 0 else np.inf

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def cut(self, bound: str, count: int) -> None:
        """So many configurations were ruled out by this bound."""
        if count:
            self.pruned[bound] = self.pruned.get(bound, 0) + count

    def tell(self, best: float) -> None:
        if self.progress is not None:
            self.progress((sum(self.pruned.values()) + self.evaluated) / max(self.configurations, 1), best)

    def certificate(self, **more: object) -> dict[str, Any]:
        """JSON: counts add up to ``configurations`` where the optimum is proven."""
        return {
            "configurations": self.configurations, "pruned": dict(self.pruned), "evaluated": self.evaluated,
            "proven": self.gap == 0.0, "gap": self.gap,
            "seconds": round(self.seconds, 3), **more,
        }

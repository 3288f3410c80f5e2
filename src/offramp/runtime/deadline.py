"""One of several sub-models for each call, chosen before its first layer by the time that there is: exits, widths."""

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from offramp.errors import PlanError
from offramp.runtime.adaptive import Adaptive
from offramp.runtime.pace import Deadlines, deadline_of

__all__ = ["ByDeadline"]

_KEPT, _ENOUGH = 31, 3


class ByDeadline(nn.Module):
    """``fast(x, deadline_ms=12)`` runs the best of its sub-models that should end in time, and no layer of another.

    Made by ``net.deploy(plans)`` of several budgeted plans, ``offramp.search_front(table, setting="budgeted",
    minimise="latency_ms")`` for one. Without a deadline the best answers. Where none should end in time the fastest
    does; ``deadlines`` counts the answers that came late, ``calls`` all, and ``picked`` those of each sub-model.

    What a sub-model takes is the slowest of its last 31 runs on inputs of that shape, the very first not counted: a
    deadline is held against bad luck, not against the mean. ``calibrate(x)`` times all of them; one that was never
    timed on such inputs is taken to need what its plan foretold, scaled as the others were.
    """

    def __init__(self, options: Sequence[Adaptive]) -> None:
        super().__init__()
        if not options or any(one.plan.setting != "budgeted" for one in options):
            raise PlanError(expected="several budgeted plans", where="deploy()",
                            got=", ".join(f"{one.plan.setting} plan" for one in options) or "none",
                            todo="take those of search_front(table, setting='budgeted', minimise='latency_ms').")
        cheapest: list[Adaptive] = sorted(options, key=lambda one: float(one.plan.predicted.get("macs", 0)))
        self.options = nn.ModuleList(cheapest)
        self._ranked = sorted(range(len(options)), key=lambda k: self._quality(k))
        self._known: dict[Any, deque[float]] = {}
        self._lock = threading.Lock()
        self.deadlines = Deadlines()
        self.calls, self.picked = 0, [0] * len(options)
        self.training = False

    @property
    def names(self) -> tuple[str, ...]:
        """Where each sub-model ends, the least of MACs first; "final" is the whole network."""
        return tuple((*self._option(k).plan.exits, "final")[0] for k in range(len(self.options)))

    def forward(self, *args: Any, deadline_ms: float | None = None, **kwargs: Any) -> Any:
        """The untouched network's output, from the sub-model that :meth:`choose` names."""
        began = time.perf_counter()
        k = self.choose(*args, deadline_ms=deadline_ms, **kwargs)
        output = self._option(k)(*args, **kwargs)
        _wait(output)
        took = 1e3 * (time.perf_counter() - began)
        self._note(k, _kind(args, kwargs), took)
        with self._lock:
            self.calls += 1
            self.picked[k] += 1
        if deadline_ms is not None:
            self.deadlines.note(took > deadline_ms)
        return output

    def choose(self, *args: Any, deadline_ms: float | None = None, **kwargs: Any) -> int:
        """Which sub-model such a call would run, an index into ``names``; OfframpError where the deadline is none."""
        deadline_ms = deadline_of(deadline_ms, "fast(x, deadline_ms=...)")
        if deadline_ms is None:
            return self._ranked[-1]
        kind = _kind(args, kwargs)
        times = [self.expect(k, kind) for k in range(len(self.options))]
        in_time = [k for k in self._ranked if times[k] <= deadline_ms]
        return in_time[-1] if in_time else min(range(len(times)), key=lambda k: (times[k], k))

    def expect(self, k: int, kind: Any) -> float:
        """Milliseconds that a sub-model should need at most for inputs of a kind; infinity where nothing tells."""
        with self._lock:
            seen = self._known.get((k, kind), ())
            if seen:
                return max(seen)
            others = [max(runs) / foretold for (j, other), runs in self._known.items()
                      if other == kind and runs and math.isfinite(foretold := self._foretold(j))]
        return self._foretold(k) * max(others) if others else self._foretold(k)

    def calibrate(self, *args: Any, repeats: int = 7, **kwargs: Any) -> dict[str, float]:
        """Time every sub-model on such inputs, in turn; says what each is then expected to need."""
        kind = _kind(args, kwargs)
        for _ in range(max(repeats, _ENOUGH) + 1):
            for k in range(len(self.options)):
                began = time.perf_counter()
                _wait(self._option(k)(*args, **kwargs))
                self._note(k, kind, 1e3 * (time.perf_counter() - began))
        return {name: self.expect(k, kind) for k, name in enumerate(self.names)}

    def train(self, mode: bool = True) -> "ByDeadline":
        """A deployed network stays in eval mode."""
        return self

    def extra_repr(self) -> str:
        return f"ends={list(self.names)}" + (f", deadlines: {self.deadlines}" if self.deadlines.calls else "")

    def _option(self, k: int) -> Adaptive:
        return cast(Adaptive, self.options[k])

    def _quality(self, k: int) -> float:
        """What its plan foretold, in the terms of the search that made it."""
        predicted = self._option(k).plan.predicted
        quality = predicted.get("quality_asked", predicted.get("quality"))
        return float(quality) if quality is not None else 1 - float(predicted.get("disagreement", 1.0))

    def _foretold(self, k: int) -> float:
        latency = self._option(k).plan.predicted.get("latency_ms")
        return float(latency) if latency else math.inf

    def _note(self, k: int, kind: Any, ms: float) -> None:
        with self._lock:
            known = self._known.get((k, kind))
            if known is None:  # the first run traces, compiles or warms up
                self._known[k, kind] = deque(maxlen=_KEPT)
            else:
                known.append(ms)


def _kind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return tuple((tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in pytree.tree_leaves((args, kwargs))
                 if isinstance(leaf, Tensor))


def _wait(output: Any) -> None:
    if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in pytree.tree_leaves(output)):
        torch.cuda.synchronize()

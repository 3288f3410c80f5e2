"""Above which share of active places a stage is done sooner on all places: measured once a machine, and kept there."""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp._kernel.ops import Conv, Pool, Program
from offramp.cost.latency import describe_machine, measure

__all__ = ["DENSITIES", "Crossover", "Stages", "crossing", "drawn", "find", "keep", "kept", "key_of"]

DENSITIES = (0.05, 0.2, 0.4, 0.6, 0.8, 1.0)
"""That are timed; between them times are taken to lie on lines."""
_VERSION = 1

Stages = Sequence[tuple[Callable[[], Any], Callable[[Tensor], Any], tuple[int, int]]]
"""Of each stage after the first exit: it on all places, it under a mask (h, w), and the size of the mask."""


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """By stage after the first exit, when a stage on all places is as fast as under a mask."""

    above: tuple[float, ...]
    """Share of active places; 1 where a mask never loses, 0 where it always does."""
    dense_ms: tuple[float, ...]
    sparse_ms: tuple[tuple[float, ...], ...]
    """At each of ``densities``."""
    densities: tuple[float, ...] = DENSITIES
    quiet: bool = True
    """False where the machine was too busy to trust it; such a one is not kept for the next process."""

    def __str__(self) -> str:
        lines = [f"{'stage':>5} {'dense above':>12} {'dense ms':>10}   sparse ms at "
                 + ", ".join(f"{density:g}" for density in self.densities)]
        for k, (above, dense, sparse) in enumerate(zip(self.above, self.dense_ms, self.sparse_ms, strict=True), 1):
            lines.append(f"{k:>5} {above:>12.2f} {dense:>10.2f}   " + ", ".join(f"{ms:.2f}" for ms in sparse))
        return "\n".join(lines + ["(busy machine)"] * (not self.quiet))


def find(stages: Stages, *, budget_s: float, repeats: int = 7, densities: Sequence[float] = DENSITIES) -> Crossover:
    """Time each stage both ways, in turn, for about ``budget_s`` in all."""
    above, dense_ms, sparse_ms, quiet = [], [], [], True
    for dense, sparse, size in stages:
        masks = [drawn(size, density) for density in densities]
        calls: dict[str, Callable[[], Any]] = {str(n): lambda mask=mask, run=sparse: run(mask)  # type: ignore[misc]
                                               for n, mask in enumerate(masks)}
        times = measure({"dense": dense, **calls}, repeats=repeats, warmup=1, budget_s=budget_s / len(stages))
        dense_ms.append(times["dense"].p50_ms)
        sparse_ms.append(tuple(times[name].p50_ms for name in calls))
        above.append(crossing(densities, sparse_ms[-1], dense_ms[-1]))
        quiet &= all(timing.quiet for timing in times.values())
    return Crossover(above=tuple(above), dense_ms=tuple(dense_ms), sparse_ms=tuple(sparse_ms),
                     densities=tuple(densities), quiet=quiet)


def crossing(densities: Sequence[float], sparse_ms: Sequence[float], dense_ms: float) -> float:
    """The largest density up to which sparse execution takes no longer; 0 where the least one does already.

    >>> crossing((0.2, 0.4, 1.0), (1.0, 3.0, 9.0), 2.0), crossing((0.2, 1.0), (1.0, 2.0), 2.0)
    (0.3, 1.0)
    """
    if sparse_ms[-1] <= dense_ms:
        return 1.0
    at = max(n for n, ms in enumerate(sparse_ms) if ms > dense_ms and (n == 0 or sparse_ms[n - 1] <= dense_ms))
    if at == 0:
        return 0.0
    low, high = sparse_ms[at - 1], sparse_ms[at]
    part = (dense_ms - low) / (high - low)
    return round(densities[at - 1] + part * (densities[at] - densities[at - 1]), 4)


def drawn(size: tuple[int, int], density: float, seed: int = 0) -> Tensor:
    """A mask as networks leave it, bool (H, W) with this share of active places: first thin bands along the borders of
    regions, then blobs.

    >>> mask = drawn((64, 128), 0.25)
    >>> mask.shape, float(mask.float().mean())
    (torch.Size([64, 128]), 0.25)
    """
    draw = torch.Generator().manual_seed(seed)

    def field(cells: int, channels: int = 1) -> Tensor:
        coarse = torch.randn(1, channels, cells, max(1, cells * size[1] // size[0]), generator=draw)
        return F.interpolate(coarse, size, mode="bicubic")

    labels = field(7, 8).argmax(1, keepdim=True).float()
    edges = (F.max_pool2d(labels, 3, 1, 1) != labels).float()
    near = sum(F.avg_pool2d(edges, side, 1, side // 2) for side in (3, 5, 9))
    score = (near + 0.35 * field(9) + 1e-4 * torch.rand((1, 1, *size), generator=draw)).flatten()
    mask = torch.zeros(score.shape, dtype=torch.bool)
    mask[score.argsort(descending=True)[: round(density * len(score))]] = True
    return mask.view(size)


# ---- what is kept ----------------------------------------------------------------------------------------------------


def key_of(program: Program, **how: Any) -> str:
    """Of all that a time hangs on: machine, threads and versions, ``how`` it runs, and the program, its weights aside.
    """
    machine = {name: value for name, value in describe_machine().items() if name != "system"}
    ops = [[(type(op).__name__, op.out.count, program.maps[op.out.map].level,
             (tuple(op.weight.shape), op.window, op.groups, str(op.weight.dtype), str(op.weight.device))
             if isinstance(op, Conv) else op.window if isinstance(op, Pool) else len(op.terms))
            for op in part.ops] for part in program.segments]
    text = json.dumps([machine, {name: str(value) for name, value in how.items()}, repr(program.levels), repr(ops)],
                      sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _folder() -> Path:
    """``$XDG_CACHE_HOME/offramp``, or ``~/.cache/offramp``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offramp"


def kept(key: str) -> Crossover | None:
    """What was measured before; None where nothing was, or what lies there cannot be read."""
    try:
        page = json.loads((_folder() / f"crossover-{key}.json").read_text())
        if page["format"] != "offramp.crossover" or page["version"] != _VERSION:
            return None
        made = Crossover(above=_floats(page["above"]), dense_ms=_floats(page["dense_ms"]),
                         sparse_ms=tuple(map(_floats, page["sparse_ms"])), densities=_floats(page["densities"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = len(made.above) == len(made.dense_ms) == len(made.sparse_ms)
    return made if whole and all(0 <= one <= 1 for one in made.above) else None


def keep(key: str, found: Crossover, told: Mapping[str, Any]) -> None:
    """Write it, whole or not at all, whoever else writes; a warning where that cannot be."""
    page = {"format": "offramp.crossover", "version": _VERSION, "above": found.above, "dense_ms": found.dense_ms,
            "sparse_ms": found.sparse_ms, "densities": found.densities, "how": dict(told)}
    path = _folder() / f"crossover-{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.stem, suffix=".part", delete=False) as part:
            json.dump(page, part, indent=1)
        os.replace(part.name, path)
    except OSError as error:
        warnings.warn(f"the measured crossover is not kept, so that the next process measures again: {error}",
                      stacklevel=2)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(map(float, values))

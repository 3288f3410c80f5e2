"""The accuracy-cost curve: plans searched on one split at many tolerances, replayed on another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.choose.replay import Replay, replay
from offramp.choose.search import search
from offramp.errors import PlanError
from offramp.report.measures import quality_of
from offramp.table import ExitTable
from offramp.types import Plan

__all__ = ["Curve", "Point", "TOLERANCES", "curve", "static_at"]

_SECONDS = 10.0
"""For each point of an exhaustive search's curve; its plan is then the best found, not proven."""
TOLERANCES = (0.0, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.045, 0.07, 0.1, 0.15)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One network, or one plan, on the test split."""

    name: str
    macs: float
    """A sample, heads counted."""
    quality: float
    low: float = float("nan")
    """Bootstrap interval at 95 %."""
    high: float = float("nan")
    classes: tuple[float, ...] = ()
    """Dense: IoU of each class, NaN where it is in neither labels nor answers."""
    latency_ms: float | None = None
    """A sample, from the table, at the batch that the plan was searched for; None where none was measured."""
    width: float = 1.0
    """Of a static network that one width of the network gives."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Everything on the one plot of quality against macs."""

    quality: str
    plans: tuple[Point, ...]
    """By rising macs; the name is the tolerance asked for."""
    chosen: Point
    backbone: Point
    cut: tuple[Point, ...]
    """Static networks that the exits and widths give: cut at one exit, or a narrower end, for every sample alike."""
    static: tuple[Point, ...] = ()
    """Other static networks, measured elsewhere on the same split."""
    masked: bool = False
    """Whether ``cut`` are exits with masks on: means over images, and not static."""

    @property
    def clocked(self) -> bool:
        """Whether every plan's latency is known."""
        return all(one.latency_ms is not None for one in (*self.plans, self.chosen, self.backbone))


def curve(
    fitted_on: ExitTable, test: ExitTable, plan: Plan, *, tolerances: Sequence[float] = TOLERANCES,
    static: Sequence[Point] = (), temperatures: Sequence[float] | None = None,
) -> Curve:
    """Search again at each tolerance as ``plan`` was searched, on ``fitted_on``; replay each result on ``test``."""
    quality, last = quality_of(test), len(test.columns) - 1
    asked = _asked(plan, temperatures)
    points: dict[tuple[float, float], Point] = {}
    for tolerance in tolerances:
        try:
            found = search(fitted_on, max_drop=tolerance, **asked)
        except PlanError:  # no exit speaks so well, where one must
            continue
        point = _point(f"{100 * tolerance:g}", test, replay(test, found, batch=asked.get("batch", 1)))
        points.setdefault((point.macs, point.quality), point)
    mine = replay(test, plan, batch=asked.get("batch", 1))
    batch = mine.latency_batch
    clocks = [None if batch is None else float(test.costs.path([e], "latency_ms", batch=batch)[0]) for e in range(last)]
    cut = tuple(
        Point(name=name, macs=float(test.costs.path([e])[0]), latency_ms=clocks[e], width=test.columns[e].width,
              quality=quality.mean(np.full(len(test), e)),
              classes=quality.classes(np.full(len(test), e)))
        for e, name in enumerate(test.names[:-1])
    )
    low, high = quality.interval(np.full(len(test), last))
    backbone = Point(name="untouched network", macs=float(test.costs.macs[-1]), latency_ms=mine.backbone_latency_ms,
                     quality=quality.mean(np.full(len(test), last)), low=low, high=high,
                     classes=quality.classes(np.full(len(test), last)))
    return Curve(
        quality=quality.name, plans=tuple(sorted(points.values(), key=lambda one: one.macs)),
        chosen=_point("this plan", test, mine), backbone=backbone, cut=cut, static=tuple(static),
        masked="masks" in test.meta,
    )


def static_at(curve: Curve, macs: float) -> float | None:
    """Quality of the best mixture of static networks that costs ``macs``: their upper hull; None below all of them."""
    cut = () if curve.masked else curve.cut
    points = sorted((one.macs, one.quality) for one in (*cut, *curve.static, curve.backbone))
    best = None
    for i, (x0, y0) in enumerate(points):
        if x0 <= macs:
            best = max(y0, best) if best is not None else y0
        for x1, y1 in points[i + 1:]:
            if x0 <= macs <= x1 and x1 > x0:
                mixed = y0 + (y1 - y0) * (macs - x0) / (x1 - x0)
                best = mixed if best is None else max(best, mixed)
    return best


def _point(name: str, test: ExitTable, done: Replay) -> Point:
    quality, column, late = quality_of(test), done.column_of.numpy(), done.latency_ms
    low, high = quality.interval(column)
    return Point(name=name, macs=float(done.macs.mean()), quality=quality.mean(column), low=low, high=high,
                 classes=quality.classes(column), latency_ms=None if late is None else float(late.mean()))


def _asked(plan: Plan, temperatures: Sequence[float] | None) -> dict[str, Any]:
    known = ("minimise", "tolerance", "confidence", "max_exits", "against", "batch", "setting", "pixel_steps")
    asked: Mapping[str, Any] = plan.asked
    kept = {name: asked[name] for name in known if name in asked}
    if kept.get("minimise") == "drop":  # the tolerance is what the curve sets
        kept["minimise"] = "macs"
    if kept.get("tolerance") == "exact":
        kept["time_limit_s"] = _SECONDS
    return {**kept, "temperatures": temperatures}

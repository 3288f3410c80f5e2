"""Which exits, heads and thresholds: the optimum of the whole space, proven."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.choose.goal import Goal, Ledger
from offramp.choose.space import Space, quality

__all__ = ["solve"]

Chosen = tuple[tuple[int, int], ...]
"""(column, set) of each exit in order of depth."""


def price(space: Space, goal: Goal, columns: tuple[int, ...], counts: NDArray[np.int64]) -> dict[str, Any]:
    """Costs by unit of plans with these columns; ``counts`` (..., len + 1): who leaves at each and at the end."""
    costs, whole = space.table.costs, (*columns, space.exits)
    out: dict[str, Any] = {
        unit: counts @ costs.path(whole, unit, batch=goal.batch) / len(space.hit) for unit in goal.units}
    for unit in ("param_bytes", "peak_bytes"):
        out[unit] = np.asarray(costs.price(whole, unit))
    return out


def solve(space: Space, goal: Goal, ledger: Ledger, *, max_exits: int, known: float) -> tuple[float, Chosen] | None:
    """(objective, the exits), or None where nothing is better than ``known`` and keeps the constraints."""
    samples = len(space.hit)
    end = space.hit[:, -1].sum(axis=0), space.union[:, -1].sum(axis=0)
    best: tuple[float, Chosen] | None = None
    ledger.configurations += 1 + sum(one.tried for one in space.leavers)
    for e in range(-1, space.exits if max_exits else 0):
        inside = np.zeros((1, samples)) if e < 0 else space.leavers[e].inside.astype(np.float64)
        gone = inside.sum(axis=1).astype(np.int64)
        reached = quality(end[0] + inside @ (space.hit[:, e] - space.hit[:, -1]),
                          end[1] + inside @ (space.union[:, e] - space.union[:, -1]))
        columns = () if e < 0 else (e,)
        counts = np.stack([gone, samples - gone], axis=1)[:, -len(columns) - 1:] if columns else samples - gone[:, None]
        spent = price(space, goal, columns, counts)
        objective = np.where(goal.meets(reached, spent), goal.objective(reached, spent), np.inf)
        ledger.evaluated += len(inside)
        m = int(objective.argmin())
        if objective[m] < min(known, np.inf if best is None else best[0]):
            best = (float(objective[m]), () if e < 0 else ((e, m),))
    return best

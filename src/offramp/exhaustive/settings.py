"""The two settings where nobody leaves by confidence: budgeted and anytime (MESS, 5.1), every configuration priced."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.errors import OfframpError
from offramp.exhaustive.goal import Goal, Ledger
from offramp.functional.pareto import front
from offramp.table import Costs, Unit

__all__ = ["anytime", "budgeted"]

Floats = NDArray[np.float64]
Found = tuple[tuple[int, ...], float, float]
"""(columns, objective, quality)."""
_BYTES: tuple[Unit, ...] = ("peak_bytes", "param_bytes")


def budgeted(costs: Costs, quality: Floats, goal: Goal, ledger: Ledger) -> list[Found]:
    """Every sub-model that ends at one column, the whole network the last; those that meet the goal."""
    found = []
    for column in range(len(quality)):
        spent: dict[str, Any] = {unit: costs.price([column], unit, setting="budgeted", batch=goal.batch)
                                 for unit in (*goal.units, *_BYTES)}
        ledger.configurations += 1
        ledger.evaluated += 1
        if bool(goal.meets(quality[column], spent)):
            found.append(((column,), float(goal.objective(quality[column], spent)), float(quality[column])))
    return sorted(found, key=lambda one: (one[1], -one[2], one[0]))


def anytime(costs: Costs, quality: Floats, site: Sequence[int], goal: Goal, ledger: Ledger, *,
            exits: int) -> list[Found]:
    """Every choice of ``exits`` early heads at different sites; of those that meet the goal, each
    set of sites' front of objective and quality, the best first.

    The quality asked for holds at each early exit, and a later one is never worse than the one before: a refinement.
    Costs are the whole network's with every chosen head, but a limit on macs or latency_ms is a deadline: it holds for
    the way to the first answer. Of equal ones the least to the first answer comes first.
    """
    if not 1 <= exits <= 3:
        raise OfframpError(expected="1 to 3 early exits", got=repr(exits), where="search(setting='anytime')",
                           todo="set max_exits.")
    last = len(quality) - 1
    heads = {s: np.flatnonzero(np.array(site) == s) for s in sorted(set(site))}
    units = (*dict.fromkeys((*goal.units, "macs")),)
    costs.one_width("search(setting='anytime')")
    parts = {unit: costs.parts(unit, batch=goal.batch) for unit in units}
    best: list[Found] = []
    for chosen in itertools.combinations(heads, exits):
        grid = np.stack(np.meshgrid(*(heads[s] for s in chosen), indexing="ij"), axis=-1).reshape(-1, exits)
        reached = quality[grid]
        spent: dict[str, Any] = {unit: head[grid].sum(axis=1) + body[last] for unit, (body, head) in parts.items()}
        spent["param_bytes"] = np.array(costs.head_param_bytes, np.float64)[grid].sum(axis=1) + costs.param_bytes[last]
        spent["peak_bytes"] = np.maximum(np.array(costs.peak_bytes, np.float64)[grid].max(axis=1),
                                         costs.peak_bytes[last])
        first: dict[str, Any] = {unit: (body + head)[grid[:, 0]] for unit, (body, head) in parts.items()}
        ledger.configurations += len(grid)
        ledger.evaluated += len(grid)
        worst = reached.min(axis=1)
        meets = goal.meets(worst, {**spent, **first}) & (np.diff(reached, axis=1) >= 0).all(axis=1)
        rows = np.flatnonzero(meets)
        rows = rows[np.argsort(first["macs"][rows], kind="stable")]
        objective = goal.objective(worst, spent)[rows]
        best += [(tuple(grid[rows[k]].tolist()), float(objective[k]), float(worst[rows[k]]))
                 for k in front(objective, worst[rows])]
    path = np.add(*parts["macs"])
    return sorted(best, key=lambda one: (one[1], path[one[0][0]], one[0]))

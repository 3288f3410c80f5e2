"""A bound on every plan of a cell at once: what no choice of heads and thresholds from three lists can beat.

N samples, K classes, G groups of candidates. A cell is up to three lists of candidates (a column and the set of samples
it lets go), one an exit in order of depth; a plan takes one of each. With cost and quality additive over samples a
plan's outcome would be a sum over samples of what the column where it leaves is worth; two things stand in the way.

*Quality is a mean of ratios.* On the box of (hit, union) that the cell can reach, hit / union is at most one of two
planes (McCormick's envelope of hit times the chord of 1 / union); both are additive. A multiplier joins it to the cost.

*Exits see only who is left.* Fix the middle exit: the first and the third then hardly touch each other, for whoever
leaves at the first mostly would at the middle one. Only for those who would not, the third exit's gain is overstated;
the first exit's list is charged with the most that this can be. So the best first and the best third exit are found
apart from each other, by products of 0/1 matrices with worths.

Groups of candidates of one column are bounded together: samples in all of their sets leave, in none stay, the others do
what is better. A group that no plan below the threshold can contain is dropped from its list. Everything is rounded to
the safe side: ``margin`` covers float32.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bounds", "Scene", "filter_lists"]

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Lists = tuple[Ints | None, Ints, Ints | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """Candidates of a whole space, laid end to end in order of column, then size; E columns and the end."""

    inside: Bools
    """(C, N)"""
    column: Ints
    """(C,)"""
    pay: Floats
    """(E + 1, N, 2K): hit and union."""
    body: Floats
    """(E + 1,) cost of a sample to the column's site, a share of the whole network's."""
    head: Floats
    """(E + 1,) the same of its head; 0 at the end."""
    sure: Bools
    """(K,) classes that occur in every mixture: over these alone the mean is surely taken."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """What is known of a cell: the lists that are left, the bound, and a plan that may be good."""

    lists: Lists
    low: float
    """No plan of the cell has a smaller worth: cost + price * (quality asked - quality)."""
    near: tuple[int, ...]
    """The plan, one candidate a list, whose bound is lowest."""
    of_plan: Floats
    """(first, second, third) bound of each plan, where ``per`` is 1; 1 wide where there is no list."""


@dataclass(frozen=True, eq=False)
class _Groups:
    start: Ints
    column: Ints
    core: Bools
    union: Bools
    size: int

    def spread(self, kept: Bools) -> Bools:
        return np.repeat(kept, np.diff(np.append(self.start, self.size)))


def _grouped(scene: Scene, ids: Ints, per: int) -> _Groups:
    column = scene.column[ids]
    place = np.arange(len(ids))
    fresh = np.concatenate([[True], column[1:] != column[:-1]])
    start = np.flatnonzero((place - np.maximum.accumulate(np.where(fresh, place, 0))) % per == 0)
    inside = scene.inside[ids]
    if len(start) == len(ids):
        return _Groups(start, column, inside, inside, len(ids))
    return _Groups(start, column[start], np.logical_and.reduceat(inside, start, axis=0),
                   np.logical_or.reduceat(inside, start, axis=0), len(ids))


def _planes(scene: Scene, groups: tuple[_Groups | None, ...], near: Floats) -> tuple[Floats, float]:
    """(2K,) and a constant: quality <= constant + weights @ (hit, union), for every plan of the cell."""
    columns, masks = [], []
    samples = scene.inside.shape[1]
    gone = np.zeros(samples, bool)
    for group in groups:
        if group is not None:
            found, first = np.unique(group.column, return_index=True)
            columns.append(found)
            masks.append(np.logical_or.reduceat(group.union, first, axis=0) & ~gone)
            gone = gone | group.core.all(axis=0)
    columns.append(np.array([len(scene.body) - 1]))
    masks.append(~gone[None])
    can = np.concatenate(masks)[..., None]
    pay = scene.pay[np.concatenate(columns)]
    low = np.where(can, pay, np.inf).min(axis=0).sum(axis=0, dtype=np.float64)
    high = np.where(can, pay, -np.inf).max(axis=0).sum(axis=0, dtype=np.float64)
    sure, classes = scene.sure, len(scene.sure)
    count = int(sure.sum())
    if not count:
        return np.zeros(2 * classes), 1.0
    near = np.clip(near, low, high)
    (hit0, union0), (hit1, union1), (hit, union) = (
        (one[:classes][sure], one[classes:][sure]) for one in (low, high, near))
    both = union0 * union1
    planes = [(1 / union0, -hit0 / both, hit0 * union0 / both), (1 / union1, -hit1 / both, hit1 * union1 / both)]
    first = np.argmin([a * hit + b * union + c for a, b, c in planes], axis=0) == 0
    by_hit, by_union, rest = (np.where(first, x, y) for x, y in zip(*planes, strict=True))
    weights = np.zeros((2, classes))
    weights[:, sure] = by_hit, by_union
    return weights.ravel() / count, float(rest.sum()) / count


def filter_lists(scene: Scene, lists: Lists, *, budget: float, asked: float, price: float, near: Floats, per: int,
                 of_cost: float = 1.0) -> Bounds:
    """Bound a cell and drop from its lists what no plan below the threshold can contain.

    A plan is of interest when its cost (a share of the whole network's, times ``of_cost``) is below ``budget`` and its
    quality at least ``asked``, and only when cost + price * (asked - quality) <= budget.
    """
    groups = tuple(None if one is None else _grouped(scene, one, per) for one in lists)
    one, two, three = groups
    assert two is not None
    weights, constant = _planes(scene, groups, near)
    samples = scene.inside.shape[1]
    used = np.unique(np.concatenate([group.column for group in groups if group is not None]))
    worth = np.zeros(scene.pay.shape[:2], np.float32)  # (E + 1, N) of leaving there instead of at the end
    at_end = scene.pay[-1] @ weights
    worth[used] = of_cost * (scene.body[used] - 1)[:, None] / samples - price * (scene.pay[used] @ weights - at_end)
    head = (of_cost * scene.head / samples).astype(np.float32)  # a sample
    whole = of_cost * 1.0 + price * (asked - constant - at_end.sum())
    margin = 4 * samples * 2.0**-24 * float(np.abs(worth[used]).max(axis=0).sum() + samples * head[used].max())
    threshold = budget + margin

    parts = [_beside(scene, groups, first, worth, head, of_cost) for first in ((False, True) if one else (False,))]
    total = whole + np.maximum.reduce([part.pair for part in parts])  # (first, second), the better of two bounds
    best = np.unravel_index(int(total.argmin()), total.shape)
    lows: list[NDArray[Any] | None] = [total.min(axis=1) if one else None, total.min(axis=0), None]
    at = [int(best[0]), int(best[1]), 0]
    if three is not None:
        thirds = [(whole + part.others[:, None] + part.later) for part in parts if part.later is not None]
        lows[2] = np.maximum.reduce([one.min(axis=0) for one in thirds])
        at[2] = int(thirds[0][best[1]].argmin())
    left: list[Ints | None] = [None, None, None]
    near_by = []
    for k, (ids, group, low) in enumerate(zip(lists, groups, lows, strict=True)):
        if ids is not None and group is not None and low is not None:
            left[k] = ids[group.spread(low <= threshold)]
            near_by.append(int(ids[group.start[at[k]]]))
    assert left[1] is not None
    of_plan = np.zeros((0, 0, 0))
    if per == 1:
        of_plan = np.maximum.reduce([part.of_plan() for part in parts]) + (whole - margin)
    return Bounds(lists=(left[0], left[1], left[2]), low=float(total[best]) - margin, near=tuple(sorted(near_by)),
                  of_plan=of_plan)


@dataclass(frozen=True, eq=False)
class _Part:
    """Sums of a bound, beside the second exit or, ``first``, beside the first one."""

    first: bool
    base: Floats
    sooner: Singles | None
    """(other, held)"""
    later: Singles | None
    """(held, third)"""
    after: Floats

    @property
    def pair(self) -> Floats:
        """(first, second)"""
        alone = (self.base + self.after)[None]
        both = alone if self.sooner is None else self.sooner + alone
        return both.T if self.first else both

    @property
    def others(self) -> Floats:
        """(held,) all but the third exit."""
        return self.base if self.sooner is None else self.base + self.sooner.min(axis=0)

    def of_plan(self) -> Floats:
        """(first, second, third)"""
        out = self.base[None, :, None] + (0.0 if self.sooner is None else self.sooner[:, :, None])
        out = out + (self.after[None, :, None] if self.later is None else self.later[None])
        return out.transpose(1, 0, 2) if self.first else out


def _beside(scene: Scene, groups: tuple[_Groups | None, ...], first: bool, worth: Singles, head: Singles,
            of_cost: float) -> _Part:
    """Bound plans with the first or the second exit fixed, group by group, and the other two apart from each other."""
    held, other, three = (groups[0], groups[1], groups[2]) if first else (groups[1], groups[0], groups[2])
    assert held is not None
    samples = worth.shape[1]
    middle = worth[held.column]
    may = np.where(held.union, middle, np.float32(np.inf))
    later: Singles | None = None
    most = np.zeros(samples, np.float32)
    if three is not None:
        later = np.empty((len(held.column), len(three.column)), np.float32)
        most = np.full(samples, -np.inf, np.float32)
        for e in np.unique(three.column):
            rows = np.flatnonzero(three.column == e)
            core, union = three.core[rows], three.union[rows]
            most = np.maximum(most, head[e] + np.where(union.any(axis=0), np.maximum(worth[e], 0), 0))
            stays = np.where(held.core, middle, np.minimum(may, head[e]))
            turn = np.where(held.core, 0, np.minimum(may, head[e] + worth[e]) - stays)
            later[:, rows] = stays.sum(axis=1)[:, None] + turn @ core.T.astype(np.float32)
            if (loose := union & ~core).any():
                later[:, rows] += np.minimum(turn, 0) @ loose.T.astype(np.float32)
        after = later.min(axis=1)
    else:
        after = np.where(held.core, middle, np.minimum(may, 0)).sum(axis=1)
    sooner: Singles | None = None
    if other is not None:
        sooner = np.empty((len(other.column), len(held.column)), np.float32)
        at_most = np.where(held.core, middle, np.minimum(may, most))
        waits = (~held.union).sum(axis=1)
        if not first:
            at_most = at_most + head[held.column][:, None]
        for e in np.unique(other.column):
            rows = np.flatnonzero(other.column == e)
            core, union = other.core[rows], other.union[rows]
            if first:  # the second exit is seen, and paid, by those alone whom the first has not let go
                turn = np.where(held.core, 0, np.minimum(may, head[e] + worth[e]) - at_most)
                turn = np.where(held.union, turn, turn - head[e])
                sooner[rows] = (head[e] * waits)[None] + core.astype(np.float32) @ turn.T
            else:
                turn = worth[e] - at_most
                sooner[rows] = of_cost * scene.head[e] + core.astype(np.float32) @ turn.T
            if (loose := union & ~core).any():
                sooner[rows] += loose.astype(np.float32) @ np.minimum(turn, 0).T
    return _Part(first, of_cost * scene.head[held.column], sooner, later, after.astype(np.float64))

"""A bound on every plan of a cell at once: what no choice of heads and thresholds from three lists can beat.

N samples, K classes, G groups of candidates. A cell is up to three lists of candidates (a column and the set of samples
it lets go), one an exit in order of depth; a plan takes one of each. With cost and quality additive over samples a
plan's outcome would be a sum over samples of what the column where it leaves is worth; two things stand in the way.

*Quality is a mean of ratios.* On the box of (hit, union) that the cell can reach, hit / union is at most one of two
planes (McCormick's envelope of hit times the chord of 1 / union); both are additive. A multiplier joins it to the cost.

*Exits see only who is left.* Fix the middle exit: the first and the third then hardly touch each other, for whoever
leaves at the first mostly would at the middle one. Only for those who would not, the third exit's gain is overstated;
the first exit's list is charged with the most that this can be. So the best first and the best third exit are found
apart from each other, by products of 0/1 matrices with worths; the same holds beside the first exit. Pairs of a first
and a second exit that this leaves are then bounded with each third exit, nothing taken apart.

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
_PAIRS = 2_000


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
    plans: Ints | None
    """(P, exits) plans that the bound leaves, where ``per`` is 1; None where they are too many to tell."""


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


def _box(scene: Scene, groups: tuple[_Groups | None, ...]) -> tuple[Floats, Floats]:
    """((2K,), (2K,)): what hit and union add up to at least and at most, for every plan of the cell.

    The tighter of two: each sample at its own extreme column; or each role (an exit) has one column for all samples, so
    that a sample is at the extreme of the roles' means, and a role's column deviates from its mean as a whole.
    """
    samples, size = scene.inside.shape[1], scene.pay.shape[2]
    gone = np.zeros(samples, np.bool_)
    end = scene.pay[-1]
    best = np.full((2, samples, size), np.inf)  # of the low ends, and of the high ends' negatives
    means = best.copy()
    apart = np.zeros((2, size))
    for group in groups:
        if group is None:
            continue
        columns, first = np.unique(group.column, return_index=True)
        can = np.logical_or.reduceat(group.union, first, axis=0) & ~gone
        must: Bools = np.logical_and(group.core.all(axis=0), ~gone)
        pay, mean = scene.pay[columns], scene.pay[columns].mean(axis=0)
        some = np.asarray(can.any(axis=0)).reshape(-1, 1)
        for side, sign in enumerate((1.0, -1.0)):
            np.minimum(best[side], np.where(can[..., None], sign * pay, np.inf).min(axis=0), out=best[side])
            np.minimum(means[side], np.where(some, sign * mean, np.inf), out=means[side])
            turn = sign * (pay - mean)
            np.minimum(turn, 0, out=turn, where=~must.reshape(1, -1, 1))
            apart[side] += (turn * can[..., None]).sum(axis=1).min(axis=0)
        gone |= must
    for side, sign in enumerate((1.0, -1.0)):
        for one in (best, means):
            np.minimum(one[side], np.where(gone[:, None], np.inf, sign * end), out=one[side])
    low, high = np.maximum(best.sum(axis=1), means.sum(axis=1) + apart) * np.array([[1.0], [-1.0]])
    return low, high


def _planes(scene: Scene, groups: tuple[_Groups | None, ...], near: Floats) -> tuple[Floats, float]:
    """(2K,) and a constant: quality <= constant + weights @ (hit, union), for every plan of the cell."""
    low, high = _box(scene, groups)
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
    pairs = np.argwhere(total <= threshold)
    lows: list[NDArray[Any] | None] = [total.min(axis=1) if one else None, total.min(axis=0), None]
    best = [int(k) for k in np.unravel_index(int(total.argmin()), total.shape)]
    low = float(total.min())
    fits: Bools | None = total <= threshold
    if three is not None:
        thirds = [(whole + part.others[:, None] + part.later).min(axis=0) for part in parts if part.later is not None]
        of_third = np.maximum.reduce(thirds)
        lows[2] = of_third
        best.append(int(of_third.argmin()))
        fits = None
        if len(pairs) <= _PAIRS:  # few enough to bound each with each third exit, nothing taken apart
            each = whole + _together(scene, groups, pairs, worth, head, of_cost)  # (pairs, third)
            lows = [np.full(len(group.start), np.inf) if group else None for group in (one, two)]
            lows.append(each.min(axis=0, initial=np.inf))
            for known, of_pair in zip(lows[:2], pairs.T, strict=True):
                if known is not None:
                    np.minimum.at(known, of_pair, each.min(axis=1))
            low = threshold
            if len(pairs):
                low = float(each.min())
                row, third = np.unravel_index(int(each.argmin()), each.shape)
                best = [*pairs[row].tolist(), int(third)]
            fits = each <= threshold
    left: list[Ints | None] = [None, None, None]
    near_by = []
    for k, (ids, group, found) in enumerate(zip(lists, groups, lows, strict=True)):
        if ids is not None and group is not None and found is not None:
            left[k] = ids[group.spread(found <= threshold)]
            near_by.append(int(ids[group.start[best[k]]]))
    assert left[1] is not None
    plans = None
    if per == 1 and fits is not None:
        at = np.argwhere(fits)
        if three is not None:
            at = np.concatenate([pairs[at[:, 0]], at[:, 1:]], axis=1)
        plans = np.stack([ids[at[:, k]] for k, ids in enumerate(lists) if ids is not None], axis=1)
    return Bounds(lists=(left[0], left[1], left[2]), low=low - margin, near=tuple(sorted(near_by)), plans=plans)


def _together(scene: Scene, groups: tuple[_Groups | None, ...], pairs: Ints, worth: Singles, head: Singles,
              of_cost: float) -> Singles:
    """(pairs, third): bounds of plans, each sample of a group that is in doubt at its best."""
    one, two, three = groups
    assert two is not None and three is not None
    out = np.empty((len(pairs), len(three.column)), np.float32)
    for p in range(0, len(pairs), 1024):
        first, second = pairs[p:p + 1024].T
        passed = head[two.column[second]][:, None]
        gone = two.core[second]
        leave = np.where(two.union[second], passed + worth[two.column[second]], np.float32(np.inf))
        dear = np.zeros(len(first))
        if one is not None:
            at_first = worth[one.column[first]]
            leave = np.where(one.core[first], at_first,
                             np.minimum(leave, np.where(one.union[first], at_first, np.float32(np.inf))))
            gone = gone | one.core[first]
            dear = of_cost * scene.head[one.column[first]]
        for e in np.unique(three.column):
            rows = np.flatnonzero(three.column == e)
            core, union = three.core[rows], three.union[rows]
            stays = np.where(gone, leave, np.minimum(leave, passed + head[e]))
            turn = np.where(gone, 0, np.minimum(leave, passed + head[e] + worth[e]) - stays)
            found = (stays.sum(axis=1) + dear)[:, None] + turn @ core.T.astype(np.float32)
            if (loose := union & ~core).any():
                found += np.minimum(turn, 0) @ loose.T.astype(np.float32)
            out[p:p + 1024, rows] = found
    return out


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
        # a third exit that is worse than the end for a sample: charged to whoever takes the sample more seldom, the
        # third itself, which is then let off, or the other exit, which spares the sample that loss
        seldom = np.zeros(samples, bool)
        if other is not None:
            seldom = three.union.mean(axis=0) < other.union.mean(axis=0) * (1 - held.core.mean(axis=0))
        for e in np.unique(three.column):
            rows = np.flatnonzero(three.column == e)
            core, union = three.core[rows], three.union[rows]
            gain = np.where(seldom, np.minimum(worth[e], 0), worth[e])
            most = np.maximum(most, head[e] + np.where(union.any(axis=0), np.maximum(gain, 0), 0))
            stays = np.where(held.core, middle, np.minimum(may, head[e]))
            turn = np.where(held.core, 0, np.minimum(may, head[e] + gain) - stays)
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

"""Two limits between which every policy lies: what labels would make possible, and what no evidence does.

Both count the costs of a lesson: a sample that leaves at an exit has paid every head on the way, for a policy has to
look before it passes. A network cut at one exit without the others' heads costs less, and is another network.
N samples, E exits.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.errors import OfframpError
from offramp.policies.lesson import Lesson
from offramp.table.payload import payload, quality

__all__ = ["Limit", "no_information", "oracle", "room_taken"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Limit:
    """What a limit reaches at a budget, and how."""

    value: float
    """Accuracy, or the linear mIoU of ``Lesson.value``, where at most one sample is parted between two exits."""
    quality: float
    """Accuracy or true mIoU of the whole assignment that ``exit_index`` is; of mixed shares, of the mean sums."""
    cost: float
    """The mean cost of a sample, at most the budget."""
    shares: Tensor
    """(E,) float64: the share of the samples that leaves at each exit."""
    exit_index: Tensor | None = None
    """(N,) int64: the oracle's exit of each sample; the parted one takes the cheaper of its two."""


def oracle(lesson: Lesson, budget: float) -> Limit:
    """The best assignment of samples to exits at a mean cost, the labels known: no policy's mean value is higher.

    Greedy on the upper concave hull of each sample's (cost, value): steps are taken in falling order of gain per
    cost until the budget is spent, the last one in part. That is the exact optimum of the linear program in which a
    sample may be parted; whole samples do at best as well and at worst one sample's step less, 1 / N of a point of
    accuracy. For a dense table it is exact for the linear mIoU; ``quality`` is the true mIoU of that very assignment,
    which the best assignment for the true one may exceed.
    """
    cost, value = lesson.cost.numpy(), lesson.value.numpy()
    spare = (lesson.feasible(budget) - cost[0]) * len(value)
    rows, ends, gains, prices = _steps(cost, value)
    order = np.lexsort((ends, -gains / prices))
    paid = np.cumsum(prices[order])
    whole = int(np.searchsorted(paid, spare * (1 + 1e-12), side="right"))
    taken = order[:whole]
    exit_index = np.zeros(len(value), np.int64)
    np.maximum.at(exit_index, rows[taken], ends[taken])
    total = value[:, 0].sum() + gains[taken].sum()
    spent = paid[whole - 1] if whole else 0.0
    if whole < len(order):
        part = order[whole]
        total += gains[part] * max(spare - spent, 0.0) / prices[part]
        spent = max(spent, spare)
    hit, union = payload(lesson.table, lesson.against)
    every = np.arange(len(value))
    return Limit(
        value=float(total / len(value)), cost=float(cost[0] + spent / len(value)),
        quality=float(quality(hit[every, exit_index].sum(axis=0), union[every, exit_index].sum(axis=0))),
        shares=torch.from_numpy(np.bincount(exit_index, minlength=len(cost)) / len(value)),
        exit_index=torch.from_numpy(exit_index))


def no_information(lesson: Lesson, budget: float) -> Limit:
    """The best mixture that a die alone decides: the upper concave hull of (cost, mean value) over the exits.

    Dense: ``quality`` is the true mIoU of the mixture's mean sums, which a long draw tends to.
    """
    cost, value = lesson.cost.numpy(), lesson.value.numpy().mean(axis=0)
    budget = min(lesson.feasible(budget), float(cost[-1]))
    _, ends, gains, prices = _steps(cost, value[None])
    shares = np.zeros(len(cost))
    shares[0], at, spare = 1.0, 0, budget - cost[0]
    for end, price in zip(ends, prices, strict=True):
        part = min(max(spare, 0.0) / price, 1.0)
        shares[at] -= part
        shares[end] += part
        at, spare = int(end), spare - part * price
        if part < 1:
            break
    hit, union = (sums.sum(axis=0) for sums in payload(lesson.table, lesson.against))
    return Limit(value=float(shares @ value), cost=float(shares @ cost), shares=torch.from_numpy(shares),
                 quality=float(quality(shares @ hit, shares @ union)))


def room_taken(lesson: Lesson, budget: float, quality: float) -> float:
    """Which share of the room between the die and the oracle a policy of this quality takes at a budget; 0 to 1.

    Below 0 where it does worse than a die. Raises OfframpError where the two limits meet and there is no room.
    """
    low, high = no_information(lesson, budget).quality, oracle(lesson, budget).quality
    if not high > low:
        raise OfframpError(expected="room between the limits", got=f"both at {low:g}", where="room_taken()",
                           todo="ask at a budget at which deeper exits help.")
    return (quality - low) / (high - low)


def _steps(cost: Floats, value: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats, Floats]:
    """The rising edges of each row's upper concave hull over (cost, value), from exit 0 on.

    (row, exit reached, gain, price), by row and then by depth, so that gain / price falls within a row.
    """
    samples, exits = value.shape
    rows, ends, gains, prices = [], [], [], []
    every, at = np.arange(samples), np.zeros(samples, np.int64)
    for _ in range(exits - 1):
        price = cost[None, :] - cost[at][:, None]
        gain = value - value[every, at][:, None]
        slope = np.where((price > 0) & (gain > 1e-12), gain / np.where(price > 0, price, 1.0), -np.inf)
        # of equal slopes the farthest: what lies between is on the edge
        best = exits - 1 - slope[:, ::-1].argmax(axis=1)
        moves = np.flatnonzero(slope[every, best] > 0)
        if not len(moves):
            break
        rows.append(moves)
        ends.append(best[moves])
        gains.append(gain[moves, best[moves]])
        prices.append(price[moves, best[moves]])
        at[moves] = best[moves]
    if not rows:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
    row = np.concatenate(rows)
    order = np.argsort(row, kind="stable")
    joined = (np.concatenate(parts)[order] for parts in (ends, gains, prices))
    end, gain, price = joined
    return row[order], end, gain, price

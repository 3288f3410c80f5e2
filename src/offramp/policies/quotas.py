"""From scores and shares to thresholds (EENet, Algorithm 1), and budgets kept from below. N samples, E exits."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Thresholded", "between", "geometric", "leave", "mean_cost", "threshold_of", "thresholds_between", "thresholds_for",
    "within",
]

Floats = NDArray[np.float64]
Thresholded = tuple[float | None, ...]
"""One an early exit; None: nobody leaves."""


def leave(scores: Tensor, thresholds: Thresholded) -> Tensor:
    """Where each sample leaves: scores (N, E - 1) -> (N,) int64, the last exit taking everyone left."""
    at = torch.full((len(scores),), len(thresholds))
    for e in range(len(thresholds) - 1, -1, -1):
        if (threshold := thresholds[e]) is not None:
            at[scores[:, e] >= threshold] = e
    return at


def mean_cost(scores: Tensor, thresholds: Thresholded, cost: Tensor) -> float:
    """Mean cost of the samples under these thresholds; ``cost`` (E,)."""
    return float(cost[leave(scores, thresholds)].mean())


def thresholds_for(scores: Tensor, shares: Tensor) -> Thresholded:
    """At each exit, of those not yet gone the surest ``floor(share * N)`` leave (EENet, Algorithm 1, lines 9-19).

    scores (N, E - 1), shares (E,) or (E - 1,). A quota of 0 disables the exit. Where we differ: at most the quota
    leaves. Scores that are equal across the quota's edge stay together, on the side that keeps it, and what the quota
    has left passes to the next exit (the paper parts equals by their place in the table, which no live sample has);
    the threshold stands midway between two observed scores, so that the last bit of one seldom flips a decision; and
    one that can let nobody go is None. The paper prints round(), which may exceed its shares.

    >>> thresholds_for(torch.tensor([[0.75], [0.5], [0.5], [0.1]]), torch.tensor([0.5]))
    (0.625,)
    """
    samples = len(scores)
    alive = torch.ones(samples, dtype=torch.bool)
    made: list[float | None] = []
    owed = 0
    for e in range(scores.shape[1]):
        quota = int(float(shares[e]) * samples + 1e-9)
        threshold = threshold_of(scores[alive, e], quota + owed) if quota else None
        made.append(threshold)
        left = int(alive.sum())
        if threshold is not None:
            alive &= scores[:, e] < threshold
        owed = max(0, owed + quota - (left - int(alive.sum())))
    return tuple(made)


def threshold_of(scores: Tensor, quota: int) -> float | None:
    """The lowest threshold that at most ``quota`` of the scores (n,) reach; None where that is nobody."""
    if quota <= 0 or not len(scores):
        return None
    ranked = scores.sort(descending=True).values
    if quota >= len(ranked):
        return float(ranked[-1]) - 1e-3
    kept = ranked[:quota][ranked[:quota] > ranked[quota]]
    return between(ranked[quota], kept[-1]) if len(kept) else None


def between(below: Tensor, above: Tensor) -> float:
    """A threshold that parts two observed scores: their middle, or ``above`` where their type has nothing between."""
    middle = below + (above - below) / 2  # rounded as the scores are, which a comparison would do anyway
    return float(middle if bool(middle > below) else above)


def geometric(ratio: float, exits: int) -> Tensor:
    """Shares (E,) proportional to ratio^k, k = 0 ... E - 1, ratio > 0, as MSDNet takes them (arXiv:1703.09844, 4.2)."""
    return (torch.arange(exits, dtype=torch.float64) * math.log(ratio)).softmax(dim=0)  # ratio^k itself would overflow


def within(budget: float, family: Callable[[float], Sequence[float | None]], spent: Callable[[Thresholded], float],
           *, low: float, high: float, looks: int = 24, steps: int = 50) -> Thresholded:
    """The dearest member of a family that keeps the budget: ``low`` is its cheapest end, ``high`` its dearest.

    A look at some members, then bisection above the dearest of them that keeps it; where costs do not rise all along,
    as where scores are equal, the dearest one *seen*, and never the first above the budget (MSDNet's public code takes
    that). The cheap end is taken to keep it.
    """
    most = budget * (1 + 1e-12)
    places = [low + (high - low) * look / looks for look in range(looks)] + [high]
    seen = [tuple(family(place)) for place in places]
    costs = [spent(one) for one in seen]
    at = max((cost, look) for look, cost in enumerate(costs) if look == 0 or cost <= most)[1]
    best, cost = seen[at], costs[at]
    if at == looks:
        return best
    low, high = places[at], places[at + 1]
    for _ in range(steps):
        middle = (low + high) / 2
        found = tuple(family(middle))
        paid = spent(found)
        if paid <= most:
            low = middle
            if paid >= cost:
                best, cost = found, paid
        else:
            high = middle
    return best


def thresholds_between(scores: Floats, steps: int) -> Floats:
    """At most ``steps`` falling thresholds, each midway between two neighbouring observed scores; the last lets all go.

    They lie near equal steps of rank; near each step the widest gap is taken, so that the last bit of a score, which
    changes with the batch size, seldom flips a decision. The lowest stands as far below the lowest score as that
    allows.
    """
    values = np.unique(scores)  # rising
    if not len(values):
        return np.zeros(0)
    rank = np.searchsorted(np.sort(scores), values[1:], side="left")  # samples below the gap before values[1:]
    gaps, middles = np.diff(values), values[:-1] + np.diff(values) / 2
    # one bit apart there is no middle: the two leave together, or a last bit would part them
    usable = (middles > values[:-1]) & (middles < values[1:])
    rank, gaps, middles = rank[usable], gaps[usable], middles[usable]
    lowest = max(values[0] - 1e-3, 0.0) if values[0] > 0 else values[0] - 1e-3
    if len(middles) > steps - 1:
        wanted = np.linspace(0, len(scores), steps + 1)[1:-1]
        reach = len(scores) / steps / 2
        kept = set()
        for target in wanted:
            first, last = np.searchsorted(rank, [target - reach, target + reach])
            if last > first:
                kept.add(int(first + gaps[first:last].argmax()))
        middles = middles[sorted(kept)]
    return np.concatenate([middles[::-1], [lowest]])

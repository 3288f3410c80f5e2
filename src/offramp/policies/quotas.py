"""From scores and shares to thresholds (EENet, Algorithm 1), and budgets kept from below. N samples, E exits."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Thresholded", "geometric", "leave", "mean_cost", "thresholds_for", "within"]

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
    leaves. Scores that are equal across the quota's edge stay together, on the side that keeps it; the threshold stands
    midway between two observed scores, so that the last bit of one seldom flips a decision; and one that can let
    nobody go is None.

    >>> thresholds_for(torch.tensor([[0.75], [0.5], [0.5], [0.1]]), torch.tensor([0.5]))
    (0.625,)
    """
    samples = len(scores)
    alive = torch.ones(samples, dtype=torch.bool)
    made: list[float | None] = []
    for e in range(scores.shape[1]):
        quota = min(int(float(shares[e]) * samples + 1e-9), int(alive.sum()))
        threshold = _above(scores[alive, e], quota)
        made.append(threshold)
        if threshold is not None:
            alive &= scores[:, e] < threshold
    return tuple(made)


def _above(scores: Tensor, quota: int) -> float | None:
    """The lowest threshold that at most ``quota`` scores reach; None where that is nobody."""
    if quota <= 0 or not len(scores):
        return None
    ranked = scores.double().sort(descending=True).values
    if quota >= len(ranked):
        return float(ranked[-1]) - 1e-3
    below = ranked[quota]
    kept = ranked[:quota][ranked[:quota] > below]
    if not len(kept):
        return None
    middle = float(kept[-1] + below) / 2
    return middle if middle > float(below) else float(kept[-1])


def geometric(ratio: float, exits: int) -> Tensor:
    """Shares (E,) proportional to ratio^k, k = 0 ... E - 1, as MSDNet takes them (arXiv:1703.09844, 4.2)."""
    shares = torch.tensor([ratio**k for k in range(exits)], dtype=torch.float64)
    return shares / shares.sum()


def within(budget: float, family: Callable[[float], Sequence[float | None]], spent: Callable[[Thresholded], float],
           *, low: float, high: float, steps: int = 60) -> Thresholded:
    """The dearest member of a family that keeps the budget: ``low`` is its cheapest end, ``high`` its dearest.

    Bisection; where costs do not rise all along, the dearest one *seen* that keeps the budget, and never the
    first above it (MSDNet's public code takes that). The cheap end is taken to keep it.
    """
    best = tuple(family(high))
    if spent(best) <= budget * (1 + 1e-12):
        return best
    best = tuple(family(low))
    most = spent(best)
    for _ in range(steps):
        middle = (low + high) / 2
        found = tuple(family(middle))
        cost = spent(found)
        if cost <= budget * (1 + 1e-12):
            low = middle
            if cost >= most:
                best, most = found, cost
        else:
            high = middle
    return best

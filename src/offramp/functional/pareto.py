"""Which points are beaten by none: lower cost, higher quality."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["front", "quality_at"]


def front(cost: ArrayLike, quality: ArrayLike) -> NDArray[np.int64]:
    """Indices of the points that no other beats in both, in order of cost; of equal points the first.

    >>> front([3.0, 1.0, 2.0, 2.0], [0.9, 0.5, 0.5, 0.7]).tolist()
    [1, 3, 0]
    """
    costs, qualities = np.asarray(cost, np.float64), np.asarray(quality, np.float64)
    order = np.lexsort((np.arange(len(costs)), -qualities, costs))
    best = np.maximum.accumulate(np.concatenate([[-np.inf], qualities[order]]))[:-1] if len(order) else qualities
    chosen: NDArray[np.int64] = order[qualities[order] > best]
    return chosen


def quality_at(cost: ArrayLike, quality: ArrayLike, budget: float) -> float:
    """The best quality that costs at most ``budget``, a point being taken below it, never above; NaN where none is."""
    costs, qualities = np.asarray(cost, np.float64), np.asarray(quality, np.float64)
    within = qualities[costs <= budget]
    return float(within.max()) if len(within) else float("nan")

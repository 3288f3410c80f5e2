"""A plan to beat: every plan that one more exit makes of a given one, at once. N samples, K classes, M candidates."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offramp.exhaustive.bound import Scene

__all__ = ["moves"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def moves(scene: Scene, others: Sequence[int], ids: Ints) -> tuple[Floats, Floats]:
    """((M + 1,) cost, a share of the whole network's; (M + 1, 2K) what hit and union add up to).

    ``others`` are candidates in order of depth, ``ids`` those of one other site; the last row is ``others`` alone.
    Sums are of float32 products: good for a search, nothing to prove by.
    """
    samples, last = scene.inside.shape[1], len(scene.body) - 1
    where, gone = np.full(samples, last), np.zeros(samples, bool)
    spent, passed, upto = np.zeros(last + 1), 0.0, 0.0
    for c in others:
        column = scene.column[c]
        passed += scene.head[column]
        spent[column] = scene.body[column] + passed
        if column < scene.column[ids[0]]:
            gone |= scene.inside[c]
            upto = passed
    for c in reversed(others):
        where[scene.inside[c]] = scene.column[c]
    spent[-1] = 1 + passed
    paid, now = spent[where], scene.pay[where, np.arange(samples)]
    change = np.zeros((len(ids) + 1, now.shape[1] + 1))
    columns = scene.column[ids]
    for e in np.unique(columns):
        rows = np.flatnonzero(columns == e)
        turn = np.concatenate([scene.pay[e] - now, (scene.body[e] + upto - paid)[:, None]], axis=1) * ~gone[:, None]
        change[rows] = scene.inside[ids[rows]].astype(np.float32) @ turn.astype(np.float32)
    heads = np.append(scene.head[columns], 0.0)
    return (paid.sum() + change[:, -1]) / samples + heads * (~gone).mean(), now.sum(axis=0) + change[:, :-1]

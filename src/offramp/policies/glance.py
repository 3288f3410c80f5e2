"""One row judged in plain arithmetic wherever tensors could not say otherwise. K classes, j exits passed.

A tensor operation on ten numbers takes about a microsecond whatever it does, and a decision is made of dozens; a few
such microseconds do for all of it in Python's own floats. Their last bits are others, so this is a filter, as geometers
have for their predicates (Shewchuk, 1997): a score farther from the threshold than rounding can have carried it
decides, and any other, NaN among them, is left to the tensors. So no decision differs from theirs.
"""

import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offramp.types import Evidence

__all__ = ["Row", "disorder_of", "glance", "weighed"]

Row = Sequence[float]
_LARGEST = 128  # logits; with about so many the tensors are as fast
_WIDE = (torch.float32, torch.float64)
_LEAVES, _STAYS = torch.tensor([True]), torch.tensor([False])


def glance(evidence: Evidence, threshold: float | None, score: Callable[[list[list[float]]], tuple[float, float]]
           ) -> Tensor | None:
    """Bool (1,), whether the only row leaves; None where the tensors have to say.

    ``score`` gives, of the row's logits (j, K), what is held against the threshold, and the most that it can be off
    from what the tensors say. Not of several rows, dense evidence, many classes, half floats, or another
    device.
    """
    logits = evidence.logits
    if logits is None or logits.shape[0] != 1 or logits.numel() > _LARGEST or not logits.is_cpu \
            or logits.dtype not in _WIDE:
        return None
    found, slack = score(logits.tolist()[0])
    if threshold is None:
        return _STAYS.clone() if math.isfinite(found) else None
    apart = found - threshold
    if math.isfinite(found) and abs(apart) > slack:
        return (_LEAVES if apart > 0 else _STAYS).clone()
    return None


def weighed(logits: Row) -> tuple[list[float], list[float], float]:
    """Of each class how far it lies below the largest, the exponential of that, and the sum of these."""
    largest = max(logits)
    below = [one - largest for one in logits]
    weights = list(map(math.exp, below))
    return below, weights, sum(weights)


def disorder_of(below: Row, weights: Row, total: float) -> float:
    """Entropy of the softmax in nats; NaN where a class is at -inf."""
    spread: float = sum(map(operator.mul, weights, below))
    return math.log(total) - spread / total

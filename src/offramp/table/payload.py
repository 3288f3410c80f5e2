"""What exits got right, as sums over samples: accuracy and mIoU of any mixture. N samples, E exits, K classes."""

import numpy as np
from numpy.typing import NDArray

from offramp.errors import PlanError
from offramp.table.exits import ExitTable

__all__ = ["payload", "quality"]

Floats = NDArray[np.float64]


def quality(hit: Floats, union: Floats) -> Floats:
    """Mean of hit / union over the classes that occur: (..., K) -> (...); mIoU of summed matrices, or accuracy."""
    there = union > 0
    ratio = np.divide(hit, union, out=np.zeros(np.broadcast_shapes(hit.shape, union.shape)), where=there)
    mean: Floats = ratio.sum(axis=-1) / np.maximum(there.sum(axis=-1), 1)
    return mean


def payload(table: ExitTable, against: str) -> tuple[Floats, Floats]:
    """(hit, union), both (N, E, K), which add up over samples exactly: their sums' ``quality`` is any mixture's.

    Dense: pixels of a class that were found; pixels that are of a class or are called so. Classification, K = 1:
    whether the answer is right; 1. ``against`` is "labels" or "backbone".
    """
    if table.task == "dense":
        matrices = table.confusion if against == "labels" else table.agreement_confusion
        if matrices is None:
            raise PlanError(expected="a table with labels", got="one without", where="against='labels'",
                            todo="take against='backbone'.")
        found = matrices.diagonal(dim1=-2, dim2=-1).double()
        either = matrices.sum(dim=-1).double() + matrices.sum(dim=-2).double() - found
        return found.numpy(), either.numpy()
    assert table.logits is not None
    said = table.logits.argmax(dim=-1)
    if against == "labels" and table.labels is None:
        raise PlanError(expected="a table with labels", got="one without", where="against='labels'",
                        todo="take against='backbone', which bounds the loss by disagreement (Eq. 3).")
    truth = said[:, -1] if table.labels is None or against == "backbone" else table.labels
    right = (said == truth[:, None]).double().numpy()[..., None]
    return right, np.ones_like(right)

"""Where wrong pixels lie: counted by their distance to the nearest semantic border. N samples, K classes, H W space.

Distances are Euclidean, to the nearest pixel of another class, in steps of a pixel. D = 31 bins: bin d holds
(d, d + 1] pixels, the last one all that is further, or in a picture of one class; the first is what touches another
class by an edge.
"""

import torch
from torch import Tensor

from offramp.errors import OfframpError

__all__ = ["DISTANCE_BINS", "count_by_distance", "distance_bins"]

DISTANCE_BINS = 31
_REACH = DISTANCE_BINS - 1
_FAR = (_REACH + 1) ** 2  # with the square of a shift it still fits 16 bits


def distance_bins(labels: Tensor, num_classes: int) -> Tensor:
    """The bin of each pixel: labels (N, H, W) -> uint8 (N, H, W), ``DISTANCE_BINS`` where the label is to be ignored.

    Labels outside [0, K) are ignored, as in ``confusion``: they are not counted, and make no border. All classes are
    done at once, at a cost that does not grow with K: of each column a pixel need only know how far the class nearest
    to its row is there, and how far the nearest other one.

    >>> distance_bins(torch.tensor([[[0, 0, 0, 1, 255]]]), 2)
    tensor([[[ 2,  1,  0,  0, 31]]], dtype=torch.uint8)
    """
    if labels.ndim != 3 or labels.is_floating_point() or num_classes >= 2**15:
        raise OfframpError(expected="integer labels (N, H, W) of fewer than 32768 classes",
                           got=f"{labels.dtype} {tuple(labels.shape)} of {num_classes}", where="distance_bins()")
    void = (labels < 0) | (labels >= num_classes)
    own = labels.to(torch.int16).masked_fill(void, -1)
    # Along the columns: the class nearest to each pixel, and the squares of the ways to it and to any other class.
    nearest, there, other = own.clone(), torch.zeros_like(own).masked_fill_(void, _FAR), torch.full_like(own, _FAR)
    steps = range(1, min(_REACH, own.shape[1] - 1) + 1)
    if bool(void.any()):
        for k in steps:
            for to, at in ((slice(None, -k), slice(k, None)), (slice(k, None), slice(None, -k))):
                found = (nearest[:, to] < 0) & (own[:, at] >= 0)
                nearest[:, to] = torch.where(found, own[:, at], nearest[:, to])
                there[:, to].masked_fill_(found, k * k)
    for k in reversed(steps):  # the nearest one writes last
        for to, at in ((slice(None, -k), slice(k, None)), (slice(k, None), slice(None, -k))):
            other[:, to].masked_fill_((own[:, at] != nearest[:, to]) & ~void[:, at], k * k)
    # Along the rows: from every column within reach, what is not the pixel's own class.
    best = other.clone()
    for k in range(1, min(_REACH, own.shape[2] - 1) + 1):
        for to, at in ((slice(None, -k), slice(k, None)), (slice(k, None), slice(None, -k))):
            way = torch.where(nearest[..., at] == own[..., to], other[..., at], there[..., at]).add_(k * k)
            torch.minimum(best[..., to], way, out=best[..., to])
    bins = best.float().sqrt_().ceil_().sub_(1).clamp_(max=_REACH).to(torch.uint8)
    return bins.masked_fill_(void, DISTANCE_BINS)


def count_by_distance(bins: Tensor, chosen: Tensor | None = None) -> Tensor:
    """How many pixels of each bin there are, or of those ``chosen`` (bool): (N, H, W) -> (N, D) int32."""
    rows, slots = len(bins), DISTANCE_BINS + 1
    cell = (bins if chosen is None else bins.masked_fill(~chosen, DISTANCE_BINS)).flatten(1).to(torch.int32)
    cell += torch.arange(rows, dtype=torch.int32, device=bins.device)[:, None] * slots
    counts = torch.bincount(cell.flatten(), minlength=rows * slots).view(rows, slots)
    return counts[:, :DISTANCE_BINS].to(torch.int32)

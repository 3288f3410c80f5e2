"""Semantic edges, and confidence that is smoothed across them (MESS, arXiv:2106.03527, Eqs. 8-9). n images, H W space.

A median commutes with a threshold: it reaches t where at least half of its window does. So Eq. 9 is a count in a box,
exact in integers, of the pixels that reach a level, first of seven coarse ones and then of the seven in between;
several levels' counts ride in one integral image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.errors import OfframpError

__all__ = ["EDGE_LEVELS", "reaches", "semantic_edges", "smooth_edges"]

EDGE_LEVELS = 64
"""Confidences on edges are told apart at multiples of 1/64 alone."""

_STEP = 8
_ROOM = 1 << 17  # pixels counted at a time: what they need stays in a cache


def semantic_edges(labels: Tensor, stride: int) -> Tensor:
    """Pixels near a border between predicted classes, Eq. 8: (n, H, W) integers -> (n, H, W) bool.

    A pixel is on the border where one of its 4 neighbours has another class; the border is then thickened by a square
    of ``stride`` x ``stride`` pixels (of an even square the middle is the lower right one of its central four).
    Where we differ: the paper finds edges with Canny's filter, which wants gradients and two thresholds, but classes
    have no order; and it writes "erode", which thickens only the complement.

    >>> semantic_edges(torch.tensor([[[0, 0, 0, 1, 1]]]), 1).int().tolist()
    [[[0, 0, 1, 1, 0]]]
    """
    if labels.ndim != 3 or stride < 1:
        raise OfframpError(expected="labels (n, H, W) and a stride >= 1", where="semantic_edges()",
                           got=f"shape {tuple(labels.shape)} and stride {stride}")
    border = torch.zeros_like(labels, dtype=torch.bool)
    across, down = labels[:, :, 1:] != labels[:, :, :-1], labels[:, 1:] != labels[:, :-1]
    border[:, :, 1:] |= across
    border[:, :, :-1] |= across
    border[:, 1:] |= down
    border[:, :-1] |= down
    before, after = (stride - 1) // 2, stride // 2
    grown = F.pad(border, (before, after, before, after))
    for dim in (1, 2):
        reach = 1
        while reach < stride:  # windows of twice the reach, until they are as wide as the square
            step, size = min(reach, stride - reach), grown.shape[dim]
            grown = grown.narrow(dim, 0, size - step) | grown.narrow(dim, step, size - step)
            reach += step
    return grown


def smooth_edges(confidence: Tensor, edges: Tensor, stride: int) -> Tensor:
    """Confidence whose pixels on edges take the median of their window, Eq. 9: (n, H, W) in [0, 1] -> (n, H, W).

    The window reaches 2 * stride pixels to each side and is clipped at the image's borders; of an even number of
    pixels the upper median counts. Where we differ: a median is given as the middle of its cell [k/64, (k+1)/64), so
    that ``>= k/64`` is answered exactly, and the value is within 1/128.
    """
    places, cells = _medians(confidence, edges, stride, range(1, EDGE_LEVELS))
    smoothed = confidence.clone()
    smoothed[places] = ((cells.double() + 0.5) / EDGE_LEVELS).to(confidence.dtype)
    return smoothed


def reaches(confidence: Tensor, edges: Tensor, stride: int, level: int) -> Tensor:
    """Where ``smooth_edges`` is at least ``level / 64``: (n, H, W) bool, at the price of one count instead of 63."""
    sure = confidence >= level / EDGE_LEVELS
    if 0 < level < EDGE_LEVELS:
        places, cells = _medians(confidence, edges, stride, (level,))
        sure[places] = cells > 0
    return sure


def _medians(confidence: Tensor, edges: Tensor, stride: int, levels: Sequence[int],
             ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Places of the m edge pixels (row, y, x), and how many of the levels (k: k/64, rising) the median there reaches.

    First every eighth level is counted; then, between two of those, the seven within, for the pixels whose median lies
    there: each is asked for 14 levels instead of 63, and where no median lies nothing is counted.
    """
    rows, high, wide = confidence.shape
    row, y, x = edges.nonzero(as_tuple=True)
    cells = torch.zeros_like(row)
    top, bottom = (y - 2 * stride).clamp_(min=0), (y + 2 * stride + 1).clamp_(max=high)
    left, right = (x - 2 * stride).clamp_(min=0), (x + 2 * stride + 1).clamp_(max=wide)
    half = ((bottom - top) * (right - left) + 1) // 2
    bits = (min(high, 4 * stride + 1) * min(wide, 4 * stride + 1)).bit_length() + 1
    room = _ROOM if confidence.device.type == "cpu" else 1 << 22  # a GPU would wait for launches
    group = max(1, room // (high * wide))
    starts = torch.searchsorted(row, torch.arange(0, rows + group, group, device=row.device)).tolist()
    for part, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        if start == stop:
            continue
        mine, block = slice(start, stop), confidence[part * group : (part + 1) * group]
        bin_ = (block * EDGE_LEVELS).long().clamp_(0, EDGE_LEVELS - 1)
        line = (row[mine] - part * group) * (high + 1)
        corners = [(line + v[mine]) * (wide + 1) + h[mine] for v in (bottom, top) for h in (right, left)]
        first = levels[_STEP - 1 :: _STEP] if len(levels) > _STEP else levels
        cells[mine] = coarse = _reached(bin_, first, corners, half[mine], bits)
        if len(levels) > _STEP:
            for k, at in enumerate([(coarse == k).nonzero()[:, 0] for k in range(len(first) + 1)]):
                if len(at):
                    within = [one.index_select(0, at) for one in (half[mine], *corners)]
                    finer = _reached(bin_, levels[k * _STEP : (k + 1) * _STEP - 1], within[1:], within[0], bits)
                    cells[start:stop].index_copy_(0, at, finer.add_(k * _STEP))
    return (row, y, x), cells


def _reached(bin_: Tensor, levels: Sequence[int], corners: Sequence[Tensor], half: Tensor, bits: int) -> Tensor:
    """How many of the levels at least ``half`` of a window reaches, of bins (n, H, W) and windows by four corners (m,).

    A level's count lies in its own ``bits`` of an int64, whose highest stays free, so that many levels are summed and
    compared at once. Sums may wrap: the difference of two is right as long as the window's own counts fit.
    """
    each = min(63 // bits, len(levels))
    ones = sum(1 << (bits * i) for i in range(each))
    said = torch.zeros(EDGE_LEVELS, -(-len(levels) // each), dtype=torch.int64)
    for i, level in enumerate(levels):
        said[level:, i // each] += 1 << (bits * (i % each))
    there = said.to(bin_.device).index_select(0, bin_.flatten()).view(*bin_.shape, -1)
    sums = F.pad(there, (0, 0, 1, 0, 1, 0)).cumsum_(1).cumsum_(2).flatten(0, 2)
    inside, less, fewer, both = (sums.index_select(0, index) for index in corners)
    # a count of at least half the window sets the free bit of its field
    inside.sub_(less).sub_(fewer).add_(both).add_((((1 << (bits - 1)) - half) * ones)[:, None])
    # a product with ones adds up the fields into the highest one
    hits = ((inside >> (bits - 1)) & ones) * ones >> (bits * (each - 1))
    return sum((hits & ((1 << bits) - 1)).unbind(1), torch.zeros_like(half))

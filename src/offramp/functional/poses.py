"""Poses as heatmaps, one a joint, and how right they are.

N samples, K joints, H W space. A point is (x, y), whole numbers being the centres of places, as in the code of HRNet's
authors for poses, whose conventions these are: place u of a map stands for pixel 4 u of the input, not for the middle
of its 4x4 pixels.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from offramp.errors import DataError, OfframpError

__all__ = ["Pckh", "Says", "carried", "check_says", "decode", "head_sizes", "heatmaps", "inverse", "mirrored_back",
           "pckh"]

Says = Literal["classes", "heatmaps"]
"""What the channels of dense logits are. No softmax is over heatmaps, and none of their channels is the answer."""


def heatmaps(points: Tensor, known: Tensor, size: tuple[int, int], *, sigma: float = 2.0) -> Tensor:
    """What a network should say: points (N, K, 2) in places of the map, known (N, K) bool -> float32 (N, K, H, W).

    A Gaussian of peak 1 on the place nearest to the joint, cut off at 3 sigma on both axes; all NaN where the joint is
    not known, or so far outside that nothing of its Gaussian is seen: such maps are not learnt from.

    >>> heatmaps(torch.tensor([[[1.2, 0.0]]]), torch.tensor([[True]]), (1, 4))[0, 0, 0, :2]
    tensor([0.8825, 1.0000])
    """
    if points.shape != (*known.shape, 2) or known.ndim != 2 or sigma <= 0:
        raise OfframpError(expected="points (N, K, 2), known (N, K) and sigma > 0", where="heatmaps()",
                           got=f"{tuple(points.shape)}, {tuple(known.shape)} and {sigma}")
    reach = int(3 * sigma)
    squares, near = [], []
    for axis, length in ((1, size[0]), (0, size[1])):
        off = torch.arange(length, device=points.device) - (points[..., axis] + 0.5).floor()[..., None]
        squares.append(off.square())
        near.append(off.abs() <= reach)
    square = squares[0][..., :, None] + squares[1][..., None, :]
    seen = near[0][..., :, None] & near[1][..., None, :]
    maps = torch.where(seen, (-square / (2 * sigma**2)).exp(), 0.0).float()
    taught = known & seen.flatten(2).any(2)
    return torch.where(taught[..., None, None], maps, torch.nan)


def decode(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Where heatmaps (N, K, H, W) see their joints: points (N, K, 2) in places of the map, and how high each is (N, K).

    The highest place, a quarter of a place towards the higher of its two neighbours on each axis that has both. The
    authors leave points one place from the left or upper border where they are, and say (0, 0) where no value is above
    zero; ours are refined there, and the highest place is said anyway.

    >>> decode(torch.tensor([[[[0.0, 1.0, 0.5, 0.0]]]]))[0].tolist()
    [[[1.25, 0.0]]]
    """
    if maps.ndim != 4 or not maps[0, 0].numel():
        raise OfframpError(expected="heatmaps (N, K, H, W)", got=f"shape {tuple(maps.shape)}", where="decode()")
    height, width = maps.shape[2:]
    flat = maps.flatten(2).float()
    values, at = flat.max(2)
    points = []
    for place, length, step in ((at % width, width, 1), (at // width, height, width)):
        inner = (place > 0) & (place < length - 1)
        after = flat.gather(2, torch.where(inner, at + step, at)[..., None])[..., 0]
        before = flat.gather(2, torch.where(inner, at - step, at)[..., None])[..., 0]
        points.append(place + 0.25 * (after - before).sign())
    return torch.stack(points, -1), values


def mirrored_back(maps: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Heatmaps (N, K, H, W) of mirrored pictures as those of the pictures themselves; to be averaged with these.

    Left and right joints are swapped (``pairs``), and maps move one place to the right, the first column staying: of
    four pixels the mirror image of the first is the last, so that mirrored maps come back 3/4 of a place too far left.
    """
    order = list(range(maps.shape[1]))
    for one, other in pairs:
        order[one], order[other] = other, one
    back = maps[:, order].flip(-1)
    return torch.cat([back[..., :1], back[..., :-1]], -1)


def carried(points: Tensor, affines: Tensor) -> Tensor:
    """Points (N, K, 2) through affine maps (N, 2, 3): ``A[:, :2] p + A[:, 2]``.

    >>> carried(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[2.0, 0.0, 5.0], [0.0, 2.0, 0.0]]])).tolist()
    [[[7.0, 4.0]]]
    """
    return points @ affines[:, :, :2].mT + affines[:, None, :, 2]


def inverse(affines: Tensor) -> Tensor:
    """The affine maps (N, 2, 3) that undo others."""
    turned = torch.linalg.inv(affines[:, :, :2])
    return torch.cat([turned, -turned @ affines[:, :, 2:]], 2)


def head_sizes(boxes: Tensor) -> Tensor:
    """MPII's: 0.6 times the diagonal of head boxes (N, 4), two opposite corners each -> (N,).

    >>> round(head_sizes(torch.tensor([[0.0, 0.0, 30.0, 40.0]])).item(), 4)
    30.0
    """
    diagonals: Tensor = torch.linalg.vector_norm(boxes[:, 2:] - boxes[:, :2], dim=1)
    return 0.6 * diagonals


@dataclass(frozen=True, eq=False)
class Pckh:
    """Shares of joints that were found."""

    mean: float
    """Of all joints that are counted, those left out excepted; NaN where there are none."""
    joints: Tensor
    """float64 (K,): of each joint; NaN where it is counted nowhere."""
    counts: Tensor
    """int64 (K,): how often each joint is counted."""


def pckh(points: Tensor, truth: Tensor, known: Tensor, sizes: Tensor, *, threshold: float = 0.5,
         left_out: Collection[int] = ()) -> Pckh:
    """Head-normalised share of correct keypoints: points and truth (N, K, 2), known (N, K) bool, sizes of heads (N,).

    A joint is found where it is no further off than ``threshold`` times the size of the head. As in the evaluation by
    HRNet's authors, joints that are not known count nowhere, and the mean is over joints, not over their kinds, without
    ``left_out``; MPII leaves out pelvis and thorax, 6 and 7.

    >>> said, true = torch.tensor([[[0.0, 5.0], [9.0, 0.0]]]), torch.zeros(1, 2, 2)
    >>> pckh(said, true, torch.tensor([[True, True]]), torch.tensor([10.0])).mean
    0.5
    """
    if points.shape != truth.shape or truth.shape != (*known.shape, 2) or sizes.shape != known.shape[:1]:
        raise OfframpError(expected="points and truth (N, K, 2), known (N, K) and sizes (N,)", where="pckh()",
                           got=", ".join(str(tuple(t.shape)) for t in (points, truth, known, sizes)))
    if not bool((sizes > 0).all()):
        raise OfframpError(expected="heads larger than 0", got=f"{sizes[~(sizes > 0)][0].item()}", where="pckh()",
                           todo="give each person's head size: head_sizes(boxes)")
    off = torch.linalg.vector_norm(points.double() - truth.double(), dim=2)
    found = known & (off <= threshold * sizes.double()[:, None])
    hits, counts = found.sum(0), known.sum(0)
    kept = [k for k in range(len(counts)) if k not in left_out]
    return Pckh(mean=(hits[kept].sum() / counts[kept].sum().double()).item(), joints=hits / counts.double(),
                counts=counts)


def check_says(data: Any, says: Says, where: str) -> None:
    """DataError where a split, behind loaders and subsets too, says that its labels are the other kind."""
    for _ in range(8):
        found = getattr(data, "says", says)
        if found != says:
            raise DataError(expected=f"data with {says}", got=f"data with {found}", where=where,
                            todo="heatmaps are learnt by recipes.anytime(says='heatmaps'), which learns nothing else "
                                 "then, and measured by split.pckh(points)")
        parts = getattr(data, "datasets", None)
        data = getattr(data, "dataset", parts[0] if isinstance(parts, list) and parts else None)

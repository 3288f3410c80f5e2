"""Where a label map changes its class. N samples, H W space; distances are Euclidean, between the middles of pixels."""

import math

import torch
from torch import Tensor

from offramp.errors import OfframpError

__all__ = ["boundary_labels"]


def boundary_labels(labels: Tensor, radius: float = 3, ignore: int = 255) -> Tensor:
    """Which pixels lie near a semantic border: labels (N, H, W) -> uint8 (N, H, W) of 1, 0 and ``ignore``.

    A pixel is boundary (1) where the nearest pixel of another class is at most ``radius`` pixels away: both sides of a
    border are marked, each ``radius`` pixels deep, and radius 1 marks what touches another class by an edge. Pixels to
    ignore make no border, whatever lies beside them, and stay ``ignore``.

    SlimSeg (doi:10.1145/3503161.3548191, section 3.3 and B.1) marks what is within 3 pixels of the border, and compares
    1, 3 and 5; whether it counts from the border or from the pixel beyond it is not said. Labels lie in
    [-32767, 32767].

    >>> boundary_labels(torch.tensor([[[0, 0, 0, 1, 1, 255]]]), radius=2)
    tensor([[[  0,   1,   1,   1,   1, 255]]], dtype=torch.uint8)
    """
    _check(labels, "boundary_labels()")
    if not (radius >= 1 and 0 <= ignore <= 255):
        raise OfframpError(expected="radius >= 1 and ignore in [0, 255]", got=f"{radius} and {ignore}",
                           where="boundary_labels()")
    void = labels == ignore
    own = labels.to(torch.int16)
    # Largest and smallest label in the disc: another class is there if either is not the pixel's own.
    both = torch.stack([own, -own]).masked_fill_(void, -(2**15))
    square = math.floor(radius * radius)
    reach = math.isqrt(square)
    rows = [both]  # largest label at most k columns away
    for k in range(1, reach + 1):
        wide = rows[-1].clone()
        _raise_to(wide[..., k:], both[..., :-k])
        _raise_to(wide[..., :-k], both[..., k:])
        rows.append(wide)
    disc = rows[reach].clone()
    for k in range(1, reach + 1):
        row = rows[math.isqrt(square - k * k)]
        _raise_to(disc[..., k:, :], row[..., :-k, :])
        _raise_to(disc[..., :-k, :], row[..., k:, :])
    found = (disc != torch.stack([own, -own])).any(0).to(torch.uint8)
    return found.masked_fill_(void, ignore)


def _raise_to(tensor: Tensor, other: Tensor) -> None:
    torch.maximum(tensor, other, out=tensor)


def _check(labels: Tensor, where: str) -> None:
    if labels.ndim != 3 or labels.is_floating_point():
        raise OfframpError(expected="integer labels (N, H, W)", got=f"{labels.dtype} {tuple(labels.shape)}",
                           where=where)

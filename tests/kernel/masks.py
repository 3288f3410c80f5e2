"""Masks at which loops and borders go wrong."""

import torch
from torch import Tensor

MASKS = ["empty", "full", "one", "borders", "all but one", "random", "blob"]


def mask_of(kind: str, height: int, width: int, density: float, draw: torch.Generator) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    spot = tuple(int(torch.randint(size, (1,), generator=draw)) for size in (height, width))
    if kind in ("full", "all but one"):
        mask[:] = True
    if kind in ("one", "all but one"):
        mask[spot] = kind == "one"
    if kind == "borders":
        mask[[0, -1]], mask[:, [0, -1]] = True, True
    if kind == "blob":  # far from it, windows see nothing active
        mask[spot[0]:spot[0] + 1 + round(height * density), spot[1]:spot[1] + 1 + round(width * density)] = True
    return torch.rand(height, width, generator=draw) < density if kind == "random" else mask

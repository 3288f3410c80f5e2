"""Recipes are functions that return a ``Recipe``; new ones call old ones (``dataclasses.replace``)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.train.recipe import Augment, Recipe

__all__ = ["flip", "flip_shift", "joint", "label_free"]


def label_free(
    *, epochs: int = 30, temperature: float = 1.0, lr: float = 2e-3, views: int = 1, augment: Augment | None = None,
    batch_size: int = 128, weights: Sequence[float] | None = None, weight_decay: float = 0.01, ema: float | None = None,
    seed: int = 0,
) -> Recipe:
    """Heads learn what the frozen network itself says; no label is ever read (label-free paper, section 3.2).

    It trains one exit after another; since the trunk is frozen and heads share nothing, we train all in one pass, which
    gives the same gradients. Views and the temperature are ours: the paper trains on plain images at T = 1.
    """
    return Recipe(
        loss="teacher", epochs=epochs, temperature=temperature, lr=lr, views=views, augment=augment,
        batch_size=batch_size, weights=None if weights is None else tuple(weights), weight_decay=weight_decay, ema=ema,
        seed=seed,
    )


def joint(
    *, weights: Sequence[float] | None = None, epochs: int = 30, lr: float = 0.01, batch_size: int = 128,
    weight_decay: float = 5e-4, schedule: str = "poly", clip: float | None = None, augment: Augment | None = None,
    seed: int = 0,
) -> Recipe:
    """The network and its exits learn from labels: a weighted sum of the exits' cross-entropies, the final included.

    BranchyNet (arXiv:1709.01686), MSDNet (arXiv:1703.09844) and ADP-C train so; equal weights unless given.
    """
    return Recipe(
        loss="labels", freeze=False, epochs=epochs, lr=lr, batch_size=batch_size, optimiser="sgd",
        weight_decay=weight_decay, schedule=schedule, clip=clip, augment=augment,  # type: ignore[arg-type]
        weights=None if weights is None else tuple(weights), seed=seed,
    )


def flip(images: Tensor) -> Tensor:
    """Mirror half of a batch (N, C, H, W) from left to right."""
    return torch.where((torch.rand(len(images)) < 0.5).to(images.device)[:, None, None, None], images.flip(-1), images)


def flip_shift(images: Tensor) -> Tensor:
    """Mirror half of a batch and shift each image by up to an eighth of its size, over a border of zeros."""
    height, width = images.shape[-2:]
    up, left = max(1, height // 8), max(1, width // 8)
    padded = F.pad(flip(images), (left, left, up, up))
    rows = torch.randint(0, 2 * up + 1, (len(images), 1)) + torch.arange(height)
    columns = torch.randint(0, 2 * left + 1, (len(images), 1)) + torch.arange(width)
    rows, columns = rows.to(images.device), columns.to(images.device)
    each = torch.arange(len(images), device=images.device)
    shifted = padded.permute(0, 2, 3, 1)[each[:, None, None], rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2).contiguous()

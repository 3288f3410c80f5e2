"""Chance applied to batches: images alone, or images and the labels of their pixels together.

All draws come from torch's global generator, which ``fit`` seeds for each step: a resumed run draws the same.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from offramp.errors import DataError, OfframpError
from offramp.train.batches import Batch
from offramp.train.recipe import Recipe

__all__ = ["ScaleCropFlip", "augmented", "changed", "scale_crop_flip"]


@dataclass(frozen=True, kw_only=True)
class ScaleCropFlip:
    """Images (N, C, H, W) and labels (N, H, W) -> a window of each, from its own rescaled and maybe mirrored copy.

    MESS (A.2), as in torchvision's references: labels by the nearest pixel, what lies beyond the image is ``ignore``.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    crop: float | tuple[int, int] = 0.9
    """Size of the window: a share of the image's, or (H, W) in pixels (multiples of the network's stride, best)."""
    flip: float = 0.5
    """How often an image is mirrored from left to right."""
    fill: float = 0.0
    """Of images, beyond their border: their mean, once they are normalised."""
    ignore: int = 255

    def __post_init__(self) -> None:
        size = (self.crop, self.crop) if isinstance(self.crop, int | float) else self.crop
        if not (0 < self.scale[0] <= self.scale[1] and min(size) > 0 and 0 <= self.flip <= 1):
            raise OfframpError(expected="0 < scale[0] <= scale[1], crop > 0, flip in [0, 1]", got=repr(self),
                               where="scale_crop_flip()")

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        from torchvision.transforms.v2 import InterpolationMode  # here: its import takes a second
        from torchvision.transforms.v2 import functional as V

        if images.ndim != 4 or labels.shape != images.shape[:1] + images.shape[2:]:
            raise DataError(
                expected="images (N, C, H, W) and labels (N, H, W)", where="scale_crop_flip()",
                got=f"{tuple(images.shape)} and {tuple(labels.shape)}",
            )
        size = images.shape[2:]
        high, wide = [round(s * self.crop) for s in size] if isinstance(self.crop, float) else self.crop
        pictures = images.new_full((*images.shape[:2], high, wide), self.fill)
        maps = labels.new_full((len(labels), high, wide), self.ignore)
        for n, (by, down, across, mirror) in enumerate(torch.rand(len(images), 4).tolist()):
            by = self.scale[0] + by * (self.scale[1] - self.scale[0])
            # The window's part of the image is cut out first: only what remains is rescaled.
            top, height, y, rows = _along(size[0], high, by, down)
            left, width, x, columns = _along(size[1], wide, by, across)
            box = (top, left, height, width, [rows, columns])
            picture = V.resized_crop(images[n], *box, InterpolationMode.BILINEAR, antialias=True)
            label = V.resized_crop(labels[n, None], *box, InterpolationMode.NEAREST_EXACT)
            if mirror < self.flip:
                picture, label = picture.flip(-1), label.flip(-1)
            pictures[n, :, y : y + rows, x : x + columns] = picture
            maps[n, y : y + rows, x : x + columns] = label[0]
        return pictures, maps


def scale_crop_flip(
    *, scale: tuple[float, float] = (0.5, 2.0), crop: float | tuple[int, int] = 0.9, flip: float = 0.5,
    fill: float = 0.0, ignore: int = 255,
) -> ScaleCropFlip:
    """MESS's augmentation, for ``Recipe.augment_pair``: see :class:`ScaleCropFlip`."""
    return ScaleCropFlip(scale=scale, crop=crop, flip=flip, fill=fill, ignore=ignore)


def _along(size: int, window: int, by: float, where: float) -> tuple[int, int, int, int]:
    """On one axis: first pixel and number of the image's pixels, and where in the window and how many they become."""
    if (full := max(1, round(size * by))) <= window:
        return 0, size, int(where * (window - full + 1)), full
    part = max(1, min(size, round(window / by)))
    return int(where * (size - part + 1)), part, 0, window


def augmented(batch: Batch, recipe: Recipe) -> Batch:
    """A live batch, changed; views of a live pass come as they are as often as they would be drawn from a cache."""
    if not recipe.augmented or (recipe.augment and recipe.views > 1 and float(torch.rand(())) * recipe.views < 1):
        return batch
    return changed(batch, recipe)


def changed(batch: Batch, recipe: Recipe) -> Batch:
    """The recipe's augmentation of a batch, with its labels where they move along."""
    if recipe.augment is not None:
        return replace(batch, args=tuple(recipe.augment(a) for a in batch.args))
    if recipe.augment_pair is None:
        return batch
    if len(batch.args) != 1 or batch.labels is None:
        raise DataError(expected="batches (inputs, labels) with one tensor of inputs", where="Recipe.augment_pair",
                        got=f"{len(batch.args)} inputs by place, {sorted(batch.kwargs)} by name",
                        todo="augment in the dataset, or give such batches")
    inputs, labels = recipe.augment_pair(batch.args[0], batch.labels)
    return replace(batch, args=(inputs,), labels=labels)

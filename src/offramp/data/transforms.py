"""Augmentations for training, as torchvision v2 transforms over an image, or over an image and its labels."""

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from offramp.data.base import IGNORE

__all__ = ["flip_crop", "jitter"]


def flip_crop(size: tuple[int, int], padding: int = 4, *, flip: bool = True) -> v2.Transform:
    """A crop of ``size`` (H, W) from the image padded on every side, then a flip half of the time.

    The padding is black in images and void in label pictures.

    >>> flip_crop((32, 32))(tv_tensors.Image(torch.zeros(3, 32, 32, dtype=torch.uint8))).shape
    torch.Size([3, 32, 32])
    """
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE, torch.Tensor: 0}
    steps: list[v2.Transform] = [v2.RandomCrop(list(size), padding=padding or None, pad_if_needed=True, fill=fill)]
    return v2.Compose([*steps, v2.RandomHorizontalFlip()] if flip else steps)


def jitter(strength: float = 0.3) -> v2.Transform:
    """Brightness, contrast and saturation by up to ``strength``; goes into a ``v2.Compose`` beside others."""
    return v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength)

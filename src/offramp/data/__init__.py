"""Readers of public on-disk layouts, and the built-in street scenes."""

from offramp.data.base import IGNORE, IMAGENET_MEAN, IMAGENET_STD, Joined, Prepare, Source, Split
from offramp.data.cifar10 import CIFAR10_CLASSES, Cifar10Split, cifar10
from offramp.data.scenes import SCENE_CLASSES, SCENE_KINDS, Scenes, scenes, scenes_splits

__all__ = [
    "CIFAR10_CLASSES", "IGNORE", "IMAGENET_MEAN", "IMAGENET_STD", "SCENE_CLASSES", "SCENE_KINDS", "Cifar10Split", "Joined",
    "Prepare", "Scenes", "Source", "Split", "cifar10", "scenes", "scenes_splits",
]

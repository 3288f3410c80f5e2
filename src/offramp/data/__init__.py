"""Readers of public on-disk layouts, and the built-in street scenes and stick figures.

A stranger's data comes in as ``package.module:callable`` (see ``load_data``) or as a ``Source`` of ``Split``s.
"""

from offramp.data.base import IGNORE, IMAGENET_MEAN, IMAGENET_STD, Joined, Palette, Prepare, Source, Split
from offramp.data.camvid import CAMVID_CLASSES, CAMVID_PALETTE, camvid
from offramp.data.cifar10 import CIFAR10_CLASSES, Cifar10Split, cifar10
from offramp.data.cityscapes import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, CITYSCAPES_TRAIN_ID, cityscapes
from offramp.data.coco import COCO_CATEGORIES, coco
from offramp.data.figures import Figures, figures
from offramp.data.files import FileSplit
from offramp.data.imagefolder import imagefolder
from offramp.data.mpii import mpii
from offramp.data.poses import JOINT_PAIRS, JOINTS, Poses, pose_change
from offramp.data.resolve import load_data
from offramp.data.scenes import SCENE_CLASSES, SCENE_KINDS, Scenes, scenes, scenes_splits
from offramp.data.transforms import flip_crop, jitter
from offramp.data.voc import VOC_CLASSES, VOC_PALETTE, voc

__all__ = [
    "CAMVID_CLASSES", "CAMVID_PALETTE", "CIFAR10_CLASSES", "CITYSCAPES_CLASSES", "CITYSCAPES_PALETTE",
    "CITYSCAPES_TRAIN_ID", "COCO_CATEGORIES", "Cifar10Split", "Figures", "FileSplit", "IGNORE", "IMAGENET_MEAN",
    "IMAGENET_STD", "JOINTS", "JOINT_PAIRS", "Joined", "Palette", "Poses", "Prepare", "SCENE_CLASSES", "SCENE_KINDS",
    "Scenes", "Source", "Split", "VOC_CLASSES", "VOC_PALETTE", "camvid", "cifar10", "cityscapes", "coco", "figures",
    "flip_crop", "imagefolder", "jitter", "load_data", "mpii", "pose_change", "scenes", "scenes_splits", "voc",
]

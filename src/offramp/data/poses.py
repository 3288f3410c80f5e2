"""Splits of people in pictures: a crop around each, and a heatmap for each of MPII's sixteen joints.

Axes: N people, K joints, H W space. Points are (x, y), whole numbers being the centres of pixels. Crops and heatmaps
follow the code of HRNet's authors for poses.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from offramp.data.base import Prepare, Split
from offramp.errors import DataError
from offramp.functional.poses import Pckh, Says, carried, heatmaps, inverse, pckh

__all__ = ["JOINTS", "JOINT_PAIRS", "STRIDE", "Person", "PoseChange", "Poses", "Truth", "crop_of", "pose_change"]

JOINTS = (
    "right ankle", "right knee", "right hip", "left hip", "left knee", "left ankle", "pelvis", "thorax", "upper neck",
    "head top", "right wrist", "right elbow", "right shoulder", "left shoulder", "left elbow", "left wrist",
)
"""MPII's, in its order; right and left are the person's own."""
JOINT_PAIRS = ((0, 5), (1, 4), (2, 3), (10, 15), (11, 14), (12, 13))
"""Which are each other's mirror image."""
LEFT_OUT = (6, 7)
"""Pelvis and thorax, which MPII's mean leaves out."""
STRIDE = 4
"""Pixels of a crop per place of its heatmaps."""


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Person:
    """One person of a picture."""

    joints: NDArray[np.float64]
    """(K, 2), in pixels of the picture."""
    known: NDArray[np.bool_]
    """(K,): which joints have a place."""
    centre: tuple[float, float]
    side: float
    """Of the square around ``centre`` that the crop shows, in pixels of the picture."""


@final
@dataclass(frozen=True, eq=False)
class Truth:
    """What poses are measured against: points of the picture (N, K, 2), which are counted (N, K), heads' sizes (N,)."""

    joints: Tensor
    counted: Tensor
    heads: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class PoseChange:
    """What chance does to a crop while training: see :func:`pose_change`."""

    scale: float
    rotation: float
    flip: float
    rotated: float

    def __post_init__(self) -> None:
        if not (0 <= self.scale < 1 and self.rotation >= 0 and 0 <= self.flip <= 1 and 0 <= self.rotated <= 1):
            raise DataError(expected="scale in [0, 1), rotation >= 0, flip and rotated in [0, 1]", got=repr(self),
                            where="pose_change()")

    def draw(self) -> tuple[float, float, bool]:
        """By how much the square grows, by how many degrees the crop turns, whether it is mirrored."""
        size, turn = torch.randn(2).tolist()
        often, mirror = torch.rand(2).tolist()
        grow = min(max(1 + size * self.scale, 1 - self.scale), 1 + self.scale)
        degrees = min(max(turn, -2.0), 2.0) * self.rotation if often < self.rotated else 0.0
        return grow, degrees, mirror < self.flip


def pose_change(*, scale: float = 0.25, rotation: float = 30.0, flip: float = 0.5, rotated: float = 0.6) -> PoseChange:
    """Chance for ``source.split("train", augment=pose_change())``: picture and heatmaps move together.

    The square around a person grows or shrinks by a normal factor of deviation ``scale``, cut off at one deviation;
    with probability ``rotated`` the crop turns by a normal angle of deviation ``rotation`` degrees, cut off at two;
    with ``flip`` it is mirrored, left and right joints swapped. The values are those of HRNet's authors for MPII. The
    crop is drawn from the picture once, so that nothing is resampled twice and what lies around comes in.
    """
    return PoseChange(scale=scale, rotation=rotation, flip=flip, rotated=rotated)


def crop_of(centre: tuple[float, float], side: float, size: tuple[int, int], *, degrees: float = 0.0,
            mirror: bool = False) -> NDArray[np.float64]:
    """The affine map (2, 3) from a picture to a crop of ``size`` (H, W), onto whose middle the square's centre falls.

    The middle is (W / 2, H / 2), as the authors have it. ``degrees`` turns the picture anticlockwise as it is seen.

    >>> (crop_of((10, 20), 8, (4, 4)) @ [14, 20, 1]).tolist()
    [4.0, 2.0]
    """
    height, width = size
    by, angle = min(height, width) / side, math.radians(degrees)
    turn = by * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    if mirror:
        turn[:, 0] *= -1
    shift = np.array([width / 2, height / 2]) - turn @ np.array(centre)
    return np.concatenate([turn, shift[:, None]], 1)


class Poses(Split):
    """One named split of people; gives (crop, heatmaps), or the crop alone where it has no labels.

    Crops are float32 (3, H, W); heatmaps float32 (16, H / 4, W / 4), NaN where a joint is not learnt from. ``augment``
    is a :func:`pose_change` or nothing; its draws come from torch's global generator, which ``fit`` seeds.
    """

    says: Says = "heatmaps"

    def __init__(self, people: Sequence[Person], names: Sequence[str], *, source: str, split: str, labels: bool,
                 prepare: Prepare, sigma: float, truth: Truth | None = None) -> None:
        self.source, self.split, self.task, self.class_names = source, split, "dense", JOINTS
        self.people, self.names, self.labels, self.sigma = tuple(people), tuple(names), labels, sigma
        self.truth = truth
        self.size = prepare.size or (256, 256)
        self._where = f"{source}/{split}"
        change = prepare.augment
        self.prepare = replace(prepare, size=self.size, augment=None)
        if min(self.size) < STRIDE or any(side % STRIDE for side in self.size) or sigma <= 0:
            raise DataError(expected=f"sides that are multiples of {STRIDE}, and sigma above 0", where=self._where,
                            got=f"size={self.size[0]}x{self.size[1]}, sigma={sigma}", todo="give ?size=256x256&sigma=2")
        if not isinstance(change, PoseChange | None):
            raise DataError(expected="augment=pose_change(...)", got=type(change).__name__, where=self._where,
                            todo="other changes would leave the joints where they were")
        self.change = change

    @abstractmethod
    def picture(self, index: int) -> Image.Image:
        """The whole picture in RGB that a person is in."""

    @property
    def identity(self) -> Iterable[object]:
        return [(name, p.centre, p.side) for name, p in zip(self.names, self.people, strict=True)]

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        person = self.people[index]
        grow, degrees, mirror = self.change.draw() if self.change is not None else (1.0, 0.0, False)
        affine = crop_of(person.centre, person.side * grow, self.size, degrees=degrees, mirror=mirror)
        image = torch.from_numpy(_cut(self.picture(index), affine, self.size)).permute(2, 0, 1)
        if not self.labels:
            return image, None
        joints, known = person.joints @ affine[:, :2].T + affine[:, 2], person.known
        if mirror:
            order = list(range(len(JOINTS)))
            for one, other in JOINT_PAIRS:
                order[one], order[other] = other, one
            joints, known = joints[order], known[order]
        places = torch.from_numpy(joints / STRIDE)[None], torch.from_numpy(known)[None]
        maps = heatmaps(*places, (self.size[0] // STRIDE, self.size[1] // STRIDE), sigma=self.sigma)
        return image, maps[0]

    def in_picture(self, points: Tensor) -> Tensor:
        """Points (N, K, 2) of every person's heatmaps, as ``functional.poses.decode`` says them, in whole pictures."""
        if points.shape[:1] != (len(self),) or points.ndim != 3:
            raise DataError(expected=f"points ({len(self)}, K, 2) of all people, in order", where=self._where,
                            got=str(tuple(points.shape)), todo="decode the heatmaps of the whole split, not shuffled")
        crops = torch.from_numpy(np.stack([crop_of(p.centre, p.side, self.size) for p in self.people]))
        return carried(points.double().cpu() * STRIDE, inverse(crops))

    def pckh(self, points: Tensor, *, threshold: float = 0.5) -> Pckh:
        """PCKh of points (N, 16, 2) of every person's heatmaps; its mean leaves out pelvis and thorax, as MPII's."""
        if self.truth is None:
            raise DataError(expected="head boxes, which PCKh is measured by", got="none", where=self._where,
                            todo="see offramp.data.mpii for where they are looked for")
        truth = self.truth
        return pckh(self.in_picture(points), truth.joints, truth.counted, truth.heads, threshold=threshold,
                    left_out=LEFT_OUT)


def _cut(picture: Image.Image, affine: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The crop (H, W, 3), bilinear, black beyond the picture. Pillow counts from the corner of the first pixel."""
    back = np.linalg.inv(affine[:, :2])
    shift = 0.5 - back @ (affine[:, 2] + 0.5)
    rows = np.concatenate([back, shift[:, None]], 1)
    made = picture.transform((size[1], size[0]), Image.Transform.AFFINE, tuple(rows.ravel().tolist()),
                             Image.Resampling.BILINEAR)
    return np.array(made)

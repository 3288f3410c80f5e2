"""The built-in people: stick figures with MPII's sixteen joints, drawn by program, the same bytes on every machine."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import final

import numpy as np
import torch
from PIL import Image

from offramp.data._canvas import Dice
from offramp.data._figure import UNIT, Body, body, paint
from offramp.data.base import Prepare, Source, Split
from offramp.data.poses import JOINTS, Person, Poses, Truth
from offramp.data.scenes import STREAMS
from offramp.errors import DataError
from offramp.functional.poses import head_sizes

__all__ = ["Figures", "figures"]

VERSION = 1
"""Of the drawing: changes whenever the same seed gives other bytes."""
CACHE_BYTES = 256 * 2**20


@final
class Figures(Poses):
    """``n`` figures, drawn when asked for and kept in memory while they fit 256 MiB.

    Figure i depends on ``seed``, ``stream`` and i alone; splits differ in their stream, so they share none. The crop
    is the whole picture, pixel for pixel, unless it is changed by chance. A joint has a place where it is within the
    picture, hidden or not, as MPII's have.
    """

    def __init__(self, n: int, *, seed: int, difficulty: tuple[float, float], split: str, labels: bool,
                 prepare: Prepare, sigma: float) -> None:
        size = prepare.size or (96, 96)
        self.seed, self.stream = seed, STREAMS[split]
        low, high = round(difficulty[0] * 1000), round(difficulty[1] * 1000)
        self.span = (low, high)
        self.bodies = [body(Dice(seed, 2 * self.stream, i), size, low, high) for i in range(n)]
        people = [_person(one, size) for one in self.bodies]
        boxes = torch.tensor([[one.head[0] - one.radius, one.head[1] - one.radius, one.head[0] + one.radius,
                               one.head[1] + one.radius] for one in self.bodies], dtype=torch.float64) / UNIT
        truth = Truth(torch.from_numpy(np.stack([p.joints for p in people])),
                      torch.from_numpy(np.stack([p.known for p in people])), head_sizes(boxes))
        super().__init__(people, [f"figures:{seed}/{split}/{i}" for i in range(n)], source="figures", split=split,
                         labels=labels, prepare=replace(prepare, size=size), sigma=sigma, truth=truth)
        self._kept: dict[int, Image.Image] = {}
        self._keep = n * size[0] * size[1] * 3 <= CACHE_BYTES

    @property
    def identity(self) -> Iterable[object]:
        return [VERSION, len(self), self.size, self.seed, self.stream, *self.span]

    def picture(self, index: int) -> Image.Image:
        kept = self._kept.get(index)
        if kept is None:
            dice = Dice(self.seed, 2 * self.stream + 1, index)
            kept = Image.fromarray(paint(dice, self.bodies[index], self.size))
            if self._keep:
                self._kept[index] = kept
        return kept

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": {}}  # workers draw for themselves; copying the cache to them costs more


def _person(one: Body, size: tuple[int, int]) -> Person:
    joints = np.array(one.joints, np.float64) / UNIT
    inside = (joints >= 0) & (joints <= np.array([size[1] - 1, size[0] - 1]))
    return Person(joints=joints, known=inside[:, 0] & inside[:, 1], centre=(size[1] / 2, size[0] / 2),
                  side=float(min(size)))


def figures(n: int = 800, *, seed: int = 0, difficulty: tuple[float, float] = (0.0, 1.0), sigma: float = 1.5,
            prepare: Prepare | None = None) -> Source:
    """The source: ``train`` and ``unlabelled`` hold n figures each, ``calibration`` and ``test`` half of n each.

    ``prepare.size`` is 96x96 unless given. ``difficulty`` (low, high) within 0 .. 1 is the range each figure draws its
    own from, evenly: bent limbs, clutter, haze, noise, and how many are seen from behind, grow with it. ``sigma`` is
    that of the heatmaps' Gaussians, in their places.

    >>> image, maps = figures(4)["train"][0]
    >>> image.shape, maps.shape
    (torch.Size([3, 96, 96]), torch.Size([16, 24, 24]))
    """
    faults = {f"n={n} (at least 1)": n < 1, f"seed={seed} (0 or more)": seed < 0,
              f"difficulty={difficulty} (low <= high, within 0 .. 1)": not 0 <= difficulty[0] <= difficulty[1] <= 1}
    if any(faults.values()):
        raise DataError(expected="settings that figures can be drawn with", where="figures",
                        got="; ".join(text for text, wrong in faults.items() if wrong),
                        todo="give, for instance, figures?size=96x96&n=400")
    sizes = {"train": n, "unlabelled": n, "calibration": max(n // 2, 1), "test": max(n // 2, 1)}
    prepare = prepare or Prepare()

    def make(split: str, labels: bool, prepared: Prepare) -> Split:
        return Figures(sizes[split], seed=seed, difficulty=difficulty, split=split, prepare=prepared, sigma=sigma,
                       labels=labels and split != "unlabelled")

    return Source(name="figures", task="dense", class_names=JOINTS,
                  prepare=prepare if prepare.size else replace(prepare, size=(96, 96)),
                  make={split: partial(make, split) for split in sizes})

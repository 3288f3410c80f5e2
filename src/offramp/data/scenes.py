"""The built-in data: labelled street scenes drawn by program, from easy to hard, the same bytes on every machine."""

from collections.abc import Iterable
from functools import partial
from typing import final

import numpy as np
import torch
from torch import Tensor

from offramp.data._street import CLASSES, KINDS, Scene, draw
from offramp.data.base import Augment, Prepare, Source, Split
from offramp.data.camvid import CAMVID_PALETTE
from offramp.errors import DataError
from offramp.types import Task

__all__ = ["SCENE_CLASSES", "SCENE_KINDS", "Scenes", "scenes", "scenes_splits"]

SCENE_CLASSES = CLASSES
"""Of every pixel: eleven classes in CamVid's order; 255 (the bonnet of one's own car) is void."""
SCENE_KINDS = KINDS
"""Of the whole picture: what stands nearest, in the middle of the road or, for tree, sign and lamp, at its kerb;
``empty`` when nothing does. Everything else is at least about twice as far away, but for a thin pole that in harder
scenes may stand in front."""
STREAMS = {"train": 0, "unlabelled": 1, "calibration": 2, "test": 3}
VERSION = 1
"""Of the drawing: changes whenever the same seed gives other bytes."""
CACHE_BYTES = 256 * 2**20


@final
class Scenes(Split):
    """``n`` street scenes of ``size`` (H, W), drawn when asked for and kept in memory while they fit 256 MiB.

    Scene i depends on ``seed``, ``stream`` and i alone; splits differ in their stream, so they share no scene.
    ``difficulty`` (low, high) within 0 .. 1 is the range each scene draws its own difficulty from, evenly: clutter,
    occlusion, haze, contrast, shadows, blur and noise grow with it. ``task`` is "dense" (labels (H, W), see
    SCENE_CLASSES) or "classify" (one label, see SCENE_KINDS) on the very same pictures.

    >>> image, label = Scenes(4, size=(48, 64))[0]
    >>> image.shape, label.shape
    (torch.Size([3, 48, 64]), torch.Size([48, 64]))
    """

    def __init__(
        self, n: int, size: tuple[int, int] = (96, 128), *, seed: int = 0, difficulty: tuple[float, float] = (0.0, 1.0),
        task: Task = "dense", labels: bool = True, split: str = "train", augment: Augment | None = None,
        prepare: Prepare | None = None,
    ) -> None:
        _check(n, size, seed, difficulty, task, split)
        self.source, self.split, self.task = "scenes", split, task
        self.class_names = SCENE_CLASSES if task == "dense" else SCENE_KINDS
        self.palette = CAMVID_PALETTE if task == "dense" else ()  # the classes stand in CamVid's order
        self.labels, self.size, self.seed = labels, (int(size[0]), int(size[1])), int(seed)
        self.low, self.high = round(difficulty[0] * 1000), round(difficulty[1] * 1000)
        self.prepare = prepare or Prepare(augment=augment)
        self.stream = STREAMS[split]
        self.names = [f"scenes:{self.seed}/{split}/{i}" for i in range(n)]
        self._kept: dict[int, Scene] = {}
        self._keep = n * self.size[0] * self.size[1] * 4 <= CACHE_BYTES

    @property
    def identity(self) -> Iterable[object]:
        return [VERSION, len(self), self.size, self.seed, self.stream, self.low, self.high]

    def scene(self, index: int) -> Scene:
        """The drawing itself: uint8 picture and labels, kind, and difficulty per mille."""
        kept = self._kept.get(index)
        if kept is None:
            kept = draw(self.seed, self.stream, index, self.size, self.low, self.high)
            if self._keep:
                self._kept[index] = kept
        return kept

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        scene = self.scene(index)
        image = torch.from_numpy(scene.rgb).permute(2, 0, 1)
        if not self.labels:
            return image, None
        return image, torch.from_numpy(scene.label) if self.task == "dense" else torch.tensor(scene.kind)

    def difficulties(self) -> Tensor:
        """float32 (N,), 0 .. 1: how hard each scene was asked to be."""
        return torch.from_numpy(np.array([self.scene(i).difficulty for i in range(len(self))], dtype=np.float32) / 1000)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": {}}  # workers draw for themselves; copying the cache to them costs more


def _check(n: int, size: tuple[int, int], seed: int, difficulty: tuple[float, float], task: str, split: str) -> None:
    faults = []
    if n < 1:
        faults.append(f"n={n} (at least 1)")
    if len(size) != 2 or min(size) < 16:
        faults.append(f"size={size} (height and width, at least 16 each)")
    if seed < 0:
        faults.append(f"seed={seed} (0 or more)")
    if not 0 <= difficulty[0] <= difficulty[1] <= 1:
        faults.append(f"difficulty={difficulty} (low <= high, within 0 .. 1)")
    if task not in ("dense", "classify"):
        faults.append(f"task={task!r} (dense or classify)")
    if split not in STREAMS:
        faults.append(f"split={split!r} ({', '.join(STREAMS)})")
    if faults:
        raise DataError(expected="settings that scenes can be drawn with", got="; ".join(faults), where="scenes",
                        todo="give, for instance, scenes?size=96x128&n=400&task=classify")


def scenes(
    n: int = 800, *, size: tuple[int, int] = (96, 128), seed: int = 0, difficulty: tuple[float, float] = (0.0, 1.0),
    task: Task = "dense", prepare: Prepare | None = None,
) -> Source:
    """The source: ``train`` and ``unlabelled`` hold n scenes each, ``calibration`` and ``test`` half of n each."""
    sizes = {"train": n, "unlabelled": n, "calibration": max(n // 2, 1), "test": max(n // 2, 1)}

    def make(split: str, labels: bool, prepared: Prepare) -> Split:
        return Scenes(sizes[split], size, seed=seed, difficulty=difficulty, task=task, split=split, prepare=prepared,
                      labels=labels and split != "unlabelled")

    _check(n, size, seed, difficulty, task, "train")
    return Source(name="scenes", task=task, class_names=SCENE_CLASSES if task == "dense" else SCENE_KINDS,
                  prepare=prepare or Prepare(), make={split: partial(make, split) for split in sizes},
                  palette=CAMVID_PALETTE if task == "dense" else ())


def scenes_splits(
    n: int = 800, *, size: tuple[int, int] = (96, 128), seed: int = 0, difficulty: tuple[float, float] = (0.0, 1.0),
    task: Task = "dense", augment: Augment | None = None,
) -> dict[str, Split]:
    """All four splits at once: train, unlabelled, calibration and test; ``augment`` touches the first two alone."""
    source = scenes(n, size=size, seed=seed, difficulty=difficulty, task=task)
    fitted = ("train", "unlabelled")
    return {name: source.split(name, augment=augment if name in fitted else None) for name in source.splits}

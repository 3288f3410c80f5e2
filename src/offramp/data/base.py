"""What every data source gives: named, disjoint, deterministic splits of (image, label) or image alone.

Axes: C channels, H W space. Images leave as float32 (C, H, W), normalised; labels as int64, () or (H, W), void = 255.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from offramp._specs import near
from offramp.errors import DataError
from offramp.functional.poses import Says
from offramp.types import Task

__all__ = [
    "IGNORE", "IMAGENET_MEAN", "IMAGENET_STD", "Faults", "Joined", "Palette", "Prepare", "Source", "Split",
    "fingerprint",
]

IGNORE = 255
"""Label of pixels that count nowhere: neither trained on nor measured."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SPLITS = ("train", "unlabelled", "calibration", "test")
Palette = tuple[tuple[int, int, int], ...]
"""(R, G, B) of each class, as the makers of a set paint it; empty where nobody chose any. Void is black."""

Augment = Callable[..., Any]
"""Takes a ``tv_tensors.Image`` (and a ``tv_tensors.Mask`` in dense tasks) and gives the same back; any v2 transform."""


def fingerprint(parts: Iterable[object]) -> str:
    """Sixteen hex digits that name a list of things in order.

    >>> fingerprint(["a.png", 12]) == fingerprint(["a.png", 12]) != fingerprint(["a.png", 13])
    True
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() + b"\0")
    return digest.hexdigest()[:16]


@final
class Faults:
    """Collects what is wrong with many files and raises once, naming the first ten."""

    def __init__(self, where: str, expected: str, todo: str) -> None:
        self.where, self.expected, self.todo = where, expected, todo
        self.found: list[str] = []
        self.count = 0

    def add(self, name: object, why: str) -> None:
        self.count += 1
        if len(self.found) < 10:
            self.found.append(f"{name} ({why})")

    def raise_if_any(self) -> None:
        if self.count:
            more = f" and {self.count - len(self.found)} more" if self.count > len(self.found) else ""
            raise DataError(expected=self.expected, got="; ".join(self.found) + more, where=self.where, todo=self.todo)


@final
@dataclass(frozen=True, kw_only=True)
class Prepare:
    """From a uint8 image to the float tensor that a network takes; what a split does to every image."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    size: tuple[int, int] | None = None
    """(H, W) to bring images to, or None for as they are."""
    augment: Augment | None = None
    """Applied to uint8 images before normalisation; for training only."""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or any(s <= 0 for s in self.std):
            raise DataError(
                expected="as many standard deviations as means, all above 0", got=f"mean={self.mean}, std={self.std}",
                where="normalisation", todo="give mean=(r, g, b) and std=(r, g, b) on the scale 0 .. 1",
            )

    def __call__(self, image: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor | None]:
        image, label = self.augmented(image, label)
        image = image.as_subclass(Tensor).to(torch.float32) / 255
        mean = torch.tensor(self.mean).view(-1, 1, 1)
        std = torch.tensor(self.std).view(-1, 1, 1)
        if label is None or label.is_floating_point():  # a heatmap is no class
            return (image - mean) / std, label
        return (image - mean) / std, label.as_subclass(Tensor).to(torch.int64)

    def augmented(self, image: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.augment is None:
            return image, label
        if label is not None and label.ndim == 2:
            image, label = self.augment(tv_tensors.Image(image), tv_tensors.Mask(label))
            return image, label
        return self.augment(tv_tensors.Image(image)), label


class Split(Dataset[Any], ABC):
    """One named split of a source: gives (image, label), or the image alone where it has no labels.

    Attributes that other rooms read: ``source``, ``split``, ``task``, ``says``, ``class_names``, ``palette``,
    ``labels`` (bool), ``names`` (what identifies each image, for overlap checks and reports) and ``fingerprint``. The
    fingerprint names the images and their preparation, not the labels: the same images with and without labels have
    the same one.
    """

    source: str
    split: str
    task: Task
    class_names: tuple[str, ...]
    labels: bool
    names: Sequence[str]
    prepare: Prepare
    palette: Palette = ()
    says: Says = "classes"

    @abstractmethod
    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """The image, uint8 (C, H, W), and its label, or None when this split has no labels."""

    @property
    @abstractmethod
    def identity(self) -> Iterable[object]:
        """What the fingerprint is made of: names with sizes, or seeds."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        kept = (self.prepare.mean, self.prepare.std, self.prepare.size)
        return fingerprint([self.source, kept, *self.identity])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.source}/{self.split} holds {len(self)} images, asked for number {index}")
        image, label = self.prepare(*self.read(index % len(self)))
        return image if label is None else (image, label)

    def __repr__(self) -> str:
        what = f"{self.num_classes} classes" if self.labels else "without labels"
        return f"<{self.source}/{self.split}: {len(self)} images, {self.task}, {what}, {self.fingerprint}>"


@final
class Joined(Split):
    """Several splits end to end; without labels as soon as one of them has none."""

    def __init__(self, parts: Sequence[Split]) -> None:
        first = parts[0]
        self.parts = tuple(parts)
        self.source, self.task, self.class_names = first.source, first.task, first.class_names
        self.palette, self.says = first.palette, first.says
        self.split = "+".join(part.split for part in parts)
        self.labels = all(part.labels for part in parts)
        self.names = [name for part in parts for name in part.names]
        self.prepare = first.prepare
        doubled = len(self.names) - len(set(self.names))
        if doubled:
            raise DataError(
                expected="splits without common images", got=f"{doubled} images twice", where=f"split {self.split!r}",
                todo="join splits that differ; here unlabelled may be the train images themselves",
            )

    @property
    def identity(self) -> Iterable[object]:
        return [part.fingerprint for part in self.parts]

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        for part in self.parts:
            if index < len(part):
                image, label = part.read(index)
                return image, label if self.labels else None
            index -= len(part)
        raise IndexError(index)


@final
@dataclass(frozen=True, kw_only=True)
class Source:
    """A data source: its task and classes, and how to make each of its splits.

    ``calibration`` and ``test`` are disjoint from each other and from all that is trained on. ``unlabelled`` is for
    training too: where the source has no images of its own for it, it is the ``train`` images, labels left unread.
    """

    name: str
    task: Task
    class_names: tuple[str, ...]
    make: Mapping[str, Callable[[bool, Prepare], Split]]
    """Split name -> function of (labels, prepare)."""
    prepare: Prepare = field(default_factory=Prepare)
    unlabelled_is_train: bool = False
    palette: Palette = ()

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.make)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def split(self, name: str, *, labels: bool = True, augment: Augment | None = None) -> Split:
        """A split by name, or several joined with ``+``; ``labels=False`` leaves the labels unread."""
        parts = []
        wanted = name.split("+")
        labels = labels and "unlabelled" not in wanted
        for one in wanted:
            if one not in self.make:
                raise DataError(
                    expected=f"one of the splits {', '.join(self.splits)}", got=repr(one), where=self.name,
                    todo=near(one, self.splits),
                )
            parts.append(self.make[one](labels, replace(self.prepare, augment=augment)))
        return parts[0] if len(parts) == 1 else Joined(parts)

    def __getitem__(self, name: str) -> Split:
        return self.split(name)

    def with_prepare(self, **changes: Any) -> Self:
        return replace(self, prepare=replace(self.prepare, **changes))


def existing_folder(path: str | Path, where: str, layout: str) -> Path:
    """The folder as a Path, or a DataError that says what layout was looked for."""
    folder = Path(path).expanduser()
    if not str(path) or not folder.exists():
        raise DataError(expected=f"a folder with {layout}", got=f"no such path {str(path)!r}", where=where,
                        todo=f"give {where}:PATH with the path of the folder")
    if not folder.is_dir():
        raise DataError(expected=f"a folder with {layout}", got=f"the file {folder}", where=where,
                        todo="give the folder that holds the files")
    return folder


def by_hash(names: Sequence[str], shares: Mapping[str, int], seed: int = 0) -> dict[str, list[int]]:
    """Deal out indices of ``names`` in proportion to ``shares``, in an order that names and seed alone decide.

    >>> {k: len(v) for k, v in by_hash([str(i) for i in range(10)], {"train": 6, "calibration": 2, "test": 2}).items()}
    {'train': 6, 'calibration': 2, 'test': 2}
    """
    salt = f"{seed}/" if seed else ""
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(f"{salt}{names[i]}".encode()).digest())
    total, taken, done, dealt = sum(shares.values()), 0, 0, {}
    for split, share in shares.items():
        done += share
        upto = len(names) * done // total
        dealt[split] = sorted(order[taken:upto])
        taken = upto
    return dealt

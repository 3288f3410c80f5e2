"""Splits that read image files, and the checks that name every file that cannot be used."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from offramp.data.base import IGNORE, Faults, Prepare, Split
from offramp.errors import DataError
from offramp.types import Task

__all__ = ["IMAGE_SUFFIXES", "FileSplit", "image_files"]

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
CHECKED_AT_START = 4096
"""Headers of this many files are read when a split is made; the rest are found out when they are read."""
UNREADABLE = "remove or replace the files named; an interrupted copy often leaves such files"


def image_files(folder: Path, *, deep: bool = False) -> list[Path]:
    """The image files of a folder in order of name, hidden ones left out."""
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(f for f in found if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".") and f.is_file())


@final
class FileSplit(Split):
    """Image files with no labels, one class each, or a label picture each.

    ``targets`` is None, or per image an int or the Path of a PNG whose grey (or palette) value is the class; values in
    ``void`` become 255. ``prepare.size`` resizes: dense images and labels to exactly (H, W); others by their shorter
    side to 8/7 of it, cut at the centre, as networks trained on ImageNet are measured.
    """

    def __init__(
        self, files: Sequence[Path], *, root: Path, source: str, split: str, task: Task, class_names: tuple[str, ...],
        prepare: Prepare, targets: Sequence[int] | Sequence[Path] | None = None, void: tuple[int, ...] = (IGNORE,),
    ) -> None:
        self.source, self.split, self.task, self.class_names = source, split, task, class_names
        self.files, self.targets, self.prepare = tuple(files), targets, prepare
        self.labels = targets is not None
        self.root = root
        self.names = [f.relative_to(root).as_posix() for f in self.files]
        self.void = void
        self._where = f"{source}/{split}"
        self._resize: Callable[[Tensor], Tensor] | None = None
        if prepare.size and task == "classify":
            shorter = max(prepare.size) * 8 // 7
            self._resize = v2.Compose([v2.Resize(shorter, antialias=True), v2.CenterCrop(list(prepare.size))])
        self._check_headers()

    @property
    def identity(self) -> Iterable[object]:
        return [(name, file.stat().st_size) for name, file in zip(self.names, self.files, strict=True)]

    def _check_headers(self) -> None:
        faults = Faults(self._where, "images that can be read", UNREADABLE)
        sizes: dict[tuple[int, int], Path] = {}
        mismatched = Faults(self._where, "label pictures of the size of their images", "make each pair one size")
        for index, file in enumerate(self.files[:CHECKED_AT_START]):
            try:
                with Image.open(file) as picture:
                    size = picture.size
                sizes.setdefault(size, file)
                target = self.targets[index] if self.targets is not None else None
                if isinstance(target, Path):
                    file = target
                    with Image.open(target) as picture:
                        if picture.size != size:
                            mismatched.add(target, f"{_hxw(picture.size)}, its image {_hxw(size)}")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                faults.add(file, _why(error))
        faults.raise_if_any()
        mismatched.raise_if_any()
        if self.prepare.size is None and len(sizes) > 1:
            (a, first), (b, second) = list(sizes.items())[:2]
            raise DataError(
                expected="images of one size, as nothing says how to resize them", where=self._where,
                got=f"{len(sizes)} sizes, such as {_hxw(a)} ({first}) and {_hxw(b)} ({second})",
                todo="add ?size=HxW, for instance ?size=224x224",
            )

    def check(self) -> None:
        """Decode every file and raise one error that names the first ten at fault; labels are decoded only if used."""
        faults = Faults(self._where, "images and labels that can be read", UNREADABLE)
        for index in range(len(self)):
            try:
                self.read(index)
            except DataError as error:
                faults.add(self.names[index], error.got or str(error))
        faults.raise_if_any()

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        image = self._decode(self.files[index], "RGB")
        label: Tensor | None = None
        if self.targets is not None:
            target = self.targets[index]
            label = self._label(target) if isinstance(target, Path) else torch.tensor(target)
        if label is not None and label.ndim == 2 and label.shape != image.shape[1:]:
            raise DataError(expected=f"a label picture of {tuple(image.shape[1:])} like its image", where=self._where,
                            got=f"{tuple(label.shape)} in {self.targets and self.targets[index]}",
                            todo="make each pair one size")
        if self._resize is not None:
            image = self._resize(image)
        elif self.prepare.size is not None:
            image = v2.functional.resize(image, list(self.prepare.size), antialias=True)
            if label is not None and label.ndim == 2:
                nearest = v2.InterpolationMode.NEAREST_EXACT
                label = v2.functional.resize(label[None], list(self.prepare.size), interpolation=nearest)[0]
        return image, label

    def _decode(self, file: Path, mode: str) -> Tensor:
        try:
            with Image.open(file) as picture:
                if mode == "RGB":
                    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
                return torch.from_numpy(np.array(picture))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(expected="an image that can be read", got=f"{file} ({_why(error)})", where=self._where,
                            todo=UNREADABLE) from error

    def _label(self, file: Path) -> Tensor:
        label = self._decode(file, "as it is")
        if label.ndim != 2:
            raise DataError(expected="a label picture with one value per pixel, the class", where=self._where,
                            got=f"{file} with {label.shape[-1]} channels", todo="map its colours to class ids first")
        label = label.to(torch.uint8 if label.dtype == torch.bool else label.dtype)
        for value in self.void:
            label[label == value] = IGNORE
        wrong = (label != IGNORE) & ((label >= self.num_classes) | (label < 0))
        if bool(wrong.any()):
            values = sorted(set(label[wrong].tolist()))
            raise DataError(
                expected=f"label values 0 to {self.num_classes - 1}, or {', '.join(map(str, self.void))} for void",
                got=f"{file} with {', '.join(map(str, values[:10]))}", where=self._where,
                todo="check that the labels are class ids of this data set, not colours or another set's ids",
            )
        return label


def _hxw(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _why(error: Exception) -> str:
    text = str(error).split(" '")[0]
    return "not an image, or damaged" if text.startswith("cannot identify") else text

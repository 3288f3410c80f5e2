"""Splits that read image files, and the checks that name every file that cannot be used."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from offramp._specs import near
from offramp.data.base import IGNORE, Faults, Palette, Prepare, Split, by_hash
from offramp.errors import DataError
from offramp.types import Task

__all__ = ["IMAGE_SUFFIXES", "Drawn", "FileSplit", "decoded", "halves", "image_files", "paired", "subfolder"]

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
CHECKED_AT_START = 4096
"""Headers of this many files are read when a split is made; the rest are found out when they are read."""
UNREADABLE = "remove or replace the files named; an interrupted copy often leaves such files"
_BROKEN = OSError, ValueError, SyntaxError, Image.DecompressionBombError
"""What Pillow says of a file that it cannot read."""
Drawn = Callable[[], NDArray[np.uint8]]
"""Draws the label of one image (H, W) when it is asked for; DataError where the description is no good."""


def image_files(folder: Path, *, deep: bool = False) -> list[Path]:
    """The image files of a folder in order of name, hidden ones left out."""
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(f for f in found if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".") and f.is_file())


def subfolder(root: Path, name: str, where: str, layout: str) -> Path:
    """``root / name``, or a DataError that says what is there instead."""
    folder = root
    for part in Path(name).parts:
        there = [f.name for f in folder.iterdir() if f.is_dir()]
        if part not in there:
            raise DataError(expected=layout, got=f"no {part} in {folder}", where=where,
                            todo=f"give the folder that holds {Path(name).parts[0]}; {near(part, there)}")
        folder /= part
    return folder


def halves(names: Sequence[str], seed: int) -> dict[str, list[int]]:
    """Indices for ``calibration`` and ``test``: where a public set has only train and val, val serves both.

    Which half a name falls into depends on the names and the seed alone.
    """
    return by_hash(names, {"calibration": 1, "test": 1}, seed)


def paired(images: Mapping[str, Path], labels: Mapping[str, Path], where: str, *, names: tuple[str, str],
           lone: bool = True) -> list[Path]:
    """The label of each image, by their common key; DataError names whoever is alone, and the lone key most like it.

    names: how a missing image or label is called: ``("image train/{}.jpg", "label trainannot/{}.png")``.
    lone: whether a label without an image is a fault too.
    """
    faults = Faults(where, "an image for each label and a label for each image",
                    "fetch the missing files, or remove the lonely ones")

    def compare(have: Mapping[str, Path], others: Mapping[str, Path], missing: str) -> None:
        spare = [key for key in others if key not in have] if lone else []
        for key in have:
            if key not in others:
                close = near(key, spare, n=1) if spare and len(faults.found) < 10 else ""
                faults.add(have[key], f"no {missing.format(key)}{'; ' + close if close.startswith('did') else ''}")

    compare(images, labels, names[1])
    if lone:
        compare(labels, images, names[0])
    faults.raise_if_any()
    return [labels[key] for key in images]


def decoded(file: Path, where: str, *, rgb: bool = False) -> Tensor:
    """The pixels of an image file as it has them, or with ``rgb`` as uint8 (H, W, 3); DataError where it has none."""
    try:
        with Image.open(file) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB") if rgb else picture))
    except _BROKEN as error:
        raise DataError(expected="an image that can be read", got=f"{file} ({_why(error)})", where=where,
                        todo=UNREADABLE) from error


@final
class FileSplit(Split):
    """Image files with no labels, one class each, or a label picture each.

    ``targets`` is None, or per image an int, the Path of a PNG whose grey (or palette) value is the class, or a
    function that draws such values; those in ``void`` become 255, and ``relabel`` says which class each value stands
    for where they are other ids. ``prepare.size`` resizes: dense images and labels to exactly (H, W); others by their
    shorter side to 8/7 of it, cut at the centre, as networks trained on ImageNet are measured.
    """

    def __init__(
        self, files: Sequence[Path], *, root: Path, source: str, split: str, task: Task, class_names: tuple[str, ...],
        prepare: Prepare, targets: Sequence[int | Path | Drawn] | None = None, void: tuple[int, ...] = (IGNORE,),
        relabel: Mapping[int, int] | None = None, palette: Palette = (),
    ) -> None:
        self.source, self.split, self.task, self.class_names = source, split, task, class_names
        self.files, self.targets, self.prepare = tuple(files), targets, prepare
        self.labels = targets is not None
        self.root = root
        self.names = [f.relative_to(root).as_posix() for f in self.files]
        self.void, self.palette = void, palette
        raw = relabel if relabel is not None else {k: k for k in range(self.num_classes)}
        self._table = torch.full((257,), -1, dtype=torch.int16)  # the last entry: whatever no uint8 can hold
        for value, klass in {**raw, **dict.fromkeys(void, IGNORE)}.items():
            self._table[value] = klass
        self._expected = "label values " + (f"0 to {self.num_classes - 1}" if relabel is None else
                                            f"{min(raw)} to {max(raw)}") + f", or {', '.join(map(str, void))} for void"
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
            except _BROKEN as error:
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
        image = decoded(self.files[index], self._where, rgb=True).permute(2, 0, 1)
        target = None if self.targets is None else self.targets[index]
        picture = None if target is None or isinstance(target, int) else self._label(target)
        if picture is not None and picture.shape != image.shape[1:]:
            raise DataError(expected=f"a label picture of {tuple(image.shape[1:])} like its image", where=self._where,
                            got=f"{tuple(picture.shape)} in {_told(target)}", todo="make each pair one size")
        if self._resize is not None:
            image = self._resize(image)
        elif self.prepare.size is not None:
            image = v2.functional.resize(image, list(self.prepare.size), antialias=True)
            if picture is not None:
                nearest = v2.InterpolationMode.NEAREST_EXACT
                picture = v2.functional.resize(picture[None], list(self.prepare.size), interpolation=nearest)[0]
        return image, torch.tensor(target) if isinstance(target, int) else picture

    def _label(self, target: Path | Drawn) -> Tensor:
        raw = decoded(target, self._where) if isinstance(target, Path) else torch.from_numpy(target())
        if raw.ndim != 2:
            raise DataError(expected="a label picture with one value per pixel, the class", where=self._where,
                            got=f"{_told(target)} with {raw.shape[-1]} channels",
                            todo="map its colours to class ids first")
        raw = raw.to(torch.int64)
        label = self._table[torch.where((raw >= 0) & (raw < 256), raw, 256)]
        wrong = label < 0
        if bool(wrong.any()):
            values = sorted(set(raw[wrong].tolist()))
            raise DataError(
                expected=self._expected, got=f"{_told(target)} with {', '.join(map(str, values[:10]))}",
                where=self._where,
                todo="check that the labels are class ids of this data set, not colours or another set's ids",
            )
        return label.to(torch.uint8)


def _hxw(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _why(error: Exception) -> str:
    text = str(error).split(" '")[0]
    return "not an image, or damaged" if text.startswith("cannot identify") else text


def _told(target: object) -> str:
    """A file by its path, a drawing by what it is drawn from."""
    return str(target if isinstance(target, Path) else getattr(target, "name", target))

"""PASCAL VOC 2012 segmentation, alone or with the labels of SBD (Hariharan et al. 2011) for its training images."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from offramp._extras import require
from offramp._specs import near
from offramp.data.base import SPLITS, Prepare, Source, Split, existing_folder
from offramp.data.files import Drawn, FileSplit, halves, paired, subfolder
from offramp.errors import DataError

__all__ = ["VOC_CLASSES", "VOC_PALETTE", "voc"]

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)


def _colour(k: int) -> tuple[int, int, int]:
    red, green, blue = (sum((k >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3))
    return red, green, blue


VOC_PALETTE = tuple(_colour(k) for k in range(len(VOC_CLASSES)))
"""The development kit's colour map: bits of the class number, dealt to red, green and blue in turn."""
LAYOUT = "JPEGImages, SegmentationClass and ImageSets/Segmentation (VOC2012, VOCdevkit or what holds it)"
SBD_LAYOUT = "img, cls, train.txt and val.txt (benchmark_RELEASE/dataset)"
TrainList = Literal["train", "trainaug"]


def voc(path: str | Path, *, train: TrainList = "train", sbd: str | Path = "", seed: int = 0,
        prepare: Prepare | None = None) -> Source:
    """Read the 21 classes (0 is background, the 255 around objects void); sizes differ, so give ``prepare.size``.

    train: the list that ``train`` and ``unlabelled`` hold. ``trainaug`` is all that VOC or SBD label and that is not in
        VOC's val: 10,582 images of the public files. It is read from SegmentationClassAug (with trainaug.txt or
        train_aug.txt, where there is one), else from SBD's own cls/\\*.mat, VOC's finer labels winning where both label
        an image. The split named ``trainaug`` is there whatever this says.
    sbd: the folder of SBD; nothing for a benchmark_RELEASE/dataset in ``path`` or around VOC2012.

    The public test set has no labels, so halves of val, drawn by ``seed``, are ``calibration`` and ``test``.
    """
    if train not in ("train", "trainaug"):
        raise DataError(expected="train=train or train=trainaug", got=f"train={train}", where="voc",
                        todo=f"{near(str(train), ['train', 'trainaug'])} (calibration and test are made of val)")
    given = existing_folder(path, "voc", LAYOUT)
    root = next((f for f in (given, given / "VOC2012", given / "VOCdevkit" / "VOC2012")
                 if (f / "JPEGImages").is_dir()), given)
    tree = _Tree(root, _sbd(given, root, sbd))
    subfolder(root, "JPEGImages", "voc", LAYOUT)

    def make(split: str, labels: bool, prepared: Prepare) -> Split:
        where = f"voc/{split}"
        of = train if split in ("train", "unlabelled") else split
        names = tree.names(of, where, seed)
        images = {f.stem: f for f in sorted(tree.folder("JPEGImages", where).glob("*.jpg"))}
        files = paired(dict.fromkeys(names, tree.lists), images, where, lone=False,
                       names=("", "image JPEGImages/{}.jpg"))
        targets = tree.labels(names, where, of == "trainaug") if labels and split != "unlabelled" else None
        return FileSplit(files, root=root, source="voc", split=split, task="dense", class_names=VOC_CLASSES,
                         prepare=prepared, targets=targets, palette=VOC_PALETTE)

    return Source(name="voc", task="dense", class_names=VOC_CLASSES, prepare=prepare or Prepare(),
                  make={s: partial(make, s) for s in (*SPLITS, "trainaug")}, unlabelled_is_train=True,
                  palette=VOC_PALETTE)


def _sbd(given: Path, root: Path, sbd: str | Path) -> Path | None:
    if str(sbd):
        folder = existing_folder(sbd, "voc?sbd", SBD_LAYOUT)
        inner = folder / "benchmark_RELEASE" / "dataset", folder / "dataset", folder
        found = next((f for f in inner if (f / "cls").is_dir()), None)
        if found is None:
            subfolder(folder, "cls", "voc?sbd", SBD_LAYOUT)
        return found
    around = [base / "benchmark_RELEASE" / "dataset" for base in (given, root, root.parent, root.parent.parent)]
    return next((f for f in around if (f / "cls").is_dir()), None)


@final
@dataclass(frozen=True)
class _Tree:
    """VOC2012 and perhaps SBD; reads lists and folders when asked."""

    root: Path
    sbd: Path | None

    @property
    def lists(self) -> Path:
        return self.root / "ImageSets" / "Segmentation"

    def folder(self, name: str, where: str) -> Path:
        return subfolder(self.root, name, where, LAYOUT)

    def names(self, split: str, where: str, seed: int) -> list[str]:
        """The images of a split, by name without ending."""
        self.folder("ImageSets/Segmentation", where)
        if split == "train":
            return _list(self.lists / "train.txt", where)
        val = _list(self.lists / "val.txt", where)
        if split != "trainaug":
            return [val[i] for i in halves(val, seed)[split]]
        held, augmented = set(val), self.root / "SegmentationClassAug"
        listed = next((f for n in ("trainaug", "train_aug") if (f := self.lists / f"{n}.txt").is_file()), None)
        if listed and (augmented.is_dir() or self.sbd):
            names = _list(listed, where)
            if common := sorted(held.intersection(names)):
                raise DataError(expected="a list without images of val", got=f"{len(common)}, such as {common[0]}",
                                where=f"{where}, {listed}", todo="take them out: calibration and test are made of val")
            return names
        if augmented.is_dir():
            return sorted({f.stem for f in augmented.glob("*.png")} - held)
        if self.sbd:
            own = [_list(self.sbd / f"{part}.txt", where) for part in ("train", "val")]
            return sorted({*own[0], *own[1], *_list(self.lists / "train.txt", where)} - held)
        raise DataError(expected=f"SegmentationClassAug in {self.root}, or SBD's {SBD_LAYOUT}", got="neither",
                        where=where, todo="add one of them, give voc:PATH?train=trainaug&sbd=FOLDER, or train=train")

    def labels(self, names: list[str], where: str, augmented: bool) -> list[Path | Drawn]:
        """The label of each image; for trainaug what SegmentationClassAug says, else VOC, else SBD."""
        folder = "SegmentationClass"
        if augmented and (self.root / "SegmentationClassAug").is_dir():
            folder, augmented = "SegmentationClassAug", False
        own = {f.stem: f for f in self.folder(folder, where).glob("*.png")}
        missing = f"label {folder}/{{}}.png"
        if augmented and self.sbd:
            own = {f.stem: f for f in (self.sbd / "cls").glob("*.mat")} | own
            missing = "label cls/{}.mat"
        found = paired({n: self.root / "JPEGImages" / f"{n}.jpg" for n in names}, own, where, names=("", missing),
                       lone=False)
        return [_Mat(f) if f.suffix == ".mat" else f for f in found]


def _list(file: Path, where: str) -> list[str]:
    """Names in a list: one a line, perhaps as ``/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png``."""
    if not file.is_file():
        there = [f.name for f in file.parent.glob("*.txt")]
        raise DataError(expected=f"the list {file}", got="no such file", where=where,
                        todo=near(file.name, there) if there else "fetch the files again")
    names = [Path(line.split()[0]).stem for line in file.read_text().splitlines() if line.strip()]
    if not names:
        raise DataError(expected="names, one a line", got=f"none in {file}", where=where, todo="fetch the file again")
    return names


@final
@dataclass(frozen=True)
class _Mat:
    """One label of SBD; a .mat file is data, and loading it runs nothing."""

    name: Path

    def __call__(self) -> NDArray[np.uint8]:
        read: Any = require("scipy.io", "SBD's .mat labels").loadmat
        try:
            label: NDArray[np.uint8] = read(self.name, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]
        except Exception as error:  # scipy lets through what zlib, struct and numpy say of damaged files
            raise DataError(expected="a label of SBD (GTcls.Segmentation)", got=f"{self.name} ({error!r})",
                            where="voc/trainaug", todo="fetch the file again") from error
        return label

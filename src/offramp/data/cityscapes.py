"""Cityscapes (Cordts et al. 2016, arXiv:1604.01685): leftImg8bit/SPLIT/CITY and gtFine/SPLIT/CITY, 1024x2048."""

from functools import cache, partial
from pathlib import Path

from offramp.data.base import SPLITS, Prepare, Source, Split, existing_folder
from offramp.data.files import FileSplit, halves, paired, subfolder
from offramp.errors import DataError

__all__ = ["CITYSCAPES_CLASSES", "CITYSCAPES_PALETTE", "CITYSCAPES_TRAIN_ID", "cityscapes"]

CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)
CITYSCAPES_PALETTE = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
    (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)
_SHOWN = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_TRAIN_ID = {label: _SHOWN.index(label) if label in _SHOWN else 255 for label in range(34)}
"""Label id -> class; the fifteen ids that the benchmark leaves out are void."""
LAYOUT = "leftImg8bit/train, leftImg8bit/val and gtFine (Cityscapes)"
IMAGE, LABEL = "_leftImg8bit.png", "_gtFine_{}.png"


def cityscapes(path: str | Path, *, seed: int = 0, prepare: Prepare | None = None) -> Source:
    """Read the nineteen classes of the benchmark, from labelTrainIds where they were made, else from labelIds.

    ``train`` is the folder train, and ``unlabelled`` the same pictures, gtFine never looked at. The public test set
    has no labels, so halves of val, drawn by ``seed``, are ``calibration`` and ``test``; the pictures of the public one
    are the split ``submission``. No folder is read before a split is asked for.
    """
    root = existing_folder(path, "cityscapes", LAYOUT)
    images = subfolder(root, "leftImg8bit", "cityscapes", LAYOUT)
    folders = {name: images / name for name in ("train", "val", "test") if (images / name).is_dir()}
    if not folders:
        subfolder(images, "train", "cityscapes", LAYOUT)

    @cache
    def pictures(folder: str) -> dict[str, Path]:
        found = _files(folders[folder], IMAGE)
        if not found:
            raise DataError(expected=f"files CITY/*{IMAGE}", got=f"none in {folders[folder]}", where="cityscapes",
                            todo="fetch the files again")
        return found

    def make(split: str, labels: bool, prepared: Prepare) -> Split:
        folder = {"unlabelled": "train", "train": "train", "submission": "test"}.get(split, "val")
        have = pictures(folder)
        keys = list(have)
        if folder == "val":
            keys = [keys[i] for i in halves(keys, seed)[split]]
        targets, relabel = None, None
        if labels and split not in ("unlabelled", "submission"):
            named, relabel = _labels(root, folder, have, f"cityscapes/{split}")
            targets = [named[key] for key in keys]
        return FileSplit([have[key] for key in keys], root=root, source="cityscapes", split=split, task="dense",
                         class_names=CITYSCAPES_CLASSES, prepare=prepared, targets=targets, relabel=relabel,
                         palette=CITYSCAPES_PALETTE)

    folder_of = {"train": "train", "unlabelled": "train", "calibration": "val", "test": "val", "submission": "test"}
    return Source(name="cityscapes", task="dense", class_names=CITYSCAPES_CLASSES, prepare=prepare or Prepare(),
                  make={s: partial(make, s) for s in (*SPLITS, "submission") if folder_of[s] in folders},
                  unlabelled_is_train=True, palette=CITYSCAPES_PALETTE)


def _files(folder: Path, ending: str) -> dict[str, Path]:
    """CITY/CITY_SEQUENCE_FRAME -> file."""
    return {f"{f.parent.name}/{f.name.removesuffix(ending)}": f for f in sorted(folder.glob(f"*/*{ending}"))}


def _labels(root: Path, folder: str, images: dict[str, Path], where: str
            ) -> tuple[dict[str, Path], dict[int, int] | None]:
    """The label picture of each image, and what its values stand for."""
    labels = subfolder(root, f"gtFine/{folder}", where, "the labels in gtFine, or labels=False")
    kinds = {kind: _files(labels, LABEL.format(kind)) for kind in ("labelTrainIds", "labelIds")}
    # half-made train ids are what an interrupted conversion leaves: the complete ones serve
    kind = max(kinds, key=lambda one: len(images.keys() & kinds[one].keys()))
    files = paired(images, kinds[kind], where,
                   names=(f"image leftImg8bit/{folder}/{{}}{IMAGE}", f"label gtFine/{folder}/{{}}{LABEL.format(kind)}"))
    return dict(zip(images, files, strict=True)), CITYSCAPES_TRAIN_ID if kind == "labelIds" else None

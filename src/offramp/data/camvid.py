"""CamVid (Brostow et al. 2009) in the layout of SegNet's copy: train / trainannot, val / valannot, test / testannot."""

from functools import partial
from pathlib import Path

from offramp.data.base import SPLITS, Prepare, Source, Split, existing_folder
from offramp.data.files import FileSplit, image_files, paired
from offramp.errors import DataError

__all__ = ["CAMVID_CLASSES", "CAMVID_PALETTE", "camvid"]

CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)
CAMVID_PALETTE = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)
"""The colours of the original label pictures; SegNet's copy shows them with another blue for the pavement."""
VOID = 11
LAYOUT = "train, trainannot, val and valannot (SegNet's copy of CamVid)"
BLOCK = 10
"""Frames of val that stay together when it is shared out: neighbours on the tape look alike."""


def camvid(path: str | Path, *, prepare: Prepare | None = None) -> Source:
    """Read ids 0 to 10, 11 being void (255 here), at the size of the files unless ``prepare.size`` says another.

    ``train`` is the folder train, and ``unlabelled`` the same pictures, trainannot never looked at. Where there is a
    folder test, it is ``test`` and val is ``calibration``; where there is none, blocks of ten frames of val go to the
    two in turn.
    """
    root = existing_folder(path, "camvid", LAYOUT)
    folders = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if not folders:
        raise DataError(expected=LAYOUT, got=f"none of these folders in {root}", where="camvid",
                        todo="give the folder that holds train and val")
    empty = [str(folder) for folder in folders.values() if not image_files(folder)]
    if empty:
        raise DataError(expected="images in each folder", got=f"none in {', '.join(empty)}", where="camvid",
                        todo="fetch the files again")
    pictures: dict[str, list[Path]] = {}
    if "train" in folders:
        pictures["train"] = pictures["unlabelled"] = image_files(folders["train"])
    if "val" in folders and "test" in folders:
        pictures["calibration"], pictures["test"] = image_files(folders["val"]), image_files(folders["test"])
    elif "val" in folders:
        frames = image_files(folders["val"])
        for turn, name in enumerate(("calibration", "test")):
            pictures[name] = [f for i, f in enumerate(frames) if i // BLOCK % 2 == turn] or frames[turn::2]
        pictures["test"] = [f for f in pictures["test"] if f not in set(pictures["calibration"])]
    elif "test" in folders:
        pictures["test"] = image_files(folders["test"])

    def make(split: str, labels: bool, prepared: Prepare) -> Split:
        files = pictures[split]
        targets = _pair(files, split) if labels and split != "unlabelled" else None
        return FileSplit(files, root=root, source="camvid", split=split, task="dense", class_names=CAMVID_CLASSES,
                         prepare=prepared, targets=targets, void=(VOID, 255), palette=CAMVID_PALETTE)

    return Source(name="camvid", task="dense", class_names=CAMVID_CLASSES, prepare=prepare or Prepare(),
                  make={s: partial(make, s) for s in SPLITS if pictures.get(s)}, unlabelled_is_train=True,
                  palette=CAMVID_PALETTE)


def _pair(files: list[Path], split: str) -> list[Path]:
    """The label picture of each image; an image without one, or a label without an image, is an error."""
    folder = files[0].parent
    labels = folder.parent / f"{folder.name}annot"
    if not labels.is_dir():
        raise DataError(expected=f"the labels of {folder} in {labels}", got="no such folder", where=f"camvid/{split}",
                        todo="add it, or read the pictures without labels (labels=False, or the split unlabelled)")
    paired({f.name: f for f in image_files(folder)}, {f.name: f for f in image_files(labels)}, f"camvid/{split}",
           names=(f"image {folder.name}/{{}}", f"label {labels.name}/{{}}"))
    return [labels / f.name for f in files]

"""Folders of images: one subfolder for each class, or a flat folder of images that nobody has labelled."""

from functools import partial
from pathlib import Path

from offramp.data.base import SPLITS, Prepare, Source, Split, by_hash, existing_folder
from offramp.data.files import FileSplit, image_files
from offramp.errors import DataError

__all__ = ["imagefolder"]

LAYOUT = "one subfolder of images for each class, or images"
FOLDER_OF = {"train": ("train",), "unlabelled": ("unlabelled", "unlabeled"), "calibration": ("calibration",),
             "test": ("test",)}
SHARES = {"train": 60, "calibration": 20, "test": 20}


def imagefolder(path: str | Path, *, prepare: Prepare | None = None) -> Source:
    """Read images at 224x224 unless ``prepare.size`` says another; classes are the subfolders in order of name.

    Where its subfolders are named train, unlabelled, calibration or test and nothing else, these are the splits; val
    goes to calibration, shared with test where there is no test. Else the images are dealt out by a hash of their
    names, 60 % train, 20 % calibration, 20 % test. A flat folder has no labels: its 60 % are ``unlabelled``.
    """
    root = existing_folder(path, "imagefolder", LAYOUT)
    prepare = prepare or Prepare(size=(224, 224))
    named = {split: root / name for split, names in FOLDER_OF.items() for name in names if (root / name).is_dir()}
    val = root / "val"
    pictures: dict[str, list[Path]] = {}
    inside = {f.name for f in root.iterdir() if f.is_dir() and not f.name.startswith(".")}
    if inside and inside <= {"val", *(folder.name for folder in named.values())}:
        pictures = {split: image_files(folder, deep=True) for split, folder in named.items()}
        if val.is_dir():
            held = image_files(val, deep=True)
            wanted = [s for s in ("calibration", "test") if s not in pictures]
            dealt = by_hash([f.relative_to(root).as_posix() for f in held], dict.fromkeys(wanted, 1)) if wanted else {}
            pictures |= {split: [held[i] for i in rows] for split, rows in dealt.items()}
        depth = 2
    else:
        files = image_files(root, deep=True)
        depth = 1 if any(f.parent != root for f in files) else 0
        shares = SHARES if depth else {"unlabelled": 60, "calibration": 20, "test": 20}
        dealt = by_hash([f.relative_to(root).as_posix() for f in files], shares)
        pictures = {split: [files[i] for i in rows] for split, rows in dealt.items()}
    if not any(pictures.values()):
        raise DataError(expected=LAYOUT, got=f"no image in {root}", where="imagefolder",
                        todo="give a folder with files in .jpg, .png, .bmp, .webp, .tif or .ppm")
    own_unlabelled = "unlabelled" in pictures
    if not own_unlabelled and pictures.get("train"):
        pictures["unlabelled"] = pictures["train"]
    labelled = [f for split, files in pictures.items() if split != "unlabelled" for f in files] if depth else []
    classes = tuple(sorted({c for f in labelled if (c := _class(f, root, depth))}))

    def make(split: str, labels: bool, prepared: Prepare) -> Split:
        files = pictures[split]
        targets: list[int] | None = None
        if labels and classes and split != "unlabelled":
            stray = [f for f in files if not _class(f, root, depth)]
            if stray:
                raise DataError(expected="every image in a subfolder named after its class",
                                got=", ".join(map(str, stray[:10])), where=f"imagefolder/{split}",
                                todo="move these images into class subfolders")
            number = {name: i for i, name in enumerate(classes)}
            targets = [number[_class(f, root, depth)] for f in files]
        return FileSplit(files, root=root, source="imagefolder", split=split, task="classify", class_names=classes,
                         prepare=prepared, targets=targets)

    return Source(name="imagefolder", task="classify", class_names=classes, prepare=prepare,
                  make={s: partial(make, s) for s in SPLITS if pictures.get(s)}, unlabelled_is_train=not own_unlabelled)


def _class(file: Path, root: Path, depth: int) -> str:
    parts = file.relative_to(root).parts
    return parts[depth - 1] if len(parts) > depth else ""

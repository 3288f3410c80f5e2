"""COCO 2017 (Lin et al. 2014, arXiv:1405.0312) reduced to the 21 classes of PASCAL VOC, its outlines drawn here."""

import json
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from offramp.data.base import IGNORE, SPLITS, Prepare, Source, Split, existing_folder
from offramp.data.files import FileSplit, halves, image_files, paired, subfolder
from offramp.data.voc import VOC_CLASSES, VOC_PALETTE
from offramp.errors import DataError

__all__ = ["COCO_CATEGORIES", "coco", "mask_of"]

COCO_CATEGORIES = (0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
"""COCO's category id of each VOC class in order; 0 is the background, which COCO does not number."""
LAYOUT = "annotations, train2017 and val2017 (COCO)"
MIN_AREA = 1000
_FINER = 5
_PART = {"train": "train", "unlabelled": "train", "calibration": "val", "test": "val"}
_CLASS_OF = {category: k for k, category in enumerate(COCO_CATEGORIES) if k}


def coco(path: str | Path, *, seed: int = 0, min_area: float = MIN_AREA, prepare: Prepare | None = None) -> Source:
    """Read the 21 classes of VOC; whatever else COCO labels is background. Sizes differ, so give ``prepare.size``.

    An image of ``train`` must show the twenty classes on more than ``min_area`` pixels in all (MESS, A.1, drops those
    of background alone; torchvision's reference training has this threshold, and so have its published weights).
    ``unlabelled`` is all of train2017, no annotation looked at. Halves of val2017, drawn by ``seed``, are
    ``calibration`` and ``test``, with their images of background alone. Where objects overlap, pixels are void, as in
    that reference. The annotations are parsed when a labelled split, or ``train``, is asked for.
    """
    root = existing_folder(path, "coco", LAYOUT)
    folders = {part: folder for part in ("train", "val") if (folder := root / f"{part}2017").is_dir()}
    if not folders:
        subfolder(root, "train2017", "coco", LAYOUT)
    told = cache(partial(_annotations, root))

    def make(split: str, labels: bool, prepared: Prepare) -> Split:
        part, labels = _PART[split], labels and split != "unlabelled"
        files = {f.name: f for f in image_files(folders[part])}
        if not files:
            raise DataError(expected="images", got=f"none in {folders[part]}", where="coco", todo="fetch them again")
        names = list(files)
        if part == "val":
            names = [names[i] for i in halves(names, seed)[split]]
        drawn: dict[str, Outlines] = {}
        if split == "train" or labels:
            drawn = told(part)
            source = Path(f"instances_{part}2017.json")
            paired(files, dict.fromkeys(drawn, source), f"coco/{split}",
                   names=(f"image {part}2017/{{}}", f"entry for {{}} in {source}"))
        if split == "train":
            names = [name for name in names if drawn[name].area > min_area]
            if not names:
                raise DataError(expected=f"images with {min_area} pixels of VOC's classes", got="none",
                                where="coco/train", todo="look at the annotations, or give coco:PATH?min_area=0")
        return FileSplit([files[name] for name in names], root=root, source="coco", split=split, task="dense",
                         class_names=VOC_CLASSES, prepare=prepared, palette=VOC_PALETTE,
                         targets=[drawn[name] for name in names] if labels else None)

    return Source(name="coco", task="dense", class_names=VOC_CLASSES, prepare=prepare or Prepare(),
                  make={s: partial(make, s) for s in SPLITS if _PART[s] in folders}, unlabelled_is_train=True,
                  palette=VOC_PALETTE)


@final
@dataclass(eq=False)
class Outlines:
    """The objects of one image; called, it draws their label picture."""

    name: str
    height: int
    width: int
    area: float
    objects: list[tuple[int, Any]]
    """(class, what ``mask_of`` takes)."""

    def __call__(self) -> NDArray[np.uint8]:
        label = np.zeros((self.height, self.width), np.uint8)
        for klass, outline in self.objects:
            mask = mask_of(outline, self.height, self.width, self.name)
            label[mask] = np.where(label[mask] == 0, klass, IGNORE)
        return label


def _annotations(root: Path, part: str) -> dict[str, Outlines]:
    """File name -> outlines; numbers as arrays, since half a million lists would fill the memory."""
    file = root / "annotations" / f"instances_{part}2017.json"
    where = f"coco/{file.name}"
    if not file.is_file():
        there = [f.name for f in file.parent.glob("*.json")] if file.parent.is_dir() else []
        raise DataError(expected=f"the file {file}", got=f"{', '.join(sorted(there)[:6]) or 'nothing'} there",
                        where=where, todo="add it, or read pictures alone (the split unlabelled, or labels=False)")
    try:
        told = json.loads(file.read_bytes())
        images = {one["id"]: Outlines(one["file_name"], one["height"], one["width"], 0.0, []) for one in told["images"]}
        lost = [one["id"] for one in told["annotations"] if one["image_id"] not in images]
        for one in told["annotations"]:
            if one["category_id"] in _CLASS_OF and (of := images.get(one["image_id"])):
                outline = one["segmentation"]
                of.area += one["area"]
                if isinstance(outline, list):
                    outline = [np.asarray(polygon, np.float64) for polygon in outline]
                of.objects.append((_CLASS_OF[one["category_id"]], outline))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(expected="COCO's instances: images and annotations", got=f"{file} ({error!r})", where=where,
                        todo="fetch the file again; stuff, captions and panoptic files are others") from error
    if lost:
        raise DataError(expected="an image for each annotation", where=where, todo="fetch the file again",
                        got=f"{len(lost)} without one, such as annotation {lost[0]}")
    return {one.name: one for one in images.values()}


def mask_of(outline: Any, height: int, width: int, name: str = "") -> NDArray[np.bool_]:
    """The pixels (H, W) of one object, bit for bit as pycocotools draws them.

    outline: polygons, each ``[x0, y0, x1, y1, ...]``, or a run-length code ``{"counts": ..., "size": [H, W]}`` whose
        counts are numbers or pycocotools' string.

    >>> mask_of([[1, 0, 3, 0, 3, 2, 1, 2]], 3, 4).astype(int)
    array([[0, 1, 1, 0],
           [0, 1, 1, 0],
           [0, 0, 0, 0]])
    """
    try:
        if isinstance(outline, dict):
            counts = outline["counts"]
            runs = _unpacked(counts) if isinstance(counts, str | bytes) else np.asarray(counts, np.int64)
            if list(outline["size"]) != [height, width] or runs.sum() != height * width or (runs < 0).any():
                raise ValueError(f"runs of {runs.sum()} pixels, size {outline['size']}, image {[height, width]}")
            flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        else:
            flat = np.zeros(height * width, bool)
            for polygon in outline:
                flat |= _filled(np.asarray(polygon, np.float64), height, width)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(expected="polygons of x, y pairs or a run-length code", got=f"{name} with {error}",
                        where="coco", todo="look at its annotations") from error
    return flat.reshape(width, height).T  # both codes go down the columns


def _filled(polygon: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """pycocotools' rule: walk the outline on a grid five times finer; where it enters a column, in and out change."""
    if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"a polygon of shape {polygon.shape}")
    corners = (_FINER * polygon.reshape(-1, 2) + 0.5).astype(np.int64)
    walked: list[NDArray[np.int64]] = []
    for (xs, ys), (xe, ye) in zip(corners, np.roll(corners, -1, 0), strict=True):
        dx, dy = abs(xe - xs), abs(ys - ye)
        steps = np.arange(max(dx, dy) + 1)
        if turned := bool(xs > xe if dx >= dy else ys > ye):  # always walked from the smaller end, so that a
            xs, ys, xe, ye = xe, ye, xs, ys                   # shared edge is one line for both its neighbours
        if dx >= dy:
            slope = (ye - ys) / dx if dx else 0.0
            points = np.stack([steps + xs, (ys + slope * steps + 0.5).astype(np.int64)])
        else:
            points = np.stack([(xs + (xe - xs) / dy * steps + 0.5).astype(np.int64), steps + ys])
        walked.append(points[:, ::-1] if turned else points)
    (u, v) = np.concatenate(walked, 1)
    moved = np.flatnonzero(u[1:] != u[:-1])
    x = (np.where(u[moved + 1] < u[moved], u[moved + 1], u[moved + 1] - 1) + 0.5) / _FINER - 0.5
    y = np.ceil(np.clip((np.minimum(v[moved + 1], v[moved]) + 0.5) / _FINER - 0.5, 0, height)).astype(np.int64)
    inside = (x == np.floor(x)) & (x >= 0) & (x <= width - 1)
    crossings = np.bincount(x[inside].astype(np.int64) * height + y[inside], minlength=height * width + 1)
    filled: NDArray[np.bool_] = np.cumsum(crossings)[: height * width] % 2 == 1
    return filled


def _unpacked(code: str | bytes) -> NDArray[np.int64]:
    """pycocotools' string: five bits a character, lowest first, 32 for more to come; from the third on differences."""
    runs: list[int] = []
    value = shift = 0
    for byte in code.encode() if isinstance(code, str) else code:
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return np.asarray(runs, np.int64)

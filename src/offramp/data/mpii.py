"""MPII Human Pose (Andriluka et al. 2014) as HRNet's authors lay it out: images beside JSON annotations."""

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from offramp._extras import require
from offramp._specs import near
from offramp.data.base import SPLITS, Faults, Prepare, Source, Split, existing_folder
from offramp.data.files import decoded, halves, subfolder
from offramp.data.poses import JOINTS, Person, Poses, Truth
from offramp.errors import DataError
from offramp.functional.poses import head_sizes

__all__ = ["mpii"]

LAYOUT = "images and annot (train.json, valid.json and, for PCKh, gt_valid.mat)"
_PART = {"train": "train", "unlabelled": "train", "calibration": "valid", "test": "valid", "valid": "valid"}


def mpii(path: str | Path, *, sigma: float = 2.0, seed: int = 0, prepare: Prepare | None = None) -> Source:
    """Read people with sixteen joints: crops of ``prepare.size``, 256x256 unless given, and heatmaps of a quarter.

    Annotations are ``annot/train.json`` and ``annot/valid.json`` of HRNet's authors: lists of people with ``image``,
    ``joints``, ``joints_vis``, ``center`` and ``scale``. All places in them count from 1. As the authors do, the
    centre moves down by 15 scale, and the square around it has sides of 1.25 * 200 scale. ``sigma`` is that of the
    heatmaps' Gaussians, in their places.

    Halves of valid by picture, drawn by ``seed``, are ``calibration`` and ``test``; the split named ``valid`` is all of
    it, which papers measure on. PCKh (``split.pckh``) is measured against ``annot/gt_valid.mat``, read by SciPy:
    ``headboxes_src``, and ``pos_gt_src`` with ``jnt_missing`` where they are in it. Without that file, head boxes may
    lie in ``annot/gt_valid.json``, ``[x0, y0, x1, y1]`` for each person of valid.json.
    """
    root = existing_folder(path, "mpii", LAYOUT)
    for name in ("images", "annot"):
        subfolder(root, name, "mpii", LAYOUT)
    prepare = prepare or Prepare()
    prepare = prepare if prepare.size else replace(prepare, size=(256, 256))

    def make(split: str, labels: bool, prepared: Prepare) -> Split:
        where, part = f"mpii/{split}", _PART[split]
        listed = _People.read(root, part, where)
        truth = _truth(root / "annot", listed, where) if part == "valid" else None
        rows = list(range(len(listed.people)))
        if split in ("calibration", "test"):
            pictures = sorted(set(listed.images))
            mine = {pictures[i] for i in halves(pictures, seed)[split]}
            rows = [i for i in rows if listed.images[i] in mine]
        return _Mpii(root, listed, rows, split=split, labels=labels and split != "unlabelled", prepare=prepared,
                     sigma=sigma, truth=truth)

    return Source(name="mpii", task="dense", class_names=JOINTS, prepare=prepare, unlabelled_is_train=True,
                  make={s: partial(make, s) for s in (*SPLITS, "valid")})


@final
@dataclass(frozen=True, eq=False)
class _People:
    """All of one annotation file, in its order."""

    images: list[str]
    people: list[Person]

    @classmethod
    def read(cls, root: Path, part: str, where: str) -> "_People":
        file = root / "annot" / f"{part}.json"
        faults = Faults(f"{where}, {file}", "people with image, joints (16 x, y), joints_vis (16), center and scale, "
                        "and their pictures in images", "fetch annotations and images again")
        there = {f.name for f in (root / "images").iterdir()}
        images, people = [], []
        for i, entry in enumerate(_json(file, where)):
            try:
                image, person = entry["image"], _person(entry)
            except (KeyError, TypeError, ValueError) as error:
                faults.add(f"number {i}", f"no {error}" if isinstance(error, KeyError) else str(error))
                continue
            if image not in there:
                faults.add(image, "no such picture")
            images.append(image)
            people.append(person)
        faults.raise_if_any()
        if not people:
            raise DataError(expected="people", got="none", where=f"{where}, {file}", todo="fetch the file again")
        return cls(images, people)


def _json(file: Path, where: str) -> list[Any]:
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise DataError(expected=f"the annotations {file}", got="no such file", where=where,
                        todo=near(file.name, [f.name for f in file.parent.iterdir()])) from error
    except (OSError, ValueError) as error:
        raise DataError(expected="a JSON file", got=f"{file} ({error})", where=where,
                        todo="fetch the file again") from error
    if not isinstance(found, list):
        raise DataError(expected="a list of people", got=f"{file} with a {type(found).__name__}", where=where,
                        todo="give the annotations of HRNet's authors")
    return found


def _person(entry: dict[str, Any]) -> Person:
    joints, known = np.array(entry["joints"], np.float64), np.array(entry["joints_vis"], np.float64) > 0
    (x, y), scale = (float(v) for v in entry["center"]), float(entry["scale"])
    if joints.shape != (len(JOINTS), 2) or known.shape != joints.shape[:1]:
        raise ValueError(f"joints {joints.shape}, joints_vis {known.shape}")
    if not (np.isfinite(joints[known]).all() and math.isfinite(x + y) and 0 < scale < math.inf):
        raise ValueError(f"center {x}, {y}, scale {scale}, or a joint that is no number")
    return Person(joints=joints - 1, known=known, centre=(x - 1, y + 15 * scale - 1), side=1.25 * 200 * scale)


def _truth(annot: Path, listed: _People, where: str) -> Truth | None:
    """By the file with head boxes; None where there is none."""
    count = len(listed.people)
    joints, counted = np.stack([p.joints for p in listed.people]), np.stack([p.known for p in listed.people])
    file = annot / "gt_valid.mat"
    if file.is_file():
        found = _mat(file, where)
        boxes = found["headboxes_src"].transpose(2, 0, 1)
        if {"pos_gt_src", "jnt_missing"} <= set(found):
            joints, counted = found["pos_gt_src"].transpose(2, 0, 1) - 1, found["jnt_missing"].T == 0
    elif (file := annot / "gt_valid.json").is_file():
        try:
            boxes = np.array(_json(file, where), np.float64).reshape(-1, 2, 2)
        except (TypeError, ValueError) as error:
            raise DataError(expected="a head box [x0, y0, x1, y1] for each person", got=f"{file} ({error})",
                            where=where, todo="mend the file") from error
    else:
        return None
    if not (boxes.shape == (count, 2, 2) and joints.shape == (count, len(JOINTS), 2)
            and counted.shape == joints.shape[:2]):
        raise DataError(expected=f"a head box and {len(JOINTS)} joints for each of {count} people of valid.json",
                        got=f"{file} with boxes {boxes.shape}, joints {joints.shape}, counted {counted.shape}",
                        where=where, todo="take both files from one place")
    heads = head_sizes(torch.from_numpy(boxes.reshape(-1, 4)))
    if not bool((heads > 0).all()):
        raise DataError(expected="head boxes larger than a point", where=f"{where}, {file}",
                        got=f"that of number {int((~(heads > 0)).nonzero()[0])}", todo="fetch the file again")
    return Truth(torch.from_numpy(joints), torch.from_numpy(counted), heads)


def _mat(file: Path, where: str) -> dict[str, NDArray[np.float64]]:
    """A .mat file is data, and loading it runs nothing."""
    names = ["headboxes_src", "pos_gt_src", "jnt_missing"]
    read: Any = require("scipy.io", "MPII's gt_valid.mat").loadmat
    try:
        found = {name: np.array(array, np.float64) for name, array in read(file, variable_names=names).items()
                 if name in names}
        if any(found[name].ndim != (2 if name == "jnt_missing" else 3) for name in {"headboxes_src", *found}):
            raise ValueError(f"arrays {({name: array.shape for name, array in found.items()})}")
    except Exception as error:  # scipy lets through what zlib, struct and numpy say of damaged files
        raise DataError(expected="headboxes_src (2, 2, N), pos_gt_src (16, 2, N) and jnt_missing (16, N)",
                        got=f"{file} ({error!r})", where=where, todo="fetch the file again") from error
    return found


@final
class _Mpii(Poses):
    def __init__(self, root: Path, listed: _People, rows: list[int], *, split: str, labels: bool, prepare: Prepare,
                 sigma: float, truth: Truth | None) -> None:
        self.files = [root / "images" / listed.images[i] for i in rows]
        names = [f"images/{listed.images[i]}#{i}" for i in rows]  # several people may be in a picture
        super().__init__([listed.people[i] for i in rows], names, source="mpii", split=split, labels=labels,
                         prepare=prepare, sigma=sigma, truth=None if truth is None else Truth(
                             truth.joints[rows], truth.counted[rows], truth.heads[rows]))

    def picture(self, index: int) -> Image.Image:
        return Image.fromarray(decoded(self.files[index], self._where, rgb=True).numpy())


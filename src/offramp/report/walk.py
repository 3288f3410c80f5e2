"""What every exit of a dense network said of one image, when, and where the network went on; as a value and as files.

H W space of the output, E exits, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.errors import FileFormatError, OfframpError
from offramp.functional.metrics import confusion, iou
from offramp.table.files import read_json, read_tensors, write_tensors

__all__ = ["Shares", "Said", "Walk", "load_walk", "save_walk"]

_FORMAT, _VERSION = "offramp.walk", 1
_EXITS, _CLASSES, _SIDE, _WORDS = 64, 1 << 15, 1 << 14, 400
_PAGE_BYTES, _TENSOR_BYTES = 4 << 20, 1 << 30
"""What a file may hold at most: its sizes are looked at before it is read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Said:
    """What one exit said."""

    name: str
    predictions: Tensor
    """(H, W) int16; below 0 where it says nothing."""
    confidence: Tensor
    """(H, W) float32 in [0, 1]."""
    active: Tensor | None = None
    """(H, W) bool, where the network goes on after it; nothing at the end, and of a network that is not masked."""
    elapsed_ms: float | None = None
    """From the call to this answer."""
    macs: int | None = None
    """From the call to this answer, heads on the way counted."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Of the labelled pixels; together 1."""

    settled_right: float
    settled_wrong: float
    active_right: float
    active_wrong: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Walk:
    """One image on its way through a network with exits; made by :func:`offramp.walk`."""

    name: str
    image: Tensor
    """uint8 (3, h, w)."""
    steps: tuple[Said, ...]
    """By depth."""
    num_classes: int
    label: Tensor | None = None
    """(H, W) int16; what is not in [0, K) is void."""
    class_names: tuple[str, ...] = ()
    measure: str = "top"
    """Which confidence it is."""

    def __post_init__(self) -> None:
        faults = _faults(self)
        if faults:
            raise OfframpError(expected="what the exits said of one image", got="; ".join(faults), where="Walk")

    @property
    def masked(self) -> bool:
        """Whether any exit settles pixels."""
        return any(step.active is not None for step in self.steps)

    @property
    def timed(self) -> bool:
        """Whether it is known when each exit spoke."""
        return all(step.elapsed_ms is not None for step in self.steps)

    def computed(self, k: int) -> Tensor:
        """Where the network ran between exit ``k - 1`` and exit ``k``: (H, W) bool."""
        before = self.steps[k - 1].active if k else None
        return torch.ones_like(self.steps[k].predictions, dtype=torch.bool) if before is None else before

    def goes_on(self, k: int) -> Tensor:
        """Where it is still at work once exit ``k`` has spoken; at the end, where it just ran: (H, W) bool."""
        mine = self.steps[k].active
        return self.computed(k) if mine is None else mine

    def right(self, k: int) -> tuple[Tensor, Tensor] | None:
        """Which pixels are right, and which have a label: (H, W) bool each; nothing without labels."""
        if self.label is None:
            return None
        known = (self.label >= 0) & (self.label < self.num_classes)
        return (self.steps[k].predictions == self.label) & known, known

    def shares(self, k: int) -> Shares | None:
        """Settled and active, right and wrong, of the labelled pixels; nothing where none is labelled."""
        found = self.right(k)
        if found is None or not bool(found[1].any()):
            return None
        (right, known), active = found, self.goes_on(k)
        part = [float((one & known).sum() / known.sum())
                for one in (~active & right, ~active & ~right, active & right, active & ~right)]
        return Shares(settled_right=part[0], settled_wrong=part[1], active_right=part[2], active_wrong=part[3])

    def mean_iou(self, k: int) -> float:
        """Over the classes that occur in this image, in its labels or in what exit ``k`` says; NaN without labels."""
        found = self.right(k)
        if self.label is None or found is None:
            return math.nan
        label, said = self.label.long().where(found[1], -1), self.steps[k].predictions.long()
        # silence is a column of its own: wrong, and no class
        matrix = confusion(said.where(said >= 0, self.num_classes)[None], label[None], self.num_classes + 1)[0]
        return float(iou(matrix)[: self.num_classes].nanmean())


def _faults(walk: Walk) -> list[str]:
    """What does not fit, and what is larger than a picture of it could show."""
    found: list[str] = []
    if not 1 <= len(walk.steps) <= _EXITS or not 1 <= walk.num_classes <= _CLASSES:
        return [f"{len(walk.steps)} exits and {walk.num_classes} classes"]
    size = tuple(walk.steps[0].predictions.shape)
    words = [walk.name, walk.measure, *walk.class_names, *(step.name for step in walk.steps)]
    if any(len(one) > _WORDS for one in words):
        found.append(f"a name of more than {_WORDS} letters")
    if walk.class_names and len(walk.class_names) != walk.num_classes:
        found.append(f"{len(walk.class_names)} names for {walk.num_classes} classes")
    for what, tensor, dtype, shape in (("image", walk.image, torch.uint8, (3, *walk.image.shape[1:])),
                                       ("label", walk.label, torch.int16, size),
                                       *((f"{name} of {step.name!r}", getattr(step, name), dtype, size)
                                         for step in walk.steps for name, dtype in _MAPS.items())):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not all(0 < one <= _SIDE for one in shape[-2:]) \
                or len(shape) != (3 if what == "image" else 2):
            found.append(f"{what}: {tensor.dtype} {tuple(tensor.shape)}, where {dtype} {shape} is meant")
    if found:
        return found
    for step in walk.steps:
        if int(step.predictions.max()) >= walk.num_classes:
            found.append(f"{step.name!r} says class {int(step.predictions.max())} of {walk.num_classes}")
        if not bool(((step.confidence >= 0) & (step.confidence <= 1)).all()):  # nor NaN
            found.append(f"{step.name!r} has confidences that are not in [0, 1]")
    for what in ("elapsed_ms", "macs"):
        values: list[Any] = [getattr(step, what) for step in walk.steps]
        if values == [None] * len(values):
            continue
        numbers = [one for one in values if isinstance(one, int | float) and math.isfinite(one) and one >= 0]
        if len(numbers) != len(values) or sorted(numbers) != numbers:
            found.append(f"{what} {values}, which must rise, known at every exit or at none")
    return found


_MAPS: dict[str, torch.dtype] = {"predictions": torch.int16, "confidence": torch.float32, "active": torch.bool}


def save_walk(walk: Walk, page: Path | str) -> Path:
    """Write a JSON page, and the maps as safetensors beside it; both whole or not at all."""
    page = Path(page)
    tensors = {"image": walk.image, **({} if walk.label is None else {"label": walk.label})}
    told = []
    for k, step in enumerate(walk.steps):
        maps = {name: getattr(step, name) for name in _MAPS}
        tensors |= {f"{k}.{name}": tensor for name, tensor in maps.items() if tensor is not None}
        told.append({"name": step.name, "elapsed_ms": step.elapsed_ms, "macs": step.macs})
    write_tensors(page, {"format": _FORMAT, "version": _VERSION, "name": walk.name, "steps": told,
                         "num_classes": walk.num_classes, "class_names": list(walk.class_names),
                         "measure": walk.measure}, tensors)
    return page


def load_walk(page: Path | str) -> Walk:
    """Read what :func:`save_walk` wrote; runs no code from it.

    FileFormatError where a file is damaged, of another format or version, or larger than any walk.
    """
    page = Path(page)
    try:
        _bounded(page, _PAGE_BYTES)
        record = read_json(page, format=_FORMAT, version=_VERSION)
        named = record.get("tensors")
        if isinstance(named, dict) and isinstance(named.get("file"), str) and Path(named["file"]).name == named["file"]:
            _bounded(page.with_name(named["file"]), _TENSOR_BYTES)
        tensors = read_tensors(page, record)
        told: Sequence[dict[str, Any]] = record["steps"]
        wanted = {"image", "label", *(f"{k}.{name}" for k in range(len(told)) for name in _MAPS)}
        if unknown := set(tensors) - wanted:
            raise OfframpError(expected="the maps of its exits", got=f"also {sorted(unknown)[:3]}", where=str(page))
        if not all(isinstance(one, str) for one in (record["name"], record["measure"], *record["class_names"],
                                                    *(step["name"] for step in told))):
            raise TypeError("a name that is no string")
        return Walk(
            name=record["name"], image=tensors["image"], label=tensors.get("label"), measure=record["measure"],
            num_classes=int(record["num_classes"]), class_names=tuple(record["class_names"]),
            steps=tuple(Said(
                name=step["name"], elapsed_ms=step["elapsed_ms"], macs=step["macs"], active=tensors.get(f"{k}.active"),
                predictions=tensors[f"{k}.predictions"], confidence=tensors[f"{k}.confidence"],
            ) for k, step in enumerate(told)),
        )
    except FileFormatError:
        raise
    except (OfframpError, KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError,
            RecursionError) as error:
        raise FileFormatError(expected=f"an undamaged {_FORMAT}", got=f"{page}: {error}", where="load_walk()",
                              todo="make it again with offramp.walk().") from error


def _bounded(path: Path, most: int) -> None:
    if path.is_file() and path.stat().st_size > most:
        raise FileFormatError(expected=f"at most {most} bytes", got=f"{path}: {path.stat().st_size}",
                              where="load_walk()")

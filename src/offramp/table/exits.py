"""ExitTable: what every exit said about every sample, and what each exit costs.

Axes: N samples, E exits (columns; the last is the backbone itself), K classes, B = 1024 bins, D distances.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.errors import DataError, FileFormatError, OfframpError
from offramp.table.costs import Costs
from offramp.table.files import read_json, read_tensors, write_tensors
from offramp.types import CONFIDENCES, EDGED, HISTOGRAM_BINS, Evidence, ExitColumn, Task

__all__ = ["ExitTable"]

_FORMAT, _VERSION = "offramp.table", 4
# 2: strides of columns, some histograms, agreement or not; 3: widths; 4: distances to borders
_MARKS = ("model", "data", "split")
_TENSORS = {  # name -> axes
    "labels": "N", "logits": "NEK", "confusion": "NEKK", "agreement_confusion": "NEKK", "probs": "NEK",
    "agreement": "NEE", "boundary_pixels": "ND", "boundary_errors": "NED",
}
_DTYPES = {
    "labels": torch.int64, "logits": torch.float32, "confusion": torch.int32, "agreement_confusion": torch.int32,
    "probs": torch.float32, "agreement": torch.float32, "boundary_pixels": torch.int32,
    "boundary_errors": torch.int32,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ExitTable:
    """Memoised evidence of one network on one split; calibration, search and replay read nothing else."""

    task: Task
    columns: tuple[ExitColumn, ...]
    """In order of depth; the last is ``final``."""
    costs: Costs
    split: str
    """Its name: train, calibration, test ..."""
    fingerprints: Mapping[str, str]
    """Of "model", "data" and "split"; tables that differ in the first two are never mixed."""
    labels: Tensor | None = None
    """(N,) int64; classification only, and only where the data has labels."""
    logits: Tensor | None = None
    """Classification: (N, E, K) float32, as the heads gave them."""
    confusion: Tensor | None = None
    """Dense with labels: (N, E, K, K) int32, rows label, columns prediction."""
    agreement_confusion: Tensor | None = None
    """Dense: (N, E, K, K) int32, rows the backbone's prediction, columns the exit's."""
    histograms: Mapping[str, Tensor] = field(default_factory=dict)
    """Dense: for each confidence recorded, of ``CONFIDENCES`` and ``EDGED``, pixel counts (N, E, B) int32."""
    probs: Tensor | None = None
    """Dense: mean pixel probabilities (N, E, K) float32."""
    agreement: Tensor | None = None
    """Dense, where recorded: share of pixels where exits e and i name the same class (N, E, E) float32."""
    boundary_pixels: Tensor | None = None
    """Dense with labels, where recorded: pixels d to d + 1 from the nearest semantic border (N, D) int32, d excluded;
    the last: all beyond. ``functional.distances`` counts them."""
    boundary_errors: Tensor | None = None
    """Those of them that are wrong (N, E, D) int32."""
    class_names: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else a reader should know, as JSON."""

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            tensor = getattr(self, name)
            if tensor is not None:
                object.__setattr__(self, name, tensor.detach().to("cpu", dtype))
        object.__setattr__(self, "histograms", {
            name: counts.detach().to("cpu", torch.int32) for name, counts in self.histograms.items()
        })
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        faults = self._faults()
        if faults:
            raise OfframpError(expected="a consistent table", got="; ".join(faults), where="ExitTable")
        self._refuse_nan()

    # ---- reading ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        tensor = self.logits if self.task == "classify" else self.probs
        assert tensor is not None
        return int(tensor.shape[0])

    @property
    def num_classes(self) -> int:
        """K."""
        tensor = self.logits if self.task == "classify" else self.probs
        assert tensor is not None
        return int(tensor.shape[-1])

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns."""
        return tuple(column.name for column in self.columns)

    @property
    def has_labels(self) -> bool:
        """Whether answers can be held against the truth, and not the backbone alone."""
        return (self.labels if self.task == "classify" else self.confusion) is not None

    def index(self, name: str) -> int:
        """The place of a column."""
        try:
            return self.names.index(name)
        except ValueError:
            raise OfframpError(expected=f"one of the columns {', '.join(self.names)}", got=repr(name),
                               where="ExitTable") from None

    def evidence(self, columns: Sequence[int], rows: Tensor | None = None) -> Evidence:
        """What a policy sees at the last of ``columns``, having passed the others; for all rows or an index of them."""
        chosen = list(columns)

        def take(tensor: Tensor) -> Tensor:
            return tensor[:, chosen] if rows is None else tensor[rows][:, chosen]

        if self.task == "classify":
            assert self.logits is not None
            return Evidence(logits=take(self.logits))
        assert self.probs is not None
        return Evidence(
            probs=take(self.probs), histograms={name: take(counts) for name, counts in self.histograms.items()},
            agreement=None if self.agreement is None else take(self.agreement[:, chosen[-1]]),
        )

    # ---- cutting ----------------------------------------------------------------------------------------------

    def slice(self, rows: Any) -> "ExitTable":
        """Some rows: an index, a mask or a slice. The fingerprint of the split stays: they are its samples."""
        return self._map(lambda tensor, axes: tensor[rows])

    def split_rows(self, shares: Mapping[str, float], *, seed: int = 0) -> dict[str, "ExitTable"]:
        """Cut into disjoint named parts, drawn by ``seed``: ``{"fit": 0.5, "hold": 0.5}``; shares add to at most 1.

        Each part carries its own name and split fingerprint, so that a plan fitted on one can be told from the other.
        """
        if not shares or any(share <= 0 for share in shares.values()) or sum(shares.values()) > 1 + 1e-9:
            raise OfframpError(expected="positive shares that add to at most 1", got=repr(dict(shares)),
                               where="ExitTable.split_rows()")
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(self)))
        edges = [round(edge * len(self)) for edge in np.cumsum([0.0, *shares.values()])]
        parts = {}
        for name, start, stop in zip(shares, edges, edges[1:], strict=False):
            rows = order[start:stop].sort().values
            mark = f"{self.fingerprints['split']}/{name}:{start}-{stop}@{seed}"
            parts[name] = replace(self.slice(rows), split=f"{self.split}/{name}",
                                  fingerprints={**self.fingerprints, "split": mark})
        return parts

    def select(self, names: Sequence[str]) -> "ExitTable":
        """Some columns in order of depth; the backbone's is kept whether named or not."""
        wanted = {self.index(name) for name in names} | {len(self.columns) - 1}
        chosen = sorted(wanted)

        def pick(tensor: Tensor, axes: str) -> Tensor:
            for axis, letter in enumerate(axes):
                if letter == "E":
                    tensor = tensor.index_select(axis, torch.tensor(chosen))
            return tensor

        columns, costs = tuple(self.columns[column] for column in chosen), self.costs.select(chosen)
        tensors, histograms = self._tensors(pick)
        return replace(self, columns=columns, costs=costs, histograms=histograms, **tensors)

    @staticmethod
    def concat(tables: Sequence["ExitTable"]) -> "ExitTable":
        """Join the rows of tables of one network, one data set and the same columns; refuses any others."""
        if not tables:
            raise OfframpError(expected="at least one table", got="none", where="ExitTable.concat()")
        first = tables[0]
        for other in tables[1:]:
            faults = [
                f"{name} {first.fingerprints[name]!r} and {other.fingerprints[name]!r}" for name in ("model", "data")
                if first.fingerprints[name] != other.fingerprints[name]
            ]
            faults += [
                f"different {name}" for name in ("task", "columns", "costs", "class_names")
                if getattr(first, name) != getattr(other, name)
            ]
            faults += [
                f"{name} in one alone" for name in _TENSORS
                if (getattr(first, name) is None) != (getattr(other, name) is None)
            ]
            if set(first.histograms) != set(other.histograms):
                faults.append("different histograms")
            if faults:
                raise OfframpError(expected="tables of one network and one data set", got="; ".join(faults),
                                   where="ExitTable.concat()", todo="record them again with the same network.")
        marks = dict.fromkeys(table.fingerprints["split"] for table in tables)
        joined: dict[str, Any] = {
            name: torch.cat([getattr(table, name) for table in tables]) for name in _TENSORS
            if getattr(first, name) is not None
        }
        return replace(
            first, split="+".join(dict.fromkeys(table.split for table in tables)),
            fingerprints={**first.fingerprints, "split": "+".join(marks)},
            histograms={name: torch.cat([table.histograms[name] for table in tables]) for name in first.histograms},
            **joined,
        )

    # ---- files ------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> Path:
        """Write ``table.json`` and its safetensors into a folder, or ``NAME.json`` where given; returns the page.

        A reader sees the old table or the new one, never a mixture; with no room on the disk the old one stays.
        """
        page = _page(path)
        tensors, histograms = self._tensors(lambda tensor, axes: tensor)
        record = {
            "format": _FORMAT, "version": _VERSION, "task": self.task, "split": self.split, "samples": len(self),
            "columns": [asdict(column) for column in self.columns], "costs": asdict(self.costs),
            "fingerprints": dict(self.fingerprints), "class_names": list(self.class_names), "meta": dict(self.meta),
        }
        write_tensors(page, record, {**tensors, **{f"histogram.{name}": one for name, one in histograms.items()}})
        return page

    @staticmethod
    def load(path: Path | str) -> "ExitTable":
        """Read what ``save`` wrote; raises FileFormatError on a damaged file, one from the future, or another's."""
        page = _page(path)
        record = read_json(page, format=_FORMAT, version=_VERSION)
        tensors = read_tensors(page, record)
        try:
            table = ExitTable(
                task=record["task"], split=record["split"], fingerprints=record["fingerprints"],
                columns=tuple(ExitColumn(**column) for column in record["columns"]),
                costs=Costs.from_json(record["costs"]), class_names=tuple(record["class_names"]), meta=record["meta"],
                histograms={name.removeprefix("histogram."): tensor for name, tensor in tensors.items()
                            if name.startswith("histogram.")},
                **{name: tensor for name, tensor in tensors.items() if not name.startswith("histogram.")},
            )
            if len(table) != record["samples"]:
                raise ValueError(f"{len(table)} samples, {record['samples']} promised")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FileFormatError(expected="a whole table", got=f"{page}: {error}", where="ExitTable.load()",
                                  todo="copy or record it again.") from error
        return table

    # ---- inside -----------------------------------------------------------------------------------------------

    def _tensors(self, change: Callable[[Tensor, str], Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {name: change(getattr(self, name), axes) for name, axes in _TENSORS.items()
                   if getattr(self, name) is not None}
        return tensors, {name: change(counts, "NEB") for name, counts in self.histograms.items()}

    def _map(self, change: Callable[[Tensor, str], Tensor]) -> "ExitTable":
        tensors, histograms = self._tensors(change)
        return replace(self, histograms=histograms, **tensors)

    def _faults(self) -> list[str]:
        faults = []
        if self.task not in ("classify", "dense"):
            return [f"task {self.task!r}"]
        needed = ("logits",) if self.task == "classify" else ("agreement_confusion", "probs")
        classified = ("labels", "logits")
        foreign = [name for name in _TENSORS if name not in classified] if self.task == "classify" else classified
        faults += [f"no {name}" for name in needed if getattr(self, name) is None]
        faults += [f"{name} in a table of task {self.task!r}" for name in foreign if getattr(self, name) is not None]
        if faults:
            return faults
        if self.task == "dense" and not set() < set(self.histograms) <= {*CONFIDENCES, *EDGED}:
            known = ", ".join((*CONFIDENCES, *EDGED))
            faults.append(f"histograms of {sorted(self.histograms)}, not of some of {known}")
        main = self.logits if self.task == "classify" else self.probs
        assert main is not None
        if main.ndim != 3:
            return [*faults, f"{needed[0]} of shape {tuple(main.shape)}, not (N, E, K)"]
        sizes = {"N": main.shape[0], "E": len(self.columns), "K": main.shape[2], "B": HISTOGRAM_BINS,
                 "D": 0 if self.boundary_pixels is None else self.boundary_pixels.shape[-1]}
        axes = {name: axes for name, axes in _TENSORS.items() if getattr(self, name) is not None}
        shapes = [(name, getattr(self, name).shape, letters) for name, letters in axes.items()]
        shapes += [(f"histograms[{name!r}]", counts.shape, "NEB") for name, counts in self.histograms.items()]
        for name, shape, letters in shapes:
            wanted = tuple(sizes[letter] for letter in letters)
            if tuple(shape) != wanted:
                faults.append(f"{name} of shape {tuple(shape)}, not ({', '.join(letters)}) = {wanted}")
        if sum(one is not None for one in (self.boundary_pixels, self.boundary_errors)) == 1:
            faults.append("one of boundary_pixels and boundary_errors without the other")
        if len(self.costs.macs) != sizes["E"]:
            faults.append(f"costs of {len(self.costs.macs)} columns, not {sizes['E']}")
        if (self.costs.widths or (1.0,) * len(self.columns)) != tuple(column.width for column in self.columns):
            faults.append(f"costs of the widths {self.costs.widths}, columns of others")
        if len(set(self.names)) != len(self.names):
            faults.append(f"columns named twice: {', '.join(self.names)}")
        if not self.columns or self.columns[-1].name != "final" or self.columns[-1].width != 1:
            faults.append("a last column that is not 'final' at full width")
        if self.class_names and len(self.class_names) != sizes["K"]:
            faults.append(f"{len(self.class_names)} class names for {sizes['K']} classes")
        faults += [f"no fingerprint of the {name}" for name in _MARKS if not self.fingerprints.get(name)]
        return faults

    def _refuse_nan(self) -> None:
        for name in ("logits", "probs", "agreement"):
            tensor = getattr(self, name)
            if tensor is None or not bool(_broken(tensor).any()):
                continue
            sample, column = _broken(tensor).nonzero()[0, :2].tolist()
            raise DataError(
                expected=f"finite {name}", where="ExitTable",
                got=f"NaN or infinity for sample {sample} at exit {self.names[column]!r}",
                todo="look at that sample's input, and at the exit's head.",
            )


def _broken(tensor: Tensor) -> Tensor:
    # -inf is how a network masks a class; a softmax of it is sound, of +inf it is not
    return tensor.isnan() | (tensor == float("inf"))


def _page(path: Path | str) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / "table.json"


assert set(_TENSORS) | {"histograms"} <= {one.name for one in fields(ExitTable)}

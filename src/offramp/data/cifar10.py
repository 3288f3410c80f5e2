"""CIFAR-10 in the official binary layout (Krizhevsky 2009): records of one label byte and 3,072 pixel bytes."""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.data.base import SPLITS, Prepare, Source, Split, by_hash, existing_folder
from offramp.errors import DataError

__all__ = ["CIFAR10_CLASSES", "Cifar10Split", "cifar10"]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORD_BYTES = 1 + 3 * 32 * 32
LAYOUT = "data_batch_*.bin and test_batch.bin (the binary version of CIFAR-10)"


@final
class Cifar10Split(Split):
    """Records of one or several binary files; ``rows`` picks some of them."""

    def __init__(
        self, files: Sequence[Path], split: str, *, labels: bool, prepare: Prepare, rows: Sequence[int] | None = None
    ) -> None:
        self.source, self.split, self.task = "cifar10", split, "classify"
        self.class_names = CIFAR10_CLASSES
        self.labels, self.prepare = labels, prepare
        records = [_records(file) for file in files]
        names = [f"{f.name}#{i}" for f, r in zip(files, records, strict=True) for i in range(len(r))]
        together = np.concatenate(records) if len(records) > 1 else records[0]
        if rows is not None:
            together, names = together[np.asarray(rows, dtype=np.int64)], [names[i] for i in rows]
        self.names = names
        self.images = torch.from_numpy(np.ascontiguousarray(together[:, 1:])).view(-1, 3, 32, 32)
        """uint8 (N, 3, 32, 32), as in the file."""
        self.targets: Tensor | None = None
        """int64 (N,), None when this split has no labels."""
        if labels:
            self.targets = torch.from_numpy(together[:, 0].astype(np.int64))
            wrong = torch.nonzero(self.targets > 9).flatten().tolist()
            if wrong:
                shown = ", ".join(f"{names[i]} ({int(self.targets[i])})" for i in wrong[:10])
                raise DataError(
                    expected="labels 0 to 9", got=f"{len(wrong)} records with others: {shown}",
                    where=f"cifar10/{split}",
                    todo="check that the files are the 10-class binary version (CIFAR-100 records are longer)",
                )

    @property
    def identity(self) -> Iterable[object]:
        # Contents, not sizes: every file of this layout has the same few sizes. A sum per image is enough to tell them.
        sums = self.images.flatten(1).to(torch.int32).sum(1)
        return [*self.names, *sums.tolist()]

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        return self.images[index], None if self.targets is None else self.targets[index]


def _records(file: Path) -> NDArray[np.uint8]:
    size = file.stat().st_size
    if size == 0 or size % RECORD_BYTES:
        raise DataError(
            expected=f"whole records of {RECORD_BYTES} bytes", got=f"{size} bytes in {file}", where="cifar10",
            todo="fetch the file again: it is empty, cut short, or not of the binary version",
        )
    return np.memmap(file, dtype=np.uint8, mode="r").reshape(-1, RECORD_BYTES)


def _read_splits(file: Path, records: int) -> dict[str, list[int]]:
    try:
        content = json.loads(file.read_text())
        found = {k: [int(i) for i in v] for k, v in content.items() if isinstance(v, list)}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(expected="JSON with a list of record numbers for each split", got=str(error), where=str(file),
                        todo="mend the file, or remove it to have test_batch.bin cut by a fixed rule") from error
    seen: dict[int, str] = {}
    for split, rows in found.items():
        for row in rows:
            if not 0 <= row < records:
                raise DataError(expected=f"record numbers from 0 to {records - 1}", got=f"{row} in {split!r}",
                                where=str(file), todo="use the splits.json that was made for this test_batch.bin")
            if row in seen:
                raise DataError(expected="disjoint splits", got=f"record {row} in {seen[row]!r} and {split!r}",
                                where=str(file), todo="give each record to one split")
            seen[row] = split
    return found


def cifar10(path: str | Path, *, prepare: Prepare | None = None) -> Source:
    """Read a folder that holds the binary files, or holds them in ``cifar-10-batches-bin``.

    ``train`` is every ``data_batch_*.bin``. ``test_batch.bin`` is cut by ``splits.json`` (lists of record numbers for
    unlabelled, calibration and test, beside the files or one folder up) where there is one, else into 30 % calibration
    and 70 % test, dealt by a hash of the record number: images that a pretrained network has seen cannot calibrate it.
    """
    folder = existing_folder(path, "cifar10", LAYOUT)
    inner = folder / "cifar-10-batches-bin"
    folder = inner if inner.is_dir() else folder
    batches, tests = sorted(folder.glob("data_batch_*.bin")), sorted(folder.glob("test_batch.bin"))
    if not batches and not tests:
        hint = "this is the Python version; " if (folder / "data_batch_1").exists() else ""
        raise DataError(expected=LAYOUT, got=f"none of them in {folder}", where="cifar10",
                        todo=f"{hint}fetch cifar-10-binary.tar.gz, or give the folder that holds the .bin files")
    rows: dict[str, list[int]] = {}
    if tests:
        records = len(_records(tests[0]))
        beside = [f for f in (folder / "splits.json", folder.parent / "splits.json") if f.is_file()]
        rows = _read_splits(beside[0], records) if beside else by_hash(
            [f"{i}" for i in range(records)], {"calibration": 3, "test": 7})

    def make(split: str, labels: bool, prepared: Prepare) -> Split:
        labels = labels and split != "unlabelled"
        if split in rows:
            return Cifar10Split(tests, split, labels=labels, prepare=prepared, rows=rows[split])
        return Cifar10Split(batches, split, labels=labels, prepare=prepared)

    in_batches = ("train", "unlabelled") if batches else ()
    names = [s for s in SPLITS if s in rows or s in in_batches]
    return Source(
        name="cifar10", task="classify", class_names=CIFAR10_CLASSES, prepare=prepare or Prepare(),
        make={s: partial(make, s) for s in names},
        unlabelled_is_train="unlabelled" not in rows,
    )

"""What a loader or a dataset gives, brought to one form, in an order that follows from a seed and the epoch alone."""

import random
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from torch.utils.data.distributed import DistributedSampler

from offramp.errors import DataError

__all__ = ["Batch", "Loader", "Rows", "Source", "read_batch", "rng_kept", "seed_all", "source_of"]

LABEL_KEYS = ("labels", "label", "targets", "target")


@dataclass(frozen=True)
class Batch:
    """Inputs as the network takes them, and labels where a recipe wants them."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    teacher: Tensor | None = None
    """With cached features: the backbone's own logits; ``args`` are then the frontiers, one tuple a site."""

    def __len__(self) -> int:
        return len(self._first())

    def _first(self) -> Tensor:
        for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))):
            if isinstance(leaf, Tensor) and leaf.ndim:
                return leaf
        raise DataError(expected="a tensor among the inputs of a batch", got="none", where="a batch",
                        todo="let the loader give Tensor, (inputs, labels), (inputs,) or a dict of tensors")

    def map(self, function: Any) -> "Batch":
        """The function applied to every tensor."""
        def each(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = pytree.tree_map(each, (self.args, dict(self.kwargs)))
        labels = None if self.labels is None else function(self.labels)
        teacher = None if self.teacher is None else function(self.teacher)
        return replace(self, args=args, kwargs=kwargs, labels=labels, teacher=teacher)

    def rows(self, part: slice) -> "Batch":
        return self.map(lambda tensor: tensor[part] if tensor.ndim else tensor)


def read_batch(batch: Any, *, labels: bool) -> Batch:
    """Tensor, (inputs, labels, ...), (inputs,) or dict -> Batch; labels that are not wanted are dropped unread.

    A dict's labels are under ``labels``, ``label``, ``targets`` or ``target``; all else goes to the network by name.

    >>> len(read_batch((torch.zeros(3, 2), "never read"), labels=False))
    3
    """
    found: Any = None
    if isinstance(batch, list | tuple):
        if not batch:
            raise DataError(expected="(inputs, labels), (inputs,) or a tensor", got="an empty tuple", where="a batch")
        if len(batch) > 1 and labels:
            found = batch[1]
        batch = batch[0]
    if isinstance(batch, Mapping):
        if labels and found is None:
            found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
        made = Batch(kwargs={key: batch[key] for key in batch if key not in LABEL_KEYS})
    else:
        made = Batch(args=tuple(batch) if isinstance(batch, list | tuple) else (batch,))
    if not labels:
        return made
    if not isinstance(found, Tensor):
        got = "none" if found is None else type(found).__name__
        raise DataError(expected="a tensor of labels in every batch", got=got, where="a recipe that learns from labels",
                        todo="give batches (inputs, labels), or use recipes.label_free(), which reads none")
    return replace(made, labels=found)


class Source(Protocol):
    """Batches of an epoch, grouped into windows of one optimiser step each."""

    @property
    def count(self) -> int:
        """Samples of an epoch, at most."""
        ...

    def steps(self, accumulate: int) -> int:
        """Windows of an epoch."""
        ...

    def windows(self, epoch: int, accumulate: int, start: int) -> Iterator[list[Batch]]:
        """The epoch's windows from number ``start`` on."""
        ...

    def sweep(self) -> Iterator[Batch]:
        """Everything once."""
        ...


class Rows:
    """A map-style dataset; it alone is asked for items, and labels that are not wanted are never collated."""

    def __init__(self, dataset: Dataset[Any], *, batch_size: int, labels: bool, seed: int) -> None:
        self.dataset, self.batch_size, self.labels, self.seed = dataset, batch_size, labels, seed
        self.count = len(cast(Sized, dataset))

    def steps(self, accumulate: int) -> int:
        return -(-self.count // (self.batch_size * accumulate))

    def windows(self, epoch: int, accumulate: int, start: int) -> Iterator[list[Batch]]:
        windows = index_windows(self.count, self.batch_size, accumulate, self.seed, epoch, start)
        for number, window in enumerate(windows, start):
            seed_all(self.seed, 0, epoch, number)  # for datasets that augment
            yield [self.read(rows.tolist()) for rows in window]

    def sweep(self) -> Iterator[Batch]:
        for first in range(0, self.count, self.batch_size):
            yield self.read(range(first, min(first + self.batch_size, self.count)))

    def read(self, rows: Sequence[int]) -> Batch:
        items = [self.dataset[row] for row in rows]
        if not self.labels:  # before default_collate, which would look at them
            items = [_without_labels(item) for item in items]
        return read_batch(default_collate(items), labels=self.labels)


def _without_labels(item: Any) -> Any:
    if isinstance(item, list | tuple):
        item = item[0]
    return {k: item[k] for k in item if k not in LABEL_KEYS} if isinstance(item, Mapping) else (item,)


class Loader:
    """A DataLoader, or anything with a length that gives batches; every process must see the same ones."""

    def __init__(self, loader: Any, *, labels: bool, seed: int) -> None:
        if isinstance(getattr(loader, "sampler", None), DistributedSampler):
            raise DataError(
                expected="a loader that gives every process the same batches", got="a DistributedSampler",
                where="fit()", todo="drop the sampler: fit gives each process its share of every batch",
            )
        self.loader, self.labels, self.seed = loader, labels, seed
        self.batches = len(loader)
        size = getattr(loader, "batch_size", None)
        rows = getattr(loader, "dataset", None)
        if size:
            self.count = self.batches * size
        elif isinstance(rows, Sized):
            self.count = len(rows)
        else:
            self.count = sum(len(batch) for batch in self.sweep())

    def steps(self, accumulate: int) -> int:
        return -(-self.batches // accumulate)

    def windows(self, epoch: int, accumulate: int, start: int) -> Iterator[list[Batch]]:
        for holder in (self.loader, getattr(self.loader, "sampler", None)):
            if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
                generator.manual_seed(_mix(self.seed, 0, epoch))
        window: list[Batch] = []
        seed_all(self.seed, 0, epoch, 0)
        batches = iter(self.loader)
        for number in range(self.batches):
            seed_all(self.seed, 0, epoch, number)  # a loader that shuffles draws its order with the first batch
            batch = next(batches)
            if number < start * accumulate:
                continue
            window.append(read_batch(batch, labels=self.labels))
            if len(window) == accumulate or number == self.batches - 1:
                yield window
                window = []

    def sweep(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield read_batch(batch, labels=self.labels)


def source_of(data: Any, *, batch_size: int, labels: bool, seed: int, where: str = "fit()") -> Source:
    """A dataset or a loader as a Source; DataError when it is empty or has no length."""
    made: Source
    sized = isinstance(data, Sized)
    if sized and isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        made = Rows(data, batch_size=batch_size, labels=labels, seed=seed)
    elif sized and (isinstance(data, DataLoader) or hasattr(data, "__iter__")):
        made = Loader(data, labels=labels, seed=seed)
    else:
        raise DataError(expected="a dataset or a loader with a length", got=type(data).__name__, where=where,
                        todo="pass a map-style Dataset, a DataLoader over one, or a list of batches")
    if made.count == 0:
        raise DataError(expected="at least one sample", got="an empty dataset", where=where)
    return made


def index_windows(
    count: int, batch_size: int, accumulate: int, seed: int, epoch: int, start: int
) -> Iterator[list[Tensor]]:
    """Shuffled indices of an epoch, in windows of ``accumulate`` batches, from window ``start`` on."""
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    batches = torch.split(torch.randperm(count, generator=generator), batch_size)
    for first in range(start * accumulate, len(batches), accumulate):
        yield list(batches[first : first + accumulate])


def _mix(*parts: int) -> int:
    return int(np.random.SeedSequence([part % 2**32 for part in parts]).generate_state(1)[0])


def seed_all(*parts: int) -> None:
    """Seed torch's, numpy's and Python's global generators with a mixture of the numbers."""
    mixed = _mix(*parts)
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)


@contextmanager
def rng_kept() -> Iterator[None]:
    """Leave the global generators as found."""
    kept = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])

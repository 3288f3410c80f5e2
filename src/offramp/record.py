"""The bridge: run a network with exits over data once, and memoise what every exit says and costs.

N samples, n rows of a batch, E exits, K classes, H W space.
"""

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset

from offramp.cost.latency import describe_machine
from offramp.errors import DataError
from offramp.functional.confidence import read
from offramp.functional.distances import count_by_distance, distance_bins
from offramp.functional.metrics import confusion
from offramp.functional.poses import check_says
from offramp.functional.summaries import agreement, summarise
from offramp.graph import State
from offramp.nn.guest import bytes_of, evaluating, fingerprint_of
from offramp.nn.masked import Masked
from offramp.nn.multiexit import MultiExit, columns_at
from offramp.nn.slim import Slimmable
from offramp.nn.widths import exits_of
from offramp.prices import Inputs, price
from offramp.table import Costs, ExitTable
from offramp.types import CONFIDENCES, EDGED

__all__ = ["MASKED_END", "model_fingerprint", "record"]

MASKED_END = "masked end"
"""The column of a masked network's own end, where the last one is the untouched network; no module has such a name."""

_LABEL_KEYS = ("labels", "label", "targets", "target")
_FEW = 16  # columns, up to which a dense table holds all that any policy may read


def record(
    net: MultiExit | Slimmable | Masked,
    loader: Any,
    *,
    split: str = "calibration",
    device: torch.device | str | None = None,
    latency: bool | Mapping[str, Any] = True,
    batch_size: int = 32,
    class_names: Sequence[str] = (),
    confidences: Sequence[str] | None = None,
    agreement: bool | None = None,
    boundary_errors: bool = True,
    untouched: bool = False,
    progress: bool = False,
) -> ExitTable:
    """Memoise every exit's answer on every sample of a split, and what each exit costs.

    The network runs in eval mode and comes back as found; labels are kept where the data has them, and never needed.
    One of several widths runs at each: columns of a narrower one end in its width, ``final@0.5``, and come first.
    One that is masked (:func:`offramp.mask_`) runs with its masks on. A table has no cost of single samples, so each
    column's ``macs`` are the mean of ``masked.macs`` over the split, heads on the way included, since its mask is
    theirs; ``head_macs`` are 0. What it simulates is never timed.

    loader: anything that yields batches (a tensor, ``(inputs, labels)``, ``(inputs,)`` or a dict with or without
        ``labels``), or a ``Dataset``, which is then read in batches of ``batch_size``.
    split: its name in the table. A policy fitted on a split must be reported on another.
    device: where to run; the network is moved there and back. Nothing: where its parameters are.
    latency: whether to time exits on this machine; a dict sets ``batches`` (default ``(1,)``), and for
        each of them ``repeats`` (15) and ``budget_s`` (5).
    confidences: dense: whose histograms are kept, of "top", "margin", "entropy", "top_edges" and "entropy_edges", at
        4 KiB a sample, exit and confidence. Nothing: all, or "top" alone of a network with more than 16 columns.
    agreement: dense: whether the table says on what share of an image's pixels any two exits agree, which some policies
        read. Nothing: up to 16 columns. That each agrees with the backbone is always known.
    boundary_errors: dense with labels: whether the table says how far wrong pixels lie from the nearest semantic border
        (SlimSeg, Fig. 3): 0.15 us a labelled pixel on one core and 124 bytes a sample and exit.
    untouched: of a masked network: whether it runs without masks too. The last column, which others are held against,
        is then the network without masks and exits, and what it says with masks at its end the column before,
        ``masked end``. Which of them costs more hangs on the masks.

    DataError names the sample and the exit where logits are NaN or infinite, and data that is empty or does not fit.
    """
    check_says(loader, "classes", "record()")
    batches = _batches(loader, batch_size)
    home = next((p.device for p in net.parameters()), torch.device("cpu"))
    target = torch.device(device) if device is not None else home
    options = dict(latency) if isinstance(latency, Mapping) else {}
    run = _Run(net, untouched)
    few = len(run.columns) <= _FEW
    kept = ((*CONFIDENCES, *EDGED) if few else ("top",)) if confidences is None else tuple(confidences)
    collected = _Collected(run, split, kept, few if agreement is None else agreement, boundary_errors)
    try:
        net.to(target)
        with evaluating(net):
            for batch in _shown(batches, progress, f"recording {split}"):
                collected.add(_to(batch, target))
            if collected.first is None:
                raise DataError(expected=f"at least one sample in the split {split!r}", got="none", where="record()",
                                todo="look at the loader.")
            timed = latency is not False and not isinstance(net, Masked)
            costs = collected.priced(price(run.net, collected.first, target, options if timed else None))
    finally:
        net.to(home)
    dataset = loader if isinstance(loader, Dataset) else getattr(loader, "dataset", None)
    names = tuple(class_names) or tuple(getattr(dataset, "class_names", ()))
    source = getattr(dataset, "source", type(dataset).__name__ if dataset is not None else "data")
    return collected.table(
        costs=costs, class_names=names if len(names) == run.exits.num_classes else (), source=str(source),
        model=model_fingerprint(net), meta={"machine": describe_machine(), "device": str(target)} | run.masks(),
    )


def model_fingerprint(net: MultiExit | Slimmable | Masked) -> str:
    """The ``model`` of a network's table. Masks are part of a masked network, and no part of its weights."""
    if not isinstance(net, Masked):
        return fingerprint_of(exits_of(net))
    return hashlib.sha256(f"{fingerprint_of(net)}:{net.rule}".encode()).hexdigest()[:16]


class _Run:
    """A network at each of its widths, the full one first, whose answer the others are held against."""

    def __init__(self, net: MultiExit | Slimmable | Masked, untouched: bool = False) -> None:
        self.masked = net if isinstance(net, Masked) else None
        self.net = net.net if isinstance(net, Masked) else net
        self.exits = exits_of(self.net)
        self.widths = net.widths if isinstance(net, Slimmable) else (1.0,)
        self.columns = columns_at(self.exits.columns, self.widths)
        self.untouched = untouched and self.masked is not None
        if self.untouched:
            *early, last = self.columns
            self.columns = (*early, replace(last, name=MASKED_END, site=MASKED_END), last)
        self.macs: list[Tensor] = []
        """Of a masked network, (n, E) a batch."""

    def masks(self) -> dict[str, str]:
        return {} if self.masked is None else {"masks": self.masked.extra_repr()}

    def said(self, width: float, batch: Inputs) -> tuple[Sequence[State | Tensor], Tensor]:
        """The state at each site (of a masked network its logits), and the logits of the end."""
        masked: list[Tensor] = []
        if self.masked is not None:
            answers, macs = self.masked.counted(*batch.args, **batch.kwargs)
            self.macs.append(macs)
            masked = answers.logits
            if not self.untouched:
                return masked[:-1], masked[-1]
        with self.net.at(width) if isinstance(self.net, Slimmable) else nullcontext():
            state: Any = self.exits.begin(*batch.args, **batch.kwargs)
            states = []
            for stage in self.exits.stages[:-1]:
                state = stage(state)
                states.append(state)
            return masked or states, self.exits.logits(self.exits.stages[-1](state))

    def heads(self, width: float, states: Sequence[State | Tensor]) -> Iterator[Tensor]:
        """Early exits' logits, one at a time: no name here holds any while the next are made."""
        with self.net.at(width) if isinstance(self.net, Slimmable) else nullcontext():
            for k, state in enumerate(states):
                if isinstance(state, Tensor):
                    yield state
                    continue
                for c in self.exits.columns_at(k):
                    yield self.exits.head(self.exits.columns[c].name)(*state.tensors)


@dataclass
class _Collected:
    """What has been said so far; becomes the table."""

    run: _Run
    split: str
    confidences: tuple[str, ...]
    agreement: bool
    boundary_errors: bool
    first: Inputs | None = None
    count: int = 0
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    labelled: bool | None = None
    digest: Any = field(default_factory=hashlib.sha256)
    kind: str = ""

    def add(self, batch: Inputs) -> None:
        tensors = batch.tensors()
        if not tensors:
            raise DataError(expected="a tensor among the inputs of a batch", got="none", where="record()",
                            todo="let the loader give a tensor, (inputs, labels), (inputs,) or a dict of tensors.")
        if len(tensors[0]) == 0:
            return
        if self.first is None:
            self.first, self.kind = batch, ",".join(f"{tuple(t.shape[1:])}{t.dtype}" for t in tensors)
        for row in range(len(tensors[0])):  # all inputs of a sample together, so that the batch size does not matter
            for tensor in tensors:
                if len(tensor) == len(tensors[0]):
                    self.digest.update(bytes_of(tensor[row]))
        self.labelled = batch.labels is not None if self.labelled is None else self.labelled
        if self.labelled != (batch.labels is not None):
            raise DataError(expected="labels in every batch or in none", got="both",
                            where=f"record(), sample {self.count}")
        # the backbone first: then each head's logits can be held against its answer, and forgotten
        states, final = self.run.said(1.0, batch)
        truth, count, size = batch.labels, len(final), tuple(final.shape[2:])
        if truth is not None and tuple(truth.shape) != (count, *size):
            raise DataError(expected=f"labels {(count, *size)}{', as large as the logits' if size else ''}",
                            got=str(tuple(truth.shape)), where=f"record(), sample {self.count}",
                            todo="bring labels to the output's size (nearest), or drop them." if size else "")
        told = read(final, (), labels=True).labels if self.run.exits.task == "dense" else None
        bins: Tensor | None = None
        if told is not None and truth is not None and self.boundary_errors:
            bins = distance_bins(truth, self.run.exits.num_classes)
            self._keep(boundary_pixels=count_by_distance(bins))
        passed: list[Tensor] = []
        found: dict[str, list[Tensor]] = {}

        def take(logits: Tensor) -> None:
            c = len(found.get("logits" if told is None else "probs", ()))
            self._check(c, logits, tuple(final.shape))
            said = {"logits": logits.float()} if told is None else self._dense(c, logits, told, truth, bins, passed)
            for name, tensor in said.items():
                found.setdefault(name, []).append(tensor.cpu())

        for width in self.run.widths[:-1]:
            narrow, end = self.run.said(width, batch)
            deque(map(take, self.run.heads(width, narrow)), maxlen=0)
            take(end)
        deque(map(take, self.run.heads(1.0, states)), maxlen=0)
        take(final)
        self._keep(**{name: torch.stack(parts, dim=1) for name, parts in found.items()})
        if passed:
            self._keep(agreement=torch.stack(
                [torch.stack([agreement(one, other) for other in passed], dim=1) for one in passed], dim=1))
        if told is None and truth is not None:
            self._keep(labels=truth.long())
        self.count += count

    def priced(self, costs: Costs) -> Costs:
        """Of a masked network, at what its samples cost in the mean."""
        if self.run.masked is None:
            return costs
        means = torch.cat(self.run.macs).double().mean(0).round()
        macs = tuple(map(int, means.tolist()))
        if not self.run.untouched:
            return replace(costs, macs=macs, head_macs=(0,) * len(macs))
        *_, last = range(len(macs))
        return replace(costs.select([*range(len(macs)), last]), macs=(*macs, costs.macs[-1]),
                       head_macs=(0,) * (len(macs) + 1))

    def _check(self, column: int, logits: Tensor, wanted: tuple[int, ...]) -> None:
        name = self.run.columns[column].name
        if tuple(logits.shape) != wanted:
            raise DataError(
                expected=f"logits {wanted}, as the backbone's own", got=str(tuple(logits.shape)),
                where=f"record(), exit {name!r}", todo="let the head end with an interpolation to the output's size.",
            )
        if math.isfinite(float(logits.sum())):  # no sum swallows NaN or infinity; what overflowed is looked at closely
            return
        good = torch.isfinite(logits).flatten(1).all(dim=1)
        if not bool(good.all()):
            raise DataError(
                expected="finite logits", got="NaN or infinity",
                where=f"record(), sample {self.count + int((~good).nonzero()[0])}, exit {name!r}",
                todo="look at that sample's input, and at the exit's head.",
            )

    def _keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.parts.setdefault(name, []).append(tensor.cpu())

    def _dense(self, c: int, logits: Tensor, told: Tensor, labels: Tensor | None, bins: Tensor | None,
               passed: list[Tensor]) -> dict[str, Tensor]:
        column, classes = self.run.columns[c], self.run.exits.num_classes
        one = summarise(logits, confidences=self.confidences, stride=column.stride)
        if self.agreement:
            passed.append(one.labels)
        said = {"probs": one.probs, "agreement_confusion": confusion(one.labels, told, classes)}
        if labels is not None:
            said["confusion"] = confusion(one.labels, labels, classes)
            if bins is not None:
                said["boundary_errors"] = count_by_distance(bins, one.labels != labels)
        return {**said, **{f"histogram.{name}": counts for name, counts in one.histograms.items()}}

    def table(self, *, costs: Costs, class_names: tuple[str, ...], model: str, source: str,
              meta: Mapping[str, Any]) -> ExitTable:
        joined = {name: torch.cat(parts) for name, parts in self.parts.items()}
        histograms = {name[10:]: joined.pop(name) for name in list(joined) if name.startswith("histogram.")}
        data = hashlib.sha256(f"{source}:{self.kind}".encode()).hexdigest()[:16]
        return ExitTable(
            task=self.run.exits.task, columns=self.run.columns, costs=costs, split=self.split, class_names=class_names,
            fingerprints={"model": model, "data": data, "split": f"{self.split}:{self.digest.hexdigest()[:16]}"},
            histograms=histograms, meta=meta, **joined,
        )


def _batches(loader: Any, batch_size: int) -> Iterable[Any]:
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        return DataLoader(loader, batch_size=batch_size)
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise DataError(expected="a loader that yields batches, or a Dataset", got=type(loader).__name__,
                        where="record()", todo="wrap it: record(net, [batch]) records a single batch.")
    return loader


def _to(batch: Any, device: torch.device) -> Inputs:
    labels = None
    if isinstance(batch, list | tuple):
        if not batch:
            raise DataError(expected="(inputs, labels), (inputs,) or a tensor", got="an empty tuple", where="record()")
        labels = batch[1] if len(batch) > 1 else None
        batch = batch[0]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        if labels is None:
            labels = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
        kwargs = {key: value for key, value in batch.items() if key not in _LABEL_KEYS}
    else:
        args = tuple(batch) if isinstance(batch, list | tuple) else (batch,)

    def move(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    args, kwargs = pytree.tree_map(move, (args, kwargs))
    return Inputs(args, kwargs, move(labels) if isinstance(labels, Tensor) else None)


def _shown(batches: Iterable[Any], progress: bool, what: str) -> Iterator[Any]:
    if not progress:
        yield from batches
        return
    from rich.progress import track

    total = len(batches) if isinstance(batches, Sized) else None
    yield from track(batches, description=what, total=total)

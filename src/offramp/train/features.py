"""The frozen network's frontiers and answers, computed once and kept on disk: all heads then train without the trunk.

Axes: N samples, V views. Features are fp16 (integers as they are), the teacher's logits fp32, as plain ``.npy`` files
that are mapped, not read. The folder is complete or absent: it is written under another name and renamed.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.errors import DataError
from offramp.train.augment import changed
from offramp.train.batches import Batch, Source, index_windows, seed_all
from offramp.train.recipe import Recipe

if TYPE_CHECKING:
    from offramp.nn.multiexit import MultiExit

__all__ = ["Features", "Refused", "collect", "frontiers", "module_fingerprint"]

VERSION = 2
KEYS = ("views", "augment", "augment_pair", "seed", "loss_stride")
FP16_LARGEST = float(torch.finfo(torch.float16).max)


class Refused(Exception):
    """Why nothing was cached; training then runs the trunk in every pass."""


@dataclass(frozen=True)
class Features:
    """Cached frontiers of every site: a ``Source`` whose batches hold them instead of inputs."""

    tensors: tuple[tuple[Tensor, ...], ...]
    """Per site, per live tensor: (V * N, ...), view by view."""
    teacher: Tensor
    """(V * N, K, ...) float32; on the grid of a recipe's ``loss_stride``, as labels are."""
    count: int
    """N."""
    batch_size: int
    seed: int
    labels: Tensor | None = None
    """(V * N, ...) int16, for recipes that read them."""

    @property
    def views(self) -> int:
        return len(self.teacher) // self.count

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*(t for site in self.tensors for t in site), self.teacher))

    def steps(self, accumulate: int) -> int:
        return -(-self.count // (self.batch_size * accumulate))

    def windows(self, epoch: int, accumulate: int, start: int) -> Iterator[list[Batch]]:
        views = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        view_N = torch.randint(self.views, (self.count,), generator=views)
        for window in index_windows(self.count, self.batch_size, accumulate, self.seed, epoch, start):
            yield [self.read(rows + view_N[rows] * self.count) for rows in window]

    def sweep(self) -> Iterator[Batch]:
        for rows in torch.split(torch.arange(self.count), self.batch_size):
            yield self.read(rows)

    def read(self, rows: Tensor) -> Batch:
        # In order of place: neighbours on disk are read together, and the order within a batch means nothing.
        rows = rows.sort().values.to(self.teacher.device)
        return Batch(args=tuple(tuple(_take(t, rows) for t in site) for site in self.tensors),
                     teacher=self.teacher.index_select(0, rows),
                     labels=None if self.labels is None else self.labels.index_select(0, rows).long())

    def map(self, function: Callable[[Tensor], Tensor]) -> "Features":
        """The function applied to every tensor."""
        return replace(self, tensors=tuple(tuple(map(function, site)) for site in self.tensors),
                       teacher=function(self.teacher), labels=None if self.labels is None else function(self.labels))

    def rows(self, rows: Tensor, count: int) -> "Features":
        """Some of the rows, in memory: ``count`` samples, view by view."""
        return replace(self.map(lambda t: t.index_select(0, rows)), count=count)

    def site(self, k: int) -> "Features":
        """One site's alone."""
        return replace(self, tensors=(self.tensors[k],))

    def to(self, device: torch.device) -> "Features":
        """On the device, where a third of its free memory holds them; else as they are."""
        if device.type != "cuda" or self.nbytes * 3 > torch.cuda.mem_get_info(device)[0]:
            return self
        return self.map(lambda t: t.to(device))


def _take(tensor: Tensor, rows: Tensor) -> Tensor:
    taken = tensor.index_select(0, rows)
    if not taken.is_floating_point():
        return taken
    # Convolutions and norms of narrow maps are up to half as fast again with channels last.
    return taken.float().contiguous(memory_format=torch.channels_last) if taken.ndim == 4 else taken.float()


def frontiers(net: "MultiExit", batch: Batch) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    """Live tensors at every site and the backbone's logits; no head runs."""
    state, seen = net.begin(*batch.args, **batch.kwargs), []
    for stage in net.stages[:-1]:
        state = stage(state)
        seen.append(tuple(state.tensors))
    return seen, net.logits(net.stages[-1](state))


def grid(logits: Tensor, stride: int) -> list[int]:
    """Where losses are computed: the size of maps, so many times coarser; nothing for logits (N, K)."""
    return [max(1, round(size / stride)) for size in logits.shape[2:]]


def logits_on(size: list[int], logits: Tensor) -> Tensor:
    """Logits (N, K, H, W) in float32 on a grid of that size, bilinearly."""
    if list(logits.shape[2:]) == size:
        return logits.float()
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


def labels_on(size: list[int], labels: Tensor) -> Tensor:
    """Labels (N, H, W) on a grid of that size, each of the pixel at its middle; DataError for what is no class."""
    if labels.is_floating_point():
        raise DataError(expected="labels that are classes, whole numbers", got=f"{labels.dtype} {tuple(labels.shape)}",
                        where="fit()", todo="heatmaps are learnt by recipes.anytime(says='heatmaps')")
    if list(labels.shape[1:]) == size:
        return labels
    rows, columns = [((torch.arange(goal, device=labels.device) + 0.5) * now / goal).long()
                     for goal, now in zip(size, labels.shape[1:], strict=True)]
    return labels[:, rows[:, None], columns]


def collect(
    net: "MultiExit", source: Source, recipe: Recipe, *, folder: Path, limit_bytes: int, device: torch.device
) -> Features:
    """Run the frozen network over the source, ``recipe.views`` times, into ``folder``; or reuse what lies there.

    Refused when it would be larger than ``limit_bytes``, when shapes differ from batch to batch, or when features do
    not fit fp16. DataError when the disk is too full (before anything is written), or on answers that are not numbers.
    """
    if recipe.augmented and recipe.views == 1:
        raise Refused("an augmentation without views is drawn anew in every pass")
    key = {"version": VERSION, "backbone": module_fingerprint(net.backbone), "sites": [site.name for site in net.sites],
           "rows": source.count, "recipe": {k: recipe.to_json()["data"][k] for k in KEYS}}
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    if (folder / "meta.json").is_file():
        meta = json.loads((folder / "meta.json").read_text())
        seed_all(recipe.seed, 0)
        if meta["key"] == key and meta["first"] == _digest(next(iter(source.sweep()))):
            return _open(folder, meta, recipe)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        meta = {"key": key, **_write(net, source, recipe, part, limit_bytes, device)}
        (part / "meta.json").write_text(json.dumps(meta))
        part.rename(folder)
    except OSError as error:
        raise DataError(expected="room and leave to write features", got=str(error), where=str(folder),
                        todo="free some space, give another run_dir, or cache_bytes=0 to run without") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return _open(folder, meta, recipe)


def _write(
    net: "MultiExit", source: Source, recipe: Recipe, part: Path, limit_bytes: int, device: torch.device
) -> dict[str, Any]:
    files: list[list[Any]] = []
    counts: list[int] = []
    first = ""
    total = 0
    for view in range(recipe.views):
        done = 0
        seed_all(recipe.seed, view)
        for number, batch in enumerate(source.sweep()):
            seed_all(recipe.seed, view, number)
            first = first or _digest(batch)
            batch = batch.map(lambda t: t.to(device))
            if view or recipe.augment_pair is not None:
                batch = changed(batch, recipe)
            with torch.no_grad():
                sites, teacher = frontiers(net, batch)
            if not torch.isfinite(teacher).all():
                todo = "check that the inputs are finite and scaled as the network expects"
                raise DataError(expected="finite logits from the backbone", got="NaN or infinity",
                                where=f"batch {number}", todo=todo)
            size = grid(teacher, recipe.loss_stride)
            teacher = logits_on(size, teacher)
            rows = [[_shrink(t) for t in site] for site in sites] + [[teacher.float().cpu()]]
            if batch.labels is not None:
                rows.append([labels_on(size, batch.labels).short().cpu()])
            if not files:
                total = _check_room(rows, source.count * recipe.views, limit_bytes, part)
                files = _create(rows, source.count * recipe.views, part, len(sites))
            upto = done + len(teacher)
            for held, new in zip(files, rows, strict=True):
                for file, tensor in zip(held, new, strict=True):
                    if file.shape[1:] != tuple(tensor.shape[1:]):
                        now = tuple(tensor.shape[1:])
                        raise Refused(f"shapes differ: {file.shape[1:]}, then {now} in batch {number}")
                    file[sum(counts) + done : sum(counts) + upto] = tensor.numpy()
            done = upto
        counts.append(done)
        if len(set(counts)) > 1:
            raise DataError(expected=f"{counts[0]} samples in each pass", got=str(done), where="the loader")
    for held in files:
        for file in held:
            file.flush()
    return {"count": counts[0], "first": first, "bytes": total, "tensors": [len(held) for held in files[: len(sites)]],
            "labels": batch.labels is not None}


def _shrink(tensor: Tensor) -> Tensor:
    tensor = tensor.cpu()
    if not tensor.is_floating_point():
        return tensor
    if float(tensor.abs().max()) > FP16_LARGEST:
        raise Refused(f"features reach {float(tensor.abs().max()):.3g}, more than fp16 holds")
    return tensor.half()


def _check_room(rows: Sequence[Sequence[Tensor]], count: int, limit_bytes: int, part: Path) -> int:
    total = count * sum(t[0].nbytes for held in rows for t in held)
    if total > limit_bytes:
        raise Refused(f"features of {count} passes need {total / 2**30:.2f} GiB, more than the "
                      f"{limit_bytes / 2**30:.2f} GiB of cache_bytes")
    part.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(part.parent).free
    if total * 1.02 > free:
        raise DataError(expected=f"{total / 2**30:.2f} GiB of free disk for features", got=f"{free / 2**30:.2f} GiB",
                        where=str(part.parent), todo="free some space, give another run_dir, or cache_bytes=0")
    return total


def _create(rows: Sequence[Sequence[Tensor]], count: int, part: Path, sites: int) -> list[list[Any]]:
    part.mkdir(parents=True)
    return [
        [np.lib.format.open_memmap(part / _name(k, j, sites), mode="w+", dtype=tensor.numpy().dtype,
                                   shape=(count, *tensor.shape[1:]))
         for j, tensor in enumerate(held)]
        for k, held in enumerate(rows)
    ]


def _name(k: int, j: int, sites: int) -> str:
    return f"site{k}_{j}.npy" if k < sites else ("teacher.npy", "labels.npy")[k - sites]


def _open(folder: Path, meta: dict[str, Any], recipe: Recipe) -> Features:
    kept = meta["count"] * meta["key"]["recipe"]["views"]

    def mapped(name: str) -> Tensor:
        # "c": copy on write, since torch wants memory that it may write to; nothing here does.
        return torch.from_numpy(np.load(folder / name, mmap_mode="c", allow_pickle=False))[:kept]

    sites = meta["tensors"]
    return Features(
        tuple(tuple(mapped(_name(k, j, len(sites))) for j in range(number)) for k, number in enumerate(sites)),
        mapped("teacher.npy"), meta["count"], recipe.batch_size, recipe.seed,
        mapped("labels.npy") if meta["labels"] else None,
    )


def _digest(batch: Batch) -> str:
    digest = hashlib.sha256()

    def add(tensor: Tensor) -> Tensor:
        digest.update(_bytes(tensor))
        return tensor

    batch.map(add)
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def module_fingerprint(module: nn.Module) -> str:
    """Sixteen hex digits of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        if isinstance(tensor, Tensor) and tensor.numel():
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]

"""How a frontier is read: tensors of many kinds become one map, or vectors.

What a frontier may be, told apart by shape alone:

- map (N, C, H, W). Several maps are brought to one size and concatenated: for ``classify`` to the coarsest one, by
  average pooling; for ``dense`` to the finest one that is at most a quarter of the output (all coarser ones
  upsampled bilinearly, finer ones average-pooled), as HRNet's exits in ADP-C; without one, to the coarsest.
- map with channels last (N, H, W, C), as in Swin: taken so when the first two sizes are equal and the last two are
  not (when the output's size is known, when the first two have its aspect ratio and the last two have not).
  ``HeadSpec.layout`` overrules.
- tokens (N, T, D). If T - 1 is a square and T is not, token 0 is the class token. For ``classify`` without
  convolutions: class token (if any) and mean of the others, concatenated. Otherwise the others become a map whose
  aspect is the output's.
- vector (N, D).

For ``classify``, a frontier of mixed kinds is pooled to vectors, which are concatenated. Integer and bool tensors, and
masks (N, 1, 1, T) beside tokens, are passed in but not read.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.errors import HeadError
from offramp.types import LiveTensor, Task

__all__ = ["Layout", "MapHead", "MapReading", "Read", "goal_of", "read_as_map", "reads_of", "to_vector"]

Layout = Literal["auto", "channels_first", "channels_last"]


@dataclass(frozen=True)
class Read:
    """How one tensor of the frontier is read."""

    index: int
    kind: Literal["map", "map_last", "tokens", "vector"]
    channels: int
    size: tuple[int, int]
    class_token: bool = False


@dataclass(frozen=True)
class MapReading:
    """How a frontier becomes one map; heads with equal readings may share it."""

    reads: tuple[Read, ...]
    goal: int
    """Index of the map whose size all others take."""
    aspect: float
    scale: tuple[float, float] | None
    """Dense: the output's size over that map's."""

    @property
    def channels(self) -> int:
        return sum(read.channels for read in self.reads)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the one map, for the frontier that was read."""
        return self.reads[self.goal].size

    def macs(self, classes: int) -> int:
        """Of both bilinear resizings for one sample, at 4 an element: the coarser maps', and the logits'."""
        (height, width), out = self.size, self.scale or (0, 0)
        coarser = [r for r in self.reads if r.size != self.size and (r.size[0] < height or r.size[1] < width)]
        return 4 * height * width * sum(r.channels for r in coarser) + 4 * classes * round(height * out[0]) * round(
            width * out[1])

    def join(self, frontier: Sequence[Tensor]) -> Tensor:
        """The one map (N, C, H, W)."""
        maps = [_to_map(frontier[read.index], read, self.aspect) for read in self.reads]
        size = maps[self.goal].shape[-2:]
        return maps[0] if len(maps) == 1 else torch.cat([_resize(m, size) for m in maps], 1)

    def upsample(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """Logits brought to the output's size, bilinearly, where ``size`` is that of the joined map."""
        goal = self.output_of(size)
        return logits if goal is None else F.interpolate(logits, goal, mode="bilinear", align_corners=False)

    def output_of(self, size: Sequence[int]) -> tuple[int, int] | None:
        """The output's size, where ``size`` is that of the joined map; None where logits are not resized."""
        return None if self.scale is None else (round(size[0] * self.scale[0]), round(size[1] * self.scale[1]))


def read_as_map(reads: Sequence[Read], task: Task, out_size: tuple[int, int] | None) -> MapReading:
    """The reading that makes one map."""
    goal = goal_of(reads, task, out_size)
    size = reads[goal].size
    scale = (out_size[0] / size[0], out_size[1] / size[1]) if task == "dense" and out_size and min(size) else None
    return MapReading(tuple(reads), goal, reads[0].size[0] / max(1, reads[0].size[1]), scale)


def reads_of(
    frontier: Sequence[LiveTensor], task: Task, out_size: tuple[int, int] | None, layout: Layout = "auto"
) -> list[Read]:
    """How each tensor of a frontier is read; HeadError on one that cannot be, or when none is left."""
    tokens = {live.shape[1] for live in frontier if len(live.shape) == 3}
    aspect = out_size[0] / out_size[1] if out_size else None
    reads = []
    for index, live in enumerate(frontier):
        shape = live.shape
        if "float" not in live.dtype or (len(shape) == 4 and shape[1:3] == (1, 1) and shape[3] in tokens):
            continue
        if len(shape) == 4:
            last = layout == "channels_last" or (layout == "auto" and _looks_channels_last(shape, aspect))
            reads.append(Read(index, "map_last", shape[3], (shape[1], shape[2])) if last
                         else Read(index, "map", shape[1], (shape[2], shape[3])))
        elif len(shape) == 3:
            class_token = math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1 and math.isqrt(shape[1]) ** 2 != shape[1]
            class_token = class_token and shape[1] > 2
            size = _grid(shape[1] - class_token, aspect or 1.0)
            reads.append(Read(index, "tokens", shape[2], size, class_token))
        elif len(shape) == 2:
            reads.append(Read(index, "vector", shape[1], (0, 0)))
        else:
            raise HeadError(
                expected="frontier tensors of rank 2 (N, D), 3 (N, T, D) or 4 (N, C, H, W)", got=str(live),
                where="heads.build()", todo="choose another site, or pass your own head module",
            )
    if not reads:
        got = ", ".join(map(str, frontier)) or "nothing"
        raise HeadError(expected="a floating-point tensor in the frontier", got=got, where="heads.build()")
    return reads


def _looks_channels_last(shape: tuple[int, ...], aspect: float | None) -> bool:
    _, a, b, c = shape
    if aspect is not None:
        def off(height: int, width: int) -> float:
            return abs(math.log(height / width / aspect))
        return off(a, b) < off(b, c)
    return a == b != c


def _grid(count: int, aspect: float) -> tuple[int, int]:
    """The (H, W) with H * W == count whose aspect is nearest; (0, 0) if it is off by more than a quarter."""
    pairs = [(h, count // h) for h in range(1, count + 1) if count % h == 0]
    best = min(pairs, key=lambda hw: abs(math.log(hw[0] / hw[1] / aspect)), default=(0, 0))
    return best if best[0] and abs(math.log(best[0] / best[1] / aspect)) < 0.25 else (0, 0)


def goal_of(reads: Sequence[Read], task: Task, out_size: tuple[int, int] | None) -> int:
    """Index of the map whose size all others take."""
    order = sorted(range(len(reads)), key=lambda i: reads[i].size[0] * reads[i].size[1])
    if task == "dense" and out_size:
        small = [i for i in order if reads[i].size[0] * 4 <= out_size[0] and reads[i].size[1] * 4 <= out_size[1]]
        return small[-1] if small else order[0]
    return order[0]


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if x.shape[-2:] == tuple(size):
        return x
    if x.shape[-2] >= size[0] and x.shape[-1] >= size[1]:
        return F.adaptive_avg_pool2d(x, (size[0], size[1]))
    return F.interpolate(x, list(size), mode="bilinear", align_corners=False)


def _to_map(x: Tensor, read: Read, aspect: float) -> Tensor:
    if read.kind == "map":
        return x
    if read.kind == "map_last":
        return x.permute(0, 3, 1, 2)
    x = x[:, 1:] if read.class_token else x
    height, width = read.size if read.size[0] * read.size[1] == x.shape[1] else _grid(x.shape[1], aspect)
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)


def to_vector(x: Tensor, read: Read) -> Tensor:
    if read.kind == "vector":
        return x
    if read.kind == "tokens":
        return torch.cat([x[:, 0], x[:, 1:].mean(1)], 1) if read.class_token else x.mean(1)
    return x.mean((2, 3) if read.kind == "map" else (1, 2))


class MapHead(nn.Module, ABC):
    """A dense head that reads its frontier as one map; a subclass says in ``on_map`` what it makes of the map."""

    reading: MapReading

    def forward(self, *frontier: Tensor) -> Tensor:
        joined = self.reading.join(frontier)
        return self.reading.upsample(self.on_map(joined), joined.shape[-2:])

    def coarse(self, *frontier: Tensor) -> Tensor:
        """The logits at the size of the map that the head reads, before they are resized to the output's."""
        return self.on_map(self.reading.join(frontier))

    @abstractmethod
    def on_map(self, x: Tensor) -> Tensor:
        """The logits of a joined map, not resized."""

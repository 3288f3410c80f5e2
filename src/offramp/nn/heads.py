"""Small exits: from a frontier's tensors to logits, described by a frozen spec that a file can hold.

The space is the label-free paper's (up to two convolutions, then up to two linears), opened by depthwise-separable
convolutions, residual blocks and a squeeze gate, because two plain convolutions on a frozen, narrow network stop
far below it. Rows never look at each other at run time, so dropping rows is exact.

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.errors import HeadError
from offramp.types import LiveTensor, Task

__all__ = ["ExitHead", "HeadSpec", "build", "check_pays", "default_spec", "fcn_spec", "head_macs", "residual_spec"]

Layout = Literal["auto", "channels_first", "channels_last"]


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The shape of one head, in order from the frontier to the logits.

    >>> spec = HeadSpec(convs=((32, 3, 2),), linears=(64,))
    >>> HeadSpec.from_json(spec.to_json()) == spec
    True
    """

    convs: tuple[tuple[int, int, int], ...] = ()
    """(channels, kernel, stride) of each convolution, followed by batch norm and ReLU."""
    separable: bool = False
    """Whether convolutions with a kernel > 1 are depthwise, then pointwise."""
    blocks: tuple[tuple[int, int], ...] = ()
    """(channels, stride) of each residual block of two 3x3 convolutions, after ``convs``."""
    gate: bool = False
    """Whether the map is scaled by a sigmoid of its own global average: the cheapest view of the whole image."""
    pool: int = 1
    """``classify``: the map is averaged to a grid of pool x pool places before the linears."""
    linears: tuple[int, ...] = ()
    """``classify``: widths of the hidden linears; the last linear, to the classes, always comes and is not named."""
    dropout: float = 0.0
    """Before the last layer, in training."""
    layout: Layout = "auto"
    """How frontiers of rank 4 are read; ``auto`` tells by shape."""

    def __post_init__(self) -> None:
        faults = []
        if any(len(c) != 3 or min(c) < 1 or c[1] % 2 == 0 for c in self.convs):
            faults.append(f"convs of (channels, odd kernel, stride), each >= 1, not {self.convs}")
        if any(len(b) != 2 or min(b) < 1 for b in self.blocks):
            faults.append(f"blocks of (channels, stride), each >= 1, not {self.blocks}")
        if self.pool < 1:
            faults.append(f"pool >= 1, not {self.pool}")
        if any(width < 1 for width in self.linears):
            faults.append(f"linears >= 1, not {self.linears}")
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout in [0, 1), not {self.dropout}")
        if self.layout not in ("auto", "channels_first", "channels_last"):
            faults.append(f"layout auto, channels_first or channels_last, not {self.layout!r}")
        if faults:
            raise HeadError("HeadSpec: expected " + "; ".join(faults) + ".")

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, as ``json.dumps`` takes them."""
        return {"type": "HeadSpec", "version": 1, "data": asdict(self)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "HeadSpec":
        """The inverse of :meth:`to_json`; HeadError on another type, a future version or an unknown field."""
        if record.get("type") != "HeadSpec" or record.get("version") != 1:
            got = f"type {record.get('type')!r}, version {record.get('version')!r}"
            raise HeadError(expected="a HeadSpec of version 1", got=got, where="HeadSpec.from_json()")
        data, known = dict(record["data"]), {field.name for field in fields(cls)}
        if unknown := set(data) - known:
            todo = f"known are {sorted(known)}"
            raise HeadError(expected="known fields", got=f"{sorted(unknown)}", where="HeadSpec.from_json()", todo=todo)
        for name in ("convs", "blocks"):
            data[name] = tuple(tuple(item) for item in data.get(name, ()))
        data["linears"] = tuple(data.get("linears", ()))
        return cls(**data)


@dataclass(frozen=True)
class _Read:
    """How one tensor of the frontier is read."""

    index: int
    kind: Literal["map", "map_last", "tokens", "vector"]
    channels: int
    size: tuple[int, int]
    class_token: bool = False


class ExitHead(nn.Module):
    """A head built from a spec: ``head(*frontier)`` gives logits (N, K), or (N, K, H, W) for dense.

    Dense logits have the output's size when the frontier has the size it was built for, else the same multiple of it.
    """

    def __init__(
        self, spec: HeadSpec, frontier: Sequence[LiveTensor], num_classes: int, task: Task,
        out_size: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        self.spec, self.task, self.num_classes = spec, task, num_classes
        reads = _reads(spec, frontier, task, out_size)
        spatial = task == "dense" or bool(spec.convs or spec.blocks)
        self._reads = reads
        self._as_map = task == "dense" or (
            all(r.kind in ("map", "map_last") or (r.kind == "tokens" and spatial) for r in reads)
        )
        if spatial and not all(r.kind != "vector" and min(r.size) > 0 for r in reads):
            raise HeadError(
                expected="maps (N, C, H, W) or tokens that form a grid, for a head with convolutions",
                got=", ".join(map(str, frontier)), where="heads.build()", todo="use a HeadSpec of linears only",
            )
        self._aspect = reads[0].size[0] / max(1, reads[0].size[1])
        self._goal = _goal(reads, task, out_size) if self._as_map else 0
        size = reads[self._goal].size
        self._scale = (out_size[0] / size[0], out_size[1] / size[1]) if task == "dense" and out_size else None
        self.body, width = nn.Sequential(), 0
        if self._as_map:
            width = self._add_body(sum(r.channels for r in reads))
            flat = width * spec.pool**2
        else:
            flat = sum(r.channels * (2 if r.class_token else 1) for r in reads)
        if task == "dense":
            self.last = nn.Sequential(nn.Dropout2d(spec.dropout), nn.Conv2d(width, num_classes, 1))
        else:
            # A frozen trunk's features have any scale; a norm within each row puts them at one, and shrinks exactly.
            self.last = nn.Sequential(nn.Identity() if spec.convs or spec.blocks else nn.LayerNorm(flat))
            for wide in spec.linears:
                self.last.extend([nn.Linear(flat, wide), nn.ReLU()])
                flat = wide
            self.last.extend([nn.Dropout(spec.dropout), nn.Linear(flat, num_classes)])

    def _add_body(self, width: int) -> int:
        for wide, kernel, stride in self.spec.convs:
            self.body.append(_conv(width, wide, kernel, stride, self.spec.separable))
            width = wide
        for wide, stride in self.spec.blocks:
            self.body.append(_Residual(width, wide, stride))
            width = wide
        if self.spec.gate:
            self.body.append(_Gate(width))
        return width

    def forward(self, *frontier: Tensor) -> Tensor:
        if not self._as_map:
            rows = [_to_vector(frontier[read.index], read) for read in self._reads]
            return self.last(rows[0] if len(rows) == 1 else torch.cat(rows, 1))  # type: ignore[no-any-return]
        maps = [_to_map(frontier[read.index], read, self._aspect) for read in self._reads]
        size = maps[self._goal].shape[-2:]
        joined = maps[0] if len(maps) == 1 else torch.cat([_resize(m, size) for m in maps], 1)
        x = self.body(joined)
        if self.task == "classify":
            x = x.mean((2, 3)) if self.spec.pool == 1 else F.adaptive_avg_pool2d(x, self.spec.pool).flatten(1)
            return self.last(x)  # type: ignore[no-any-return]
        logits: Tensor = self.last(x)
        if self._scale is not None:
            goal = [round(size[0] * self._scale[0]), round(size[1] * self._scale[1])]
            logits = F.interpolate(logits, goal, mode="bilinear", align_corners=False)
        return logits


class _Residual(nn.Module):
    def __init__(self, width: int, wide: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(width, wide, 3, stride, False)
        self.second = nn.Sequential(nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide))
        same = width == wide and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(width, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.skip(x))


class _Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.linear(x.mean((2, 3))))[:, :, None, None]


def _conv(width: int, wide: int, kernel: int, stride: int, separable: bool) -> nn.Sequential:
    end = [nn.BatchNorm2d(wide), nn.ReLU()]
    if separable and kernel > 1:
        depth = nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=width, bias=False)
        return nn.Sequential(depth, nn.BatchNorm2d(width), nn.Conv2d(width, wide, 1, bias=False), *end)
    return nn.Sequential(nn.Conv2d(width, wide, kernel, stride, kernel // 2, bias=False), *end)


def build(
    spec: HeadSpec, frontier: Sequence[LiveTensor], num_classes: int, task: Task,
    out_size: tuple[int, int] | None = None,
) -> ExitHead:
    """A fresh head for a frontier; ``out_size`` is the (H, W) of the network's own dense logits.

    >>> site = (LiveTensor(name="relu", shape=(1, 16, 8, 8), dtype="float32"),)
    >>> build(HeadSpec(convs=((32, 3, 2),)), site, 10, "classify")(torch.zeros(2, 16, 8, 8)).shape
    torch.Size([2, 10])
    """
    if task == "dense" and out_size is None:
        raise HeadError(expected="out_size, the (H, W) of the network's logits", got="none", where="heads.build(dense)")
    if num_classes < 2:
        raise HeadError(expected="num_classes >= 2", got=str(num_classes), where="heads.build()")
    return ExitHead(spec, frontier, num_classes, task, out_size)


def head_macs(head: nn.Module, frontier: Sequence[LiveTensor]) -> int:
    """MACs of a head for one sample, counted on the meta device: nothing is computed."""
    import copy

    from offramp.cost import macs

    ghost = copy.deepcopy(head).to("meta").eval()
    rows = [torch.empty(1, *live.shape[1:], dtype=getattr(torch, live.dtype.removeprefix("torch.")), device="meta")
            for live in frontier]
    with torch.no_grad():
        return int(macs.count(ghost, *rows).total)


def check_pays(head_macs: int, macs_after: int, where: str) -> None:
    """HeadError, with the figures, when a head costs as much as a sample that leaves there could save."""
    if head_macs >= macs_after:
        raise HeadError(
            expected=f"a head cheaper than the {macs_after / 1e6:.3f} M MACs that leaving there saves",
            got=f"{head_macs / 1e6:.3f} M MACs",
            where=where,
            todo="give a smaller HeadSpec (fewer channels, separable=True, stride 2), or drop this exit",
        )


def fcn_spec(frontier: Sequence[LiveTensor], *, layout: Layout = "auto") -> HeadSpec:
    """torchvision's FCN head: 3x3 to a quarter of the channels, dropout 0.1, 1x1 to the classes."""
    width = sum(read.channels for read in _reads(HeadSpec(layout=layout), frontier, "dense", None))
    return HeadSpec(convs=((max(1, width // 4), 3, 1),), dropout=0.1, layout=layout)


def residual_spec(
    frontier: Sequence[LiveTensor], *, width: int = 64, depth: int = 2, layout: Layout = "auto"
) -> HeadSpec:
    """Residual blocks, each halving the map while it is larger than 4: the strong end of the space."""
    reads = _reads(HeadSpec(layout=layout), frontier, "classify", None)
    side, blocks = min(min(read.size) for read in reads), []
    for _ in range(depth):
        blocks.append((width, 2 if side > 4 else 1))
        side = -(-side // blocks[-1][1])
    return HeadSpec(blocks=tuple(blocks), layout=layout)


def default_spec(
    frontier: Sequence[LiveTensor], num_classes: int, task: Task, out_size: tuple[int, int] | None = None, *,
    macs_after: int | None = None, share: float = 0.1, layout: Layout = "auto",
) -> HeadSpec:
    """The strongest of a few sizes that costs at most ``share`` of the MACs after the site (the cheapest if none does).

    Maps: two separable 3x3 convolutions (dense: a 1x1 first) with sizes from the frontier's channels, halving the map
    while it is larger than 8, then a gate. Tokens and vectors: one linear.
    """
    bare = HeadSpec(layout=layout)
    reads = _reads(bare, frontier, task, out_size)
    if task == "classify" and any(read.kind in ("tokens", "vector") for read in reads):
        return bare
    width = sum(read.channels for read in reads)
    side = min(reads[_goal(reads, task, out_size)].size)
    options = []
    for wide in (width * 2, width, width // 2, width // 4, width // 8):
        wide = max(min(wide, 256), 16, min(width, num_classes))
        if task == "dense":
            stride = 2 if out_size and side * 4 >= out_size[0] else 1
            convs: tuple[tuple[int, int, int], ...] = ((wide, 1, 1), (wide, 3, stride), (wide, 3, 1))
        else:
            first = 2 if side > 8 else 1
            convs = ((wide, 3, first), (wide, 3, 2 if side // first > 4 else 1))
        options.append(HeadSpec(convs=convs, separable=True, gate=task == "dense", layout=layout))
    options.append(HeadSpec(layout=layout))
    for spec in options:
        if macs_after is None:
            return spec
        if head_macs(build(spec, frontier, num_classes, task, out_size), frontier) <= share * macs_after:
            return spec
    return options[-1]


def _reads(
    spec: HeadSpec, frontier: Sequence[LiveTensor], task: Task, out_size: tuple[int, int] | None
) -> list[_Read]:
    tokens = {live.shape[1] for live in frontier if len(live.shape) == 3}
    aspect = out_size[0] / out_size[1] if out_size else None
    reads = []
    for index, live in enumerate(frontier):
        shape = live.shape
        if "float" not in live.dtype or (len(shape) == 4 and shape[1:3] == (1, 1) and shape[3] in tokens):
            continue
        if len(shape) == 4:
            last = spec.layout == "channels_last" or (spec.layout == "auto" and _looks_channels_last(shape, aspect))
            reads.append(_Read(index, "map_last", shape[3], (shape[1], shape[2])) if last
                         else _Read(index, "map", shape[1], (shape[2], shape[3])))
        elif len(shape) == 3:
            class_token = math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1 and math.isqrt(shape[1]) ** 2 != shape[1]
            class_token = class_token and shape[1] > 2
            size = _grid(shape[1] - class_token, aspect or 1.0)
            reads.append(_Read(index, "tokens", shape[2], size, class_token))
        elif len(shape) == 2:
            reads.append(_Read(index, "vector", shape[1], (0, 0)))
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


def _goal(reads: Sequence[_Read], task: Task, out_size: tuple[int, int] | None) -> int:
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


def _to_map(x: Tensor, read: _Read, aspect: float) -> Tensor:
    if read.kind == "map":
        return x
    if read.kind == "map_last":
        return x.permute(0, 3, 1, 2)
    x = x[:, 1:] if read.class_token else x
    height, width = read.size if read.size[0] * read.size[1] == x.shape[1] else _grid(x.shape[1], aspect)
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)


def _to_vector(x: Tensor, read: _Read) -> Tensor:
    if read.kind == "vector":
        return x
    if read.kind == "tokens":
        return torch.cat([x[:, 0], x[:, 1:].mean(1)], 1) if read.class_token else x.mean(1)
    return x.mean((2, 3) if read.kind == "map" else (1, 2))

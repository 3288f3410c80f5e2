"""Small exits: from a frontier's tensors to logits, described by a frozen spec that a file can hold.

The space is the label-free paper's (up to two convolutions, then up to two linears), opened by depthwise-separable
convolutions, residual blocks and a squeeze gate, because two plain convolutions on a frozen, narrow network stop
far below it. Rows never look at each other at run time, so dropping rows is exact. ``nn/reading.py`` says what a
frontier may be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.errors import HeadError
from offramp.nn.mess import MessHead
from offramp.nn.reading import Layout, MapReading, goal_of, read_as_map, reads_of, to_vector
from offramp.nn.specs import spec_data
from offramp.types import LiveTensor, Task

__all__ = ["ExitHead", "HeadSpec", "build", "check_pays", "default_spec", "fcn_spec", "head_macs", "residual_spec"]


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
        data = spec_data(record, cls)
        for name in ("convs", "blocks"):
            data[name] = tuple(tuple(item) for item in data.get(name, ()))
        data["linears"] = tuple(data.get("linears", ()))
        return cls(**data)


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
        reads = reads_of(frontier, task, out_size, spec.layout)
        spatial = task == "dense" or bool(spec.convs or spec.blocks)
        self._reads = reads
        self._map = read_as_map(reads, task, out_size) if task == "dense" or (
            all(r.kind in ("map", "map_last") or (r.kind == "tokens" and spatial) for r in reads)
        ) else None
        if spatial and not all(r.kind != "vector" and min(r.size) > 0 for r in reads):
            raise HeadError(
                expected="maps (N, C, H, W) or tokens that form a grid, for a head with convolutions",
                got=", ".join(map(str, frontier)), where="heads.build()", todo="use a HeadSpec of linears only",
            )
        self.body, width = nn.Sequential(), 0
        if self._map is not None:
            width = self._add_body(self._map.channels)
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

    @property
    def reading(self) -> MapReading | None:
        """How one map is made of the frontier; None where the head reads vectors."""
        return self._map

    def forward(self, *frontier: Tensor) -> Tensor:
        if self._map is None:
            rows = [to_vector(frontier[read.index], read) for read in self._reads]
            return self.last(rows[0] if len(rows) == 1 else torch.cat(rows, 1))  # type: ignore[no-any-return]
        joined = self._map.join(frontier)
        logits = self.on_map(joined)
        return self._map.upsample(logits, joined.shape[-2:]) if self.task == "dense" else logits

    def coarse(self, *frontier: Tensor) -> Tensor:
        """Dense: the logits as the last layer gives them, before they are resized to the output's size."""
        return self.on_map(self._map.join(frontier)) if self._map is not None else self(*frontier)

    def on_map(self, x: Tensor) -> Tensor:
        """The logits of a joined map, not resized."""
        x = self.body(x)
        if self.task == "classify":
            x = x.mean((2, 3)) if self.spec.pool == 1 else F.adaptive_avg_pool2d(x, self.spec.pool).flatten(1)
        return self.last(x)  # type: ignore[no-any-return]


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
    if isinstance(head, MessHead):  # hundreds of them hang on a network
        return head.macs()
    import copy

    from offramp.cost import macs

    # Weights are not copied: 64 heads of a wide site hold gigabytes.
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in head.parameters()}
    ghost = copy.deepcopy(head, memo).to("meta").eval()
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
    width = sum(read.channels for read in reads_of(frontier, "dense", None, layout))
    return HeadSpec(convs=((max(1, width // 4), 3, 1),), dropout=0.1, layout=layout)


def residual_spec(
    frontier: Sequence[LiveTensor], *, width: int = 64, depth: int = 2, layout: Layout = "auto"
) -> HeadSpec:
    """Residual blocks, each halving the map while it is larger than 4: the strong end of the space."""
    reads = reads_of(frontier, "classify", None, layout)
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
    reads = reads_of(frontier, task, out_size, layout)
    if task == "classify" and any(read.kind in ("tokens", "vector") for read in reads):
        return bare
    width = sum(read.channels for read in reads)
    side = min(reads[goal_of(reads, task, out_size)].size)
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

"""What a program says, by PyTorch on whole maps: convolve, interpolate by the masks' own function, finish. float64.

And small programs to say it of: ``Sketch`` takes operations one by one, and finds the regions backwards.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp._kernel.ops import (
    Conv,
    Level,
    Map,
    Op,
    Pool,
    Program,
    Read,
    Region,
    Segment,
    Term,
    View,
    Window,
)
from offramp.functional.masking import interpolate


class Sketch:
    """A program being written: maps of (C, H, W), operations in segments."""

    def __init__(self, seed: int = 0) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.sizes: list[tuple[int, int]] = []
        self.maps: list[tuple[int, int]] = []  # level, channels
        self.segments: list[list[Op]] = [[]]

    def map(self, channels: int, height: int, width: int) -> int:
        if (height, width) not in self.sizes:
            self.sizes.append((height, width))
        self.maps.append((self.sizes.index((height, width)), channels))
        return len(self.maps) - 1

    def whole(self, map: int) -> View:
        return View(map, 0, self.maps[map][1])

    def size(self, map: int) -> tuple[int, int]:
        return self.sizes[self.maps[map][0]]

    def add(self, op: Op) -> int:
        self.segments[-1].append(op)
        return op.out.map

    def conv(
        self, source: int | View, channels: int, size: int | tuple[int, int] = 3, *, stride: int = 1, dilation: int = 1,
        groups: int = 1, residual: int | None = None, relu: bool = True, lam: float = 1.0, out: View | None = None,
    ) -> int:
        """With drawn weights, padded to keep the size."""
        source = self.whole(source) if isinstance(source, int) else source
        kernel = (size, size) if isinstance(size, int) else size
        padding = dilation * (kernel[0] // 2), dilation * (kernel[1] // 2)
        height, width = ((n + 2 * p - dilation * (k - 1) - 1) // stride + 1
                         for n, p, k in zip(self.size(source.map), padding, kernel, strict=True))
        inputs = source.count // groups

        def some(*shape: int) -> Tensor:
            return torch.randn(shape, generator=self.draw)

        return self.add(Conv(
            source, self.whole(self.map(channels, height, width)) if out is None else out,
            some(channels, inputs, *kernel) / (inputs * kernel[0] * kernel[1]) ** 0.5,
            Window(kernel, (stride, stride), padding, (dilation, dilation)), groups, some(channels), some(channels),
            some(channels), lam, None if residual is None else self.whole(residual), relu))

    def program(self, kept: Sequence[int]) -> Program:
        reads: list[set[Read]] = [set() for _ in self.maps]
        found: list[Region] = []

        def of(map: int) -> int:
            region = Region(self.maps[map][0], tuple(sorted(reads[map], key=repr)))
            if region not in found:
                found.append(region)
            return found.index(region)

        for op in [op for ops in self.segments for op in ops][::-1]:
            level, out = self.maps[op.out.map][0], of(op.out.map)
            if isinstance(op, Conv):
                if op.window != Window((1, 1)):
                    reads[op.source.map].add(Read(level, None, op.window))
                if op.residual is not None:
                    reads[op.residual.map] |= set(found[out].reads)
            elif isinstance(op, Pool):
                reads[op.source.map].add(Read(level, out, op.window))
            else:
                for term in op.terms:
                    if term.resize is None:
                        reads[term.source.map] |= set(found[out].reads)
                    else:
                        reads[term.source.map].add(Read(level, out, term.resize))
        maps = tuple(Map(level, of(map), channels) for map, (level, channels) in enumerate(self.maps))
        return Program(tuple(Level(*size) for size in self.sizes), tuple(found), maps,
                       tuple(Segment(f"segment {i}", tuple(ops)) for i, ops in enumerate(self.segments)),
                       frozenset(kept))


def mask_at(mask: Tensor, level: Level) -> Tensor:
    """mask (H, W), brought to a level by nearest."""
    return F.interpolate(mask[None, None].to(torch.uint8), (level.height, level.width), mode="nearest")[0, 0].bool()


def simulate(program: Program, given: Mapping[int, Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """All maps (C, H, W), float64, after all segments, each under its mask."""
    maps = [torch.full((own.channels, program.levels[own.level].height, program.levels[own.level].width), torch.nan,
                       dtype=torch.float64) for own in program.maps]
    for number, x in given.items():
        maps[number] = x.double()
    for segment, mask in zip(program.segments, masks, strict=True):
        for op in segment.ops:
            level = program.levels[program.maps[op.out.map].level]
            out = maps[op.out.map]
            out[op.out.first:op.out.first + op.out.count] = _said(op, maps, mask_at(mask, level), level)
    return maps


def _of(maps: Sequence[Tensor], view: View) -> Tensor:
    return maps[view.map][view.first:view.first + view.count]


def _said(op: Op, maps: Sequence[Tensor], mask: Tensor, level: Level) -> Tensor:
    if isinstance(op, Conv):
        y = _convolved(op, _of(maps, op.source), mask, level)
        if op.residual is not None:
            y = y + _of(maps, op.residual)
        return y.relu() if op.relu else y
    if isinstance(op, Pool):
        x, w = _of(maps, op.source)[None], op.window
        if op.kind == "max":
            return F.max_pool2d(x, w.kernel, w.stride, w.padding, w.dilation)[0]
        return F.avg_pool2d(x, w.kernel, w.stride, w.padding, count_include_pad=op.counts_padding)[0]
    y = sum(_resized(_of(maps, term.source), term, level) for term in op.terms)
    assert isinstance(y, Tensor)
    if op.scale is not None:
        y = y * op.scale.double()[:, None, None]
    if op.shift is not None:
        y = y + op.shift.double()[:, None, None]
    return y.relu() if op.relu else y


def _resized(x: Tensor, term: Term, level: Level) -> Tensor:
    if term.resize is None:
        return x
    corners = {"align_corners": term.resize.align_corners} if term.resize.mode == "bilinear" else {}
    return F.interpolate(x[None].float(), (level.height, level.width), mode=term.resize.mode, **corners)[0].double()


def _convolved(op: Conv, x: Tensor, mask: Tensor, level: Level) -> Tensor:
    w = op.window
    # what is not needed may be NaN; an active place reads none of it
    raw = F.conv2d(x[None], op.weight.double(), None, w.stride, w.padding, w.dilation, op.groups)[0]
    assert raw.shape[1:] == (level.height, level.width)
    raw = interpolate(torch.where(mask, raw, 0)[None], mask[None, None], op.lam)[0]
    scale, shift, bare = (given.double()[:, None, None] for given in (op.scale, op.shift, op.bare))
    known = F.max_pool2d(mask[None, None].double(), 7, 1, 3)[0, 0] > 0
    return torch.where(known, scale * raw + shift, bare)


def stands(program: Program, number: int, mask: Tensor) -> Tensor:
    """The places of a region, (H, W) of bool, by asking for each whether any of its readers reads it."""
    region = program.regions[number]
    level = program.levels[region.level]
    found = mask_at(mask, level)
    for read in region.reads:
        theirs = program.levels[read.level]
        asked = mask_at(mask, theirs) if read.region is None else stands(program, read.region, mask)
        x = torch.zeros(1, 1, level.height, level.width, dtype=torch.float64, requires_grad=True)
        if isinstance(read.how, Window):
            w = read.how
            y = F.conv2d(x, torch.ones(1, 1, *w.kernel, dtype=torch.float64), None, w.stride, w.padding, w.dilation)
        else:
            # where the weights are 0 a bilinear resize reads all the same; another size of the same ratio shows it not
            corners = {"align_corners": read.how.align_corners} if read.how.mode == "bilinear" else {}
            y = F.interpolate(x, (theirs.height, theirs.width), mode=read.how.mode, **corners)
        (y[0, 0] * asked).sum().backward()  # a place is read where the sum depends on it
        assert x.grad is not None
        found = found | (x.grad[0, 0] != 0)
    return found

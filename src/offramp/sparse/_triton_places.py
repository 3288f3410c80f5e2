"""Where the operations of a program run under a mask, found on the device and kept there: for :mod:`.triton`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from offramp._kernel.layout import Layout
from offramp._kernel.ops import Program, Read, Resize, Sum, View
from offramp.sparse.plain import taps

__all__ = ["Launch", "Places"]

_BLOCK = 1024  # places that a kernel's program marks at a time
_COLUMNS = 16


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel with all that it is given, which stays where it is."""

    kernel: Any
    grid: tuple[int, ...]
    given: tuple[Any, ...]
    constants: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[self.grid](*self.given, **self.constants)


@dataclass(frozen=True, eq=False)
class _Geometry:
    """Regions of a segment: waves, each of which reads what those before it marked, and the lists of their places."""

    waves: tuple[Launch, ...]
    lists: Launch | None


@final
class Places:
    """By level, then by region: marks of places, and a list of the active ones, or of those that stand beside them.

    Of all that a mask says only ``density`` waits for the device.
    """

    def __init__(self, program: Program, layout: Layout, device: torch.device) -> None:
        from offramp.sparse import _triton_kernels

        self._kernels = _triton_kernels
        self._program, self._layout, self._device = program, layout, device
        self.sizes = [level.height * level.width for level in program.levels]
        """By level, its places."""
        sizes = [*self.sizes, *(self.sizes[region.level] for region in program.regions)]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._marks = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        self._lists = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self.counts = torch.zeros(len(sizes), dtype=torch.int32, device=device)
        """By level and region, how many places are listed; all 0: nothing is done."""
        self.axes, self.parts, self._at = self._axes_of()
        self._near: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._geometry = [self._geometry_of(*span) for span in layout.spans]
        self._densities: list[float] | None = None

    def settle(self, mask: Tensor) -> None:
        """Bring a mask to each level, by nearest."""
        mask = mask.to(self._device).contiguous().view(torch.uint8)
        sizes, near = self._nearest(mask.shape[0], mask.shape[1])
        self.counts.zero_()
        self._kernels.settle[-(-max(self.sizes) // _BLOCK), len(self.sizes)](
            mask, mask.shape[1], sizes, near, self._marks, self._lists, self.counts, B=_BLOCK)
        self._densities = None

    def density(self, level: int) -> float:
        if self._densities is None:  # the one wait of a mask
            counts = self.counts[: len(self.sizes)].tolist()
            self._densities = [count / size for count, size in zip(counts, self.sizes, strict=True)]
        return self._densities[level]

    def active(self, level: int) -> Tensor:
        """(H W) of uint8."""
        return self._marks[self._starts[level] :][: self.sizes[level]]

    def _nearest(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """By level its first mark, size, and where in the second tensor its rows and columns of such a mask are."""
        if (height, width) not in self._near:
            sizes, near, at = [], list[Tensor](), 0
            for level, start in zip(self._program.levels, self._starts, strict=False):
                sizes.append([start, level.height, level.width, at, at + level.height])
                near += [taps(goal, size, Resize("nearest"), torch.device("cpu"))[0]
                         for goal, size in ((level.height, height), (level.width, width))]
                at += level.height + level.width
            self._near[height, width] = self._ints(sizes), torch.cat(near).int().to(self._device)
        return self._near[height, width]

    def _axes_of(self) -> tuple[Tensor, Tensor, dict[tuple[int, int, Resize], int]]:
        """What resizes read along an axis, by its size and theirs: first places, second ones, and the second's part."""
        maps, wanted = self._program.maps, list[tuple[int, int, Resize]]()
        for region in self._program.regions:
            wanted += [(read.level, region.level, read.how) for read in region.reads if isinstance(read.how, Resize)]
        for op in self._layout.ops:
            if isinstance(op, Sum):
                wanted += [(maps[op.out.map].level, maps[term.source.map].level, term.resize)
                           for term in op.terms if term.resize is not None]
        axes, parts, at, end = [torch.zeros(1).int()], [torch.zeros(1)], dict[tuple[int, int, Resize], int](), 1
        for level, source, how in wanted:
            ours, theirs = self._program.levels[level], self._program.levels[source]
            for goal, size in ((ours.height, theirs.height), (ours.width, theirs.width)):
                if (goal, size, how) not in at:
                    first, second, part = taps(goal, size, how, torch.device("cpu"))
                    axes += [first.int(), second.int()]
                    parts += [part, part]
                    at[goal, size, how] = end
                    end += 2 * goal
        return torch.cat(axes).to(self._device), torch.cat(parts).to(self._device), at

    def resized(self, level: int, source: int, how: Resize) -> tuple[int, int, int, int]:
        """Where ``axes`` has the first rows that a level's places read of another, second rows, columns, and columns.
        """
        ours, theirs = self._program.levels[level], self._program.levels[source]
        rows, columns = self._at[ours.height, theirs.height, how], self._at[ours.width, theirs.width, how]
        return rows, rows + ours.height, columns, columns + ours.width

    def _geometry_of(self, first: int, last: int) -> _Geometry:
        waiting = [self._program.maps[op.out.map].region for op in self._layout.ops[first:last]]
        depth: dict[int, int] = {}
        while waiting:
            region = waiting.pop()
            asked = [read.region for read in self._program.regions[region].reads if read.region is not None]
            if missing := [other for other in asked if other not in depth]:
                waiting += [region, *missing]
            else:
                depth[region] = 1 + max((depth[other] for other in asked), default=-1)
        with_reads = [region for region in sorted(depth) if self._program.regions[region].reads]
        waves = []
        for wave in range(1 + max(depth.values(), default=-1)):
            jobs = [self._job(region, read) for region in with_reads if depth[region] == wave
                    for read in self._program.regions[region].reads]
            if jobs:
                grid = -(-max(job[2] * job[3] for job in jobs) // _BLOCK), len(jobs)
                waves.append(Launch(self._kernels.reach, grid, (self._ints(jobs), self.axes, self._marks),
                                    {"B": _BLOCK, "COLUMNS": _COLUMNS}))
        rows = []
        for region in with_reads:
            level, number = self._program.regions[region].level, len(self.sizes) + region
            rows.append([number, self._starts[number], self._starts[level], self.sizes[level]])
        lists = Launch(self._kernels.halo, (-(-max(row[3] for row in rows) // _BLOCK), len(rows)),
                       (self._ints(rows), self._marks, self._lists, self.counts), {"B": _BLOCK}) if rows else None
        return _Geometry(tuple(waves), lists)

    def _job(self, region: int, read: Read) -> list[int]:
        """Where the marks of the places that read begin, active and of their region; their level's size; the same of
        what they read; then 1 and where the resize's axes are, or 0 and the window."""
        levels, level = self._program.levels, self._program.regions[region].level
        asked = read.level if read.region is None else len(self.sizes) + read.region
        row = [self._starts[read.level], self._starts[asked], levels[read.level].height, levels[read.level].width,
               self._starts[len(self.sizes) + region], levels[level].height, levels[level].width]
        if isinstance(read.how, Resize):
            row += [1, *self.resized(read.level, level, read.how), 0, 0, 0, 0]
        else:
            row += [0, *read.how.kernel, *read.how.stride, *read.how.padding, *read.how.dilation]
        return row

    def mark(self, segment: int) -> None:
        """Find the places of a segment's regions."""
        self.counts[len(self.sizes) :].zero_()
        self._marks[self._starts[len(self.sizes)] :].zero_()
        for wave in self._geometry[segment].waves:
            wave()
        if (lists := self._geometry[segment].lists) is not None:
            lists()

    def listed(self, number: int) -> tuple[Tensor, Tensor]:
        """The active places of a level, and how many they are."""
        return self._lists[self._starts[number] :], self.counts[number:]

    def beside(self, region: int) -> tuple[Tensor, Tensor]:
        """The places of a region that are not active, and how many they are."""
        return self.listed(len(self.sizes) + region)

    def standing(self, out: View) -> tuple[Tensor, ...]:
        """All that a view's map needs, active or not."""
        one = self._program.maps[out.map]
        return *self.listed(one.level), *self.beside(one.region)

    def _ints(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32, device=self._device)

"""Runs a program with torch alone: active rows are gathered, multiplied, and put back. On any device.

A H W map is a matrix of H W rows of C channels and one more of zeros, which stands for all places beyond its border.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp._kernel.ops import Conv, Level, Op, Pool, Program, Read, Resize, Sum, Term, View, Window
from offramp.errors import OfframpError
from offramp.functional.masking import Band, band

__all__ = ["Plain", "Runner", "taps"]

_AT_ONCE = 1 << 22  # values that are gathered at a time
_packed: WeakKeyDictionary[Conv, Tensor] = WeakKeyDictionary()


class Runner(Protocol):
    """What runs a program for one image at a time."""

    def settle(self, mask: Tensor) -> None:
        """From here on this mask, bool (h, w), true where active; at each level it is brought there by nearest."""

    def write(self, map_: int, x: Tensor) -> None:
        """Fill a map, all of it, from (C, H, W)."""

    def write_region(self, map_: int, x: Tensor) -> None:
        """As ``write``, after ``settle``; at the places alone that are read or active under this mask, if it likes."""

    def read(self, map_: int) -> Tensor:
        """A map as (C, H, W); what it holds outside its region is anything."""

    def read_active(self, map_: int, out: Tensor) -> None:
        """Copy a map's active places into ``out`` (C, H, W), whose others stay."""

    def run(self, segment: int, stop: Tensor | None = None, deadline_ns: int | None = None) -> bool:
        """Run a segment; false where it was left unfinished, since ``stop``, one int32, was set from outside, or
        ``time.monotonic_ns()`` reached the deadline."""

    def density(self, level: int) -> float:
        """Share of a level's places that are active."""


@dataclass
class _Here:
    """What one mask means at each level and region, found when it is first asked for."""

    mask: Tensor
    active: dict[int, Tensor] = field(default_factory=dict)
    stands: dict[int, Tensor] = field(default_factory=dict)
    known: dict[Any, Any] = field(default_factory=dict)


@final
class Plain:
    """The runner that needs no compiled kernel; one call at a time. As :class:`Runner`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        like = next((op.weight for part in program.segments for op in part.ops if isinstance(op, Conv)), torch.empty(0))
        self._device = like.device
        buffers: dict[int, Tensor] = {}
        self._maps: list[Tensor] = []
        for slot, one in zip(_slots(program), program.maps, strict=True):
            level = program.levels[one.level]
            if slot not in buffers:
                buffers[slot] = like.new_empty(level.height * level.width + 1, one.channels)
                buffers[slot][-1] = 0
            self._maps.append(buffers[slot])
        self._taps: dict[tuple[int, int, Resize], tuple[_Taps, _Taps]] = {}
        self._here: _Here | None = None

    def settle(self, mask: Tensor) -> None:
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise OfframpError(expected="a bool mask (h, w)", got=f"{mask.dtype} {tuple(mask.shape)}", where="settle()")
        self._here = _Here(mask.to(self._device))

    def write(self, map_: int, x: Tensor) -> None:
        self._maps[map_][:-1].copy_(x.permute(1, 2, 0).flatten(0, 1))

    write_region = write

    def read(self, map_: int) -> Tensor:
        level = self.program.levels[self.program.maps[map_].level]
        return self._maps[map_][:-1].T.reshape(-1, level.height, level.width)

    def read_active(self, map_: int, out: Tensor) -> None:
        level = self.program.maps[map_].level
        at = self._active_places(level)
        width = self.program.levels[level].width
        out[:, at // width, at % width] = self._maps[map_][at].T.to(out)

    @torch.inference_mode()
    def run(self, segment: int, stop: Tensor | None = None, deadline_ns: int | None = None) -> bool:
        for op in self.program.segments[segment].ops:
            if (stop is not None and bool(stop)) or (deadline_ns is not None and time.monotonic_ns() >= deadline_ns):
                return False
            if isinstance(op, Conv):
                self._conv(op)
            elif isinstance(op, Pool):
                self._pool(op)
            else:
                self._sum(op)
        return True

    def density(self, level: int) -> float:
        return float(self._active(level).float().mean())

    # ---- where -----------------------------------------------------------------------------------------------------

    @property
    def _now(self) -> _Here:
        if self._here is None:
            raise OfframpError(expected="a mask", got="none yet", where="Plain", todo="call settle(mask) first")
        return self._here

    def _active(self, level: int) -> Tensor:
        here = self._now
        if level not in here.active:
            size = (self.program.levels[level].height, self.program.levels[level].width)
            here.active[level] = here.mask if here.mask.shape == size else F.interpolate(
                here.mask.to(torch.uint8)[None, None], size, mode="nearest")[0, 0].bool()
        return here.active[level]

    def _active_places(self, level: int) -> Tensor:
        found: Tensor = self._once(("active", level), lambda: self._active(level).flatten().nonzero()[:, 0])
        return found

    def _stand(self, region: int) -> Tensor:
        """bool (H, W): where maps of a region are to stand."""
        here = self._now
        if region not in here.stands:
            one = self.program.regions[region]
            level = self.program.levels[one.level]
            marks = torch.cat([self._active(one.level).flatten(), here.mask.new_zeros(1)])
            for read in one.reads:
                marks[self._reached(read, one.level)] = True
            here.stands[region] = marks[:-1].view(level.height, level.width)
        return here.stands[region]

    def _places(self, region: int) -> Tensor:
        found: Tensor = self._once(("stand", region), lambda: self._stand(region).flatten().nonzero()[:, 0])
        return found

    def _reached(self, read: Read, level: int) -> Tensor:
        at = self._active_places(read.level) if read.region is None else self._places(read.region)
        if isinstance(read.how, Window):
            return self._seen(at, read.level, level, read.how).flatten()
        (top, bottom, _), (left, right, _) = self._resized(read.level, level, read.how)
        width, wide = self.program.levels[level].width, self.program.levels[read.level].width
        y, x = at // wide, at % wide
        return torch.cat([row[y] * width + column[x] for row in (top, bottom) for column in (left, right)])

    def _seen(self, at: Tensor, level: int, source: int, window: Window) -> Tensor:
        """(places, k_h k_w) rows of the source's matrix that a window sees from these places of a level."""
        wide, one = self.program.levels[level].width, self.program.levels[source]
        y, x = ((at // wide)[:, None, None], (at % wide)[:, None, None])
        down, right = (torch.arange(k, device=at.device) * d - p for k, d, p in zip(
            window.kernel, window.dilation, window.padding, strict=True))
        y, x = y * window.stride[0] + down[:, None], x * window.stride[1] + right
        inside = (y >= 0) & (y < one.height) & (x >= 0) & (x < one.width)
        return torch.where(inside, y * one.width + x, one.height * one.width).flatten(1)

    def _resized(self, level: int, source: int, how: Resize) -> tuple["_Taps", "_Taps"]:
        key = (level, source, how)
        if key not in self._taps:
            ours, theirs = self.program.levels[level], self.program.levels[source]
            self._taps[key] = (taps(ours.height, theirs.height, how, self._device),
                               taps(ours.width, theirs.width, how, self._device))
        return self._taps[key]

    def _once(self, key: Any, make: Any) -> Any:
        known = self._now.known
        if key not in known:
            known[key] = make()
        return known[key]

    # ---- operations ------------------------------------------------------------------------------------------------

    def _rows(self, view: View) -> Tensor:
        return self._maps[view.map][:, view.first : view.first + view.count]

    def _level(self, view: View) -> int:
        return self.program.maps[view.map].level

    def _conv(self, op: Conv) -> None:
        level, region = self._level(op.out), self.program.maps[op.out.map].region
        active, places = self._active_places(level), self._places(region)
        raw = self._convolved(op, level, active)
        slots, empty = self._once(("slots", level, region), lambda: self._filled(level, region))
        found: Band = self._once(("band", level, region), lambda: band(
            self._active(level)[None, None], within=self._stand(region)[None, None]))
        rows = raw.new_zeros(len(places), raw.shape[1])
        where = torch.searchsorted(places, active)
        rows[where] = raw
        if len(found.places):
            weights = found.weights(op.lam, torch.promote_types(raw.dtype, torch.float32)).to(raw.dtype)
            rows[torch.searchsorted(places, found.places)] = F.embedding_bag(
                slots[found.sources], raw, found.starts, mode="sum", per_sample_weights=weights)
        rows = torch.where(empty[:, None], op.bare, rows * op.scale + op.shift)
        if op.residual is not None:
            rows = rows + self._rows(op.residual)[places]
        self._rows(op.out)[places] = rows.relu_() if op.relu else rows

    def _filled(self, level: int, region: int) -> tuple[Tensor, Tensor]:
        """By place, which of the active ones it is; by place of the region, whether it is neither active nor near one.
        """
        active, places = self._active_places(level), self._places(region)
        slots = active.new_zeros(self._active(level).numel())
        slots[active] = torch.arange(len(active), device=active.device)
        near = F.max_pool2d(self._active(level)[None, None].float(), 7, 1, 3)[0, 0].flatten() > 0
        return slots, ~near[places]

    def _convolved(self, op: Conv, level: int, active: Tensor) -> Tensor:
        """(active places, C_out)."""
        source = self._rows(op.source)
        if op not in _packed:  # (groups, k_h k_w C_in / groups, C_out / groups)
            _packed[op] = op.weight.detach().unflatten(0, (op.groups, -1)).permute(0, 3, 4, 2, 1).flatten(1, 3)
        weight = _packed[op].contiguous()
        if op.window == Window((1, 1)) and op.groups == 1:
            return source[active] @ weight[0]
        seen = self._once(("seen", level, self._level(op.source), op.window), lambda: self._seen(
            active, level, self._level(op.source), op.window))
        step = max(1, _AT_ONCE // max(1, seen.shape[1] * op.source.count))
        parts = []
        for rows in seen.split(step) if len(seen) else (seen,):
            taken = source[rows].unflatten(2, (op.groups, -1))  # places, window, groups, channels of each
            parts.append(torch.einsum("pwgc,gwco->pgo", taken, weight.unflatten(1, (rows.shape[1], -1))).flatten(1)
                         if op.groups > 1 else taken.flatten(1) @ weight[0])
        return torch.cat(parts)

    def _sum(self, op: Sum) -> None:
        places = self._places(self.program.maps[op.out.map].region)
        rows = self._term(op.terms[0], op.out, places)
        for term in op.terms[1:]:
            rows = rows + self._term(term, op.out, places)
        rows = rows if op.scale is None else rows * op.scale
        rows = rows if op.shift is None else rows + op.shift
        self._rows(op.out)[places] = rows.relu() if op.relu else rows

    def _term(self, term: Term, out: View, places: Tensor) -> Tensor:
        source = self._rows(term.source)
        if term.resize is None:
            return source[places]
        wide, width = (self.program.levels[self._level(view)].width for view in (out, term.source))
        (top, bottom, down), (left, right, across) = self._resized(self._level(out), self._level(term.source),
                                                                   term.resize)
        y, x = places // wide, places % wide
        if term.resize.mode == "nearest":
            return source[top[y] * width + left[x]]
        down, across = down[y][:, None].to(source.dtype), across[x][:, None].to(source.dtype)
        above, below = (source[row[y] * width + left[x]] * (1 - across) + source[row[y] * width + right[x]] * across
                        for row in (top, bottom))
        return above * (1 - down) + below * down

    def _pool(self, op: Pool) -> None:
        places, source = self._places(self.program.maps[op.out.map].region), self._rows(op.source)
        seen = self._seen(places, self._level(op.out), self._level(op.source), op.window)
        outside = (seen == len(source) - 1)[..., None]
        if op.kind == "max":
            rows = source[seen].masked_fill(outside, -torch.inf).amax(1)
        else:
            rows = source[seen].sum(1) / (seen.shape[1] if op.counts_padding else (~outside).sum(1))
        self._rows(op.out)[places] = rows


_Taps = tuple[Tensor, Tensor, Tensor]
"""By place of an axis: the two places that it reads, and the second one's weight."""


def taps(goal: int, size: int, how: Resize, device: torch.device) -> _Taps:
    """As ``torch.nn.functional.interpolate`` counts them, in float32."""
    if how.mode == "nearest":
        at = F.interpolate(torch.arange(size, dtype=torch.float32)[None, None], goal, mode="nearest")[0, 0].long()
        return at.to(device), at.to(device), torch.zeros(goal, device=device)
    steps = torch.arange(goal, dtype=torch.float32)
    if how.align_corners:
        exact = steps * torch.tensor((size - 1) / (goal - 1) if goal > 1 else 0.0, dtype=torch.float32)
    else:
        exact = ((steps + 0.5) * torch.tensor(size / goal, dtype=torch.float32) - 0.5).clamp_min(0)
    first = exact.long().clamp_max(size - 1)
    second = (first + 1).clamp_max(size - 1)
    return first.to(device), second.to(device), (exact - first).clamp(0, 1).to(device)


def _slots(program: Program) -> list[int]:
    """Which buffer each map has: those of one shape share one, where the last reader of the one comes before the other.
    """
    ops: list[Op] = [op for part in program.segments for op in part.ops]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for at, op in enumerate(ops):
        first.setdefault(op.out.map, at)
        last.update(dict.fromkeys((op.out.map, *(view.map for view in _sources(op))), at))
    slots, free = list(range(len(program.maps))), dict[tuple[Level, int], list[int]]()
    ending: dict[int, list[int]] = {}
    for map_, at in last.items():
        ending.setdefault(at, []).append(map_)
    for at in range(len(ops)):
        map_ = ops[at].out.map
        one = program.maps[map_]
        if first[map_] == at and map_ not in program.kept:
            waiting = free.get((program.levels[one.level], one.channels))
            slots[map_] = waiting.pop() if waiting else map_
        for done in ending.get(at, ()):
            if done not in program.kept:
                shape = (program.levels[program.maps[done].level], program.maps[done].channels)
                free.setdefault(shape, []).append(slots[done])
    return slots


def _sources(op: Op) -> Sequence[View]:
    if isinstance(op, Conv):
        return (op.source,) if op.residual is None else (op.source, op.residual)
    return (op.source,) if isinstance(op, Pool) else tuple(term.source for term in op.terms)

"""A program of ``ops.py`` on the compiled kernel: memory laid out once, and one call into C for each segment."""

import ctypes
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from offramp._kernel import native
from offramp._kernel.axes import axis_of
from offramp._kernel.bands import banded
from offramp._kernel.door import isas, needed
from offramp._kernel.faults import faults
from offramp._kernel.layout import lay_out
from offramp._kernel.ops import Conv, Op, Pool, Program, Resize, Sum, Term, View, Window
from offramp.errors import OfframpError

__all__ = ["Kernel"]

_RAW_STEP = 16
_CUTOFF = {torch.float32: 2.0**-26, torch.bfloat16: 2.0**-14}


@final
class Kernel:
    """Runs a program for one input at a time, on torch's threads.

    For each input: ``write`` the maps that the program reads, and for each segment in turn ``settle`` its mask and
    ``run`` it. One call at a time: an object holds one input's maps, and raises where two threads use it at once; give
    each thread its own. A later change of the program's tensors is not seen.
    dtype: what maps hold, float32 or bfloat16. In bfloat16 weights are rounded to it too, but those of depthwise
    convolutions; all is worked out in float32, and rounded once where an operation writes it and once where others are
    interpolated from it. Where no instruction set multiplies bfloat16, all stays float32 and is rounded when read.
    isa: another instruction set than the best one. cutoff: neighbours of an interpolated place that weigh less than
    this, relative to its nearest one, are left out; None: 2^-26 in float32 and 2^-14 in bfloat16, which is below what
    they resolve. 1e-3 leaves two or three of them. everywhere: every mask will be true at every place, which is faster
    known beforehand. OfframpError names what the kernel cannot run: see ``faults``.
    """

    def __init__(self, program: Program, *, dtype: torch.dtype = torch.float32, isa: str | None = None,
                 cutoff: float | None = None, everywhere: bool = False) -> None:
        self._lib = needed("Kernel()")
        if found := faults(program):
            raise OfframpError(expected="a program that the compiled kernel runs", got="; ".join(found[:5]),
                               where="Kernel()", todo="run it through PyTorch")
        if dtype not in _CUTOFF:
            raise OfframpError(expected=" or ".join(map(str, _CUTOFF)), got=str(dtype), where="Kernel()")
        sets = isas(dtype)
        name = next(iter(sets)) if isa is None else isa
        if name not in sets:
            raise OfframpError(expected=f"one of this machine's instruction sets for {dtype}, {sets}", got=repr(isa),
                               where="Kernel()")
        cutoff = _CUTOFF[dtype] if cutoff is None else cutoff
        if not 0 <= cutoff < 1:
            raise OfframpError(expected="0 <= cutoff < 1", got=str(cutoff), where="Kernel()")
        self.program, self.dtype = program, dtype
        self._isa, self._stores = native.instruction_sets()[name]
        self._cutoff = cutoff
        self._everywhere = everywhere
        self._layout = banded(program, lay_out(program)) if everywhere else lay_out(program)
        self._held: list[Any] = []  # what C code has addresses of
        self._tensor_bytes = 0
        self._memory = [self._keep(torch.zeros(buffer.values, dtype=self._stores)) for buffer in self._layout.buffers]
        self._axes: dict[tuple[Resize, int, int], native.Axis] = {}
        self._lock = threading.Lock()
        self._done = -1
        self._levels = (native.Level * len(program.levels))(
            *(native.Level(level.height, level.width) for level in program.levels))
        self._regions = self._build_regions()
        self._plan = self._build_plan()

    def __del__(self) -> None:
        if hasattr(self, "_plan"):
            self._lib.offramp_release(self._plan)

    @property
    def bytes(self) -> int:
        """Of maps and packed weights; lists of places and raw copies come on top, as masks need them."""
        return self._tensor_bytes

    def settle(self, mask: Tensor) -> None:
        """From here on this mask: (H, W), bool, true where active, at any size; levels see it by nearest."""
        if mask.ndim != 2 or mask.dtype != torch.bool or mask.device.type != "cpu" or not mask.numel():
            raise OfframpError(expected="a mask (H, W) of bool on the CPU", got=_told(mask), where="Kernel.settle()",
                               todo="mask[n, 0] for one image of a batch, .cpu() for another device")
        if self._everywhere and not mask.all():
            raise OfframpError(expected="a mask that is true everywhere", got=_told(mask), where="Kernel.settle()",
                               todo="Kernel(program, everywhere=False)")
        mask = mask.contiguous()
        with self._alone("settle"):
            if not self._lib.offramp_settle(self._plan, mask.data_ptr(), *mask.shape):
                raise MemoryError("no memory for the places that a mask names")

    def write(self, map_: int, x: Tensor) -> None:
        """Fill a kept map: x (C, H, W)."""
        self._check(map_, x, "write")
        with self._alone("write"):
            self._inside(map_).copy_(x)

    def write_region(self, map_: int, x: Tensor) -> None:
        """Fill a kept map at the places alone that the mask settled last has operations read: x (C, H, W), float32 or
        bfloat16."""
        self._check(map_, x, "write_region")
        self._check_type(x, "write_region")
        own = self.program.maps[map_]
        with self._alone("write_region"):
            self._lib.offramp_write_region(
                self._isa, ctypes.addressof(self._regions[own.region]), self._plane(View(map_, 0, own.channels)),
                own.channels, x.data_ptr(), *x.stride(), 4 // x.itemsize, torch.get_num_threads())

    def read(self, map_: int) -> Tensor:
        """A copy of a kept map, (C, H, W) of ``dtype``, place by place; outside its region it holds anything."""
        with self._alone("read"):
            return self._inside(self._kept(map_, "read")).permute(1, 2, 0).to(self.dtype, copy=True).permute(2, 0, 1)

    def view(self, map_: int) -> Tensor:
        """A kept map where it lies, (C, H, W), for as long as nothing runs; of another type than ``dtype`` a copy."""
        return self._inside(self._kept(map_, "view")).to(self.dtype)

    def read_active(self, map_: int, out: Tensor) -> None:
        """Write what a kept map holds at its level's active places into ``out`` (C, H, W), float32 or bfloat16, and
        nothing elsewhere."""
        self._check(map_, out, "read_active")
        self._check_type(out, "read_active")
        own = self.program.maps[map_]
        with self._alone("read_active"):
            self._lib.offramp_read_active(
                self._isa, ctypes.addressof(self._levels[own.level]), self._plane(View(map_, 0, own.channels)),
                own.channels, out.data_ptr(), *out.stride(), 4 // out.itemsize)

    def run(self, segment: int, stop: Tensor | None = None, deadline_ns: int | None = None) -> bool:
        """Run one segment; whether it was completed before ``stop`` was set or the deadline came.

        stop: one int32, which any thread may set to another value than 0. deadline_ns: of ``time.monotonic_ns()``.
        Both are looked at before each chunk of places. Segments run in their order, each after the one before it was
        completed; the first one begins anew.
        """
        if not 0 <= segment < len(self.program.segments):
            raise OfframpError(expected=f"a segment of {len(self.program.segments)}", got=str(segment),
                               where="Kernel.run()")
        if stop is not None and (stop.dtype != torch.int32 or stop.numel() != 1 or stop.device.type != "cpu"):
            raise OfframpError(expected="one int32 on the CPU to stop by", got=_told(stop), where="Kernel.run()")
        first, last = self._layout.spans[segment]
        with self._alone("run"):
            if segment and self._done != segment - 1:
                raise OfframpError(expected=f"segment {segment - 1} completed before segment {segment}",
                                   got="one that was given up, or not run", where="Kernel.run()",
                                   todo="write the maps again and begin with segment 0")
            self._done = -1
            count = self._lib.offramp_run(
                self._plan, first, last, torch.get_num_threads(), None if stop is None else stop.data_ptr(),
                0 if deadline_ns is None else max(1, deadline_ns))
            if count == last - first:
                self._done = segment
        return bool(count == last - first)

    def density(self, level: int) -> float:
        """The part of a level's places that is active."""
        size = self.program.levels[level]
        return float(self._levels[level].active.count / (size.height * size.width))

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise OfframpError(expected="one call at a time", got="two threads with one kernel",
                               where=f"Kernel.{what}()", todo="give each thread a kernel of its own")
        try:
            yield
        finally:
            self._lock.release()

    def _kept(self, map_: int, where: str) -> int:
        if map_ not in self.program.kept:
            raise OfframpError(expected=f"a map of {sorted(self.program.kept)}, which are kept", got=str(map_),
                               where=f"Kernel.{where}()")
        return map_

    def _check(self, map_: int, x: Tensor, where: str) -> None:
        own = self.program.maps[self._kept(map_, where)]
        level = self.program.levels[own.level]
        if x.shape != (own.channels, level.height, level.width):
            raise OfframpError(expected=f"shape {(own.channels, level.height, level.width)}", got=_told(x),
                               where=f"Kernel.{where}()")

    def _check_type(self, x: Tensor, where: str) -> None:
        if x.dtype not in _CUTOFF or x.device.type != "cpu":
            raise OfframpError(expected="float32 or bfloat16 on the CPU", got=_told(x), where=f"Kernel.{where}()")

    def _inside(self, map_: int) -> Tensor:
        number = self._layout.buffer[map_]
        buffer = self._layout.buffers[number]
        return self._memory[number].as_strided((buffer.channels, buffer.height, buffer.width),
                                               (1, buffer.row, buffer.channels), buffer.origin)

    # What C is told, once.

    def _keep(self, tensor: Tensor) -> Tensor:
        self._held.append(tensor)
        self._tensor_bytes += tensor.nbytes
        return tensor

    def _floats(self, tensor: Tensor) -> int:
        """The address of a copy of these numbers."""
        return self._keep(tensor.detach().to(torch.float32, copy=True).contiguous()).data_ptr()

    def _array(self, of: Any, items: list[Any]) -> Any:
        self._held.append((of * len(items))(*items))
        return self._held[-1]

    def _plane(self, view: View | None) -> native.Plane:
        if view is None:
            return native.Plane()
        number = self._layout.buffer[view.map]
        buffer = self._layout.buffers[number]
        at = self._memory[number].data_ptr() + self._stores.itemsize * (buffer.origin + view.first)
        return native.Plane(at, buffer.row, buffer.channels)

    def _axis(self, resize: Resize, size: int, to: int) -> native.Axis:
        """Where each of ``to`` places reads, out of ``size``: torch's own arithmetic, in float32."""
        key = resize, size, to
        if key not in self._axes:
            first, second, part = axis_of(resize, size, to)
            self._axes[key] = native.Axis(self._keep(first).data_ptr(), self._keep(second).data_ptr(),
                                          None if part is None else self._keep(part).data_ptr())
        return self._axes[key]

    def _axes_of(self, resize: Resize, source: int, out: int) -> tuple[native.Axis, native.Axis]:
        there, here = self.program.levels[source], self.program.levels[out]
        return self._axis(resize, there.height, here.height), self._axis(resize, there.width, here.width)

    def _build_regions(self) -> Any:
        program = self.program
        interpolated = {program.maps[op.out.map].region for op in self._layout.ops if isinstance(op, Conv)}
        regions = []
        for number, region in enumerate(program.regions):
            reads = []
            for read in region.reads:
                target = -1 if read.region is None else read.region
                if isinstance(read.how, Window):
                    reads.append(native.Read(read.level, target, 0, 0, _window(read.how)))
                else:
                    reads.append(native.Read(read.level, target, 1, 0, native.Window(),
                                             *self._axes_of(read.how, region.level, read.level)))
            regions.append(native.Region(ctypes.addressof(self._levels[region.level]),
                                         ctypes.addressof(self._array(native.Read, reads)), len(reads),
                                         int(number in interpolated)))
        return (native.Region * len(regions))(*regions)

    def _build_plan(self) -> native.Plan:
        layout, excess = self._layout, 0
        ops = []
        built: dict[int, tuple[int, Any]] = {}  # an operation's bands share one
        for op, needs, rows, raw in zip(layout.ops, layout.needs, layout.rows, layout.raws, strict=True):
            if id(op) not in built:
                built[id(op)] = self._build_op(op)
            kind, body = built[id(op)]
            if isinstance(body, native.Conv):
                excess = max(excess, body.reach)
            self._held.append(body)
            region = ctypes.addressof(self._regions[self.program.maps[op.out.map].region])
            ops.append(native.Op(kind, raw, rows, ctypes.addressof(body), region,
                                 ctypes.addressof(self._array(ctypes.c_int32, list(needs))), len(needs)))
        raws = self._array(native.List, [native.List() for _ in range(1 + max(layout.raws, default=-1))])
        phases = torch.zeros(16 * len(ops), dtype=torch.int64)  # torch aligns it to a cache line
        self._held.append(phases)
        return native.Plan(
            ctypes.addressof(self._levels), ctypes.addressof(self._regions),
            ctypes.addressof(self._array(native.Op, ops)), len(self._levels), len(self._regions), len(ops), len(raws),
            ctypes.addressof(raws), phases.data_ptr(), native.List(), native.List(), self._isa, excess)

    def _build_op(self, op: Op) -> tuple[int, Any]:
        if isinstance(op, Conv):
            return self._build_conv(op)
        if isinstance(op, Pool):
            level = self.program.levels[self.program.maps[op.source.map].level]
            return native.POOL, native.Pool(
                self._plane(op.source), self._plane(op.out), _window(op.window), level.height, level.width,
                op.out.count, int(op.kind == "mean"), int(op.counts_padding))
        terms = self._array(native.Term, [self._build_term(op, term) for term in op.terms])
        scale, shift = (None if given is None else self._floats(given) for given in (op.scale, op.shift))
        return native.SUM, native.Sum(self._plane(op.out), ctypes.addressof(terms), scale, shift, len(op.terms),
                                      op.out.count, int(op.relu))

    def _build_term(self, op: Sum, term: Term) -> native.Term:
        if term.resize is None:
            return native.Term(self._plane(term.source))
        maps = self.program.maps
        axes = self._axes_of(term.resize, maps[term.source.map].level, maps[op.out.map].level)
        return native.Term(self._plane(term.source), *axes)

    def _build_conv(self, op: Conv) -> tuple[int, native.Conv]:
        source = self._plane(op.source)
        outputs, inputs, tall, wide = op.weight.shape
        depthwise = op.groups > 1 and inputs == 1 and outputs == op.groups
        down, across = op.window.dilation
        if op.groups == 1 and (wide == 1 or (across == 1 and inputs == source.step)):
            runs, run = [i * down * source.row for i in range(tall)], wide * inputs
        else:
            runs = [i * down * source.row + j * across * source.step for i in range(tall) for j in range(wide)]
            run = inputs
        falloff = [math.exp(-op.lam**2 * excess) for excess in range(native.SQUARES)]
        weight = _by_channel(op.weight) if depthwise else self._pack(op.weight, op.groups, run)
        return native.DEPTHWISE if depthwise else native.CONV, native.Conv(
            source, self._plane(op.out), self._plane(op.residual), self._keep(weight).data_ptr(),
            *(self._floats(given) for given in (op.scale, op.shift, op.bare)),
            ctypes.addressof(self._array(ctypes.c_int64, runs)), len(runs), run, inputs, outputs // op.groups,
            op.groups, int(op.relu), op.window.stride, op.window.padding,
            max(excess for excess, weight in enumerate(falloff) if weight >= self._cutoff), 0, tuple(falloff))

    def _pack(self, weight: Tensor, groups: int, run: int) -> Tensor:
        """(C_out, C_in / groups, k_h, k_w) in the order in which this instruction set reads it, ``run`` at a time."""
        inputs, taps, outputs = weight.shape[1], weight[0, 0].numel(), len(weight) // groups
        size = self._lib.offramp_packed_units(self._isa, inputs, outputs, taps, run)
        packed = torch.empty(groups, size, dtype=torch.int32)
        weight = weight.detach().to(self._stores).float().contiguous()
        for theirs, ours in zip(weight.chunk(groups), packed, strict=True):
            self._lib.offramp_pack(self._isa, theirs.data_ptr(), inputs, outputs, taps, run, ours.data_ptr())
        return packed


def _by_channel(weight: Tensor) -> Tensor:
    """Depthwise weights (C, 1, k_h, k_w) -> (taps, C rounded up)."""
    taps = weight.detach().float().flatten(1).t()
    out = torch.zeros(len(taps), -(-len(weight) // _RAW_STEP) * _RAW_STEP)
    out[:, :len(weight)] = taps
    return out


def _window(window: Window) -> native.Window:
    return native.Window(window.kernel, window.stride, window.padding, window.dilation)


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"

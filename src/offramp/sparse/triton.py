"""Runs a program on a CUDA device, each operation one or two launches of kernels in Triton's language.

Nothing is gathered and nothing waits for the host: kernels read inputs where they lie, and how many places there are
from the device's memory. A segment, with the geometry of its mask, is one CUDA graph, whose branches overlap.
"""

import importlib.util
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, final

import torch
from torch import Tensor

from offramp._kernel.layout import lay_out
from offramp._kernel.ops import Conv, Op, Pool, Program, Sum, View, Window
from offramp.errors import OfframpError
from offramp.sparse._triton_places import Launch, Places

__all__ = ["Triton", "suits"]

_LANES = 4  # branches that overlap
_POLL_S = 2e-5
_KINDS = (torch.float32, torch.bfloat16, torch.float16)
_LONGEST = 2**31 - 1
_capturing = threading.Lock()


def suits(program: Program) -> bool:
    """Whether a program is for :class:`Triton`: on CUDA, of a type that it multiplies, where Triton is installed."""
    weights = [op.weight for part in program.segments for op in part.ops if isinstance(op, Conv)]
    values = max((level.height * level.width * one.channels for one in program.maps
                  for level in (program.levels[one.level],)), default=0)
    return (bool(weights) and all(w.is_cuda and w.dtype == weights[0].dtype and w.dtype in _KINDS for w in weights)
            and values <= _LONGEST and importlib.util.find_spec("triton") is not None)


@final
class Triton:
    """As :class:`offramp.sparse.plain.Runner`, for one input at a time; maps have the weights' type, sums float32's.

    tf32: whether float32 is multiplied in TensorFloat-32; None: where ``torch.get_float32_matmul_precision()`` is
    another than "highest". Kernels are compiled when a segment first runs, which takes a minute or so where Triton's
    cache has none of them; from its second run on it is a graph. ``run`` returns before the device is done, except
    where it may be stopped: it then waits, and what has not begun by the time that it is stopped finds nothing to do.
    """

    def __init__(self, program: Program, *, tf32: bool | None = None) -> None:
        from offramp.sparse import _triton_kernels

        self._kernels = _triton_kernels
        self.program, self._layout = program, lay_out(program)
        like = next(op.weight for part in program.segments for op in part.ops if isinstance(op, Conv))
        self._like, self._device = like, like.device
        tf32 = torch.get_float32_matmul_precision() != "highest" if tf32 is None else tf32
        self._precision = "tf32" if tf32 else "ieee"
        self._programs = 3  # so that loops over tiles are walked without a device too
        if self._device.type == "cuda":
            self._programs = 4 * torch.cuda.get_device_properties(self._device).multi_processor_count
        buffers = [like.new_zeros(b.height * b.width, b.channels) for b in self._layout.buffers]
        self._maps = [buffers[at] for at in self._layout.buffer]
        self._raws = self._raw_copies()
        self._where = Places(program, self._layout, self._device)
        self._ops = [self._launches(op, raw) for op, raw in zip(self._layout.ops, self._layout.raws, strict=True)]
        self._settled = False
        self._compiled: set[int] = set()
        self._graphs: dict[int, Any] = {}
        self._last: Any = None
        self._lanes: list[Any] = []

    # ---- in and out ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def settle(self, mask: Tensor) -> None:
        if mask.ndim != 2 or mask.dtype != torch.bool or not mask.numel():
            raise OfframpError(expected="a bool mask (h, w)", got=f"{mask.dtype} {tuple(mask.shape)}", where="settle()")
        with self._here():
            self._where.settle(mask)
        self._settled = True

    @torch.inference_mode()
    def write(self, map_: int, x: Tensor) -> None:
        with self._here():
            self._maps[map_].copy_(x.permute(1, 2, 0).flatten(0, 1))

    write_region = write

    @torch.inference_mode()
    def read(self, map_: int) -> Tensor:
        with self._here():
            return self._picture(map_).clone()

    @torch.inference_mode()
    def read_active(self, map_: int, out: Tensor) -> None:
        number = self.program.maps[map_].level
        level = self.program.levels[number]
        with self._here():
            active = self._where.active(number).view(level.height, level.width) > 0
            out.copy_(torch.where(active.to(out.device), self._picture(map_).to(out), out))

    def density(self, level: int) -> float:
        self._check()
        return self._where.density(level)

    @torch.inference_mode()
    def run(self, segment: int, stop: Tensor | None = None, deadline_ns: int | None = None) -> bool:
        self._check()
        with self._here():
            if segment in self._compiled:
                done = not _over(stop, deadline_ns)
                if done:
                    self._graph(segment).replay()
            else:
                done = self._launched(segment, stop, deadline_ns)
            if done and self._device.type == "cuda":
                self._compiled.add(segment)
                done = (stop is None and deadline_ns is None) or self._waited(stop, deadline_ns)
        self._settled = done
        return done

    def _launched(self, segment: int, stop: Tensor | None, deadline_ns: int | None) -> bool:
        """One by one, as without a device, and on one the first time, when kernels are compiled."""
        self._where.mark(segment)
        first, last = self._layout.spans[segment]
        for launches in self._ops[first:last]:
            if _over(stop, deadline_ns):
                return False
            for launch in launches:
                launch()
        return True

    def _picture(self, map_: int) -> Tensor:
        level = self.program.levels[self.program.maps[map_].level]
        return self._maps[map_].T.reshape(-1, level.height, level.width)

    def _check(self) -> None:
        if not self._settled:
            raise OfframpError(expected="a mask", got="none yet, or a run that was stopped", where="Triton",
                               todo="call settle(mask) first; after a stop write the maps again and begin anew")

    # ---- on a device -----------------------------------------------------------------------------------------------

    def _here(self) -> Any:
        """This device, after what was last asked of it, on whichever stream that was."""
        return _Turn(self) if self._device.type == "cuda" else nullcontext()

    def _graph(self, segment: int) -> Any:
        if segment not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with _capturing, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._where.mark(segment)
                self._branch(*self._layout.spans[segment])
            self._graphs[segment] = graph
        return self._graphs[segment]

    def _branch(self, first: int, last: int) -> None:
        """Launch operations on a few streams, each after those it waits for."""
        main = torch.cuda.current_stream(self._device)
        start = main.record_event()
        self._lanes = self._lanes or [torch.cuda.Stream(self._device) for _ in range(_LANES)]
        used, done = set[int](), dict[int, Any]()
        for i, (lane, waits) in enumerate(lanes(self._layout.needs[first:last], first), first):
            stream = self._lanes[lane]
            for event in (() if lane in used else (start,)) + tuple(done[j] for j in waits):
                stream.wait_event(event)
            used.add(lane)
            with torch.cuda.stream(stream):
                for launch in self._ops[i]:
                    launch()
                done[i] = stream.record_event()
        for lane in used:
            main.wait_stream(self._lanes[lane])

    def _waited(self, stop: Tensor | None, deadline_ns: int | None) -> bool:
        """Wait for the device; false where that was cut short: where counts are 0, kernels that begin end at once."""
        done = torch.cuda.current_stream(self._device).record_event()
        while not done.query():
            if _over(stop, deadline_ns):
                aside = torch.cuda.Stream(self._device)
                while not done.query():  # again and again, for a mask's geometry may be counting yet
                    with torch.cuda.stream(aside):
                        self._where.counts.zero_()
                    aside.synchronize()
                return False
            time.sleep(_POLL_S)
        return True

    # ---- operations ------------------------------------------------------------------------------------------------

    def _launches(self, op: Op, raw: int) -> list[Launch]:
        if isinstance(op, Conv):
            return self._conv(op, raw)
        return [self._pool(op) if isinstance(op, Pool) else self._sum(op)]

    def _conv(self, op: Conv, raw: int) -> list[Launch]:
        outputs, inputs = len(op.weight) // op.groups, op.weight.shape[1]
        residual = self._rows(op.out if op.residual is None else op.residual)
        copy = self._raws[raw if raw >= 0 else 0]
        weight = op.weight.detach().unflatten(0, (op.groups, -1)).permute(0, 3, 4, 2, 1).contiguous()
        scale, shift, bare = (given.detach().float().contiguous() for given in (op.scale, op.shift, op.bare))
        places, count = self._where.listed(self.program.maps[op.out.map].level)
        level = self.program.levels[self.program.maps[op.out.map].level]
        finish = {"RESIDUAL": op.residual is not None, "RELU": op.relu}
        window = {"TAPS": op.window.kernel[0] * op.window.kernel[1], "ACROSS": op.window.kernel[1], "RAW": raw >= 0}
        depthwise = inputs == outputs == 1 and op.groups > 1
        if depthwise:
            weight = weight.flatten(1).T.contiguous()
        given = (*self._rows(op.source), *self._rows(op.out), copy, *residual, weight, scale, shift, places, count,
                 *self._seen(op.source, op.out, op.window))
        if depthwise:
            launches = [self._by_channel(self._kernels.depthwise, op.out, given, {**window, **finish})]
        else:
            p, n, k = _tile(level.height * level.width, inputs, outputs)
            tiles = -(-level.height * level.width // p) * -(-outputs // n) * op.groups
            launches = [Launch(self._kernels.convolve, (min(tiles, self._programs),), given, {
                "INPUTS": inputs, "OUTPUTS": outputs, "GROUPS": op.groups, **window, **finish,
                "PRECISION": self._precision, "P": p, "N": n, "K": k})]
        if raw >= 0:
            beside, many = self._where.beside(self.program.maps[op.out.map].region)
            active = self._where.active(self.program.maps[op.out.map].level)
            launches.append(self._by_channel(self._kernels.fill, op.out, (
                copy, *self._rows(op.out), *residual, scale, shift, bare, beside, many, active,
                level.height, level.width, float(op.lam) ** 2), finish))
        return launches

    def _sum(self, op: Sum) -> Launch:
        level, terms, hows = self.program.maps[op.out.map].level, [], list[int]()
        for term in op.terms:
            source = self.program.maps[term.source.map].level
            at = (0, 0, 0, 0) if term.resize is None else self._where.resized(level, source, term.resize)
            terms.append((*self._rows(term.source), self.program.levels[source].width, *at))
            hows.append(0 if term.resize is None else 1 if term.resize.mode == "nearest" else 2)
        scale, shift = (self._where.parts if given is None else given.detach().float().contiguous()
                        for given in (op.scale, op.shift))
        given = (tuple(terms), self._where.axes, self._where.parts, *self._rows(op.out), scale, shift,
                 *self._where.standing(op.out), self.program.levels[level].width)
        return self._by_channel(self._kernels.add, op.out, given, {
            "HOWS": tuple(hows), "SCALE": op.scale is not None, "SHIFT": op.shift is not None, "RELU": op.relu})

    def _pool(self, op: Pool) -> Launch:
        return self._by_channel(self._kernels.pool, op.out, (
            *self._rows(op.source), *self._rows(op.out), *self._where.standing(op.out),
            *self._seen(op.source, op.out, op.window)),
            {"TAPS": op.window.kernel[0] * op.window.kernel[1], "ACROSS": op.window.kernel[1],
             "MEAN": op.kind == "mean", "PADDED": op.counts_padding})

    def _by_channel(self, kernel: Any, out: View, given: tuple[Any, ...], constants: dict[str, Any]) -> Launch:
        """Of a kernel that works on each channel by itself."""
        n = min(64, max(16, 1 << (out.count - 1).bit_length()))
        p = 1024 // n
        tiles = -(-self._where.sizes[self.program.maps[out.map].level] // p) * -(-out.count // n)
        return Launch(kernel, (min(tiles, self._programs),), given,
                      {"CHANNELS": out.count, **constants, "P": p, "N": n})

    def _rows(self, view: View) -> tuple[Tensor, int]:
        """A matrix that begins with a view's first channel, and its step."""
        rows = self._maps[view.map]
        return rows.view(-1)[view.first :], rows.shape[1]

    def _seen(self, source: View, out: View, window: Window) -> tuple[int, ...]:
        there, here = (self.program.levels[self.program.maps[view.map].level] for view in (source, out))
        return there.height, there.width, here.width, *window.stride, *window.padding, *window.dilation

    def _raw_copies(self) -> list[Tensor]:
        sizes = [1] * (1 + max(self._layout.raws, default=-1)) or [1]
        for op, raw in zip(self._layout.ops, self._layout.raws, strict=True):
            if raw >= 0:
                level = self.program.levels[self.program.maps[op.out.map].level]
                sizes[raw] = max(sizes[raw], level.height * level.width * op.out.count)
        return [self._like.new_zeros(size) for size in sizes]



class _Turn:
    """A runner's device while it is used, one stream after the other."""

    def __init__(self, runner: Any) -> None:
        self._runner, self._device = runner, torch.cuda.device(runner._device)

    def __enter__(self) -> None:
        self._device.__enter__()
        if self._runner._last is not None:
            torch.cuda.current_stream().wait_event(self._runner._last)

    def __exit__(self, *raised: Any) -> None:
        self._runner._last = torch.cuda.current_stream().record_event()
        self._device.__exit__(*raised)


def _tile(places: int, inputs: int, outputs: int) -> tuple[int, int, int]:
    """Places, outputs and inputs that a program multiplies at a time."""
    k = next((k for k in (32, 16) if inputs % k == 0), 32)
    small = places <= 2048  # few programs, so that they share what little there is
    # a tile costs as its width, and a little for loading its inputs
    n = min((16, 32) if small else (64, 32, 16), key=lambda n: -(-outputs // n) * (n + 8))
    return 32 if small else 64, n, k


def lanes(needs: Sequence[Sequence[int]], first: int = 0) -> list[tuple[int, tuple[int, ...]]]:
    """By operation, counted from ``first``, the lane that it is put on, after those that are there already, and whom it
    waits for on others.

    >>> lanes([(), (), (0,), (1, 2)])
    [(0, ()), (1, ()), (0, ()), (0, (1,))]
    """
    ends, found = list[int](), dict[int, tuple[int, tuple[int, ...]]]()
    for i, before in enumerate(needs, first):
        lane = next((lane for lane, end in enumerate(ends) if end in before), None)
        if lane is None and len(ends) < _LANES:
            lane = len(ends)
            ends.append(i)
        elif lane is None:
            lane = min(range(len(ends)), key=ends.__getitem__)
        found[i] = lane, tuple(j for j in before if found[j][0] != lane)
        ends[lane] = i
    return list(found.values())


def _over(stop: Tensor | None, deadline_ns: int | None) -> bool:
    return (stop is not None and bool(stop)) or (deadline_ns is not None and time.monotonic_ns() >= deadline_ns)

"""What the compiled kernel refuses, said before it is given a program: whatever it takes cannot reach wrong memory."""

import math
from collections.abc import Iterator

from offramp._kernel.layout import reads_of
from offramp._kernel.ops import Conv, Op, Pool, Program, Read, Region, Resize, Sum, View, Window

__all__ = ["faults"]

_LONGEST = 2**16 - 1  # row and column of a place are 16 bits each
_MOST = (2**31 - 1) // 48  # places whose neighbours are numbered in 32 bits


def faults(program: Program) -> list[str]:
    """What of a program the kernel cannot run, one line each; none: it runs."""
    found = [f"level {i}: {level.height} x {level.width} places" for i, level in enumerate(program.levels)
             if not (0 < level.height <= _LONGEST and 0 < level.width <= _LONGEST
                     and level.height * level.width <= _MOST)]
    levels, regions, maps = (range(len(some)) for some in (program.levels, program.regions, program.maps))
    for i, region in enumerate(program.regions):
        if region.level not in levels or any(not _reads_well(program, i, region, read) for read in region.reads):
            found.append(f"region {i}: a level, a region not before it or a window that is none")
    for i, own in enumerate(program.maps):
        if own.level not in levels or own.region not in regions or own.channels < 1:
            found.append(f"map {i}: a level or region that is none")
        elif program.regions[own.region].level != own.level:
            found.append(f"map {i}: of level {own.level}, its region is of another")
    if found or not program.kept <= set(maps):
        return found or [f"kept: {sorted(program.kept - set(maps))} are no maps"]
    stands = set(program.kept)
    for segment in program.segments:
        for i, op in enumerate(segment.ops):
            where = f"{segment.name!r}, {type(op).__name__} {i}"
            found += [f"{where}: {fault}" for fault in _of_op(program, op)]
            found += [f"{where}: reads map {view.map}, which nobody has written" for view in reads_of(op)
                      if view.map not in stands]
            stands.add(op.out.map)
    return found


def _reads_well(program: Program, number: int, region: Region, read: Read) -> bool:
    if not 0 <= read.level < len(program.levels):
        return False
    if read.region is not None and not (
        0 <= read.region < number and program.regions[read.region].level == read.level
    ):
        return False
    return isinstance(read.how, Resize) or not any(_of_window(read.how))


def _of_window(window: Window) -> Iterator[str]:
    if min(*window.kernel, *window.stride, *window.dilation) < 1 or min(window.padding) < 0:
        yield f"{window}"


def _of_op(program: Program, op: Op) -> Iterator[str]:
    views = (*reads_of(op), op.out)
    for view in views:
        if not (0 <= view.map < len(program.maps) and view.first >= 0 and view.count > 0
                and view.first + view.count <= program.maps[view.map].channels):
            yield f"{view} is no part of a map"
            return
    level = {view: program.levels[program.maps[view.map].level] for view in views}
    if isinstance(op, Sum):
        yield from _of_sum(program, op)
        return
    yield from _of_window(op.window)
    if _meet(op.source, op.out):
        yield "writes what it reads"
    if isinstance(op, Pool):
        if op.source.count != op.out.count:
            yield f"{op.source.count} channels into {op.out.count}"
        return
    yield from _of_conv(op)
    if op.residual is not None:
        if op.residual.count != op.out.count or level[op.residual] != level[op.out]:
            yield "a residual of another size"
        if _meet(op.residual, op.out) and op.residual != op.out:
            yield "writes what it reads"


def _of_conv(op: Conv) -> Iterator[str]:
    shape = (op.out.count, op.source.count // max(1, op.groups), *op.window.kernel)
    if op.groups < 1 or op.source.count % op.groups or op.out.count % op.groups or tuple(op.weight.shape) != shape:
        yield f"a weight {tuple(op.weight.shape)} for {shape} in {op.groups} groups"
    for name in ("scale", "shift", "bare"):
        if tuple(getattr(op, name).shape) != (op.out.count,):
            yield f"{name} {tuple(getattr(op, name).shape)}"
    if not math.isfinite(op.lam):
        yield f"lambda {op.lam}"
    for name in ("weight", "scale", "shift", "bare"):
        given = getattr(op, name)
        if not given.is_floating_point() or given.device.type != "cpu":
            yield f"{name} of {given.dtype} on {given.device}"


def _of_sum(program: Program, op: Sum) -> Iterator[str]:
    out = program.levels[program.maps[op.out.map].level]
    if not op.terms:
        yield "no terms"
    for term in op.terms:
        if term.source.count != op.out.count:
            yield f"{term.source.count} channels into {op.out.count}"
        if term.resize is None and program.levels[program.maps[term.source.map].level] != out:
            yield "a term of another size, not resized"
        if _meet(term.source, op.out) and (term.resize is not None or term.source != op.out):
            yield "writes what it reads"
    for name in ("scale", "shift"):
        given = getattr(op, name)
        if given is not None and (tuple(given.shape) != (op.out.count,) or given.device.type != "cpu"):
            yield f"{name} {tuple(given.shape)} on {given.device}"


def _meet(one: View, other: View) -> bool:
    return one.map == other.map and one.first < other.first + other.count and other.first < one.first + one.count

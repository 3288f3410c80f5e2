"""Which memory a program's maps have, in which order its operations run, and which of them wait for which.

Operations are sorted by how many others they wait for, one after the other: those of several branches then lie side by
side, and threads that find one done go on with the next. An operation waits for those before it that write what it
reads, read what it writes or write what it writes, or whose raw copy it takes.
"""

from collections import defaultdict
from dataclasses import dataclass

from offramp._kernel.ops import Conv, Op, Program, Sum, View

__all__ = ["Buffer", "Layout", "lay_out", "needed_of", "reads_of"]

_MOST_RAWS = 8


@dataclass(frozen=True)
class Buffer:
    """Framed memory of one map after another, all of this size.

    Left of a row's first place is what is right of the last row's end: one frame serves as both.
    """

    height: int
    width: int
    channels: int
    frame: tuple[int, int]

    @property
    def row(self) -> int:
        return (self.width + self.frame[1]) * self.channels

    @property
    def origin(self) -> int:
        """Where place (0, 0) is."""
        return self.frame[0] * self.row + self.frame[1] * self.channels

    @property
    def values(self) -> int:
        return (self.height + 2 * self.frame[0]) * self.row + self.frame[1] * self.channels


@dataclass(frozen=True)
class Layout:
    ops: tuple[Op, ...]
    """Of all segments, in the order in which they start."""
    spans: tuple[tuple[int, int], ...]
    """By segment, its first operation and the one after its last."""
    needs: tuple[tuple[int, ...], ...]
    """By operation, others of its segment."""
    rows: tuple[tuple[int, int], ...]
    """By operation, those of its output that it works out: from the first to before the second."""
    raws: tuple[int, ...]
    """By operation, which raw copy; -1 for none."""
    buffers: tuple[Buffer, ...]
    buffer: tuple[int, ...]
    """By map."""


def reads_of(op: Op) -> tuple[View, ...]:
    """The views that an operation reads, in its order."""
    if isinstance(op, Conv):
        return (op.source,) if op.residual is None else (op.source, op.residual)
    return tuple(term.source for term in op.terms) if isinstance(op, Sum) else (op.source,)


def lay_out(program: Program) -> Layout:
    """For a program that stands the checks of ``faults``."""
    ops: list[Op] = []
    spans = []
    for segment in program.segments:
        first, waits = len(ops), _waits(segment.ops, list(range(len(program.maps))), 0)
        depths: list[int] = []
        for before in waits:
            depths.append(1 + max((depths[i] for i in before), default=0))
        ops += [segment.ops[i] for i in sorted(range(len(depths)), key=lambda i: depths[i])]
        spans.append((first, len(ops)))
    buffers, buffer = _share(program, ops)
    needs: list[tuple[int, ...]] = []
    raws: list[int] = []
    for first, last in spans:
        haloed = [isinstance(op, Conv) and bool(program.regions[program.maps[op.out.map].region].reads)
                  for op in ops[first:last]]
        found, taken = _needs(_waits(ops[first:last], buffer, first), haloed, first)
        needs, raws = needs + found, raws + taken
    rows = tuple((0, program.levels[program.maps[op.out.map].level].height) for op in ops)
    return Layout(tuple(ops), tuple(spans), tuple(needs), rows, tuple(raws), buffers, tuple(buffer))


def _waits(ops: "list[Op] | tuple[Op, ...]", memory: list[int], first: int) -> list[set[int]]:
    """By operation, which earlier ones touch the same channels of the same memory (by map), one of the two writing."""
    touched: dict[int, list[tuple[int, View, bool]]] = defaultdict(list)
    found = []
    for i, op in enumerate(ops, first):
        mine = [(view, False) for view in reads_of(op)] + [(op.out, True)]
        found.append({j for view, writes in mine for j, other, wrote in touched[memory[view.map]]
                      if (writes or wrote) and view.first < other.first + other.count
                      and other.first < view.first + view.count})
        for view, writes in mine:
            touched[memory[view.map]].append((i, view, writes))
    return found


def _needs(waits: list[set[int]], haloed: list[bool], first: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """What is left to wait for where what is waited for anyway is left out; with raw copies, which are waited for too.

    A raw copy goes on to an operation that waits for its last user anyway, while there are few of them.
    """
    before: list[int] = []  # by operation, all that are done when it starts, as bits
    users: list[int] = []
    needs, raws = [], []
    for i, direct in enumerate(waits, first):
        done = 0
        for j in direct:
            done |= before[j - first] | 1 << (j - first)
        raw = -1
        if haloed[i - first]:
            known = [k for k, user in enumerate(users) if done >> (user - first) & 1]
            if not known and len(users) < _MOST_RAWS:
                raw = len(users)
                users.append(i)
            else:
                raw = max(known, key=lambda k: users[k]) if known else min(range(len(users)), key=lambda k: users[k])
                direct = direct | {users[raw]}
                done |= before[users[raw] - first] | 1 << (users[raw] - first)
                users[raw] = i
        covered = 0
        for j in direct:
            covered |= before[j - first]
        needs.append(tuple(sorted(j for j in direct if not covered >> (j - first) & 1)))
        raws.append(raw)
        before.append(done)
    return needs, raws


def needed_of(waits: list[set[int]], first: int) -> list[tuple[int, ...]]:
    """By operation, what is left to wait for where what is waited for anyway is left out; none has a raw copy."""
    return _needs(waits, [False] * len(waits), first)[0]


def _share(program: Program, ops: list[Op]) -> tuple[tuple[Buffer, ...], list[int]]:
    """Memory by map: maps of one size whose lives do not meet have the same, so that no frame is ever written."""
    frames = _frames(program, ops)
    last = {view.map: i for i, op in enumerate(ops) for view in (*reads_of(op), op.out)}
    buffers: list[Buffer] = []
    free: dict[Buffer, list[int]] = defaultdict(list)
    own = [-1] * len(program.maps)

    def take(index: int) -> None:
        level = program.levels[program.maps[index].level]
        like = Buffer(level.height, level.width, program.maps[index].channels, frames[index])
        if free[like]:
            own[index] = free[like].pop()
        else:
            own[index] = len(buffers)
            buffers.append(like)

    given = program.kept - {op.out.map for op in ops}
    for index in sorted(given):  # before any memory is free
        take(index)
    for i, op in enumerate(ops):
        dying = {view.map for view in reads_of(op) if last[view.map] == i and view.map not in program.kept}
        over = _over(op) if own[op.out.map] < 0 else None
        if over is not None and over.map in dying and over.first == op.out.first:
            free[buffers[own[over.map]]].append(own[over.map])
            dying.remove(over.map)
        if own[op.out.map] < 0:
            take(op.out.map)
        if last[op.out.map] == i and op.out.map not in program.kept:
            dying.add(op.out.map)
        for index in dying:
            free[buffers[own[index]]].append(own[index])
    for index in range(len(own)):
        if own[index] < 0:  # nobody's
            take(index)
    return tuple(buffers), own


def _over(op: Op) -> View | None:
    """What an operation reads at the very place that it writes, and nowhere else: it may write over it."""
    if isinstance(op, Conv):
        return op.residual if op.residual is not None and op.residual.map != op.source.map else None
    if isinstance(op, Sum):
        for term in op.terms:
            if term.resize is None and [other.source.map for other in op.terms].count(term.source.map) == 1:
                return term.source
    return None


def _frames(program: Program, ops: list[Op]) -> list[tuple[int, int]]:
    """By map, how many rows and columns of zeros windows read around it. At least one, so that most maps agree."""
    frames = [[1, 1] for _ in program.maps]
    for op in ops:
        if not isinstance(op, Conv):
            continue
        source, out = (program.levels[program.maps[view.map].level] for view in (op.source, op.out))
        for axis, (size, there) in enumerate(((source.height, out.height), (source.width, out.width))):
            w = op.window
            far = (there - 1) * w.stride[axis] - w.padding[axis] + w.dilation[axis] * (w.kernel[axis] - 1)
            frame = frames[op.source.map]
            frame[axis] = max(frame[axis], w.padding[axis], far - size + 1)
    return [(rows, columns) for rows, columns in frames]

"""Operations in bands of rows, for programs that run at every place.

A map of many channels is larger than a cache. Where one operation after another goes over all of it, each reads from
memory what the one before wrote there. In bands each follows the one before at a distance of a few rows, whose maps are
still in the cache: a wave through the whole program.
"""

from collections import defaultdict
from dataclasses import replace

from offramp._kernel.axes import axis_of
from offramp._kernel.layout import Layout, needed_of, reads_of
from offramp._kernel.ops import Conv, Op, Pool, Program, View

__all__ = ["banded"]

PLACES = 480
"""Of a band: few tasks, whose rows of 256 channels in float32 are half a megabyte."""

Rows = tuple[int, int]


def banded(program: Program, layout: Layout) -> Layout:
    """The same operations, in bands that run as early as what they read allows, from the top of the picture down."""
    ops: list[Op] = []
    rows: list[Rows] = []
    needs: list[tuple[int, ...]] = []
    spans = []
    for first, last in layout.spans:
        pieces = [(op, band) for op in layout.ops[first:last] for band in _bands(program, op)]
        waits = _waits(program, layout, pieces)
        most = max((len(_bands(program, op)) for op in layout.ops[first:last]), default=1)
        turns: list[float] = []
        for (op, band), before in zip(pieces, waits, strict=True):
            start = most * band[0] / _height(program, op)
            turns.append(max([start, *(turns[i] + 1 for i in before)]))
        order = sorted(range(len(pieces)), key=turns.__getitem__)
        number = {piece: i for i, piece in enumerate(order, len(ops))}
        needs += needed_of([{number[i] for i in waits[piece]} for piece in order], len(ops))
        spans.append((len(ops), len(ops) + len(pieces)))
        ops += [pieces[piece][0] for piece in order]
        rows += [pieces[piece][1] for piece in order]
    return replace(layout, ops=tuple(ops), rows=tuple(rows), needs=tuple(needs), raws=(-1,) * len(ops),
                   spans=tuple(spans))


def _height(program: Program, op: Op) -> int:
    return program.levels[program.maps[op.out.map].level].height


def _bands(program: Program, op: Op) -> list[Rows]:
    level = program.levels[program.maps[op.out.map].level]
    count = max(1, level.height * level.width // PLACES)
    edges = [level.height * i // count for i in range(count + 1)]
    return [(top, below) for top, below in zip(edges, edges[1:], strict=False) if top < below]


def _waits(program: Program, layout: Layout, pieces: list[tuple[Op, Rows]]) -> list[set[int]]:
    """By piece, which earlier ones touch the same rows and channels of the same memory, one of the two writing."""
    touched: dict[int, list[tuple[int, View, Rows, bool]]] = defaultdict(list)
    found = []
    for i, (op, band) in enumerate(pieces):
        mine = [(view, rows, False) for view, rows in zip(reads_of(op), _rows_read(program, op, band), strict=True)]
        mine.append((op.out, band, True))
        found.append({j for view, rows, writes in mine for j, other, theirs, wrote in touched[layout.buffer[view.map]]
                      if (writes or wrote) and rows[0] < theirs[1] and theirs[0] < rows[1]
                      and view.first < other.first + other.count and other.first < view.first + view.count})
        for view, rows, writes in mine:
            touched[layout.buffer[view.map]].append((i, view, rows, writes))
    return found


def _rows_read(program: Program, op: Op, band: Rows) -> list[Rows]:
    """Of each view that ``reads_of`` names."""
    top, last = band[0], band[1] - 1
    if isinstance(op, Conv | Pool):
        w = op.window
        above = top * w.stride[0] - w.padding[0]
        below = last * w.stride[0] - w.padding[0] + w.dilation[0] * (w.kernel[0] - 1) + 1
        return [(above, below), *[band] * (len(reads_of(op)) - 1)]
    found = []
    for term in op.terms:
        if term.resize is None:
            found.append(band)
            continue
        size = program.levels[program.maps[term.source.map].level].height
        first, second, _ = axis_of(term.resize, size, _height(program, op))
        found.append((int(first[top]), int(second[last]) + 1))
    return found

"""Programs that run at every place, in bands of rows."""

from collections import defaultdict

import pytest
import torch
from torch.nn import functional as F

from kernel.programs import insides, some_network
from kernel.witness import Sketch
from offramp import _kernel as kernel
from offramp._kernel import bands
from offramp._kernel.bands import banded
from offramp._kernel.layout import lay_out, reads_of
from offramp._kernel.ops import Conv, Op, Pool, Program
from offramp.errors import OfframpError

EVERYWHERE = torch.ones(1, 1, dtype=torch.bool)


def rows_read(program: Program, op: Op, rows: range) -> list[set[int]]:
    """By view, row after row; where a resize reads is seen by what a row of ones adds to."""
    found: list[set[int]] = []
    if isinstance(op, Conv | Pool):
        w = op.window
        found.append({y * w.stride[0] - w.padding[0] + i * w.dilation[0] for y in rows for i in range(w.kernel[0])})
        found += [set(rows)] * (len(reads_of(op)) - 1)
        return found
    for term in op.terms:
        if term.resize is None:
            found.append(set(rows))
            continue
        size, to = (program.levels[program.maps[m].level].height for m in (term.source.map, op.out.map))
        corners = {"align_corners": term.resize.align_corners} if term.resize.mode == "bilinear" else {}
        seen = F.interpolate(torch.eye(size)[:, None, :, None], (to, 1), mode=term.resize.mode, **corners)[:, 0, :, 0]
        found.append({int(y) for row in rows for y in seen[:, row].nonzero()[:, 0]})
    return found


@pytest.mark.parametrize("seed", range(12))
def test_none_starts_before_what_it_reads_is_there_or_while_what_it_writes_over_is_read(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bands, "PLACES", 30)
    program, _, _ = some_network(seed, "random", operations=12)
    plain = lay_out(program)
    laid = banded(program, plain)
    every = {op: number for number, op in enumerate(map(id, plain.ops))}
    covered: dict[int, list[tuple[int, int]]] = defaultdict(list)
    before: list[set[int]] = []
    last: dict[tuple[int, int, int], list[tuple[int, int, bool]]] = defaultdict(list)  # by buffer, row and channel
    for i, (op, rows, needs) in enumerate(zip(laid.ops, laid.rows, laid.needs, strict=True)):
        covered[id(op)].append(rows)
        first = next(first for first, end in laid.spans if first <= i < end)
        before.append({other for need in needs for other in (need, *before[need])} | set(range(first)))
        touches = [(view, read, False) for view, read in zip(
            reads_of(op), rows_read(program, op, range(*rows)), strict=True)] + [(op.out, set(range(*rows)), True)]
        for view, read, writes in touches:
            for at in ((laid.buffer[view.map], y, c) for y in read for c in range(view.first, view.first + view.count)):
                for other, order, wrote in last[at]:
                    if order != every[id(op)] and (writes or wrote):
                        assert order < every[id(op)], "what comes later in the program has been here"
                        assert other in before[i]
                last[at].append((i, every[id(op)], writes))
    for number, own in covered.items():
        height = program.levels[program.maps[plain.ops[every[number]].out.map].level].height
        assert sorted(y for rows in own for y in range(*rows)) == list(range(height))


@pytest.mark.parametrize("places", [1, 30, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_give_what_whole_maps_do(
    places: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    monkeypatch.setattr(bands, "PLACES", places)
    for seed in range(8):
        program, given, _ = some_network(seed, "full", operations=12)
        whole, waves = (kernel.Kernel(program, dtype=dtype, everywhere=there) for there in (False, True))
        for inside in insides(waves):
            inside.fill_(torch.nan)
        for sign in (1, -1, 1):  # what one call left is not what the next one reads
            for runner in (whole, waves):
                for map_, x in given.items():
                    runner.write(map_, sign * x)
                for segment in range(len(program.segments)):
                    runner.settle(EVERYWHERE)
                    assert runner.run(segment)
            for map_ in program.kept:
                assert torch.equal(waves.read(map_), whole.read(map_)), (seed, map_)
        for inside in insides(waves):
            inside.zero_()
        assert not any(memory.any() for memory in waves._memory), "a frame was written"


def test_a_chain_runs_through_the_picture_and_not_through_each_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "PLACES", 64)
    sketch = Sketch()
    first = last = sketch.map(4, 64, 16)
    for _ in range(5):
        last = sketch.conv(last, 4)
    layout = kernel.Kernel(sketch.program([first, last]), everywhere=True)._layout
    order = [id(op) for op in layout.ops]
    assert len(order) == 5 * 16 and len(set(order)) == 5
    deepest = order.index(order[-1])
    assert layout.rows[deepest] == (0, 4)
    assert order[:deepest].count(order[0]) < 16, "the last one starts before the first one is through"


def test_another_mask_is_refused() -> None:
    sketch = Sketch()
    first = sketch.map(4, 8, 8)
    runner = kernel.Kernel(sketch.program([first, sketch.conv(first, 4)]), everywhere=True)
    runner.settle(EVERYWHERE)
    with pytest.raises(OfframpError, match="true everywhere"):
        runner.settle(torch.eye(8, dtype=torch.bool))

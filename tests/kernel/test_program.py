"""Programs on the compiled kernel against a dense simulation in float64, on every instruction set of this machine."""

import ctypes
import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from kernel.masks import MASKS, mask_of
from kernel.programs import BILINEAR, CORNERS, NEAREST, agree, some_network
from kernel.witness import Sketch, mask_at, simulate, stands
from offramp import _kernel as kernel
from offramp._kernel.ops import (
    Conv,
    Pool,
    Resize,
    Sum,
    Term,
    Window,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    HERE = kernel.available()
pytestmark = pytest.mark.skipif(not HERE, reason="the kernel was not built")
SETS = kernel.isas()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("seed", range(40))
def test_programs_are_their_dense_simulation(seed: int, isa: str) -> None:
    agree(*some_network(seed, MASKS[seed % len(MASKS)]), isa)


@pytest.mark.parametrize("isa", SETS)
def test_blocks_of_channels_one_after_the_other_on_two_threads(isa: str, two_threads: None) -> None:
    """Weights of more than 1 MB, more places than a chunk, branches, and a pool of threads: other loops than small
    networks take."""
    sketch = Sketch(4)
    first, other = sketch.map(180, 24, 23), sketch.map(5, 40, 41)
    large = sketch.conv(first, 177)
    small = sketch.conv(sketch.conv(sketch.conv(other, 21, stride=2), 20), 21)
    mask = mask_of("random", 24, 23, 0.5, sketch.draw)
    given = {map_: torch.randn(sketch.maps[map_][1], *sketch.size(map_), generator=sketch.draw)
             for map_ in (first, other)}
    agree(sketch.program([first, other, large, small]), given, [mask], isa)


def test_operations_that_are_independent_overlap_and_the_others_wait(two_threads: None) -> None:
    """Many short operations, two chains that meet, again and again: an order that is not kept shows sooner or later."""
    sketch = Sketch(5)
    first = sketch.map(16, 18, 20)
    left = right = first
    for _ in range(6):
        left, right = sketch.conv(left, 16, residual=left), sketch.conv(right, 16)
        out = sketch.map(16, 18, 20)
        left = sketch.add(Sum((Term(sketch.whole(left)), Term(sketch.whole(right))), sketch.whole(out), relu=True))
    program = sketch.program([first, left])
    mask = mask_of("random", 18, 20, 0.4, sketch.draw)
    x = torch.randn(16, 18, 20, generator=sketch.draw)
    runner = agree(program, {first: x}, [mask], within=1e-4)
    assert len(runner._layout.buffers) < 8
    runner.settle(mask)
    said: list[set[bytes]] = [set(), set()]
    for number in range(200):  # of two inputs, for what one left in memory would do for itself
        runner.write(first, (x, -x)[number % 2])
        assert runner.run(0)
        said[number % 2].add(runner.read(left)[:, mask].numpy().tobytes())
    assert list(map(len, said)) == [1, 1]


@pytest.mark.parametrize("how", [BILINEAR, CORNERS, NEAREST])
def test_resizes_are_torchs(how: Resize) -> None:
    """All sizes, up and down, to the last bit of where they read."""
    corners = {"align_corners": how.align_corners} if how.mode == "bilinear" else {}
    for size in range(1, 30):
        sketch = Sketch()
        x = torch.randn(1, size, 31 - size)
        first, outs = sketch.map(1, size, 31 - size), []
        for to in range(1, 40, 3):
            out = sketch.map(1, to, 40 - to)
            outs.append(sketch.add(Sum((Term(sketch.whole(first), how),), sketch.whole(out))))
        runner = kernel.Kernel(sketch.program([first, *outs]))
        runner.write(first, x)
        runner.settle(torch.ones(1, 1, dtype=torch.bool))
        assert runner.run(0)
        for out in outs:
            expected = F.interpolate(x[None], sketch.size(out), mode=how.mode, **corners)[0]
            torch.testing.assert_close(runner.read(out), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_mean_at_ragged_ends_is_torchs(padding: int, counts: bool) -> None:
    """Where windows leave the map by more than its padding, as with ``ceil_mode``, these rows are never counted."""
    x = torch.randn(1, 5, 8, 6)
    expected = F.avg_pool2d(x, 3, 2, padding, ceil_mode=True, count_include_pad=counts)[0]
    sketch = Sketch()
    first, out = sketch.map(5, 8, 6), sketch.map(5, *expected.shape[1:])
    sketch.add(Pool(sketch.whole(first), sketch.whole(out), Window((3, 3), (2, 2), (padding,) * 2), "mean", counts))
    runner = kernel.Kernel(sketch.program([first, out]))
    runner.write(first, x[0])
    runner.settle(torch.ones(8, 6, dtype=torch.bool))
    assert runner.run(0)
    torch.testing.assert_close(runner.read(out), expected)


def test_a_mask_comes_to_each_level_as_torchs_nearest_brings_it() -> None:
    """Also where a product that is a whole number comes out below it in float32, as 29 * (45 / 87) does."""
    sketch = Sketch()
    outs = [sketch.map(1, height, 103 - 2 * height) for height in range(1, 50)]
    runner = kernel.Kernel(sketch.program(outs))
    for height in range(1, 52, 3):
        mask = torch.rand(height, 61 - height) < 0.5
        runner.settle(mask)
        for level, out in enumerate(outs):
            runner.write(out, torch.ones(1, *sketch.size(out)))
            found = torch.zeros(1, *sketch.size(out))
            runner.read_active(out, found)
            expected = F.interpolate(mask[None, None].to(torch.uint8), sketch.size(out), mode="nearest")[0]
            assert torch.equal(found, expected.float())
            assert runner.density(level) == pytest.approx(expected.double().mean().item())


@pytest.mark.parametrize("seed", range(12))
def test_regions_hold_what_is_read_and_nothing_else(seed: int) -> None:
    """Where sizes are such that no bilinear weight is 0."""
    sketch = Sketch(seed)
    first = sketch.map(2, 24, 32)
    fine = sketch.conv(first, 2)
    coarse = sketch.conv(sketch.conv(fine, 2, 5, stride=2), 2, (1, 7))
    pooled = sketch.map(2, 12, 16)
    sketch.add(Pool(sketch.whole(fine), sketch.whole(pooled), Window((2, 3), (2, 2), (0, 1)), "mean"))
    out = sketch.map(2, 24, 32)
    terms = Term(sketch.whole(coarse), BILINEAR), Term(sketch.whole(pooled), NEAREST), Term(sketch.whole(fine))
    sketch.add(Sum(terms, sketch.whole(out)))
    last = sketch.conv(out, 2, 3, dilation=3, stride=3)
    program = sketch.program([first, last])
    runner = kernel.Kernel(program)
    mask = mask_of(MASKS[seed % len(MASKS)], 12, 16, 0.1, sketch.draw)
    runner.settle(mask)
    for number, region in enumerate(program.regions):
        level, own = program.levels[region.level], runner._regions[number]
        size = level.height * level.width
        found = torch.tensor(list((ctypes.c_uint8 * size).from_address(own.all.at))).view(level.height, level.width)
        assert torch.equal(found.bool(), stands(program, number, mask))
        halo = (ctypes.c_uint32 * own.halo.count).from_address(own.halo.at) if own.halo.count else []
        expected = (stands(program, number, mask) & ~mask_at(mask, level)).nonzero()
        assert [(place >> 16, place & 0xffff) for place in halo] == [tuple(at) for at in expected.tolist()]


def test_a_sharp_kernel_takes_the_nearest_and_not_nothing() -> None:
    """exp(-30^2) is 0 in any float: the papers' quotient as it is printed would be 0 / 0."""
    sketch = Sketch()
    first = sketch.map(1, 5, 6)
    raw = plain(sketch.conv(first, 1, 1, relu=False, lam=30.0), sketch)
    last = sketch.conv(raw, 1)  # reads beside the active places
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[2, 2] = mask[2, 4] = mask[0, 0] = True
    x = torch.arange(30.0).reshape(1, 5, 6)
    runner = kernel.Kernel(sketch.program([first, raw, last]))
    runner.write(first, x)
    runner.settle(mask)
    assert runner.run(0)
    got, x = runner.read(raw)[0], x[0]
    assert got[2, 3] == (x[2, 2] + x[2, 4]) / 2 and got[1, 5] == x[2, 4] and got[0, 1] == x[0, 0]
    assert got[1, 1] == (x[2, 2] + x[0, 0]) / 2  # two corners, equally far


def plain(map_: int, sketch: Sketch) -> int:
    """The last convolution without weights, norm or anything."""
    op = sketch.segments[-1][-1]
    assert isinstance(op, Conv)
    one, nought = torch.ones(op.out.count), torch.zeros(op.out.count)
    sketch.segments[-1][-1] = replace(op, weight=torch.ones_like(op.weight), scale=one, shift=nought, bare=nought)
    return map_


@pytest.mark.parametrize(("cutoff", "within"), [(0.0, 1e-6), (2.0**-26, 1e-6), (1e-3, 3e-3)])
def test_what_a_cutoff_costs(cutoff: float, within: float) -> None:
    sketch = Sketch(6)
    first = sketch.map(4, 20, 20)
    raw = plain(sketch.conv(first, 4, 1, groups=4, relu=False, lam=3.0), sketch)
    last = sketch.conv(raw, 4)
    program = sketch.program([first, raw, last])
    mask = mask_of("random", 20, 20, 0.3, sketch.draw)
    x = torch.randn(4, 20, 20, generator=sketch.draw)
    runner = kernel.Kernel(program, cutoff=cutoff)
    runner.write(first, x)
    runner.settle(mask)
    assert runner.run(0)
    place = stands(program, program.maps[raw].region, mask)
    error = (runner.read(raw) - simulate(program, {first: x}, [mask])[raw])[:, place].abs().max().item()
    assert error < within * x.abs().max().item()
    assert (error > 1e-5) == (cutoff == 1e-3)


def test_a_nan_stays() -> None:
    sketch = Sketch()
    first = sketch.map(1, 1, 4)
    conv = plain(sketch.conv(first, 1, 1, residual=first), sketch)
    out, pooled = sketch.map(1, 1, 4), sketch.map(1, 1, 4)
    sketch.add(Sum((Term(sketch.whole(conv)),), sketch.whole(out), relu=True))
    sketch.add(Pool(sketch.whole(out), sketch.whole(pooled), Window((1, 3), (1, 1), (0, 1)), "max"))
    runner = kernel.Kernel(sketch.program([first, conv, out, pooled]))
    runner.write(first, torch.tensor([[[3.0, torch.nan, -2.0, -1.0]]]))
    runner.settle(torch.ones(1, 4, dtype=torch.bool))
    assert runner.run(0)
    for map_ in (conv, out):
        assert runner.read(map_)[0, 0].nan_to_num(-9).tolist() == [6, -9, 0, 0]
    assert runner.read(pooled)[0, 0].nan_to_num(-9).tolist() == [-9, -9, -9, 0]


def test_maps_whose_lives_do_not_meet_share_memory() -> None:
    sketch = Sketch()
    first = last = sketch.map(8, 16, 16)
    for _ in range(10):
        last = sketch.conv(last, 8)
    x = torch.randn(8, 16, 16)
    mask = mask_of("random", 16, 16, 0.4, sketch.draw)
    runner = agree(sketch.program([first, last]), {first: x}, [mask], within=1e-4)
    assert len(runner._layout.buffers) == 3  # one is given
    assert runner.bytes < 4 * (3 * 19 * 19 * 8 + 10 * (9 * 8 * 16 + 3 * 8) + 100)


def test_wide_frames_are_as_wide_as_windows_need() -> None:
    """A dilation beyond the picture: only the middle taps see something."""
    sketch = Sketch(3)
    first = sketch.map(17, 6, 9)
    outs = [sketch.conv(first, 20, dilation=d) for d in (6, 12)]
    x = torch.randn(17, 6, 9, generator=sketch.draw)
    agree(sketch.program([first, *outs]), {first: x}, [mask_of("random", 6, 9, 0.6, sketch.draw)])


def test_a_window_may_leave_the_map_at_its_end_alone() -> None:
    """As networks that are padded there only have it: the frame is as wide as the output's size asks."""
    sketch = Sketch(8)
    first, out = sketch.map(3, 8, 9), sketch.map(4, 4, 5)
    sketch.conv(first, 4, 5, stride=2, relu=False, out=sketch.whole(out))
    op = sketch.segments[0][0]
    assert isinstance(op, Conv)
    sketch.segments[0][0] = op = replace(op, window=replace(op.window, padding=(0, 0)))
    x = torch.randn(3, 8, 9, generator=sketch.draw)
    runner = kernel.Kernel(sketch.program([first, out]))
    runner.write(first, x)
    runner.settle(torch.ones(4, 5, dtype=torch.bool))
    assert runner.run(0)
    expected = F.conv2d(F.pad(x, (0, 4, 0, 3))[None], op.weight, stride=2)[0, :, :4, :5]
    expected = expected * op.scale[:, None, None] + op.shift[:, None, None]
    torch.testing.assert_close(runner.read(out), expected, rtol=1e-5, atol=1e-5)


def test_raw_copies_are_few_and_never_two_operations_at_once() -> None:
    sketch = Sketch()
    first = sketch.map(4, 8, 8)
    ends = [sketch.conv(sketch.conv(sketch.conv(first, 4), 4), 4) for _ in range(12)]
    laid = kernel.Kernel(sketch.program([first, *ends]))._layout
    before: list[set[int]] = []
    for needs in laid.needs:
        before.append({other for need in needs for other in (need, *before[need])})
    users = [[i for i, raw in enumerate(laid.raws) if raw == copy] for copy in range(max(laid.raws) + 1)]
    assert len(users) == 8 and sum(map(len, users)) == 24  # the last of each branch has no halo
    assert all(one in before[other] for same in users for one, other in itertools.pairwise(same))

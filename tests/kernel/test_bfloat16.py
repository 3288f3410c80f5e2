"""Programs in bfloat16 against a dense simulation in float64 of the numbers that they were given, rounded."""

import math
import warnings
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from kernel.masks import MASKS, mask_of
from kernel.programs import BILINEAR, agree, some_network
from kernel.witness import Sketch, mask_at, simulate, stands
from offramp import _kernel as kernel
from offramp._kernel.ops import Conv, Pool, Program, Sum, Term, View, Window
from offramp.errors import OfframpError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    HERE = kernel.available()
pytestmark = pytest.mark.skipif(not HERE, reason="the kernel was not built")


def rounded(program: Program) -> Program:
    """With weights of convolutions that are bfloat16 already."""
    segments = tuple(replace(part, ops=tuple(
        replace(op, weight=op.weight.bfloat16().float()) if isinstance(op, Conv) else op for op in part.ops))
        for part in program.segments)
    return replace(program, segments=segments)


def half_ulp(exact: Tensor) -> Tensor:
    """Half the distance of two values of bfloat16 around each of these."""
    return torch.ldexp(torch.ones_like(exact), torch.frexp(exact)[1] - 9)


@pytest.mark.parametrize("seed", range(40))
def test_programs_are_their_dense_simulation(seed: int, bfloat16_set: str) -> None:
    """Nine operations one after the other: a place, channel or weight that is taken for another shows."""
    program, given, masks = some_network(seed, MASKS[seed % len(MASKS)])
    given = {map_: x.bfloat16() for map_, x in given.items()}
    agree(rounded(program), given, masks, bfloat16_set, within=0.04, dtype=torch.bfloat16)


@pytest.mark.parametrize(("inputs", "outputs", "kernel_size", "groups"), [
    (48, 48, 3, 1), (18, 18, 3, 1), (17, 33, 3, 1), (5, 3, 1, 1), (33, 2, 1, 1), (1, 1, 3, 1), (40, 40, 3, 40),
    (14, 6, 3, 2), (180, 177, 3, 1)])
@pytest.mark.parametrize("residual", [False, True])
def test_an_active_place_is_rounded_once_and_an_interpolated_one_of_values_rounded_once(
    inputs: int, outputs: int, kernel_size: int, groups: int, residual: bool, bfloat16_set: str,
) -> None:
    sketch = Sketch(inputs)
    first, beside = sketch.map(inputs, 17, 22), sketch.map(outputs, 17, 22)
    out = sketch.conv(first, outputs, kernel_size, groups=groups, residual=beside if residual else None, lam=0.7)
    last = sketch.conv(out, 1)  # reads beside active places
    program = rounded(sketch.program([first, beside, out, last]))
    op = program.segments[0].ops[0]
    assert isinstance(op, Conv)
    given = {map_: torch.randn(sketch.maps[map_][1], 17, 22, generator=sketch.draw).bfloat16()
             for map_ in (first, beside)}
    mask = mask_of("random", 17, 22, 0.3, sketch.draw)
    runner = kernel.Kernel(program, dtype=torch.bfloat16, isa=bfloat16_set)
    for map_, x in given.items():
        runner.write(map_, x)
    runner.settle(mask)
    assert runner.run(0)
    exact = simulate(program, given, [mask])[out]
    bare = replace(op, scale=torch.ones(outputs), shift=torch.zeros(outputs), residual=None, relu=False)
    raw = simulate(replace(program, segments=(replace(program.segments[0], ops=(bare,)),)), given, [mask])[out]
    largest = torch.where(mask, raw.abs(), 0).amax((1, 2))  # what interpolation takes means of
    error = (runner.read(out).double() - exact).abs()
    sums = 2e-6 * math.sqrt(inputs * kernel_size**2 / groups) * (1 + op.scale.abs())[:, None, None]
    assert bool((error <= half_ulp(exact) * (1 + 1e-3) + sums)[:, mask].all())
    halo = stands(program, program.maps[out].region, mask) & ~mask
    assert halo.any()
    spread = half_ulp(largest) * op.scale.abs()
    assert bool((error <= half_ulp(exact) + spread[:, None, None] * 1.01 + 10 * sums)[:, halo].all())


def test_sums_and_pools_are_rounded_once(bfloat16_set: str) -> None:
    sketch = Sketch(3)
    first, coarse = sketch.map(37, 13, 15), sketch.map(37, 6, 7)
    summed, largest, mean = sketch.map(37, 13, 15), sketch.map(37, 13, 15), sketch.map(37, 7, 8)
    sketch.add(Sum((Term(sketch.whole(first)), Term(sketch.whole(coarse), BILINEAR)), sketch.whole(summed),
                   torch.randn(37, generator=sketch.draw), torch.randn(37, generator=sketch.draw), True))
    for out, stride, kind in ((largest, 1, "max"), (mean, 2, "mean")):
        sketch.add(Pool(sketch.whole(first), sketch.whole(out), Window((3, 3), (stride, stride), (1, 1)), kind))
    program = sketch.program([first, coarse, summed, largest, mean])
    given = {map_: torch.randn(37, *sketch.size(map_), generator=sketch.draw).bfloat16() for map_ in (first, coarse)}
    mask = torch.ones(13, 15, dtype=torch.bool)
    runner = agree(program, given, [mask], bfloat16_set, within=0.01, dtype=torch.bfloat16)
    for map_, x in given.items():
        runner.write(map_, x)
    assert runner.run(0)
    exact = simulate(program, given, [mask])
    for map_ in (summed, largest, mean):
        assert bool(((runner.read(map_).double() - exact[map_]).abs() <= half_ulp(exact[map_]) * 1.001 + 1e-6).all())


def test_an_odd_run_does_not_see_what_lies_behind_it(bfloat16_set: str) -> None:
    """Products take two values at a time; the second of the last pair is another place's, which may hold anything."""
    sketch = Sketch(1)
    first = sketch.map(17, 9, 9)
    last = sketch.conv(View(first, 0, 15), 20, 3)
    also = sketch.conv(first, 18, 3)
    program = sketch.program([first, last, also])
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[4, 2] = True
    x = torch.full((17, 9, 9), torch.nan)
    x[:15, 3:6, 1:4] = x[15:, 3:6, 1:4] = 1.0
    runner = kernel.Kernel(program, dtype=torch.bfloat16, isa=bfloat16_set)
    runner.write(first, x)
    x[15:] = torch.nan
    runner.settle(mask)
    assert runner.run(0)
    assert not runner.read(last)[:, 4, 2].isnan().any() and not runner.read(also)[:, 4, 2].isnan().any()


@pytest.mark.parametrize("isa", kernel.isas())
def test_without_products_of_bfloat16_the_doors_round(isa: str) -> None:
    """All sets of float32 serve, and give its answers."""
    program, given, masks = some_network(5, "random")
    said = []
    for dtype in (torch.float32, torch.bfloat16):
        runner = kernel.Kernel(program, dtype=dtype, isa=isa)
        for map_, x in given.items():
            runner.write(map_, x.bfloat16())
        for number, mask in enumerate(masks):
            runner.settle(mask)
            assert runner.run(number)
        said.append(runner)
    for map_ in program.kept:
        wide, narrow = (runner.read(map_) for runner in said)
        where = stands(program, program.maps[map_].region, masks[-1])
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow[:, where], wide.bfloat16()[:, where], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("isa", kernel.isas(torch.bfloat16))
def test_active_places_are_read_in_the_type_of_what_they_are_written_to(isa: str) -> None:
    """Rounded to the nearest, ties to even, as torch does; where nothing is active, nothing is written."""
    sketch = Sketch()
    first = sketch.map(3, 20, 30)
    runner = kernel.Kernel(sketch.program([first]), dtype=torch.bfloat16, isa=isa)
    x = torch.randn(3, 20, 30, generator=sketch.draw)
    x[0, :3, 0] = torch.tensor([torch.inf, torch.nan, 1.00390625])
    x[0, 3, 0] = torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)  # a NaN that rounding carries over
    runner.write(first, x)
    mask = mask_of("random", 20, 30, 0.5, sketch.draw) | (torch.arange(30) == 0)
    runner.settle(mask)
    for dtype, strided in product((torch.float32, torch.bfloat16), (False, True)):
        out = torch.full((3, 20, 30), 7.0, dtype=dtype)
        out = out.permute(1, 2, 0).contiguous().permute(2, 0, 1) if strided else out
        runner.read_active(first, out)
        expected = torch.where(mask_at(mask, sketch.program([first]).levels[0]), x.bfloat16().to(dtype), 7.0).to(dtype)
        if dtype == torch.float32 and isa in kernel.isas():
            expected = torch.where(mask, x, 7.0)  # maps are float32 there
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_other_types_are_refused() -> None:
    sketch = Sketch()
    first = sketch.map(1, 2, 2)
    program = sketch.program([first])
    with pytest.raises(OfframpError, match="float16"):
        kernel.Kernel(program, dtype=torch.float16)
    with pytest.raises(OfframpError, match="float32"):
        kernel.Kernel(program, isa="avx512_bf16")
    with pytest.raises(OfframpError, match="float64"):
        kernel.Kernel(program).read_active(first, torch.zeros(1, 2, 2, dtype=torch.float64))

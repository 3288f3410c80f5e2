"""Dense products by tiles of bfloat16 (amx_bf16), emulated where the CPU has none, against avx512_bf16."""

import random
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernel.masks import MASKS, mask_of
from kernel.tiles import TileBuilds, library
from kernel.witness import Sketch, stands
from offramp import _kernel as kernel
from offramp._kernel.ops import Conv, View

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    HERE = kernel.available()
pytestmark = pytest.mark.skipif(not HERE, reason="the kernel was not built")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells what a CPU has")
def test_tiles_are_the_first_choice_where_the_cpu_has_them_and_none_where_not() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    sets = kernel.isas(torch.bfloat16)
    assert "amx_bf16" not in kernel.isas()
    if "amx_bf16" in sets:
        assert sets[0] == "amx_bf16" and {"amx_bf16", "amx_tile", "avx512_bf16"} <= {*flags}
    else:
        assert not {"amx_bf16", "amx_tile", "avx512_bf16"} <= {*flags} or sys.platform != "linux"


@pytest.mark.parametrize("seed", range(60))
def test_whole_numbers_are_those_of_avx512_bf16_to_the_last_bit(seed: int, tile_builds: TileBuilds) -> None:
    """So small that no order of sums rounds: one wrong place, channel, weight or raw copy shows."""
    draw, sketch = random.Random(seed), Sketch(seed)
    groups, size, stride = draw.choice([1, 1, 1, 2, 3]), draw.choice([1, 3, 3, (1, 7)]), draw.choice([1, 1, 2])
    inputs, outputs = (groups * draw.randint(1, 100 // groups) for _ in range(2))
    height, width = draw.randint(1, 7), draw.randint(1, 70)
    first = sketch.map(inputs + draw.randint(0, 3), height, width)
    beside = sketch.map(outputs, (height - 1) // stride + 1, (width - 1) // stride + 1)
    out = sketch.conv(View(first, sketch.maps[first][1] - inputs, inputs), outputs, size, stride=stride, groups=groups,
                      residual=beside if draw.random() < 0.5 else None, relu=draw.random() < 0.5, lam=0.7)
    last = sketch.conv(out, 1)  # reads beside active places
    program = sketch.program([first, beside, out, last])
    op, after = program.segments[0].ops
    assert isinstance(op, Conv)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape, generator=sketch.draw).float()

    op = replace(op, weight=whole(*op.weight.shape), scale=whole(outputs), shift=whole(outputs))
    program = replace(program, segments=(replace(program.segments[0], ops=(op, after)),))
    masks = [mask_of(kind, *sketch.size(beside), draw.uniform(0.02, 0.9), sketch.draw) for kind in MASKS]
    given = {map_: whole(sketch.maps[map_][1], *sketch.size(map_)) for map_ in (first, beside)}
    with library(tile_builds.emulated()):
        assert kernel.isas(torch.bfloat16)[:2] == ("amx_bf16", "avx512_bf16")
        runners = [kernel.Kernel(program, dtype=torch.bfloat16, isa=isa) for isa in ("amx_bf16", "avx512_bf16")]
    for mask in masks:
        said = []
        for runner in runners:
            for map_, x in given.items():
                runner.write(map_, x)
            runner.settle(mask)
            assert runner.run(0)
            said.append(runner.read(out)[:, stands(program, program.maps[out].region, mask)])
        assert torch.equal(*said), mask


@pytest.mark.parametrize("inputs", [15, 16, 31, 32, 47, 50, 64])
@pytest.mark.parametrize("size", [1, 3])
def test_adjacent_places_do_not_see_what_lies_behind_their_runs(
    inputs: int, size: int, tile_builds: TileBuilds
) -> None:
    """Tiles are read from the map itself, 32 values at a time: what other channels hold, must not be among them."""
    sketch = Sketch(inputs)
    first = sketch.map(inputs + 9, 5, 40)
    out = sketch.conv(View(first, 0, inputs), 20, size)
    mask = torch.zeros(5, 40, dtype=torch.bool)
    mask[2] = True
    x = torch.full((inputs + 9, 5, 40), torch.nan)
    x[:inputs] = 1.0
    with library(tile_builds.emulated()):
        runner = kernel.Kernel(sketch.program([first, out]), dtype=torch.bfloat16, isa="amx_bf16")
    runner.write(first, x)
    runner.settle(mask)
    assert runner.run(0)
    assert not runner.read(out)[:, 2].isnan().any()


@pytest.mark.parametrize(("old", "new"), [
    ("flushed(halves[0] + halves[1])", "flushed(halves[0] - halves[1])"),  # other numbers
    ("must(shapes.palette == 1", "must(shapes.palette == 2"),  # an illegal instruction
    ("char*>(from) + i * stride, (size_t)tile.bytes)", "char*>(from) + ((int64_t)i << 40), (size_t)tile.bytes)"),
], ids=["wrong", "illegal", "beyond memory"])
def test_tiles_that_fail_their_trial_are_not_used(old: str, new: str, tile_builds: TileBuilds) -> None:
    bad = tile_builds.emulated({"tiles.hpp": (old, new)})
    with library(bad), pytest.warns(UserWarning, match="does not use amx_bf16 here.*avx512_bf16.*What to do"):
        assert kernel.isas(torch.bfloat16)[0] == "avx512_bf16" and kernel.isa(torch.bfloat16) == "avx512_bf16"


def test_what_the_compiler_made_of_tiles_runs_instruction_by_instruction(tile_builds: TileBuilds) -> None:
    """The installed code, optimised, on a CPU that takes tiles for illegal: each of their instructions is decoded from
    its bytes and carried out by a second emulation, so that encodings, operands, addresses and stores are seen too."""
    if "amx_bf16" in kernel.isas(torch.bfloat16):
        pytest.skip("this CPU has tiles: no instruction is illegal, and the other tests run on them")
    code = """
import ctypes, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from kernel.masks import MASKS
from kernel.programs import agree, some_network
from kernel.test_bfloat16 import rounded
from kernel.tiles import library
from offramp import _kernel as kernel
from offramp._kernel import native
traps = ctypes.CDLL(sys.argv[1])
traps.how_many.restype = ctypes.c_int64
traps.carry_out_illegal()
with library(Path(sys.argv[2])):
    if native.loaded().offramp_isa(4) is None:
        sys.exit(77)
    assert kernel.isas(torch.bfloat16)[0] == "amx_bf16" and traps.how_many() > 100
    for seed in range(len(MASKS)):
        program, given, masks = some_network(seed, MASKS[seed])
        given = {map_: x.bfloat16() for map_, x in given.items()}
        agree(rounded(program), given, masks, "amx_bf16", within=0.04, dtype=torch.bfloat16)
assert traps.how_many() > 1000 and not traps.is_configured()
"""
    found = subprocess.run([sys.executable, "-c", code, str(tile_builds.traps()), str(tile_builds.illegal())],
                           timeout=300, cwd=Path(__file__).parents[1])
    if found.returncode == 77:
        pytest.skip("this compiler does not know tiles")
    assert found.returncode == 0

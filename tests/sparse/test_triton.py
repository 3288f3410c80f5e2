"""Triton's kernels: interpreted everywhere, compiled for devices that are not here, and run on one where it is."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offramp._kernel.layout import lay_out
from offramp.sparse import Triton
from offramp.sparse.triton import Launch, lanes
from sparse.triton_cases import CASES, moved, some_network

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                reason="NO TRITON HERE: KERNELS FOR CUDA WERE NOT TESTED")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What came of each case in Triton's interpreter."""
    at = tmp_path_factory.mktemp("triton") / "said.json"
    tests = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(tests / "sparse" / "triton_cases.py"), str(at)], capture_output=True,
        text=True, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tests)})
    assert run.returncode == 0, run.stderr
    found: dict[str, str] = json.loads(at.read_text())
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CASES)
def test_programs_are_their_dense_simulation_in_the_interpreter(name: str, said: dict[str, str]) -> None:
    assert not said[name], said[name]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: TRITON'S KERNELS WERE INTERPRETED ONLY")
@pytest.mark.parametrize("name", CASES)
def test_and_on_a_device(name: str) -> None:
    CASES[name]("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_compile_for_devices_that_are_not_here(dtype: torch.dtype) -> None:
    """The interpreter takes what the compiler does not."""
    compiled = set()
    for seed in range(7):
        program, _, _ = some_network(seed, "random")
        runner = Triton(moved(program, "cpu", dtype), tf32=seed % 2 == 0)
        geometry = [launch for one in runner._where._geometry for launch in (*one.waves, one.lists)]
        for launch in [*geometry, *(launch for launches in runner._ops for launch in launches)]:
            if launch is None:
                continue
            kind = launch.kernel.__name__, launch.constants.get("PRECISION"), launch.constants.get("HOWS")
            if kind not in compiled:
                assert len(cubin(launch)) > 1000
                compiled.add(kind)
    assert {name for name, _, _ in compiled} == {"reach", "halo", "convolve", "depthwise", "fill", "add", "pool"}


def cubin(launch: Launch) -> bytes:
    """For compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = launch.kernel.arg_names
    signature = {**dict(zip(names, map(kind_of, launch.given), strict=False)), **dict.fromkeys(
        launch.constants, "constexpr")}
    made = compile(ASTSource(launch.kernel, signature, constexprs={
        (names.index(name),): value for name, value in launch.constants.items()}), target=GPUTarget("cuda", 90, 32))
    found: bytes = made.asm["cubin"]
    return found


def kind_of(value: object) -> object:
    if isinstance(value, Tensor):
        return {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.uint8: "*u8"}[value.dtype]
    return tuple(map(kind_of, value)) if isinstance(value, tuple) else "i32" if isinstance(value, int) else "fp32"


@pytest.mark.parametrize("seed", range(8))
def test_operations_on_lanes_wait_for_all_that_they_need(seed: int) -> None:
    """Of random orders, and those of programs."""
    draw = random.Random(seed)
    layout = lay_out(some_network(seed, "random", operations=12)[0])
    orders = [(layout.needs[first:last], first) for first, last in layout.spans]
    orders.append(([tuple(j for j in range(i) if draw.random() < 0.2) for i in range(30)], 0))
    for needs, start in orders:
        before: dict[int, set[int]] = {}
        ends: dict[int, int] = {}
        for i, (lane, waits) in enumerate(lanes(needs, start), start):
            told = [*waits, *([ends[lane]] if lane in ends else [])]
            before[i] = set(told).union(*(before[j] for j in told))
            assert set(needs[i - start]) <= before[i]
            ends[lane] = i
        assert len(ends) <= 4

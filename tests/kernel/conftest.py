"""What the kernel's tests share."""

from collections.abc import Iterator

import pytest
import torch

from kernel.tiles import TileBuilds, library
from offramp import _kernel as kernel


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tile_builds(tmp_path_factory: pytest.TempPathFactory) -> TileBuilds:
    """Builds of the library for a machine without tiles."""
    if "avx512_bf16" not in kernel.isas(torch.bfloat16):
        pytest.skip("tiles are not tested: what they share with avx512_bf16 does not run on this CPU")
    return TileBuilds(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(params=["avx512_bf16", "amx_bf16"])
def bfloat16_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set that multiplies bfloat16: tiles as the CPU has them, else emulated."""
    name: str = request.param
    if name in kernel.isas(torch.bfloat16):
        yield name
    elif name == "amx_bf16":
        with library(request.getfixturevalue("tile_builds").emulated()):
            yield name
    else:
        pytest.skip("this CPU does not multiply bfloat16")

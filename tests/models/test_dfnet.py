import pytest
import torch
from torch import nn

from offramp.cost.macs import count
from offramp.errors import OfframpError
from offramp.models import DFNet

# The convolutions of the authors' df1.prototxt and df2.prototxt: blocks of two 3x3 each, (channels, blocks, stride).
RECIPES = {
    1: [(64, 3, 2), (128, 3, 2), (256, 3, 2), (512, 1, 1)],
    2: [(64, 2, 2), (128, 1, 1), (128, 10, 2), (256, 1, 1), (256, 4, 2), (512, 2, 1)],
}


def weights_and_macs(version: int, size: int) -> tuple[int, int]:
    """Closed form: weights of the convolutions, and their uses on a square image."""
    size //= 2
    weights, macs = 27 * 32, 27 * 32 * size**2
    size //= 2
    weights, macs, c_in = weights + 9 * 32 * 64, macs + 9 * 32 * 64 * size**2, 64
    for c_out, blocks, stride in RECIPES[version]:
        size //= stride
        stage = 9 * c_in * c_out + c_in * c_out + 9 * c_out**2 + (blocks - 1) * 2 * 9 * c_out**2
        weights, macs, c_in = weights + stage, macs + stage * size**2, c_out
    return weights, macs


@pytest.mark.parametrize("version, giga_macs", [(1, 0.746), (2, 1.77)])
def test_layers_as_the_authors_have_them(version: int, giga_macs: float) -> None:
    with torch.device("meta"):
        net, x = DFNet(version).eval(), torch.zeros(1, 3, 224, 224)
    convolutions = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d))
    weights, macs = weights_and_macs(version, 224)
    assert convolutions == weights
    assert count(net, x).total == macs
    assert macs / 1e9 == pytest.approx(giga_macs, rel=0.003)


@pytest.mark.parametrize("version, strides", [(1, [16, 32, 32]), (2, [8, 16, 32])])
def test_maps(version: int, strides: list[int]) -> None:
    net, x = DFNet(version).eval(), torch.rand(1, 3, 96, 160)
    with torch.inference_mode():
        maps = net(x)
    assert [m.shape[1:] for m in maps] == [
        (c, 96 // s, 160 // s) for c, s in zip(net.channels, strides, strict=True)]
    assert net.get_submodule(net.low_level)(x).shape[1:] == (64, 24, 40)


def test_versions_there_are() -> None:
    with pytest.raises(OfframpError, match="version 1 or 2"):
        DFNet(3)

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import offramp
from offramp.cost.macs import count
from offramp.errors import OfframpError
from offramp.graph.split import begin, split
from offramp.graph.trace import trace
from offramp.models import load_model
from offramp.models.sfnet import FlowAlign, PyramidPooling, ResNetTrunk, sfnet_dfnetv1, sfnet_resnet18, warp

NAMES = ["sfnet_resnet50", "sfnet_resnet18", "sfnet_dfnetv2", "sfnet_dfnetv1"]


@pytest.mark.parametrize("name, million_params, giga_macs", [
    ("sfnet_resnet50", 31.20, 607.9), ("sfnet_resnet18", 12.87, 243.4), ("sfnet_dfnetv2", 17.88, 80.2),
    ("sfnet_dfnetv1", 8.42, 32.8),
])
def test_counts_as_in_the_slimseg_paper(name: str, million_params: float, giga_macs: float) -> None:
    with torch.device("meta"):
        net, x = load_model(f"offramp:{name}?num_classes=19"), torch.zeros(1, 3, 1024, 2048)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(million_params, rel=0.001)
    assert count(net, x).total / 1e9 == pytest.approx(giga_macs, rel=0.004)


@pytest.mark.parametrize("name, million_params, giga_macs", [
    ("sfnet_resnet50", 7.7, 436.3), ("sfnet_resnet18", 1.5, 107.5),
])
def test_the_decoder_costs_what_the_paper_gives_it(name: str, million_params: float, giga_macs: float) -> None:
    # SlimSeg, Table 1: all but the backbone
    with torch.device("meta"):
        net, x = load_model(f"offramp:{name}"), torch.zeros(1, 3, 1024, 2048)
    rest = sum(p.numel() for n, p in net.named_parameters() if not n.startswith("trunk."))
    assert rest / 1e6 == pytest.approx(million_params, abs=0.051)
    assert (count(net, x).total - count(net.trunk, x).total) / 1e9 == pytest.approx(giga_macs, rel=0.003)


def by_hand(x_CHW: Tensor, flow_2HW: Tensor) -> Tensor:
    """Bilinear sampling, one place at a time."""
    (channels, rows, columns), (height, width) = x_CHW.shape, flow_2HW.shape[1:]
    out = torch.zeros(channels, height, width, dtype=x_CHW.dtype)
    for i in range(height):
        for j in range(width):
            column = (2 * j / (width - 1) - 1 + float(flow_2HW[0, i, j]) / width + 1) / 2 * (columns - 1)
            row = (2 * i / (height - 1) - 1 + float(flow_2HW[1, i, j]) / height + 1) / 2 * (rows - 1)
            for r in (math.floor(row), math.floor(row) + 1):
                for c in (math.floor(column), math.floor(column) + 1):
                    if 0 <= r < rows and 0 <= c < columns:
                        out[:, i, j] += x_CHW[:, r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return out


def test_warp_is_bilinear_sampling() -> None:
    x, flow = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randn(2, 2, 7, 9, dtype=torch.float64) * 4
    torch.testing.assert_close(warp(x, flow), torch.stack([by_hand(*pair) for pair in zip(x, flow, strict=True)]))


def test_warp_without_a_flow_is_bilinear_resizing() -> None:
    x = torch.randn(2, 3, 5, 4)
    expected = F.interpolate(x, (11, 7), mode="bilinear", align_corners=True)
    torch.testing.assert_close(warp(x, torch.zeros(2, 2, 11, 7)), expected)


def test_warp_keeps_a_low_precision_and_computes_places_in_a_higher_one() -> None:
    x = torch.arange(512.0).expand(1, 1, 2, 512)
    out = warp(x.bfloat16(), torch.zeros(1, 2, 2, 512).bfloat16())
    assert out.dtype is torch.bfloat16
    assert float((out.float() - x.bfloat16().float()).abs().max()) <= 1e-2 * 512 / 2


def test_a_flow_module_fetches_what_its_flow_says() -> None:
    align = FlowAlign(8)
    fine, coarse = torch.randn(2, 8, 6, 10), torch.randn(2, 8, 3, 5)
    with torch.no_grad():
        down = F.interpolate(F.conv2d(coarse, align.coarse.weight), (6, 10), mode="bilinear", align_corners=True)
        both = torch.cat([down, F.conv2d(fine, align.fine.weight)], 1)
        flow = F.conv2d(both, align.flow.weight, padding=1)
        torch.testing.assert_close(align(fine, coarse), warp(coarse, flow))


def test_pyramid_pooling_sees_means_of_parts() -> None:
    pool = PyramidPooling(4, 8).eval()
    x = torch.randn(1, 4, 12, 18)
    for stage, n in zip(pool.stages, (1, 2, 3, 6), strict=True):
        parts = x.reshape(1, 4, n, 12 // n, n, 18 // n).mean((3, 5))
        torch.testing.assert_close(stage(x), stage[2](stage[1](parts)))
    assert pool(x).shape == (1, 8, 12, 18)


@pytest.mark.parametrize("depth, dilated", [(18, False), (50, False), (50, True)])
def test_trunk_takes_torchvisions_weights_and_gives_its_maps(depth: int, dilated: bool) -> None:
    options = {"replace_stride_with_dilation": [False, True, True]} if dilated else {}
    theirs = getattr(torchvision.models, f"resnet{depth}")(**options).eval()
    trunk = ResNetTrunk(depth, dilated=dilated).eval()
    missing, unexpected = trunk.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == [] and unexpected == ["fc.weight", "fc.bias"]
    seen: list[Tensor] = []
    for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        layer.register_forward_hook(lambda _module, _args, out: seen.append(out))
    x = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        theirs(x)
        maps = trunk(x)
    assert all(torch.equal(a, b) for a, b in zip(maps, seen, strict=True))
    assert tuple(m.shape[1] for m in maps) == trunk.channels
    assert [-(-65 // m.shape[2]) for m in maps] == ([4, 8, 8, 8] if dilated else [4, 8, 13, 22])


def test_a_deep_stem_is_three_convolutions_and_128_channels() -> None:
    trunk = ResNetTrunk(18, deep_stem=True)
    stem = [m for m in trunk.conv1.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size, m.stride) for m in stem] == [
        (3, 64, (3, 3), (2, 2)), (64, 64, (3, 3), (1, 1)), (64, 128, (3, 3), (1, 1))]
    assert [m.shape[1:] for m in trunk.eval()(torch.rand(1, 3, 64, 96))] == [
        (64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)]
    assert ResNetTrunk(50, deep_stem=True).layer1[0].downsample[0].weight.shape == (256, 128, 1, 1)


def test_a_trunk_nobody_has_is_refused() -> None:
    for depth, dilated in ((34, False), (18, True)):
        with pytest.raises(OfframpError, match="depth 18 or 50"):
            ResNetTrunk(depth, dilated=dilated)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_odd_sizes_and_the_map_at_a_quarter(name: str, training: bool) -> None:
    net = load_model(f"offramp:{name}?num_classes=5").train(training)
    seen: list[Tensor] = []
    net.get_submodule(net.low_level).register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad():
        assert net(torch.rand(2, 3, 67, 99)).shape == (2, 5, 67, 99)
    (low,) = seen
    assert low.shape[-2:] == (17, 25)


@pytest.mark.parametrize("make", [sfnet_resnet18, sfnet_dfnetv1])
def test_gradients_reach_every_parameter(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = make(num_classes=4, aux=True).train()
    logits, *aux = net(torch.rand(2, 3, 64, 96))
    assert len(aux) == len(net.project) and all(a.shape == logits.shape == (2, 4, 64, 96) for a in aux)
    torch.stack([F.cross_entropy(out, torch.randint(4, (2, 64, 96))) for out in (logits, *aux)]).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12] == []


def test_heads_on_the_side_change_nothing_in_the_middle() -> None:
    torch.manual_seed(0)
    plain, x = sfnet_dfnetv1(num_classes=4).eval(), torch.rand(1, 3, 64, 96)
    with_heads = sfnet_dfnetv1(num_classes=4, aux=True).eval()
    with_heads.load_state_dict(plain.state_dict(), strict=False)
    with torch.inference_mode():
        assert torch.equal(with_heads(x)[0], plain(x))


@pytest.mark.parametrize("name, where", [("sfnet_resnet18", "align.1"), ("sfnet_dfnetv2", "trunk.stage3_2.0")])
def test_it_can_be_cut(name: str, where: str) -> None:
    net, x = load_model(f"offramp:{name}?num_classes=4"), torch.rand(2, 3, 70, 90)
    (site,) = (site for site in offramp.sites(net, x) if site.name == where)
    assert site.shrinkable and "input_0" not in {tensor.name for tensor in site.live}
    traced = trace(net, x)
    first, second = split(traced, [where])
    with torch.inference_mode():
        assert torch.equal(second(first(begin(traced, x))), net(x))

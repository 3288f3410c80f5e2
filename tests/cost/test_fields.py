"""Needed places against brute force: push one input place, see which outputs move. Nothing is ever cut off, since
weights and inputs are positive and the push is large enough to win every maximum."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import segmentation

from offramp.cost import macs
from offramp.cost.fields import fields


class Gate(nn.Module):
    """Squeeze and excitation: every place reads all places."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.linear(x.mean((2, 3))))[:, :, None, None]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 1, 2), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm(self.a(x)), inplace=True)
        out += self.b(x)
        return F.relu_(out)


class Branches(nn.Module):
    """A dilated convolution beside another branch (an image pool, perhaps), joined, shuffled and padded."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.pool = pool
        self.a, self.b, self.c = nn.Conv2d(4, 2, 3, padding=3, dilation=3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        beside = self.b(F.adaptive_avg_pool2d(x, 1) if self.pool else x)
        if self.pool:
            beside = F.interpolate(beside, size=x.shape[-2:], mode="bilinear")
        joined = torch.cat([self.a(x), beside], 1)
        shuffled = joined.view(len(x), 2, 2, *x.shape[-2:]).transpose(1, 2).flatten(1, 2)
        first, second = shuffled.chunk(2, 1)
        return self.c(F.pad(torch.cat([second, first], 1), (2, 0, 1, 0)))


class Called(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


def resize(**how: Any) -> nn.Module:
    return Called(lambda x: F.interpolate(x, **how))


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "strided": lambda: nn.Sequential(nn.Conv2d(4, 4, 5, 2, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1)),
    "dilated": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 3, padding=1)),
    "oblong": lambda: nn.Sequential(nn.Conv2d(4, 4, (1, 3), (2, 1), (0, 1)), nn.Conv2d(4, 4, (3, 2), dilation=(2, 1))),
    "grouped": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Hardswish(), nn.Conv2d(4, 4, 1)),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1),
    "max pool": lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 1)),
    "average pool": lambda: nn.AvgPool2d(2, ceil_mode=True),
    "grid": lambda: nn.AdaptiveAvgPool2d((3, 5)),
    "one": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1)),
    "larger": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, 3), resize(size=(11, 13), mode="bilinear")),
    "corners": lambda: resize(size=(17, 20), mode="bilinear", align_corners=True),
    "factor": lambda: resize(scale_factor=1.7, mode="bilinear"),
    "nearest": lambda: resize(scale_factor=(2, 0.5), mode="nearest"),
    "gate": lambda: nn.Sequential(Gate(), nn.Conv2d(4, 4, 3)),
    "residual": lambda: nn.Sequential(Residual(), Residual()),
    "branches": lambda: Branches(pool=False),
    "image pool": lambda: Branches(pool=True),
    "columns": lambda: Called(lambda x: x[:, :, ::2, 1:] + x.mean(2, keepdim=True)[..., 1:]),
    "group norm": lambda: nn.GroupNorm(2, 4),
}


def positive(name: str) -> nn.Module:
    """The network in double, all its weights in 0.1 .. 1."""
    net = NETS[name]()
    for weight in net.parameters():
        nn.init.uniform_(weight, 0.1, 1)
    return net.double().eval()


def moved(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(H, W, h, w) bool: which outputs an input place moves."""
    with torch.no_grad():
        said = net(x)
        rows = []
        for i in range(x.shape[-2]):
            for j in range(x.shape[-1]):
                pushed = x.clone()
                pushed[:, :, i, j] += torch.linspace(50, 100, x.shape[1], dtype=x.dtype)
                rows.append((net(pushed) - said)[0].abs().amax(0) > 1e-9)
    return torch.stack(rows).view(*x.shape[-2:], *rows[0].shape)


def one_at_a_time(height: int, width: int) -> Tensor:
    return torch.eye(height * width, dtype=torch.bool).view(-1, height, width)


@pytest.mark.parametrize("name", NETS)
def test_needed_places_are_those_that_matter(name: str) -> None:
    net, x = positive(name), torch.rand(1, 4, 9, 12).double() + 0.1
    pushed = moved(net, x)
    found = fields(net, x)
    needed = found.needed(one_at_a_time(*pushed.shape[2:])).inputs[0]
    assert torch.equal(needed.flatten(1).T.reshape(pushed.shape), pushed)
    assert not found.unknown and found.macs == macs.count(net, x).total


@pytest.mark.parametrize("name", NETS)
def test_masks_join_and_whole_ones_cost_everything(name: str) -> None:
    net, x = positive(name), torch.rand(1, 4, 9, 12).double()
    found, size = fields(net, x), net(x).shape[-2:]
    singles = found.needed(one_at_a_time(*size))
    masks = torch.stack([torch.rand(size) < 0.15 for _ in range(4)] + [torch.zeros(size, dtype=torch.bool)])
    joined = found.needed(masks)
    for mask, one, cost in zip(masks, joined.inputs[0], joined.macs, strict=True):
        each = singles.inputs[0][mask.flatten()]
        assert torch.equal(one, each.any(0))
        assert float(cost) <= float(singles.macs[mask.flatten()].sum()) + 1e-6
    assert float(joined.macs[-1]) == 0 and not joined.inputs[0][-1].any()
    assert float(found.needed(torch.ones(1, *size, dtype=torch.bool)).macs) <= found.macs


def test_macs_of_a_pyramid_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3, 2, 1), nn.Upsample(scale_factor=2))
    want = torch.zeros(2, 20, 20, dtype=torch.bool)
    want[0, 10:12, 10:12] = True  # one place before it was doubled
    want[1, 0, 0] = True  # the corner reads 2 x 2 of the places between, and these 3 x 3 of the image
    needed = fields(net, torch.zeros(1, 3, 20, 20)).needed(want)
    assert needed.macs.tolist() == [5 * 8 * 9 + 9 * 8 * 3 * 9, 5 * 8 * 9 + 4 * 8 * 3 * 9]
    assert needed.inputs[0].sum((1, 2)).tolist() == [25, 9]


def test_several_outputs_and_inputs_join() -> None:
    first, second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)
    found = fields(lambda x, y: {"a": first(x) + y, "b": second(y)}, torch.zeros(1, 2, 6, 6), torch.zeros(1, 2, 6, 6))
    a, b = torch.zeros(1, 6, 6, dtype=torch.bool), torch.zeros(1, 6, 6, dtype=torch.bool)
    a[0, 2, 2] = b[0, 5, 5] = True
    needed = found.needed(a, b)
    assert [int(one.sum()) for one in needed.inputs] == [9, 2] and float(needed.macs) == 2 * 2 * 9 + 4


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        return (tokens @ tokens.transpose(1, 2) @ tokens).view(x.shape)


class Written(nn.Module):
    """Writes into a part of what it later reads whole."""

    def forward(self, x: Tensor) -> Tensor:
        kept = x * 2
        kept[:, :, :2].add_(x[:, :, 4:6])
        return kept * 3


@pytest.mark.parametrize("net, names", [(Attention(), {"view"}), (Written(), {"add_ into a view"})])
def test_what_is_not_understood_reads_everything_and_is_listed(net: nn.Module, names: set[str]) -> None:
    x = torch.rand(1, 4, 6, 5).double()
    found, pushed = fields(net, x), moved(net, x)
    needed = found.needed(one_at_a_time(6, 5)).inputs[0]
    assert names <= set(found.unknown) and bool(needed.all())
    assert bool((needed.flatten(1).T.reshape(pushed.shape) >= pushed).all())


def test_a_view_of_a_view_of_a_blank_is_seen() -> None:
    def fill(x: Tensor) -> Tensor:
        blank = torch.zeros_like(x)
        blank[:, :, ::2] = x[:, :, 1::2]
        return blank + 1

    x = torch.rand(1, 2, 6, 4)
    needed = fields(fill, x).needed(one_at_a_time(6, 4)).inputs[0]
    assert bool((needed.flatten(1).T.reshape(6, 4, 6, 4) >= moved(fill, x)).all())


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_dilated_resnets_as_the_paper_says(name: str) -> None:
    """MESS, 6.2: up to 45 % of the first exit's map with an FCN head, all of it with DeepLabV3's (whose image pool)."""
    with torch.device("meta"):
        net = getattr(segmentation, name)(weights=None, weights_backbone=None, aux_loss=False).eval()
    blocks = [*net.backbone.layer3, *net.backbone.layer4][1:]  # after the first block of layer 3, on 65 x 65 places
    tail = nn.Sequential(*blocks, net.classifier, nn.Upsample((520, 520), mode="bilinear"))
    want = torch.zeros(1, 520, 520, dtype=torch.bool)
    want[0, 260, 260] = True
    found = fields(tail, torch.empty(1, 1024, 65, 65, device="meta"))
    share = float(found.needed(want).inputs[0].double().mean())
    reach = sum(block.conv2.dilation[0] for block in blocks) + 1  # to each side of the two places that are blended
    assert share == pytest.approx(1.0 if "deeplab" in name else ((2 * reach + 2) / 65) ** 2) and not found.unknown
    if "fcn" in name:
        assert reach == 21 and share == pytest.approx(0.45, abs=0.01)


def test_a_square_map_turned_is_not_taken_for_the_same() -> None:
    x = torch.rand(1, 2, 5, 5)
    for turn in (lambda x: x.permute(0, 1, 3, 2) + 1, lambda x: x.transpose(2, 3) + 1):
        found = fields(turn, x)
        assert bool(found.needed(one_at_a_time(5, 5)).inputs[0].all()) and found.unknown

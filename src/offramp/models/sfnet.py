"""SFNet (Li et al. 2020, "Semantic Flow", arXiv:2002.10120) on ResNet and DFNet trunks, as SlimSeg narrows it.

Which SFNet the SlimSeg paper (doi:10.1145/3503161.3548191, Table 2) had, its counts tell: with 19 classes at 1024x2048
ours, in ``offramp.cost.macs``'s count, and the paper's:

==================  ========================  ==================  ====================
network             decoder, stem             parameters (M)      MACs (G)
==================  ========================  ==================  ====================
sfnet_resnet50      256 channels, 7x7         31.20 / 31.20       607.3 / 607.9
sfnet_resnet18      128 channels, three 3x3   12.87 / 12.87       243.4 / 243.4
sfnet_dfnetv2       64 channels               17.88 / 17.88       80.2 / 80.2
sfnet_dfnetv1       64 channels               8.42 / 8.42         32.9 / 32.8
==================  ========================  ==================  ====================

With the other stem ResNet-50 would have 664 G and ResNet-18 184 G; with 128 channels on DFNetV2 97 G. Heads of deep
supervision are not in the counts.

Axes: N samples, C channels, H W space, K classes.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.errors import OfframpError
from offramp.models.dfnet import DFNet

__all__ = [
    "FlowAlign", "PyramidPooling", "ResNetTrunk", "SFNet", "conv_norm_relu", "resize", "sfnet_dfnetv1",
    "sfnet_dfnetv2", "sfnet_resnet18", "sfnet_resnet50", "warp",
]


def conv_norm_relu(c_in: int, c_out: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU; the size is kept but for the stride."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(c_in, c_out, kernel, stride=stride, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


def resize(x_NCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, to a height and width; corners on corners, as :func:`warp` without a flow."""
    return F.interpolate(x_NCHW, size=tuple(size), mode="bilinear", align_corners=True)


def warp(x_NCHW: Tensor, flow_N2HW: Tensor) -> Tensor:
    """Sample ``x`` bilinearly where the flow points, at each place of the flow's map; outside of ``x`` lie zeros.

    Row i and column j of an H x W map stand at (2j / (W - 1) - 1, 2i / (H - 1) - 1) in coordinates that run from -1 to
    1 over ``x``. The flow, first along the row, is divided by (W, H) and added, as in SFNet's code: one unit is about
    half a place of the map. Unlike there, coordinates are float32 or float64: those of bfloat16 are up to half a place
    off where a row has 512.

    >>> warp(torch.tensor([[[[0., 8.], [4., 12.]]]]), torch.zeros(1, 2, 3, 3))[0, 0]
    tensor([[ 0.,  4.,  8.],
            [ 2.,  6., 10.],
            [ 4.,  8., 12.]])
    """
    height, width = flow_N2HW.shape[-2:]
    dtype = torch.float64 if x_NCHW.dtype is torch.float64 else torch.float32
    like: Any = {"dtype": dtype, "device": x_NCHW.device}
    places = torch.meshgrid(torch.linspace(-1, 1, width, **like), torch.linspace(-1, 1, height, **like), indexing="xy")
    unit_2 = torch.linspace(1 / width, 1 / height, 2, **like)  # made where it is needed: nothing is copied to a GPU
    grid_NHW2 = torch.stack(places, dim=-1) + flow_N2HW.permute(0, 2, 3, 1) * unit_2
    if x_NCHW.dtype is dtype:
        return F.grid_sample(x_NCHW, grid_NHW2, align_corners=True)
    return F.grid_sample(x_NCHW.to(dtype), grid_NHW2, align_corners=True).to(x_NCHW.dtype)


@final
class FlowAlign(nn.Module):
    """Flow alignment module: learns where each place of a fine map finds its context in a coarse map, and fetches it.

    Two 1x1 convolutions halve the channels, the coarse one's output is resized, a 3x3 convolution over both gives the
    flow (the paper's FAM); (N, C, H, W) and (N, C, h, w) -> the coarse map as (N, C, H, W).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fine = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.coarse = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.flow = nn.Conv2d(channels // 2 * 2, 2, 3, padding=1, bias=False)

    def forward(self, fine_NCHW: Tensor, coarse_NCHW: Tensor) -> Tensor:
        fine = self.fine(fine_NCHW)
        flow = self.flow(torch.cat([resize(self.coarse(coarse_NCHW), fine.shape[-2:]), fine], dim=1))
        return warp(coarse_NCHW, flow)


@final
class PyramidPooling(nn.Module):
    """Means over 1, 2x2, 3x3 and 6x6 parts of the map, projected, resized and put beside it (PSPNet, arXiv:1612.01105).

    In train mode the mean over the whole map needs two samples at least, else its batch norm has one value a channel.
    """

    def __init__(self, c_in: int, c_out: int, bins: tuple[int, ...] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
            for n in bins)
        self.bottleneck = nn.Sequential(conv_norm_relu(c_in + len(bins) * c_out, c_out, 1), nn.Dropout2d(0.1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        pooled = [resize(stage(x_NCHW), x_NCHW.shape[-2:]) for stage in self.stages]
        return self.bottleneck(torch.cat([*pooled, x_NCHW], dim=1))  # type: ignore[no-any-return]


@final
class ResNetTrunk(nn.Module):
    """torchvision's ResNet without its classifier; (N, 3, H, W) -> four maps at 1/4 to 1/32, coarsest last.

    Keys are torchvision's, so that ``trunk.load_state_dict(weights, strict=False)`` leaves out ``fc`` alone.
    ``deep_stem``: three 3x3 convolutions in place of the 7x7 one, and 128 channels after them. ``dilated``: the last
    two stages stay at 1/8.
    """

    low_level = "layer1"
    """The module whose output is at 1/4."""

    def __init__(self, depth: int, *, deep_stem: bool = False, dilated: bool = False) -> None:
        super().__init__()
        # here: its import takes a second, and most who load a network load another
        from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

        block: Any = BasicBlock if depth == 18 else Bottleneck
        blocks = {18: [2, 2, 2, 2], 50: [3, 4, 6, 3]}
        if depth not in blocks or (dilated and depth == 18):
            raise OfframpError(expected="depth 18 or 50, dilated only with 50", got=f"{depth}, dilated={dilated}",
                               where="ResNetTrunk", todo="choose one of these")
        net = ResNet(block, blocks[depth], replace_stride_with_dilation=[False, dilated, dilated])
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.channels = tuple(n * block.expansion for n in (64, 128, 256, 512))
        if deep_stem:
            self.conv1, self.bn1 = _deep_stem(64, 128), nn.BatchNorm2d(128)
            shortcut = nn.Sequential(
                nn.Conv2d(128, self.channels[0], 1, bias=False), nn.BatchNorm2d(self.channels[0]))
            self.layer1[0] = block(128, 64, downsample=shortcut)
            for module in (*self.conv1.modules(), *self.layer1[0].modules()):
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_NCHW: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x_NCHW))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


def _deep_stem(inner: int, c_out: int) -> Any:  # stands where torchvision declares a Conv2d
    return nn.Sequential(conv_norm_relu(3, inner, 3, stride=2), conv_norm_relu(inner, inner, 3),
                         nn.Conv2d(inner, c_out, 3, padding=1, bias=False))


@final
class SFNet(nn.Module):
    """A feature pyramid whose maps are aligned by flow before they are added; (N, 3, H, W) -> logits (N, K, H, W).

    The coarsest map goes through pyramid pooling; each finer one is projected, gets the coarser one warped onto it, and
    is smoothed; all go, resized to the finest, through a 3x3 and a 1x1 convolution together. With
    ``aux`` the output is a tuple: the logits, then those of a head on each finer map, finest last, all (N, K, H, W).

    ``low_level`` names the module whose output is the trunk's map at 1/4. Projections have no bias before their norm,
    where SFNet's code has one that learns nothing.

    >>> sfnet_dfnetv1(num_classes=5).eval()(torch.zeros(1, 3, 65, 97)).shape
    torch.Size([1, 5, 65, 97])
    """

    def __init__(self, trunk: ResNetTrunk | DFNet, channels: int, num_classes: int, *, aux: bool = False) -> None:
        super().__init__()
        self.trunk, self.low_level = trunk, f"trunk.{trunk.low_level}"
        *finer, coarsest = trunk.channels
        self.pooling = PyramidPooling(coarsest, channels)
        self.project = nn.ModuleList(conv_norm_relu(c, channels, 1) for c in finer)
        self.align = nn.ModuleList(FlowAlign(channels) for _ in finer)
        self.smooth = nn.ModuleList(conv_norm_relu(channels, channels, 3) for _ in finer)
        self.fuse = conv_norm_relu(len(trunk.channels) * channels, channels, 3)
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.aux = nn.ModuleList(
            nn.Sequential(conv_norm_relu(channels, channels, 3), nn.Dropout2d(0.1), nn.Conv2d(channels, num_classes, 1))
            for _ in (finer if aux else ()))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        size = x.shape[-2:]  # read here: a network that is cut need not keep its input for it
        *finer, coarsest = self.trunk(x)
        merged = self.pooling(coarsest)
        smooth, aux = [merged], []
        for i, fine in reversed(list(enumerate(finer))):
            projected = self.project[i](fine)
            merged = projected + self.align[i](projected, merged)
            smooth.append(self.smooth[i](merged))
            if self.aux:
                aux.append(resize(self.aux[i](merged), size))
        *rest, finest = smooth
        fused = self.fuse(torch.cat([finest, *(resize(m, finest.shape[-2:]) for m in reversed(rest))], dim=1))
        logits = resize(self.classifier(fused), size)
        return (logits, *aux) if self.aux else logits


def sfnet_resnet18(num_classes: int = 19, *, deep_stem: bool = True, aux: bool = False) -> SFNet:
    return SFNet(ResNetTrunk(18, deep_stem=deep_stem), 128, num_classes, aux=aux)


def sfnet_resnet50(num_classes: int = 19, *, deep_stem: bool = False, aux: bool = False) -> SFNet:
    return SFNet(ResNetTrunk(50, deep_stem=deep_stem), 256, num_classes, aux=aux)


def sfnet_dfnetv1(num_classes: int = 19, *, aux: bool = False) -> SFNet:
    return SFNet(DFNet(1), 64, num_classes, aux=aux)


def sfnet_dfnetv2(num_classes: int = 19, *, aux: bool = False) -> SFNet:
    return SFNet(DFNet(2), 64, num_classes, aux=aux)

"""HRNet (Wang et al. 2020, arXiv:1908.07919) on timm's trunk: for pixels, and for poses.

Which HRNets ADP-C (arXiv:2104.00749) has, its counts tell: convolutions alone, in units of 2^30, at 1024x2048 with 19
classes and for poses at 256x256 with 16. Its W18 is the small one of the authors' code (version 2), not ``hrnet_w18``.

================  ==============  ==========================  ==================================
network           parameters (M)  convolutions / 2^30         MACs in ``offramp.cost.macs`` (G)
================  ==============  ==========================  ==================================
hrnet_w48         65.86           696.18 (ADP-C: 696.2)       748.62, of which 1.11 to resize
hrnet_w32         29.55           336.42                      362.02, 0.79
hrnet_w18         9.64            137.28                      147.92, 0.52
hrnet_w18_small   3.94            71.58                       77.31, 0.45
hrnet_w32_pose    28.54           9.49 (ADP-C: 9.49)          10.19, 0 (nearest)
================  ==============  ==========================  ==================================

Axes: N samples, C channels, H W space, K classes or joints.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.errors import OfframpError
from offramp.models.weights import WEIGHT_SUFFIXES, read_weights

__all__ = [
    "Exchange", "HRNet", "HRNetPose", "HRNetTrunk", "hrnet_w18", "hrnet_w18_small", "hrnet_w32", "hrnet_w32_pose",
    "hrnet_w48",
]


def _resize(x_NCHW: Tensor, size: Sequence[int], mode: str = "bilinear") -> Tensor:
    """To a height and width; corners are not aligned, as where exits read several maps."""
    if mode == "nearest":
        return F.interpolate(x_NCHW, size=tuple(size), mode=mode)
    return F.interpolate(x_NCHW, size=tuple(size), mode=mode, align_corners=False)


@final
class Exchange(nn.Module):
    """One of timm's exchange units at any size: branches side by side, then each map gets a sum of all of them.

    timm's own resizes by whole factors, so that it takes only inputs whose sides are multiples of 32; this one goes to
    the size of the map it is added to. Keys are timm's.
    """

    def __init__(self, theirs: Any, mode: str) -> None:
        super().__init__()
        self.branches, self.fuse_layers, self.mode = theirs.branches, theirs.fuse_layers, mode
        for i, row in enumerate(self.fuse_layers):
            for layer in row[i + 1:]:
                del layer[2]  # its nn.Upsample

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        fused = []
        for i, row in enumerate(self.fuse_layers):
            total = row[0](maps[0])
            for j, x in enumerate(maps[1:], 1):
                term = row[j](x)
                total = total + (_resize(term, maps[i].shape[-2:], self.mode) if j > i else term)
            fused.append(F.relu(total))
        return fused


class HRNetTrunk(nn.Module):
    """timm's HRNet without a head; (N, 3, H, W) -> maps at 1/4, 1/8, 1/16 and 1/32, or with ``finest`` at 1/4 alone.

    ``mode`` is how coarse maps are resized where they meet finer ones: bilinear in the authors' code for pixels,
    nearest in that for poses and in timm. Any size of input will do. ``pretrained``: True or a tag of timm's fetches
    its ImageNet weights; a file of them (.safetensors or .pth, its head is left out) is read. OfframpError where the
    file has not all of the trunk's tensors.

    It can be cut where a stage ends: at ``layer1.{n}``, the last block of four (W18-small: two), with 256 channels at
    1/4; at ``stage2.0`` with 2 maps, at ``stage3.{n}`` with 3. ``ends`` has these names.
    """

    channels: tuple[int, ...]

    def __init__(self, variant: str, *, mode: str, finest: bool = False, pretrained: bool | str = False) -> None:
        super().__init__()
        import timm  # here: its import takes seconds, and most who load a network load another

        file = isinstance(pretrained, str) and pretrained.lower().endswith(WEIGHT_SUFFIXES)
        tag = f".{pretrained}" if isinstance(pretrained, str) and not file else ""
        theirs: Any = timm.create_model(variant + tag, pretrained=bool(pretrained) and not file, features_only=True,
                                        feature_location="")
        if file:
            _fill(theirs, str(pretrained))
        self.conv1, self.bn1, self.act1 = theirs.conv1, theirs.bn1, theirs.act1
        self.conv2, self.bn2, self.act2 = theirs.conv2, theirs.bn2, theirs.act2
        self.layer1 = theirs.layer1
        self.transition1, self.stage2 = theirs.transition1, _stage(theirs.stage2, mode)
        self.transition2, self.stage3 = theirs.transition2, _stage(theirs.stage3, mode)
        if finest:
            del theirs.stage4[-1].fuse_layers[1:]
        self.transition3, self.stage4 = theirs.transition3, _stage(theirs.stage4, mode)
        channels = tuple(theirs.stage4_cfg["num_channels"])
        self.channels = channels[:1] if finest else channels
        self.ends = (f"layer1.{len(self.layer1) - 1}", f"stage2.{len(self.stage2) - 1}",
                     f"stage3.{len(self.stage3) - 1}")

    def maps(self, x_NCHW: Tensor) -> list[Tensor]:
        """The last stage's maps, finest first."""
        x = self.act1(self.bn1(self.conv1(x_NCHW)))
        x = self.layer1(self.act2(self.bn2(self.conv2(x))))
        maps: list[Tensor] = self.stage2([enter(x) for enter in self.transition1])
        for transition, stage in ((self.transition2, self.stage3), (self.transition3, self.stage4)):
            maps = stage([enter(maps[min(i, len(maps) - 1)]) for i, enter in enumerate(transition)])
        return maps


def _stage(theirs: nn.Module, mode: str) -> nn.Sequential:
    return nn.Sequential(*(Exchange(unit, mode) for unit in theirs.children()))


def _fill(trunk: nn.Module, path: str) -> None:
    ours, theirs = trunk.state_dict(), read_weights(path)
    faults = [key for key, own in ours.items() if key not in theirs or theirs[key].shape != own.shape]
    if faults := [key for key in faults if not key.endswith("num_batches_tracked")]:
        raise OfframpError(expected=f"a trunk's {len(ours)} tensors", where=path,
                           got=f"{len(faults)} of them missing or of another shape, as {', '.join(faults[:3])}",
                           todo="give ImageNet weights of timm's network of the same width")
    trunk.load_state_dict({key: theirs.get(key, own) for key, own in ours.items()})


@final
class HRNet(HRNetTrunk):
    """HRNetV2 for pixels: all branches resized to 1/4 side by side, one hidden 1x1; (N, 3, H, W) -> (N, K, H, W).

    >>> hrnet_w18_small(num_classes=5).eval()(torch.zeros(1, 3, 65, 97)).shape
    torch.Size([1, 5, 65, 97])
    """

    def __init__(self, variant: str, num_classes: int, *, pretrained: bool | str = False) -> None:
        super().__init__(variant, mode="bilinear", pretrained=pretrained)
        width = sum(self.channels)
        self.last_layer = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(),
                                        nn.Conv2d(width, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]  # read here: a network that is cut need not keep its input for it
        finest, *coarser = self.maps(x)
        joined = torch.cat([finest, *(_resize(m, finest.shape[-2:]) for m in coarser)], dim=1)
        return _resize(self.last_layer(joined), size)


@final
class HRNetPose(HRNetTrunk):
    """HRNetV1 for poses: the finest branch, one 1x1; (N, 3, H, W) -> heatmaps (N, K, H / 4, W / 4).

    >>> hrnet_w32_pose(num_classes=16).eval()(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 16, 16, 16])
    """

    def __init__(self, variant: str, num_classes: int, *, pretrained: bool | str = False) -> None:
        super().__init__(variant, mode="nearest", finest=True, pretrained=pretrained)
        self.final_layer = nn.Conv2d(self.channels[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.final_layer(self.maps(x)[0])  # type: ignore[no-any-return]


def hrnet_w18_small(num_classes: int = 19, *, pretrained: bool | str = False) -> HRNet:
    """W18-small-v2, which is what ADP-C calls W18."""
    return HRNet("hrnet_w18_small_v2", num_classes, pretrained=pretrained)


def hrnet_w18(num_classes: int = 19, *, pretrained: bool | str = False) -> HRNet:
    return HRNet("hrnet_w18", num_classes, pretrained=pretrained)


def hrnet_w32(num_classes: int = 19, *, pretrained: bool | str = False) -> HRNet:
    return HRNet("hrnet_w32", num_classes, pretrained=pretrained)


def hrnet_w48(num_classes: int = 19, *, pretrained: bool | str = False) -> HRNet:
    return HRNet("hrnet_w48", num_classes, pretrained=pretrained)


def hrnet_w32_pose(num_classes: int = 16, *, pretrained: bool | str = False) -> HRNetPose:
    return HRNetPose("hrnet_w32", num_classes, pretrained=pretrained)

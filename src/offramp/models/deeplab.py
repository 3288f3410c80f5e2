"""DeepLabV3+ (Chen et al. 2018, arXiv:1802.02611) with plain convolutions throughout, as SlimSeg narrows it.

segmentation_models_pytorch has DeepLabV3+ too, but lighter: pyramid and decoder are depthwise separable, with one 3x3
convolution at 1/4 instead of two (ResNet-50 at 1/8: 26.7 M and 894 G; MobileNetV2 at 1/16, its coarsest: 4.4 M and
48 G). The counts of the SlimSeg paper (doi:10.1145/3503161.3548191, Tables 1 and 2; 19 classes, 1024x2048) after ours
in ``offramp.cost.macs``'s count, where resizing is 0.3 G:

=========================  ===============  =============  ==================
network                    parameters (M)   MACs (G)       head alone (M, G)
=========================  ===============  =============  ==================
deeplabv3plus_resnet50     40.35 / 40.35    1461 / 1463    16.8, 663.5 / 663.5
deeplabv3plus_mobilenetv2  4.53 / 4.53      18.3 / 18.5    2.7, 6.6 / 6.3
=========================  ===============  =============  ==================

Axes: N samples, C channels, H W space, K classes.
"""

from typing import final

import torch
from torch import Tensor, nn

from offramp.models.sfnet import ResNetTrunk, conv_norm_relu, resize

__all__ = [
    "AtrousPyramid", "DeepLabV3Plus", "MobileNetTrunk", "deeplabv3plus_mobilenetv2", "deeplabv3plus_resnet50",
]


@final
class AtrousPyramid(nn.Module):
    """A 1x1 and dilated 3x3 convolutions and the map's mean side by side, then a 1x1 convolution (DeepLabV3).

    In train mode the mean needs two samples at least, else its batch norm has one value a channel.
    """

    def __init__(self, c_in: int, c_out: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_norm_relu(c_in, c_out, 1))
        self.branches = nn.ModuleList(
            [conv_norm_relu(c_in, c_out, 1), *(conv_norm_relu(c_in, c_out, 3, dilation=d) for d in dilations)])
        self.project = nn.Conv2d((len(dilations) + 2) * c_out, c_out, 1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        branches = [branch(x_NCHW) for branch in self.branches]
        pooled = resize(self.pooled(x_NCHW), x_NCHW.shape[-2:])
        return self.project(torch.cat([pooled, *branches], dim=1))  # type: ignore[no-any-return]


@final
class MobileNetTrunk(nn.Module):
    """torchvision's MobileNetV2 up to its last inverted residual; (N, 3, H, W) -> two maps, at 1/4 and 1/32.

    Keys are torchvision's, so that ``trunk.load_state_dict(weights, strict=False)`` leaves out the last convolution
    and the classifier alone.
    """

    channels = (24, 320)
    low_level = "features.3"
    """The module whose output is at 1/4."""

    def __init__(self) -> None:
        super().__init__()
        # here: its import takes a second, and most who load a network load another
        from torchvision.models import mobilenet_v2

        self.features = mobilenet_v2(weights=None).features[:-1]

    def forward(self, x_NCHW: Tensor) -> list[Tensor]:
        x, maps = x_NCHW, []
        for name, block in self.features.named_children():
            x = block(x)
            if f"features.{name}" == self.low_level:
                maps.append(x)
        return [*maps, x]


@final
class DeepLabV3Plus(nn.Module):
    """Atrous pyramid on the coarsest map, resized beside the one at 1/4; (N, 3, H, W) -> logits (N, K, H, W).

    ``decoder``: whether two 3x3 convolutions stand before the 1x1 classifier. ``low_level`` names the module whose
    output is the trunk's map at 1/4.
    """

    def __init__(
        self, trunk: ResNetTrunk | MobileNetTrunk, num_classes: int, *, dilations: tuple[int, ...], decoder: bool,
        channels: int = 256, low_channels: int = 48,
    ) -> None:
        super().__init__()
        self.trunk, self.low_level = trunk, f"trunk.{trunk.low_level}"
        self.pyramid = AtrousPyramid(trunk.channels[-1], channels, dilations)
        self.project = nn.Conv2d(trunk.channels[0], low_channels, 1, bias=False)
        both = low_channels + channels
        self.decoder = nn.Sequential(conv_norm_relu(both, channels, 3), conv_norm_relu(channels, channels, 3)
                                     ) if decoder else nn.Sequential()
        self.classifier = nn.Conv2d(channels if decoder else both, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]  # read here: a network that is cut need not keep its input for it
        maps = self.trunk(x)
        low = self.project(maps[0])
        both = torch.cat([low, resize(self.pyramid(maps[-1]), low.shape[-2:])], dim=1)
        return resize(self.classifier(self.decoder(both)), size)


def deeplabv3plus_resnet50(num_classes: int = 19) -> DeepLabV3Plus:
    """The last two stages dilated, so that the pyramid works at 1/8 with dilations 12, 24 and 36."""
    return DeepLabV3Plus(ResNetTrunk(50, dilated=True), num_classes, dilations=(12, 24, 36), decoder=True)


def deeplabv3plus_mobilenetv2(num_classes: int = 19) -> DeepLabV3Plus:
    """The pyramid at 1/32 and no 3x3 convolution at 1/4: what Table 1's 6.3 G and 2.7 M leave room for."""
    return DeepLabV3Plus(MobileNetTrunk(), num_classes, dilations=(6, 12, 18), decoder=False)

"""Other people's networks: which run at active places alone, and what of the others is named."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torchvision.models import segmentation
from torchvision.ops import SqueezeExcitation

import offramp
from offramp import OfframpError, RedesignedSpec, mask_
from offramp.models import load_model
from offramp.nn.masked import Masked
from sparse.nets import agree, lively


def masked_of(guest: nn.Module, exits: Any, x: torch.Tensor) -> Masked:
    net = offramp.attach(guest.eval(), x, exits=exits, heads=lambda about: RedesignedSpec(down=0), task="dense",
                         keep_costly=True)
    return mask_(lively(net), share=0.5)


@pytest.mark.parametrize(("make", "exits"), [
    (lambda: smp.Unet("resnet18", encoder_weights=None, classes=4), ["encoder.layer3.1", "decoder.blocks.1"]),
    (lambda: load_model("offramp:scenes_dense?num_classes=4"), ["stage3.1", "stage3.4"]),
], ids=["smp.Unet", "scenes_dense"])
@torch.no_grad()
def test_they_run(make: Callable[[], nn.Module], exits: list[str]) -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 3, 64, 96)
    masked = masked_of(make(), exits, x)
    agree(masked, masked.deploy(), x)  # type: ignore[arg-type]


class Between(nn.Module):
    """Two convolutions, and a layer between them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.between = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.Conv2d(8, 8, 1), layer)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(self.first(x)))


@pytest.mark.parametrize(("make", "exits", "named"), [
    (lambda: segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=4),
     ["backbone.layer3.5"], r"AdaptiveAvgPool2d.*classifier\.0\.convs\.4: a mean of the whole picture"),
    (lambda: smp.FPN("resnet18", encoder_weights=None, classes=4), ["encoder.layer3.0"], "GroupNorm.*seg_blocks"),
    (lambda: Between(SqueezeExcitation(8, 2)), ["first"], "AdaptiveAvgPool2d.*a mean of the whole picture"),
    (lambda: Between(nn.SiLU()), ["first"], r"SiLU\(.*guest_between_1, in between"),
    (lambda: Between(nn.Hardswish()), ["first"], r"Hardswish\(.*guest_between_1, in between"),
    (lambda: Between(nn.ReLU6()), ["first"], r"ReLU6\(.*guest_between_1, in between"),
], ids=["deeplabv3", "smp.FPN", "gate", "silu", "hardswish", "relu6"])
@torch.no_grad()
def test_what_does_not_is_named(make: Callable[[], nn.Module], exits: list[str], named: str) -> None:
    x = torch.rand(2, 3, 64, 64)
    fast: Any = masked_of(make(), exits, x).deploy()
    with pytest.raises(OfframpError) as error:
        fast(x)
    assert re.search(named, str(error.value)), str(error.value)

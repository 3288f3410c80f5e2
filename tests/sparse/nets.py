"""Small networks with exits for sparse execution, and how it is held against the dense simulation."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import offramp
from offramp import RedesignedSpec, redesigned
from offramp.models import hrnet_w18_small
from offramp.nn.masked import Masked
from offramp.sparse import Sparse


def unit(width: int, wide: int, stride: int = 1, **conv: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, wide, 3, stride, conv.pop("padding", 1), **conv), nn.BatchNorm2d(wide),
                         nn.ReLU(inplace=True))


class Mixed(nn.Module):
    """One of each: depthwise and dilated convolutions, both poolings, three resizings, numbers, in-place writing."""

    def __init__(self, end: str = "conv") -> None:
        super().__init__()
        self.stem, self.body = unit(3, 6, 2), unit(6, 6)
        self.depth, self.point = unit(6, 6, groups=6, bias=False), nn.Conv2d(6, 8, 1)
        self.low, self.wide = unit(8, 8, groups=2), unit(8, 4, dilation=2, padding="same")
        self.norm, self.mix = nn.BatchNorm2d(20), nn.Conv2d(20, 6, 1, bias=False)
        self.last, self.more = nn.Conv2d(6, 4, 1), nn.Conv2d(8, 4, 3, 2, 1) if end == "sum" else None
        self.pool, self.end = nn.MaxPool2d(3, 2, 1), end

    def forward(self, x: Tensor) -> Any:
        size = x.shape[-2:]
        x = self.body(self.stem(x))
        a = self.point(self.depth(x))
        b = self.low(self.pool(a))
        c = self.wide(F.avg_pool2d(a, 2, ceil_mode=True)) * 0.5 + 0.25
        y = torch.cat([a, F.interpolate(b, size=a.shape[-2:]), torch.cat([F.interpolate(
            c, size=a.shape[-2:], mode="bilinear", align_corners=True)], 1)], dim=1)
        z = F.dropout(self.mix(F.relu(self.norm(y))), training=self.training)
        kept = z.detach()
        z += x  # which kept sees too
        z = F.relu_(z)
        y = self.last(kept + z)
        if self.more is not None:
            y = y + F.interpolate(self.more(a), size=y.shape[-2:], mode="bilinear", align_corners=False)
        y = F.interpolate(y, size=size, mode="bilinear", align_corners=False)
        return {"out": y} if self.end == "dict" else y


HEADS = {"stem": RedesignedSpec(down=1, channels=5), "body": RedesignedSpec(down=2, channels=5),
         "point": RedesignedSpec(down=0, channels=5)}


def lively(net: offramp.MultiExit, sharp: float = 3.0) -> offramp.MultiExit:
    """Norms that move what they norm, so that before one differs from after it; logits sure here and unsure there."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.bias.data.normal_(0, 0.3)
        if isinstance(module, nn.Conv2d) and module.out_channels == 4:
            module.weight.data.mul_(sharp)
    return net.eval()


def mixed(size: tuple[int, int] = (24, 20), batch: int = 1, heads: Any = HEADS, **guest: Any
          ) -> tuple[offramp.MultiExit, Tensor]:
    x = torch.rand(batch, 3, *size)
    net = offramp.attach(Mixed(**guest), x, exits=list(heads), heads=heads, keep_costly=True)
    return lively(net), x


def hrnet(size: tuple[int, int], heads: str, batch: int = 1) -> tuple[offramp.MultiExit, Tensor]:
    guest, x = hrnet_w18_small(num_classes=4).eval(), torch.rand(batch, 3, *size)
    specs = redesigned(guest.ends, 8) if heads == "redesigned" else {
        end: RedesignedSpec(down=0) for end in guest.ends}
    return lively(offramp.attach(guest, x, exits=guest.ends, heads=specs, keep_costly=True)), x


def close(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-4, or 1e-5 of the largest."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def agree(masked: Masked, fast: Sparse, x: Tensor) -> list[Tensor]:
    """The masks, after all has been compared, and the first call with the second."""
    theirs, ours = masked.answers(x), fast.answers(x)
    assert all(map(torch.equal, ours.masks, theirs.masks)) and len(ours.masks) == len(theirs.masks)
    for mine, logits in zip(ours.logits, theirs.logits, strict=True):
        close(mine, logits)
    again = fast.answers(x)
    assert all(map(torch.equal, again.logits, ours.logits)) and all(map(torch.equal, again.masks, ours.masks))
    return theirs.masks

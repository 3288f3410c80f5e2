"""A small network with one of each kind of layer, and the same cut by hand to half its width."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.nn.slim import Slimmable, slim_

__all__ = ["HALF", "Small", "X", "by_hand", "half", "slimmed", "small"]


class Small(nn.Module):
    """One of each: strided, depthwise, grouped norm, a scale, a concatenation, a transposed convolution, PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.dw = nn.Conv2d(16, 16, 3, padding=1, groups=16, padding_mode="reflect")
        self.pw, self.gn = nn.Conv2d(16, 32, 1), nn.GroupNorm(4, 32)
        self.scale = nn.Parameter(torch.rand(32, 1, 1))
        self.mix, self.bn2, self.act = nn.Conv2d(48, 16, 1), nn.BatchNorm2d(16), nn.PReLU(16)
        self.up, self.ln = nn.ConvTranspose2d(16, 24, 2, 2), nn.LayerNorm(24)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        y = self.gn(self.pw(self.dw(x))) * self.scale
        z = self.act(self.bn2(self.mix(torch.cat([x, y], 1))))
        z = self.up(z).mean((2, 3))
        return self.head(self.drop(self.ln(z)))


def small() -> Small:
    torch.manual_seed(3)
    net = Small()
    for norm in (net.bn, net.bn2, net.gn, net.ln):
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 0, 0.2)
    for norm in (net.bn, net.bn2):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 1.5)
    nn.init.uniform_(net.act.weight)
    return net.eval()


X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(5))


def slimmed(widths: tuple[float, ...] = (0.25, 0.5, 1.0)) -> Slimmable:
    return slim_(small(), widths, example_inputs=X)


def by_hand(p: dict[str, Tensor], x: Tensor, training: bool = False) -> Tensor:
    """``Small`` at width 0.5, every slice written out; tensors of ``p`` are the small ones."""
    x = F.conv2d(x, p["stem.weight"], stride=2, padding=1)
    x = F.batch_norm(x, p["bn.running_mean"], p["bn.running_var"], p["bn.weight"], p["bn.bias"], training).relu()
    y = F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), p["dw.weight"], p["dw.bias"], groups=8)
    y = F.group_norm(F.conv2d(y, p["pw.weight"], p["pw.bias"]), 2, p["gn.weight"], p["gn.bias"]) * p["scale"]
    z = F.conv2d(torch.cat([x, y], 1), p["mix.weight"], p["mix.bias"])
    z = F.batch_norm(z, p["bn2.running_mean"], p["bn2.running_var"], p["bn2.weight"], p["bn2.bias"], training)
    z = F.conv_transpose2d(F.prelu(z, p["act.weight"]), p["up.weight"], p["up.bias"], stride=2).mean((2, 3))
    return F.linear(F.layer_norm(z, (16,), p["ln.weight"], p["ln.bias"]), p["head.weight"], p["head.bias"])


HALF: dict[str, Any] = {  # how the tensors of Small are indexed at width 0.5; 24 channels are rounded to 16
    "stem.weight": (slice(8),), "dw.weight": (slice(8),), "dw.bias": (slice(8),),
    "pw.weight": (slice(16), slice(8)), "pw.bias": (slice(16),), "scale": (slice(16),),
    "mix.weight": (slice(8), [*range(8), *range(16, 32)]), "mix.bias": (slice(8),), "act.weight": (slice(8),),
    "up.weight": (slice(8), slice(16)), "up.bias": (slice(16),), "head.weight": (slice(None), slice(16)),
    "head.bias": (slice(None),),
    **{f"{norm}.{name}": (slice(kept),) for norm, kept in {"bn": 8, "bn2": 8, "gn": 16, "ln": 16}.items()
       for name in ("weight", "bias", "running_mean", "running_var")},
}


def half(net: nn.Module) -> dict[str, Tensor]:
    return {name: held[HALF[name]].clone() for name, held in net.state_dict().items() if name in HALF}

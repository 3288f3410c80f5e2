"""Small networks with exits, random but fixed, and policies for them."""

from typing import Any

import torch
from torch import Tensor, nn

import offramp
from offramp.types import Evidence, Plan

torch.set_num_threads(1)
EXITS = ("one", "two")


def block(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class Guest(nn.Module):
    """Three blocks and a classifier; ``form`` says what it answers with."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.one, self.two, self.three = block(3, 8), block(8, 16, 2), block(16, 16)
        self.last = nn.Linear(16, 5)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        features = self.three(self.two(self.one(x)))
        logits = self.last(features.mean((2, 3)))
        forms = {"tensor": logits, "tuple": (logits, logits * 2), "dict": {"out": logits, "aux": logits + 1},
                 "features": {"out": logits, "features": features}}
        return forms[self.form]


class DenseGuest(nn.Module):
    """The same for pixels, at half the input's size inside."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = block(3, 8, 2), block(8, 16), block(16, 16)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.last(self.three(self.two(self.one(x))))
        return {"out": nn.functional.interpolate(logits, x.shape[-2:], mode="bilinear")}


def stir_(net: nn.Module) -> None:
    """Norms that do something: fresh ones are the identity, and would hide a mistake."""
    draw = torch.Generator().manual_seed(3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 1.5),
                                      (module.weight.data, 0.5, 1.5), (module.bias.data, -0.3, 0.3)):
                tensor.copy_(torch.rand(tensor.shape, generator=draw) * (high - low) + low)


def classifier(form: str = "tensor") -> offramp.MultiExit:
    torch.manual_seed(0)
    net = offramp.attach(Guest(form), torch.randn(2, 3, 12, 12), exits=EXITS, heads=offramp.HeadSpec())
    stir_(net)
    return net


def segmenter() -> offramp.MultiExit:
    torch.manual_seed(0)
    net = offramp.attach(DenseGuest(), torch.randn(2, 3, 16, 16), exits=EXITS, heads=offramp.HeadSpec())
    stir_(net)
    return net


def images(rows: int, size: int = 12) -> Tensor:
    draw = torch.Generator().manual_seed(rows)
    contrast = torch.linspace(0.3, 4, max(rows, 1))[:rows, None, None, None]
    return torch.randn(rows, 3, size, size, generator=draw) * contrast


class ByLogit:
    """Leaves where the first logit, in thousandths, has a remainder: arbitrary, but of each row alone."""

    def __init__(self, *remainders: int | None, of: int = 3) -> None:
        self.remainders, self.of = remainders, of

    def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
        first = evidence.logits if evidence.logits is not None else evidence.probs
        assert first is not None and first.shape[1] == exit_index + 1, "evidence of the exits passed so far"
        wanted = self.remainders[exit_index]
        if wanted is None:
            return torch.zeros(len(first), dtype=torch.bool)
        return (first[:, -1, 0] * 1000).round().long() % self.of == wanted


class Always:
    def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
        return torch.ones(len(evidence), dtype=torch.bool)


def plan(policy: Any, exits: tuple[str, ...] = EXITS, **more: Any) -> Plan:
    return Plan(**{"exits": exits, "policy": policy, "task": "classify", **more})


NEVER = ByLogit(None, None)

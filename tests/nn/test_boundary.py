"""The boundary head: as wide as the features it reads, at every width; nothing of it stays on the network."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.errors import WidthError
from offramp.nn.boundary import boundary_head, running_at, tapped, widths_of
from offramp.nn.slim import Slimmable, slim_

WIDTHS = (0.25, 0.5, 1.0)


class Joined(nn.Module):
    """Two branches in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 32, 1), nn.Conv2d(3, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.joined, self.pool = Joined(), nn.MaxPool2d(2)
        self.next, self.norm = nn.Conv2d(96, 96, 3, padding=1), nn.BatchNorm2d(96)
        self.flat, self.last = nn.Flatten(2), nn.Conv2d(96, 3, 1)
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.joined(x))
        z = self.norm(self.next(y)).relu() + y
        return self.last(z) + self.flat(z).mean()


def net() -> Slimmable:
    return slim_(Net(), WIDTHS, example_inputs=torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("name", ["norm", "next"])
def test_it_reads_the_channels_that_arrive(name: str) -> None:
    model, x = net(), torch.randn(2, 3, 8, 8)
    assert widths_of(model) == (1.0, 0.5, 0.25)
    head = boundary_head(model, name, x)
    assert isinstance(head, Slimmable) and head.widths == model.widths
    first, norm, _, last = head.backbone.eval()  # type: ignore[misc]
    assert first.weight.shape == (64, 96, 3, 3) and last.weight.shape == (1, 64, 1, 1)
    # what is added to a concatenation of 32 and 64 channels keeps the first ones of each
    runs = {1.0: [(0, 96)], 0.5: [(0, 16), (32, 64)], 0.25: [(0, 8), (32, 48)]}
    for width, between in ((1.0, 64), (0.5, 32), (0.25, 16)):
        with torch.no_grad(), running_at(width, model, head), tapped(model, name) as seen:
            model(x)
            said = head(seen[-1])
        weight = torch.cat([first.weight[:between, a:b] for a, b in runs[width]], 1)
        own = norm if width == 1.0 else norm.get_submodule(f"at_{width}".replace(".", ":"))
        y = F.batch_norm(F.conv2d(seen[-1], weight, None, 1, 1), own.running_mean, own.running_var, own.weight,
                         own.bias, False, 0.0, 1e-5).relu()
        expected = F.conv2d(y, last.weight[:, :between], last.bias)
        assert said.shape == (2, 1, 4, 4) and torch.allclose(said, expected, atol=1e-6)
        assert torch.allclose(head.narrow(width)(seen[-1]), said, atol=1e-6)


def test_the_network_stays_as_it_was() -> None:
    model = net().train()
    model.width = 0.5
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = boundary_head(model, "norm", torch.randn(2, 3, 8, 8))
    assert model.width == 0.5 and all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not {id(p) for p in head.parameters()} & {id(p) for p in model.parameters()}


def test_of_a_plain_network_it_is_plain() -> None:
    head = boundary_head(Net(), "joined", torch.randn(2, 3, 8, 8))
    assert not isinstance(head, Slimmable) and head(torch.zeros(1, 96, 8, 8)).shape == (1, 1, 8, 8)
    assert widths_of(Net()) == (1.0,)


@pytest.mark.parametrize(("name", "said"), [
    ("nrom", "did you mean norm"), ("", "name of a module"), ("flat", "a map"), ("unused", "no call of it"),
    ("joined", r"gives \[96, 48, 24\] channels"), ("pool", "no layer"),
])
def test_what_it_cannot_read_is_refused(name: str, said: str) -> None:
    model = net()
    with pytest.raises(WidthError, match=said):
        boundary_head(model, name, torch.zeros(2, 3, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())

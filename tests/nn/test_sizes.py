"""Sizes of a narrow network, given to a wide one: it then holds the same weights and says the same."""

import json

import pytest
import torch
from torch import Tensor, nn

import offramp
from offramp.errors import FileFormatError
from offramp.nn.sizes import resize_, sizes_of


class Net(nn.Module):
    """Depthwise and grouped convolutions, norms that count channels or groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.depthwise, self.group = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.GroupNorm(4, 32)
        self.act, self.bn = nn.PReLU(32), nn.BatchNorm2d(32)
        self.norm, self.last = nn.LayerNorm(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.group(self.depthwise(self.stem(x)))))
        return self.last(self.norm(x.mean((2, 3))))  # type: ignore[no-any-return]


def test_a_wide_network_becomes_the_narrow_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    narrow = offramp.slim_(Net(), (0.5, 1.0), example_inputs=x).narrow(0.5).eval()
    sizes = json.loads(json.dumps(sizes_of(narrow)))
    wide = Net().eval()
    before = wide.last.bias
    resize_(wide, sizes, "here")
    assert str(wide) == str(narrow) and "groups=16" in str(wide) and "GroupNorm(2, 16" in str(wide)
    assert wide.last.bias is before, "what keeps its size stays"
    wide.load_state_dict(narrow.state_dict())
    assert torch.equal(wide(x), narrow(x)) and sizes_of(wide) == sizes


def test_tied_weights_stay_tied() -> None:
    pair = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    pair[1].weight = pair[0].weight
    sizes = sizes_of(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    resize_(pair, sizes, "here")
    assert pair[0].weight is pair[1].weight and pair[0].weight.shape == (4, 4)
    assert pair[0].weight.requires_grad and pair[0].in_features == 4


@pytest.mark.parametrize("sizes", [
    {"1": {"attributes": {}, "tensors": {"weight": [4, 4], "bias": [4]}}},
    {"0": {"attributes": {}, "tensors": {"weight": [4, 4]}}},
    {"0": {"attributes": {"forward": 4}, "tensors": {"weight": [4, 4], "bias": [4]}}},
    {"0": {"attributes": {"in_channels": 4}, "tensors": {"weight": [4, 4], "bias": [4]}}},
    {"0": {"attributes": {"in_features": "x"}, "tensors": {"weight": [4, 4], "bias": [4]}}},
    {"0": {"tensors": {"weight": [4, 4], "bias": [4]}}},
], ids=str)
def test_sizes_of_another_network(sizes: dict) -> None:
    with pytest.raises(FileFormatError, match="here"):
        resize_(nn.Sequential(nn.Linear(8, 8)), sizes, "here")

"""tune_: another form of the same convolution, only where it measures faster."""

import pytest
import torch
from torch import nn

from offramp.nn.tune import ShiftedConv2d, shifted_conv2d, tune_

torch.set_num_threads(1)


@pytest.mark.parametrize(("kernel", "padding", "dilation"), [
    ((3, 3), (12, 12), (12, 12)), ((3, 3), (36, 36), (36, 36)), ((3, 3), (0, 0), (2, 3)), ((3, 3), (5, 1), (2, 4)),
    ((1, 1), (0, 0), (1, 1)), ((1, 3), (0, 2), (1, 2)), ((5, 5), (8, 8), (4, 4)), ((3, 3), (1, 1), (1, 1)),
])
def test_shifted_is_the_convolution(
    kernel: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 6, 17, 21), torch.randn(4, 6, *kernel), torch.randn(4)
    wanted = nn.functional.conv2d(x, weight, bias, padding=padding, dilation=dilation)
    got = shifted_conv2d(x, weight, bias, padding, dilation)
    assert got.shape == wanted.shape and torch.allclose(got, wanted, atol=1e-4)
    narrow = shifted_conv2d(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), padding, dilation)
    assert narrow.dtype == torch.bfloat16 and torch.allclose(narrow.float(), wanted, atol=0.35)


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(8, 4, 3, padding=2, dilation=2)
        self.far = nn.Conv2d(8, 4, 3, padding=12, dilation=12)
        self.strided = nn.Conv2d(8, 4, 3, 2, padding=12, dilation=12)
        self.drop = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.near(x) + self.far(x))


def test_only_fitting_layers_are_measured_on_their_own_inputs_and_swapped_where_it_pays() -> None:
    torch.manual_seed(0)
    model, x = Pyramid(), torch.randn(1, 8, 20, 24)
    wanted, keys = model.eval()(x), list(model.state_dict())
    model.train()
    model.near.eval()
    modes = [module.training for module in model.modules()]
    told = tune_(model, x, min_channels=8, pays=float("inf"))
    assert [(one.name, one.shape, one.swapped) for one in told] == [("far", (1, 8, 20, 24), False)]
    assert type(model.far) is nn.Conv2d and told[0].conv_ms > 0 < told[0].shifted_ms
    told = tune_(model, min_channels=8, pays=0.0)
    assert told[0].swapped and type(model.far) is ShiftedConv2d and type(model.near) is nn.Conv2d
    assert modes == [module.training for module in model.modules()] and list(model.state_dict()) == keys
    assert torch.allclose(model.eval()(x), wanted, atol=1e-4)
    assert tune_(model, min_channels=8, pays=0.0) == (), "done is done"


def test_a_tuned_layer_is_one_node_of_a_trace_at_any_size() -> None:
    from offramp.graph import begin, split, trace

    model = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 3, padding=12, dilation=12), nn.ReLU()).eval()
    assert tune_(model, min_channels=8, pays=0.0)[0].swapped
    x = torch.randn(2, 8, 30, 30)
    first, second = split(trace(model, x), ["0"])
    for size in (30, 18):
        y = torch.randn(2, 8, size, size)
        assert torch.equal(second(first(begin(first.traced, y))), model(y))

"""ExitColumn.stride: how many output pixels one step of the map spans on which a head computes its logits."""

import pytest
import torch
from torch import Tensor, nn

import offramp


def block(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


class Pyramid(nn.Module):
    """Three scales; the last block sees the two finer ones as well, so that its frontier holds several maps."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = block(3, 8, 4), block(8, 16, 2), block(16, 16, 2)
        self.four = block(16, 64, 1)
        self.last = nn.Conv2d(64 + 16 + 8, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(one)
        four = self.four(self.three(two))
        size = one.shape[-2:]
        joined = [nn.functional.interpolate(part, size, mode="bilinear") for part in (four, two)]
        return nn.functional.interpolate(self.last(torch.cat([one, *joined], 1)), x.shape[-2:], mode="bilinear")


class Own(nn.Module):
    """A user's head, of which nothing is known but what it is given."""

    def forward(self, *maps: Tensor) -> Tensor:
        said = maps[0].mean(1, keepdim=True).expand(-1, 5, -1, -1)
        return nn.functional.interpolate(said, (64, 96), mode="bilinear")


@pytest.mark.parametrize("head", [None, offramp.HeadSpec(convs=((8, 1, 1),)), Own()])
def test_stride_is_that_of_the_map_where_the_logits_are_computed(head: object) -> None:
    net = offramp.attach(Pyramid(), torch.randn(2, 3, 64, 96), exits=["one", "two", "three"],
                         heads=head)  # type: ignore[arg-type]
    live = [sorted(tensor.shape[2] for tensor in site.live) for site in net.sites]
    assert live == [[16, 64], [8, 16, 64], [4, 8, 16, 64]], "the image too, whose size the end asks for"
    # of several maps a head takes the finest one that is at most a quarter of the output
    assert [column.stride for column in net.columns] == [4, 4, 4, 4]


def test_stride_grows_with_depth_where_one_map_is_live() -> None:
    class Chain(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.interpolate(super().forward(x), x.shape[-2:], mode="bilinear")

    guest = Chain(block(3, 8, 2), block(8, 16, 2), block(16, 16, 2), block(16, 64, 1), nn.Conv2d(64, 5, 3, 1, 1))
    net = offramp.attach(guest, torch.randn(2, 3, 40, 64), exits=["0", "1", "2"], heads=offramp.HeadSpec())
    assert [column.stride for column in net.columns] == [2, 4, 8, 8], "the backbone's own is the deepest exit's"


def test_classes_of_whole_images_have_no_stride() -> None:
    guest = nn.Sequential(block(3, 8, 2), block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    net = offramp.attach(guest, torch.randn(2, 3, 16, 16), exits=["0"], heads=offramp.HeadSpec())
    assert [column.stride for column in net.columns] == [1, 1]

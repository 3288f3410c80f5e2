"""Channel coupling: known groups, refusals, and that a plan's prefixes make a network that runs."""

import pytest
import torch
from torch import nn

from offramp.errors import WidthError
from offramp.graph.channels import ChannelPlan, Segment, Space, channels
from offramp.graph.trace import trace
from zoo import LIBRARY

ANIMALS = {animal.name: animal for animal in LIBRARY}


def plan_of(name: str) -> ChannelPlan:
    return channels(trace(ANIMALS[name].model(), ANIMALS[name].inputs(2)))


def test_blocks_of_a_resnet_stage_write_the_same_channels() -> None:
    plan = plan_of("torchvision:resnet50")
    stage = plan.layer("layer2.0.downsample.0").gives
    assert [plan.layer(f"layer2.{i}.conv3").gives for i in range(4)] == [stage] * 4
    assert plan.layer("layer3.0.conv1").reads == stage and plan.layer("layer2.3.bn3").gives == stage
    assert plan.layer("layer2.0.conv1").gives != plan.layer("layer2.1.conv1").gives
    assert plan.spaces[stage[0].space].size == 512
    assert all(plan.spaces[s.space].fixed for s in plan.layer("conv1").reads + plan.layer("fc").gives)
    assert sum(not space.fixed for space in plan.spaces) == 1 + 4 + 2 * 16


def test_rounding_is_to_multiples_of_eight_and_never_below_nine_tenths() -> None:
    plan = ChannelPlan((Space(24, 1, False, "", ()), Space(4, 12, False, "", ()), Space(40, 1, True, "so", ())), ())
    assert [plan.kept(0, width) for width in (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)] == [8, 8, 16, 24, 24, 24]
    assert [plan.kept(1, width) for width in (0.25, 0.5, 1.0)] == [2, 2, 4]  # 24 channels are both groups and eights
    assert plan.kept(2, 0.25) == 40
    axis = (Segment(0), Segment(2), Segment(0, 2))
    assert plan.count(axis, 0.5) == 16 + 40 + 32
    assert plan.runs(axis, 0.5) == ((0, 16), (24, 96)) and plan.runs(axis, 1.0) == ((0, 112),)


def test_an_unknown_op_is_refused_by_name_and_line() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.logcumsumexp(self.a(x), 1))

    traced = trace(Odd(), torch.zeros(1, 3, 4, 4))
    with pytest.raises(WidthError, match=r"logcumsumexp at .*test_channels.py:\d+.*where=.*'a'"):
        channels(traced)
    assert channels(traced, where=lambda path, module: path != "a").layer("b").reads

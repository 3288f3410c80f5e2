"""Channel coupling: axes that turn out to be parts and multiples of each other, known groups, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.errors import WidthError
from offramp.graph._axes import Axes
from offramp.graph.channels import ChannelPlan, Segment, Space, Walk, channels, planned
from offramp.graph.trace import trace
from zoo import LIBRARY

ANIMALS = {animal.name: animal for animal in LIBRARY}


def plan_of(name: str) -> ChannelPlan:
    return channels(trace(ANIMALS[name].model(), ANIMALS[name].inputs(2)))


class Between(nn.Module):
    """A function of the two outputs of two convolutions, read by a third."""

    def __init__(self, function: Callable[..., Tensor], reads: int = 16, size: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(3, size, 1)
        self.out, self.function = nn.Conv2d(reads, 2, 1), function
        self.scale = nn.Parameter(torch.ones(16, 1, 1))
        self.table = nn.Parameter(torch.ones(1, 16, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self, self.a(x), self.b(x)))


def between(function: Callable[..., Tensor], reads: int = 16, size: int = 16, **kwargs: Any) -> ChannelPlan:
    return channels(trace(Between(function, reads, size), torch.randn(2, 3, 4, 4)), **kwargs)


def test_axes_split_and_scale_each_other() -> None:
    axes = Axes()
    a, b, whole = axes.new(48), axes.new(16), axes.new(64)
    axes.unify(whole, a + b)
    assert axes.resolve(whole) == axes.resolve(a + b) and axes.length(whole) == 64
    runs = axes.new(8 * 49)
    axes.unify(runs, tuple(Segment(s.space, 49) for s in axes.new(8)))
    (run,) = axes.resolve(runs)
    assert (axes.size(run.space), run.unit) == (8, 49)
    pairs, triples = axes.new(6), axes.new(4)
    axes.unify(tuple(Segment(s.space, 2) for s in pairs), tuple(Segment(s.space, 3) for s in triples))
    assert [(axes.size(s.space), s.unit) for s in axes.resolve(pairs)] == [(2, 3)]  # twelve channels, six at a time


def test_an_element_on_both_sides_of_a_border_is_fixed() -> None:
    axes = Axes()
    a, b = axes.new(5), axes.new(6)
    axes.unify(axes.new(3) + axes.new(7), tuple(Segment(s.space, 2) for s in a))
    assert [(axes.size(s.space), axes.why(s.space)) for s in axes.resolve(a)] == [
        (1, ""), (1, "its channels lie on both sides of a split"), (3, "")]
    axes.fix(b, "so")
    axes.unify(axes.new(5) + axes.new(7), tuple(Segment(s.space, 2) for s in b))
    assert axes.is_fixed(b)


def test_halves_of_interleaved_halves() -> None:
    axes = Axes()
    half = axes.parts(axes.new(56), 2)
    (quarter,) = axes.parts(tuple(Segment(s.space, 2) for s in half), 2)
    assert (axes.size(quarter.space), quarter.unit, axes.why(quarter.space)) == (14, 2, "")
    assert axes.resolve(half) == (Segment(quarter.space), Segment(quarter.space))


def test_an_axis_that_is_its_own_multiple_is_fixed_whole() -> None:
    axes = Axes()
    a = axes.new(8)
    axes.unify(a + a, tuple(Segment(s.space, 2) for s in a))
    assert axes.is_fixed(a)


def test_a_known_reason_overrules_an_op_that_nobody_understood() -> None:
    axes = Axes()
    a, b = axes.new(4), axes.new(4)
    axes.fix(a, "odd", soft=True)
    axes.unify(a, b)
    assert not axes.is_fixed(b) and axes.why(axes.resolve(b)[0].space) == "odd"
    axes.fix(b, "the output")
    assert axes.is_fixed(a) and axes.why(axes.resolve(a)[0].space) == "the output"


def test_blocks_of_a_resnet_stage_write_the_same_channels() -> None:
    plan = plan_of("torchvision:resnet50")
    stage = plan.layer("layer2.0.downsample.0").gives
    assert [plan.layer(f"layer2.{i}.conv3").gives for i in range(4)] == [stage] * 4
    assert plan.layer("layer3.0.conv1").reads == stage and plan.layer("layer2.3.bn3").gives == stage
    assert plan.layer("layer2.0.conv1").gives != plan.layer("layer2.1.conv1").gives
    assert plan.spaces[stage[0].space].size == 512
    assert all(plan.spaces[s.space].fixed for s in plan.layer("conv1").reads + plan.layer("fc").gives)
    assert sum(not space.fixed for space in plan.spaces) == 1 + 4 + 2 * 16
    assert plan.spaces[plan.layer("fc").gives[0].space].why == "the network's output"


def test_expansions_and_depthwise_convolutions_share_channels() -> None:
    plan = plan_of("torchvision:mobilenet_v2")
    wide = plan.layer("features.2.conv.0.0").gives
    depthwise = plan.layer("features.2.conv.1.0")
    assert depthwise.reads == depthwise.gives == wide == plan.layer("features.2.conv.2").reads
    assert plan.layer("features.3.conv.2").gives == plan.layer("features.2.conv.2").gives != wide


def test_a_decoder_reads_a_row_of_what_comes_up_and_what_was_skipped() -> None:
    plan = plan_of("smp:Unet")
    up, skip = plan.layer("encoder.layer4.1.conv2").gives, plan.layer("encoder.layer3.1.conv2").gives
    assert plan.layer("decoder.blocks.0.conv1.0").reads == up + skip
    assert plan.layer("segmentation_head.0").reads == plan.layer("decoder.blocks.4.conv2.0").gives


def test_concatenated_channels_split_what_is_added_to_them() -> None:
    plan = between(lambda net, a, b: torch.cat([a, b], 1).chunk(2, 1)[0] * net.scale + a)
    assert plan.layer("a").gives == plan.layer("b").gives == plan.layer("out").reads == plan.layer("scale").gives
    plan = between(lambda net, a, b: torch.cat([a[:, : a.shape[1] // 2], a], 1) + b, 24, 24)
    (half, again), wide = plan.layer("a").gives, plan.layer("b").gives
    assert half == again and wide == (half,) * 3
    assert plan.spaces[half.space].channels == 2 and plan.kept(half.space, 0.5) == 4


SAME: dict[str, Callable[..., Tensor]] = {
    "parameter": lambda net, a, b: a * net.scale + b,
    "table": lambda net, a, b: a + b + net.table,
    "squeeze": lambda net, a, b: a * b.mean((2, 3), keepdim=True).sigmoid(),
    "drop": lambda net, a, b: a + b.amax((2, 3))[..., None, None],
    "where": lambda net, a, b: torch.where(a > 0, a, b),
    "stack": lambda net, a, b: torch.stack([a, b], 1).sum(1),
    "permute": lambda net, a, b: a + b.permute(0, 2, 3, 1).transpose(1, 3).transpose(2, 3),
    "view": lambda net, a, b: a.flatten(2).transpose(1, 2).mT.view(b.shape) + b,
    "shuffle": lambda net, a, b: F.pixel_unshuffle(F.pixel_shuffle(a, 2), 2) + b,
    "zeros": lambda net, a, b: a.new_zeros(a.shape) + a + b,
    "expand": lambda net, a, b: a.mean(1, keepdim=True).expand(-1, b.shape[1], -1, -1) * a + b,
    "resize": lambda net, a, b: F.interpolate(F.avg_pool2d(a, 2), size=b.shape[2:]) + b,
    "index": lambda net, a, b: a[:, :, torch.tensor([3, 2, 1, 0])] + b[..., None, 0, :].squeeze(2)[:, :, None],
    "literal end": lambda net, a, b: a[:, :16] + b,
    "written": lambda net, a, b: a.add_(b).relu_(),
}


@pytest.mark.parametrize("name", SAME)
def test_these_keep_the_channels_of_both_together(name: str) -> None:
    plan = between(SAME[name])
    space = plan.layer("out").reads[0].space
    assert not plan.spaces[space].fixed and {s.space for s in plan.layer("a").gives + plan.layer("b").gives} == {space}
    assert {layer.path for layer in plan.layers} >= {"a", "b", "out", *{"parameter": ["scale"], "table": ["table"]}.get(
        name, [])}


@pytest.mark.parametrize(("function", "reads", "want"), [
    (lambda net, a, b: F.pixel_shuffle(a, 2), 4, [(4, 1)]),
    (lambda net, a, b: F.pixel_unshuffle(a, 2), 64, [(16, 4)]),
    (lambda net, a, b: a.flatten(1)[..., None, None], 256, [(16, 16)]),
    (lambda net, a, b: torch.cat([a, a.repeat(1, 2, 1, 1)], 1), 48, [(16, 1)] * 3),
    (lambda net, a, b: a.view(a.shape[0], 2, a.shape[1] // 2, 16).transpose(1, 2).reshape(a.shape), 16, [(8, 2)]),
    (lambda net, a, b: a.view(a.shape[0], a.shape[1] // 2, 2, 4, 4).sum(2), 8, [(8, 1)]),
    (lambda net, a, b: F.glu(a, 1), 8, [(8, 1)]),
    (lambda net, a, b: F.pad(a, (0, 0, 0, 0, 1, 2)), 19, [(1, 1), (16, 1), (2, 1)]),
], ids=["pixel_shuffle", "pixel_unshuffle", "flatten", "repeat", "channel_shuffle", "grouped", "glu", "pad"])
def test_units_and_rows(function: Any, reads: int, want: list[tuple[int, int]]) -> None:
    plan = between(function, reads)
    assert [(plan.spaces[s.space].size, s.unit) for s in plan.layer("out").reads] == want
    assert not plan.spaces[plan.layer("a").gives[0].space].fixed


REFUSED: dict[str, Callable[..., Tensor]] = {
    "logcumsumexp": lambda net, a, b: torch.logcumsumexp(a, 1),
    "softmax": lambda net, a, b: a.softmax(1),
    "split": lambda net, a, b: torch.cat(a.split(8, 1), 1),
    "getitem": lambda net, a, b: torch.cat([a[:, :8], b[:, 8:]], 1),
    "view": lambda net, a, b: a.view(-1, 16, 4, 4),
    "matmul": lambda net, a, b: a @ b,
    "einsum": lambda net, a, b: torch.einsum("nchw,ndhw->nchw", a, b),
    "setitem": lambda net, a, b: (a.__setitem__((slice(None), 0), 0.0), a)[1],
    "mul": lambda net, a, b: (a.mean((2, 3))[:, None] * a.mean((2, 3))[:, :, None])[..., None],
    "conv2d": lambda net, a, b: F.conv2d(a, net.out.weight[:1] * 2).expand(-1, 16, -1, -1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_line_unless_fixed(name: str) -> None:
    with pytest.raises(WidthError, match=rf"{name} at .*test_channels.py:\d+, which.*where=.*'a'"):
        between(REFUSED[name])
    plan = between(REFUSED[name], where=lambda path, module: path not in ("a", "b"))
    assert all(plan.spaces[s.space].fixed for s in plan.layer("a").gives)
    assert "where() keeps a" in str(plan)


def test_an_op_that_nobody_understood_is_refused_though_its_result_would_fix_its_input() -> None:
    with pytest.raises(WidthError, match="logcumsumexp"):
        between(lambda net, a, b: a + torch.logcumsumexp(a, 1))


def test_groups_stay_whole() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 64, 1, groups=8), nn.GroupNorm(4, 64), nn.GroupNorm(1, 64),
                        nn.Conv2d(64, 5, 1))
    plan = channels(trace(net, torch.randn(2, 3, 4, 4)))
    (read,), (written,) = plan.layer("1").reads, plan.layer("1").gives
    assert (read.unit, written.unit, plan.spaces[read.space].size) == (8, 16, 4)
    assert read.space == written.space and plan.layer("3").reads == plan.layer("2").gives == (written,)
    assert plan.spaces[read.space].channels == 8


def test_a_layer_called_twice_and_tied_weights_have_one_width() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(i, o) for i, o in ((4, 16), (16, 16), (16, 16), (16, 4)))
            self.c.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(torch.relu(self.b(torch.relu(self.b(self.a(x)))))))

    plan = channels(trace(Twice(), torch.randn(3, 4)))
    assert len({plan.layer(path).gives for path in "abc"} | {plan.layer(path).reads for path in "bcd"}) == 1
    assert [layer.path for layer in plan.layers] == ["a", "b", "c", "d"]


def test_heads_that_only_training_calls_read_the_same_channels() -> None:
    class Helped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.out = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 2, 1)
            self.aux = nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = self.norm(self.a(x))
            return (self.out(x), self.aux(x)) if self.training else (self.out(x),)

    model = Helped().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = channels(trace(model, torch.randn(2, 3, 4, 4)))
    assert plan.layer("aux").reads == plan.layer("a").gives == plan.layer("out").reads
    assert plan.spaces[plan.layer("aux").gives[0].space].fixed and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_second_program_reads_the_channels_of_the_first() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 5, 1))
    head = nn.Sequential(nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(8 * 36, 5))
    walk, guest = Walk(), trace(backbone, torch.randn(2, 3, 8, 8))
    walk.feed(guest.program, backbone)
    relu = next(node for node in guest.program.nodes if "guest.1" in str(node.target))
    exits = trace(head, torch.randn(2, 16, 6, 6))
    walk.feed(exits.program, head, [walk.carry(relu)], prefix="exit.")
    plan = planned(walk)
    assert plan.layer("exit.0").reads == plan.layer("0").gives == walk.at(relu).axis == plan.layer("2").reads
    assert plan.layer("exit.3").reads == (Segment(plan.layer("exit.1").gives[0].space, 36),)
    assert plan.spaces[plan.layer("exit.3").gives[0].space].fixed


def test_rounding_is_to_multiples_of_eight_and_never_below_nine_tenths() -> None:
    plan = ChannelPlan((Space(24, 1, False, "", ()), Space(4, 12, False, "", ()), Space(40, 1, True, "so", ())), ())
    assert [plan.kept(0, width) for width in (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)] == [8, 8, 16, 24, 24, 24]
    assert [plan.kept(1, width) for width in (0.25, 0.5, 1.0)] == [2, 2, 4]  # 24 channels are both groups and eights
    assert plan.kept(2, 0.25) == 40
    axis = (Segment(0), Segment(2), Segment(0, 2))
    assert plan.count(axis, 0.5) == 16 + 40 + 32
    assert plan.runs(axis, 0.5) == ((0, 16), (24, 96)) and plan.runs(axis, 1.0) == ((0, 112),)

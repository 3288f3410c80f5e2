"""A plan is right if the weights cut by it say what the whole ones say with the dropped channels silenced.

Cut by hand here, slice by slice, from the plan alone. And a channel of one layer moves what the plan says of the inputs
of others, nothing else.
"""

import copy
import functools
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from offramp.graph.channels import Axis, ChannelPlan, Layer, channels
from offramp.graph.trace import trace
from zoo import LIBRARY

ANIMALS = {animal.name: animal for animal in LIBRARY}
EXACT = (
    "torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x1_0", "torchvision:regnet_y_400mf",
    "timm:ghostnet_100", "timm:resnest14d", "smp:Unet",
)
# Statistics over fewer channels are other ones: only the shapes can be right.
NORMED = ("timm:convnextv2_atto",)


def kept(plan: ChannelPlan, axis: Axis, width: float, divisor: int) -> Tensor:
    return torch.tensor([i for run in plan.runs(axis, width, divisor) for i in range(*run)], dtype=torch.long)


def narrowed(model: nn.Module, plan: ChannelPlan, width: float, divisor: int = 8) -> nn.Module:
    small = copy.deepcopy(model)
    for layer in plan.layers:
        reads, gives = (kept(plan, axis, width, divisor) for axis in (layer.reads, layer.gives))
        if layer.kind == "parameter":
            home, _, name = layer.path.rpartition(".")
            put(small.get_submodule(home), name, gives, layer.dim)
            continue
        module: Any = small.get_submodule(layer.path)
        if layer.kind == "norm":
            for name in ("weight", "bias", "running_mean", "running_var"):
                put(module, name, gives, 0)
            if isinstance(module, nn.GroupNorm):
                module.num_groups = module.num_groups * len(gives) // module.num_channels
            module.num_features = module.num_channels = len(gives)
            module.normalized_shape = (len(gives),)
            continue
        groups, transposed = getattr(module, "groups", 1), getattr(module, "transposed", False)
        put(module, "weight", reads if transposed else gives, 0)
        if groups == 1:
            put(module, "weight", gives if transposed else reads, 1)
        else:
            module.groups = groups * len(reads) // module.in_channels
        put(module, "bias", gives, 0)
        module.in_channels = module.in_features = len(reads)
        module.out_channels = module.out_features = len(gives)
    return small


def put(module: Any, name: str, rows: Tensor, dim: int) -> None:
    old = getattr(module, name, None)
    if isinstance(old, Tensor):
        new = old.detach().index_select(dim, rows)
        setattr(module, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)


def silenced(model: nn.Module, plan: ChannelPlan, width: float, divisor: int = 8) -> nn.Module:
    """The whole network, in which nobody listens to a dropped channel."""
    full = copy.deepcopy(model)
    for layer in plan.layers:
        module = full.get_submodule(layer.path) if layer.kind in ("conv", "linear") else None
        if module is not None and getattr(module, "groups", 1) == 1:
            dim = 0 if getattr(module, "transposed", False) else 1
            deaf = torch.ones(module.weight.shape[dim])
            deaf[kept(plan, layer.reads, width, divisor)] = 0
            with torch.no_grad():
                module.weight.movedim(dim, 0)[deaf.bool()] = 0
    return full


def said(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(inputs)) if isinstance(leaf, Tensor)]


def check(model: nn.Module, inputs: Tensor, plan: ChannelPlan, width: float, divisor: int = 8) -> None:
    small = narrowed(model, plan, width, divisor)
    ours, theirs = said(small, inputs), said(silenced(model, plan, width, divisor), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@functools.cache
def caught(name: str) -> tuple[nn.Module, Tensor, ChannelPlan]:
    model, inputs = ANIMALS[name].model(), ANIMALS[name].inputs(2)
    for module in model.modules():  # so that a channel's norm is its own
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model, inputs, channels(trace(model, inputs))


@pytest.mark.parametrize("name", EXACT)
def test_a_library_network_runs_with_the_channels_of_its_plan(name: str) -> None:
    check(*caught(name), 0.25)
    check(*caught(name), 0.7)


@pytest.mark.parametrize("name", NORMED)
def test_norms_over_channels_run_with_fewer(name: str) -> None:
    model, inputs, plan = caught(name)
    assert [t.shape for t in said(narrowed(model, plan, 0.25), inputs)] == [t.shape for t in said(model, inputs)]


class Tangle(nn.Module):
    """Convolutions of every kind, added and concatenated at random."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        dice = random.Random(seed)
        self.layers, self.steps = nn.ModuleList(), []
        sizes = [3]

        def layer(module: nn.Module, out: int, *used: int) -> None:
            self.layers.append(module)
            self.steps.append((len(self.layers) - 1, used))
            sizes.append(out)

        for _ in range(14):
            i = dice.randrange(len(sizes))
            n, kind = sizes[i], dice.choice(["conv", "conv", "depthwise", "groups", "cat", "add", "add", "norm", "up"])
            m = dice.choice([4, 8, 12, 16])
            if kind == "groups" and n % 4 == 0:
                layer(nn.Conv2d(n, m, 1, groups=4), m, i)
            elif kind == "depthwise":
                layer(nn.Conv2d(n, 2 * n, 3, padding=1, groups=n), 2 * n, i)
            elif kind == "norm" and n % 2 == 0:
                layer(nn.GroupNorm(2, n), n, i)
            elif kind == "up":
                layer(nn.Sequential(nn.ConvTranspose2d(n, m, 3, padding=1), nn.PReLU(m)), m, i)
            elif kind == "cat" and n < 40:
                j = dice.randrange(len(sizes))
                layer(nn.Identity(), n + sizes[j], i, j)
            elif kind == "add" and len(alike := [j for j, size in enumerate(sizes) if size == n]) > 1:
                self.steps.append((None, (i, dice.choice(alike))))
                sizes.append(n)
            else:
                layer(nn.Sequential(nn.Conv2d(n, m, 3, padding=1), nn.BatchNorm2d(m), nn.ReLU()), m, i)
        self.shuffle, self.head = nn.PixelShuffle(2), nn.Conv2d(4, 5, 1)
        self.last = nn.Conv2d(sum(sizes[-4:]), 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for at, used in self.steps:
            parts = [seen[i] for i in used]
            if at is None:
                seen.append(parts[0] + parts[1])
            else:
                seen.append(self.layers[at](parts[0] if len(parts) == 1 else torch.cat(parts, 1)))
        return self.head(self.shuffle(self.last(torch.cat(seen[-4:], 1))))


@pytest.mark.parametrize("seed", range(12))
def test_a_tangle_of_convolutions_runs_at_every_width(seed: int) -> None:
    torch.manual_seed(seed)
    model, inputs = Tangle(seed).eval(), torch.randn(2, 3, 6, 6)
    plan = channels(trace(model, inputs))
    for width in (0.2, 0.5, 0.9):
        check(model, inputs, plan, width, divisor=1)


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x1_0", "smp:Unet"])
def test_a_channel_moves_the_inputs_that_the_plan_names_and_no_others(name: str) -> None:
    model, inputs, plan = caught(name)
    # Grouped convolutions hand each group on; all other layers say what they said, whatever they now hear.
    dense = {layer.path: layer for layer in plan.layers if layer.kind in ("conv", "linear")
             and getattr(model.get_submodule(layer.path), "groups", 1) == 1}
    heard: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    moved: dict[str, Any] = {}

    def listen(module: nn.Module, args: Any, out: Tensor, path: str) -> Tensor:
        if path not in outputs:
            heard[path], outputs[path] = args[0], out
        dims = [dim for dim in range(args[0].ndim) if dim != 1]
        moved[path] = (args[0] != heard[path]).any(dims[0]) if args[0].ndim == 2 else (
            args[0] != heard[path]).amax(dims)
        return outputs[path] + bump[path] if path in bump else outputs[path]

    bump: dict[str, Tensor] = {}
    hooks = [model.get_submodule(path).register_forward_hook(functools.partial(listen, path=path))
             for path in dense]
    try:
        said(model, inputs)
        free = [i for i, space in enumerate(plan.spaces) if not space.fixed]
        for space in free[:: max(1, len(free) // 8)]:
            element = plan.spaces[space].size - 1
            seen = {path: torch.zeros(heard[path].shape[1], dtype=torch.bool) for path in dense}
            for path, layer in dense.items():
                mine = places(plan, layer.gives, space, element)
                if mine.any():
                    bump[path] = 5.0 * mine.view(-1, *[1] * (outputs[path].ndim - 2))
                    said(model, inputs)
                    bump.clear()
                    for other in dense:
                        seen[other] |= moved[other]
            for path, layer in dense.items():
                assert torch.equal(seen[path], places(plan, layer.reads, space, element)), (space, path)
    finally:
        for hook in hooks:
            hook.remove()


def places(plan: ChannelPlan, axis: Axis, space: int, element: int) -> Tensor:
    """Where along an axis an element of a space lies."""
    return torch.cat([
        (torch.arange(plan.spaces[s.space].size) == element).repeat_interleave(s.unit) & (s.space == space)
        for s in axis
    ])


def test_the_helpers_notice_a_plan_that_is_wrong() -> None:
    model, inputs, plan = caught("smp:Unet")
    wrong = [Layer(one.path, one.kind, one.reads[::-1], one.gives) for one in plan.layers]
    with pytest.raises(AssertionError):
        check(model, inputs, ChannelPlan(plan.spaces, tuple(wrong)), 0.7)

"""A head that tells where classes meet, from low-level features, as wide as they are; it serves training alone.

Axes: N samples, C channels, H W space.
"""

import difflib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import WidthError
from offramp.graph.channels import Axis, ChannelPlan, Layer, Segment, Space
from offramp.nn.guest import evaluating
from offramp.nn.slim import Slimmable, install_

__all__ = ["boundary_head", "running_at", "tapped", "widths_of"]

LARGEST = 64
"""Channels between the head's two convolutions, at most."""


def widths_of(net: nn.Module) -> tuple[float, ...]:
    """The widths of a slimmable network from wide to narrow; of any other one 1.0 alone."""
    return tuple(sorted(net.widths, reverse=True)) if isinstance(net, Slimmable) else (1.0,)


@contextmanager
def running_at(width: float, *nets: nn.Module) -> Iterator[None]:
    """That width for calls of these networks inside; those that have no widths stay as they are."""
    with ExitStack() as stack:
        for net in nets:
            if isinstance(net, Slimmable):
                stack.enter_context(net.at(width=width))
        yield


@contextmanager
def tapped(net: nn.Module, name: str) -> Iterator[list[Any]]:
    """A list that gets what the named module of the guest gives, as often as it is called inside.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> with tapped(net, "0") as seen:
    ...     said = net(torch.zeros(3, 2, 2))
    >>> [tuple(tensor.shape) for tensor in seen], len(net[0]._forward_hooks)
    ([(3, 4)], 0)
    """
    guest = net.backbone if isinstance(net, Slimmable) else net
    modules = dict(guest.named_modules())
    if name not in modules or not name:
        near = difflib.get_close_matches(name, list(modules), 3, 0.4)
        raise WidthError(expected="the name of a module, whose output the boundary head reads", got=repr(name),
                         where="boundary", todo=f"did you mean {' or '.join(near)}?" if near else "")
    seen: list[Any] = []
    handle = modules[name].register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def boundary_head(net: nn.Module, name: str, *args: Any, **kwargs: Any) -> nn.Module:
    """Features (N, C, H, W) of the named module -> one logit a pixel (N, 1, H, W), at every width of ``net``.

    A slimmable unit, a 3x3 convolution with a norm for each width and a ReLU, then a 1x1 convolution: SlimSeg's
    boundary detection head (section 3.3), without its sigmoid. Between the two are as many channels as C, at most 64;
    the paper gives no number. The inputs show it the features. It shares nothing with ``net``, which stays as it is.

    WidthError where there is no such module, its output is no map, or its channels are those of no layer in it.
    """
    shapes: dict[float, tuple[int, ...]] = {}
    with evaluating(net), tapped(net, name) as seen:
        for width in widths_of(net):
            with running_at(width, net):
                net(*args, **kwargs)
            if not seen or not isinstance(seen[-1], Tensor) or seen[-1].ndim != 4:
                got = "no call of it" if not seen else getattr(seen[-1], "shape", type(seen[-1]).__name__)
                raise WidthError(expected=f"a map (N, C, H, W) from {name!r}", got=str(got), where="boundary",
                                 todo="name a module of the backbone's first stages")
            shapes[width] = tuple(seen[-1].shape)
    channels = shapes[1.0][1]
    between = min(channels, LARGEST)
    head = nn.Sequential(nn.Conv2d(channels, between, 3, padding=1, bias=False), nn.BatchNorm2d(between), nn.ReLU(),
                         nn.Conv2d(between, 1, 1))
    if not isinstance(net, Slimmable):
        return head
    read = _axis(net.plan, name, {width: shape[1] for width, shape in shapes.items()})
    first = len(net.plan.spaces)
    spaces = (*net.plan.spaces, Space(between, 1, False, "", ("0",)), Space(1, 1, True, "its one logit", ("3",)))
    middle, last = (Segment(first),), (Segment(first + 1),)
    plan = ChannelPlan(spaces, (Layer("0", "conv", read, middle), Layer("1", "norm", middle, middle),
                                Layer("3", "conv", middle, last)))
    made = Slimmable(head, plan, (torch.zeros(shapes[1.0]),))
    install_(made)
    for width in widths_of(net)[1:]:
        made.add_width_(width)
    return made


def _axis(plan: ChannelPlan, name: str, counts: dict[float, int]) -> Axis:
    """What lies along the channels of a module's output: what the last layer in it gives that has as many."""
    inside = [layer for layer in plan.layers
              if layer.kind != "parameter" and (layer.path == name or layer.path.startswith(f"{name}."))]
    for layer in reversed(inside):
        if all(plan.count(layer.gives, width) == count for width, count in counts.items()):
            return layer.gives
    raise WidthError(
        expected=f"a layer in {name!r} that gives {list(counts.values())} channels at the widths {list(counts)}",
        got=f"{[layer.path for layer in inside] or 'no layer'}", where="boundary",
        todo="name a layer, or a block that ends in a convolution or a norm; not what only concatenates or pools",
    )

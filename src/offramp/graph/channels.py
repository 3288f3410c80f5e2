"""Which channels of a network must be kept or dropped together, if it is to run with fewer of them.

The traced program is read once, op by op, with a rule for each (:mod:`offramp.graph._channel_rules`): a tensor carries
the dimension that holds its channels and what lies along it. Adding two tensors makes their channels the same ones;
concatenating puts them in a row; flattening makes runs of them. An op without a rule is refused by name wherever it
meets channels that would be narrowed. At every width the first elements of each space are kept, as in slimmable
networks (arXiv:1812.08928), whose rounding this is: to multiples of 8, never below 90 % of what was asked for.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from offramp.errors import CutError
from offramp.graph import _channel_parts, _channel_rules, _channel_views  # noqa: F401  they register their rules
from offramp.graph._axes import Axis, Segment
from offramp.graph._channel_walk import Carry, Layer, Walk
from offramp.graph._guest import as_found
from offramp.graph.trace import Traced

__all__ = ["Axis", "Carry", "ChannelPlan", "Layer", "Segment", "Space", "Walk", "channels", "planned"]

_WITH_CHANNELS = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class Space:
    """A set of channels that are kept or dropped together everywhere."""

    size: int
    """Elements."""
    channels: int
    """How many channels one element is where it is written: 1, or the width of a group."""
    fixed: bool
    why: str
    """What keeps it at full width; empty if nothing does."""
    layers: tuple[str, ...]
    """Paths of the convolutions and linear layers that write it."""


@dataclass(frozen=True)
class ChannelPlan:
    """What is narrowed together, and what each layer reads and gives of it; prints as a table."""

    spaces: tuple[Space, ...]
    layers: tuple[Layer, ...]

    def layer(self, path: str) -> Layer:
        """The layer at that path; KeyError if the network calls none there."""
        for layer in self.layers:
            if layer.path == path:
                return layer
        raise KeyError(path)

    def kept(self, space: int, width: float, divisor: int = 8) -> int:
        """How many elements a space keeps: its channels are rounded to the nearest multiple of ``divisor`` and of what
        an element holds, never to less than 90 % of ``width``, than one such multiple, or to more than there are.
        """
        one = self.spaces[space]
        if one.fixed or width >= 1:
            return one.size
        wanted, step = width * one.size * one.channels, math.lcm(divisor, one.channels)
        rounded = max(step, int(wanted + step / 2) // step * step)
        if rounded < 0.9 * wanted:
            rounded += step
        return min(one.size, rounded // one.channels)

    def count(self, axis: Axis, width: float, divisor: int = 8) -> int:
        """How many channels of an axis are left."""
        return sum(self.kept(segment.space, width, divisor) * segment.unit for segment in axis)

    def runs(self, axis: Axis, width: float, divisor: int = 8) -> tuple[tuple[int, int], ...]:
        """Which channels of an axis are left, as (start, stop) pairs in order; neighbours are one."""
        found: list[tuple[int, int]] = []
        start = 0
        for segment in axis:
            stop = start + self.kept(segment.space, width, divisor) * segment.unit
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], stop)
            else:
                found.append((start, stop))
            start += self.spaces[segment.space].size * segment.unit
        return tuple(found)

    def table(self, widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0), divisor: int = 8) -> str:
        """A line for each space: its channels, those left at each width, who writes it; then what is fixed, and why."""
        rows = [("space", "channels", *(f"{width:g}" for width in widths), "written by")]
        for i, one in enumerate(self.spaces):
            if not one.fixed:
                counts = [str(self.kept(i, width, divisor) * one.channels) for width in widths]
                whole = f"{one.size} x {one.channels}" if one.channels > 1 else str(one.size)
                rows.append((str(i), whole, *counts, _short(one.layers)))
        sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = ["  ".join([*(cell.rjust(size) for cell, size in zip(row, sizes, strict=False)), row[-1]])
                 for row in rows]
        fixed: dict[str, list[str]] = {}
        for one in self.spaces:
            if one.fixed and one.layers:
                fixed.setdefault(one.why, []).extend(path for path in one.layers if path not in fixed.get(one.why, ()))
        return "\n".join(lines + [f"fixed: {_short(paths)} ({why})" for why, paths in fixed.items()])

    def __str__(self) -> str:
        return self.table()


def channels(traced: Traced, *, where: Callable[[str, nn.Module], bool] | None = None) -> ChannelPlan:
    """Which channels of a traced network go together, without touching the network.

    where: says of a path and a module whether its channels may be narrowed; False keeps what that layer gives. The
    network's inputs and outputs are always kept. Where layers are called only in training, as auxiliary heads are, the
    training graph is read too, if the example can be trained on. WidthError where channels that would be narrowed meet
    an op for which there is no rule; it names op, file and line.

    >>> import torch
    >>> from offramp.graph.trace import trace
    >>> net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 5, 1))
    >>> print(channels(trace(net, torch.zeros(1, 3, 8, 8))))
    space  channels  0.25  0.5  0.75   1  written by
        1        24     8   16    24  24  0
    fixed: 2 (the network's output)
    """
    walk = Walk(where)
    walk.feed(traced.program, traced.model)
    if any(isinstance(module, _WITH_CHANNELS) and path not in walk for path, module in traced.model.named_modules()):
        with as_found(traced.model, mode=True), torch.no_grad(), suppress(CutError):
            walk.feed(traced.program_for(*traced.example()), traced.model)
    return planned(walk)


def planned(walk: Walk) -> ChannelPlan:
    """The plan of all programs that a walk has been through."""
    layers, numbers = walk.settled()
    writers: dict[int, list[str]] = {}
    units: dict[int, list[int]] = {}
    for layer in layers:
        many: dict[int, int] = {}
        for segment in layer.gives:
            many[segment.space] = many.get(segment.space, 0) + segment.unit
        for space, unit in many.items():
            if layer.kind in ("conv", "linear"):
                writers.setdefault(space, []).append(layer.path)
                units.setdefault(space, []).append(unit)
    spaces = tuple(
        Space(size=walk.axes.size(old), channels=min(units.get(new, [1])), fixed=bool(walk.axes.why(old)),
              why=walk.axes.why(old), layers=tuple(writers.get(new, ())))
        for old, new in numbers.items()
    )
    return ChannelPlan(spaces, layers)


def _short(paths: Sequence[str], most: int = 4) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")

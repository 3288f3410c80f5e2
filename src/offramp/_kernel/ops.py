"""What a masked part of a network does, as a list of operations on maps: the language between a network and a runner.

A *map* is one activation of one image, H x W places of C channels. Maps of one size share a *level*. At each level the
mask of a call, brought there by nearest, says which places are *active*. Convolutions work at active places alone, and
their output elsewhere, where somebody reads it, is interpolated from active ones, before norm and activation (ADP-C,
arXiv:2104.00749, 3.4). Where that is, a *region* says: the places at which a map must stand, the active ones and those
that the operations after it read. Other places of a map hold anything.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = [
    "Conv", "Level", "Map", "Op", "Pool", "Program", "Read", "Region", "Resize", "Segment", "Sum", "Term", "View",
    "Window",
]


@dataclass(frozen=True)
class Level:
    height: int
    width: int


@dataclass(frozen=True)
class Window:
    """Output place (y, x) reads rows y * stride - padding + dilation * i, i < kernel, and columns alike."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Resize:
    """As ``torch.nn.functional.interpolate`` does to a given size."""

    mode: Literal["bilinear", "nearest"]
    align_corners: bool = False


@dataclass(frozen=True)
class Read:
    """Some operation reads a map of this region: at the places of its own output, through a window or a resize."""

    level: int
    """Of the operation's output."""
    region: int | None
    """Where that output must stand; None: at the active places of its level alone."""
    how: Window | Resize


@dataclass(frozen=True)
class Region:
    """The active places of a level, and all that ``reads`` reaches from the places that they name."""

    level: int
    reads: tuple[Read, ...]


@dataclass(frozen=True)
class Map:
    """One activation. Its buffer may be another's, which is no longer read by then: see :class:`Program`."""

    level: int
    region: int
    channels: int


@dataclass(frozen=True)
class View:
    """Channels ``first`` to ``first + count`` of a map; a concatenation is written view by view."""

    map: int
    first: int
    count: int


@dataclass(frozen=True, eq=False)
class Conv:
    """out = act(scale * I(conv(source)) + shift + residual).

    I keeps what is convolved at active places, and elsewhere in the region of ``out`` is the mean of the active places
    of the 7x7 window, weighted by exp(-lam^2 distance^2); where that window has none, scale * 0 + ``bare`` stands for
    scale * I + shift: the norm of nothing, without the convolution's bias, which ``shift`` holds.
    """

    source: View
    out: View
    weight: Tensor
    """(C_out, C_in / groups, k_h, k_w)."""
    window: Window
    groups: int
    scale: Tensor
    shift: Tensor
    bare: Tensor
    """(C_out,) each."""
    lam: float
    residual: View | None = None
    relu: bool = False


@dataclass(frozen=True)
class Term:
    source: View
    resize: Resize | None = None
    """None where it has the output's level."""


@dataclass(frozen=True, eq=False)
class Sum:
    """out = act(scale * (the sum of the terms) + shift), at all places of the region of ``out``; one term: a copy."""

    terms: tuple[Term, ...]
    out: View
    scale: Tensor | None = None
    shift: Tensor | None = None
    relu: bool = False


@dataclass(frozen=True, eq=False)
class Pool:
    """A mean over windows, or their largest value, at all places of the region of ``out``."""

    source: View
    out: View
    window: Window
    kind: Literal["mean", "max"]
    counts_padding: bool = True
    """Whether a mean divides by the size of its window also where that leaves the map."""


Op = Conv | Sum | Pool


@dataclass(frozen=True, eq=False)
class Segment:
    """Operations in their order, which run under one mask; reading is of maps that stand already."""

    name: str
    ops: tuple[Op, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """All that runs after the first exit, for inputs of one size.

    Regions come in an order in which each names only earlier ones. ``kept`` are the maps that somebody outside writes
    or reads, whose buffers are their own; a runner may give other maps, whose lives do not meet, the same memory.
    Each mask holds for one segment; masks are nested, so that what a map holds is enough for all segments after it.
    """

    levels: tuple[Level, ...]
    regions: tuple[Region, ...]
    maps: tuple[Map, ...]
    segments: tuple[Segment, ...]
    kept: frozenset[int]

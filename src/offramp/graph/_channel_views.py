"""Rules for ops that move, merge, cut or sum up dimensions.

Numbers in the caller's code stay what they are when a network is narrowed; those read off a tensor follow. So a view of
``(b, c // 2, 2, h, w)`` splits the channels as long as ``c`` was read off a shape; ``(b, 32, 2, h, w)`` is refused.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from offramp.graph._axes import scaled
from offramp.graph._channel_rules import argument, merged, numbers_of, rank, source, value_of
from offramp.graph._channel_walk import Carry, Walk, key_of, rule

__all__: list[str] = []

_FOLLOWS = -1


# -- views


def _reshaped(walk: Walk, node: fx.Node, spec: Sequence[Any]) -> Carry | None:
    """A view of the same memory; ``spec`` has a number for each dimension of the result, -1 for one that follows."""
    x = source(node)
    carry = walk.carry(x)
    if carry is None:
        return None
    before, after = walk.shape(x), walk.shape(node)
    low = math.prod(before[carry.dim + 1:])
    high = low * before[carry.dim]
    # Dimensions of the result that hold some of the channels, from the outermost: which, how many, and times what.
    held: list[tuple[int, int, int, int]] = []
    for dim, size in enumerate(after):
        inner = math.prod(after[dim + 1:])
        first, last = max(inner, low), min(inner * size, high)
        if first < last:
            if last % first or (inner * size) % last or first % inner:
                walk.doubt(node, carry, "cuts channels into unequal parts")
                return None
            held.append((dim, last // first, inner * size // last, first // inner))
        elif walk.moves(spec[dim]):
            walk.doubt(node, carry, "sizes another dimension by the number of channels")
            return None
    free = [i for i, (dim, *_) in enumerate(held) if spec[dim] == _FOLLOWS or walk.moves(spec[dim])]
    if len(free) != 1:
        walk.doubt(node, carry, "has the number of channels written into it")
        return None
    at = free[0]
    dim, _, times, unit = held[at]
    part = walk.axes.parts(carry.axis, math.prod(h[1] for h in held[:at]), math.prod(h[1] for h in held[at + 1:]))
    return Carry(dim, scaled(part, unit) * times)


@rule("view", "reshape")
def _view(walk: Walk, node: fx.Node) -> Carry | None:
    sizes = numbers_of(walk, node, 1, "size", "shape")
    if len(sizes) == 1 and isinstance(sizes[0], torch.dtype):
        return walk.carry(source(node))
    return _reshaped(walk, node, sizes)


@rule("flatten", "squeeze", "unsqueeze")
def _flatten(walk: Walk, node: fx.Node) -> Carry | None:
    return _reshaped(walk, node, [_FOLLOWS] * rank(walk, node))


@rule("unflatten")
def _unflatten(walk: Walk, node: fx.Node) -> Carry | None:
    dim = argument(walk, node, 1, "dim") % rank(walk, source(node))
    sizes = list(argument(walk, node, 2, "unflattened_size" if node.op == "call_module" else "sizes"))
    rest = [_FOLLOWS] * (rank(walk, source(node)) - dim - 1)
    return _reshaped(walk, node, [_FOLLOWS] * dim + sizes + rest)


@rule("viewas", "reshapeas")
def _view_as(walk: Walk, node: fx.Node) -> Carry | None:
    made = _reshaped(walk, node, [_FOLLOWS] * rank(walk, node))
    like = walk.carry(node.args[1])
    if made is not None and like is not None and like.dim == made.dim:
        walk.axes.unify(made.axis, like.axis)
    elif made is not None or like is not None:
        walk.doubt(node, made or like, "takes the shape of a tensor with other channels")
        return None
    return made


@rule("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t")
def _permuted(walk: Walk, node: fx.Node) -> Carry | None:
    return _moved(walk, node, lambda x: getattr(torch, key_of(walk, node))(x, *node.args[1:], **node.kwargs)
                  if key_of(walk, node) != "permute" else x.permute(*numbers_of(walk, node, 1, "dims")))


def _moved(walk: Walk, node: fx.Node, move: Any) -> Carry | None:
    """A permutation, tried on a tensor whose dimensions all differ."""
    carry = walk.carry(source(node))
    if carry is None:
        return None
    probe = torch.empty(tuple(range(2, 2 + rank(walk, source(node)))), device="meta")
    return Carry(list(move(probe).shape).index(carry.dim + 2), carry.axis)


@rule("getattr")
def _attribute(walk: Walk, node: fx.Node) -> Carry | None:
    name = str(node.args[1])
    if name in ("T", "mT", "H", "mH"):
        return _moved(walk, node, lambda x: getattr(x, name))
    if name in ("data", "real"):
        return walk.carry(source(node))
    for used in node.all_input_nodes:
        walk.doubt(node, walk.carry(used), f"reads {name}")
    return None


@rule("expand", "expandas", "broadcastto")
def _expand(walk: Walk, node: fx.Node) -> Carry | None:
    x = source(node)
    if key_of(walk, node) == "expandas":
        return merged(walk, node, [x, cast(fx.Node, node.args[1])])
    carry, more, sizes = walk.carry(x), rank(walk, node) - rank(walk, x), numbers_of(walk, node, 1, "size")
    if carry is None:
        return _made(walk, node)
    at = carry.dim + more
    if sizes[at] != _FOLLOWS and not walk.moves(sizes[at]):
        walk.doubt(node, carry, "has the number of channels written into it")
        return None
    return Carry(at, carry.axis)


@rule("zeros", "ones", "empty", "full", "rand", "randn", "newzeros", "newones", "newempty", "newfull")
def _made(walk: Walk, node: fx.Node) -> Carry | None:
    """A new tensor, sized by numbers of which some were read off others."""
    fresh = key_of(walk, node) in ("zeros", "ones", "empty", "full", "rand", "randn")
    sizes = numbers_of(walk, node, 0 if fresh else 1, "size", "repeats", "dims")
    sizes = list(sizes[0]) if sizes and isinstance(sizes[0], Sequence) else sizes
    wide = [(dim, size) for dim, size in enumerate(sizes) if walk.moves(size)]
    if len(wide) == 1 and (axis := walk.size(wide[0][1])) is not None:
        return Carry(wide[0][0], axis)
    for _, size in wide:
        walk.doubt(node, walk.follows[size][0], "makes a tensor of a size that was computed from channels")
    return None


@rule("repeat", "tile")
def _repeat(walk: Walk, node: fx.Node) -> Carry | None:
    x = source(node)
    carry, times = walk.carry(x), numbers_of(walk, node, 1, "repeats", "dims")
    if carry is None:
        return _made(walk, node)
    at = carry.dim + len(times) - rank(walk, x)
    if walk.moves(times[at]) or len(times) < rank(walk, x):
        walk.doubt(node, carry, "repeats channels as often as there are some")
        return None
    return Carry(at, carry.axis * value_of(times[at]))


@rule("pixelshuffle", "pixelunshuffle")
def _pixel_shuffle(walk: Walk, node: fx.Node) -> Carry | None:
    carry, shuffle = walk.carry(source(node)), key_of(walk, node) == "pixelshuffle"
    side = argument(walk, node, 1, "upscale_factor" if shuffle else "downscale_factor")
    if carry is None:
        return None
    if shuffle:
        return Carry(carry.dim, walk.axes.parts(carry.axis, 1, side * side))
    return Carry(carry.dim, scaled(carry.axis, side * side))


@rule("channelshuffle")
def _channel_shuffle(walk: Walk, node: fx.Node) -> Carry | None:
    carry, groups = walk.carry(source(node)), argument(walk, node, 1, "groups")
    return Carry(carry.dim, scaled(walk.axes.parts(carry.axis, groups), groups)) if carry else None


# -- sums and other things along dimensions


def _dims(walk: Walk, node: fx.Node, place: int) -> list[int] | None:
    given = argument(walk, node, place, "dim", argument(walk, node, place, "axis"))
    if given is None:
        return None
    count = rank(walk, source(node))
    return [dim % count for dim in (given if isinstance(given, Sequence) else [given])]


@rule("mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin", "std", "var", "prod", "all", "any", "median",
      "logsumexp", "countnonzero", "nansum", "nanmean", "norm", "vectornorm", "linalgvectornorm", "stdmean", "varmean")
def _reduced(walk: Walk, node: fx.Node) -> Carry | None:
    """Over the channels: nothing of them is left. Over other dimensions: they stay."""
    x, name = source(node), key_of(walk, node)
    other = argument(walk, node, 1, "other")
    if name in ("max", "min") and isinstance(other, fx.Node) and "value" not in other.meta:
        return merged(walk, node, [x, other])
    carry, dims = walk.carry(x), _dims(walk, node, 2 if "norm" in name else 1)
    if carry is None or dims is None or not dims or carry.dim in dims:
        return None
    keep = argument(walk, node, 3 if "norm" in name else 2, "keepdim", False)
    if name in ("std", "var", "stdmean", "varmean"):
        keep = node.kwargs.get("keepdim", len(node.args) > 3 and node.args[3])
    return carry if keep else Carry(carry.dim - sum(dim < carry.dim for dim in dims), carry.axis)


@rule("softmax", "logsoftmax", "softmin", "cumsum", "cumprod", "flip", "roll", "sort", "argsort")
def _along(walk: Walk, node: fx.Node) -> Carry | None:
    """Places along one dimension see each other; channels must not."""
    carry, name = walk.carry(source(node)), key_of(walk, node)
    if name in ("flip", "roll"):
        count = rank(walk, source(node))
        dims: list[int] | None = [dim % count for dim in numbers_of(walk, node, 1 + (name == "roll"), "dims")]
    else:
        dims = _dims(walk, node, 1)
    if carry is not None and (not dims or carry.dim in dims):
        walk.doubt(node, carry, "mixes the channels among each other")
        return None
    return carry


@rule("normalize")
def _normalize(walk: Walk, node: fx.Node) -> Carry | None:
    return walk.carry(source(node))


@rule("glu")
def _glu(walk: Walk, node: fx.Node) -> Carry | None:
    carry, dim = walk.carry(source(node)), argument(walk, node, 1, "dim", -1)
    if carry is None or carry.dim != dim % rank(walk, source(node)):
        return carry
    return Carry(carry.dim, walk.axes.parts(carry.axis, 2))


@rule("pad")
def _pad(walk: Walk, node: fx.Node) -> Carry | None:
    x = source(node)
    carry, by = walk.carry(x), [value_of(size) for size in argument(walk, node, 1, "pad")]
    if carry is None:
        return None
    at = 2 * (rank(walk, x) - 1 - carry.dim)
    sides = by[at:at + 2] if at < len(by) else [0, 0]
    if min(sides) < 0 or (any(sides) and argument(walk, node, 2, "mode", "constant") != "constant"):
        walk.doubt(node, carry, "pads channels with each other")
        return None
    left, right = (walk.axes.new(size, "padded channels") if size else () for size in sides)
    return Carry(carry.dim, left + carry.axis + right)

"""Rules for ops that move, join, split or sum up dimensions.

Numbers in the caller's code stay what they are when a network is narrowed; those read off a tensor follow. So a view of
``(b, c // 2, 2, h, w)`` splits the channels as long as ``c`` was read off a shape, and a slice ``x[:, :32]`` cannot.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from offramp.graph._axes import Axis, scaled
from offramp.graph._channel_rules import argument, merged, rank, source
from offramp.graph._channel_walk import Carry, Walk, key_of, rule

_FOLLOWS = -1


def _value(number: Any) -> Any:
    return number.meta["value"] if isinstance(number, fx.Node) else number


def _numbers(walk: Walk, node: fx.Node, place: int, *names: str) -> list[Any]:
    """Sizes or dimensions that may be given one by one, or as one list."""
    for name in names:
        if name in node.kwargs:
            given = node.kwargs[name]
            return list(given) if isinstance(given, Sequence) else [given]
    rest = node.args[place:]
    if len(rest) == 1 and isinstance(rest[0], Sequence):
        return list(rest[0])
    return list(rest)


# -- views


def _reshaped(walk: Walk, node: fx.Node, spec: Sequence[Any]) -> Any:
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
def _view(walk: Walk, node: fx.Node) -> Any:
    sizes = _numbers(walk, node, 1, "size", "shape")
    if len(sizes) == 1 and isinstance(sizes[0], torch.dtype):
        return walk.carry(source(node))
    return _reshaped(walk, node, sizes)


@rule("flatten", "squeeze", "unsqueeze")
def _flatten(walk: Walk, node: fx.Node) -> Any:
    return _reshaped(walk, node, [_FOLLOWS] * rank(walk, node))


@rule("unflatten")
def _unflatten(walk: Walk, node: fx.Node) -> Any:
    dim = argument(walk, node, 1, "dim") % rank(walk, source(node))
    sizes = list(argument(walk, node, 2, "unflattened_size" if node.op == "call_module" else "sizes"))
    rest = [_FOLLOWS] * (rank(walk, source(node)) - dim - 1)
    return _reshaped(walk, node, [_FOLLOWS] * dim + sizes + rest)


@rule("viewas", "reshapeas")
def _view_as(walk: Walk, node: fx.Node) -> Any:
    made = _reshaped(walk, node, [_FOLLOWS] * rank(walk, node))
    like = walk.carry(node.args[1])
    if made is not None and like is not None and like.dim == made.dim:
        walk.axes.unify(made.axis, like.axis)
    elif made is not None or like is not None:
        walk.doubt(node, made or like, "takes the shape of a tensor with other channels")
        return None
    return made


@rule("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t")
def _permuted(walk: Walk, node: fx.Node) -> Any:
    return _moved(walk, node, lambda x: getattr(torch, key_of(walk, node))(x, *node.args[1:], **node.kwargs)
                  if key_of(walk, node) != "permute" else x.permute(*_numbers(walk, node, 1, "dims")))


def _moved(walk: Walk, node: fx.Node, move: Any) -> Any:
    """A permutation, tried on a tensor whose dimensions all differ."""
    carry = walk.carry(source(node))
    if carry is None:
        return None
    probe = torch.empty(tuple(range(2, 2 + rank(walk, source(node)))), device="meta")
    return Carry(list(move(probe).shape).index(carry.dim + 2), carry.axis)


@rule("getattr")
def _attribute(walk: Walk, node: fx.Node) -> Any:
    name = str(node.args[1])
    if name in ("T", "mT", "H", "mH"):
        return _moved(walk, node, lambda x: getattr(x, name))
    if name in ("data", "real"):
        return walk.carry(source(node))
    for used in node.all_input_nodes:
        walk.doubt(node, walk.carry(used), f"reads {name}")
    return None


@rule("expand", "expandas", "broadcastto")
def _expand(walk: Walk, node: fx.Node) -> Any:
    x = source(node)
    if key_of(walk, node) == "expandas":
        return merged(walk, node, [x, cast(fx.Node, node.args[1])])
    carry, more = walk.carry(x), rank(walk, node) - rank(walk, x)
    sizes = _numbers(walk, node, 1, "size")
    if carry is None:
        wide = [(dim, axis) for dim, size in enumerate(sizes) if (axis := walk.size(size)) is not None]
        return Carry(*wide[0]) if len(wide) == 1 else None
    at = carry.dim + more
    if sizes[at] != _FOLLOWS and not walk.moves(sizes[at]):
        walk.doubt(node, carry, "has the number of channels written into it")
        return None
    return Carry(at, carry.axis)


@rule("repeat", "tile")
def _repeat(walk: Walk, node: fx.Node) -> Any:
    x = source(node)
    carry, times = walk.carry(x), _numbers(walk, node, 1, "repeats", "dims")
    if carry is None:
        return None
    at = carry.dim + len(times) - rank(walk, x)
    if walk.moves(times[at]) or len(times) < rank(walk, x):
        walk.doubt(node, carry, "repeats channels as often as there are some")
        return None
    return Carry(at, carry.axis * _value(times[at]))


@rule("pixelshuffle", "pixelunshuffle")
def _pixel_shuffle(walk: Walk, node: fx.Node) -> Any:
    carry, shuffle = walk.carry(source(node)), key_of(walk, node) == "pixelshuffle"
    side = argument(walk, node, 1, "upscale_factor" if shuffle else "downscale_factor")
    if carry is None:
        return None
    if shuffle:
        return Carry(carry.dim, walk.axes.parts(carry.axis, 1, side * side))
    return Carry(carry.dim, scaled(carry.axis, side * side))


@rule("channelshuffle")
def _channel_shuffle(walk: Walk, node: fx.Node) -> Any:
    carry, groups = walk.carry(source(node)), argument(walk, node, 1, "groups")
    return carry and Carry(carry.dim, scaled(walk.axes.parts(carry.axis, groups), groups))


# -- rows of tensors


@rule("cat", "concat", "concatenate")
def _cat(walk: Walk, node: fx.Node) -> Any:
    tensors = [t for t in argument(walk, node, 0, "tensors") if walk.shape(t) != (0,)]
    dim = argument(walk, node, 1, "dim", 0) % rank(walk, tensors[0])
    carries = [carry for t in tensors if (carry := walk.carry(t)) is not None]
    if not any(carry.dim == dim for carry in carries):
        return merged(walk, node, tensors)
    if any(carry.dim != dim for carry in carries):
        for carry in carries:
            walk.doubt(node, carry, "puts channels in a row with something else")
        return None
    axis: Axis = ()
    for t in tensors:
        mine = walk.carry(t)
        axis += mine.axis if mine else walk.axes.new(walk.shape(t)[dim], walk.reason(t))
    return Carry(dim, axis)


@rule("stack")
def _stack(walk: Walk, node: fx.Node) -> Any:
    dim = argument(walk, node, 1, "dim", 0) % rank(walk, node)
    carry = merged(walk, node, list(argument(walk, node, 0, "tensors")))
    return carry and Carry(carry.dim + (dim <= carry.dim), carry.axis)


@rule("chunk", "tensorsplit", "split", "splitwithsizes")
def _split(walk: Walk, node: fx.Node) -> Any:
    x, kind = source(node), key_of(walk, node)
    carry, shape = walk.carry(x), walk.shape(x)
    name = {"chunk": "chunks", "tensorsplit": "indices_or_sections", "split": "split_size_or_sections"}
    given = argument(walk, node, 1, name.get(kind, "split_sizes"))
    given = argument(walk, node, 1, "split_size", given) if given is None else given
    dim = argument(walk, node, 2, "dim", 0) % len(shape)
    if carry is None or carry.dim != dim:
        return carry  # of every part
    whole, many = shape[dim], 0
    if kind in ("chunk", "tensorsplit"):
        many = _value(given) if not isinstance(given, Sequence) and not walk.moves(given) else 0
    elif isinstance(given, Sequence):
        same = all(walk.moves(size) for size in given) and len({_value(size) for size in given}) == 1
        many = len(given) if same else 0
    elif walk.moves(given):
        many = whole // _value(given) if whole % _value(given) == 0 else 0
    elif given >= whole:
        many = 1
    if not many or whole % many:
        walk.doubt(node, carry, "splits channels at places that are written into it, or into unequal parts")
        return None
    return Carry(dim, walk.axes.parts(carry.axis, many))


@rule("unbind")
def _unbind(walk: Walk, node: fx.Node) -> Any:
    return _dropped(walk, node, argument(walk, node, 1, "dim", 0), "takes single channels")


@rule("select")
def _select(walk: Walk, node: fx.Node) -> Any:
    return _dropped(walk, node, argument(walk, node, 1, "dim"), "takes single channels")


def _dropped(walk: Walk, node: fx.Node, dim: int, what: str) -> Any:
    x = source(node)
    carry, dim = walk.carry(x), dim % rank(walk, x)
    if carry is None or carry.dim == dim:
        walk.doubt(node, carry, what)
        return None
    return Carry(carry.dim - (dim < carry.dim), carry.axis)


@rule("narrow")
def _narrow(walk: Walk, node: fx.Node) -> Any:
    x = source(node)
    carry, dim, start, length = walk.carry(x), *(argument(walk, node, i, name) for i, name in enumerate(
        ("dim", "start", "length"), 1))
    if carry is None or carry.dim != dim % rank(walk, x):
        return carry
    axis = _piece(walk, node, carry, start, length, _value(start) + _value(length))
    return axis and Carry(carry.dim, axis)


def _piece(walk: Walk, node: fx.Node, carry: Carry, start: Any, stop: Any, end: int) -> Axis | None:
    """Channels from ``start`` to ``end``; all of them, or one of several equal parts; ``stop`` is where end is from."""
    whole, first = walk.axes.length(carry.axis), _value(start) or 0
    first, end = first % whole if first < 0 else first, end % whole if end < 0 else min(end, whole)
    if first == 0 and end == whole:
        return carry.axis
    part = end - first
    told = all(bound in (None, 0) or walk.moves(bound) for bound in (start, stop))
    if not told or part <= 0 or whole % part or first % part:
        walk.doubt(node, carry, "takes channels between places that are written into it")
        return None
    return walk.axes.parts(carry.axis, whole // part)


@rule("getitem")
def _getitem(walk: Walk, node: fx.Node) -> Any:
    x, given = cast(fx.Node, node.args[0]), node.args[1]
    if "shape" not in x.meta and x.op != "get_attr":  # a tuple of tensors
        found = walk.carried.get(x)
        return found[cast(int, given)] if isinstance(found, list) else found
    carry = walk.carry(x)
    index: list[Any] = list(given) if isinstance(given, tuple) else [given]
    if carry is None or any(isinstance(item, list | bool) for item in index):
        walk.doubt(node, carry, "indexes by lists")
        return None
    real = [item for item in index if item is not None and item is not Ellipsis]
    if Ellipsis in [item for item in index if not isinstance(item, fx.Node)]:
        at = next(i for i, item in enumerate(index) if item is Ellipsis)
        index[at:at + 1] = [slice(None)] * (rank(walk, x) - len(real))
    index += [slice(None)] * (rank(walk, x) - len([item for item in index if item is not None]))
    dim = out = 0
    for item in index:
        if item is None:
            out += 1
            continue
        tensor = isinstance(item, fx.Node) and "value" not in item.meta
        if tensor and (len(walk.shape(item)) != 1 or "bool" in str(item.meta.get("dtype"))):
            walk.doubt(node, carry, "indexes by a tensor")
            return None
        if dim == carry.dim:
            if not isinstance(item, slice) or _value(item.step) not in (None, 1):
                walk.doubt(node, carry, "takes single channels")
                return None
            stop = walk.axes.length(carry.axis) if item.stop is None else _value(item.stop)
            axis = _piece(walk, node, carry, item.start, item.stop, stop)
            return axis and Carry(out, axis)
        dim, out = dim + 1, out + (tensor or isinstance(item, slice))
    raise AssertionError("an index for every dimension")


@rule("setitem")
def _setitem(walk: Walk, node: fx.Node) -> Any:
    for used in node.all_input_nodes:
        walk.doubt(node, walk.carry(used), "writes into a part of a tensor")
    return None


# -- sums and other things along dimensions


def _dims(walk: Walk, node: fx.Node, place: int) -> list[int] | None:
    given = argument(walk, node, place, "dim", argument(walk, node, place, "axis"))
    if given is None:
        return None
    count = rank(walk, source(node))
    return [dim % count for dim in (given if isinstance(given, Sequence) else [given])]


@rule("mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin", "std", "var", "prod", "all", "any", "median",
      "logsumexp", "countnonzero", "nansum", "nanmean", "norm", "vectornorm", "linalgvectornorm", "stdmean", "varmean")
def _reduced(walk: Walk, node: fx.Node) -> Any:
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
def _along(walk: Walk, node: fx.Node) -> Any:
    """Places along one dimension see each other; channels must not."""
    carry = walk.carry(source(node))
    dims = _dims(walk, node, 2 if key_of(walk, node) == "roll" else 1)
    if carry is not None and (dims is None or carry.dim in dims):
        walk.doubt(node, carry, "mixes the channels among each other")
        return None
    return carry


@rule("normalize")
def _normalize(walk: Walk, node: fx.Node) -> Any:
    return walk.carry(source(node))


@rule("glu")
def _glu(walk: Walk, node: fx.Node) -> Any:
    carry, dim = walk.carry(source(node)), argument(walk, node, 1, "dim", -1)
    if carry is None or carry.dim != dim % rank(walk, source(node)):
        return carry
    return Carry(carry.dim, walk.axes.parts(carry.axis, 2))


@rule("pad")
def _pad(walk: Walk, node: fx.Node) -> Any:
    x = source(node)
    carry, by = walk.carry(x), [_value(size) for size in argument(walk, node, 1, "pad")]
    if carry is None:
        return None
    at = 2 * (rank(walk, x) - 1 - carry.dim)
    sides = by[at:at + 2] if at < len(by) else [0, 0]
    if min(sides) < 0 or (any(sides) and argument(walk, node, 2, "mode", "constant") != "constant"):
        walk.doubt(node, carry, "pads channels with each other")
        return None
    left, right = (walk.axes.new(size, "padded channels") if size else () for size in sides)
    return Carry(carry.dim, left + carry.axis + right)

"""Rules for ops that put tensors in a row, and for those that take parts of one.

Equal parts keep equally many channels. A border that is written into the network's code cannot move when channels go,
unless it lies at the very end: such splits and slices are refused.
"""

from collections.abc import Sequence
from typing import Any, cast

from torch import fx

from offramp.graph._axes import Axis
from offramp.graph._channel_rules import argument, merged, rank, source, value_of
from offramp.graph._channel_walk import Carry, Walk, key_of, rule

__all__: list[str] = []


@rule("cat", "concat", "concatenate")
def _cat(walk: Walk, node: fx.Node) -> Carry | None:
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
def _stack(walk: Walk, node: fx.Node) -> Carry | None:
    dim = argument(walk, node, 1, "dim", 0) % rank(walk, node)
    carry = merged(walk, node, list(argument(walk, node, 0, "tensors")))
    return Carry(carry.dim + (dim <= carry.dim), carry.axis) if carry else None


@rule("chunk", "tensorsplit", "split", "splitwithsizes")
def _split(walk: Walk, node: fx.Node) -> Carry | None:
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
        many = value_of(given) if not isinstance(given, Sequence) and not walk.moves(given) else 0
    elif isinstance(given, Sequence):
        same = all(walk.moves(size) for size in given) and len({value_of(size) for size in given}) == 1
        many = len(given) if same else 0
    elif walk.moves(given):
        many = whole // value_of(given) if whole % value_of(given) == 0 else 0
    elif given >= whole:
        many = 1
    if not many or whole % many:
        walk.doubt(node, carry, "splits channels at places that are written into it, or into unequal parts")
        return None
    return Carry(dim, walk.axes.parts(carry.axis, many))


@rule("unbind")
def _unbind(walk: Walk, node: fx.Node) -> Carry | None:
    return _dropped(walk, node, argument(walk, node, 1, "dim", 0), "takes single channels")


@rule("select")
def _select(walk: Walk, node: fx.Node) -> Carry | None:
    return _dropped(walk, node, argument(walk, node, 1, "dim"), "takes single channels")


def _dropped(walk: Walk, node: fx.Node, dim: int, what: str) -> Carry | None:
    x = source(node)
    carry, dim = walk.carry(x), dim % rank(walk, x)
    if carry is None or carry.dim == dim:
        walk.doubt(node, carry, what)
        return None
    return Carry(carry.dim - (dim < carry.dim), carry.axis)


@rule("narrow")
def _narrow(walk: Walk, node: fx.Node) -> Carry | None:
    x = source(node)
    carry, dim, start, length = walk.carry(x), *(argument(walk, node, i, name) for i, name in enumerate(
        ("dim", "start", "length"), 1))
    if carry is None or carry.dim != dim % rank(walk, x):
        return carry
    axis = _piece(walk, node, carry, start, length, value_of(start) + value_of(length))
    return Carry(carry.dim, axis) if axis else None


def _piece(walk: Walk, node: fx.Node, carry: Carry, start: Any, stop: Any, end: int) -> Axis | None:
    """Channels from ``start`` to ``end``; all of them, or one of several equal parts; ``stop`` is where end is from."""
    whole, first = walk.axes.length(carry.axis), value_of(start) or 0
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
def _getitem(walk: Walk, node: fx.Node) -> Carry | None:
    x, given = cast(fx.Node, node.args[0]), node.args[1]
    if "shape" not in x.meta and x.op != "get_attr":  # a tuple of tensors
        return walk.carry(x)
    carry = walk.carry(x)
    index: list[Any] = list(given) if isinstance(given, tuple) else [given]
    if carry is None or any(isinstance(item, list | bool) for item in index):
        walk.doubt(node, carry, "indexes by lists")
        return None
    real = [item for item in index if item is not None and item is not Ellipsis]
    if Ellipsis in [item for item in index if not isinstance(item, fx.Node)]:
        at = next(i for i, item in enumerate(index) if item is Ellipsis)
        index[at:at + 1] = [slice(None)] * (rank(walk, x) - len(real))
    if (given_tensors := [item for item in index if _is_tensor(item)]) and (
            len(given_tensors) > 1 or any(not isinstance(item, slice) and item is not given_tensors[0] for item in real)
            or len(walk.shape(given_tensors[0])) != 1 or "bool" in str(given_tensors[0].meta.get("dtype"))):
        walk.doubt(node, carry, "indexes by tensors")
        return None
    index += [slice(None)] * (rank(walk, x) - len([item for item in index if item is not None]))
    dim = out = 0
    for item in index:
        if item is None:
            out += 1
            continue
        if dim == carry.dim:
            if not isinstance(item, slice) or value_of(item.step) not in (None, 1):
                walk.doubt(node, carry, "takes single channels")
                return None
            stop = walk.axes.length(carry.axis) if item.stop is None else value_of(item.stop)
            axis = _piece(walk, node, carry, item.start, item.stop, stop)
            return Carry(out, axis) if axis else None
        dim, out = dim + 1, out + (isinstance(item, slice) or _is_tensor(item))
    raise AssertionError("an index for every dimension")


def _is_tensor(item: Any) -> bool:
    return isinstance(item, fx.Node) and "value" not in item.meta


@rule("setitem")
def _setitem(walk: Walk, node: fx.Node) -> Carry | None:
    for used in node.all_input_nodes:
        walk.doubt(node, walk.carry(used), "writes into a part of a tensor")
    return None

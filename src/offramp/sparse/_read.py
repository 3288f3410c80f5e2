"""Reads a traced graph as steps on values, by walking it with sizes in place of tensors; refuses what it does not know.

A tensor that a module writes in place is a cell whose value changes, so that whoever else holds it sees that.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from offramp._kernel.ops import Level, Resize, Window
from offramp.sparse._draft import Cat, Convolution, Pooling, Step, Sum, Term, Value

__all__ = ["Cell", "Masking", "Reader"]


class Cell:
    """What stands for a tensor; ``value`` is None where what computes it is not known."""

    def __init__(self, value: Value | None) -> None:
        self.value = value


@dataclass(frozen=True)
class Masking:
    """What ``mask_`` made of a convolution."""

    lam: float
    says: bool


class _Unknown(Exception):
    pass


Pair = int | tuple[int, ...] | list[int]


class Reader:
    """Walks one graph after another; ``steps`` are of those since it was last emptied, ``faults`` of all of them."""

    def __init__(self, masking: Mapping[nn.Module, Masking]) -> None:
        self.masking = masking
        self.steps: list[Step] = []
        self.faults: list[str] = []
        self.lasting = False
        """Whether one of them is more than a value that perhaps nobody needs."""

    def given(self, tensor: Tensor, index: int) -> Cell:
        """A tensor that goes in: a map, or nothing that is known."""
        name = f"tensor {index} of the first exit"
        if tensor.ndim != 4 or not tensor.is_floating_point():
            self.faults.append(f"{name}, {tensor.dtype} {tuple(tensor.shape)}")
            return Cell(None)
        return Cell(Value(Level(tensor.shape[2], tensor.shape[3]), tensor.shape[1], name))

    def emptied(self) -> list[Step]:
        """The steps so far, which it forgets."""
        steps, self.steps = self.steps, []
        return steps

    def read(self, module: fx.GraphModule, given: Sequence[Any]) -> Any:
        """The arguments of the graph's output, cells in place of tensors, for these inputs."""
        known: dict[fx.Node, Any] = {}
        inputs = iter(given)
        for node in module.graph.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            if node.op == "placeholder":
                known[node] = next(inputs)
            elif node.op == "output":
                return args[0]
            elif node.op == "get_attr":
                known[node] = operator.attrgetter(str(node.target))(module)
            else:
                known[node] = self._tried(module, node, args, kwargs)
        raise AssertionError("a graph without an output")

    def _tried(self, module: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What a node gives; where that is not known, neither is what it writes."""
        cells = _cells((args, kwargs))
        try:
            if all(cell.value is not None for cell in cells):
                return self._do(module, node, args, kwargs, bool(cells))
        except _Unknown as why:
            what = module.get_submodule(str(node.target)) if node.op == "call_module" else getattr(
                node.target, "__name__", node.target)
            place = node.meta.get("path") or node.meta.get("where") or "the network itself"
            self.faults.append(f"{what} ({node.name}, in {place}{f': {why}' if str(why) else ''})")
            self.lasting = self.lasting or "effect" in node.meta
        for cell in cells if node.meta.get("writes") else ():
            cell.value = None
        return Cell(None)

    def _do(self, module: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any, has_cells: bool) -> Any:
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            if not has_cells or kwargs or len(args) != 1 or not isinstance(args[0], Cell):
                raise _Unknown("called with more than a map")
            return self._layer(layer, args[0], node)
        name = str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", node.target))
        if not has_cells:
            target: Any = node.target
            return getattr(args[0], name)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
        if node.target is operator.getitem and not isinstance(args[0], Cell):
            return args[0][args[1]]
        made = _CALLS.get(name)
        if made is None:
            raise _Unknown
        try:
            return made(self, node, *args, **kwargs)
        except TypeError as error:  # arguments of another kind than those that the handler names
            raise _Unknown(str(error)) from None

    # ---- layers ----------------------------------------------------------------------------------------------------

    def _layer(self, layer: nn.Module, x: Cell, node: fx.Node) -> Cell:
        if isinstance(layer, nn.Identity | _DropoutNd):
            return x
        if isinstance(layer, nn.Conv2d):
            return self._conv(layer, x, node)
        if isinstance(layer, _BatchNorm):
            return self._norm(layer, x, node)
        if isinstance(layer, nn.ReLU):
            return self.relu(node, x, layer.inplace)
        if isinstance(layer, nn.Upsample):
            return self.resize(node, x, layer.size, layer.scale_factor, layer.mode, layer.align_corners,
                               layer.recompute_scale_factor)
        if isinstance(layer, nn.AvgPool2d):
            return self.mean(node, x, layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode,
                             layer.count_include_pad, layer.divisor_override)
        if isinstance(layer, nn.MaxPool2d):
            return self.largest(node, x, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                                layer.ceil_mode, layer.return_indices)
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            return self.adaptive(node, x, layer.output_size)
        raise _Unknown

    def _conv(self, layer: nn.Conv2d, x: Cell, node: fx.Node) -> Cell:
        rig = self.masking.get(layer)
        if rig is None or layer.padding_mode != "zeros":
            raise _Unknown("not masked" if rig is None else f"padding {layer.padding_mode!r}")
        kernel, stride, dilation = _pair(layer.kernel_size), _pair(layer.stride), _pair(layer.dilation)
        if layer.padding == "same":
            whole = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            if any(w % 2 for w in whole):
                raise _Unknown("padding on one side alone")
            padding = (whole[0] // 2, whole[1] // 2)
        else:
            padding = (0, 0) if layer.padding == "valid" else _pair(layer.padding)
        window = Window(kernel, stride, padding, dilation)
        source, weight = _value(x), layer.weight.detach()
        none = weight.new_zeros(layer.out_channels)
        out = Value(_swept(source.level, window), layer.out_channels, node.name)
        if out.level == Level(1, 1):
            raise _Unknown("an output of one place, which stays dense under a mask")
        self.steps.append(Convolution(
            out=out, source=source, weight=weight, window=window, groups=layer.groups, scale=torch.ones_like(none),
            shift=none if layer.bias is None else layer.bias.detach(), bare=none, lam=rig.lam, says=rig.says))
        return Cell(out)

    def _norm(self, layer: _BatchNorm, x: Cell, node: fx.Node) -> Cell:
        mean, variance = layer.running_mean, layer.running_var
        if layer.training or mean is None or variance is None:
            raise _Unknown("a norm by the batch's own statistics")
        scale = (variance.double() + layer.eps).rsqrt()
        scale = scale if layer.weight is None else scale * layer.weight.detach()
        shift = -mean * scale if layer.bias is None else layer.bias.detach() - mean * scale
        return self._put(node, x, scale=scale.to(mean.dtype), shift=shift.to(mean.dtype))

    # ---- calls -----------------------------------------------------------------------------------------------------

    def relu(self, node: fx.Node, x: Cell, inplace: bool = False) -> Cell:
        made = self._put(node, x, relu=True)
        return _written(x, made) if inplace else made

    def relu_(self, node: fx.Node, x: Cell) -> Cell:
        return self.relu(node, x, True)

    def add(self, node: fx.Node, a: Any, b: Any, *, alpha: float = 1) -> Cell:
        if alpha != 1:
            raise _Unknown(f"alpha {alpha}")
        a, b = (b, a) if not isinstance(a, Cell) else (a, b)
        source = _value(a)
        if not isinstance(b, Cell):
            return self._put(node, a, shift=self._each(source, b))
        other = _value(b)
        if (source.level, source.channels) != (other.level, other.channels):
            raise _Unknown("maps of other shapes than one another's")
        return self._sum(node, (Term(source), Term(other)))

    def add_(self, node: fx.Node, a: Cell, b: Any, *, alpha: float = 1) -> Cell:
        return _written(a, self.add(node, a, b, alpha=alpha))

    def mul(self, node: fx.Node, a: Any, b: Any) -> Cell:
        a, b = (b, a) if not isinstance(a, Cell) else (a, b)
        if isinstance(b, Cell):
            raise _Unknown("a product of maps")
        return self._put(node, a, scale=self._each(_value(a), b))

    def resize(self, node: fx.Node, x: Cell, size: Any = None, scale_factor: Any = None, mode: str = "nearest",
               align_corners: bool | None = None, recompute_scale_factor: bool | None = None,
               antialias: bool = False) -> Cell:
        value = _value(x)
        if mode not in ("nearest", "bilinear") or antialias:
            raise _Unknown(f"mode {mode!r}{', antialiased' if antialias else ''}")
        now = (value.level.height, value.level.width)
        if size is None:
            factors = scale_factor if isinstance(scale_factor, tuple | list) else (scale_factor,) * 2
            goal = tuple(int(one * factor) for one, factor in zip(now, factors, strict=True))
            if not recompute_scale_factor and any(a != b * f for a, b, f in zip(goal, now, factors, strict=True)):
                raise _Unknown(f"a factor {scale_factor} that {now} cannot be multiplied by to whole places")
        else:
            goal = _pair(size)
        if goal == now:
            return self._sum(node, (Term(value),))
        how = Resize("bilinear" if mode == "bilinear" else "nearest", bool(align_corners))
        return self._sum(node, (Term(value, how),), Level(*goal))

    def mean(self, node: fx.Node, x: Cell, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0,
             ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None) -> Cell:
        if divisor_override is not None:
            raise _Unknown("a divisor of its own")
        window = Window(_pair(kernel_size), _pair(stride or kernel_size), _pair(padding))
        level = _swept(_value(x).level, window, ceil_mode)
        padded = any(window.padding)
        if padded and count_include_pad and level != _swept(_value(x).level, window):
            raise _Unknown("padding that counts, and windows beyond it that do not")
        return self._pool(node, x, level, window, "mean", padded and count_include_pad)

    def largest(self, node: fx.Node, x: Cell, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0,
                dilation: Pair = 1, ceil_mode: bool = False, return_indices: bool = False) -> Cell:
        if return_indices:
            raise _Unknown("indices asked for")
        window = Window(_pair(kernel_size), _pair(stride or kernel_size), _pair(padding), _pair(dilation))
        return self._pool(node, x, _swept(_value(x).level, window, ceil_mode), window, "max", False)

    def adaptive(self, node: fx.Node, x: Cell, output_size: Any) -> Cell:
        level = _value(x).level
        sides = output_size if isinstance(output_size, tuple | list) else (output_size, output_size)
        now = (level.height, level.width)
        goal = tuple(one if side is None else int(side) for side, one in zip(sides, now, strict=True))
        if goal == (1, 1) != now:
            raise _Unknown("a mean of the whole picture reads what is settled")
        if any(one % side for side, one in zip(goal, now, strict=True)):
            raise _Unknown(f"windows of several sizes, from {now} to {goal}")
        kernel = (now[0] // goal[0], now[1] // goal[1])
        return self._pool(node, x, Level(*goal), Window(kernel, kernel), "mean", False)

    def cat(self, node: fx.Node, tensors: Sequence[Any], dim: int = 0, **_: Any) -> Cell:
        parts = [_value(one) for one in tensors]
        if dim not in (1, -3) or len({part.level for part in parts}) != 1:
            raise _Unknown(f"along dimension {dim}")
        if len(parts) == 1:
            return self._sum(node, (Term(parts[0]),))
        out = Value(parts[0].level, sum(part.channels for part in parts), node.name)
        self.steps.append(Cat(out=out, parts=tuple(parts)))
        return Cell(out)

    def dropout(self, node: fx.Node, x: Cell, p: float = 0.5, training: bool = True, inplace: bool = False) -> Cell:
        if training:
            raise _Unknown("in training")
        return x

    def same(self, node: fx.Node, x: Cell, **_: Any) -> Cell:
        return x

    def clone(self, node: fx.Node, x: Cell, **_: Any) -> Cell:
        return Cell(_value(x))

    def size(self, node: fx.Node, x: Cell, dim: int | None = None) -> Any:
        shape = torch.Size(_shape(x))
        return shape if dim is None else shape[dim]

    def attribute(self, node: fx.Node, x: Any, name: str) -> Any:
        if not isinstance(x, Cell) or name not in ("shape", "ndim"):
            raise _Unknown(f"its {name}")
        return torch.Size(_shape(x)) if name == "shape" else 4

    # ---- steps -----------------------------------------------------------------------------------------------------

    def _put(self, node: fx.Node, x: Cell, scale: Tensor | None = None, shift: Tensor | None = None,
             relu: bool = False) -> Cell:
        value = _value(x)
        out = Value(value.level, value.channels, node.name)
        self.steps.append(Sum(out=out, terms=(Term(value),), scale=scale, shift=shift, relu=relu))
        return Cell(out)

    def _sum(self, node: fx.Node, terms: tuple[Term, ...], level: Level | None = None) -> Cell:
        first = terms[0].value
        if level is None and len(terms) == 1:
            return Cell(first)
        out = Value(level or first.level, first.channels, node.name)
        self.steps.append(Sum(out=out, terms=terms))
        return Cell(out)

    def _pool(self, node: fx.Node, x: Cell, level: Level, window: Window, kind: Any, counts: bool) -> Cell:
        value = _value(x)
        out = Value(level, value.channels, node.name)
        self.steps.append(Pooling(out=out, source=value, window=window, kind=kind, counts_padding=counts))
        return Cell(out)

    def _each(self, value: Value, number: Any) -> Tensor:
        """A number, or one for each channel, as a tensor (C,)."""
        like = next(iter(self.masking)).weight
        assert isinstance(like, Tensor)
        found = torch.as_tensor(number, dtype=like.dtype, device=like.device).detach()
        if found.numel() != 1 and found.shape[-3:] != (value.channels, 1, 1):
            raise _Unknown(f"a tensor {tuple(found.shape)} in place of a number a channel")
        return found.flatten().expand(value.channels).contiguous()


_CALLS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("add", "__add__"), Reader.add), **dict.fromkeys(("add_", "iadd"), Reader.add_),
    "mul": Reader.mul, "relu": Reader.relu, "relu_": Reader.relu_, "interpolate": Reader.resize,
    "avg_pool2d": Reader.mean, "adaptive_avg_pool2d": Reader.adaptive,
    **dict.fromkeys(("max_pool2d", "_max_pool2d"), Reader.largest),
    **dict.fromkeys(("cat", "concat", "concatenate"), Reader.cat),
    **dict.fromkeys(("dropout", "dropout2d"), Reader.dropout), "clone": Reader.clone,
    **dict.fromkeys(("contiguous", "detach"), Reader.same),
    "size": Reader.size, "getattr": Reader.attribute,
}


def _cells(value: Any) -> list[Cell]:
    found: list[Cell] = []
    fx.node.map_aggregate(value, lambda leaf: found.append(leaf) if isinstance(leaf, Cell) else None)
    return found


def _value(x: Any) -> Value:
    if not isinstance(x, Cell) or x.value is None:
        raise _Unknown(f"a {type(x).__name__} in place of a map")
    return x.value


def _shape(x: Cell) -> tuple[int, int, int, int]:
    value = _value(x)
    return 1, value.channels, value.level.height, value.level.width  # images go one by one


def _written(x: Cell, made: Cell) -> Cell:
    """In place: whoever holds the tensor sees the new value."""
    x.value = made.value
    return x


def _pair(value: Any) -> tuple[int, int]:
    items = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(items) == 1:
        items *= 2
    if len(items) != 2 or not all(isinstance(item, int) for item in items):
        raise _Unknown(f"{value!r} in place of a height and a width")
    return int(items[0]), int(items[1])


def _swept(level: Level, window: Window, ceil: bool = False) -> Level:
    """The output's size, as torch has it: with ``ceil`` a last window may leave the map, but begins in it."""
    sides = []
    for side, k, s, p, d in zip((level.height, level.width), window.kernel, window.stride, window.padding,
                                window.dilation, strict=True):
        room = side + 2 * p - d * (k - 1) - 1
        count = (-(-room // s) if ceil else room // s) + 1
        sides.append(count - 1 if ceil and (count - 1) * s >= side + p else count)
    if min(sides) < 1:
        raise _Unknown(f"{level} is smaller than its window")
    return Level(*sides)

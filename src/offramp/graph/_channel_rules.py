"""What each op does to channels: rules for layers, for elementwise ops and for those that work on places.

A rule says what the op's output carries: a :class:`Carry`, the same for every tensor of a tuple, or None. Where an op
is right only at full width, the rule says so (``walk.doubt``) and gives None; it is refused at the end, unless those
channels turn out to be fixed.
"""

from collections.abc import Sequence
from typing import Any, cast

from torch import fx, nn

from offramp.graph._axes import scaled
from offramp.graph._channel_walk import Carry, Walk, key_of, rule

__all__ = ["argument", "merged", "numbers_of", "rank", "source", "tensors_of", "value_of"]


def argument(walk: Walk, node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument by place or name; of a module, its attribute."""
    if node.op == "call_module":
        return getattr(walk.module(node), name, default)
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[place] if len(node.args) > place else default


def tensors_of(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments that are tensors, as they stand."""
    return [used for used in node.all_input_nodes if "value" not in used.meta]


def source(node: fx.Node) -> fx.Node:
    """The tensor that an op is called on."""
    return cast(fx.Node, node.args[0] if node.args else next(iter(node.kwargs.values())))


def rank(walk: Walk, node: fx.Node) -> int:
    """How many dimensions a tensor has."""
    return len(walk.shape(node))


def value_of(number: Any) -> Any:
    """A number, also where a node computes it."""
    return number.meta["value"] if isinstance(number, fx.Node) else number


def numbers_of(walk: Walk, node: fx.Node, place: int, *names: str) -> list[Any]:
    """Sizes or dimensions that may be given one by one, or as one list."""
    for name in names:
        if name in node.kwargs:
            given = node.kwargs[name]
            return list(given) if isinstance(given, Sequence) else [given]
    rest = node.args[place:]
    if len(rest) == 1 and isinstance(rest[0], Sequence):
        return list(rest[0])
    return list(rest)


# -- layers


def _layer(walk: Walk, node: fx.Node, kind: type[nn.Module] | tuple[type[nn.Module], ...], *weights: Any) -> Any:
    """The module whose weights an op uses, if it is of that kind; an op on computed weights has none."""
    module = walk.module(node)
    if node.op == "call_module":
        return module
    own = [weight for weight in weights if isinstance(weight, fx.Node)]
    path = f"guest.{node.meta['path']}." if node.meta["path"] else "guest."
    if not isinstance(module, kind) or any(w.op != "get_attr" or str(w.target).rpartition(".")[0] + "." != path
                                           for w in own):
        for used in tensors_of(node):
            walk.doubt(node, walk.carry(used), "uses weights that are no layer's own")
        return None
    walk.claim(*own)
    return module


@rule("conv1d", "conv2d", "conv3d", "convtranspose1d", "convtranspose2d", "convtranspose3d")
def _conv(walk: Walk, node: fx.Node) -> Carry | None:
    x = source(node)
    module = _layer(walk, node, nn.modules.conv._ConvNd, argument(walk, node, 1, "weight"),
                    argument(walk, node, 2, "bias"))
    if module is None:
        return None
    dim = rank(walk, x) - 1 - len(module.kernel_size)
    reads, groups = walk.axis_at(x, dim, node), module.groups
    if groups == 1:
        gives = walk.axes.new(module.out_channels)
    else:  # whole groups stay
        group = walk.axes.new(groups)
        gives = scaled(group, module.out_channels // groups)
        walk.axes.unify(reads, scaled(group, module.in_channels // groups))
    return Carry(dim, walk.layer(node, "conv", reads, gives))


@rule("linear")
def _linear(walk: Walk, node: fx.Node) -> Carry | None:
    x = source(node)
    module = _layer(walk, node, nn.Linear, argument(walk, node, 1, "weight"), argument(walk, node, 2, "bias"))
    if module is None:
        return None
    dim = rank(walk, x) - 1
    carry = walk.carry(x)
    if carry is not None and carry.dim != dim:  # it mixes places; channels pass
        fixed = "a linear layer along a dimension that holds no channels"
        walk.layer(node, "linear", walk.axes.new(module.in_features, fixed), walk.axes.new(module.out_features, fixed))
        return carry
    reads = walk.axis_at(x, dim, node)
    return Carry(dim, walk.layer(node, "linear", reads, walk.axes.new(module.out_features)))


@rule("batchnorm", "batchnorm1d", "batchnorm2d", "batchnorm3d", "syncbatchnorm", "instancenorm", "instancenorm1d",
      "instancenorm2d", "instancenorm3d")
def _batch_norm(walk: Walk, node: fx.Node) -> Carry | None:
    x = source(node)
    given = [argument(walk, node, i, name) for i, name in enumerate(
        ("running_mean", "running_var", "weight", "bias"), 1)] if node.op != "call_module" else []
    module = _layer(walk, node, nn.modules.batchnorm._NormBase, *given)
    if module is None:
        return None
    return _normed(walk, node, x, 1 if rank(walk, x) > 1 else 0)


@rule("groupnorm")
def _group_norm(walk: Walk, node: fx.Node) -> Carry | None:
    x = source(node)
    module = _layer(walk, node, nn.GroupNorm, argument(walk, node, 2, "weight"), argument(walk, node, 3, "bias"))
    if module is None:
        return None
    if module.num_groups > 1:  # whole groups stay: their statistics are what they were
        group = walk.axes.new(module.num_groups)
        walk.axes.unify(walk.axis_at(x, 1, node), scaled(group, module.num_channels // module.num_groups))
    return _normed(walk, node, x, 1)


@rule("layernorm", "rmsnorm")
def _layer_norm(walk: Walk, node: fx.Node) -> Carry | None:
    x = source(node)
    carry, dims = walk.carry(x), rank(walk, x)
    module = _layer(walk, node, (nn.LayerNorm, nn.RMSNorm), argument(walk, node, 2, "weight"),
                    argument(walk, node, 3, "bias"))
    if module is None:
        return None
    over = len(module.normalized_shape)
    if carry is not None and carry.dim < dims - over:
        return carry
    if over > 1:
        walk.doubt(node, carry, "normalises channels together with other dimensions")
        return None
    return _normed(walk, node, x, dims - 1)


def _normed(walk: Walk, node: fx.Node, x: fx.Node, dim: int) -> Carry:
    axis = walk.axis_at(x, dim, node)
    return Carry(dim, walk.layer(node, "norm", axis, axis))


@rule("prelu")
def _prelu(walk: Walk, node: fx.Node) -> Carry | None:
    x = source(node)
    if node.op != "call_module":
        return _pointwise(walk, node)
    if walk.module(node).num_parameters == 1:
        return walk.carry(x)
    return _normed(walk, node, x, 1)


# -- elementwise

_ALIKE = (
    "relu relu6 leakyrelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus softsign "
    "logsigmoid softshrink hardshrink tanhshrink threshold rrelu sqrt rsqrt exp log log2 log1p abs neg square pow ipow "
    "reciprocal sin cos erf clamp clampmin clampmax clip round floor ceil sign nantonum dropout dropout1d dropout2d "
    "dropout3d alphadropout featurealphadropout identity contiguous clone detach to float double half bfloat16 type "
    "requiresgrad cpu cuda zeroslike oneslike fulllike emptylike randlike randnlike bernoulli isnan isinf logicalnot "
    "bitwisenot invert fill zero pos sinh cosh atan"
)


@rule(*_ALIKE.split())
def _alike(walk: Walk, node: fx.Node) -> Carry | None:
    return walk.carry(source(node))


_POINTWISE = (
    "add sub mul div truediv floordivide floordiv iadd isub imul itruediv rsub maximum minimum where maskedfill "
    "addcmul addcdiv lerp eq ne lt le gt ge greater less atan2 fmod remainder mod multiply divide truedivide subtract "
    "logicaland logicalor and or iand ior xor copy typeas rtruediv copysign hypot xlogy logaddexp fmax fmin"
)


@rule(*_POINTWISE.split())
def _pointwise(walk: Walk, node: fx.Node) -> Carry | None:
    return merged(walk, node, tensors_of(node))


def merged(walk: Walk, node: fx.Node, tensors: list[fx.Node]) -> Carry | None:
    """Tensors that broadcast against each other: their channels are the same ones, counted from the last dimension."""
    carries = [(carry, carry.dim - rank(walk, t)) for t in tensors if (carry := walk.carry(t)) is not None]
    if not carries:
        return None
    carry, at = carries[0]
    if any(other != at for _, other in carries):
        for one, _ in carries:
            walk.doubt(node, one, "meets channels along two dimensions at once")
        return None
    for t in tensors:
        other, shape = walk.carry(t), walk.shape(t)
        if len(shape) < -at or shape[at] == 1:
            continue
        if other is not None:
            walk.axes.unify(carry.axis, other.axis)
        elif not walk.met(t, len(shape) + at, carry.axis):
            walk.hold(carry.axis, t)
    dims = max(rank(walk, t) for t in tensors)
    return Carry(dims + at, carry.axis)


# -- space: pools, resizing, padding

_SPATIAL = (
    "maxpool avgpool adaptiveavgpool adaptivemaxpool lppool fractionalmaxpool maxunpool reflectionpad replicationpad "
    "zeropad constantpad circularpad"
)


@rule(*(f"{name}{dims}d" for name in _SPATIAL.split() for dims in (1, 2, 3)),
      *(f"{name}{dims}dwithindices" for name in ("maxpool", "adaptivemaxpool") for dims in (1, 2, 3)))
def _spatial(walk: Walk, node: fx.Node) -> Carry | None:
    name = key_of(walk, node).removesuffix("withindices")
    return _before(walk, node, source(node), rank(walk, source(node)) - int(name[-2]))


@rule("interpolate", "upsample", "upsamplingnearest2d", "upsamplingbilinear2d", "gridsample")
def _resized(walk: Walk, node: fx.Node) -> Carry | None:
    return _before(walk, node, source(node), 2)


def _before(walk: Walk, node: fx.Node, x: fx.Node, dims: int) -> Carry | None:
    """The op works on the dimensions from ``dims`` on."""
    carry = walk.carry(x)
    for other in tensors_of(node):
        if other is not x:
            walk.doubt(node, walk.carry(other), "takes channels for coordinates")
    if carry is not None and carry.dim >= dims:
        walk.doubt(node, carry, "works along the channels as along places")
        return None
    return carry

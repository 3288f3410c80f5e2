"""MESS's space of dense heads: 64 a site, from a 1x1 reduction, extra blocks, their dilation and the head proper.

MESS (arXiv:2106.03527, 4.2). In order: a reduction to C / r channels (1x1, BN, ReLU; nothing at r = 1), blocks of that
width, an FCN or a DeepLabV3 head, bilinear upsampling. What the paper leaves open, and how it is read here:

- Blocks follow the network's own: inverted residuals, with its expansion and activation, where a depthwise convolution
  stands between two pointwise ones at or before the site; else residual blocks of two 3x3.
- Rapid dilation: the blocks' 3x3 dilate by 2, 4, 8; the head proper stays as published. With no blocks, the head's own
  3x3 (DeepLabV3: the one after the pyramid) dilates by 2, so that no two of the 64 are the same. It costs no MACs.
- The heads are torchvision's ``FCNHead`` and ``DeepLabHead`` (rates 12, 24, 36), the latter min(256, C) wide, C being
  the site's channels: 256 on a ResNet-50, less on small networks, which 256 would outweigh.
- Taps that could only see padding, at rates beyond the map's size, are not computed; the answers are the same.

Rows never look at each other in eval mode. In training the pyramid's pooled branch has one value a row and channel: for
a batch of one it uses the running statistics, as one value has no variance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, cat, channels_last, nn
from torch.nn import functional as F

from offramp.errors import HeadError
from offramp.graph import Traced
from offramp.nn.reading import MapHead, MapReading, read_as_map, reads_of
from offramp.nn.specs import spec_data
from offramp.types import ExitSite, LiveTensor

__all__ = ["Inverted", "MessHead", "MessSpec", "blocks_before", "build_mess", "mess_space"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "hardtanh": nn.ReLU6, "hardswish": nn.Hardswish, "silu": nn.SiLU,
    "gelu": nn.GELU,
}


@dataclass(frozen=True, kw_only=True)
class MessSpec:
    """One head of the space.

    >>> MessSpec(reduction=4, blocks=2, rapid_dilation=True, head="dlb").name
    'crm4-b2-rdi-dlb'
    """

    reduction: Literal[1, 2, 4, 8] = 1
    """How many times fewer channels than the site's."""
    blocks: Literal[0, 1, 2, 3] = 0
    rapid_dilation: bool = False
    head: Literal["fcn", "dlb"] = "fcn"
    block: Literal["auto", "residual", "inverted"] = "auto"
    """``auto`` follows the network; a head that was made says which."""

    def __post_init__(self) -> None:
        allowed = {"reduction": (1, 2, 4, 8), "blocks": (0, 1, 2, 3), "rapid_dilation": (False, True),
                   "head": ("fcn", "dlb"), "block": ("auto", "residual", "inverted")}
        faults = [f"{name} among {', '.join(map(str, known))}, not {getattr(self, name)!r}"
                  for name, known in allowed.items() if getattr(self, name) not in known]
        if faults:
            raise HeadError("MessSpec: expected " + "; ".join(faults) + ".")

    @property
    def name(self) -> str:
        """As :func:`mess_space` calls it."""
        return f"crm{self.reduction}-b{self.blocks}-{'rdi' if self.rapid_dilation else 'plain'}-{self.head}"

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and words."""
        return {"type": "MessSpec", "version": 1, "data": asdict(self)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "MessSpec":
        """The inverse of :meth:`to_json`; HeadError on another type, a future version or an unknown field."""
        return cls(**spec_data(record, cls))


def mess_space() -> dict[str, MessSpec]:
    """All 64 heads by name: reductions {1, 2, 4, 8} x blocks {0..3} x rapid dilation x {FCN, DeepLabV3}.

    MESS (arXiv:2106.03527), Eq. 1; ``attach(model, x, exits=6, heads=mess_space())`` hangs all of them at every site.

    >>> len(mess_space()), next(iter(mess_space()))
    (64, 'crm1-b0-plain-fcn')
    """
    specs = [MessSpec(reduction=r, blocks=b, rapid_dilation=rapid, head=head)  # type: ignore[arg-type]
             for r in (1, 2, 4, 8) for b in range(4) for rapid in (False, True) for head in ("fcn", "dlb")]
    return {spec.name: spec for spec in specs}


@dataclass(frozen=True)
class Inverted:
    """What a network's inverted residuals are like."""

    expansion: float = 6.0
    activation: type[nn.Module] = nn.ReLU6


def blocks_before(traced: Traced, site: ExitSite) -> Inverted | None:
    """The last inverted residual at or before a site, else the first after it; None where a network has none.

    It is told by its convolutions, whatever its modules are called: a pointwise one that widens, a depthwise one, and
    a pointwise one that narrows.
    """
    path, _, call = site.name.partition("#")
    ends = [c.position for c in traced.program.closes if c.path == path and c.call == int(call or 0)]
    convs: list[tuple[int, nn.Conv2d]] = []
    called = {}
    for at, node in enumerate(traced.program.nodes):
        if node.op == "call_module":
            module = traced.model.get_submodule(str(node.target).removeprefix("guest."))
            called[at] = type(module).__name__.lower()
            if isinstance(module, nn.Conv2d):
                convs.append((at, module))
        elif node.op in ("call_function", "call_method"):
            called[at] = str(getattr(node.target, "__name__", node.target)).rstrip("_")
    found: Inverted | None = None
    for (_, wide), (at, deep), (upto, slim) in zip(convs, convs[1:], convs[2:], strict=False):
        hidden = deep.in_channels
        if not deep.groups == deep.out_channels == hidden == wide.out_channels:
            continue
        if {wide.kernel_size, slim.kernel_size} != {(1, 1)} or not wide.in_channels < hidden > slim.out_channels:
            continue
        if found is not None and ends and at > max(ends):
            break
        acts = [_ACTIVATIONS[called[i]] for i in range(at + 1, upto) if called.get(i) in _ACTIVATIONS]
        found = Inverted(hidden / wide.in_channels, acts[0] if acts else nn.ReLU6)
    return found


def build_mess(
    spec: MessSpec, frontier: Sequence[LiveTensor], num_classes: int, out_size: tuple[int, int] | None,
    inverted: Inverted | None = None,
) -> "MessHead":
    """A fresh head for a frontier; ``inverted`` is what the network's blocks are like, where they are inverted.

    HeadError where the frontier holds no maps, or no ``out_size`` says how large dense logits are.
    """
    if out_size is None:
        raise HeadError(expected="a network that labels pixels (task 'dense')", got="no (H, W) of its logits",
                        where=f"the head {spec.name}", todo="use HeadSpec or ShortcutSpec heads to classify")
    reads = reads_of(frontier, "dense", out_size)
    if not all(read.kind != "vector" and min(read.size) > 0 for read in reads):
        raise HeadError(expected="maps (N, C, H, W) or tokens that form a grid", got=", ".join(map(str, frontier)),
                        where=f"the head {spec.name}", todo="choose another site")
    return MessHead(spec, read_as_map(reads, "dense", out_size), num_classes, inverted)


class MessHead(MapHead):
    """A head of the space: ``head(*frontier)`` gives logits (N, K, H, W) of the output's size."""

    def __init__(self, spec: MessSpec, reading: MapReading, num_classes: int, inverted: Inverted | None) -> None:
        super().__init__()
        kind = spec.block if spec.block != "auto" else "inverted" if inverted else "residual"
        self.spec = MessSpec(**{**asdict(spec), "block": kind})
        self.reading, self.classes = reading, num_classes
        width = max(1, reading.channels // spec.reduction)
        self.crm: nn.Module = nn.Identity() if spec.reduction == 1 else _unit(reading.channels, width, 1)
        self.blocks = nn.Sequential()
        for depth in range(spec.blocks):
            rate = 2 ** (depth + 1) if spec.rapid_dilation else 1
            self.blocks.append(_Residual(width, rate) if kind == "residual"
                               else _InvertedResidual(width, rate, inverted or Inverted()))
        own = 2 if spec.rapid_dilation and not spec.blocks else 1
        self.last = _fcn(width, num_classes, own) if spec.head == "fcn" else _deeplab(
            width, min(256, reading.channels), num_classes, own)

    def on_map(self, x: Tensor) -> Tensor:
        """The logits of a joined map, not resized."""
        if x.device.type == "cpu":  # narrow maps with depthwise convolutions and norms: up to twice as fast
            x = x.contiguous(memory_format=channels_last)
        return self.last(self.blocks(self.crm(x)))  # type: ignore[no-any-return]

    def macs(self) -> int:
        """For one sample of the frontier that the head was made for: as counting it would give, but at once."""
        height, width = self.reading.size
        total = 0
        for name, conv in self.named_modules():
            if isinstance(conv, nn.Conv2d):
                taps = conv.kernel_size[0] * conv.kernel_size[1]
                if isinstance(conv, _Dilated):
                    taps = (3 if height > conv.dilation[0] else 1) * (3 if width > conv.dilation[0] else 1)
                places = 1 if name == "last.0.convs.4.0" else height * width
                total += places * taps * conv.out_channels * conv.in_channels // conv.groups
        return total + self.reading.macs(self.classes)

    def extra_repr(self) -> str:
        return self.spec.name


class _Dilated(nn.Conv2d):
    """A 3x3 whose taps are left out of the work where all they could see is padding."""

    def forward(self, x: Tensor) -> Tensor:
        weight, rate = self.weight, self.dilation[0]
        tall, wide = x.shape[-2] > rate, x.shape[-1] > rate
        weight = weight if tall else weight[:, :, 1:2]
        weight = weight if wide else weight[..., 1:2]
        return F.conv2d(x, weight, self.bias, 1, (rate * tall, rate * wide), rate, self.groups)


class _RowNorm(nn.BatchNorm2d):
    """Batch norm of one value a row and channel, which in training needs two rows or its running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)


def _conv(width: int, wide: int, kernel: int, rate: int = 1, groups: int = 1) -> nn.Conv2d:
    if kernel == 1:
        return _pointwise(width, wide, bias=False)
    kind = nn.Conv2d if rate == 1 else _Dilated
    return kind(width, wide, kernel, padding=rate, dilation=rate, groups=groups, bias=False)


def _pointwise(width: int, wide: int, bias: bool = True) -> nn.Conv2d:
    # One tap knows no dilation; but on one thread torch hands 1x1 convolutions to its slow path unless they have one.
    return nn.Conv2d(width, wide, 1, dilation=2, bias=bias)


def _unit(width: int, wide: int, kernel: int, rate: int = 1, groups: int = 1, act: type[nn.Module] = nn.ReLU
          ) -> nn.Sequential:
    return nn.Sequential(_conv(width, wide, kernel, rate, groups), nn.BatchNorm2d(wide), act())


class _Residual(nn.Module):
    def __init__(self, width: int, rate: int) -> None:
        super().__init__()
        self.first = _unit(width, width, 3, rate)
        self.second = nn.Sequential(_conv(width, width, 3, rate), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + x)


class _InvertedResidual(nn.Module):
    def __init__(self, width: int, rate: int, like: Inverted) -> None:
        super().__init__()
        wide, act = max(1, round(width * like.expansion)), like.activation
        self.wide = _unit(width, wide, 1, act=act)
        self.deep = _unit(wide, wide, 3, rate, wide, act)
        self.slim = nn.Sequential(_conv(wide, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.slim(self.deep(self.wide(x))) + x  # type: ignore[no-any-return]


class _Pooled(nn.Sequential):
    """The pyramid's view of the whole image."""

    def forward(self, x: Tensor) -> Tensor:
        one: Tensor = super().forward(x.mean((2, 3), keepdim=True))  # type: ignore[no-untyped-call]
        return one.expand(-1, -1, *x.shape[-2:])


class _Pyramid(nn.Module):
    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        pooled = _Pooled(_conv(width, wide, 1), _RowNorm(wide), nn.ReLU())
        self.convs = nn.ModuleList([_unit(width, wide, 1), *(_unit(width, wide, 3, r) for r in (12, 24, 36)), pooled])
        self.project = nn.Sequential(*_unit(5 * wide, wide, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(cat([conv(x) for conv in self.convs], 1))  # type: ignore[no-any-return]


def _fcn(width: int, classes: int, rate: int) -> nn.Sequential:
    wide = max(1, width // 4)
    return nn.Sequential(*_unit(width, wide, 3, rate), nn.Dropout(0.1), _pointwise(wide, classes))


def _deeplab(width: int, wide: int, classes: int, rate: int) -> nn.Sequential:
    return nn.Sequential(_Pyramid(width, wide), *_unit(wide, wide, 3, rate), _pointwise(wide, classes))

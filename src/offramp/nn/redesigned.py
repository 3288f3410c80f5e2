"""ADP-C's dense exits: a plain head on all branches at once, and the redesigned one, a small encoder-decoder.

ADP-C (arXiv:2104.00749), 3.3. The frontier's maps, brought to the size of the finest and concatenated, are halved
``down`` times (average pooling, 1x1 convolution), which lends an early exit the view that its features lack, and
doubled as often (bilinear, 1x1 convolution), the last of these convolutions giving the logits. With ``down=0`` it is
the plain head, a 1x1 convolution as wide as the frontier and one to the classes. On the HRNets of
``offramp.models`` these heads give the paper's counts to its last digit, parameters too: convolutions alone, without
what it costs to resize, in units of 2^30. For poses its plain exits are one 1x1 convolution on the finest map alone
(``channels=0, finest=True``), its redesigned ones read all maps. Where the paper is silent:

- Sides that cannot be halved are rounded up, and each doubling returns to the size that was halved.
- Convolutions have a bias, as those of HRNet's own head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from offramp.errors import HeadError
from offramp.nn.reading import Layout, MapHead, MapReading, reads_of
from offramp.nn.specs import spec_data
from offramp.types import LiveTensor

__all__ = ["RedesignedHead", "RedesignedSpec", "build_redesigned", "redesigned"]


@dataclass(frozen=True, kw_only=True)
class RedesignedSpec:
    """One dense head: how often it halves the map, and how wide it is.

    >>> RedesignedSpec.from_json(RedesignedSpec(down=3, channels=128).to_json())
    RedesignedSpec(down=3, channels=128, finest=False, layout='auto')
    """

    down: int = 1
    """Halvings of the map, and doublings after; 0 is the plain head."""
    channels: int | None = None
    """After each convolution but the last; None for as many as the frontier has. 0, with ``down=0`` alone, leaves all
    but the last convolution out, as in ADP-C's plain exits for poses."""
    finest: bool = False
    """Whether the finest map alone is read."""
    layout: Layout = "auto"
    """How frontiers of rank 4 are read; ``auto`` tells by shape."""

    def __post_init__(self) -> None:
        faults = []
        if self.down < 0:
            faults.append(f"down >= 0, not {self.down}")
        if self.channels is not None and self.channels < (1 if self.down else 0):
            faults.append(f"channels >= 1, or 0 where down is 0, not {self.channels}")
        if self.layout not in ("auto", "channels_first", "channels_last"):
            faults.append(f"layout auto, channels_first or channels_last, not {self.layout!r}")
        if faults:
            raise HeadError("RedesignedSpec: expected " + "; ".join(faults) + ".")

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and words."""
        return {"type": "RedesignedSpec", "version": 1, "data": asdict(self)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "RedesignedSpec":
        """The inverse of :meth:`to_json`; HeadError on another type, a future version or an unknown field."""
        return cls(**spec_data(record, cls))


def redesigned(exits: Sequence[str], channels: int | None) -> dict[str, RedesignedSpec]:
    """A head for each exit of a network with these and its own end, N in all: exit i halves its map N - i times.

    ADP-C (arXiv:2104.00749), 3.3; ``attach(net, x, exits=net.ends, heads=offramp.redesigned(net.ends, 128))``. The
    paper has 128 channels on HRNet-W48, 64 on W18 and for poses.

    >>> redesigned(["layer1.3", "stage2.0"], 64)["layer1.3"].down
    2
    """
    return {name: RedesignedSpec(down=len(exits) - i, channels=channels) for i, name in enumerate(exits)}


def build_redesigned(
    spec: RedesignedSpec, frontier: Sequence[LiveTensor], num_classes: int, out_size: tuple[int, int] | None
) -> "RedesignedHead":
    """A fresh head for a frontier; ``out_size`` is the (H, W) of the network's own dense logits.

    HeadError where the frontier holds no maps, or no ``out_size`` says how large dense logits are.

    >>> import torch
    >>> maps = [LiveTensor(name=n, shape=(1, c, s, s), dtype="float32") for n, c, s in (("a", 8, 16), ("b", 16, 8))]
    >>> head = build_redesigned(RedesignedSpec(down=2, channels=4), maps, 5, (64, 64))
    >>> head(*(torch.zeros(2, *one.shape[1:]) for one in maps)).shape
    torch.Size([2, 5, 64, 64])
    """
    if out_size is None:
        raise HeadError(expected="a network that labels pixels (task 'dense')", got="no (H, W) of its logits",
                        where="a redesigned head", todo="use HeadSpec or ShortcutSpec heads to classify")
    reads = reads_of(frontier, "dense", out_size, spec.layout)
    if not all(read.kind != "vector" and min(read.size) > 0 for read in reads):
        raise HeadError(expected="maps (N, C, H, W) or tokens that form a grid", got=", ".join(map(str, frontier)),
                        where="a redesigned head", todo="choose another site")
    aspect = reads[0].size[0] / reads[0].size[1]
    finest = max(range(len(reads)), key=lambda i: reads[i].size[0] * reads[i].size[1])
    if spec.finest:
        reads, finest = [reads[finest]], 0
    (height, width) = reads[finest].size
    scale = (out_size[0] / height, out_size[1] / width)
    return RedesignedHead(spec, MapReading(tuple(reads), finest, aspect, scale), num_classes)


class RedesignedHead(MapHead):
    """A plain or redesigned head: ``head(*frontier)`` gives logits (N, K, H, W) of the output's size."""

    def __init__(self, spec: RedesignedSpec, reading: MapReading, num_classes: int) -> None:
        super().__init__()
        self.spec, self.reading, self.num_classes = spec, reading, num_classes
        width = reading.channels
        wide = width if spec.channels is None else spec.channels
        self.down = nn.ModuleList(_unit(width if i == 0 else wide, wide) for i in range(spec.down))
        self.up = nn.ModuleList(_unit(wide, wide) for _ in range(spec.down - 1))
        self.flat = _unit(width, wide) if spec.down == 0 and wide else nn.Identity()
        self.last = nn.Conv2d(wide or width, num_classes, 1)

    def on_map(self, x: Tensor) -> Tensor:
        """The logits of a joined map, of its size."""
        sizes, x = [], self.flat(x)
        for unit in self.down:
            sizes.append(x.shape[-2:])
            x = unit(F.avg_pool2d(x, 2, ceil_mode=True))
        for unit in self.up:
            x = unit(_resize(x, sizes.pop()))
        return self.last(_resize(x, sizes.pop()) if sizes else x)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return str(self.spec)


def _unit(width: int, wide: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, wide, 1), nn.BatchNorm2d(wide), nn.ReLU())


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, list(size), mode="bilinear", align_corners=False)

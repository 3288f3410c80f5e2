"""Convolutions whose output is kept where a mask is on, and interpolated or carried over where it is off.

A layer stays the object that it was, of a subclass of its own class, as in ``nn/_slim_layers.py``. What it looks at,
the :class:`Frame` of one call of one network, lies in a context variable: threads and networks never see each other's.
"""

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.functional.masking import Band, Reach, band, interpolate

__all__ = ["Frame", "Link", "MaskedLayer", "mask_layer_", "unmask_layer_"]


class Link:
    """What the layers of one network know of it: through it they find the frame of the call that they are in."""

    @contextmanager
    def at(self, frame: "Frame") -> Iterator[None]:
        token = _NOW.set({**_NOW.get(), self: frame})
        try:
            yield
        finally:
            _NOW.reset(token)


_NOW: ContextVar[Mapping[Link, "Frame"]] = ContextVar("offramp_mask", default=MappingProxyType({}))


@dataclass
class Frame:
    """One call: the mask that governs now, and what it is at other sizes."""

    lams: Mapping[str, Tensor]
    reach: Reach
    mask: Tensor | None = None
    """bool (N, 1, H, W), true where active; None before the first exit."""
    carried: Tensor | None = None
    """The last exit's logits, of the mask's size."""
    last: bool = False
    """Whether the network's own end runs."""
    counting: bool = False
    dense_macs: int = 0
    """Of masked convolutions so far, for one sample, were they dense."""
    sparse_macs: Tensor | None = None
    """(N,) what sparse execution does of these, with what it interpolates."""
    _sized: dict[tuple[int, int, bool], Any] = field(default_factory=dict)

    def settle(self, mask: Tensor, carried: Tensor) -> None:
        """From here on, this mask."""
        self.mask, self.carried = mask, carried
        self._sized.clear()

    def mask_at(self, size: tuple[int, int]) -> Tensor:
        """The mask brought to a size, by nearest."""
        assert self.mask is not None
        key = (*size, False)
        if key not in self._sized:
            self._sized[key] = self.mask if self.mask.shape[-2:] == size else F.interpolate(
                self.mask.to(torch.uint8), size, mode="nearest").bool()
        return self._sized[key]  # type: ignore[no-any-return]

    def carry(self, logits: Tensor, earlier: Tensor | None = None) -> Tensor:
        """Logits, with the last exit's where their places are settled (ADP-C, arXiv:2104.00749, eq. 4).

        earlier: the last exit's, if not those of the mask's size.
        """
        if self.mask is None:
            return logits
        size = (logits.shape[2], logits.shape[3])
        before = self.carried if earlier is None else earlier
        assert before is not None
        if before.shape[-2:] != size:  # place by place what the mask was read off
            before = F.interpolate(before, size, mode="nearest")
        return torch.where(self.mask_at(size), logits, before)

    def through(self, raw: Tensor, rig: "Rig", macs: int) -> Tensor:
        """A convolution's output under the mask. macs: of one of its places."""
        # what is one place for all the picture (a pooled context, a gate) is no map; what has other rows no sample's
        if self.mask is None or raw.ndim != 4 or raw.shape[0] != self.mask.shape[0] or (
            raw.shape[-2:] == (1, 1) != self.mask.shape[-2:]
        ):
            return raw
        size = (raw.shape[2], raw.shape[3])
        mask = self.mask_at(size)
        carries = rig.says and self.last
        if self.counting:
            self._count(raw, mask, 0 if carries else raw.shape[1], macs)
        if carries:
            return self.carry(raw)
        found = self._band(mask, size, self.reach)
        return raw if found is None else interpolate(raw, mask, self.lams[rig.key], reach=self.reach, band_=found)

    def _band(self, mask: Tensor, size: tuple[int, int], reach: Reach) -> Band | None:
        """None where all is active."""
        key = (*size, True)
        if key not in self._sized:
            self._sized[key] = None if bool(mask.all()) else band(mask, reach)
        return self._sized[key]  # type: ignore[no-any-return]

    def _count(self, raw: Tensor, mask: Tensor, channels: int, macs: int) -> None:
        rows, places = len(mask), mask[0].numel()
        reads = torch.bincount(band(mask, "halo").sources // places, minlength=rows)
        done = mask.flatten(1).sum(1) * macs + reads * channels
        self.sparse_macs = done if self.sparse_macs is None else self.sparse_macs + done
        self.dense_macs += places * macs


@dataclass
class Rig:
    """What makes a layer masked; hangs on it as ``_offramp_mask``."""

    link: Link
    key: str
    """Of its lambda."""
    kind: type[nn.Module]
    """The class that the layer had."""
    says: bool = False
    """Whether the network's own logits are its output, at most resized."""


class MaskedLayer(nn.Module):
    """What a masked convolution is besides being of its own class."""

    _offramp_mask: Rig
    weight: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raw = super().forward(*args, **kwargs)
        frame = _NOW.get().get(self._offramp_mask.link)
        if frame is None:
            return raw
        return frame.through(raw, self._offramp_mask, math.prod(self.weight.shape))


_classes: dict[type[nn.Module], type[nn.Module]] = {}
_lock = threading.Lock()


def mask_layer_(layer: nn.Module, link: Link, key: str) -> Rig:
    """Make a convolution a masked one, in place."""
    kind = type(layer)
    with _lock:
        if kind not in _classes:
            # the module of its class: tracers tell torch's own layers by it
            _classes[kind] = type(f"Masked{kind.__name__}", (MaskedLayer, kind), {"__module__": kind.__module__})
    rig = Rig(link, key, kind)
    layer._offramp_mask = rig  # type: ignore[assignment]
    layer.__class__ = _classes[kind]
    return rig


def unmask_layer_(layer: MaskedLayer) -> None:
    """Make it the one that it was, in place."""
    rig = layer._offramp_mask
    del layer._offramp_mask
    layer.__class__ = rig.kind  # type: ignore[assignment]

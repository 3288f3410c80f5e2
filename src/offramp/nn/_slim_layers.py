"""Layers that can run narrower than they are.

A layer stays the object that it was, of a subclass of its own class: at full width the class's own ``forward`` runs on
it, at a narrower width the same ``forward`` runs on a *shell*, an object with the layer's attributes of which some are
replaced: weights by slices of themselves, numbers of channels by smaller ones. So subclasses that libraries made of
torch's layers keep their own ways, and nothing is written that another thread could see.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from offramp.errors import WidthError
from offramp.nn.multiexit import head_key

__all__ = ["Fit", "Gear", "Own", "Rig", "Runs", "SlimLayer", "cut", "plain_", "rig_", "store_key"]

Runs = tuple[tuple[int, int], ...]
"""(start, stop) of channels that are kept, in order."""
Picks = tuple[tuple[int, Runs], ...]
"""Dimensions of a tensor, and what is kept of each."""

_AT: ContextVar[Mapping["Gear", float]] = ContextVar("offramp_width", default=MappingProxyType({}))


class Gear:
    """The width of one network, which all its layers look at: a default, and an override by thread or task."""

    def __init__(self, widths: Sequence[float]) -> None:
        self.widths = tuple(widths)
        self.default = 1.0

    @property
    def width(self) -> float:
        return _AT.get().get(self, self.default)

    @contextmanager
    def at(self, width: float) -> Iterator[None]:
        token = _AT.set({**_AT.get(), self: width})
        try:
            yield
        finally:
            _AT.reset(token)

    def known(self, width: float, where: str) -> float:
        """The width as the network has it; WidthError where it has none such."""
        if width not in self.widths:
            raise WidthError(expected=f"one of the widths {list(self.widths)}", got=repr(width), where=where,
                             todo="net.add_width_(width) adds one")
        return float(width)


@dataclass(frozen=True)
class Fit:
    """What a layer is at one width."""

    picks: Mapping[str, Picks]
    """Its own parameters and buffers of which a part is kept."""
    attributes: Mapping[str, Any]
    store: str
    """The submodule whose tensors it takes at this width instead of slices (:class:`Own`); '' where it takes none."""


class Own(nn.Module):
    """The parameters and statistics that a norm has at one width alone."""


def store_key(width: float) -> str:
    """The submodule of a norm that holds its tensors at a width.

    >>> store_key(0.25)
    'at_0:25'
    """
    return f"at_{head_key(str(width))}"


class _Held:
    """Slices as dense tensors, kept while gradients are off: libraries copy a slice at every call otherwise."""

    def __init__(self) -> None:
        self._held: dict[tuple[float, str], tuple[StorageWeakRef, Any, Tensor]] = {}

    def __deepcopy__(self, memo: Any) -> "_Held":
        return _Held()

    def clear(self) -> None:
        self._held.clear()

    def cut(self, whole: Tensor, picks: Picks, width: float, name: str) -> Tensor:
        if type(whole) is not nn.Parameter or whole.is_inference():
            return cut(whole, picks)
        # A weak reference to a storage keeps its address from being given to another one.
        key = (whole._version, whole.data_ptr(), whole.dtype)
        storage = whole.untyped_storage()
        found = self._held.get((width, name))
        if found is not None and found[0].cdata == storage._cdata and found[1] == key:
            return found[2]
        with torch.inference_mode(False), torch.no_grad():
            made = cut(whole.detach(), picks)
            if type(made) is not Tensor or made.is_meta:  # a mode gave something that must not outlive it
                return made
            if not made.is_contiguous():
                made = made.clone()  # dense, in the order of dimensions that the whole has
        self._held[width, name] = StorageWeakRef(storage), key, made
        return made


@dataclass
class Rig:
    """What makes a layer slim; hangs on it as ``_offramp_rig``."""

    gear: Gear
    kind: type[nn.Module]
    """The class that the layer had."""
    fits: dict[float, Fit | None] = field(default_factory=dict)
    """By width; None where the layer is the same as at full width."""
    held: _Held = field(default_factory=_Held)


class SlimLayer(nn.Module):
    """What a slim layer is besides being of its own class."""

    _offramp_rig: Rig
    _offramp_whole: ClassVar[bool] = False
    """Whether forward is the class's own at every width, and only parameters are cut."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rig = self._offramp_rig
        width = rig.gear.width
        fit = rig.fits.get(width)
        if fit is None or self._offramp_whole:
            return super().forward(*args, **kwargs)
        if not self.training and not torch.is_grad_enabled():
            if rig.kind is nn.Conv2d and self.padding_mode == "zeros":
                return _conv2d(self, rig, fit, width, *args, **kwargs)
            if rig.kind is nn.BatchNorm2d and self.track_running_stats:
                return _batch_norm2d(self, fit, *args, **kwargs)
        return rig.kind.forward(_shell(self, rig, fit, width), *args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        self._offramp_rig.held.clear()  # writes through ``.data`` are counted nowhere: none lies between two slices
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._offramp_rig.held.clear()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]


def _shell(layer: nn.Module, rig: Rig, fit: Fit, width: float) -> nn.Module:
    state = dict(vars(layer))
    state.update(fit.attributes)
    if fit.store:
        store = layer._modules[fit.store]
        assert store is not None
        state["_parameters"], state["_buffers"] = store._parameters, store._buffers
    else:
        parameters: dict[str, Any] = dict(layer._parameters)
        keep = not layer.training and not torch.is_grad_enabled()
        for name, picks in fit.picks.items():
            whole = parameters[name]
            if whole is not None:
                parameters[name] = rig.held.cut(whole, picks, width, name) if keep else cut(whole, picks)
        state["_parameters"] = parameters
    shell: nn.Module = object.__new__(rig.kind)
    object.__setattr__(shell, "__dict__", state)
    return shell


# A shell costs 2 us. These two are most of a network's layers, and at inference their forwards are no more than this.


def _conv2d(layer: Any, rig: Rig, fit: Fit, width: float, input: Tensor) -> Tensor:
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if "weight" in fit.picks:
        weight = rig.held.cut(weight, fit.picks["weight"], width, "weight")
    if bias is not None and "bias" in fit.picks:
        bias = rig.held.cut(bias, fit.picks["bias"], width, "bias")
    groups = fit.attributes.get("groups", layer.groups)
    return nn.functional.conv2d(input, weight, bias, layer.stride, layer.padding, layer.dilation, groups)


def _batch_norm2d(layer: Any, fit: Fit, input: Tensor) -> Tensor:
    own = layer._modules[fit.store]
    held, learned = own._buffers, own._parameters
    return nn.functional.batch_norm(input, held["running_mean"], held["running_var"], learned["weight"],
                                    learned["bias"], False, 0.0, layer.eps)


def cut(whole: Tensor, picks: Picks) -> Tensor:
    """The kept part: a view where each dimension keeps one run, else a copy, through which gradients flow.

    >>> cut(torch.arange(6).view(2, 3), ((0, ((0, 1),)), (1, ((0, 1), (2, 3)))))
    tensor([[0, 2]])
    """
    for dim, runs in sorted(picks, key=lambda pick: len(pick[1])):  # what is copied, is copied when it is small
        parts = [whole.narrow(dim, start, stop - start) for start, stop in runs]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return whole


_classes: dict[Any, type[nn.Module]] = {}
_lock = threading.Lock()


def rig_(layer: nn.Module, gear: Gear, cut_here: Sequence[str] = ()) -> Rig:
    """Make a layer slim, in place. cut_here: parameters and buffers that others read off it, cut where they are read.

    With these the layer's own forward runs on the layer itself, at every width.
    """
    kind = type(layer)
    with _lock:
        key = (kind, tuple(sorted(cut_here)))
        if key not in _classes:
            members: dict[str, Any] = {name: property(_reader(name)) for name in cut_here}
            # the module of its class: tracers tell torch's own layers by it
            members |= {"__module__": kind.__module__, "_offramp_whole": bool(cut_here)}
            _classes[key] = type(f"Slim{kind.__name__}", (SlimLayer, kind), members)
    rig = Rig(gear, kind)
    layer._offramp_rig = rig  # type: ignore[assignment]
    layer.__class__ = _classes[key]
    return rig


def _reader(name: str) -> Any:
    def read(self: SlimLayer) -> Tensor | None:
        rig = self._offramp_rig
        whole = self._parameters[name] if name in self._parameters else self._buffers[name]
        fit = rig.fits.get(rig.gear.width)
        return whole if fit is None or whole is None or name not in fit.picks else cut(whole, fit.picks[name])

    return read


def plain_(layer: nn.Module, width: float, memo: dict[Any, nn.Parameter]) -> None:
    """Make a slim layer the plain one that it is at a width, in place. memo: parameters made so far; tied ones stay."""
    rig: Rig = vars(layer)["_offramp_rig"]
    fit = rig.fits.get(width)
    del layer._offramp_rig
    layer.__class__ = rig.kind
    stores = {known.store: layer._modules.pop(known.store) for known in rig.fits.values() if known and known.store}
    if fit is None:
        return
    if fit.store:
        store = stores[fit.store]
        assert store is not None
        layer._parameters.update(store._parameters)
        layer._buffers.update(store._buffers)
    for name, picks in fit.picks.items() if not fit.store else ():
        whole = layer._parameters.get(name)
        if whole is not None:
            if (whole, picks) not in memo:
                memo[whole, picks] = nn.Parameter(cut(whole.detach(), picks).clone(), whole.requires_grad)
            layer._parameters[name] = memo[whole, picks]
        elif (buffer := layer._buffers.get(name)) is not None:
            layer._buffers[name] = cut(buffer, picks).clone()
    vars(layer).update(fit.attributes)

"""Which part of a layer is kept at a width: from the axes of a channel plan to slices and numbers of channels."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from offramp.graph.channels import ChannelPlan, Layer
from offramp.nn._slim_layers import Fit, Own, Picks, Runs, cut, store_key

__all__ = ["KINDS", "NORMS", "Part", "fit_of", "own_of", "refusal"]

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "conv": (_ConvNd,), "linear": (nn.Linear,), "norm": (*NORMS, nn.PReLU),
}
_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}

Part = tuple[str, Layer]
"""What of a module a layer of the plan is about: a parameter's name, or '' for the module as a whole."""


def refusal(module: nn.Module, parts: Sequence[Part]) -> str:
    """Why a module cannot be cut as planned; nothing where it can."""
    named = {name for name, _ in parts if name}
    whole = [layer for name, layer in parts if not name]
    if len(whole) > 1:
        return "is planned as two layers"
    if "forward" in vars(module):
        return "has a forward of its own on the object, around which nobody can see"
    for layer in whole:
        if not isinstance(module, KINDS[layer.kind]):
            return f"is none of torch's {layer.kind} layers, nor made from one"
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) != 1:
            return f"normalises {len(module.normalized_shape)} dimensions at once"
        if layer.kind != "norm" and module._parameters.get("weight") is None:
            return "computes its weight (parametrised, or by a hook)"
        tensors = {**module._parameters, **module._buffers}
        odd = sorted(name for name, held in tensors.items()
                     if name not in _TENSORS | named and held is not None and held.numel() > 1)
        if odd:
            return f"holds {', '.join(odd)}, of which nobody knows the channels"
    return ""


def fit_of(module: nn.Module, parts: Sequence[Part], plan: ChannelPlan, width: float) -> Fit | None:
    """What a module is at a width; None where that is what it is at full width. ValueError where no slice does it."""
    picks: dict[str, Picks] = {}
    attributes: dict[str, Any] = {}
    private = False
    for name, layer in parts:
        gives, kept = plan.runs(layer.gives, width), plan.count(layer.gives, width)
        total = plan.count(layer.gives, 1.0)
        if name:
            picks[name] = ((layer.dim, gives),)
        elif isinstance(module, _ConvNd):
            reads = plan.runs(layer.reads, width)
            kept_groups, inner, outer = module.groups, reads, gives
            if module.groups > 1:
                groups, inner = by_group(reads, module.in_channels, module.groups)
                same, outer = by_group(gives, module.out_channels, module.groups)
                if groups != same:
                    raise ValueError(f"it would read the groups {groups} and give {same}")
                kept_groups = len(groups)
            turned = isinstance(module, _ConvTransposeNd)
            picks["weight"] = ((0, reads), (1, outer)) if turned else ((0, gives), (1, inner))
            picks["bias"] = ((0, gives),)
            attributes |= {"in_channels": plan.count(layer.reads, width), "out_channels": kept, "groups": kept_groups}
        elif isinstance(module, nn.Linear):
            picks |= {"weight": ((0, gives), (1, plan.runs(layer.reads, width))), "bias": ((0, gives),)}
            attributes |= {"in_features": plan.count(layer.reads, width), "out_features": kept}
        else:
            tensors = {**module._parameters, **module._buffers}
            private = isinstance(module, NORMS) and any(held is not None for held in tensors.values())
            picks |= {key: ((0, gives),) for key, held in tensors.items() if held is not None and held.ndim == 1}
            if isinstance(module, _NormBase):
                attributes["num_features"] = kept
            elif isinstance(module, nn.PReLU):
                attributes["num_parameters"] = kept
            elif isinstance(module, nn.GroupNorm):
                groups, _ = by_group(gives, total, module.num_groups)
                attributes |= {"num_channels": kept, "num_groups": len(groups)}
            else:
                attributes["normalized_shape"] = (kept,)
    picks = {name: true for name, one in picks.items() if (true := _narrowing(module, name, one))}
    attributes = {name: value for name, value in attributes.items() if getattr(module, name) != value}
    return Fit(picks, attributes, store_key(width) if private else "") if picks or attributes or private else None


def by_group(runs: Runs, channels: int, groups: int) -> tuple[tuple[int, ...], Runs]:
    """Which groups of channels are kept, and what of each, which must be the same of all.

    >>> by_group(((0, 2), (4, 6)), 8, 2)
    ((0, 1), ((0, 2),))
    """
    size = channels // groups
    found: dict[int, list[tuple[int, int]]] = {}
    for start, stop in runs:
        for group in range(start // size, (stop - 1) // size + 1):
            low, high = max(start, group * size), min(stop, (group + 1) * size)
            found.setdefault(group, []).append((low - group * size, high - group * size))
    inner = {tuple(each) for each in found.values()}
    if len(inner) != 1:
        raise ValueError(f"its {groups} groups would keep different channels: {sorted(inner)}")
    return tuple(found), inner.pop()


def own_of(module: nn.Module, wider: Fit | None, source: nn.Module, fit: Fit) -> Own:
    """A norm's private tensors at a width, as copies of those of the next wider one, ``source``."""
    made = Own()
    for registry, register in ((source._parameters, made.register_parameter), (source._buffers, made.register_buffer)):
        for name, held in registry.items():
            if held is None:
                register(name, None)
                continue
            picks = fit.picks.get(name, ())
            before = wider.picks.get(name, ()) if wider is not None else ()
            if picks and before:
                picks = tuple((dim, within(runs, dict(before)[dim])) for dim, runs in picks)
            small: Any = cut(held.detach(), picks).clone()
            register(name, nn.Parameter(small, held.requires_grad) if isinstance(held, nn.Parameter) else small)
    made._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    made.training = module.training
    return made


def within(runs: Runs, wider: Runs) -> Runs:
    """Where the channels that are kept lie among those that a greater width keeps.

    >>> within(((0, 2), (8, 9)), ((0, 4), (8, 12)))
    ((0, 2), (4, 5))
    """
    found = []
    for start, stop in runs:
        before = 0
        for low, high in wider:
            if low <= start and stop <= high:
                found.append((before + start - low, before + stop - low))
            before += high - low
    assert sum(b - a for a, b in found) == sum(b - a for a, b in runs), "a narrower network is part of a wider one"
    return tuple(found)


def _narrowing(module: nn.Module, name: str, picks: Picks) -> Picks:
    """The picks that leave something out."""
    held = module._parameters[name] if name in module._parameters else module._buffers.get(name)
    if held is None:
        return ()
    return tuple((dim, runs) for dim, runs in picks if runs != ((0, held.shape[dim]),))


"""Layer Cascade (Li et al. 2017), the baseline that MESS compares with: every pixel leaves by itself.

A second bridge beside ``record``: a pixel's exit is not a sum over images, so no table can say what it costs.
T lists of thresholds, n images of a batch, E exits with the backbone, H W space.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from offramp.cost.fields import Fields, fields
from offramp.cost.macs import count
from offramp.errors import DataError, OfframpError, PlanError
from offramp.functional.confidence import BY_NAME, read
from offramp.functional.metrics import confusion, mean_iou
from offramp.graph import State
from offramp.nn.guest import evaluating
from offramp.nn.multiexit import MultiExit

__all__ = ["CascadePoint", "LayerCascade", "field_share", "layer_cascade"]


@dataclass(frozen=True, kw_only=True)
class CascadePoint:
    """What one list of thresholds does to the data."""

    thresholds: tuple[float, ...]
    miou: float
    """Of the label maps composed of every pixel's own exit."""
    macs: float
    """Mean per image: every layer and head at the places that somebody needs, nowhere else."""
    shares: tuple[float, ...]
    """Of the pixels, by the exit that they left at, the backbone last."""


@dataclass(frozen=True, kw_only=True)
class LayerCascade:
    """A curve of Layer Cascade, beside the untouched backbone."""

    exits: tuple[str, ...]
    confidence: str
    points: tuple[CascadePoint, ...]
    """In the order of the thresholds given."""
    backbone_miou: float
    backbone_macs: int
    """Per image, of the largest that was seen."""
    images: int
    unknown: Mapping[str, int] = field(default_factory=dict)
    """Ops that count as reading all of their inputs, since nothing says what they read."""

    def cheapest(self, max_drop: float = 0.01) -> CascadePoint | None:
        """The point of fewest MACs whose mIoU is at most ``max_drop`` below the backbone's, if any."""
        good = [one for one in self.points if one.miou >= self.backbone_miou - max_drop]
        return min(good, key=lambda one: one.macs, default=None)


def layer_cascade(
    net: MultiExit, loader: Any, *, exits: Sequence[str], thresholds: Sequence[float | Sequence[float]],
    confidence: str = "top", device: torch.device | str | None = None, batch_size: int = 8,
) -> LayerCascade:
    """Evaluate per-pixel exits at many thresholds in one pass over labelled data, and count what they cost.

    A pixel keeps the label of the first exit that is at least as sure of it as that exit's threshold; the others go
    on. Costs are analytic, as in MESS 6.2: nothing runs sparsely here. A layer is computed at the places within the
    receptive field of a pixel that some later exit is still asked about (``cost.fields``), and the heads likewise, so
    that this is a bound that an implementation without any overhead would reach.

    loader: batches of ``(images, labels (n, H, W))``, or a ``Dataset`` of such pairs.
    exits: names of columns by depth, the backbone's left out.
    thresholds: each a number for all exits or one for each. Above 1 an exit keeps no pixel; at 0 it keeps all.
    confidence: ``top``, ``margin`` or ``entropy``.

    PlanError for unknown or disordered exits and wrong thresholds; DataError where labels are missing or do not fit.
    """
    names, lists = _checked(net, exits, thresholds, confidence)
    home = next((p.device for p in net.parameters()), torch.device("cpu"))
    target = torch.device(device) if device is not None else home
    wanted = torch.tensor(lists, dtype=torch.float64, device=target)
    matrices = torch.zeros(len(lists) + 1, net.num_classes, net.num_classes, dtype=torch.int64, device=target)
    left = torch.zeros(len(lists), len(names) + 1, dtype=torch.int64, device=target)
    macs = torch.zeros(len(lists), dtype=torch.float64, device=target)
    recorded: dict[tuple[int, ...], Fields] = {}
    images = dense = 0
    try:
        net.to(target)
        with evaluating(net):
            for x, labels in _pairs(loader, batch_size):
                x, labels = x.to(target), labels.to(target)
                readings = [read(one, (confidence,), labels=True) for one in _said(net, names, x)]
                if (shape := tuple(x.shape[1:])) not in recorded:  # traced by now, which would count too
                    dense = max(dense, count(_said, net, (), x[:1]).total)
                    with torch.inference_mode(False):  # a clone made here may be written to by the network
                        recorded[shape] = fields(lambda one: _said(net, names, one), x[:1].clone())
                for row, truth in enumerate(labels):
                    says = [(one.scores[confidence][row], cast(Tensor, one.labels)[row]) for one in readings]
                    composed, asked = _compose(says, wanted)
                    if composed.shape[1:] != truth.shape:
                        raise DataError(expected=f"labels {tuple(composed.shape[1:])}, as large as the logits",
                                        got=str(tuple(truth.shape)), where=f"layer_cascade(), image {images}")
                    said = torch.cat([composed, says[-1][1][None].long()])
                    matrices += confusion(said, truth.expand(len(said), -1, -1), net.num_classes)
                    macs += recorded[shape].needed(*asked).macs
                    still = torch.stack([one.flatten(1).sum(1) for one in asked], 1)
                    left += still - torch.cat([still[:, 1:], torch.zeros_like(still[:, :1])], 1)
                    images += 1
    finally:
        net.to(home)
    if not images:
        raise DataError(expected="at least one labelled image", got="none", where="layer_cascade()")
    mious = mean_iou(matrices).tolist()
    shares = (left.double() / left.sum(1, keepdim=True)).tolist()
    return LayerCascade(
        exits=names, confidence=confidence, images=images, backbone_miou=mious[-1],
        backbone_macs=dense,
        unknown={name: calls for one in recorded.values() for name, calls in one.unknown.items()},
        points=tuple(CascadePoint(thresholds=tuple(t), miou=m, macs=c / images, shares=tuple(s))
                     for t, m, c, s in zip(lists, mious, macs.tolist(), shares, strict=False)),
    )


def field_share(net: MultiExit, site: str, x: Tensor, at: tuple[int, int] | None = None) -> float:
    """Share of the feature volume at a site that one pixel of the output reads, ``at`` (row, column) or the middle.

    A tensor that the rest reads nothing of but its size does not count. MESS (6.2) says up to 45 % at the first exit
    of its nets with an FCN head, and 100 % with DeepLabV3's.
    """
    found = [k for k, one in enumerate(net.sites) if one.name == site]
    if not found:
        raise PlanError(expected=f"one of the sites {[s.name for s in net.sites]}", got=repr(site),
                        where="field_share()")
    with evaluating(net), torch.inference_mode(False), torch.no_grad():
        state: Any = net.begin(x[:1].clone())
        for stage in net.stages[: found[0] + 1]:
            state = stage(state)

        def rest(*tensors: Tensor) -> Tensor:
            after: Any = replace(cast(State, state), tensors=tensors)
            for stage in net.stages[found[0] + 1 :]:
                after = stage(after)
            return net.logits(after)

        recorded = fields(rest, *state.tensors)
        size = recorded.ops[recorded.outputs[0]].size
        want = torch.zeros(2, *size, dtype=torch.bool, device=x.device)
        want[(0, *(at or (size[0] // 2, size[1] // 2)))] = want[1] = True
        needed = recorded.needed(want).inputs
    part = whole = 0.0
    for mask, tensor in zip(needed, state.tensors, strict=True):
        if bool(mask[1].any()):
            part, whole = part + float(mask[0].double().mean()) * tensor[0].numel(), whole + tensor[0].numel()
    return part / whole


def _said(net: MultiExit, names: Sequence[str], x: Tensor) -> list[Tensor]:
    """Logits of the chosen exits and of the backbone; no other head runs."""
    state: Any = net.begin(x)
    said = []
    for k, stage in enumerate(net.stages):
        state = stage(state)
        if k < len(net.sites):
            here = [net.columns[c].name for c in net.columns_at(k)]
            said += [net.head(name)(*state.tensors) for name in here if name in names]
    return [*said, net.logits(state)]


def _compose(says: Sequence[tuple[Tensor, Tensor]], wanted: Tensor) -> tuple[Tensor, list[Tensor]]:
    """From each exit's confidences and labels (H, W): label maps (T, H, W), and the pixels that each exit is asked."""
    asked = [torch.ones(len(wanted), *says[0][0].shape, dtype=torch.bool, device=wanted.device)]
    composed = says[-1][1].long().expand(len(wanted), -1, -1).clone()
    for k, (sure, label) in enumerate(says[:-1]):
        keeps = asked[-1] & (sure.double() >= wanted[:, k, None, None])
        composed = torch.where(keeps, label.long(), composed)
        asked.append(asked[-1] & ~keeps)
    return composed, asked


def _checked(net: MultiExit, exits: Sequence[str], thresholds: Sequence[float | Sequence[float]], confidence: str
             ) -> tuple[tuple[str, ...], list[list[float]]]:
    known, where = [column.name for column in net.columns[:-1]], "layer_cascade()"
    if net.task != "dense":
        raise OfframpError(expected="a dense network", got=net.task, where=where,
                           todo="a network that gives one answer an image has image-level exits alone")
    depths = [next((k for k in range(len(net.sites)) for c in net.columns_at(k) if known[c] == name), -1)
              for name in exits]
    if not depths or -1 in depths or any(b <= a for a, b in zip(depths, depths[1:], strict=False)):
        raise PlanError(expected=f"exits by depth, one a site, from {known}", got=f"{list(exits)}", where=where)
    if confidence not in BY_NAME:
        raise PlanError(expected=f"a confidence among {', '.join(BY_NAME)}", got=repr(confidence), where=where)
    lists = [[float(t)] * len(exits) if isinstance(t, int | float) else [float(one) for one in t] for t in thresholds]
    if not lists or any(len(one) != len(exits) or any(t != t for t in one) for one in lists):
        raise PlanError(expected=f"thresholds, each a number or {len(exits)} numbers", got=f"{list(thresholds)}",
                        where=where)
    return tuple(exits), lists


def _pairs(loader: Any, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        loader = DataLoader(loader, batch_size=batch_size)
    for batch in loader:
        if not (isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
            raise DataError(expected="batches of (images, labels)", got=type(batch).__name__, where="layer_cascade()",
                            todo="mIoU needs labels; take a split that has them")
        yield batch[0], batch[1]

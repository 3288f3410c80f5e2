"""How sure logits are, in [0, 1]; larger is surer. N samples, K classes, H W space.

All three take (N, K) or (N, K, H, W), score over K, and compute in at least float32, so that a bfloat16 network and
its table are scored alike. They run on the logits' own device and never look for NaN: whoever decides does that once.

All come from the largest logit and the sum of exponentials around it, which one pass over the logits finds. On a CPU
pixels are passed plane by plane, each a class: in the order of memory, vectorised, and scored with the same bits
whatever the batch, the layout and the number of threads.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.errors import OfframpError

__all__ = ["BY_NAME", "Reading", "entropy", "margin", "read", "top"]

_LOWEST = -200.0  # whose exp is 0 in float32 and nothing beside 1 in float64; and 0 * it is 0, as 0 * -inf is not
_ROOM = 1 << 22  # logits read at a time: what is held besides them is as large


def top(logits: Tensor) -> Tensor:
    """Probability of the likeliest class (the label-free paper, 3.3): (N, K, ...) -> (N, ...).

    >>> top(torch.tensor([[0.0, 0.0], [50.0, 0.0]])).tolist()
    [0.5, 1.0]
    """
    return read(logits, ("top",)).scores["top"]


def margin(logits: Tensor) -> Tensor:
    """Probability of the likeliest class less that of the second: (N, K, ...) -> (N, ...).

    >>> margin(torch.tensor([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0]])).tolist()
    [0.0, 1.0]
    """
    return read(logits, ("margin",)).scores["margin"]


def entropy(logits: Tensor) -> Tensor:
    r"""One minus the normalised entropy of the softmax: (N, K, ...) -> (N, ...).

    .. math:: c_n = 1 + \frac{1}{\log K} \sum_k p_{nk} \log p_{nk}

    BranchyNet (arXiv:1709.01686) leaves when the entropy itself is small; we turn the sign and divide by log K, so
    that one threshold means the same for 10 classes and for 1000. Rounding is clamped away; NaN is kept.

    >>> entropy(torch.tensor([[0.0, 0.0], [500.0, 0.0]])).tolist()
    [0.0, 1.0]
    """
    return read(logits, ("entropy",)).scores["entropy"]


BY_NAME: dict[str, Callable[[Tensor], Tensor]] = {"top": top, "margin": margin, "entropy": entropy}
"""What a plan's JSON may call a confidence; a dense one's also those of ``types.EDGED``."""


@dataclass(frozen=True)
class Reading:
    """What one pass over logits (N, K, ...) finds."""

    scores: dict[str, Tensor]
    """Each confidence asked for, (N, ...)."""
    labels: Tensor | None = None
    """The likeliest class (N, ...), the first of equals; uint8 up to 256 classes, else int16."""
    probs: Tensor | None = None
    """Mean probabilities over space (N, K), float32 or wider; rounded as the batch has it."""


def read(logits: Tensor, names: Collection[str], *, labels: bool = False, probs: bool = False) -> Reading:
    """Score logits (N, K, ...) by several confidences at once; for pixels, labels and mean probabilities as well.

    The scores are those of ``top``, ``margin`` and ``entropy``, to the last bit; ``probs`` are so but for rounding.
    """
    if logits.ndim not in (2, 4) or logits.shape[1] < 2:
        raise OfframpError(
            expected="logits (N, K) or (N, K, H, W) with K >= 2", where="confidence",
            got=f"shape {tuple(logits.shape)}",
            todo="score one exit at a time: top(logits_NEK[:, e]).",
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # a compiler fuses whole reductions, a GPU would wait for the launch of each plane
    if logits.ndim == 2 or logits.device.type != "cpu" or torch.compiler.is_compiling():
        return _whole(logits, names, labels, probs)
    groups = logits.split(max(1, _ROOM // max(1, logits[:1].numel())))
    parts = [_planes(group.contiguous(), names, labels, probs) for group in groups]
    return parts[0] if len(parts) == 1 else Reading(
        {name: torch.cat([part.scores[name] for part in parts]) for name in parts[0].scores},
        torch.cat([part.labels for part in parts if part.labels is not None]) if labels else None,
        torch.cat([part.probs for part in parts if part.probs is not None]) if probs else None,
    )


def _planes(logits: Tensor, names: Collection[str], labels: bool, probs: bool) -> Reading:
    classes = logits.shape[1]
    largest = logits[:, 0].clone()
    second = torch.full_like(largest, -torch.inf) if "margin" in names else None
    said = torch.zeros(largest.shape, dtype=_label_type(classes)) if labels else None
    for k in range(1, classes):
        plane = logits[:, k]
        if said is not None:  # the last class that beats all before it
            torch.maximum(said, (plane > largest).to(said.dtype).mul_(k), out=said)
        if second is not None:
            torch.maximum(second, torch.minimum(plane, largest), out=second)
        torch.maximum(largest, plane, out=largest)
    if not names and not probs:
        return Reading({}, said)
    total, spread = torch.zeros_like(largest), torch.zeros_like(largest)
    below, weight = torch.empty_like(largest), torch.empty_like(largest)
    weights = torch.empty_like(logits) if probs else None
    for k in range(classes):
        torch.sub(logits[:, k], largest, out=below)
        torch.exp(below, out=weight)
        total.add_(weight)
        if weights is not None:
            weights[:, k] = weight
        if "entropy" in names:
            spread.addcmul_(weight, below.clamp_(min=_LOWEST))
    mean = None
    if weights is not None:
        share = (1 / total).flatten(1) / total.shape[1:].numel()
        mean = torch.bmm(weights.flatten(2), share[:, :, None])[:, :, 0]
    return Reading(_scores(names, largest, second, total, spread, classes), said, mean)


def _whole(logits: Tensor, names: Collection[str], labels: bool, probs: bool) -> Reading:
    largest, said = logits.amax(dim=1, keepdim=True), None
    if labels:
        said = logits.max(dim=1).indices.to(_label_type(logits.shape[1]))
    second = logits.topk(2, dim=1).values[:, 1] if "margin" in names else None
    below = logits - largest
    weights = below.exp()
    total = weights.sum(dim=1)
    spread = (weights * below.clamp(min=_LOWEST)).sum(dim=1) if "entropy" in names else total
    mean = (weights / total[:, None]).flatten(2).mean(dim=2) if probs else None
    return Reading(_scores(names, largest[:, 0], second, total, spread, logits.shape[1]), said, mean)


def _scores(names: Collection[str], largest: Tensor, second: Tensor | None, total: Tensor, spread: Tensor,
            classes: int) -> dict[str, Tensor]:
    scores = {}
    if "top" in names:
        scores["top"] = 1 / total
    if second is not None:
        scores["margin"] = (1 - (second - largest).exp()) / total
    if "entropy" in names:  # log of the sum less the mean of what was summed: -sum p log p
        scores["entropy"] = (1 - (total.log() - spread / total) / math.log(classes)).clamp(0.0, 1.0)
    return scores


def _label_type(classes: int) -> torch.dtype:
    return torch.uint8 if classes <= 256 else torch.int16

"""How sure logits are, in [0, 1]; larger is surer. N samples, K classes, H W space.

All three take (N, K) or (N, K, H, W), score over K, and compute in at least float32, so that a bfloat16 network and
its table are scored alike. They run on the logits' own device and never look for NaN: whoever decides does that once.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from offramp.errors import OfframpError

__all__ = ["BY_NAME", "entropy", "margin", "top"]


def top(logits: Tensor) -> Tensor:
    """Probability of the likeliest class (the label-free paper, 3.3): (N, K, ...) -> (N, ...).

    >>> top(torch.tensor([[0.0, 0.0], [50.0, 0.0]])).tolist()
    [0.5, 1.0]
    """
    return _probs(logits).amax(dim=1)


def margin(logits: Tensor) -> Tensor:
    """Probability of the likeliest class less that of the second: (N, K, ...) -> (N, ...).

    >>> margin(torch.tensor([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0]])).tolist()
    [0.0, 1.0]
    """
    two = _probs(logits).topk(2, dim=1).values
    return two[:, 0] - two[:, 1]


def entropy(logits: Tensor) -> Tensor:
    r"""One minus the normalised entropy of the softmax: (N, K, ...) -> (N, ...).

    .. math:: c_n = 1 + \frac{1}{\log K} \sum_k p_{nk} \log p_{nk}

    BranchyNet (arXiv:1709.01686) leaves when the entropy itself is small; we turn the sign and divide by log K, so
    that one threshold means the same for 10 classes and for 1000. Rounding is clamped away; NaN is kept.

    >>> entropy(torch.tensor([[0.0, 0.0], [500.0, 0.0]])).tolist()
    [0.0, 1.0]
    """
    probs = _probs(logits)
    spread: Tensor = torch.special.entr(probs).sum(dim=1)
    return (1 - spread / math.log(probs.shape[1])).clamp(0.0, 1.0)


BY_NAME: dict[str, Callable[[Tensor], Tensor]] = {"top": top, "margin": margin, "entropy": entropy}
"""What a plan's JSON may call a confidence."""


def _probs(logits: Tensor) -> Tensor:
    if logits.ndim not in (2, 4) or logits.shape[1] < 2:
        raise OfframpError(
            expected="logits (N, K) or (N, K, H, W) with K >= 2", where="confidence",
            got=f"shape {tuple(logits.shape)}",
            todo="score one exit at a time: top(logits_NEK[:, e]).",
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)

"""Which places of a dense prediction go on, and what stands in for the features of those that do not.

ADP-C (arXiv:2104.00749), 3.4. N samples, K classes, C channels, H W space; a mask (N, 1, H, W) is true where a place is
*active*, that is, where the network still computes; elsewhere its prediction is settled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.errors import OfframpError
from offramp.functional.confidence import BY_NAME

__all__ = ["Band", "CRITERIA", "Criterion", "REACHES", "Reach", "active", "band", "interpolate"]

Criterion = Literal["top", "entropy", "margin", "value", "random"]
CRITERIA: tuple[Criterion, ...] = ("top", "entropy", "margin", "value", "random")
Reach = Literal["everywhere", "halo"]
REACHES: tuple[Reach, ...] = ("everywhere", "halo")

_RADIUS = 3


def active(
    logits: Tensor, criterion: Criterion = "top", threshold: float | None = None, *, share: float | None = None,
    generator: torch.Generator | None = None, grid: int = 0,
) -> Tensor:
    """Which places of dense logits (or heatmaps) go on: (N, K, H, W) -> bool (N, 1, H, W).

    criterion: ``top``, ``entropy`` and ``margin``, the confidences of this package, settle a place that reaches
    ``threshold`` (the paper's eq. 1). ``value``, for heatmaps, settles it where its largest channel is *below*
    ``threshold``: nothing is there. With ``share`` in place of a threshold that share of each sample's places is
    settled, rounded, the surest first; ``random`` takes any, drawn by ``generator``, and needs a share.
    grid: places whose row and column are multiples of it stay active, so that what is interpolated has something to
    read everywhere (the prior of arXiv:2003.08866); 0 for none.
    What is not a number is never settled. OfframpError where not one of ``threshold`` and ``share`` is given.

    >>> active(torch.tensor([[[[0.0, 9.0]], [[0.0, 0.0]]]]), threshold=0.998).tolist()
    [[[[True, False]]]]
    """
    if logits.ndim != 4:
        raise OfframpError(expected="dense logits (N, K, H, W)", got=f"shape {tuple(logits.shape)}", where="active()")
    if criterion not in CRITERIA:
        raise OfframpError(expected=f"a criterion of {list(CRITERIA)}", got=repr(criterion), where="active()")
    if (threshold is None) == (share is None) or (criterion == "random" and share is None):
        raise OfframpError(expected="a share" if criterion == "random" else "a threshold or a share, one of them",
                           got=f"threshold={threshold}, share={share}", where=f"active({criterion!r})")
    if grid < 0 or (share is not None and not 0 <= share <= 1):
        raise OfframpError(expected="grid >= 0 and a share in [0, 1]", got=f"{grid} and {share}", where="active()")
    score = _score(logits.detach(), criterion, generator)
    if share is None:
        assert threshold is not None
        # the value of a heatmap is turned over, so that larger is surer; "below" stays strict
        mask = ~(score > -threshold) if criterion == "value" else ~(score >= threshold)
    else:
        flat = torch.nan_to_num(score.flatten(1), nan=-torch.inf)
        surest = flat.argsort(dim=1, descending=True, stable=True)[:, : round(share * flat.shape[1])]
        mask = torch.ones_like(flat, dtype=torch.bool).scatter_(1, surest, False).view(score.shape)
        mask |= score.isnan()
    if grid:
        mask[:, ::grid, ::grid] = True
    return mask[:, None]


def _score(logits: Tensor, criterion: Criterion, generator: torch.Generator | None) -> Tensor:
    """(N, H, W), larger is surer."""
    if criterion == "value":
        return -logits.amax(1)
    if criterion == "random":
        at = generator.device if generator is not None else logits.device
        drawn = torch.rand(logits[:, 0].shape, generator=generator, device=at)
        return drawn.to(logits.device)
    confidence: Callable[[Tensor], Tensor] = BY_NAME[criterion]
    return confidence(logits)


@dataclass(frozen=True, eq=False)
class Band:
    """The inactive places of a mask that have active ones in their window, and which these are.

    Places are numbered through the samples, row by row. Maps that share a mask share a band.
    """

    places: Tensor
    """(P,) the places that are interpolated."""
    starts: Tensor
    """(P,) where each one's sources begin."""
    sources: Tensor
    """(M,) the active places that are read, one place's after another's."""
    owner: Tensor
    """(M,) which of the P reads it."""
    excess: Tensor
    """(M,) its squared distance, less that of the owner's nearest source."""

    def weights(self, lam: Tensor | float, dtype: torch.dtype = torch.float32) -> Tensor:
        """(M,) what each source counts, in all 1 for each place."""
        weights = (-torch.as_tensor(lam, dtype=dtype, device=self.excess.device) ** 2 * self.excess).exp()
        return weights / weights.new_zeros(len(self.places)).index_add(0, self.owner, weights)[self.owner]


def band(mask: Tensor, reach: Reach = "everywhere", *, within: Tensor | None = None) -> Band:
    """What :func:`interpolate` reads where, for a bool mask (N, 1, H, W); of places ``within`` one of them alone."""
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.dtype != torch.bool:
        raise OfframpError(expected="a bool mask (N, 1, H, W)", got=f"{mask.dtype} {tuple(mask.shape)}", where="band()")
    if reach not in REACHES:
        raise OfframpError(expected=f"a reach of {list(REACHES)}", got=repr(reach), where="band()")
    near = _RADIUS if reach == "everywhere" else 1
    size, width = 2 * _RADIUS + 1, mask.shape[3]
    beside = F.max_pool2d(mask.float(), 2 * near + 1, 1, near) > 0 if mask.numel() else mask
    beside = beside & ~mask if within is None else beside & ~mask & within
    places = beside.flatten().nonzero()[:, 0]
    windows = F.pad(mask[:, 0], (_RADIUS,) * 4).unfold(1, size, 1).unfold(2, size, 1)
    n, y, x = torch.unravel_index(places, mask[:, 0].shape)
    owner, at = windows[n, y, x].flatten(1).nonzero().unbind(1)
    down, right = at // size - _RADIUS, at % size - _RADIUS
    squares = down**2 + right**2
    nearest = squares.new_full((len(places),), 2 * size**2).scatter_reduce(0, owner, squares, "amin")
    counts = torch.bincount(owner, minlength=len(places))
    return Band(places, counts.cumsum(0) - counts, places[owner] + down * width + right, owner,
                squares - nearest[owner])


def interpolate(
    raw: Tensor, mask: Tensor, lam: Tensor | float, *, reach: Reach = "everywhere", band_: Band | None = None
) -> Tensor:
    r"""Keep a map's values at active places and set the others to a mean of the active ones around: (N, C, H, W).

    .. math:: f^*(p) = \frac{\sum_{s \in \Omega(p)} W(p, s) f(s)}{\sum_{s \in \Omega(p)} W(p, s)}, \quad
              W(p, s) = \exp(-\lambda^2 \|p - s\|_2^2)

    ADP-C (arXiv:2104.00749), 3.4: :math:`\Omega(p)` are the active places, p excluded, in the 7x7 window around p; 0
    where there are none. Both sums are over active places alone, as the mean needs it. Differentiable in ``raw`` and
    ``lam``; exact for any ``lam``, since weights are taken relative to the nearest source's, for those of eq. 3 are 0
    in float32 three places away.
    mask: bool (N, 1, H, W), true where active. reach: ``everywhere`` is the paper's; ``halo`` stops at the inactive
    places that touch an active one, by a corner too, and leaves 0 deeper inside: a 3x3 convolution reads no more than
    these at active places. band_: :func:`band` of this mask and reach, where it is known.

    >>> interpolate(torch.tensor([[[[2.0, 0.0, 6.0]]]]), torch.tensor([[[[True, False, True]]]]), 3.0)
    tensor([[[[2., 4., 6.]]]])
    """
    if raw.ndim != 4 or mask.shape != (raw.shape[0], 1, *raw.shape[2:]):
        raise OfframpError(expected="a map (N, C, H, W) and its mask (N, 1, H, W)", where="interpolate()",
                           got=f"{tuple(raw.shape)} and {tuple(mask.shape)}")
    found = band(mask, reach) if band_ is None else band_
    kept = torch.where(mask, raw, raw.new_zeros(()))
    if not len(found.places):
        return kept
    wide = torch.promote_types(raw.dtype, torch.float32)
    weights = found.weights(lam, wide)
    rows = raw.permute(0, 2, 3, 1).reshape(-1, raw.shape[1])
    filled = F.embedding_bag(found.sources, rows, found.starts, mode="sum",
                             per_sample_weights=weights.to(raw.dtype))
    n, y, x = torch.unravel_index(found.places, mask[:, 0].shape)
    last = not raw.is_contiguous() and raw.is_contiguous(memory_format=torch.channels_last)
    return kept.permute(0, 2, 3, 1).index_put((n, y, x), filled).permute(0, 3, 1, 2).contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format)

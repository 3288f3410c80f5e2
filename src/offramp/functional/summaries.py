"""What a dense exit says about each image, small enough to keep: the same code fills the table and runs live.

N samples, E exits, K classes, H W space, B = 1024 bins. An exit's pixel logits (N, K, H, W) become a histogram of
pixel confidence for each confidence, the mean pixel probabilities, and the share of pixels that agree with each
earlier exit. Everything a policy may see at decision time is here, and it is computed from logits alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.errors import DataError, OfframpError
from offramp.functional.confidence import BY_NAME
from offramp.types import CONFIDENCES, HISTOGRAM_BINS, Evidence

__all__ = ["DenseSummary", "evidence_of", "histogram", "mean_of_histogram", "share_above", "summarise"]


@dataclass(frozen=True, kw_only=True)
class DenseSummary:
    """One exit's summary of n images."""

    labels: Tensor
    """Predicted class of each pixel (n, H, W), int64; later exits agree or disagree with it."""
    histograms: Mapping[str, Tensor]
    """For each confidence, pixel counts (n, 1024) int32."""
    probs: Tensor
    """Mean pixel probabilities (n, K) float32."""

    def select(self, rows: Tensor) -> "DenseSummary":
        """The same for some rows: an index or a mask, as the batch shrinks."""
        return DenseSummary(
            labels=self.labels[rows], probs=self.probs[rows],
            histograms={name: counts[rows] for name, counts in self.histograms.items()},
        )


def histogram(confidence: Tensor) -> Tensor:
    """Count pixels by confidence: (n, ...) in [0, 1] -> (n, 1024) int32.

    Bin b holds [b/1024, (b+1)/1024), the last one 1.0 too. The width is a power of two, so that
    ``confidence * 1024`` is exact and no pixel lands beside its bin.

    >>> histogram(torch.tensor([[0.0, 0.5, 1.0]]))[0, [0, 512, 1023]].tolist()
    [1, 1, 1]
    """
    rows = confidence.shape[0]
    bins = (confidence.flatten(1) * HISTOGRAM_BINS).long().clamp_(0, HISTOGRAM_BINS - 1)
    bins += torch.arange(rows, device=bins.device)[:, None] * HISTOGRAM_BINS
    counts = torch.bincount(bins.flatten(), minlength=rows * HISTOGRAM_BINS)
    return counts.view(rows, HISTOGRAM_BINS).to(torch.int32)


def share_above(counts: Tensor, pixel_threshold: float) -> Tensor:
    """Share of pixels whose confidence is at least a bin edge: (n, 1024) counts -> (n,) float64; exact.

    >>> share_above(histogram(torch.tensor([[0.1, 0.6, 0.7, 0.9]])), 0.5).tolist()
    [0.75]
    """
    edge = pixel_threshold * HISTOGRAM_BINS
    if edge != int(edge) or not 0 <= edge < HISTOGRAM_BINS:
        raise OfframpError(
            expected=f"a pixel threshold on a bin edge, a multiple of 1/{HISTOGRAM_BINS} in [0, 1)",
            got=repr(pixel_threshold), where="share_above()",
            todo=f"take {min(max(round(edge), 0), HISTOGRAM_BINS - 1) / HISTOGRAM_BINS}.",
        )
    return counts[:, int(edge):].sum(dim=1).double() / counts.sum(dim=1).double()


def mean_of_histogram(counts: Tensor) -> Tensor:
    """Mean confidence read off the bin centres: (n, 1024) counts -> (n,) float64, within 1/2048 of the pixels' mean."""
    centres = (torch.arange(HISTOGRAM_BINS, device=counts.device, dtype=torch.float64) + 0.5) / HISTOGRAM_BINS
    return (counts.double() * centres).sum(dim=1) / counts.sum(dim=1).double()


def summarise(logits: Tensor, *, confidences: Sequence[str] = CONFIDENCES) -> DenseSummary:
    """Summarise one exit's pixel logits (n, K, H, W); ``confidences`` limits the work live to what a policy reads.

    Raises DataError where a pixel is NaN or infinite, naming the row.
    """
    if logits.ndim != 4:
        raise OfframpError(expected="pixel logits (n, K, H, W)", got=f"shape {tuple(logits.shape)}",
                           where="summarise()")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probs = logits.softmax(dim=1).mean(dim=(2, 3))
    broken = probs.isnan().any(dim=1)
    if bool(broken.any()):
        raise DataError(
            expected="finite pixel logits", got=f"NaN or infinity in row {int(broken.nonzero()[0])} of the batch",
            where="summarise()", todo="look at that input, or at the exit's head.",
        )
    return DenseSummary(
        labels=logits.argmax(dim=1), probs=probs.float(),
        histograms={name: histogram(BY_NAME[name](logits)) for name in confidences},
    )


def agreement(labels: Tensor, other: Tensor) -> Tensor:
    """Share of pixels with the same label: two (n, H, W) -> (n,) float32."""
    return (labels == other).flatten(1).double().mean(dim=1).float()


def evidence_of(summaries: Sequence[DenseSummary]) -> Evidence:
    """Join the summaries of the exits passed so far, for the same n rows, into what a policy may see."""
    last = summaries[-1]
    return Evidence(
        probs=torch.stack([one.probs for one in summaries], dim=1),
        histograms={
            name: torch.stack([one.histograms[name] for one in summaries], dim=1) for name in last.histograms
        },
        agreement=torch.stack([agreement(last.labels, one.labels) for one in summaries], dim=1),
    )

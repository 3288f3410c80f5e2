"""What a dense exit says about each image, small enough to keep: the same code fills the table and runs live.

N samples, E exits, K classes, H W space, B = 1024 bins. An exit's pixel logits (N, K, H, W) become a histogram of
pixel confidence for each confidence (those of ``types.EDGED`` smoothed across semantic edges), the mean pixel
probabilities, and the share of pixels that agree with each earlier exit. Everything a policy may see at decision time
is here, and it is computed from logits alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.errors import DataError, OfframpError
from offramp.functional.confidence import read
from offramp.functional.edges import EDGE_LEVELS, reaches, semantic_edges, smooth_edges
from offramp.types import CONFIDENCES, EDGED, HISTOGRAM_BINS, Evidence

__all__ = [
    "DenseSummary", "bin_scores", "count_above", "evidence_of", "histogram", "mean_of_histogram", "share_above",
    "summarise",
]


@dataclass(frozen=True, kw_only=True)
class DenseSummary:
    """One exit's summary of n images."""

    labels: Tensor
    """Class of each pixel (n, H, W), uint8 up to 256 classes, else int16; later exits agree with it or not."""
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


def count_above(above: Tensor, pixel_threshold: float) -> Tensor:
    """A histogram (n, 1024) int32 that is true of ``share_above`` at this threshold alone, from the pixels above it.

    ``above`` is (n, H, W) bool. Who holds a fixed threshold need not sort pixels into the other bins.

    >>> share_above(count_above(torch.tensor([[[True, False, True, True]]]), 0.5), 0.5).tolist()
    [0.75]
    """
    sure = above.flatten(1).sum(dim=1)
    counts = torch.zeros(len(above), HISTOGRAM_BINS, dtype=torch.int32, device=above.device)
    counts[:, 0] = above.shape[1:].numel() - sure
    counts[:, int(pixel_threshold * HISTOGRAM_BINS)] += sure
    return counts


def mean_of_histogram(counts: Tensor) -> Tensor:
    """Mean confidence read off the bin centres: (n, 1024) counts -> (n,) float64, within 1/2048 of the pixels' mean.

    Within 1/128 + 1/2048 where pixels on edges are smoothed, of which only a cell of width 1/64 is known.
    """
    centres = (torch.arange(HISTOGRAM_BINS, device=counts.device, dtype=torch.float64) + 0.5) / HISTOGRAM_BINS
    return (counts.double() * centres).sum(dim=1) / counts.sum(dim=1).double()


def bin_scores(
    scores: Tensor, labels: Tensor | None = None, *, stride: int = 1, pixel_threshold: float | None = None,
) -> Tensor:
    """The histogram (n, 1024) int32 of pixel scores (n, H, W), smoothed across the edges of ``labels`` where given.

    With a ``pixel_threshold``, on which a policy is fixed, only the share above it is found (``count_above``).
    DataError where a score is NaN, naming the row.
    """
    _refuse_nan(scores)
    edges = None if labels is None else semantic_edges(labels, stride)
    if pixel_threshold is None:
        return histogram(scores if edges is None else smooth_edges(scores, edges, stride))
    above = scores >= pixel_threshold if edges is None else \
        reaches(scores, edges, stride, int(pixel_threshold * EDGE_LEVELS))
    return count_above(above, pixel_threshold)


def summarise(logits: Tensor, *, confidences: Sequence[str] = CONFIDENCES, stride: int = 1) -> DenseSummary:
    """Summarise one exit's pixel logits (n, K, H, W) by some confidences; edges are ``stride`` pixels thick.

    ``stride`` is the exit's own (``ExitColumn.stride``), and counts for the confidences of ``types.EDGED`` alone.
    Raises DataError where a pixel is NaN or infinite, naming the row.
    """
    if logits.ndim != 4:
        raise OfframpError(expected="pixel logits (n, K, H, W)", got=f"shape {tuple(logits.shape)}",
                           where="summarise()")
    base = {name: name.removesuffix("_edges") for name in confidences}
    if unknown := set(confidences) - {*CONFIDENCES, *EDGED}:
        raise OfframpError(expected=f"confidences among {', '.join((*CONFIDENCES, *EDGED))}",
                           got=", ".join(sorted(unknown)), where="summarise()")
    said = read(logits, set(base.values()) or {"top"}, labels=True, probs=True)
    assert said.labels is not None and said.probs is not None
    _refuse_nan(next(iter(said.scores.values())))  # a pixel that makes one of its scores NaN makes all of them so
    edges = semantic_edges(said.labels, stride) if set(confidences) & set(EDGED) else None
    maps = {name: said.scores[base[name]] for name in confidences}
    if edges is not None:
        maps |= {name: smooth_edges(maps[name], edges, stride) for name in maps if name in EDGED}
    return DenseSummary(
        labels=said.labels, probs=said.probs.float(), histograms={name: histogram(one) for name, one in maps.items()},
    )


def _refuse_nan(scores: Tensor) -> None:
    """Any NaN or infinity among a pixel's logits, but for a class masked by -inf, makes its score NaN."""
    broken = scores.flatten(1).sum(dim=1).isnan()  # a sum of at most H W: NaN alone makes it NaN
    if bool(broken.any()):
        raise DataError(
            expected="finite pixel logits", got=f"NaN or infinity in row {int(broken.nonzero()[0])} of the batch",
            where="confidence of pixels", todo="look at that input, or at the exit's head.",
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

"""Leave where answers of this confidence were right often enough (PCEE). N samples, E exits, M bins."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from offramp.errors import OfframpError
from offramp.policies.lesson import Lesson
from offramp.policies.quotas import between
from offramp.policies.rules import common, scores_of
from offramp.policies.scored import leave_above
from offramp.policies.thresholds import Thresholds
from offramp.types import Evidence, Policy

__all__ = ["Pcee", "Reliability"]


@final
@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Leave where the held-out accuracy at similar confidence reaches the exit's threshold: :class:`Pcee`."""

    confidence: str = "top"
    """As in ``Thresholds``."""
    edges: tuple[tuple[float, ...], ...]
    """Of each exit, M - 1 confidences that part its bins; one on an edge belongs to the bin above."""
    accuracies: tuple[tuple[float, ...], ...]
    """Of each exit, the accuracy in its M bins."""
    thresholds: tuple[float | None, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", tuple(self.thresholds))
        for name in ("edges", "accuracies"):
            object.__setattr__(self, name, tuple(tuple(map(float, one)) for one in getattr(self, name)))
        faults = [f"{len(getattr(self, name))} exits of {name} for {len(self.thresholds)} thresholds"
                  for name in ("edges", "accuracies") if len(getattr(self, name)) != len(self.thresholds)]
        faults += [f"{len(held)} bins and {len(cuts)} edges" for cuts, held in
                   zip(self.edges, self.accuracies, strict=False) if len(held) != len(cuts) + 1]
        if faults:
            raise OfframpError(expected="one edge fewer than bins at each exit", got="; ".join(faults),
                               where="Reliability")

    @property
    def reads(self) -> tuple[str, ...]:
        """Of a dense exit's summary: the runtime spares itself the rest."""
        return (self.confidence,)

    def score(self, exit_index: int, evidence: Evidence) -> Tensor:
        """(n,) float64: the accuracy in the confidence's bin; NaN where that is NaN."""
        said = _sureness(self.confidence, len(self.thresholds)).score(exit_index, evidence).double()
        edges, held = (said.new_tensor(values[exit_index]) for values in (self.edges, self.accuracies))
        found = held[torch.bucketize(said, edges, right=True)]
        return torch.where(said.isnan(), said, found)

    def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
        """Bool (n,): the rows that leave. Raises DataError on NaN."""
        return leave_above(self.thresholds[exit_index], self.score(exit_index, evidence), exit_index)


@final
@dataclass(frozen=True, kw_only=True)
class Pcee:
    """One bar of accuracy for all exits, as high as the budget allows (Mofakhami et al., arXiv:2412.19325).

    Each exit's confidences on the lesson's samples are parted into bins of equal mass; a sample leaves where the
    accuracy in its bin reaches the bar, however sure the exit calls itself. Where we differ: the paper's user names the
    bar, an accuracy, and takes the cost that follows; here a budget is named, and the highest bar taken that keeps it.
    The paper reads its reliability diagrams plain or smoothed; ours are plain, or pooled until they rise. How many
    bins, and how full, is ours. Bins that tie, above all those that are always right, leave together, so that a small
    table may leave some of a budget unspent.
    """

    confidence: str = "top"
    bins: int = 50
    """At most so many; equal confidences are never parted, and a bin holds ``least`` samples or all that there are."""
    least: int = 10
    rising: bool = False
    """Bins whose accuracy falls with confidence are joined (isotonic regression): "surer" is then never "later"."""

    def __post_init__(self) -> None:
        if self.bins < 1 or self.least < 1:
            raise OfframpError(expected="bins and least >= 1", got=f"{self.bins}, {self.least}", where="Pcee")

    def fit(self, lesson: Lesson, /) -> Callable[[float], Policy]:
        """``at(budget)`` is a policy whose mean cost on the lesson's samples is at most the budget."""
        early = lesson.exits - 1
        sure = scores_of(_sureness(self.confidence, early), lesson)
        diagrams = [self._diagram(sure[:, e], lesson.right[:, e]) for e in range(early)]
        edges, held = tuple(one[0] for one in diagrams), tuple(one[1] for one in diagrams)

        def made(thresholds: tuple[float | None, ...]) -> Reliability:
            return Reliability(confidence=self.confidence, edges=edges, accuracies=held, thresholds=thresholds)

        spend = common(lesson, scores_of(made((None,) * early), lesson))
        return lambda budget: made(spend(budget))

    def _diagram(self, sure: Tensor, right: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(M - 1) edges and (M) accuracies of one exit."""
        order = sure.argsort(stable=True)
        sure, right = sure[order], right[order]
        starts = [0]
        for part in torch.arange(len(sure)).tensor_split(max(1, min(self.bins, len(sure) // self.least)))[1:]:
            start = int((sure < sure[part[0]]).sum())  # the first of its equals
            if start > starts[-1]:
                starts.append(start)
        pieces = list(right.tensor_split(starts[1:]))
        if self.rising:
            starts, pieces = _pooled(starts, pieces)
        cuts = tuple(between(sure[start - 1], sure[start]) for start in starts[1:])
        return cuts, tuple(float(piece.mean()) for piece in pieces)


def _pooled(starts: list[int], pieces: list[Tensor]) -> tuple[list[int], list[Tensor]]:
    """Neighbours whose means do not rise become one (pool adjacent violators)."""
    kept: list[tuple[int, Tensor]] = []
    for start, piece in zip(starts, pieces, strict=True):
        while kept and float(kept[-1][1].mean()) >= float(piece.mean()):
            start, before = kept.pop()
            piece = torch.cat([before, piece])
        kept.append((start, piece))
    return [start for start, _ in kept], [piece for _, piece in kept]


def _sureness(confidence: str, early: int) -> Thresholds:
    return Thresholds(confidence=confidence, thresholds=(None,) * early)

"""Policies that a search can tune and a runtime can obey. n rows, E exits, K classes."""

import math
from dataclasses import dataclass
from functools import partial
from typing import final

from torch import Tensor

from offramp.errors import OfframpError
from offramp.functional.confidence import BY_NAME
from offramp.functional.edges import EDGE_LEVELS
from offramp.functional.summaries import mean_of_histogram, share_above
from offramp.policies.glance import disorder_of, glance, weighed
from offramp.policies.scored import leave_above
from offramp.types import EDGED, HISTOGRAM_BINS, Evidence

__all__ = ["Thresholds"]


@final
@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Leave where the confidence reaches the exit's threshold (the label-free paper, 3.3; BranchyNet).

    Where we differ: a disabled exit is None and not a threshold of 1.0, which a float32 softmax reaches.
    """

    confidence: str = "top"
    """"top", "margin" or "entropy"; dense also "top_edges" or "entropy_edges", smoothed across semantic edges."""
    thresholds: tuple[float | None, ...]
    """One an exit, the backbone left out; rows with ``score >= threshold`` leave; None: no row leaves."""
    temperatures: tuple[float, ...] = ()
    """Classification: logits are divided by these first; empty: by 1."""
    pixel_thresholds: tuple[float | None, ...] = ()
    """Dense: an image's score is the share of its pixels whose confidence is at least this bin edge (MESS, Eq. 7),
    k/1024, or k/64 where confidence is smoothed across edges; None, or empty: the mean confidence."""

    def __post_init__(self) -> None:
        for name in ("thresholds", "temperatures", "pixel_thresholds"):
            values = tuple(None if value is None else float(value) for value in getattr(self, name))
            object.__setattr__(self, name, values)
        faults = []
        if self.confidence not in (*BY_NAME, *EDGED):
            faults.append(f"confidence {self.confidence!r}, not one of {', '.join((*BY_NAME, *EDGED))}")
        for name in ("temperatures", "pixel_thresholds"):
            if len(getattr(self, name)) not in (0, len(self.thresholds)):
                faults.append(f"{len(getattr(self, name))} {name} for {len(self.thresholds)} thresholds")
        faults += [f"threshold {t}" for t in self.thresholds if t is not None and not t == t]
        faults += [f"temperature {t}" for t in self.temperatures if not 0 < t < float("inf")]
        steps = EDGE_LEVELS if self.confidence in EDGED else HISTOGRAM_BINS
        faults += [f"pixel threshold {t}, off the bin edges (multiples of 1/{steps})" for t in self.pixel_thresholds
                   if t is not None and (not 0 <= t < 1 or t * steps != int(t * steps))]
        if faults:
            raise OfframpError(expected="thresholds that can decide", got="; ".join(faults), where="Thresholds")

    @property
    def reads(self) -> tuple[str, ...]:
        """All that it looks at in a dense exit's summary: the runtime spares itself the rest."""
        return (self.confidence,)

    @property
    def reads_above(self) -> tuple[float | None, ...]:
        """All that it looks at in it, exit by exit: the share above this pixel threshold; None: the whole histogram."""
        return self.pixel_thresholds

    def score(self, exit_index: int, evidence: Evidence) -> Tensor:
        """What is held against the threshold: (n,), larger is surer."""
        if evidence.logits is not None:
            if self.confidence not in BY_NAME:
                raise OfframpError(expected=f"for classification one of {', '.join(BY_NAME)}", where="Thresholds",
                                   got=f"{self.confidence!r}, which is of images of labels")
            logits = evidence.logits[:, -1]
            if self.temperatures:
                logits = logits / self.temperatures[exit_index]
            return BY_NAME[self.confidence](logits)
        if self.confidence not in evidence.histograms:
            raise OfframpError(
                expected=f"a histogram of {self.confidence!r}", got=", ".join(evidence.histograms) or "none",
                where=f"exit {exit_index}",
                todo=f"record it: record(..., confidences=({self.confidence!r},)), or search by another confidence.",
            )
        counts = evidence.histograms[self.confidence][:, -1]
        pixel = self.pixel_thresholds[exit_index] if self.pixel_thresholds else None
        return mean_of_histogram(counts) if pixel is None else share_above(counts, pixel)

    def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
        """Bool (n,): the rows that leave. Raises DataError on NaN, which no threshold can judge."""
        threshold = self.thresholds[exit_index]
        seen = glance(evidence, threshold, partial(self._glance, exit_index)) if self.confidence in BY_NAME else None
        return leave_above(threshold, self.score(exit_index, evidence), exit_index) if seen is None else seen

    def _glance(self, exit_index: int, rows: list[list[float]]) -> tuple[float, float]:
        heat, logits = self.temperatures[exit_index] if self.temperatures else 1.0, rows[-1]
        # float32 rounds by 6e-8: logits that are divided, and each sum over the classes
        slack = 1e-6 * (10 + len(logits) + max(max(logits), -min(logits)) / heat)
        below, weights, total = weighed(logits if heat == 1.0 else [one / heat for one in logits])
        if self.confidence == "top":
            return 1 / total, slack
        if self.confidence == "margin":
            return (1 - sorted(weights)[-2]) / total, slack
        most = math.log(len(logits))
        return 1 - disorder_of(below, weights, total) / most, slack / most

"""The space that an exhaustive search covers: every column with every set of samples that its thresholds can let go.

N samples, E early exits, K classes, M sets of one column. A plan's outcome hangs on who leaves where and on nothing
else, so thresholds that let the same samples go are one candidate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.errors import OfframpError, PlanError
from offramp.functional.edges import EDGE_LEVELS
from offramp.policies.quotas import thresholds_between
from offramp.policies.thresholds import Thresholds
from offramp.table import ExitTable
from offramp.table.payload import payload
from offramp.types import EDGED, HISTOGRAM_BINS

__all__ = ["Leavers", "Space", "lay_out"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Leavers:
    """What one column may let go: M different sets, none of them empty."""

    inside: Bools
    """(M, N)"""
    pixel: tuple[float | None, ...]
    threshold: tuple[float, ...]
    tried: int
    """Pairs of thresholds that these sets stand for, those that let nobody go included."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Space:
    """A table as an exhaustive search reads it, for one confidence."""

    table: ExitTable
    against: str
    confidence: str
    temperatures: tuple[float, ...]
    hit: Floats
    """(N, E + 1, K): dense: pixels of a class that were found; classification, K = 1: whether the answer is right."""
    union: Floats
    """(N, E + 1, K): dense: pixels that are of a class or are called so; classification: 1."""
    leavers: tuple[Leavers, ...]
    site: tuple[int, ...]

    @property
    def exits(self) -> int:
        return len(self.site)

    def policy(self, chosen: Sequence[tuple[int, float, float | None]]) -> Thresholds:
        """(column, threshold, pixel threshold) of each exit."""
        dense = self.table.task == "dense"
        return Thresholds(
            confidence=self.confidence, thresholds=tuple(threshold for _, threshold, _ in chosen),
            temperatures=() if dense else tuple(self.temperatures[e] for e, _, _ in chosen),
            pixel_thresholds=tuple(pixel for _, _, pixel in chosen) if dense else (),
        )


def lay_out(table: ExitTable, *, against: str, confidence: str, steps: int, pixel_steps: int,
            temperatures: Sequence[float] | None = None) -> Space:
    """Score every sample at every exit and collect the sets; a column at a time, as histograms are large."""
    exits = len(table.columns) - 1
    fitted = tuple(temperatures) if temperatures is not None else (1.0,) * exits
    # builds the policy of all exits once, so that faults are told in its own words
    Thresholds(confidence=confidence, thresholds=(None,) * exits,
               temperatures=fitted if table.task == "classify" else ())
    if table.task == "dense" and confidence not in table.histograms:
        raise PlanError(expected=f"a confidence among {', '.join(table.histograms)}", got=repr(confidence),
                        where="search()", todo="record the table with that confidence.")
    hit, union = payload(table, against)
    sites = list(dict.fromkeys(column.site for column in table.columns))
    return Space(
        table=table, against=against, confidence=confidence, temperatures=fitted, hit=hit, union=union,
        leavers=tuple(_leavers(table, e, confidence, steps, pixel_steps, fitted[e]) for e in range(exits)),
        site=tuple(sites.index(column.site) for column in table.columns[:-1]),
    )


def _leavers(table: ExitTable, e: int, confidence: str, steps: int, pixel_steps: int, temperature: float) -> Leavers:
    pixels: list[float | None] = [None]
    if table.task == "dense":
        counts = table.histograms[confidence][:, e].numpy().astype(np.int64)
        above = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
        grain = HISTOGRAM_BINS // EDGE_LEVELS if confidence in EDGED else 1
        edges = _edges(above.sum(axis=0)[::grain], pixel_steps) * grain
        pixels = [float(edge) / HISTOGRAM_BINS for edge in edges]
        scores = above[:, edges] / above[:, :1]
    else:
        policy = Thresholds(confidence=confidence, thresholds=(None,), temperatures=(temperature,))
        scores = policy.score(0, table.evidence([e])).double().numpy()[:, None]
    inside, pixel, threshold = [], [], []
    for p, edge in enumerate(pixels):
        levels = thresholds_between(scores[:, p], steps)
        inside.append(scores[None, :, p] >= levels[:, None])
        pixel += [edge] * len(levels)
        threshold += levels.tolist()
    sets = np.concatenate(inside)
    packed = np.packbits(sets, axis=1)
    _, first = np.unique(packed.view([("", packed.dtype)] * packed.shape[1])[:, 0], return_index=True)
    kept = np.array([m for m in np.sort(first) if sets[m].any()], np.int64)
    return Leavers(inside=sets[kept], pixel=tuple(pixel[m] for m in kept), tried=len(sets),
                   threshold=tuple(threshold[m] for m in kept))


def _edges(above: NDArray[np.int64], steps: int) -> NDArray[np.int64]:
    """At most ``steps`` bin edges that part the pixels of all images into equal shares; bin 0 is no threshold."""
    if steps < 1:
        raise OfframpError(expected="at least one pixel threshold", got=repr(steps), where="search(pixel_steps=...)")
    wanted = above[0] * np.arange(1, steps + 1) / (steps + 1)
    edges = np.searchsorted(-above, -wanted, side="right") - 1  # the last edge that at least so many pixels reach
    chosen: NDArray[np.int64] = np.unique(np.maximum(edges, 1))
    return chosen

"""The search's view of a table: scores, thresholds to choose from, and what leaving does. N samples, E early exits."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.choose.smooth import expected, expected_counts
from offramp.errors import PlanError
from offramp.functional.metrics import mean_iou
from offramp.policies.quotas import thresholds_between
from offramp.policies.thresholds import Thresholds
from offramp.table import ExitTable, Unit

__all__ = ["Choice", "Problem", "pose", "tally"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Choice = dict[int, int]
"""Exit -> index of its threshold; exits that are absent are not built."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Everything that a search needs, as arrays; ``E`` early exits, the backbone being index E."""

    table: ExitTable
    against: str
    """"labels" or "backbone"."""
    unit: Unit
    batch: int
    site: tuple[int, ...]
    """(E,) the site's number of each exit: at most one head a site."""
    payload: Floats
    """(N, E + 1, V, D): what adds up over samples. Classification: the loss against the backbone, D = 1; dense: K * K.
    Views: as observed and, where smoothed, as expected of such scores; the last is what the search believes in."""
    levels: tuple[Floats, ...]
    """For each exit the thresholds to choose from, falling: the first lets the fewest leave."""
    codes: Ints
    """(N, E): at threshold j or any later one the sample leaves, j = codes; len(levels) or more: never."""

    @property
    def exits(self) -> int:
        return len(self.levels)

    def loss(self, sums: Floats, base: Floats | None = None) -> Floats:
        """Quality lost when payloads add up to (..., V, D), in the worst view: a fraction; 0 for the backbone alone.

        ``base`` is what the backbone's own add up to, where other samples than these were drawn.
        """
        if self.table.task == "classify":
            out: Floats = sums[..., 0].max(axis=-1) / len(self.table)
            return out
        classes = self.table.num_classes

        def quality(flat: Floats) -> Floats:
            matrix = torch.from_numpy(np.ascontiguousarray(flat)).view(*flat.shape[:-1], classes, classes)
            values: Floats = mean_iou(matrix).numpy()
            return values

        untouched = self.payload[:, -1].sum(axis=0) if base is None else base
        dense: Floats = (quality(untouched) - quality(sums)).max(axis=-1)
        return dense

    def path(self, exits: tuple[int, ...]) -> Floats:
        """(len + 1,) what a sample pays that leaves at each of these exits, or at the end."""
        return self.table.costs.path((*exits, self.exits), self.unit, batch=self.batch)

    def run(self, choice: Choice) -> tuple[Ints, float, float]:
        """(the column (N,) where each sample leaves, mean cost, loss) of thresholds ``levels[e][choice[e]]``."""
        exits = tuple(sorted(choice))
        column = np.full(len(self.codes), self.exits)
        for e in reversed(exits):
            column[self.codes[:, e] <= choice[e]] = e
        paid = np.zeros(self.exits + 1)
        paid[[*exits, self.exits]] = self.path(exits)
        sums = self.payload[np.arange(len(column)), column].sum(axis=0)
        return column, float(paid[column].mean()), float(self.loss(sums))

    def upper(self, choice: Choice, level: float, *, repeats: int = 400, seed: int = 0) -> float:
        """One-sided upper bound of the loss: what was found plus what drawing the samples anew adds, by bootstrap.

        Each draw holds one more sample that every early exit gets wrong, lest a loss of zero seem certain.
        """
        column, _, loss = self.run(choice)
        samples = len(column)
        taken, base = self.payload[np.arange(samples), column][:, :1], self.payload[:, -1][:, :1]
        draws = np.random.default_rng(seed).multinomial(samples, np.full(samples, 1 / samples), repeats).astype(float)
        shape = (repeats, *taken.shape[1:])
        sums = (draws @ taken.reshape(samples, -1)).reshape(shape)
        bases = (draws @ base.reshape(samples, -1)).reshape(shape)
        pseudo = 1 / samples if self.table.task == "classify" and choice else 0.0
        seen = float(self.loss(taken.sum(axis=0), base.sum(axis=0)))
        return loss + float(np.quantile(self.loss(sums, bases), level)) + pseudo - seen


def pose(table: ExitTable, policy: Thresholds, *, against: str, unit: Unit, batch: int, steps: int,
         smooth: bool) -> Problem:
    """Score every sample at every exit by the policy itself, and lay the thresholds between the scores."""
    exits = len(table.columns) - 1
    scores = np.stack(
        [policy.score(e, table.evidence([e])).double().numpy() for e in range(exits)], axis=1
    ) if exits else np.zeros((len(table), 0))
    levels = tuple(thresholds_between(scores[:, e], steps) for e in range(exits))
    codes = np.stack(
        # levels fall, so the first that the score reaches is the number of levels above it
        [len(level) - np.searchsorted(level[::-1], scores[:, e], side="right") for e, level in enumerate(levels)],
        axis=1,
    ) if exits else np.zeros((len(table), 0), np.int64)
    seen = _payload(table, against)
    views = [seen]
    if smooth and exits:
        told = expected if table.task == "classify" else expected_counts
        # what an exit changes is smoothed; the backbone's own answers stay as they are
        change = told(scores, seen[:, :-1] - seen[:, -1:])
        views.append(np.concatenate([seen[:, -1:] + change, seen[:, -1:]], axis=1))
    sites = list(dict.fromkeys(column.site for column in table.columns))
    return Problem(
        table=table, against=against, unit=unit, batch=batch, payload=np.stack(views, axis=2), levels=levels,
        codes=codes, site=tuple(sites.index(column.site) for column in table.columns[:-1]),
    )


def tally(codes: Ints, amounts: Floats, count: int) -> Floats:
    """What leavers add up to at each of ``count`` falling thresholds: codes (n,), amounts (n, ...) -> (count, ...)."""
    flat = amounts.reshape(len(amounts), math.prod(amounts.shape[1:]))
    sums = [np.bincount(codes, flat[:, d], minlength=count + 1)[:count] for d in range(flat.shape[1])]
    return np.stack(sums, axis=1).astype(np.float64).cumsum(axis=0).reshape(count, *amounts.shape[1:])


def _payload(table: ExitTable, against: str) -> Floats:
    if table.task == "dense":
        matrices = table.confusion if against == "labels" else table.agreement_confusion
        if matrices is None:
            raise _unlabelled()
        return matrices.double().flatten(2).numpy()
    assert table.logits is not None
    said = table.logits.argmax(dim=-1)
    if against == "backbone":
        return (said != said[:, -1:]).double().numpy()[..., None]
    if table.labels is None:
        raise _unlabelled()
    right = said == table.labels[:, None]
    return (right[:, -1:].double() - right.double()).numpy()[..., None]


def _unlabelled() -> PlanError:
    return PlanError(expected="a table with labels", got="one without", where="search(against='labels')",
                     todo="search against='backbone', which bounds the loss by disagreement (Eq. 3).")

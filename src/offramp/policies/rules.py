"""Baselines whose score is given and not learned: confidence, agreement, chance. N samples, E exits, K classes.

Policies: :class:`Agreement`, :class:`Patience`, :class:`Random`, besides ``Thresholds``. Schedulers, which find the
thresholds that a budget asks for: :class:`Geometric`, :class:`Swept`, :class:`TopShare`, :class:`Pabee`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from offramp.errors import OfframpError
from offramp.policies.lesson import Lesson
from offramp.policies.quotas import Thresholded, between, geometric, mean_cost, threshold_of, thresholds_for, within
from offramp.policies.scored import Scored, leave_above
from offramp.policies.signals import signals
from offramp.policies.thresholds import Thresholds
from offramp.types import Evidence, Policy

__all__ = [
    "Agreement", "Geometric", "Pabee", "Patience", "Random", "Swept", "TopShare", "common", "scores_of", "spending",
]


@final
@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Leave where enough of the exits passed name this one's class; dense: on enough of the pixels.

    ``by="vote"``: their share. ``by="repeats"``: how many in a row, this one counted. Of pixels, ``Signals`` says.
    """

    by: Literal["vote", "repeats"] = "vote"
    thresholds: tuple[float | None, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", tuple(self.thresholds))
        if self.by not in ("vote", "repeats"):
            raise OfframpError(expected="by 'vote' or 'repeats'", got=repr(self.by), where="Agreement")

    def score(self, exit_index: int, evidence: Evidence) -> Tensor:
        """(n,) float64: a vote in [0, 1], repeats from 1 up."""
        said = signals(evidence)
        return said.vote if self.by == "vote" else said.repeats

    def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
        """Bool (n,): the rows that leave. Raises DataError on NaN."""
        return leave_above(self.thresholds[exit_index], self.score(exit_index, evidence), exit_index)


@final
@dataclass(frozen=True, kw_only=True)
class Patience:
    """Leave when an exit repeats the answer of the ``patience`` exits before it (PABEE, arXiv:2006.04152).

    A patience of 0 lets everyone leave at the first exit. Where we differ: an image's answer is repeated where a share
    ``alike`` of its pixels is; the paper has no images.
    """

    patience: int
    alike: float = 0.95

    def __post_init__(self) -> None:
        if self.patience < 0 or not 0 <= self.alike <= 1:
            raise OfframpError(expected="patience >= 0, and alike in [0, 1]", where="Patience",
                               got=f"{self.patience}, {self.alike}")

    def score(self, exit_index: int, evidence: Evidence) -> Tensor:
        """(n,) float64: how many exits right before this one said the same."""
        repeats = signals(evidence).repeats
        if evidence.agreement is not None:
            repeats = (evidence.agreement >= self.alike).double().flip(1).cumprod(dim=1).sum(dim=1)
        return repeats - 1

    def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
        """Bool (n,): the rows that leave. Raises DataError on NaN."""
        return leave_above(self.patience, self.score(exit_index, evidence), exit_index)


@final
@dataclass(frozen=True, kw_only=True)
class Random:
    """Leave by chance, whatever the exit knows: what a score is worth shows beside it.

    The dice are in the row, so that a table and a runtime throw alike: the fraction of a weighted sum of its logits
    (dense: of its mean probabilities), taken so many times that it says nothing about them. A hash of their bits would
    do, but the last bit of a logit changes with the batch.
    """

    thresholds: tuple[float | None, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", tuple(self.thresholds))

    def score(self, exit_index: int, evidence: Evidence) -> Tensor:
        """(n,) float64, uniform in [0, 1]."""
        said, steep = (evidence.logits, 64) if evidence.logits is not None else (evidence.probs, 1024)
        assert said is not None
        own = said[:, -1].double().clamp(min=-200)  # a masked class is -inf
        phase = math.sqrt(2) * (exit_index + 1) + math.sqrt(3) * self.seed
        place = torch.arange(1, own.shape[1] + 1, dtype=torch.float64, device=own.device)
        weights = 1 + (place * (math.sqrt(5) - 1) / 2 + phase).remainder(1)
        return (steep * (own * weights).sum(dim=1)).remainder(1)

    def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
        """Bool (n,): the rows that leave. Raises DataError on NaN."""
        return leave_above(self.thresholds[exit_index], self.score(exit_index, evidence), exit_index)


# ---- schedulers ---------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, kw_only=True)
class Geometric:
    """The shares that leave fall or rise by one ratio from exit to exit; of each exit the surest go first.

    MSDNet (arXiv:1703.09844, 4.2) with ``confidence="top"``. EENet (4.2) holds itself against BranchyNet
    (``"entropy"``) and PABEE (``"repeats"``) with the same shares; "margin", "vote" and "random" are there besides.
    Where we differ: the ratio is found for the budget, from below, where the authors try some and take the nearest.
    """

    confidence: str = "top"

    def fit(self, lesson: Lesson, /) -> Callable[[float], Policy]:
        """``at(budget)`` is a policy whose mean cost on the lesson's samples is at most the budget."""
        scores = scores_of(_rule(self.confidence, (None,) * (lesson.exits - 1)), lesson)

        def family(place: float) -> Thresholded:  # denser where the ratio is about 1
            return thresholds_for(scores, geometric(math.exp(40 * place**3), lesson.exits))

        spend = spending(lesson, scores, family, low=-1, high=1)
        return lambda budget: _rule(self.confidence, spend(budget))


@final
@dataclass(frozen=True, kw_only=True)
class Swept:
    """One threshold for all exits, as high as the budget allows: the usual other way beside :class:`Geometric`.

    Confidences as there. BranchyNet itself leaves its thresholds, one an exit, to the user.
    """

    confidence: str = "top"

    def fit(self, lesson: Lesson, /) -> Callable[[float], Scored]:
        """``at(budget)`` is a policy whose mean cost on the lesson's samples is at most the budget."""
        spend = common(lesson, scores_of(_rule(self.confidence, (None,) * (lesson.exits - 1)), lesson))
        return lambda budget: _rule(self.confidence, spend(budget))


@final
@dataclass(frozen=True, kw_only=True)
class TopShare:
    """At each exit leaves whoever scores like the surest share of *all* calibration samples there, one share for all.

    Top-k %: no paper of its own. Confidences as in :class:`Geometric`, whose quotas count those not yet gone.
    """

    confidence: str = "top"

    def fit(self, lesson: Lesson, /) -> Callable[[float], Policy]:
        """``at(budget)`` is a policy whose mean cost on the lesson's samples is at most the budget."""
        scores = scores_of(_rule(self.confidence, (None,) * (lesson.exits - 1)), lesson)

        def family(share: float) -> Thresholded:
            quota = int(share * len(scores) + 1e-9)
            return tuple(threshold_of(scores[:, e], quota) for e in range(scores.shape[1]))

        spend = spending(lesson, scores, family, low=1, high=0)
        return lambda budget: _rule(self.confidence, spend(budget))


@final
@dataclass(frozen=True, kw_only=True)
class Pabee:
    """The longest patience that the budget allows (PABEE, arXiv:2006.04152): :class:`Patience`.

    With E exits there are E operating points at most, so that a budget may stay half unspent: ``Geometric("repeats")``
    and ``Geometric("vote")`` take the agreement as a score, as EENet's authors do.
    """

    alike: float = 0.95
    """Dense: as in :class:`Patience`."""

    def fit(self, lesson: Lesson, /) -> Callable[[float], Policy]:
        """``at(budget)`` is a policy whose mean cost on the lesson's samples is at most the budget."""
        exits = lesson.exits
        scores = torch.stack([Patience(patience=0, alike=self.alike).score(e, lesson.evidence(e))
                              for e in range(exits - 1)], dim=1)
        costs = [mean_cost(scores, (patience,) * (exits - 1), lesson.cost) for patience in range(exits)]

        def at(budget: float) -> Policy:
            lesson.feasible(budget)
            kept = [patience for patience in range(1, exits) if costs[patience] <= budget * (1 + 1e-12)]
            return Patience(patience=max(kept, default=0), alike=self.alike)

        return at


# ---- shared with other schedulers ---------------------------------------------------------------------------------


def scores_of(policy: Scored, lesson: Lesson) -> Tensor:
    """(N, E - 1): what a policy would score each sample at each early exit, by its own code."""
    return torch.stack([policy.score(e, lesson.evidence(e)) for e in range(lesson.exits - 1)], dim=1)


def spending(lesson: Lesson, scores: Tensor, family: Callable[[float], Sequence[float | None]], *, low: float,
             high: float) -> Callable[[float], Thresholded]:
    """From a budget to the dearest thresholds of a family that keep it on the lesson's samples (``quotas.within``)."""
    def spent(thresholds: Thresholded) -> float:
        return mean_cost(scores, thresholds, lesson.cost)

    return lambda budget: within(lesson.feasible(budget), family, spent, low=low, high=high)


def common(lesson: Lesson, scores: Tensor) -> Callable[[float], Thresholded]:
    """From a budget to the highest threshold, the same for all exits, that keeps it; it parts two observed scores."""
    seen = scores.unique()  # rising
    bars: list[float | None] = [float(seen[0]) - 1e-3]
    bars += [between(below, above) for below, above in zip(seen, seen[1:], strict=False)] + [None]
    every = scores.shape[1]
    return spending(lesson, scores, lambda place: (bars[int(place)],) * every, low=0, high=len(bars) - 1)


def _rule(name: str, thresholds: Thresholded) -> Scored:
    if name == "random":
        return Random(thresholds=thresholds)
    if name in ("vote", "repeats"):
        return Agreement(by="vote" if name == "vote" else "repeats", thresholds=thresholds)
    return Thresholds(confidence=name, thresholds=thresholds)

"""EENet (arXiv:2301.07099): exit scores and the share of each exit are learned from a lesson, for a budget.

n rows, N samples, E exits, j of them passed, K classes.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Literal, final

import torch
from torch import Tensor

from offramp.errors import OfframpError, PlanError
from offramp.policies.eenet_fit import Course, assign, chain, fit_scores, tilted
from offramp.policies.glance import disorder_of, glance, weighed
from offramp.policies.lesson import Lesson
from offramp.policies.quotas import Thresholded, geometric, mean_cost, thresholds_for, within
from offramp.policies.scored import leave_above
from offramp.policies.signals import signals
from offramp.types import Evidence

__all__ = ["EENet", "EENetPolicy", "FeaturePolicy", "likelihood", "read"]

_STATISTICS = 3
Weights = tuple[tuple[float, ...], ...]


@final
@dataclass(frozen=True, kw_only=True)
class EENetPolicy:
    """Leave where a learned score reaches the exit's threshold (EENet, 3.2.1): what ``EENet`` fits.

    Where we differ: what is held against the threshold is the score before it is clamped to [0, 1], which parts scores
    that are all 1 and changes no other order; what later exits read is clamped, in training and here alike.
    """

    weights: Weights
    """Of each early exit: one a class probability, then of the largest, of 1 - entropy / log K, of the vote, and
    of each earlier exit's clamped score. Dense: of no earlier score, for an image's vote at an earlier exit is not
    known any more when a later one asks."""
    thresholds: Thresholded
    """One an early exit; None: no row leaves."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(tuple(map(float, row)) for row in self.weights))
        object.__setattr__(self, "thresholds", tuple(None if t is None else float(t) for t in self.thresholds))
        faults = []
        if len(self.weights) != len(self.thresholds):
            faults.append(f"weights of {len(self.weights)} exits for {len(self.thresholds)} thresholds")
        grows = {len(row) - k for k, row in enumerate(self.weights)}
        if len(grows) > 1 and len({len(row) for row in self.weights}) > 1:
            faults.append(f"{[len(row) for row in self.weights]} weights, neither all as many nor one more an exit")
        faults += [f"weight {w}" for row in self.weights for w in row if not math.isfinite(w)]
        faults += [f"threshold {t}" for t in self.thresholds if t is not None and not t == t]
        if faults:
            raise OfframpError(expected="weights and thresholds that can decide", got="; ".join(faults),
                               where="EENetPolicy")

    def score(self, exit_index: int, evidence: Evidence) -> Tensor:
        """What is held against the threshold: (n,) float64, larger is surer."""
        inputs = read(evidence)
        passed, wide = inputs.shape[1:]
        if wide != len(self.weights[0]):
            raise OfframpError(expected=f"{len(self.weights[0]) - _STATISTICS} classes", got=f"{wide - _STATISTICS}",
                               where="EENetPolicy",
                               todo="fit it on a table of this network, which has the same classes.")
        asked = slice(exit_index + 1 - passed, exit_index + 1)
        raw = (inputs * self._on(inputs.device)[asked, :wide]).sum(dim=2)
        return _fed(raw.unbind(dim=1), [row[wide:] for row in self.weights[asked]])

    def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
        """Bool (n,): the rows that leave. Raises DataError on NaN, which no threshold can judge."""
        threshold = self.thresholds[exit_index]
        seen = glance(evidence, threshold, partial(self._glance, exit_index))
        return leave_above(threshold, self.score(exit_index, evidence), exit_index) if seen is None else seen

    def _glance(self, exit_index: int, rows: list[list[float]]) -> tuple[float, float]:
        classes, found = len(rows[0]), math.nan
        if len(rows) != exit_index + 1 or len(self.weights[exit_index]) != classes + _STATISTICS + exit_index:
            return found, 0.0
        labels, clamped = list[int](), list[float]()
        for logits, weights in zip(rows, self.weights, strict=False):
            below, shares, total = weighed(logits)
            disorder = disorder_of(below, shares, total)
            labels.append(logits.index(max(logits)))
            top, entropy, vote = weights[classes : classes + _STATISTICS]
            found = (sum(map(operator.mul, weights, shares)) + top) / total \
                + entropy * (1 - disorder / math.log(classes)) + vote * (labels.count(labels[-1]) / len(labels)) \
                + sum(map(operator.mul, weights[classes + _STATISTICS :], clamped))
            clamped.append(min(max(found, 0.0), 1.0))
        return found, self._slacks[exit_index]

    @cached_property
    def _slacks(self) -> list[float]:
        """How far rounding can carry each score, many times over: what it reads lies in [0, 1]."""
        found: list[float] = []
        for row in self.weights:
            fed = row[len(self.weights[0]) :]
            passed_on = sum(abs(weight) * one for weight, one in zip(fed, found, strict=False))
            found.append(1e-9 * (1 + sum(map(abs, row))) + passed_on)
        return found

    def _on(self, device: torch.device) -> Tensor:
        found = self._tensors.get(device)
        if found is None:
            rows = [list(row) + [0.0] * (len(self.weights[-1]) - len(row)) for row in self.weights]
            found = self._tensors[device] = torch.tensor(rows, dtype=torch.float64, device=device)
        return found

    @cached_property
    def _tensors(self) -> dict[torch.device, Tensor]:
        return {}


def read(evidence: Evidence) -> Tensor:
    """What the scores of the exits passed read: (n, j, K + 3) float64, of a dense network of the exit that asks alone.

    Class probabilities, then ``top``, ``entropy`` and ``vote`` as ``signals`` has them, all exits in one go: an earlier
    score is needed at each later exit, and a decision should cost little beside the exit itself. Where we differ: the
    vote counts those who name this exit's class, the paper's those who name the most frequent one (Eq. 4). Dense: means
    over pixels, where the paper scores pixels and takes the mean of that: a score being linear, the two are one as long
    as no pixel is clamped.
    """
    if evidence.logits is None:
        said = signals(evidence)
        return torch.cat([said.probs, torch.stack([said.top, said.entropy, said.vote], dim=1)], dim=1)[:, None]
    probs = evidence.logits.softmax(dim=2, dtype=torch.float64)
    passed, classes = probs.shape[1:]
    disorder = torch.special.entr(probs).sum(dim=2, keepdim=True)
    if passed == 1:
        vote = torch.ones_like(disorder)
    else:
        labels = evidence.logits.argmax(dim=2)
        same = labels[:, :, None] == labels[:, None, :]
        counted = torch.arange(1, passed + 1, dtype=torch.float64, device=probs.device)
        vote = same.tril().sum(dim=2, keepdim=True) / counted[:, None]
    entropy = 1 - disorder / math.log(classes)
    return torch.cat([probs, probs.amax(dim=2, keepdim=True), entropy, vote], dim=2)


@final
@dataclass(frozen=True, kw_only=True)
class FeaturePolicy:
    """The same for a regression: scores of an exit's own inputs, its pooled features say (3.2.2, the end).

    Not a ``Policy`` of a table: evidence holds answers, and these scores read what lies before them.
    """

    weights: Weights
    """Of each early exit: one an input, the constant, and of each earlier exit's clamped score."""
    thresholds: Thresholded

    def score(self, exit_index: int, features: Sequence[Tensor]) -> Tensor:
        """(n,) float64 from the features (n, D_e) of the exits passed, this one the last."""
        raw, fed = [], []
        for one, row in zip(features[: exit_index + 1], self.weights, strict=False):
            wide = one.shape[1]
            told = torch.tensor(row[:wide], dtype=torch.float64, device=one.device)
            raw.append((one.double() * told).sum(dim=1) + row[wide])
            fed.append(row[wide + 1 :])
        return _fed(raw, fed)

    def decide(self, exit_index: int, features: Sequence[Tensor]) -> Tensor:
        """Bool (n,): the rows that leave. Raises DataError on NaN."""
        return leave_above(self.thresholds[exit_index], self.score(exit_index, features), exit_index)


def _fed(raw: Sequence[Tensor], weights: Sequence[Sequence[float]]) -> Tensor:
    """The last exit's score (n,): to each but the first, the clamped ones before it are fed."""
    found, clamped = raw[0], list[Tensor]()
    for one, row in zip(raw[1:], weights[1:], strict=True):
        clamped.append(found.clamp(0, 1))
        found = one
        for weight, earlier in zip(row, clamped, strict=True):
            found = torch.add(found, earlier, alpha=weight)
    return found


@final
@dataclass(frozen=True, kw_only=True)
class EENet:
    """Learns EENet's scores and shares on a lesson, and thresholds that keep a budget (EENet, 3.2.2, Algorithm 1).

    ``fit`` learns the scores with all samples alike; ``at(budget)`` learns assignments for the budget and the scores
    for these assignments, in turns. Nothing but ``seed`` is left to chance; the order of budgets does not matter.
    """

    scores: Literal["learned", "top"] = "learned"
    """"top": the largest probability instead, the distribution alone is learned (Fig. 6)."""
    distribution: Literal["learned", "geometric"] = "learned"
    """"geometric": MSDNet's shares instead, the scores alone are learned (Fig. 6)."""
    beta: float = 1.0
    """Of the entropy in Eq. 7, which the paper gives no value of."""
    alpha_cost: float = 10.0
    hidden: float = 0.5
    """D_h / D of the assignment: the paper takes 0.5 for images and 2 for texts."""
    spread: float = 0.3
    """How far a weight of a score may be thought to lie from its start, before anything was seen."""
    rounds: int = 2
    """How often assignments and scores are learned in turns."""
    seed: int = 0

    def __post_init__(self) -> None:
        faults = [f"{name} {getattr(self, name)!r}" for name in ("beta", "alpha_cost", "hidden", "spread", "rounds")
                  if not 0 < getattr(self, name) < math.inf]
        if self.scores not in ("learned", "top"):
            faults.append(f"scores {self.scores!r}")
        if self.distribution not in ("learned", "geometric"):
            faults.append(f"distribution {self.distribution!r}")
        if faults:
            raise OfframpError(expected="positive numbers; scores 'learned' or 'top'; distribution 'learned' or "
                                        "'geometric'", got="; ".join(faults), where="EENet")

    def fit(self, lesson: Lesson) -> Callable[[float], EENetPolicy]:
        """``at(budget)`` is a policy whose mean cost on the lesson's samples is at most the budget."""
        early = range(lesson.exits - 1)
        learned = self._learner(course_of(lesson))

        @cache
        def at(budget: float) -> EENetPolicy:
            weights, shares = learned(lesson.feasible(budget))
            open_ = EENetPolicy(weights=weights, thresholds=(None,) * len(early))
            scores = torch.stack([open_.score(e, lesson.evidence(e)) for e in early], dim=1)
            return replace(open_, thresholds=self._thresholds(scores, shares, lesson.cost, budget))

        return at

    def fit_errors(self, features: Sequence[Tensor], errors: Tensor, cost: Tensor) -> Callable[[float], FeaturePolicy]:
        """Regression (3.2.2, the end): ``at(budget)`` from each exit's inputs (N, D_e), of the last one too.

        ``errors`` (N, E) are distances of each exit's answer from the truth, ``cost`` (E,) rises. An exit is right as
        far as its error is likely (``likelihood``), and each score starts as the one before it, so that what an exit
        learns is the residual: the paper's boosters. Features are brought to one scale inside.
        """
        if self.scores != "learned" or len(features) != errors.shape[1] or len(cost) != errors.shape[1]:
            raise OfframpError(
                expected="learned scores; features and a cost of each exit", where="EENet.fit_errors()",
                got=f"{self.scores} scores, {len(features)} features, {len(cost)} costs, {errors.shape[1]} exits")
        right = likelihood(errors)
        inputs, scales, start = [], [], []
        for e, one in enumerate(features):
            spread, mean = torch.std_mean(one.double(), dim=0)
            spread = torch.where(spread > 0, spread, 1.0)
            inputs.append(torch.cat([(one - mean) / spread, torch.ones(len(one), 1)], dim=1).float())
            scales.append((mean, spread))
            psi = torch.zeros(one.shape[1] + 1 + e, dtype=torch.float64)
            psi[-1] = 1.0 if e else float(right[:, 0].mean())
            start.append(psi)
        learned = self._learner(Course(inputs=tuple(inputs), start=tuple(start), right=right, cost=cost.double()))

        @cache
        def at(budget: float) -> FeaturePolicy:
            if not budget >= float(cost[0]) * (1 - 1e-9):
                raise PlanError(expected=f"a budget of at least {float(cost[0]):g}, the cost of the first exit",
                                got=f"{budget:g}", where="EENet.fit_errors()", todo="raise the budget.")
            weights, shares = learned(budget)
            plain = []
            for row, (mean, spread) in zip(weights, scales, strict=False):
                told = torch.tensor(row[: len(mean)], dtype=torch.float64) / spread
                plain.append((*told.tolist(), row[len(mean)] - float(told @ mean), *row[len(mean) + 1 :]))
            open_ = FeaturePolicy(weights=tuple(plain), thresholds=(None,) * len(plain))
            scores = torch.stack([open_.score(e, features[: e + 1]) for e in range(len(plain))], dim=1)
            return replace(open_, thresholds=self._thresholds(scores, shares, cost.double(), budget))

        return at

    def _learner(self, course: Course) -> Callable[[float], tuple[Weights, Tensor | None]]:
        """Budget -> weights of each early exit's score, and the shares of exits (E,), where they are learned."""
        first = list(course.start)
        if self.scores == "learned":
            alike = torch.full_like(course.right, 1 / len(course))
            first = fit_scores(course, alike, first, spread=self.spread)

        def learned(budget: float) -> tuple[Weights, Tensor | None]:
            weights, shares = first, None
            for _ in range(self.rounds if self.distribution == "learned" else 0):
                scores = chain(course, weights).clamp(0, 1)
                given = assign(course, scores, min(budget, float(course.cost[-1])), beta=self.beta,
                               alpha_cost=self.alpha_cost, hidden=self.hidden, seed=self.seed)
                shares = given.mean(dim=0)
                if self.scores == "top":
                    break
                weights = fit_scores(course, given / given.sum(dim=0), weights, spread=self.spread, steps=30)
            return tuple(tuple(one.tolist()) for one in weights[:-1]), shares

        return learned

    def _thresholds(self, scores: Tensor, shares: Tensor | None, cost: Tensor, budget: float) -> Thresholded:
        if shares is not None:
            return tilted(scores, shares, cost, budget)
        return within(budget, lambda t: thresholds_for(scores, geometric(math.exp(t), len(cost))),
                      lambda found: mean_cost(scores, found, cost), low=-60.0, high=60.0, steps=80)


def likelihood(errors: Tensor) -> Tensor:
    """How likely errors (N, E) are beside none at all: exp(-e^2 / 2 s^2), s^2 being their mean square; (0, 1] float64.

    >>> likelihood(torch.tensor([[1.0, 0.0]]))
    tensor([[0.3679, 1.0000]], dtype=torch.float64)
    """
    squares = errors.double() ** 2
    return (-squares / (2 * squares.mean()).clamp(min=1e-30)).exp()


def course_of(lesson: Lesson) -> Course:
    """A lesson as arrays; each score starts as the largest probability."""
    last = lesson.exits - 1
    if lesson.table.task == "classify":
        inputs = read(lesson.evidence(last)).float().unbind(dim=1)
    else:
        inputs = tuple(read(lesson.evidence(e))[:, 0].float() for e in range(lesson.exits))
    start = []
    for e, one in enumerate(inputs):
        fed = e if lesson.table.task == "classify" else 0
        psi = torch.zeros(one.shape[1] + fed, dtype=torch.float64)
        psi[one.shape[1] - _STATISTICS] = 1
        start.append(psi)
    return Course(inputs=tuple(one.contiguous() for one in inputs), start=tuple(start), right=lesson.right,
                  cost=lesson.cost)

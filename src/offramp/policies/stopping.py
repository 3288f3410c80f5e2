"""Optimal stopping, learned: go on where the expected gain is worth its cost.

With values r_e of leaving at exit e, costs c_e and a price l of a unit of cost, the best rule leaves at exit e where

.. math:: s_e(x_e) = r_e - l c_e - E[V_{e+1} | x_e] \\ge 0, \\quad V_e = s_e \\ge 0 \\;?\\; r_e - l c_e : V_{e+1}

by backward induction from the last exit. What is regressed is the difference, in which the noise that two exits share
cancels, of values realised by the rule fitted downstream (Longstaff and Schwartz, 2001), each judged by a regression
that left the sample out: no expectation is taken of a maximum of noise. N samples, E exits, P columns, L prices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from offramp.errors import OfframpError
from offramp.policies.glance import glance
from offramp.policies.lesson import Lesson
from offramp.policies.quotas import leave
from offramp.policies.rules import Swept, scores_of
from offramp.policies.scored import Scored, leave_above
from offramp.policies.values import Part, Reading, Ridge, laid_out, posterior, read, voices_of
from offramp.policies.values_row import RowScore, curve
from offramp.types import Evidence, Policy

__all__ = ["Stopping", "StoppingPath", "StoppingPolicy"]

Row = tuple[float, ...]
_CLASSES = 128  # with more, effects of single classes are left to the biases
_PENALTIES = [10.0**power for power in (-1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 5)]
_SURE = 2.0  # standard errors by which a cheaper point has to be better
_WORTH = 1.0  # standard errors by which what was learned has to beat one threshold on the confidence
_SHARES = (0.0, 0.5)  # how freely class effects are fitted beside the smooth part


@final
@dataclass(frozen=True, kw_only=True)
class StoppingPolicy:
    """Leave where what going on is expected to gain is not worth its cost: what ``Stopping`` fits.

    Every field has one entry an early exit. The score is linear in statistics of the evidence, in their excess over
    knots, and in effects of the class; see ``offramp.policies.values``.
    """

    thresholds: tuple[float | None, ...]
    """0 where the score is the value of leaving less that of going on; None: no row leaves."""
    constants: Row
    weights: tuple[Row, ...]
    """Of the standardised statistics, then of their excess over each knot."""
    centres: tuple[Row, ...]
    spreads: tuple[Row, ...]
    bent: tuple[tuple[int, ...], ...]
    """The statistic that each knot bends."""
    knots: tuple[Row, ...]
    levels: tuple[Row, ...]
    """Of each class answered; empty: none."""
    slopes: tuple[Row, ...]
    """Of each class answered, times the first statistic."""
    probs: tuple[Row, ...]
    """Of each class probability."""
    voices: tuple[tuple[Row, ...], ...] = ()
    """Weights of the exits passed, one row a voice; empty for dense exits."""
    biases: tuple[tuple[Row, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("weights", "centres", "spreads", "knots", "levels", "slopes", "probs"):
            object.__setattr__(self, name, tuple(tuple(map(float, row)) for row in getattr(self, name)))
        for name in ("voices", "biases"):
            object.__setattr__(self, name, tuple(tuple(tuple(map(float, row)) for row in rows)
                                                 for rows in getattr(self, name)))
        object.__setattr__(self, "bent", tuple(tuple(map(int, row)) for row in self.bent))
        object.__setattr__(self, "constants", tuple(map(float, self.constants)))
        object.__setattr__(self, "thresholds", tuple(None if t is None else float(t) for t in self.thresholds))
        exits = len(self.thresholds)
        faults = [f"{len(getattr(self, name))} {name} for {exits} thresholds"
                  for name in ("constants", "weights", "centres", "spreads", "bent", "knots", "levels", "slopes",
                               "probs") if len(getattr(self, name)) != exits]
        faults += [f"{len(getattr(self, name))} {name} for {exits} thresholds" for name in ("voices", "biases")
                   if len(getattr(self, name)) not in (0, exits)]
        if not faults:
            faults += [f"exit {e}: {len(w)} weights of {len(c)} statistics and {len(k)} knots"
                       for e, (w, c, k) in enumerate(zip(self.weights, self.centres, self.knots, strict=True))
                       if len(w) != len(c) + len(k) or len(k) != len(self.bent[e]) or len(c) != len(self.spreads[e])]
        numbers = [*self.constants, *(x for rows in (self.weights, self.levels, self.slopes, self.probs)
                                      for row in rows for x in row)]
        faults += [f"weight {x}" for x in numbers if not math.isfinite(x)]
        faults += [f"threshold {t}" for t in self.thresholds if t is not None and not t == t]
        if faults:
            raise OfframpError(expected="numbers that can decide", got="; ".join(faults[:5]), where="StoppingPolicy")

    def score(self, exit_index: int, evidence: Evidence) -> Tensor:
        """The value of leaving less the expected one of going on, costs priced: (n,) float64."""
        source = evidence.logits if evidence.logits is not None else evidence.probs
        assert source is not None
        part = self.part(exit_index, source.device)
        return part.score(read(evidence, part.voices))

    def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
        """Bool (n,): the rows that leave. Raises DataError on NaN, which no threshold can judge."""
        threshold = self.thresholds[exit_index]
        seen = glance(evidence, threshold, self._of_row(exit_index)) if self.voices else None
        return leave_above(threshold, self.score(exit_index, evidence), exit_index) if seen is None else seen

    def _of_row(self, e: int) -> RowScore:
        found = self._rows.get(e)
        if found is None:
            wide, curves = len(self.centres[e]), []
            for s, (centre, spread) in enumerate(zip(self.centres[e], self.spreads[e], strict=True)):
                own = [i for i, which in enumerate(self.bent[e]) if which == s]
                curves.append(curve(self.weights[e][s], centre, spread, [self.knots[e][i] for i in own],
                                    [self.weights[e][wide + i] for i in own]))
            found = self._rows[e] = RowScore(
                voices=self.voices[e], biases=self.biases[e], curves=curves, constant=self.constants[e],
                levels=self.levels[e], slopes=self.slopes[e], centre=self.centres[e][0], spread=self.spreads[e][0],
                probs=self.probs[e])
        return found

    @cached_property
    def _rows(self) -> dict[int, RowScore]:
        return {}

    def part(self, e: int, device: torch.device) -> Part:
        """One exit's score as tensors, kept."""
        key = (e, device)
        if key not in self._parts:
            def put(values: object) -> Tensor:
                return torch.tensor(values, dtype=torch.float64, device=device)

            self._parts[key] = Part(
                voices=(put(self.voices[e]), put(self.biases[e])) if self.voices else None,
                weights=put(self.weights[e]), constant=self.constants[e],
                centre=put(self.centres[e]), spread=put(self.spreads[e]), knots=put(self.knots[e]),
                bent=torch.tensor(self.bent[e], dtype=torch.long, device=device),
                levels=put(self.levels[e]), slopes=put(self.slopes[e]), probs=put(self.probs[e]))
        return self._parts[key]

    @cached_property
    def _parts(self) -> dict[tuple[int, torch.device], Part]:
        return {}


@final
@dataclass(frozen=True, kw_only=True)
class Stopping:
    """Learns by backward induction what going on is worth, once for all budgets.

    Targets are the chances of being right in hindsight (``values.posterior``), and what is left of having been right
    is regressed on its own, under a penalty of its own, so that a miscalibrated hindsight is put right. Penalties, and
    whether classes have effects, are chosen by the leave-one-out error; so is, at each budget, whether any of it is
    better than one threshold on the largest probability.
    """

    knots: int = 4
    """At which each statistic may bend: even quantiles."""
    points: int = 64
    """Prices at which the induction is solved; between them policies are interpolated."""
    prior: float = 2.0
    """Strength of the prior of each class's bias, in samples."""

    def __post_init__(self) -> None:
        if self.knots < 0 or self.points < 2 or not self.prior > 0:
            raise OfframpError(expected="knots >= 0, points >= 2, prior > 0", got=repr(self), where="Stopping")

    def fit(self, lesson: Lesson, /) -> "StoppingPath":
        """A policy for each budget, and what leaving each sample out foresees of it."""
        course = _Course(lesson, self)
        first = course.prices()
        coarse = course.induce(first)
        costs = lesson.cost[coarse.exits].mean(dim=0)
        return StoppingPath(lesson, course, course.induce(_spread_out(first, costs, self.points)))


def _spread_out(prices: Tensor, costs: Tensor, points: int) -> Tensor:
    """Prices (L,) rising at which mean costs fall in about even steps."""
    falling = costs.flip(0).cummax(dim=0).values.flip(0)
    wanted = torch.linspace(float(falling[0]), float(falling[-1]), points, dtype=torch.float64)
    found = []
    for cost in wanted.tolist():
        right = min(max(int((falling > cost).sum()), 1), len(prices) - 1)
        drop = float(falling[right - 1] - falling[right])
        part = 1.0 if drop <= 0 else min(max((float(falling[right - 1]) - cost) / drop, 0.0), 1.0)
        found.append(float(prices[right - 1]) * (1 - part) + float(prices[right]) * part)
    return torch.tensor(sorted({0.0, *found}), dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Induced:
    prices: Tensor
    solved: list[tuple[Tensor, Tensor]]
    """Of each early exit: coefficients (P, L) and constants (L,) of the score."""
    exits: Tensor
    """(N, L): where each sample leaves, judged by regressions that left it out."""


class _Course:
    """What the induction needs of a lesson at any price: designs, factorised once."""

    def __init__(self, lesson: Lesson, how: Stopping) -> None:
        self.lesson, self.value, self.cost = lesson, lesson.value, lesson.cost
        logits = lesson.table.logits
        self.likely = self.value
        answer = None
        if logits is not None:
            against = lesson.table.labels if lesson.against == "labels" else logits[:, -1].argmax(dim=1)
            assert against is not None
            answer = against
            if lesson.against == "labels":
                self.likely = posterior(logits, answer, prior=how.prior)
        self.parts: list[Part] = []
        self.readings: list[Reading] = []
        self.fits: list[list[Ridge]] = []
        for e in range(lesson.exits - 1):
            evidence = lesson.evidence(e)
            voices = None
            if logits is not None and answer is not None:
                voices = voices_of(logits[:, : e + 1], answer, prior=how.prior)
            reading = read(evidence, voices)
            part = laid_out(reading, voices, how.knots)
            shares = _SHARES if reading.probs.shape[1] <= _CLASSES else _SHARES[:1]
            self.parts.append(part)
            self.readings.append(reading)
            self.fits.append([Ridge(part.design(reading, share)) for share in shares])
        self.chosen: dict[int, tuple[int, float, float]] = {}

    def prices(self) -> Tensor:
        """From below 0, where it pays to spend, to where nothing is worth going on."""
        spread = float(self.likely.max() - self.likely.min()) or 1.0
        step = float((self.cost[1:] - self.cost[:-1]).clamp(min=1e-9 * float(self.cost[-1])).min())
        rising = torch.logspace(-4.5, 0.3, 28, dtype=torch.float64) * spread / step
        return torch.cat([-rising[2:18:2].flip(0), torch.zeros(1, dtype=torch.float64), rising])

    def induce(self, prices: Tensor) -> _Induced:
        """Backward from the last exit, at all prices at once; penalties are chosen at the first call."""
        last = self.lesson.exits - 1
        exits = torch.full((len(self.value), len(prices)), last)
        hoped = self.likely[:, -1:] - prices * self.cost[-1]
        seen = self.value[:, -1:] - prices * self.cost[-1]
        solved: list[tuple[Tensor, Tensor]] = []
        for e in range(last - 1, -1, -1):
            now = self.likely[:, e : e + 1] - prices * self.cost[e]
            realised = self.value[:, e : e + 1] - prices * self.cost[e]
            gain = hoped - now
            left = seen - realised - gain
            if e not in self.chosen:
                self.chosen[e] = self._choose(e, gain, left)
            which, penalty, other = self.chosen[e]
            fit = self.fits[e][which]
            coefficients, constants = fit.solve(gain, penalty)
            judged = fit.left_out(gain, penalty)
            if self.likely is not self.value:
                more, constant = fit.solve(left, other)
                coefficients, constants = coefficients + more, constants + constant
                judged = judged + fit.left_out(left, other)
            solved.insert(0, (-coefficients, -constants))
            leaves = judged <= 0
            exits[leaves] = e
            hoped, seen = torch.where(leaves, now, hoped), torch.where(leaves, realised, seen)
        return _Induced(prices=prices, solved=solved, exits=exits)

    def _choose(self, e: int, gain: Tensor, left: Tensor) -> tuple[int, float, float]:
        errors = [(fit.error(gain, penalty), which, penalty) for which, fit in enumerate(self.fits[e])
                  for penalty in _PENALTIES]
        _, which, penalty = min(errors)
        if self.likely is self.value:
            return which, penalty, penalty
        other = min((self.fits[e][which].error(left, p), p) for p in _PENALTIES)[1]
        return which, penalty, other


class StoppingPath:
    """``path(budget)`` is a policy: one family from everyone going on to everyone leaving at once."""

    def __init__(self, lesson: Lesson, course: _Course, induced: _Induced) -> None:
        self._lesson, self._course, self._induced = lesson, course, induced
        cost, prices = lesson.cost, induced.prices
        self._solved, scores = [], []
        for e, (coefficients, constants) in enumerate(induced.solved):
            unit = float(prices.abs().max()) * float(cost[e + 1] - cost[e]) or 1.0
            nothing = torch.zeros(len(coefficients), 1, dtype=torch.float64)
            ends = torch.tensor([-unit, unit], dtype=torch.float64)
            whole = torch.cat([nothing, coefficients, nothing], 1), torch.cat([ends[:1], constants, ends[1:]])
            self._solved.append(whole)
            design = course.parts[e].design(course.readings[e], _SHARES[course.chosen[e][0]])
            scores.append(design @ whole[0] + whole[1])
        self._scores = torch.stack(scores, dim=1)  # (N, E - 1, L + 2)
        samples = len(lesson)
        outer = torch.full((samples, 1), lesson.exits - 1)
        self._exits = torch.cat([outer, induced.exits, torch.zeros_like(outer)], dim=1)
        self._values = lesson.value.gather(1, self._exits)
        self._plain = Swept().fit(lesson)
        self._tops = scores_of(self._plain(float(cost[0])), lesson)

    def __call__(self, budget: float) -> Policy:
        """A policy whose mean cost on the lesson's samples is at most the budget.

        It stays below where a cheaper point of the path is better by more than two standard errors, each sample judged
        by a regression that left it out. And where that does not foresee more, by a standard error, than one threshold
        on the largest probability gains (``rules.Swept``), that is the policy: few samples, or exits whose confidence
        says all there is to say, are no ground for more.
        """
        budget = self._lesson.feasible(budget)
        place, plain, _ = self._chosen(budget)
        if plain is not None:
            return plain
        for step in range(60):
            policy = self._policy(place)
            if self._spent(policy) <= budget * (1 + 1e-12):
                return policy
            place = min(place + 1e-9 * 2.0**step, self._last)  # the last bit of a score, at the edge
        return self._policy(self._last)

    def foreseen(self, budget: float) -> tuple[float, float]:
        """(mean value, mean cost) at a budget of the policy that is given for it.

        What was learned judges each sample by regressions that left it out; one threshold is judged on the very samples
        that it was fitted to, of which it knows one number.
        """
        _, _, at = self._chosen(self._lesson.feasible(budget))
        return float(self._lesson.value.gather(1, at[:, None]).mean()), float(self._lesson.cost[at].mean())

    def _chosen(self, budget: float) -> tuple[float, Scored | None, Tensor]:
        """The place on the path; one threshold, where that does as well; and where each sample should leave (N,)."""
        place, plain = self._place(budget), self._plain(budget)
        learned, simple = self._exits[:, round(place)], leave(self._tops, plain.thresholds)
        gained = (self._lesson.value.gather(1, learned[:, None]) - self._lesson.value.gather(1, simple[:, None]))[:, 0]
        if float(gained.mean()) < _WORTH * float(gained.std(unbiased=False)) / math.sqrt(len(gained)):
            return place, plain, simple
        return place, None, learned

    @property
    def _last(self) -> float:
        return float(self._scores.shape[2] - 1)

    def _place(self, budget: float) -> float:
        low, high = 0.0, self._last
        if self._cost_at(low) > budget:
            for _ in range(30):
                middle = (low + high) / 2
                low, high = (low, middle) if self._cost_at(middle) <= budget else (middle, high)
            low = high
        gained = self._values - self._values[:, round(low)][:, None]
        sure = gained.mean(dim=0) - _SURE * gained.std(dim=0, unbiased=False) / math.sqrt(len(gained))
        sure[: math.ceil(low)] = -torch.inf
        best = int(sure.argmax())
        return float(best) if float(sure[best]) > 1e-12 else low

    def _cost_at(self, place: float) -> float:
        scores = torch.lerp(self._scores[:, :, int(place)], self._scores[:, :, min(int(place) + 1, int(self._last))],
                            place - int(place))
        return float(self._lesson.cost[leave(scores, (0.0,) * scores.shape[1])].mean())

    def _spent(self, policy: StoppingPolicy) -> float:
        scores = [policy.part(e, torch.device("cpu")).score(reading) for e, reading in enumerate(self._course.readings)]
        return float(self._lesson.cost[leave(torch.stack(scores, dim=1), policy.thresholds)].mean())

    def _policy(self, place: float) -> StoppingPolicy:
        low, part = int(place), place - int(place)
        high = min(low + 1, int(self._last))
        fields: dict[str, list[object]] = {name: [] for name in (
            "weights", "constants", "levels", "slopes", "probs", "centres", "spreads", "bent", "knots", "voices",
            "biases")}
        for e, (coefficients, constants) in enumerate(self._solved):
            layout, which = self._course.parts[e], self._course.chosen[e][0]
            row = torch.lerp(coefficients[:, low], coefficients[:, high], part)
            smooth = len(layout.centre) + len(layout.knots)
            share, classes = _SHARES[which], row[smooth:]
            effects: Sequence[Tensor] = (row[:0], row[:0], row[:0])
            if share and layout.voices is not None:
                levels, slopes, probs = classes.chunk(3)
                effects = (levels * share, slopes * share, probs * 2 * share)
            elif share:
                effects = (row[:0], row[:0], classes * 2 * share)
            told = {"weights": row[:smooth] * layout.scale(), "centres": layout.centre, "spreads": layout.spread,
                    "bent": layout.bent, "knots": layout.knots,
                    **dict(zip(("levels", "slopes", "probs"), effects, strict=True))}
            for name, values in told.items():
                fields[name].append(values.tolist())
            fields["constants"].append(float(torch.lerp(constants[low], constants[high], part)))
            if layout.voices is not None:
                fields["voices"].append(layout.voices[0].tolist())
                fields["biases"].append(layout.voices[1].tolist())
        return StoppingPolicy(thresholds=(0.0,) * len(self._solved), **fields)  # type: ignore[arg-type]

"""``values.Part.score`` of a single row in plain arithmetic, no more of it than the score needs. K classes, j exits.

What a statistic adds to the score is a curve of straight pieces: its weight, its bends at the knots, and flat where it
is farther than five spreads from its centre.
"""

import math
import operator
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from offramp.policies.glance import Row, weighed

__all__ = ["FLOOR", "LEAD", "SURE", "WIDE", "Curve", "RowScore", "curve"]

Curve = tuple[Row, Row, Row]
"""Where pieces end, and of each piece, of which there is one more, its slope and its height at 0."""

FLOOR, SURE, LEAD, WIDE = -30.0, 1e-6, 14.0, 5.0
"""Log of a masked class; odds end at a million, leads at e^14, and a statistic at five spreads from its centre."""


_MOST = -math.log(SURE)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowScore:
    """One exit's score."""

    voices: Sequence[Row]
    biases: Sequence[Row]
    curves: Sequence[Curve]
    """Of each statistic, in the order of ``values.read``."""
    constant: float
    levels: Row
    slopes: Row
    centre: float
    """Of the first statistic, which ``slopes`` multiply, and its spread."""
    spread: float
    probs: Row

    @cached_property
    def slack(self) -> float:
        """How far rounding can carry the score, many times over; odds multiply it by a million."""
        steep = sum(max(map(abs, slopes)) for _, slopes, _ in self.curves)
        steep += max(map(abs, self.slopes), default=0.0) / self.spread
        loud = max(sum(map(abs, row)) for row in (*self.voices, *self.biases))
        level = abs(self.constant) + max(map(abs, self.levels), default=0.0) + sum(map(abs, self.probs))
        return 1e-6 * (1 + loud) * (1 + level + steep)

    @cached_property
    def spoken(self) -> list[tuple[list[tuple[int, float]], Row]]:
        """Of each voice what of the exits it hears, and its bias; nothing where it is the last exit's own."""
        found = []
        for voice, bias in zip(self.voices, self.biases, strict=True):
            heard = [(place, share) for place, share in enumerate(voice) if share]
            own = heard == [(len(voice) - 1, 1.0)] and not any(bias)
            found.append(([] if own else heard or [(0, 0.0)], bias))
        return found

    def __call__(self, rows: Sequence[list[float]]) -> tuple[float, float]:
        """Of logits (j, K): the score, and its slack; NaN where the tensors have to say."""
        if len(rows) != len(self.voices[0]) or len(rows[0]) != len(self.biases[0]):
            return math.nan, 0.0
        told = [weighed(logits) for logits in rows]  # shifted by what is the same for all classes, as no share sees
        for below, _, total in told:
            if not min(below) - math.log(total) > FLOOR:
                return math.nan, 0.0
        said = told[-1][0].index(0.0)
        odds, leads, disorders = [], [], []
        for heard, bias in self.spoken:
            below, weights, total = told[-1]
            if heard:
                loud = bias
                for place, share in heard:
                    loud = [so_far + share * one for so_far, one in zip(loud, told[place][0])]  # noqa: B905 # faster
                below, weights, total = weighed(loud)
            whole, own = math.log(total), below[said]
            odds.append(_odds(own - whole))
            disorders.append(whole - sum(map(operator.mul, weights, below)) / total)
            first, second = sorted(below)[:-3:-1]
            leads.append(min(max(own - (second if own == first else first), -LEAD), LEAD))
        stats = odds + leads + disorders
        if len(rows) > 1:
            below, _, total = told[-2]
            same = [one.index(0.0) == said for one, _, _ in told[:-1]]
            stats += [_odds(below[said] - math.log(total)), float(same[-1])]
            if len(rows) > 2:
                stats.append(sum(same) / len(same))
        score = self.constant
        for one, (ends, slopes, heights) in zip(stats, self.curves, strict=True):
            piece = bisect_right(ends, one)
            score += slopes[piece] * one + heights[piece]
        if self.levels:
            x = min(max((odds[0] - self.centre) / self.spread, -WIDE), WIDE)
            score += self.levels[said] + self.slopes[said] * x
        if self.probs:
            score += sum(map(operator.mul, self.probs, weights)) / total
        return score, self.slack


def curve(weight: float, centre: float, spread: float, knots: Row, bends: Row) -> Curve:
    """Of a statistic s, with x = (s - centre) / spread kept within 5: weight x + sum bends max(x - knots, 0).

    >>> curve(1.0, 2.0, 1.0, [0.0], [3.0])
    ([-3.0, 2.0, 7.0], [0.0, 1.0, 4.0, 0.0], [-5.0, -2.0, -8.0, 20.0])
    """
    inner = sorted((knot, bend) for knot, bend in zip(knots, bends, strict=True) if -WIDE < knot < WIDE)
    early = [(knot, bend) for knot, bend in zip(knots, bends, strict=True) if knot <= -WIDE]
    slope, height = weight + sum(bend for _, bend in early), -sum(bend * knot for knot, bend in early)
    ends, slopes, heights = [-WIDE], [0.0], [height - WIDE * slope]
    for knot, bend in (*inner, (WIDE, 0.0)):
        ends.append(knot)
        slopes.append(slope)
        heights.append(height)
        slope, height = slope + bend, height - bend * knot
    slopes.append(0.0)
    heights.append(height + WIDE * slope)
    return ([centre + spread * end for end in ends], [one / spread for one in slopes],
            [one - centre * steep / spread for one, steep in zip(heights, slopes, strict=True)])


def _odds(log_p: float) -> float:
    odds = math.expm1(-log_p) if log_p > FLOOR else math.inf
    return -math.log(odds) if SURE < odds < 1 / SURE else math.copysign(_MOST, SURE - odds)

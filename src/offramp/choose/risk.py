"""Is a mean at most a limit? Tests of that which hold for every distribution, and one that does so approximately.

N samples, K classes. A *p-value* here is of "the mean exceeds the limit": where that is so, it is at most ``level``
with probability at most ``level``. All but the bootstrap promise this for every N; samples must be drawn
independently from what comes later.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from offramp.errors import OfframpError
from offramp.table.payload import quality

__all__ = ["Bound", "Claim", "betting", "binomial_tail", "hoeffding_bentkus", "mean_claim", "miou_claim"]

Bound = Literal["auto", "binomial", "betting", "hoeffding_bentkus", "bootstrap"]
Floats = NDArray[np.float64]
_POWER = 1.2816  # standard deviations: the number of samples named suffices nine times in ten
_MOST, _DRAWS, _CAP = 10**9, 2000, 0.9


@dataclass(frozen=True, kw_only=True)
class Claim:
    """That the mean of what was sampled is at most a limit."""

    observed: float
    """The mean seen."""
    p: Callable[[float], float]
    """Of a limit, the p-value; never rises with it."""
    enough: Callable[[float], float]
    """Of a limit, how many samples should show it, were all as seen here; infinite where the mean seen is over it."""
    low: float
    high: float
    level: float

    def holds(self, limit: float) -> bool:
        """Whether it is shown; a limit that no sample can exceed needs no showing."""
        return limit >= self.high or self.p(limit) <= self.level

    def upper(self) -> float:
        """The least limit that holds: an upper confidence bound of the mean at ``1 - level``."""
        low, high = self.low, self.high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self.holds(middle) else (middle, high)
        return high


def binomial_tail(k: int, n: int, p: float) -> float:
    """P(X <= k) for X ~ Binomial(n, p): the exact p-value of k losses in n against a rate of p.

    >>> round(binomial_tail(1, 3, 0.5), 6)
    0.5
    """
    if p <= 0 or k >= n:
        return 1.0
    if p >= 1 or k < 0:
        return 0.0
    i = np.arange(k + 1)
    ways = np.concatenate([[0.0], np.cumsum(np.log((n - i[:-1]) / i[1:]))])
    logs = ways + i * math.log(p) + (n - i) * math.log1p(-p)
    most = float(logs.max())
    return min(1.0, math.exp(most) * float(np.exp(logs - most).sum()))


def hoeffding_bentkus(total: float, n: int, limit: float) -> float:
    """p-value where n samples in [0, 1] add to ``total`` (Learn then Test, arXiv:2110.01052).

    min(exp(-n h(mean, limit)), e P(Binomial(n, limit) <= ceil(total))), h the relative entropy of two coins.
    """
    mean = total / n
    if mean >= limit:
        return 1.0
    entropy = (mean * math.log(mean / limit) if mean > 0 else 0.0) + (
        (1 - mean) * math.log((1 - mean) / (1 - limit)) if limit < 1 else math.inf)
    return min(1.0, math.exp(-n * entropy), math.e * binomial_tail(math.ceil(total - 1e-9), n, limit))


def betting(x: Floats, level: float, *, low: float = 0.0) -> Callable[[float], float]:
    """p-value of a limit by a game (Waudby-Smith and Ramdas, arXiv:2010.09686): x (N,) in [low, 1], in order of play.

    Before each sample a share of the capital is staked on its lying under the limit; were the mean above it, no play
    could be expected to win, so that capital ever reaches 1 / level with probability at most ``level`` (Ville). Stakes
    are theirs for an N known beforehand, sqrt(2 log(1 / level) / (N variance)), of the variance seen so far: rare
    losses cost little, other than in Hoeffding's bound. Where we differ: x may be negative, and a stake is cut where a
    single sample could take more than 0.9 of the capital.
    """
    wanted = _stakes(_variance(x, low), len(x), level)

    def p(limit: float) -> float:
        if limit >= 1:
            return 0.0
        stakes = np.minimum(wanted, _CAP / (1 - limit))
        return math.exp(-max(0.0, float(np.cumsum(np.log1p(stakes * (limit - x))).max())))

    return p


def _stakes(variance: Floats, n: int, level: float) -> Floats:
    return np.asarray(np.sqrt(2 * math.log(1 / level) / (n * variance)))


def _variance(x: Floats, low: float) -> Floats:
    """(N,) before each sample is seen: of those before it and one that is worth a quarter of a squared range."""
    t, width = np.arange(1, len(x) + 1), 1 - low
    mean = (0.5 * (1 + low) + np.cumsum(x)) / (t + 1)
    squares = np.cumsum((x - mean) ** 2)
    before = np.concatenate([[0.0], squares[:-1]])
    return np.asarray((_prior(width) + before) / t)


def _prior(width: float) -> float:
    return width**2 / 4


def mean_claim(x: Floats, bound: Bound, level: float, *, low: float = 0.0, high: float = 1.0) -> Claim:
    """About the mean of x (N,), which lies in [low, high]."""
    width, n, mean = high - low, len(x), float(x.mean())
    if width <= 0:  # nothing can vary
        return Claim(observed=high, p=lambda limit: float(limit < high), low=low, high=high, level=level,
                     enough=lambda limit: math.inf if limit < high else 1.0)
    # A bet on a loss in [-1, 1] is made on the loss as it is; all else is brought to [0, 1].
    start, scale = (0.0, 1.0) if bound == "betting" and high == 1.0 else (low, width)
    # A table may be sorted; a game may not.
    x, floor = ((x - start) / scale)[np.random.default_rng(0).permutation(n)], (low - start) / scale
    if bound == "binomial" and not bool(np.isin(x, (0, 1)).all()):
        raise OfframpError(expected="losses of 0 or 1 for the bound 'binomial'", got="others",
                           where="guarantee()", todo="take bound='betting'.")

    def fixed(total: float, many: int, limit: float) -> float:
        return hoeffding_bentkus(total, many, limit) if bound == "hoeffding_bentkus" else \
            binomial_tail(round(total), many, limit)

    total = float(x.sum())
    unit_p = betting(x, level, low=floor) if bound == "betting" else lambda limit: fixed(total, n, limit)

    def enough(limit: float) -> float:
        limit = (limit - start) / scale

        def clears(many: int) -> bool:
            unlucky = float(x.mean()) * many + _POWER * float(x.std()) * math.sqrt(many)
            return fixed(min(math.ceil(unlucky - 1e-9), many), many, limit) <= level

        return _least(_growth(x, limit, level, floor) if bound == "betting" else clears, float(x.mean()) < limit)

    return Claim(observed=mean, p=lambda limit: unit_p((limit - start) / scale), enough=enough, low=low, high=high,
                 level=level)


def _growth(x: Floats, limit: float, level: float, low: float) -> Callable[[int], bool]:
    """Whether so many samples like x should let the capital reach 1 / level nine times in ten."""
    values, counts = np.unique(x, return_counts=True)
    weights, variance = counts / len(x), float(x.var())

    def clears(many: int) -> bool:
        t = np.unique(np.geomspace(1, many, 256).round())
        seen = (_prior(1 - low) + (t - 1) * variance) / t
        stakes = np.minimum(_stakes(seen, many, level), _CAP / (1 - limit))
        won = np.log1p(stakes[:, None] * (limit - values))
        gain = won @ weights
        spread = ((won - gain[:, None]) ** 2) @ weights
        steps = np.diff(t, prepend=0.0)
        return bool(gain @ steps - _POWER * math.sqrt(spread @ steps) >= math.log(1 / level))

    return clears


def _least(clears: Callable[[int], bool], possible: bool) -> float:
    """The least number that clears, to two digits upwards; infinite beyond 10^9."""
    if not possible:
        return math.inf
    high = 2
    while not clears(high):
        if (high := 2 * high) > _MOST:
            return math.inf
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if clears(middle) else (middle, high)
    step = 10 ** max(len(str(high)) - 2, 0)
    return float(-(-high // step) * step)


def miou_claim(hit: Floats, union: Floats, own_hit: Floats, own_union: Floats, level: float) -> Claim:
    """About the fall of mIoU from the backbone's (``hit``, ``union``) to a mixture's own, all (N, K) as in ``payload``.

    mIoU of many images is no mean over them, and no distribution-free bound of it is known to us: a percentile
    bootstrap over images, which is right in the limit of many.
    """
    draw, n, falls = np.random.default_rng(0), len(hit), []
    for _ in range(_DRAWS // 100):
        times = draw.multinomial(n, np.full(n, 1 / n), size=100).astype(np.float64)
        falls.append(quality(times @ hit, times @ union) - quality(times @ own_hit, times @ own_union))
    drawn = np.concatenate(falls)
    seen = float(quality(hit.sum(0), union.sum(0)) - quality(own_hit.sum(0), own_union.sum(0)))
    reach = (float(np.quantile(drawn, 1 - level)) - seen + _POWER * float(drawn.std())) * math.sqrt(n)

    def enough(limit: float) -> float:
        return _least(lambda many: seen + reach / math.sqrt(many) <= limit, seen < limit)

    return Claim(observed=seen, enough=enough, low=-1.0, high=1.0, level=level,
                 p=lambda limit: (1 + int((drawn > limit).sum())) / (_DRAWS + 1))

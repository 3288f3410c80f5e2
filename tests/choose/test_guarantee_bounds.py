"""Bounds of a mean, held against scipy, hand computation and the rate at which they fail."""

import math

import numpy as np
import pytest
from scipy.stats import beta, binom
from scipy.stats import bootstrap as scipy_bootstrap

from offramp.choose.risk import betting, binomial_tail, hoeffding_bentkus, mean_claim, miou_claim
from offramp.errors import OfframpError

DRAWS, LEVEL = 1000, 0.05
AT_MOST = int(binom.ppf(0.999, DRAWS, LEVEL))  # violations that chance allows where the true rate is LEVEL


def paired(draw: np.random.Generator, samples: int, lose: float, win: float) -> np.ndarray:
    """Of the backbone against a plan: 1 lost, -1 won, 0 the same."""
    return draw.choice([1.0, -1.0, 0.0], size=samples, p=[lose, win, 1 - lose - win])


def test_binomial_tail_is_the_sum_over_all_outcomes() -> None:
    for n, p in ((1, 0.3), (7, 0.5), (12, 0.01)):
        for k in range(n + 1):
            assert binomial_tail(k, n, p) == pytest.approx(
                sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)), rel=1e-12)
    assert binomial_tail(9_000, 1_000_000, 0.01) == pytest.approx(binom.cdf(9_000, 1_000_000, 0.01), rel=1e-8)
    assert [binomial_tail(3, 5, 0.0), binomial_tail(3, 5, 1.0), binomial_tail(5, 5, 1.0)] == [1, 0, 1]


@pytest.mark.parametrize(("k", "n"), [(0, 40), (3, 200), (19, 20), (20, 20)])
def test_the_binomial_bound_is_clopper_and_pearsons(k: int, n: int) -> None:
    claim = mean_claim(np.repeat([1.0, 0.0], [k, n - k]), "binomial", LEVEL)
    assert claim.upper() == pytest.approx(1.0 if k == n else beta.ppf(1 - LEVEL, k + 1, n - k), abs=1e-9)


def test_hoeffding_bentkus_by_hand() -> None:
    # 2 of 100 against 0.1: h = 0.02 log 0.2 + 0.98 log(0.98 / 0.9) = 0.0512655...; exp(-100 h) = 0.00594...
    hoeffding = math.exp(-100 * (0.02 * math.log(0.02 / 0.1) + 0.98 * math.log(0.98 / 0.9)))
    assert hoeffding == pytest.approx(0.0059385, rel=1e-3)
    # 0.9^100 (1 + 100 / 9 + 4950 / 81) = 0.00194488
    bentkus = math.e * sum(math.comb(100, i) * 0.1**i * 0.9 ** (100 - i) for i in range(3))
    assert bentkus == pytest.approx(math.e * 0.00194488, rel=1e-5)
    assert hoeffding_bentkus(2.0, 100, 0.1) == pytest.approx(min(hoeffding, bentkus), rel=1e-12)
    assert hoeffding_bentkus(0.0, 500, 0.01) == pytest.approx(0.99**500, rel=1e-9)
    assert hoeffding_bentkus(10.0, 100, 0.1) == 1.0


def test_capital_is_played_sample_by_sample() -> None:
    x, limit = np.array([0.0, 0.3, 0.0, 1.0, 0.1]), 0.6
    capital, most, mean, squares = 1.0, 1.0, 0.5, 0.25
    for t, one in enumerate(x, 1):
        stake = min(math.sqrt(2 * math.log(1 / LEVEL) / (len(x) * squares / t)), 0.9 / (1 - limit))
        capital *= 1 + stake * (limit - one)
        most = max(most, capital)
        mean = (0.5 + x[:t].sum()) / (t + 1)
        squares += (one - mean) ** 2
    assert betting(x, LEVEL)(limit) == pytest.approx(1 / most, rel=1e-12)


def test_the_p_value_of_a_bet_falls_with_the_limit() -> None:
    x = paired(np.random.default_rng(0), 400, 0.1, 0.05)
    values = [betting(x, LEVEL, low=-1.0)(limit) for limit in np.linspace(-0.9, 0.999, 200)]
    assert all(later <= sooner + 1e-12 for sooner, later in zip(values, values[1:], strict=False))
    assert values[0] == 1 and values[-1] < 1e-3


@pytest.mark.parametrize("bound", ["betting", "hoeffding_bentkus"])
@pytest.mark.parametrize(("lose", "win", "samples"), [
    (0.01, 0.0, 300), (0.05, 0.04, 300), (0.3, 0.29, 100), (0.02, 0.01, 3000), (0.5, 0.0, 20),
])
def test_a_bound_fails_at_most_as_often_as_it_says(bound: str, lose: float, win: float, samples: int) -> None:
    draw = np.random.default_rng(7)
    true = lose - win  # the claim "at most that, less a hair" is false, and is shown too often only by a wrong bound
    shown = sum(mean_claim(paired(draw, samples, lose, win), bound, LEVEL, low=-1.0).holds(true - 1e-9)
                for _ in range(DRAWS))
    assert shown <= AT_MOST


def test_a_bet_on_costs_fails_at_most_as_often_as_it_says() -> None:
    draw, path, shares = np.random.default_rng(3), np.array([130.0, 400.0, 900.0]), [0.6, 0.3, 0.1]
    true = float(path @ shares)
    claims = [mean_claim(draw.choice(path, size=300, p=shares), "betting", LEVEL, low=130.0, high=900.0)
              for _ in range(DRAWS)]
    assert sum(claim.holds(true - 1e-6) for claim in claims) <= AT_MOST
    assert np.mean([claim.holds(1.25 * true) for claim in claims]) > 0.9, "and it is not vacuous"


def test_betting_knows_a_small_variance() -> None:
    x = paired(np.random.default_rng(1), 5000, 0.004, 0.002)
    wide, narrow = (mean_claim(x, bound, LEVEL, low=-1.0).upper() for bound in ("hoeffding_bentkus", "betting"))
    normal = x.mean() + 1.645 * x.std() / math.sqrt(len(x))
    assert normal < narrow < x.mean() + 2.2 * (normal - x.mean())
    assert wide - x.mean() > 5 * (narrow - x.mean())


def test_the_order_of_a_table_does_not_matter() -> None:
    x = np.repeat([0.0, 1.0], [950, 50])
    shuffled = np.random.default_rng(1).permutation(x)
    assert mean_claim(x, "betting", LEVEL).upper() == pytest.approx(mean_claim(shuffled, "betting", LEVEL).upper(),
                                                                    abs=0.01)


@pytest.mark.parametrize(("bound", "lose", "win", "limit"), [
    ("binomial", 0.01, 0.0, 0.02), ("binomial", 0.0, 0.0, 0.01), ("binomial", 0.2, 0.0, 0.25),
    ("betting", 0.01, 0.005, 0.01), ("betting", 0.0, 0.0, 0.01), ("betting", 0.2, 0.18, 0.07),
    ("hoeffding_bentkus", 0.01, 0.0, 0.02), ("hoeffding_bentkus", 0.1, 0.0, 0.12),
])
def test_the_number_of_samples_named_suffices(bound: str, lose: float, win: float, limit: float) -> None:
    low = 0.0 if win == 0 and bound != "betting" else -1.0
    seen = np.repeat([1.0, -1.0, 0.0], np.array([1000 * lose, 1000 * win, 1000 * (1 - lose - win)]).round().astype(int))
    enough = mean_claim(seen, bound, LEVEL, low=low).enough(limit)
    draw = np.random.default_rng(5)

    def share(samples: int) -> float:
        return float(np.mean([mean_claim(paired(draw, samples, lose, win), bound, LEVEL, low=low).holds(limit)
                              for _ in range(200)]))

    assert share(int(enough)) >= 0.85
    assert share(int(enough * 0.5)) < 0.85, "nor is it far more than needed"
    assert mean_claim(seen, bound, LEVEL, low=low).enough(lose - win) == math.inf


def test_nothing_varies_and_everything_is_below() -> None:
    still = mean_claim(np.full(3, 7.0), "betting", LEVEL, low=7.0, high=7.0)
    assert still.holds(7.0) and not still.holds(6.9) and still.enough(6.9) == math.inf and still.upper() == 7.0
    assert mean_claim(np.ones(2), "betting", LEVEL).holds(1.0), "no mean exceeds the greatest loss"
    with pytest.raises(OfframpError, match="0 or 1"):
        mean_claim(np.array([0.5, 1.0]), "binomial", LEVEL)


def test_the_bootstrap_is_scipys_percentile() -> None:
    draw = np.random.default_rng(2)
    union = draw.integers(1, 50, size=(60, 3)).astype(float)
    hit = (union * draw.uniform(0.7, 1.0, size=union.shape)).round()
    own = (hit * draw.uniform(0.9, 1.0, size=union.shape)).round()

    def fall(rows: np.ndarray, axis: int = -1) -> np.ndarray:
        picked = rows.astype(int)
        return ((hit[picked].sum(-2) - own[picked].sum(-2)) / union[picked].sum(-2)).mean(-1)

    claim = miou_claim(hit, union, own, union, LEVEL)
    theirs = scipy_bootstrap((np.arange(60),), fall, confidence_level=1 - LEVEL, alternative="less",
                             method="percentile", n_resamples=4000, rng=0).confidence_interval.high
    assert claim.observed == pytest.approx(float(fall(np.arange(60))))
    assert claim.upper() == pytest.approx(theirs, abs=0.1 * (theirs - claim.observed))
    assert not claim.holds(claim.observed) and 60 * 0.5 < claim.enough(claim.upper()) < 60 * 4

"""What leaving costs on average at such scores, rather than what it cost these samples. N samples, E exits, F features.

A search that looks at a few thousand samples finds thresholds that the noise of those samples favours. So it plans with
the expected loss given the scores of this exit and the earlier ones, a logistic regression; conditioning on the earlier
scores is what makes it hold for the samples that earlier exits have not let go.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["expected", "expected_counts", "logistic"]

Floats = NDArray[np.float64]


def expected(scores: Floats, outcome: Floats) -> Floats:
    """E[outcome | scores so far] for outcomes in {-1, 0, 1}: scores (N, E), outcome (N, E, 1) -> (N, E, 1)."""
    told = _log_odds(scores)
    smoothed = np.zeros_like(outcome)
    for e in range(scores.shape[1]):
        features = _features(told[:, : e + 1])
        for sign in (1.0, -1.0):
            happened = outcome[:, e, 0] == sign
            if happened.any():
                smoothed[:, e, 0] += sign * logistic(features, happened.astype(np.float64))
    return smoothed


def expected_counts(scores: Floats, change: Floats, *, ridge: float = 1.0) -> Floats:
    """E[change of a confusion matrix | scores so far]: scores (N, E), change (N, E, D) -> (N, E, D); ridge regression.

    The intercept is not held back, so that the change over all samples is what was seen.
    """
    told = _log_odds(scores)
    smoothed = np.zeros_like(change)
    for e in range(scores.shape[1]):
        features = _features(told[:, : e + 1])
        spread = features.std(axis=0)
        design = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
        mean = change[:, e].mean(axis=0)
        bend = design.T @ design + ridge * np.eye(design.shape[1])
        smoothed[:, e] = mean + design @ np.linalg.solve(bend, design.T @ (change[:, e] - mean))
    return smoothed


def logistic(features: Floats, happened: Floats, *, ridge: float = 1.0, steps: int = 25) -> Floats:
    """Fitted probabilities of a ridge logistic regression by Newton's method: (N, F), (N,) in {0, 1} -> (N,).

    The intercept is not held back, so the mean of the probabilities is the share that happened.
    """
    spread = features.std(axis=0)
    even = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
    design = np.column_stack([np.ones(len(features)), even])
    hold = np.full(design.shape[1], ridge)
    hold[0] = 1e-9
    share = (happened.sum() + 0.5) / (len(happened) + 1)
    weights = np.zeros(design.shape[1])
    weights[0] = np.log(share / (1 - share))

    def likelihood(at: Floats) -> float:
        told = design @ at
        return float(np.logaddexp(0, told).sum() - happened @ told + 0.5 * (hold * at * at).sum())

    now = likelihood(weights)
    for _ in range(steps):
        chance = 1 / (1 + np.exp(-np.clip(design @ weights, -40, 40)))
        slope = design.T @ (chance - happened) + hold * weights
        bend = (design * (chance * (1 - chance))[:, None]).T @ design + np.diag(hold)
        move = np.linalg.solve(bend, slope)
        length = 1.0
        while (new := likelihood(weights - length * move)) > now and length > 1e-4:
            length /= 2
        if new > now:
            break
        weights, gained, now = weights - length * move, now - new, new
        if gained < 1e-8 * abs(now):
            break
    out: Floats = 1 / (1 + np.exp(-np.clip(design @ weights, -40, 40)))
    return out


def _log_odds(scores: Floats) -> Floats:
    held: Floats = np.clip(scores, 1e-6, 1 - 1e-6)
    odds: Floats = np.log(held / (1 - held))
    return odds


def _features(told: Floats) -> Floats:
    """This exit's score with hinges at its upper quantiles, where thresholds lie, and the earlier exits' scores."""
    own = told[:, -1]
    knots = np.quantile(own, [0.25, 0.5, 0.75, 0.9])
    hinges = [np.maximum(own - knot, 0) for knot in knots]
    return np.column_stack([own, *hinges, told[:, :-1]])

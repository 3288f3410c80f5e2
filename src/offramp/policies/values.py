"""What the gain of going on is regressed on, and the regression. n rows, N samples, K classes, P columns, L targets.

Of each exit: how sure it is of its answer as it says it, as it should say it (a weight and one bias a class, fitted by
likelihood), and as it and all exits before it should say it together. Three odds, three leads, three entropies, bent at
a few knots, and effects of the class. All smooth, few enough for a thousand samples.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from offramp.functional.summaries import mean_of_histogram
from offramp.policies.signals import signals
from offramp.policies.values_row import FLOOR, LEAD, SURE, WIDE
from offramp.types import Evidence

__all__ = ["Part", "Reading", "Ridge", "fit_voices", "laid_out", "log_probs", "posterior", "read", "voices_of"]

BEND = 0.15  # of 1, 0.4, 0.15 and 0.05 the best on made tables of over-confident exits; elsewhere they are alike
Voices = tuple[Tensor, Tensor]
"""Weights (V, j) of the log-probabilities of the exits passed, and biases (V, K)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What an exit's evidence says of the n rows."""

    stats: Tensor
    """(n, S) float64."""
    said: Tensor | None
    """(n,) int64: the class that would be answered; None of dense exits, where there is none."""
    probs: Tensor
    """(n, K): of the last voice; dense: the mean over pixels."""


def log_probs(logits: Tensor) -> Tensor:
    """(n, j, K) float64; the floor keeps a masked class finite."""
    return logits.double().log_softmax(dim=-1).clamp(min=FLOOR)


def read(evidence: Evidence, voices: Voices | None) -> Reading:
    """The statistics that the gain is regressed on; ``voices`` of this exit, None for dense ones.

    Classification, of each voice: log-odds of the class answered, its lead over the best other class, entropy; then,
    past the first exit, the log-odds that the one before gives it, and the shares of agreement. Dense: top, margin,
    entropy, vote, and the top and agreement of the exit before.
    """
    if voices is None or evidence.logits is None:
        own = signals(evidence)
        columns = [own.top, own.margin, own.entropy]
        if evidence.probs is not None and evidence.probs.shape[1] > 1:
            assert evidence.agreement is not None
            columns += [own.vote, mean_of_histogram(evidence.histograms["top"][:, -2]).double(),
                        evidence.agreement[:, -2].double()]
        return Reading(stats=torch.stack(columns, dim=1), said=None, probs=own.probs)
    weights, biases = voices
    told = log_probs(evidence.logits)
    said = evidence.logits[:, -1].argmax(dim=1)
    spoken = (torch.matmul(weights, told) + biases).log_softmax(dim=2)
    named = said[:, None, None].expand(-1, len(weights), 1)
    own_log = spoken.gather(2, named)
    lead = own_log - spoken.scatter(2, named, -torch.inf).amax(dim=2, keepdim=True)
    probs = spoken.exp()
    disorder = -(probs * spoken).sum(dim=2)
    parts = [_odds(own_log[:, :, 0]), lead[:, :, 0].clamp(-LEAD, LEAD), disorder]
    passed = told.shape[1]
    if passed > 1:
        before = told[:, -2].gather(1, said[:, None])
        same = (evidence.logits[:, :-1].argmax(dim=2) == said[:, None]).double()
        parts += [_odds(before), same[:, -1:]]
        if passed > 2:
            parts.append(same.mean(dim=1, keepdim=True))
    return Reading(stats=torch.cat(parts, dim=1), said=said, probs=probs[:, -1])


def _odds(log_p: Tensor) -> Tensor:
    return -torch.expm1(-log_p).clamp(min=SURE, max=1 / SURE).log()


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One exit's score as tensors; while it is fitted, only how the evidence is laid out."""

    voices: Voices | None
    centre: Tensor
    spread: Tensor
    bent: Tensor
    knots: Tensor
    constant: float = 0.0
    weights: Tensor = field(default_factory=lambda: torch.zeros(0))
    levels: Tensor = field(default_factory=lambda: torch.zeros(0))
    slopes: Tensor = field(default_factory=lambda: torch.zeros(0))
    probs: Tensor = field(default_factory=lambda: torch.zeros(0))

    def smooth(self, reading: Reading) -> tuple[Tensor, Tensor]:
        """Standardised statistics, and with their excess over the knots."""
        x = ((reading.stats - self.centre) / self.spread).clamp(-WIDE, WIDE)
        return x, torch.cat([x, (x[:, self.bent] - self.knots).clamp(min=0.0)], dim=1)

    def scale(self) -> Tensor:
        """Of each smooth column in the regression: bends are held back more than straight lines."""
        return torch.cat([torch.ones_like(self.centre), torch.full_like(self.knots, BEND)])

    def score(self, reading: Reading) -> Tensor:
        """(n,) float64."""
        x, smooth = self.smooth(reading)
        score = (smooth * self.weights).sum(dim=1) + self.constant
        if reading.said is not None and len(self.levels):
            score = score + self.levels[reading.said] + self.slopes[reading.said] * x[:, 0]
        if len(self.probs):
            score = score + (reading.probs * self.probs).sum(dim=1)
        return score

    def design(self, reading: Reading, share: float) -> Tensor:
        """(N, P) that the gain is regressed on; class effects are scaled by ``share``, and left out at 0."""
        x, smooth = self.smooth(reading)
        smooth = smooth * self.scale()
        if not share:
            return smooth
        parts = [smooth]
        if reading.said is not None:
            classes = torch.nn.functional.one_hot(reading.said, reading.probs.shape[1]).double()
            parts += [classes * share, classes * (x[:, :1] * share)]
        return torch.cat([*parts, reading.probs * (2 * share)], dim=1)


def laid_out(reading: Reading, voices: Voices | None, knots: int) -> Part:
    """Centres, spreads, and as many knots a statistic at even quantiles of what was read, where they part it."""
    centre = reading.stats.mean(dim=0)
    spread = reading.stats.std(dim=0, unbiased=False)
    spread = torch.where(spread > 1e-9, spread, 1.0)
    x = (reading.stats - centre) / spread
    bent, at = [], []
    for column in range(x.shape[1]):
        inner = torch.quantile(x[:, column], torch.linspace(0, 1, knots + 2, dtype=torch.float64)[1:-1]).unique()
        for knot in inner[(inner > x[:, column].min() + 1e-3) & (inner < x[:, column].max() - 1e-3)].tolist():
            bent.append(column)
            at.append(knot)
    return Part(voices=voices, centre=centre, spread=spread, bent=torch.tensor(bent, dtype=torch.long),
                 knots=torch.tensor(at, dtype=torch.float64))


# ---- voices ---------------------------------------------------------------------------------------------------


def voices_of(logits: Tensor, answer: Tensor, *, prior: float) -> Voices:
    """What is held against the answers at the last exit of (N, j, K): as said, as it should be, and all together."""
    told = log_probs(logits)
    passed, classes = told.shape[1:]
    weights, biases = [torch.zeros(passed, dtype=torch.float64)], [torch.zeros(classes, dtype=torch.float64)]
    weights[0][-1] = 1.0
    for first in (passed - 1, 0)[: min(passed, 2)]:
        weight, bias = fit_voices(told[:, first:], answer, prior=prior)
        weights.append(torch.cat([weights[0][:first] * 0, weight]))
        biases.append(bias)
    return torch.stack(weights), torch.stack(biases)


def fit_voices(told: Tensor, answer: Tensor, *, prior: float = 2.0, steps: int = 12) -> tuple[Tensor, Tensor]:
    """Weights (j,) and biases (K,) for which softmax(weights . told + biases) is likeliest; told (N, j, K).

    Newton's method on a convex loss, with ``prior`` the strength of a normal one on each bias, in samples, and a faint
    pull of the weights to their mean.
    """
    samples, passed, classes = told.shape
    weight = torch.full((passed,), 1.0 / passed, dtype=torch.float64)
    start, bias = weight.clone(), torch.zeros(classes, dtype=torch.float64)
    right = told[torch.arange(samples), :, answer]  # (N, j)
    often = torch.bincount(answer, minlength=classes).double() / samples
    pull = torch.cat([torch.full((passed,), 2e-3, dtype=torch.float64),
                      torch.full((classes,), prior / samples, dtype=torch.float64)])

    def loss(weight: Tensor, bias: Tensor) -> tuple[float, Tensor]:
        z = torch.matmul(weight, told) + bias
        whole = z.logsumexp(dim=1, keepdim=True)
        moved = torch.cat([weight - start, bias])
        own = (right @ weight + bias[answer] - whole[:, 0]).mean()
        return float(-own + 0.5 * (pull * moved.square()).sum()), (z - whole).exp()

    best, probs = loss(weight, bias)
    for _ in range(steps):
        expected = torch.einsum("nk,njk->nj", probs, told)
        slope = torch.cat([(expected - right).mean(dim=0), probs.mean(dim=0) - often])
        slope += pull * torch.cat([weight - start, bias])
        mixed = torch.einsum("nk,njk->jk", probs, told) / samples - expected.T @ probs / samples
        square = torch.stack([(expected_of * told).sum(dim=(0, 2)) for expected_of in
                              (probs[:, None] * told[:, j : j + 1] for j in range(passed))])
        bent = torch.zeros(passed + classes, passed + classes, dtype=torch.float64)
        bent[:passed, :passed] = square / samples - expected.T @ expected / samples
        bent[:passed, passed:], bent[passed:, :passed] = mixed, mixed.T
        bent[passed:, passed:] = torch.diag(probs.mean(dim=0)) - probs.T @ probs / samples
        step = torch.linalg.solve(bent + torch.diag(pull), slope)
        rate = 1.0
        while rate > 1e-4:
            tried = weight - rate * step[:passed], bias - rate * step[passed:]
            found, new = loss(*tried)
            if found <= best:
                break
            rate /= 2
        else:
            break
        gained, (weight, bias), best, probs = best - found, tried, found, new
        if gained < 1e-8:
            break
    return weight, bias


def posterior(logits: Tensor, answer: Tensor, *, prior: float) -> Tensor:
    """(N, E): in hindsight, all exits heard, how likely the answer of each is right; logits (N, E, K).

    Its noise is a fraction of that of having been right: what the last exit knows is averaged out.
    """
    told = log_probs(logits)
    weight, bias = fit_voices(told, answer, prior=prior)
    together = (torch.matmul(weight, told) + bias).softmax(dim=1)
    return together.gather(1, logits.argmax(dim=2))


# ---- ridge ----------------------------------------------------------------------------------------------------


class Ridge:
    """Ridge regression of many targets on one design, its leave-one-out predictions in closed form.

    For x the centred design with Gram matrix V diag(s) V', the prediction for a sample that was left out is
    (fit - h y) / (1 - h), h its leverage: exact for a given penalty (Allen's PRESS).
    """

    def __init__(self, design: Tensor) -> None:
        self.mean = design.mean(dim=0)
        centred = design - self.mean
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        kept = values > max(float(values[-1]) if len(values) else 0.0, 1e-12) * 1e-10
        self.values, self.vectors = values[kept], vectors[:, kept]
        self.basis = centred @ self.vectors / self.values.sqrt()
        self.squares = self.basis.square()

    def left_out(self, targets: Tensor, penalty: float) -> Tensor:
        """(N, L): what a fit to all other samples predicts for each."""
        shrink = self.values / (self.values + penalty)
        mean = targets.mean(dim=0)
        fit: Tensor = mean + self.basis @ (shrink[:, None] * (self.basis.T @ (targets - mean)))
        leverage = (1 / len(targets) + self.squares @ shrink)[:, None]
        left_out: Tensor = (fit - leverage * targets) / (1 - leverage).clamp(min=1e-3)
        return left_out

    def error(self, targets: Tensor, penalty: float) -> float:
        """Mean square of the leave-one-out error, as a share of each target's variance."""
        spread = targets.var(dim=0, unbiased=False) + 1e-12 * (1 + targets.square().mean(dim=0))
        return float(((self.left_out(targets, penalty) - targets).square().mean(dim=0) / spread).mean())

    def solve(self, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        """Coefficients (P, L) and constants (L,)."""
        mean = targets.mean(dim=0)
        scaled = self.values.sqrt() / (self.values + penalty)
        coefficients = self.vectors @ (scaled[:, None] * (self.basis.T @ (targets - mean)))
        return coefficients, mean - self.mean @ coefficients

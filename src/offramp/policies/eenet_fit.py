"""How EENet learns (arXiv:2301.07099, 3.2): losses, exit scores and shares of exits, on arrays of any origin.

N samples, E exits, the last being the backbone; D inputs of an exit. Nothing here knows a table or a policy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.policies.quotas import Thresholded, mean_cost, thresholds_for, within

__all__ = [
    "Course", "assign", "assignment_loss", "chain", "cost_loss", "fit_scores", "score_loss", "target", "tilted",
]

_EDGE = 0.01
_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class Course:
    """What there is to learn from."""

    inputs: tuple[Tensor, ...]
    """Of each exit, the last among them: (N, D) float32; D may differ."""
    start: tuple[Tensor, ...]
    """Where the weights of each exit's score begin, and what they are drawn to: (D + k,) float64 at exit k from 0, or
    (D,) where no earlier score is fed forward."""
    right: Tensor
    """(N, E) float64 in [0, 1]: whether, or how far, an exit is right."""
    cost: Tensor
    """(E,) float64 rising."""

    def __len__(self) -> int:
        return len(self.right)


# ---- losses ---------------------------------------------------------------------------------------------------


def score_loss(raw: Tensor, right: Tensor, weight: Tensor) -> Tensor:
    r"""Eq. 6: weighted binary cross-entropy of scores (N, E), clamped to [0, 1], meaned over exits.

    .. math:: L_g = \frac{1}{K} \sum_n \sum_k w_{nk} \ell(q̂_{nk}, q_{nk})

    Where we differ. The paper prints l = q log q̂ + (1 - q) log(1 - q̂) and calls it the cross-entropy to be minimised:
    its minus sign is put back. A clamped score has no gradient and an infinite loss where it is surely wrong, so
    ``raw``, the score before it is clamped, is taken, and below a probability of 0.01 the logarithm goes on along its
    tangent: the same loss between, convex everywhere, and a wrong answer with a score of 3 still pulls.
    """
    losses = right * _surprise(raw) + (1 - right) * _surprise(1 - raw)
    mean: Tensor = (weight * losses).sum() / raw.shape[1]
    return mean


def _surprise(p: Tensor) -> Tensor:
    return (_EDGE - p).clamp(min=0) / _EDGE - p.clamp(_EDGE, 1).log()


def target(scores: Tensor, beta: float) -> Tensor:
    """Eq. 8: the distribution (N, E) over exits that is best by Eq. 7, scores^(1/beta) normalised.

    A small number is added to each score: where all are 0 the ratio is 0/0, and every exit is as good.

    >>> target(torch.tensor([[0.3, 0.6], [0.0, 0.0]], dtype=torch.float64), 1.0)
    tensor([[0.3333, 0.6667],
            [0.5000, 0.5000]], dtype=torch.float64)
    """
    return ((scores + _EPSILON).log() / beta).softmax(dim=1)


def cost_loss(shares: Tensor, cost: Tensor, budget: float) -> Tensor:
    """Eq. 10: |B - mean cost| / B of assignments (N, E)."""
    return ((shares @ cost).mean() - budget).abs() / budget


def assignment_loss(raw: Tensor, wanted: Tensor, cost: Tensor, budget: float, alpha_cost: float) -> Tensor:
    """L_h = Eq. 9 + alpha_cost x Eq. 10, of raw outputs (N, E), whose softmax over exits is the assignment (Eq. 5).

    No sigmoid comes before the softmax: it would keep every share between 1/(1 + (E - 1) e) and e/(e + E - 1), and most
    budgets out of reach.
    """
    said = raw.log_softmax(dim=1)
    kl: Tensor = (torch.special.xlogy(wanted, wanted) - wanted * said).sum() / wanted.numel()
    return kl + alpha_cost * cost_loss(said.exp(), cost, budget)


# ---- scores g -------------------------------------------------------------------------------------------------


def chain(course: Course, weights: Sequence[Tensor]) -> Tensor:
    """Scores (N, E) float64 before they are clamped; each reads its inputs and the earlier exits' clamped scores."""
    made: list[Tensor] = []
    for inputs, weight in zip(course.inputs, weights, strict=True):
        made.append(_score(inputs, made, weight))
    return torch.stack(made, dim=1)


def _score(inputs: Tensor, earlier: Sequence[Tensor], weight: Tensor) -> Tensor:
    wide = inputs.shape[1]
    raw = (inputs @ weight[:wide].to(inputs.dtype)).double()
    for share, one in zip(weight[wide:], earlier, strict=False):
        raw = raw + share * one.clamp(0, 1)
    return raw


def fit_scores(course: Course, weight: Tensor, weights: Sequence[Tensor], *, spread: float,
               steps: int = 60) -> list[Tensor]:
    """The weights of each exit's score that make ``score_loss`` least, from ``weights`` on; ``weight`` (N, E).

    An exit after the other, since what is fed forward is what the exits before it have learned; each alone is convex,
    so no seed is drawn and none can fail. Where we differ: L-BFGS to the minimum, not Adam at 3e-5; and each weight is
    drawn to its start, as if it lay ``spread`` around it (a normal prior), so that a class with few samples keeps the
    largest probability as its score.
    """
    made: list[Tensor] = []
    learned: list[Tensor] = []
    for e, (inputs, start) in enumerate(zip(course.inputs, course.start, strict=True)):
        psi = weights[e].clone().requires_grad_()
        search = torch.optim.LBFGS([psi], max_iter=steps, history_size=20, line_search_fn="strong_wolfe",
                                   tolerance_change=1e-7)

        def loss(psi: Tensor = psi, e: int = e, inputs: Tensor = inputs, start: Tensor = start,
                 search: torch.optim.LBFGS = search) -> Tensor:
            search.zero_grad()  # gradients of earlier steps would pile up
            raw = _score(inputs, made, psi)
            found = score_loss(raw[:, None], course.right[:, e : e + 1], weight[:, e : e + 1])
            found = found + ((psi - start) ** 2).sum() / (2 * spread**2 * len(course))
            found.backward()
            return found

        search.step(loss)
        learned.append(psi.detach())
        with torch.no_grad():
            made.append(_score(inputs, made, learned[-1]))
    return learned


# ---- assignment h ---------------------------------------------------------------------------------------------


def assign(course: Course, scores: Tensor, budget: float, *, beta: float, alpha_cost: float, hidden: float, seed: int,
           epochs: int = 60, patience: int = 20, batch: int = 1024, rate: float = 0.03) -> Tensor:
    """Assignments (N, E) that ``h``, a two-layer MLP an exit, learns from clamped ``scores`` (N, E) for a budget.

    Each reads what its exit's score reads; ``hidden`` times as many units. The network itself is not kept: what a
    policy needs of it are the mean shares. Where we differ: batches of 1,024 by Adam at 0.03 with a falling rate, at
    most 60 epochs or 200 steps, the best one kept; inputs stand at zero mean, and the last layer starts at the mean
    target, tilted to the budget: every budget is met from the first step on, the ends of the range too.
    """
    draw = torch.Generator().manual_seed(seed)
    wanted = target(scores, beta).float()
    rows = [torch.cat([inputs, scores[:, : len(start) - inputs.shape[1]].float()], dim=1)
            for inputs, start in zip(course.inputs, course.start, strict=True)]
    rows = [one - one.mean(dim=0) for one in rows]
    shares, scaled = wanted.double().mean(dim=0), (course.cost - course.cost[0]) / (course.cost[-1] - course.cost[0])
    met = _tilt(shares, scaled, (budget - float(course.cost[0])) / float(course.cost[-1] - course.cost[0]))
    layers: list[tuple[Tensor, ...]] = []
    for e, one in enumerate(rows):
        wide = one.shape[1]
        units = max(2, round(hidden * wide))
        layers.append(((torch.rand(wide, units, generator=draw) * 2 - 1) * math.sqrt(6 / wide),
                       torch.zeros(units), torch.zeros(units, 1), met[e].float().reshape(1)))
    numbers = [tensor.requires_grad_() for layer in layers for tensor in layer]

    def raw(of: Tensor | slice) -> Tensor:
        return torch.cat([torch.addmm(d, torch.addmm(b, one[of], a).relu(), c)
                          for one, (a, b, c, d) in zip(rows, layers, strict=True)], dim=1)

    cost = course.cost.float()
    epochs = max(epochs, 200 * batch // max(len(course), batch))  # the corner of |B - cost| makes few steps too few
    search = torch.optim.Adam(numbers, lr=rate)
    falls = torch.optim.lr_scheduler.CosineAnnealingLR(search, epochs, eta_min=rate / 20)
    best, least, waited = torch.zeros_like(wanted), math.inf, 0
    for _ in range(epochs):
        for of in torch.randperm(len(course), generator=draw).split(batch):
            search.zero_grad()
            assignment_loss(raw(of), wanted[of], cost, budget, alpha_cost).backward()
            search.step()
        falls.step()
        with torch.no_grad():
            found = raw(slice(None))
            now = float(assignment_loss(found, wanted, cost, budget, alpha_cost))
        waited += 1
        if now < least * (1 - 1e-3):
            best, least, waited = found, now, 0
        if waited >= patience:
            break
    return best.double().softmax(dim=1)


def _tilt(shares: Tensor, scaled: Tensor, wanted: float) -> Tensor:
    """log(p_k) + t c_k for the t at which the mean of the costs, scaled to [0, 1], is the one wanted."""
    low, high = -100.0, 100.0
    for _ in range(50):
        t = (low + high) / 2
        below = float((shares.log() + t * scaled).softmax(dim=0) @ scaled) < wanted
        low, high = (t, high) if below else (low, t)
    return (shares.log() + low * scaled).log_softmax(dim=0)


# ---- thresholds -----------------------------------------------------------------------------------------------


def tilted(scores: Tensor, shares: Tensor, cost: Tensor, budget: float) -> Thresholded:
    """Thresholds of scores (N, E - 1) whose mean cost keeps the budget and comes as near as ties allow.

    Algorithm 1 with shares (E,) tilted to p_k exp(t c_k): no other shares of their mean cost are nearer to the learned
    ones in KL(. || p). The paper takes the learned shares as they are, and its schedulers overspend by 0.7 to 6.9 %.
    """
    scaled = (cost - cost[0]) / (cost[-1] - cost[0])
    ends = 100 / float(scaled.diff().min().clamp(min=1e-3))

    def family(tilt: float) -> Thresholded:
        return thresholds_for(scores, (shares.log() + tilt * scaled).softmax(dim=0))

    return within(budget, family, lambda found: mean_cost(scores, found, cost), low=-ends, high=ends, steps=80)

"""Stop probabilities learned from the losses of all exits (MAML-stop), and the tiny networks that give them.

N samples, E exits, D inputs of a network. Exit k stops a sample that has come so far with probability pi_k, so that
q_k = pi_k prod_{j<k} (1 - pi_j), and the last exit takes what is left.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from offramp.errors import OfframpError
from offramp.policies.eenet_fit import tilted
from offramp.policies.lesson import Lesson
from offramp.policies.quotas import Thresholded
from offramp.policies.scored import leave_above
from offramp.policies.signals import Signals, signals
from offramp.types import Evidence

__all__ = ["MamlStop", "StopNets", "free_energy", "imitation", "inputs", "oracle", "stop_at", "train_nets"]

Layer = tuple[tuple[float, ...], ...]
"""Its rows; a row is its weights and then its bias."""

_AT_ONCE = 1 << 20  # products held at a time
_STEEPEST = 1e9
_RATE, _DUAL_RATE = 0.03, 0.5


@final
@dataclass(frozen=True, kw_only=True)
class StopNets:
    """Leave where a tiny network says so: the log odds of stopping are held against the exit's threshold."""

    thresholds: Thresholded
    """One an exit, the backbone left out; rows with ``score >= threshold`` leave; None: no row leaves."""
    nets: tuple[tuple[Layer, ...], ...]
    """One an exit: its layers, with ReLU between them; the last has one row, the score."""
    vote: bool = True
    """Whether the inputs are all of ``Signals.columns``, or those alone that the exit itself said."""

    def __post_init__(self) -> None:
        nets = tuple(tuple(tuple(tuple(float(w) for w in row) for row in layer) for layer in net) for net in self.nets)
        object.__setattr__(self, "nets", nets)
        object.__setattr__(self, "thresholds", tuple(None if t is None else float(t) for t in self.thresholds))
        faults = [f"threshold {t}" for t in self.thresholds if t is not None and not t == t]
        if len(nets) != len(self.thresholds):
            faults.append(f"{len(nets)} networks for {len(self.thresholds)} thresholds")
        for e, net in enumerate(nets):
            wide = [len(layer) for layer in net]
            if not net or wide[-1] != 1 or any({len(row) for row in layer} != {before + 1} for layer, before in
                                               zip(net[1:], wide, strict=False)) or len(set(map(len, net[0]))) != 1:
                faults.append(f"network {e} of layers that do not fit")
        if faults:
            raise OfframpError(expected="networks that can decide", got="; ".join(faults), where="StopNets")

    @cached_property
    def _weights(self) -> list[list[Tensor]]:
        return [[torch.tensor(layer, dtype=torch.float64) for layer in net] for net in self.nets]

    def score(self, exit_index: int, evidence: Evidence) -> Tensor:
        """The stop probability's log odds: (n,) float64. A sigmoid's last bit would change with the batch."""
        return self.judge(exit_index, signals(evidence))

    def judge(self, exit_index: int, said: Signals) -> Tensor:
        """The same, of signals already read."""
        x = inputs(said, vote=self.vote)
        layers = [layer.to(x.device) for layer in self._weights[exit_index]]
        if x.shape[1] + 1 != layers[0].shape[1]:
            raise OfframpError(expected=f"{layers[0].shape[1] - 1} inputs", got=f"{x.shape[1]}", where="StopNets",
                               todo="fit it on a table of this network, which has the same classes.")
        for depth, layer in enumerate(layers):
            x = _apply(layer, x.relu() if depth else x)
        return x[:, 0]

    def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
        """Bool (n,): the rows that leave. Raises DataError on NaN."""
        return leave_above(self.thresholds[exit_index], self.score(exit_index, evidence), exit_index)


def _apply(layer: Tensor, x: Tensor) -> Tensor:
    # products and sums row by row: a matrix product's last bits change with the size of the batch
    rows = max(1, _AT_ONCE // layer.numel())
    return torch.cat([(part[:, None] * layer[:, :-1]).sum(dim=2) for part in x.split(rows)]) + layer[:, -1]


def inputs(said: Signals, *, vote: bool) -> Tensor:
    """(n, K + 4) float64: what a network reads; without the vote, which earlier exits share in, (n, K + 3)."""
    columns = said.columns()
    return columns if vote else columns[:, :-1]


def train_nets(x: Tensor, loss: Callable[[Tensor], Tensor], *, hidden: int, steps: int, decay: float, seed: int,
               then: tuple[Callable[[Tensor], Tensor], int] | None = None) -> tuple[tuple[Layer, ...], ...]:
    """Networks, one an early exit, that minimise ``loss`` of their outputs: (N, E - 1) logits -> a scalar.

    x (E - 1, N, D). One hidden layer, or none where ``hidden`` is 0. Full batch, Adam, a rate that falls to 0;
    ``decay`` / 2 times the weights' squares is added, of inputs made standard. ``then``: a second loss and its steps,
    which go on from the first's end. The seed draws the first weights; the global generator is left alone.
    """
    x = x.float()
    mean, spread = x.mean(dim=1), x.std(dim=1, correction=0).clamp(min=0.05)  # what hardly varies is not blown up
    x = (x - mean[:, None]) / spread[:, None]
    sizes = [x.shape[2], *([hidden] if hidden else []), 1]
    draw = torch.Generator().manual_seed(seed)
    layers = [torch.randn(len(x), wide + 1, out, generator=draw) * wide**-0.5 for wide, out in
              zip(sizes, sizes[1:], strict=False)]
    for layer in layers:
        layer[:, -1] = 0
        layer.requires_grad_()

    def forward() -> Tensor:
        y = x
        for depth, layer in enumerate(layers):
            y = torch.baddbmm(layer[:, -1:], y.relu() if depth else y, layer[:, :-1])
        return y[:, :, 0].T

    for aim, count in [(loss, steps), *([then] if then else [])]:
        optimiser = torch.optim.Adam(layers, lr=_RATE)
        for step in range(count):
            optimiser.param_groups[0]["lr"] = _RATE * (1 - step / count)
            optimiser.zero_grad()
            with torch.enable_grad():
                weighed = aim(forward()) + decay / 2 * sum((layer[:, :-1] ** 2).sum() for layer in layers)
                weighed.backward()
            optimiser.step()
    made = [layer.detach().double() for layer in layers]
    first = made[0][:, :-1] / spread.double()[:, :, None]
    made[0] = torch.cat([first, made[0][:, -1:] - (mean.double()[:, None] @ first)], dim=1)
    return tuple(tuple(tuple(map(tuple, layer[e].T.tolist())) for layer in made) for e in range(len(x)))


def stop_at(logits: Tensor) -> Tensor:
    """log q: stop logits (N, E - 1) -> (N, E).

    >>> stop_at(torch.tensor([[0.0, 0.0]])).exp().tolist()
    [[0.5, 0.25, 0.25]]
    """
    stays = logsigmoid(-logits).cumsum(dim=1)
    nothing = torch.zeros_like(logits[:, :1])
    return torch.cat([nothing, stays], dim=1) + torch.cat([logsigmoid(logits), nothing], dim=1)


def oracle(losses: Tensor, beta: float) -> Tensor:
    """q* (N, E), proportional to exp(-loss / beta): where one who knows the losses stops (MAML-stop).

    >>> oracle(torch.tensor([[0.0, 0.0]]), 0.1).tolist()
    [[0.5, 0.5]]
    """
    return (-losses / beta).softmax(dim=1)


def imitation(target: Tensor, log_q: Tensor) -> Tensor:
    """Mean of KL(q* || q), both (N, E): stage two."""
    return (torch.xlogy(target, target) - target * log_q).sum(dim=1).mean()


def free_energy(losses: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Mean of E_q[loss] - beta H(q), both (N, E): beta KL(q || q*) and a constant, -beta log sum exp(-loss / beta)."""
    return (log_q.exp() * (losses + beta * log_q)).sum(dim=1).mean()


@final
@dataclass(frozen=True, kw_only=True)
class MamlStop:
    """Learned stop probabilities (MAML-stop, arXiv:2006.05082), a scheduler: training anew for each budget.

    The variational objective is E_q[loss_k + lambda c_k] - beta H(q): the cost is a prior over exits proportional to
    exp(-lambda c_k / beta). Its optimum where losses are known is closed (``oracle``), and there lambda >= 0 is found
    by bisection. Networks imitate it, by KL(q* || q); then they minimise the objective itself, which is KL(q || q*),
    while lambda follows what q spends.

    Where we differ: the predictor is frozen, so that stage one is the closed form alone and the last, joint stage
    trains the stop networks alone, one an exit, on ``Signals.columns`` and no features; the loss is what an exit loses
    of ``Lesson.value``, in units of its mean range over exits, since cross-entropy is unknown of dense tables; the cost
    is ours, for the paper has no budget; at run time nothing is drawn: those leave whose stop probability is among the
    highest, as many as q sends to the exit, tilted so that the budget is kept.
    """

    beta: float = 0.1
    hidden: int = 16
    """Units; 0: a linear network."""
    steps: int = 150
    tune_steps: int = 100
    """Of the last stage, which pays at tight budgets, where an oracle leaves by what no evidence tells."""
    decay: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.hidden < 0 or self.steps < 0 or self.tune_steps < 0 or not self.decay >= 0:
            raise OfframpError(expected="beta above 0, and no negative sizes", got=repr(self), where="MamlStop")

    def fit(self, lesson: Lesson, /) -> Callable[[float], StopNets]:
        """``at(budget)`` trains for this budget: a second for some thousand samples."""
        return partial(self._at, lesson, torch.stack([inputs(said, vote=True) for said in lesson.signals]),
                       relative_loss(lesson))

    def _at(self, lesson: Lesson, x: Tensor, losses: Tensor, budget: float) -> StopNets:
        share, wanted = lesson.cost / lesson.cost[-1], lesson.feasible(budget) / float(lesson.cost[-1])
        price = multiplier(losses, share, wanted, self.beta)
        target = oracle(losses + price * share, self.beta).float()
        dual = _Dual(losses.float(), share.float(), wanted, self.beta, price)
        nets = train_nets(x, lambda logits: imitation(target, stop_at(logits)), hidden=self.hidden, steps=self.steps,
                          decay=self.decay, seed=self.seed, then=(dual, self.tune_steps))
        free = StopNets(thresholds=(None,) * len(nets), nets=nets)
        scores = torch.stack([free.judge(e, said) for e, said in enumerate(lesson.signals)], dim=1)
        shares = stop_at(scores).exp().mean(dim=0).clamp(min=1e-30)  # none is out of a tilt's reach
        return StopNets(nets=nets, thresholds=tilted(scores, shares, lesson.cost, budget))


@dataclass
class _Dual:
    """The objective of stop logits; each call moves lambda by what the distribution spends beyond the budget."""

    losses: Tensor
    share: Tensor
    wanted: float
    beta: float
    price: float

    def __call__(self, logits: Tensor) -> Tensor:
        log_q = stop_at(logits)
        spent = float((log_q.detach().exp() @ self.share).mean())
        self.price = max(0.0, self.price + _DUAL_RATE * (spent - self.wanted))
        return free_energy(self.losses + self.price * self.share, log_q, self.beta)


def relative_loss(lesson: Lesson) -> Tensor:
    """(N, E) float64: the backbone's value less each exit's, in units of the mean range over exits of a sample."""
    lost = lesson.value[:, -1:] - lesson.value
    spread = float((lost.amax(dim=1) - lost.amin(dim=1)).mean())
    return lost / (spread or 1.0)


def multiplier(losses: Tensor, cost: Tensor, budget: float, beta: float) -> float:
    """The least lambda >= 0 at which the oracle's mean cost is at most the budget; losses (N, E), cost (E,)."""
    def keeps(price: float) -> bool:
        return float((oracle(losses + price * cost, beta) @ cost).mean()) <= budget

    low, high = 0.0, beta
    if keeps(low):
        return low
    while not keeps(high) and high < _STEEPEST:  # at the first exit's own cost no lambda does
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high

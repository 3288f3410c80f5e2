"""Gati's learned caches: at each exit a selector says whether its answer is a hit. N samples, E exits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from offramp.errors import OfframpError
from offramp.policies.lesson import Lesson
from offramp.policies.mamlstop import StopNets, inputs, train_nets
from offramp.policies.quotas import Thresholded, mean_cost, thresholds_for, within

__all__ = ["LearnedCache", "precise", "selector_loss"]

_MOST_EXITS = 12


@final
@dataclass(frozen=True, kw_only=True)
class LearnedCache:
    """Selectors that tell hits from misses (Gati, arXiv:2101.07344), a scheduler; one precision spans the budgets.

    A cache is a predictor of the network's answer and a selector. The predictor is the exit's head; the selector is a
    tiny network on what that head alone says, trained by logistic loss on whether it is right (``Lesson.right``; dense:
    on what share), hits and misses weighing alike. Of those that reach an exit as many leave, from the likeliest
    hit down, as keep the share of hits among them at the bar; bisection finds the lowest bar that keeps the budget.

    Where we differ: selectors read top, margin and entropy beside the softmax, from which a small network has to find
    them; public code takes a softmax before the cross-entropy too, which bounds the loss, and a fixed threshold of 0.5.
    """

    hidden: int = 16
    """Units; 0: a linear selector, as in public code."""
    steps: int = 200
    decay: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden < 0 or self.steps < 0 or not self.decay >= 0:
            raise OfframpError(expected="no negative sizes", got=repr(self), where="LearnedCache")

    def fit(self, lesson: Lesson, /) -> Callable[[float], StopNets]:
        """Trains the selectors, once; ``at(budget)`` finds the bar."""
        free, scores = self._selectors(lesson)
        right, cost = lesson.right[:, :-1], lesson.cost

        def at(budget: float) -> StopNets:
            thresholds = within(lesson.feasible(budget), lambda bar: precise(scores, right, bar),
                                partial(mean_cost, scores, cost=cost), low=0.0, high=2.0)
            return StopNets(nets=free.nets, vote=False, thresholds=thresholds)

        return at

    def compose(self, lesson: Lesson, *, precision: float) -> tuple[str, ...]:
        """The exits whose caches cost least on average at this bar, the heads of the others being dropped.

        Every choice of at most 12 exits is tried, none among them; ties take the fewer. ``table.select`` of the names
        gives the table to fit. Where we differ: the paper solves an integer program, under a limit on memory too.
        """
        if lesson.exits - 1 > _MOST_EXITS:
            raise OfframpError(expected=f"at most {_MOST_EXITS} early exits", got=f"{lesson.exits - 1}",
                               where="LearnedCache.compose()", todo="select some columns of the table first.")
        scores, right = self._selectors(lesson)[1], lesson.right
        body, head = lesson.table.costs.one_width("LearnedCache.compose()").parts(lesson.unit, batch=lesson.batch)

        def cheapest(e: int, here: Tensor, heads: float) -> tuple[float, tuple[str, ...]]:
            """Of those that come to exit e, what they pay in all at best, and at which exits from there on."""
            if e == lesson.exits - 1 or not len(here):
                return len(here) * (float(body[-1]) + heads), ()
            without, names = cheapest(e + 1, here, heads)
            threshold = precise(scores[here, e : e + 1], right[here, e : e + 1], precision)[0]
            if threshold is None:
                return without, names
            leaves, paid = scores[here, e] >= threshold, heads + float(head[e])
            later, others = cheapest(e + 1, here[~leaves], paid)
            taken = later + int(leaves.sum()) * (float(body[e]) + paid)
            return (taken, (lesson.table.names[e], *others)) if taken < without else (without, names)

        return cheapest(0, torch.arange(len(lesson)), 0.0)[1]

    def _selectors(self, lesson: Lesson) -> tuple[StopNets, Tensor]:
        right = lesson.right[:, :-1].float()
        nets = train_nets(torch.stack([inputs(said, vote=False) for said in lesson.signals]),
                          lambda logits: selector_loss(logits, right), hidden=self.hidden, steps=self.steps,
                          decay=self.decay, seed=self.seed)
        free = StopNets(thresholds=(None,) * len(nets), nets=nets, vote=False)
        return free, torch.stack([free.judge(e, said) for e, said in enumerate(lesson.signals)], dim=1)


def selector_loss(logits: Tensor, right: Tensor) -> Tensor:
    """Logistic loss, both (N, E - 1), summed over exits; of each exit hits weigh one half in all, and misses the other.

    An exit that is always right, or never, learns that alone.
    """
    share = right.mean(dim=0)
    mixed = (share > 0) & (share < 1)
    hit = torch.where(mixed, 0.5 / share, 1.0)
    miss = torch.where(mixed, 0.5 / (1 - share), 1.0)
    return -(hit * right * logsigmoid(logits) + miss * (1 - right) * logsigmoid(-logits)).mean(dim=0).sum()


def precise(scores: Tensor, right: Tensor, bar: float) -> Thresholded:
    """Thresholds under which the most leave at each exit of those that reach it, at least ``bar`` of them right.

    Both (N, E - 1). Equal scores stay together; an exit where no such group is right enough is disabled.

    >>> precise(torch.tensor([[0.9], [0.7], [0.5]]).double(), torch.tensor([[1.0], [0.0], [1.0]]), 0.65)
    (0.499,)
    """
    here = torch.arange(len(scores))
    made: list[float | None] = []
    for e in range(scores.shape[1]):
        ranked, order = scores[here, e].sort(descending=True)
        counts = torch.arange(1, len(here) + 1)
        good = right[here, e][order].double().cumsum(dim=0) >= bar * counts - 1e-9
        good[:-1] &= ranked[:-1] > ranked[1:]
        quota = int(counts[good].max()) if bool(good.any()) else 0
        threshold = thresholds_for(ranked[:, None], torch.tensor([quota / max(len(here), 1)], dtype=torch.float64))[0]
        made.append(threshold)
        if threshold is not None:
            here = here[scores[here, e] < threshold]
    return tuple(made)

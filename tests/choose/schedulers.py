"""A scheduler for tests: shares that fall geometrically, of top probabilities (MSDNet's)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from offramp.policies.lesson import Lesson
from offramp.policies.quotas import geometric, mean_cost, thresholds_for, within
from offramp.policies.thresholds import Thresholds
from offramp.types import Policy


@dataclass(frozen=True)
class Geometric:
    """``skip``: an exit, by its place in the lesson's table of three, that is never used."""

    skip: int | None = None
    over: float = 1.0
    """By how much it spends more than it is asked to: a scheduler that breaks its word."""

    def fit(self, lesson: Lesson) -> Callable[[float], Policy]:
        scores = torch.stack([one.top for one in lesson.signals], dim=1)

        def family(ratio: float) -> tuple[float | None, ...]:
            found = thresholds_for(scores, geometric(ratio, lesson.exits))
            return tuple(None if e == self.skip and lesson.exits == 4 else one for e, one in enumerate(found))

        def at(budget: float) -> Policy:
            most = lesson.feasible(budget) * self.over
            found = within(most, family, lambda t: mean_cost(scores, t, lesson.cost), low=1e-4, high=1e4)
            return Thresholds(thresholds=found)

        return at

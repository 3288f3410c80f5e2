"""Moving between fitted policies while the network runs, so that what is really spent meets the budget.

A policy keeps its budget on samples like those that it was fitted on. Where harder or easier ones come, another takes
over (EENet, supplement, "Adapting to Dynamic Budget Settings"). n rows of a pass, E exits, the last being the backbone.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from offramp.errors import OfframpError, PlanError
from offramp.functional.confidence import BY_NAME
from offramp.policies.lesson import Lesson, Scheduler
from offramp.policies.scored import checked
from offramp.policies.thresholds import Thresholds
from offramp.types import CONFIDENCES, EDGED, Evidence, Policy

__all__ = ["Account", "Switch", "Switching", "Turn"]

_ROUNDING = 1 + 1e-9


class Account(NamedTuple):
    """What was spent so far."""

    rows: int
    spent: float
    """In the unit of the costs; of finished passes."""
    most_under: float
    most_over: float
    """How far ``spent`` can be from ``rows * budget``, whatever comes: the bound of :class:`Switch`."""


@final
class Turn:
    """The policy of one forward pass, which the pass ends by saying where its rows left."""

    def __init__(self, policy: Policy, rows: int, settle: Callable[["Turn", Tensor], None]) -> None:
        self.policy, self.rows, self._settle = policy, rows, settle

    def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
        """As the policy in force when the pass began."""
        return self.policy.decide(exit_index, evidence)

    def observe(self, exit_index: Tensor) -> None:
        """Charge the rows that left at these exits (m,), m <= n: a pass that was broken off may bring fewer."""
        self._settle(self, exit_index)


@final
@dataclass(kw_only=True)
class Switch:
    """Holds policies of rising cost, charges each pass what it really spent, and picks the next pass's policy.

    ``begin(rows)`` gives the :class:`Turn` of a pass; the runtime asks for one whenever a policy has ``begin``. The
    next rows may spend ``budget - D / H``, D being what was spent beyond the budget so far: that would settle D within
    H rows. The dearest policy that costs at most this takes over: as fitted, and by as much more or less as rows of the
    last ``horizon`` or so cost beyond what was fitted. EENet takes the nearest as fitted, with the rest of a test set
    of known size for H; a stream has no end, and an error of all policies alike would stay.

    **Bound.** Whatever comes, after each pass

        -H (budget - c_1) <= spent - rows * budget <= H (c_E - budget),    H = max(horizon, 2 b),

    b being the most rows ever in passes at once; so the mean is off by O(1 / rows). For: a pass of n rows spends
    between n c_1 and n c_E. If the upper end could be crossed, were all passes under way and this one to spend the
    most, everyone leaves at the first exit instead, which costs c_1 <= budget and brings no sum up; if the lower end
    could be, nobody leaves early, which brings none down. Neither crosses the other end: the ends are H (c_E - c_1)
    apart, and the b rows under way, in whatever order they end, can move the sum by b (c_E - c_1) at most.

    Any number of threads may call; copies and saved plans begin a new account, and networks that share this object
    share it. ``decide`` is what a pass of one row would be told now, and charges nothing.
    """

    budget: float
    """The mean cost a row that is to be met; above c_E it is taken for c_E."""
    costs: tuple[float, ...]
    """(E,) rising: what a row pays that leaves at each exit."""
    nominal: tuple[float, ...]
    """What a row costs under each policy, where it was fitted."""
    policies: tuple[Policy, ...]
    horizon: int = 256
    """Rows over which an error is to be settled."""
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False, compare=False)
    _open: dict[Turn, tuple[float, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _rows: int = field(default=0, init=False, repr=False, compare=False)
    _spent: float = field(default=0.0, init=False, repr=False, compare=False)
    _drift: float = field(default=0.0, init=False, repr=False, compare=False)
    _reach: int = field(default=0, init=False, repr=False, compare=False)
    _ladder: tuple[tuple[float, Policy], ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.costs, self.nominal = tuple(map(float, self.costs)), tuple(map(float, self.nominal))
        self.policies = tuple(self.policies)
        low, high = self.costs[0], self.costs[-1]
        faults = [f"{len(self.nominal)} costs of {len(self.policies)} policies"] * (
            len(self.nominal) != len(self.policies))
        if len(self.costs) < 2 or not all(a <= b for a, b in zip(self.costs, self.costs[1:], strict=False)):
            faults.append(f"costs {self.costs}, not of two exits or more, rising")
        faults += [f"a policy that costs {one:g}" for one in self.nominal
                   if not low / _ROUNDING <= one <= high * _ROUNDING]
        if self.horizon < 1:
            faults.append(f"a horizon of {self.horizon} rows")
        if faults:
            raise OfframpError(expected="policies between the first exit's cost and the last's", got="; ".join(faults),
                               where="Switch")
        if not self.budget * _ROUNDING >= low:
            raise PlanError(expected=f"a budget of at least {low:g}, the cost of the first exit", where="Switch",
                            got=f"{self.budget:g}", todo="raise the budget, or train an earlier exit.")
        reads = [name for name in self.reads if name in (*BY_NAME, *EDGED)] or ["top"]
        ends = [Thresholds(confidence=reads[0], thresholds=(at,) * (len(self.costs) - 1)) for at in (-1.0, None)]
        inner = sorted(zip(self.nominal, self.policies, strict=True), key=lambda one: one[0])
        self._ladder, self._reach = ((low, ends[0]), *inner, (high, ends[1])), self.horizon

    @property
    def reads(self) -> tuple[str, ...]:
        """The confidences that its policies read in a dense exit's summary; all where one does not say."""
        named = [tuple(getattr(policy, "reads", CONFIDENCES)) for policy in self.policies]
        return tuple(dict.fromkeys(name for names in named for name in names))

    def begin(self, rows: int) -> Turn:
        """The policy of a pass over so many rows; it is under way until its ``observe``."""
        with self._lock:
            rung = self._pick(rows)
            nominal, policy = self._ladder[rung]
            turn = Turn(policy, rows, self._settle)
            # the ends of the ladder are certain; of any other policy nothing is
            costs = [nominal] * 3 if self._certain(rung) else [self.costs[0], self._price(rung), self.costs[-1]]
            low, middle, high = (rows * (cost - self._target) for cost in costs)
            self._open[turn] = low, middle, high, nominal
        return turn

    def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
        """Bool (n,): as the policy that a pass of one row would get now."""
        with self._lock:
            policy = self._ladder[self._pick(1, try_only=True)][1]
        return policy.decide(exit_index, evidence)

    @property
    def account(self) -> Account:
        """What was spent so far, and how far it can be off."""
        with self._lock:
            return Account(self._rows, self._spent, self._reach * (self._target - self.costs[0]),
                           self._reach * (self.costs[-1] - self._target))

    @property
    def _target(self) -> float:
        return min(max(self.budget, self.costs[0]), self.costs[-1])

    def _certain(self, rung: int) -> bool:
        return rung in (0, len(self._ladder) - 1)

    def _price(self, rung: int) -> float:
        """What a policy should cost a row now."""
        nominal = self._ladder[rung][0]
        return nominal if self._certain(rung) else min(max(nominal + self._drift, self.costs[0]), self.costs[-1])

    def _pick(self, rows: int, *, try_only: bool = False) -> int:
        """The rung for a pass of so many rows; the lock is held."""
        budget, owed = self._target, self._spent - self._rows * self._target
        middle = owed + sum(one[1] for one in self._open.values())
        # passes may end in any order: what one under way will settle is not counted on
        low = owed + sum(min(0.0, one[0]) for one in self._open.values())
        high = owed + sum(max(0.0, one[2]) for one in self._open.values())
        reach = max(self._reach, 2 * (rows + sum(turn.rows for turn in self._open)))
        if not try_only:
            self._reach = reach
        if high + rows * (self.costs[-1] - budget) > reach * (self.costs[-1] - budget):
            return 0
        if low + rows * (self.costs[0] - budget) < reach * (self.costs[0] - budget):
            return len(self._ladder) - 1
        most = (budget - middle / reach) * _ROUNDING
        return max((i for i in range(len(self._ladder)) if self._price(i) <= most), key=lambda i: (self._price(i), i),
                   default=0)

    def _settle(self, turn: Turn, exit_index: Tensor) -> None:
        counts = torch.bincount(exit_index.flatten().cpu(), minlength=len(self.costs)).tolist()
        if len(counts) > len(self.costs) or sum(counts) > turn.rows:
            raise OfframpError(expected=f"at most {turn.rows} rows, at exits below {len(self.costs)}",
                               got=f"{sum(counts)} rows, at exits up to {len(counts) - 1}", where="observe()")
        rows, spent = sum(counts), sum(count * cost for count, cost in zip(counts, self.costs, strict=True))
        with self._lock:
            if (known := self._open.pop(turn, None)) is None:
                raise OfframpError(expected="a pass that is under way", got="one that has ended", where="observe()",
                                   todo="begin() another.")
            self._rows, self._spent = self._rows + rows, self._spent + spent
            low, _, high, nominal = known
            if low < high and rows:
                self._drift += (spent / rows - nominal - self._drift) * rows / (rows + self.horizon)

    # ---- files: the policies are written beside it, by the plan's own allow-list ---------------------------------

    @property
    def parts(self) -> tuple[Policy, ...]:
        """The policies that a plan's page must hold."""
        return self.policies

    def to_json(self) -> dict[str, Any]:
        """All but the policies and the account."""
        return {"budget": self.budget, "costs": list(self.costs), "nominal": list(self.nominal),
                "horizon": self.horizon}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], parts: Sequence[Policy] = ()) -> "Switch":
        """The inverse, with the policies."""
        return cls(**{**data, "policies": tuple(parts)})

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Switch.from_json, self.to_json(), self.policies), ()


@final
@dataclass(frozen=True, kw_only=True)
class Switching:
    """A scheduler whose policies keep their budget live as well: another's, at many budgets, in a :class:`Switch`."""

    scheduler: Scheduler
    steps: int = 8
    """Policies, at even budgets between the first exit's cost and the last's, besides the one asked for."""
    horizon: int = 256

    def fit(self, lesson: Lesson) -> Callable[[float], Switch]:
        at = self.scheduler.fit(lesson)

        def priced(budget: float) -> tuple[float, Policy]:
            policy = at(budget)
            return _mean_cost(lesson, policy), policy

        grid = torch.linspace(float(lesson.cost[0]), float(lesson.cost[-1]), self.steps + 2, dtype=torch.float64)
        known = functools.cache(lambda: [priced(budget) for budget in grid[1:-1].tolist()])

        def switch(budget: float) -> Switch:
            found = sorted([*known(), priced(lesson.feasible(budget))], key=lambda one: one[0])
            return Switch(budget=budget, costs=tuple(lesson.cost.tolist()), nominal=tuple(cost for cost, _ in found),
                          policies=tuple(policy for _, policy in found), horizon=self.horizon)

        return switch


def _mean_cost(lesson: Lesson, policy: Policy) -> float:
    """What a policy spends a sample of the lesson."""
    at, alive = torch.full((len(lesson),), lesson.exits - 1), torch.arange(len(lesson))
    for e in range(lesson.exits - 1):
        leaves = checked(policy.decide(e, lesson.evidence(e, alive)), len(alive), e)
        at[alive[leaves]] = e
        alive = alive[~leaves]
    return float(lesson.cost[at].mean())

"""A scheduler fitted to a table for a budget: a plan as ``search`` gives one, its policy's own time counted.

N samples, E exits, the last being the backbone.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cached_property, partial
from typing import Literal, NamedTuple

import torch

from offramp.choose.replay import columns_of, replay
from offramp.cost.latency import measure
from offramp.errors import OfframpError, PlanError
from offramp.functional.confidence import top
from offramp.policies.lesson import Scheduler, lesson
from offramp.policies.thresholds import Thresholds
from offramp.table import ExitTable, Unit
from offramp.types import Plan, Policy

__all__ = ["DecisionTimes", "Fitted", "budget_of", "decision_ms", "schedule", "whole_cost"]

_TRIES = 8


def schedule(table: ExitTable, scheduler: Scheduler, *, budget: float | str, unit: Unit = "macs", batch: int = 1,
             against: Literal["auto", "labels", "backbone"] = "auto") -> Plan:
    """The plan of a scheduler whose mean cost on this table's samples is at most ``budget``.

    budget: a sample, in ``unit``: "macs", or "latency_ms" at ``batch``; or "0.6x", so many times the untouched network.
    table: with one head a site; of a table with more, ``select`` the columns first.

    Every early exit takes part whose policy can let somebody go. One with a threshold of None would have its head run
    for nothing: it is left out, and the scheduler is fitted anew to the others, for the same budget.
    ``latency_ms`` counts the policy's own time (:func:`decision_ms`), measured here on a policy fitted for the purpose,
    so that the scheduler then learns from whole costs; macs leave it out.

    ``plan.predicted`` holds the figures of a replay on this table, and ``cost``, the planned mean beside
    ``plan.asked["budget"]``; ``replay`` on other samples says what is realised there, with a note where that is more.
    PlanError where the budget is less than the first exit costs, or where the scheduler does not keep it.
    """
    return Fitted(table, scheduler, unit=unit, batch=batch, against=against).plan(budget)


class DecisionTimes(NamedTuple):
    """Median milliseconds a row at each exit of a plan."""

    decide_ms: tuple[float, ...]
    """The whole of ``decide``."""
    added_ms: tuple[float, ...]
    """What the table's latency does not hold yet: ``decide`` less the confidence that was timed with the head."""


def decision_ms(policy: Policy, table: ExitTable, *, exits: Sequence[str] | None = None, batch: int = 1,
                repeats: int = 15) -> DecisionTimes:
    """How long a policy thinks at each of ``exits`` (nothing: the table's), for ``batch`` rows of it at a time.

    Counted once: ``record`` times a head together with the top probability of its logits, so that this much, measured
    here in turn with ``decide``, is taken off ``added_ms``, which is never below 0. A dense policy reads summaries of
    the pixels, made before it is asked: nothing is taken off, and summaries beyond the top probability's histogram are
    in no table; ``bench`` measures them live. Timed on this machine's processor, whatever the table was recorded on.
    """
    columns = columns_of(table, table.names[:-1] if exits is None else exits)
    if len(columns) == 1:
        return DecisionTimes((), ())
    if not len(table):
        raise OfframpError(expected="a table with samples", got="an empty one", where="decision_ms()")
    rows = torch.arange(batch) % len(table)
    thinking = copy.deepcopy(policy)  # being timed leaves nothing behind in one that keeps count
    fns: dict[str, Callable[[], object]] = {}
    for k in range(len(columns) - 1):
        shown = table.evidence(columns[: k + 1], rows)
        fns[f"decide {k}"] = partial(thinking.decide, k, shown)
        if shown.logits is not None:
            fns[f"top {k}"] = partial(top, shown.logits[:, -1].contiguous())
    times = measure(fns, repeats=repeats, budget_s=2.0)
    whole = [times[f"decide {k}"].p50_ms for k in range(len(columns) - 1)]
    known = [times[f"top {k}"].p50_ms if f"top {k}" in times else 0.0 for k in range(len(whole))]
    return DecisionTimes(
        tuple(one / batch for one in whole),
        tuple(max(one - counted, 0.0) / batch for one, counted in zip(whole, known, strict=True)))


def whole_cost(table: ExitTable, unit: Unit, batch: int = 1) -> float:
    """What a sample costs the untouched network: no head on the way."""
    if unit == "macs":
        return float(table.costs.macs[-1])
    if unit == "latency_ms":
        return table.costs.at(batch=batch).dense_p50_ms / batch
    raise OfframpError(expected="unit 'macs' or 'latency_ms'", got=repr(unit), where="a budget")


def budget_of(table: ExitTable, budget: float | str, unit: Unit, batch: int = 1) -> float:
    """A budget in ``unit``: a number as it is, "0.6x" as so many times the untouched network's cost."""
    whole = whole_cost(table, unit, batch)
    try:
        value = float(budget.removesuffix("x")) * whole if isinstance(budget, str) and budget.endswith("x") \
            else float(budget)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise OfframpError(expected=f"a positive budget in {unit}, or one such as '0.6x'", got=repr(budget),
                           where="a budget", todo=f"the untouched network costs {whole:g} {unit}.")
    return value


@dataclass(frozen=True, eq=False)
class Fitted:
    """A scheduler and a table: fitted once to each choice of exits that comes up, it gives a plan for any budget."""

    table: ExitTable
    scheduler: Scheduler
    unit: Unit = field(default="macs", kw_only=True)
    batch: int = field(default=1, kw_only=True)
    against: Literal["auto", "labels", "backbone"] = field(default="auto", kw_only=True)
    _known: dict[tuple[str, ...], Callable[[float], Policy]] = field(default_factory=dict, init=False, repr=False)

    def plan(self, budget: float | str) -> Plan:
        """As :func:`schedule`."""
        most = budget_of(self.table, budget, self.unit, self.batch)
        exits = self.table.names[:-1]
        while True:
            plan = self._within(exits, most)
            unused = _unused(plan)
            if not unused:
                return plan
            exits = tuple(name for name in exits if name not in unused)
            if not exits:
                return self._foretold(Plan(exits=(), policy=Thresholds(thresholds=()), task=self.table.task), most)

    @cached_property
    def _added_ms(self) -> dict[str, float]:
        """What the policy's own time adds at each exit: taken once, of a policy fitted as if it took none."""
        if self.unit != "latency_ms":
            return {}
        taught = lesson(self.table, unit=self.unit, batch=self.batch, against=self.against)
        first = self.scheduler.fit(taught)(float(taught.cost[-1]))
        times = decision_ms(first, self.table, batch=self.batch).added_ms
        return dict(zip(self.table.names, times, strict=False))

    @cached_property
    def _priced(self) -> ExitTable:
        """The table, with the policy's own time among the costs that a scheduler learns from."""
        if not any(self._added_ms.values()):
            return self.table
        costs = self.table.costs
        added = [self._added_ms.get(name, 0.0) * self.batch for name in self.table.names]
        times = tuple(
            replace(one, head_p50_ms=tuple(head + more for head, more in zip(one.head_p50_ms, added, strict=True)))
            if one.batch == self.batch else one for one in costs.latency)
        return replace(self.table, costs=replace(costs, latency=times))

    def _within(self, exits: tuple[str, ...], most: float) -> Plan:
        if exits not in self._known:
            taught = lesson(self._priced.select(exits), unit=self.unit, batch=self.batch, against=self.against)
            self._known[exits] = self.scheduler.fit(taught)
        room = 0.0
        for _ in range(_TRIES):
            policy = self._known[exits](most - room)
            plan = self._foretold(Plan(exits=exits, policy=policy, task=self.table.task), most)
            if (over := float(plan.predicted["cost"]) - most) <= most * 1e-9:
                return plan
            room += over  # a scheduler that does not keep its word is asked for less
        raise PlanError(
            expected=f"a policy of {_name(self.scheduler)} that keeps {most:g} {self.unit} a sample",
            got=f"{float(plan.predicted['cost']):g}", where="schedule()",
            todo="raise the budget; a scheduler's at(budget) must cost at most the budget on its own lesson.")

    def _foretold(self, plan: Plan, most: float) -> Plan:
        table, added = self.table, [self._added_ms[name] for name in plan.exits if name in self._added_ms]
        against = "labels" if self.against != "backbone" and table.has_labels else "backbone"
        done = replay(table, plan, batch=self.batch)
        loss = done.drop if against == "labels" else done.disagreement
        notes = () if plan.exits else ("No exit lets anybody go at this budget: this plan runs the whole network.",)
        return replace(
            plan, fingerprints=dict(table.fingerprints), split=table.split, notes=notes,
            asked={"budget": most, "unit": self.unit, "batch": self.batch, "against": against,
                   "scheduler": _name(self.scheduler)},
            predicted={**done.figures(), "loss": loss, "loss_against": against, "decision_ms": added,
                       "cost": float(done.cost(self.unit, batch=self.batch, decision_ms=added).mean())})


def _unused(plan: Plan) -> set[str]:
    """Exits at which the policy can let nobody go, where it says so."""
    thresholds = getattr(plan.policy, "thresholds", None)
    if not isinstance(thresholds, tuple) or len(thresholds) != len(plan.exits):
        return set()
    return {name for name, threshold in zip(plan.exits, thresholds, strict=True) if threshold is None}


def _name(scheduler: object) -> str:
    return repr(scheduler) if is_dataclass(scheduler) else type(scheduler).__name__

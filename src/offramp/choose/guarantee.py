"""Plans whose loss and cost are promised for samples to come, whatever their distribution.

Learn then Test (Angelopoulos et al., arXiv:2110.01052): plans that were fitted elsewhere are tested on samples that
they never saw, one after the other, until the first that cannot be shown to keep the limit. N samples, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np

from offramp.choose.replay import Replay, replay
from offramp.choose.risk import Bound, Claim, mean_claim, miou_claim
from offramp.choose.schedule import Fitted, budget_of
from offramp.errors import OfframpError, PlanError
from offramp.policies.lesson import Scheduler
from offramp.table import ExitTable, Unit
from offramp.table.payload import payload, quality
from offramp.types import Plan

__all__ = ["family", "guarantee"]

Against = Literal["auto", "labels", "backbone"]
Measure = Literal["image", "miou"]


def guarantee(
    table: ExitTable, plans: Plan | Sequence[Plan] | Scheduler, *, max_drop: float | None = 0.01,
    confidence: float = 0.95, max_cost: float | str | None = None, unit: Unit = "macs", batch: int = 1,
    against: Against = "auto", bound: Bound = "auto", measure: Measure = "image", fit: float = 0.5, steps: int = 20,
    seed: int = 0,
) -> Plan:
    """The cheapest of these plans that loses at most ``max_drop`` on samples to come, with this ``confidence``.

    plans: fitted on other samples than the table's, which are drawn as those to come will be, each on its own. They are
        tested in falling order of the mean cost planned where they were fitted (the given order where one tells none),
        each at the full level, until one fails; the last that holds is the answer. Or a scheduler: it is fitted on a
        share ``fit`` of the rows, drawn by ``seed``, at ``steps`` budgets (:func:`family`); the rest certifies.
    max_drop: a fraction. With labels, of what the backbone gets right and the plan does not, less the reverse;
        ``against="backbone"`` needs no labels: disagreement bounds the fall of accuracy. None: no limit.
    max_cost: also the mean cost a sample is at most this, in ``unit`` ("latency_ms" at ``batch``), or "0.6x" the
        untouched network's. The two limits share the error 1 - confidence evenly: costs are tested from the cheapest
        plan upwards, and the answer is in both rows. A single plan is not split on, since it must pass both tests
        (intersection-union). With ``max_drop=None`` the dearest plan within the cost is the answer.
    bound: "auto" is "binomial", exact, where losses are 0 or 1 (classification against the backbone), else "betting";
        "hoeffding_bentkus" needs no order of the samples and is wider. :mod:`offramp.choose.risk` says more.
    measure: dense tables. "image": the mean over images of each image's own mIoU, whose fall is guaranteed. "miou": the
        mIoU of all images together, for which there is a bootstrap alone: approximate, and the certificate says so.

    ``plan.certificate`` tells what was tested, the bounds reached and on how many samples. PlanError where no plan
    passes: its ``todo`` says how many samples would do in nine draws of ten, were the rates as they are seen here.
    """
    _check(table, max_drop, confidence, max_cost, measure, bound, against)
    truth: Literal["labels", "backbone"] = "labels" if against != "backbone" and table.has_labels else "backbone"
    if isinstance(plans, Plan):
        plans = (plans,)
    elif not isinstance(plans, Sequence):
        parts = table.split_rows({"fit": fit, "certify": 1 - fit}, seed=seed)
        plans = family(parts["fit"], plans, unit=unit, batch=batch, against=truth, steps=steps)
        table = parts["certify"]
    _check_plans(table, plans)
    if all(isinstance(_planned(plan, unit), int | float) for plan in plans):
        plans = sorted(plans, key=lambda plan: -_planned(plan, unit))
    if bound == "auto":
        bound = "bootstrap" if measure == "miou" else "binomial" if table.task == "classify" and truth == "backbone" \
            else "betting"
    most = None if max_cost is None else budget_of(table, max_cost, unit, batch)
    shared = most is not None and max_drop is not None and len(plans) > 1
    trial = _Trial(table=table, plans=plans, truth=truth, bound=bound, measure=measure, max_drop=max_drop,
                   max_cost=most, unit=unit, batch=batch, level=(1 - confidence) / (2 if shared else 1))
    first, last = trial.row()
    if first > last:
        raise trial.too_few()
    chosen = last if max_drop is not None else first
    certificate = {"confidence": confidence, **trial.certificate(chosen, first, last)}
    how = "whatever the samples' distribution" if certificate["distribution_free"] else \
        "approximately: by a bootstrap over images, which promises nothing for few of them"
    note = f"With confidence {confidence:g} {' and '.join(trial.limits())}, {how}; shown on {len(table)} samples."
    return replace(plans[chosen], certificate=certificate, notes=(*plans[chosen].notes, note))


def family(table: ExitTable, scheduler: Scheduler, *, unit: Unit = "macs", batch: int = 1, steps: int = 20,
           against: Against = "auto") -> tuple[Plan, ...]:
    """A scheduler's plans at ``steps`` even budgets from the backbone's cost down to above the first exit's."""
    fitted = Fitted(table, scheduler, unit=unit, batch=batch, against=against)
    path = table.costs.path(range(len(table.columns)), unit, batch=batch)
    plans: list[Plan] = []
    for budget in np.linspace(path[-1], path[0], steps + 1)[:-1]:
        try:
            plan = fitted.plan(float(budget))
        except PlanError:  # a policy's own time may not fit into the least latencies
            break
        if not plans or _planned(plan, unit) < _planned(plans[-1], unit):
            plans.append(plan)
    return tuple(plans)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Trial:
    """Plans in order of falling cost, on the samples that they are tested on."""

    table: ExitTable
    plans: Sequence[Plan]
    truth: Literal["labels", "backbone"]
    bound: Bound
    measure: Measure
    max_drop: float | None
    max_cost: float | None
    unit: Unit
    batch: int
    level: float

    def __post_init__(self) -> None:
        for name in ("done", "loss", "cost"):  # a plan is replayed when its turn comes, and once
            object.__setattr__(self, name, cache(getattr(self, name)))

    def done(self, i: int) -> Replay:
        return replay(self.table, self.plans[i], batch=self.batch)

    @cached_property
    def payload(self) -> Any:
        return payload(self.table, self.truth)

    def loss(self, i: int) -> Claim:
        own = np.arange(len(self.table)), self.done(i).column_of.numpy()
        hit, union = self.payload
        if self.bound == "bootstrap":
            return miou_claim(hit[:, -1], union[:, -1], hit[own], union[own], self.level)
        lost = quality(hit[:, -1], union[:, -1]) - quality(hit[own], union[own])
        return mean_claim(lost, self.bound, self.level, low=-1.0 if self.truth == "labels" else 0.0)

    def cost(self, i: int) -> Claim:
        path = self.table.costs.path(self.done(i).columns, self.unit, batch=self.batch)
        added = self.plans[i].predicted.get("decision_ms", ())
        if self.unit == "latency_ms" and len(added):
            path = path + np.cumsum([*added, 0.0])
        return mean_claim(path[self.done(i).exit_index.numpy()], "betting", self.level, low=float(path[0]),
                          high=float(path[-1]))

    def row(self) -> tuple[int, int]:
        """The first and the last plan that hold both limits; each limit is tested from its own safe end."""
        plans = range(len(self.plans))
        first, last = 0, len(self.plans) - 1
        if self.max_drop is not None:
            last = next((i for i in plans if not self.loss(i).holds(self.max_drop)), len(self.plans)) - 1
        if self.max_cost is not None:
            first = next((i for i in reversed(plans) if not self.cost(i).holds(self.max_cost)), -1) + 1
        return first, last

    def limits(self) -> list[str]:
        what = "accuracy" if self.table.task == "classify" else \
            "the mean of images' mIoU" if self.measure == "image" else "mIoU"
        against = "the labels" if self.truth == "labels" else "the backbone's own answers"
        told = [] if self.max_drop is None else [f"{what} against {against} falls by at most {self.max_drop:g}"]
        return told if self.max_cost is None else [*told, f"the mean cost is at most {self.max_cost:g} {self.unit}"]

    def certificate(self, chosen: int, first: int, last: int) -> dict[str, Any]:
        told: dict[str, Any] = {
            "method": "learn-then-test, fixed sequence", "promise": self.limits(), "level": self.level,
            "samples": len(self.table), "split": self.table.split, "fingerprint": self.table.fingerprints["split"],
            "distribution_free": self.max_drop is None or self.bound != "bootstrap", "plans": len(self.plans),
        }
        if self.max_drop is not None:
            claim = self.loss(chosen)
            told |= {"max_drop": self.max_drop, "against": self.truth, "bound": self.bound, "observed": claim.observed,
                     "upper": claim.upper(), "tested": [_tested(self.loss(i), self.max_drop, i)
                                                        for i in range(min(last + 2, len(self.plans)))]}
        if self.max_cost is not None:
            claim = self.cost(chosen)
            told |= {"max_cost": self.max_cost, "unit": self.unit, "batch": self.batch, "cost_bound": "betting",
                     "observed_cost": claim.observed, "upper_cost": claim.upper(),
                     "tested_cost": [_tested(self.cost(i), self.max_cost, i)
                                     for i in range(max(first - 1, 0), len(self.plans))]}
        return told

    def too_few(self) -> PlanError:
        """How many samples would do: plans before the one reached must hold their loss, those after it their cost."""
        plans, samples = range(len(self.plans)), len(self.table)
        losses, costs = [1.0 for _ in plans], [1.0 for _ in plans]
        seen = []
        if self.max_drop is not None:
            losses = [_needed(self.loss(i), self.max_drop, samples) for i in plans]
            seen.append(f"the first of {len(plans)} plans loses {self.loss(0).observed:.4g}")
        if self.max_cost is not None:
            costs = [_needed(self.cost(i), self.max_cost, samples) for i in plans]
            seen.append(f"the last costs {self.cost(len(plans) - 1).observed:.6g}")
        least = min(max(*losses[: i + 1], *costs[i:]) for i in plans)
        todo = "no number of samples would do at the rates seen: raise a limit, or give safer and cheaper plans." \
            if math.isinf(least) else f"{least:,.0f} samples would do at the rates seen; {samples:,} are too few."
        return PlanError(expected=f"a plan shown to keep: {' and '.join(self.limits())}", where="guarantee()",
                         got=f"{samples:,} samples, of which {' and '.join(seen)}", todo=todo)


def _needed(claim: Claim, limit: float, samples: int) -> float:
    return samples if claim.holds(limit) else claim.enough(limit)


def _tested(claim: Claim, limit: float, plan: int) -> dict[str, Any]:
    return {"plan": plan, "observed": claim.observed, "p": claim.p(limit), "holds": claim.holds(limit)}


def _planned(plan: Plan, unit: Unit) -> Any:
    return plan.predicted.get("cost") if plan.asked.get("unit") == unit else plan.predicted.get(unit)


def _check(table: ExitTable, max_drop: float | None, confidence: float, max_cost: float | str | None, measure: Measure,
           bound: Bound, against: Against) -> None:
    faults = []
    if not 0 < confidence < 1:
        faults.append(f"confidence {confidence:g}, not between 0 and 1")
    if max_drop is None and max_cost is None:
        faults.append("neither max_drop nor max_cost")
    if max_drop is not None and not 0 <= max_drop < 1:
        faults.append(f"max_drop {max_drop:g}, not a fraction from 0 to below 1")
    if against not in ("auto", "labels", "backbone"):
        faults.append(f"against {against!r}")
    if measure not in ("image", "miou") or (measure == "miou" and table.task == "classify"):
        faults.append(f"measure {measure!r} of a {table.task} table")
    if bound not in ("auto", "binomial", "betting", "hoeffding_bentkus", "bootstrap") or (
            bound != "auto" and (bound == "bootstrap") != (measure == "miou")):
        faults.append(f"bound {bound!r} for measure {measure!r}: the bootstrap is for 'miou', and alone")
    if not len(table):
        faults.append("an empty table")
    if faults:
        raise OfframpError(expected="a limit and a confidence to test", got="; ".join(faults), where="guarantee()")
    if against == "labels" and not table.has_labels:
        raise PlanError(expected="a table with labels", got="one without", where="guarantee(against='labels')",
                        todo="take against='backbone'.")


def _check_plans(table: ExitTable, plans: Sequence[Plan]) -> None:
    ours, faults = table.fingerprints["split"], [] if plans else ["none"]
    for plan in plans:
        theirs = plan.fingerprints.get("split", "")
        if theirs and (ours == theirs or ours.startswith(theirs + "/") or theirs.startswith(ours + "/")):
            faults.append(f"one fitted on {theirs}, and here are {ours}")
        if plan.setting != "input_dependent":
            faults.append(f"one whose setting is {plan.setting!r}")
    if faults:
        raise PlanError(expected="plans fitted on other samples, which let inputs leave", got="; ".join(faults),
                        where="guarantee()", todo="hold rows back: table.split_rows({'fit': 0.5, 'certify': 0.5}).")

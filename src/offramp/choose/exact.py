"""The exhaustive search (MESS, 5.1; Eqs. 4-6): every configuration of a table, settled one by one or by a bound."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offramp.choose.replay import replay
from offramp.errors import PlanError
from offramp.exhaustive.branch import solve
from offramp.exhaustive.goal import Goal, Ledger, Progress
from offramp.exhaustive.settings import anytime, budgeted
from offramp.exhaustive.space import Space, lay_out
from offramp.functional.pareto import front
from offramp.policies.thresholds import Thresholds
from offramp.table import ExitTable
from offramp.table.payload import payload, quality
from offramp.types import Plan, Setting

__all__ = ["Ask", "exact", "exact_front"]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What ``search`` was asked, its defaults filled in."""

    setting: Setting
    goal: Goal
    against: str
    confidences: tuple[str, ...]
    max_exits: int
    steps: int
    pixel_steps: int
    temperatures: Sequence[float] | None
    time_limit_s: float | None
    progress: Progress | None
    asked: dict[str, Any]


def exact(table: ExitTable, ask: Ask) -> Plan:
    """The best plan of the whole space, with its certificate; PlanError where none keeps the constraints."""
    ledger = Ledger(time_limit_s=ask.time_limit_s, progress=ask.progress)
    if ask.setting != "input_dependent":
        found = _static(table, ask, ledger)
        if not found:
            raise _nothing(ask, table)
        return _static_plan(table, ask, found[0][0], ledger)
    plan = _best(table, ask, _spaces(table, ask), ledger)
    if plan is None:
        raise _nothing(ask, table, ledger)
    return plan


def exact_front(table: ExitTable, ask: Ask) -> list[Plan]:
    """Every plan that no other beats in both the objective and the quality, the cheapest first.

    Input-dependent: one search a point, each asking for more quality than the last one had; under a time limit the
    points found until then, and the last one's certificate holds the gap.
    """
    if ask.setting != "input_dependent":
        ledger = Ledger()
        found = _static(table, ask, ledger)
        chosen = front([one[1] for one in found], [one[2] for one in found])
        return [_static_plan(table, ask, found[k][0], ledger) for k in chosen]
    plans: list[Plan] = []
    ledger = Ledger(time_limit_s=ask.time_limit_s)
    spaces = _spaces(table, ask)
    while not ledger.out_of_time:
        left = None if ask.time_limit_s is None else max(ask.time_limit_s - ledger.seconds, 0.0)
        plan = _best(table, ask, spaces, Ledger(time_limit_s=left, progress=ask.progress))
        if plan is None:
            break
        plans.append(plan)
        reached = _quality_asked(plan)
        ask = replace(ask, goal=replace(ask.goal, min_quality=float(np.nextafter(reached, 2)) + 2e-12))
        if ask.progress is not None:
            ask.progress(reached, float(len(plans)))
    # of plans of equal cost the later, better one stays
    kept = front([_objective(one, ask.goal) for one in plans], [_quality_asked(one) for one in plans])
    return [plans[k] for k in kept]


def _objective(plan: Plan, goal: Goal) -> float:
    return float(plan.predicted[goal.minimise])


def _quality_asked(plan: Plan) -> float:
    return float(plan.predicted["quality_asked"])


def _spaces(table: ExitTable, ask: Ask) -> list[Space]:
    """One a confidence; faults of what was asked are raised here."""
    return [lay_out(table, against=ask.against, confidence=name, steps=ask.steps, pixel_steps=ask.pixel_steps,
                    temperatures=ask.temperatures) for name in ask.confidences]


def _best(table: ExitTable, ask: Ask, spaces: Sequence[Space], ledger: Ledger) -> Plan | None:
    """The best plan of all confidences; None where none keeps the constraints, or none was found in time."""
    best: tuple[float, Plan] | None = None
    for space in spaces:
        outcome = solve(space, ask.goal, ledger, max_exits=ask.max_exits, known=np.inf if best is None else best[0])
        if outcome is not None and (best is None or outcome[0] < best[0]):
            best = (outcome[0], _threshold_plan(space, ask, outcome[1]))
    return None if best is None else _finished(table, ask, best[1], ledger, list(ask.confidences))


def _static(table: ExitTable, ask: Ask, ledger: Ledger) -> list[tuple[tuple[int, ...], float, float]]:
    hit, union = payload(table, ask.against)
    reached = quality(hit.sum(axis=0), union.sum(axis=0))
    if ask.setting == "budgeted":
        return budgeted(table.costs, reached, ask.goal, ledger)
    sites = [column.site for column in table.columns[:-1]]
    return anytime(table.costs, reached, [sites.index(site) for site in sites], ask.goal, ledger, exits=ask.max_exits)


def _static_plan(table: ExitTable, ask: Ask, columns: tuple[int, ...], ledger: Ledger) -> Plan:
    early = tuple(e for e in columns if e < len(table.columns) - 1)
    leaves = 0.0 if ask.setting == "budgeted" else None
    policy = Thresholds(
        confidence=ask.confidences[0], thresholds=(leaves,) * len(early),
        pixel_thresholds=(0.0,) * len(early) if table.task == "dense" else (),
    )
    return _finished(table, ask, _plan(table, ask, early, policy), ledger, [])


def _threshold_plan(space: Space, ask: Ask, chosen: Sequence[tuple[int, int]]) -> Plan:
    sets = [(e, space.leavers[e].threshold[m], space.leavers[e].pixel[m]) for e, m in chosen]
    return _plan(space.table, ask, tuple(e for e, _ in chosen), space.policy(sets))


def _plan(table: ExitTable, ask: Ask, columns: tuple[int, ...], policy: Thresholds) -> Plan:
    notes = () if columns else ("No exit pays within these constraints: this plan runs the whole network.",)
    return Plan(
        exits=tuple(table.names[e] for e in columns), policy=policy, task=table.task, setting=ask.setting,
        asked=ask.asked, fingerprints=dict(table.fingerprints), split=table.split, notes=notes,
    )


def _finished(table: ExitTable, ask: Ask, plan: Plan, ledger: Ledger, confidences: list[str]) -> Plan:
    done = replay(table, plan, batch=ask.goal.batch)
    hit, union = payload(table, ask.against)
    rows = np.arange(len(table))
    first = done.columns[0] if ask.setting == "anytime" else done.column_of.numpy()
    reached = float(quality(hit[rows, first].sum(axis=0), union[rows, first].sum(axis=0)))
    whole = float(quality(hit[:, -1].sum(axis=0), union[:, -1].sum(axis=0)))
    predicted = {**done.figures(), "loss": whole - reached, "loss_against": ask.against, "quality_asked": reached}
    return replace(plan, predicted=predicted, certificate=ledger.certificate(
        setting=ask.setting, minimise=ask.goal.minimise, confidences=confidences, max_exits=ask.max_exits))


def _nothing(ask: Ask, table: ExitTable, ledger: Ledger | None = None) -> PlanError:
    limits = [f"quality >= {ask.goal.min_quality:.4f}"] if np.isfinite(ask.goal.min_quality) else []
    limits += [f"{unit} <= {most:g}" for unit, most in ask.goal.limits.items()]
    late = ledger is not None and ledger.gap > 0
    return PlanError(expected=f"a plan with {', '.join(limits)}", got=f"none among {len(table.columns)} columns" + (
                         f" in {ask.time_limit_s:g} s" if late else ""), where=f"search(setting={ask.setting!r})",
                     todo="raise time_limit_s." if late else "loosen a constraint, or train better exits.")

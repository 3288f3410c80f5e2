"""Search a plan on a table: exits and thresholds for a tolerated loss, in seconds, without the network."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np

from offramp.choose.exact import Ask, exact, exact_front
from offramp.choose.joint import best_joint, count_subsets, subsets
from offramp.choose.problem import Choice, Problem, pose, tally
from offramp.choose.replay import replay
from offramp.errors import OfframpError
from offramp.exhaustive.goal import Goal, Minimise, Progress
from offramp.policies.thresholds import Thresholds
from offramp.table import ExitTable, Unit
from offramp.table.payload import payload, quality
from offramp.types import Plan, Setting

__all__ = ["search", "search_front"]

Tolerance = Literal["joint", "halving", "even", "exact"]
_ALL_SUBSETS = 4096  # up to here the paper's search over all subsets is made; a run of one takes half a millisecond
_PIXEL_STEPS, _LIMIT_S = 20, 60.0
PIXEL_THRESHOLDS = (None, 0.5, 0.75, 0.875, 0.9375)


def search(
    table: ExitTable, *, max_drop: float | None = None, minimise: Minimise = "macs",
    tolerance: Tolerance | None = None, confidence: str | Sequence[str] = "top", max_exits: int | None = None,
    against: Literal["auto", "labels", "backbone"] = "auto", batch: int = 1, steps: int | None = None,
    temperatures: Sequence[float] | None = None, smooth: bool | None = None, confidence_level: float | None = None,
    setting: Setting = "input_dependent", min_miou: float | None = None, max_macs: float | None = None,
    max_latency_ms: float | None = None, max_bytes: float | None = None, pixel_steps: int = _PIXEL_STEPS,
    time_limit_s: float | None = _LIMIT_S, progress: Progress | None = None,
) -> Plan:
    """The cheapest plan on this table that loses at most ``max_drop`` (a fraction: 0.01 is one point) to the backbone.

    ``against``: with labels the loss is the fall of accuracy or mIoU (Eq. 2 of the label-free paper); without, the
    disagreement with the backbone (Eq. 3), an upper bound of it. "auto" takes labels where the table has them.

    ``tolerance``: "halving" grants the n-th site max_drop / 2^n and "even" each exit of the subset the same share,
    every exit judged alone as the paper does; the subset is then the cheapest of all (the largest K(S) of Eq. 4, for
    macs), or beyond 4,096 of them the one that growing finds. "joint" spends the tolerance
    where it saves most (``offramp.choose.joint`` says what is proven).

    "exact" proves the optimum (MESS, 5.1): all subsets, heads and both thresholds together; see below. None is "exact"
    for a dense table with several heads a site and wherever what only it can do is asked, else "joint".

    ``smooth``: hold the loss to ``max_drop`` both as observed and as a regression on the scores expects it, so that the
    search does not spend the luck of these samples; None: for "joint" alone, as the paper knows no such thing.
    ``confidence_level``, such as 0.95: hold the upper bound of the loss to ``max_drop`` instead of the loss itself.

    Measured: 8 exits, ``max_drop`` 0.01, 8 tables of 5,000 synthetic samples each; points lost on 60,000 fresh samples,
    mean and deviation, against labels | the backbone: halving 1.07 +- 0.23 | 0.61 +- 0.14, even 1.19 +- 0.30 | 1.04 +-
    0.16, joint 1.06 +- 0.16 | 1.08 +- 0.11 at the lowest cost of the three, joint with ``smooth=False`` 1.58 +- 0.27 |
    1.20 +- 0.14, joint with ``confidence_level=0.95`` 0.43 +- 0.15 | 0.83 +- 0.11. Of 2,000 samples against labels:
    1.12, 1.46, 1.16, 2.01 and 0.08. So a table of few thousand samples promises a mean, not a ceiling.

    ``steps`` thresholds an exit are tried. ``temperatures`` (one a column but the last; ``calibrate`` fits them) are
    built into the policy. ``minimise="latency_ms"`` reads the times measured at ``batch``.

    The plan without exits is always feasible; where nothing better is found it is returned, and its notes say so.

    **Exact search.** ``setting`` "budgeted": a sub-model with one exit for every sample; "anytime": ``max_exits`` early
    exits (1 unless given) that each reach the quality asked for, no later one worse, at the least overhead and of equal
    ones the earliest; "input_dependent": at most ``max_exits`` (3 unless given, 3 at most) exits with ``steps`` (20)
    image thresholds for each of ``pixel_steps`` pixel thresholds (Eq. 7), one confidence a plan, of several the best.
    Costs are Table 1's (``Costs.price``). ``minimise="drop"`` maximises quality (Eq. 6). Hard constraints: ``max_drop``
    (0.01 where no other goal for quality is set), ``min_miou``, ``max_macs`` and ``max_latency_ms`` a sample, in
    "anytime" until the first answer, and ``max_bytes``, parameters and peak together. PlanError where none fits.
    ``plan.certificate`` says how many configurations there are, how many each bound ruled out, and whether the optimum
    is proven; ``time_limit_s`` (None: none) stops with the best found and the gap that is left.

    An exhaustive search spends the luck of its samples to the full: what it promises holds on the table alone. It knows
    neither ``smooth`` nor ``confidence_level``, which make the loss something that does not add up over samples, and
    refuses them; hold rows back with ``table.split_rows`` and ``replay`` the plan on those.
    """
    ask = _ask(table, locals())
    if ask is not None:
        return exact(table, ask)
    assert isinstance(confidence, str) and minimise in ("macs", "latency_ms")
    max_drop, tolerance, steps = 0.01 if max_drop is None else max_drop, tolerance or "joint", steps or 100
    against = _against(table, against)
    unit = cast(Unit, minimise)
    exits = len(table.columns) - 1
    fitted = tuple(temperatures) if temperatures is not None else (1.0,) * exits
    best: _Found | None = None
    pixels = PIXEL_THRESHOLDS if table.task == "dense" else (None,)
    for done, pixel in enumerate(pixels, 1):
        policy = Thresholds(
            confidence=confidence, thresholds=(None,) * exits,
            temperatures=fitted if table.task == "classify" else (),
            pixel_thresholds=(pixel,) * exits if table.task == "dense" else (),
        )
        problem = pose(table, policy, against=against, unit=unit, batch=batch, steps=steps,
                       smooth=tolerance == "joint" if smooth is None else smooth)
        choice = _choose(problem, max_drop, tolerance, max_exits, confidence_level)
        chosen = tuple(sorted(choice))
        _, cost, loss = problem.run(choice)
        if best is None or cost < best.cost:
            best = _Found(cost=cost, loss=loss, policy=_policy(problem, policy, choice), exits=chosen)
        if progress is not None:
            progress(done / len(pixels), best.cost)
    assert best is not None
    notes = []
    if not best.exits:
        notes.append(f"No exit pays within a loss of {max_drop:g}: this plan runs the whole network.")
    plan = Plan(
        exits=tuple(table.names[e] for e in best.exits), policy=best.policy, task=table.task,
        asked={"max_drop": max_drop, "minimise": minimise, "tolerance": tolerance, "confidence": confidence,
               "max_exits": max_exits, "against": against, "batch": batch, "steps": steps,
               "smooth": smooth, "confidence_level": confidence_level},
        fingerprints=dict(table.fingerprints), split=table.split, notes=tuple(notes),
    )
    return replace(plan, predicted={**replay(table, plan, batch=batch).figures(), "loss": best.loss,
                                    "loss_against": against})


def search_front(table: ExitTable, **options: Any) -> list[Plan]:
    """Every plan that no other beats in both the objective and the quality, the cheapest first: exact, as ``search``.

    Takes what ``search`` takes; without ``max_drop`` or ``min_miou`` the front goes down to the cheapest plan of all.
    Input-dependent fronts have as many points as there are thresholds that matter, each of them a search: give
    ``time_limit_s``, or a small ``steps``.
    """
    if options.get("max_drop") is None and options.get("min_miou") is None:
        options["max_drop"] = 1.0
    defaults = {name: one.default for name, one in inspect.signature(search).parameters.items()}
    unknown = set(options) - set(defaults)
    if unknown or options.get("minimise") == "drop":
        raise OfframpError(expected="options of search(), and a cost to minimise",
                           got=", ".join(sorted(unknown)) or "minimise='drop'", where="search_front()")
    ask = _ask(table, {**defaults, **options, "tolerance": options.get("tolerance") or "exact"})
    if ask is None:
        raise OfframpError(expected="tolerance 'exact'", got=repr(options["tolerance"]), where="search_front()")
    return exact_front(table, ask)


def _against(table: ExitTable, against: str) -> Literal["labels", "backbone"]:
    if against not in ("auto", "labels", "backbone"):
        raise OfframpError(expected="against 'auto', 'labels' or 'backbone'", got=repr(against), where="search()")
    if against == "auto":
        return "labels" if table.has_labels else "backbone"
    return cast(Literal["labels", "backbone"], against)


def _ask(table: ExitTable, given: dict[str, Any]) -> Ask | None:
    """What the exhaustive search is asked, the faults of any search told; None where another one answers."""
    drop, minimise, tolerance, setting = (given[k] for k in ("max_drop", "minimise", "tolerance", "setting"))
    if drop is not None and not (0 <= drop < 1 or (drop == 1 and tolerance == "exact")):
        raise OfframpError(expected="max_drop as a fraction in [0, 1)", got=repr(drop), where="search()",
                           todo="one point is 0.01.")
    if tolerance not in (None, "joint", "halving", "even", "exact"):
        raise OfframpError(expected="tolerance 'joint', 'halving', 'even' or 'exact'", got=repr(tolerance),
                           where="search()")
    if setting not in ("budgeted", "anytime", "input_dependent"):
        raise OfframpError(expected="setting 'budgeted', 'anytime' or 'input_dependent'", got=repr(setting),
                           where="search()")
    if len(table) == 0:
        raise OfframpError(expected="a table with samples", got="an empty one", where="search()")
    against = _against(table, given["against"])
    limits = {unit: float(given[f"max_{unit}"]) for unit in ("macs", "latency_ms", "bytes")
              if given[f"max_{unit}"] is not None}
    several = len({one.site for one in table.columns}) < len(table.columns)
    only = [name for name, asked in (
        (f"setting={setting!r}", setting != "input_dependent"), ("min_miou", given["min_miou"] is not None),
        (f"minimise={minimise!r}", minimise not in ("macs", "latency_ms")),
        *((f"max_{unit}", True) for unit in limits), ("several confidences", not isinstance(given["confidence"], str)),
    ) if asked]
    loose = [name for name in ("smooth", "confidence_level") if given[name]]
    if tolerance is None:
        tolerance = "exact" if only or (table.task == "dense" and several and not loose) else "joint"
    if tolerance != "exact":
        if only:
            raise OfframpError(expected="tolerance 'exact' for " + ", ".join(only), got=repr(tolerance),
                               where="search()", todo="leave tolerance out.")
        if given["pixel_steps"] != _PIXEL_STEPS or given["time_limit_s"] not in (None, _LIMIT_S):
            raise OfframpError(expected="pixel_steps and time_limit_s for tolerance 'exact' alone", where="search()",
                               got=f"pixel_steps={given['pixel_steps']!r}, time_limit_s={given['time_limit_s']!r} for "
                                   f"tolerance {tolerance!r}", todo="set tolerance='exact', or leave them out.")
        return None
    if loose:
        raise OfframpError(expected="an exhaustive search without " + " and ".join(loose),
                           got=", ".join(f"{name}={given[name]!r}" for name in loose), where="search()",
                           todo="hold rows back with table.split_rows() and replay the plan on them, or set "
                                "tolerance='joint'.")
    if given["min_miou"] is not None and table.task != "dense":
        raise OfframpError(expected="min_miou for a dense table", got="task 'classify'", where="search()",
                           todo="set max_drop.")
    exits = given["max_exits"] if given["max_exits"] is not None else (1 if setting == "anytime" else 3)
    if not 0 <= exits <= 3:
        raise OfframpError(expected="at most 3 exits", got=repr(exits), where="search(tolerance='exact')",
                           todo="set max_exits, or tolerance='joint'.")
    hit, union = (one[:, -1].sum(axis=0) for one in payload(table, against))
    if drop is None and given["min_miou"] is None and minimise != "drop":
        drop = 0.01
    floors = [given["min_miou"], None if drop is None else float(quality(hit, union)) - drop]
    names = (given["confidence"],) if isinstance(given["confidence"], str) else tuple(given["confidence"])
    goal = Goal(minimise=minimise, limits=limits, batch=given["batch"],
                min_quality=max((float(one) for one in floors if one is not None), default=-np.inf))
    kept = ("setting", "minimise", "min_miou", "max_macs", "max_latency_ms", "max_bytes", "batch", "pixel_steps",
            "time_limit_s")
    return Ask(
        setting=setting, goal=goal, against=against, confidences=names, max_exits=exits, steps=given["steps"] or 20,
        pixel_steps=given["pixel_steps"], temperatures=given["temperatures"], time_limit_s=given["time_limit_s"],
        progress=given["progress"],
        asked={**{name: given[name] for name in kept}, "max_drop": drop, "tolerance": "exact", "against": against,
               "confidence": names[0] if len(names) == 1 else list(names), "max_exits": exits,
               "steps": given["steps"] or 20},
    )


@dataclass(frozen=True)
class _Found:
    cost: float
    loss: float
    policy: Thresholds
    exits: tuple[int, ...]


def _choose(problem: Problem, max_drop: float, tolerance: Tolerance, max_exits: int | None,
            level: float | None) -> Choice:
    allowed = max_drop
    for _ in range(8):
        choice = _apart(problem, allowed, "halving" if tolerance == "halving" else "even", max_exits)
        if tolerance == "joint":
            choice = best_joint(problem, allowed, max_exits=max_exits, starts=(choice,))
        if level is None or not choice:
            return choice
        over = problem.upper(choice, level) - max_drop
        if over <= 0:
            return choice
        # aim at what the bound leaves over; halve where it leaves nothing
        allowed = allowed - over if over < allowed else allowed / 2
    return {}


def _apart(problem: Problem, max_drop: float, tolerance: Tolerance, max_exits: int | None) -> Choice:
    """The paper's way: every exit judged alone within its share of the tolerance, then the cheapest subset of all."""
    granted: dict[tuple[int, float], int] = {}

    def threshold(e: int, share: float) -> int:
        if (e, share) not in granted:
            granted[e, share] = _alone(problem, e, share)
        return granted[e, share]

    cheapest: float = problem.run({})[1]
    best: Choice = {}

    def consider(chosen: tuple[int, ...]) -> None:
        nonlocal cheapest, best
        shares = [max_drop / 2 ** (problem.site[e] + 1) if tolerance == "halving" else max_drop / len(chosen)
                  for e in chosen]
        choice = {e: threshold(e, share) for e, share in zip(chosen, shares, strict=True)}
        if min(choice.values()) < 0:
            return
        _, cost, loss = problem.run(choice)
        # Eq. 3's bounds add up to the whole; Eq. 2's net effects need not, since who left before is gone
        if loss <= max_drop + 1e-12 and cost < cheapest:
            cheapest, best = cost, choice

    if count_subsets(problem) <= _ALL_SUBSETS:
        for chosen in subsets(problem, max_exits):
            consider(chosen)
        return best
    # too many candidate heads for all subsets: add the exit that saves most while one does
    limit = problem.exits if max_exits is None else max_exits
    for _ in range(limit):
        grown = {tuple(sorted({*(p for p in best if problem.site[p] != problem.site[e]), e}))
                 for e in range(problem.exits)}
        before = cheapest
        for chosen in sorted(one for one in grown if len(one) <= limit):
            consider(chosen)
        if cheapest >= before:
            break
    return best


def _alone(problem: Problem, e: int, share: float) -> int:
    """The lowest threshold whose loss, this exit alone before the backbone, is within ``share``; -1: none."""
    count = len(problem.levels[e])
    moved = problem.payload[:, e] - problem.payload[:, -1]
    loss = problem.loss(problem.payload[:, -1].sum(axis=0) + tally(problem.codes[:, e], moved, count))
    within = np.flatnonzero(loss <= share + 1e-12)
    return int(within[-1]) if len(within) else -1


def _policy(problem: Problem, policy: Thresholds, choice: Choice) -> Thresholds:
    chosen = sorted(choice)
    return replace(
        policy, thresholds=tuple(float(problem.levels[e][choice[e]]) for e in chosen),
        temperatures=tuple(policy.temperatures[e] for e in chosen) if policy.temperatures else (),
        pixel_thresholds=tuple(policy.pixel_thresholds[e] for e in chosen) if policy.pixel_thresholds else (),
    )

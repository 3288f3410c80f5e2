"""Search a plan on a table: exits and thresholds for a tolerated loss, in seconds, without the network."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from offramp.choose.joint import best_joint, count_subsets, subsets
from offramp.choose.policies import Thresholds
from offramp.choose.problem import Choice, Problem, pose, tally
from offramp.choose.replay import replay
from offramp.errors import OfframpError
from offramp.table import ExitTable, Unit
from offramp.types import Plan

__all__ = ["search"]

Tolerance = Literal["joint", "halving", "even"]
_ALL_SUBSETS = 4096  # up to here the paper's search over all subsets is made; a run of one takes half a millisecond
PIXEL_THRESHOLDS = (None, 0.5, 0.75, 0.875, 0.9375)


def search(
    table: ExitTable, *, max_drop: float = 0.01, minimise: Unit = "macs", tolerance: Tolerance = "joint",
    confidence: str = "top", max_exits: int | None = None, against: Literal["auto", "labels", "backbone"] = "auto",
    batch: int = 1, steps: int = 100, temperatures: Sequence[float] | None = None,
    smooth: bool | None = None, confidence_level: float | None = None,
) -> Plan:
    """The cheapest plan on this table that loses at most ``max_drop`` (a fraction: 0.01 is one point) to the backbone.

    ``against``: with labels the loss is the fall of accuracy or mIoU (Eq. 2 of the label-free paper); without, the
    disagreement with the backbone (Eq. 3), an upper bound of it. "auto" takes labels where the table has them.

    ``tolerance``: "halving" grants the n-th site max_drop / 2^n and "even" each exit of the subset the same share,
    every exit judged alone as the paper does; the subset is then the cheapest of all (the largest K(S) of Eq. 4, for
    macs), or beyond 4,096 of them the one that growing finds. "joint" spends the tolerance
    where it saves most (``offramp.choose.joint`` says what is proven).

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
    """
    if not 0 <= max_drop < 1:
        raise OfframpError(expected="max_drop as a fraction in [0, 1)", got=repr(max_drop), where="search()",
                           todo="one point is 0.01.")
    if tolerance not in ("joint", "halving", "even"):
        raise OfframpError(expected="tolerance 'joint', 'halving' or 'even'", got=repr(tolerance), where="search()")
    if len(table) == 0:
        raise OfframpError(expected="a table with samples", got="an empty one", where="search()")
    if against not in ("auto", "labels", "backbone"):
        raise OfframpError(expected="against 'auto', 'labels' or 'backbone'", got=repr(against), where="search()")
    if against == "auto":
        against = "labels" if table.has_labels else "backbone"
    exits = len(table.columns) - 1
    fitted = tuple(temperatures) if temperatures is not None else (1.0,) * exits
    best: _Found | None = None
    for pixel in PIXEL_THRESHOLDS if table.task == "dense" else (None,):
        policy = Thresholds(
            confidence=confidence, thresholds=(None,) * exits,
            temperatures=fitted if table.task == "classify" else (),
            pixel_thresholds=(pixel,) * exits if table.task == "dense" else (),
        )
        problem = pose(table, policy, against=against, unit=minimise, batch=batch, steps=steps,
                       smooth=tolerance == "joint" if smooth is None else smooth)
        choice = _choose(problem, max_drop, tolerance, max_exits, confidence_level)
        chosen = tuple(sorted(choice))
        _, cost, loss = problem.run(choice)
        if best is None or cost < best.cost:
            best = _Found(cost=cost, loss=loss, policy=_policy(problem, policy, choice), exits=chosen)
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

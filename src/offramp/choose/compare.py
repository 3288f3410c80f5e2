"""Policies side by side: fitted on one split, judged on another, between two limits. N samples, E exits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, final

import numpy as np
from numpy.typing import NDArray

from offramp.choose.plan import finite
from offramp.choose.replay import replay
from offramp.choose.schedule import DecisionTimes, Fitted, budget_of, decision_ms, whole_cost
from offramp.errors import OfframpError, PlanError
from offramp.policies.lesson import Lesson, Scheduler, lesson
from offramp.policies.limits import Limit, no_information, oracle
from offramp.table import ExitTable, Unit
from offramp.table.payload import payload, quality
from offramp.types import Plan

__all__ = ["Comparison", "Row", "compare"]

Floats = NDArray[np.float64]
Kind = Literal["policy", "limit", "static", "untouched"]
UNTOUCHED = "untouched network"
_NAMES = {("classify", "labels"): "accuracy", ("classify", "backbone"): "agreement", ("dense", "labels"): "mIoU",
          ("dense", "backbone"): "mIoU against the network"}


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one budget, on the split that it is judged on."""

    method: str
    kind: Kind = "policy"
    budget: float | None = None
    """A sample; None for what knows no budget: the untouched network, and each exit alone for every sample."""
    planned: float | None = None
    """Mean cost on the samples that it was fitted on."""
    realised: float = float("nan")
    """Mean cost here; of latency_ms with what the policy's own time adds (``decision_ms``)."""
    quality: float = float("nan")
    """A fraction; NaN where no plan keeps the budget: ``notes`` say why."""
    interval: tuple[float, float] = (float("nan"), float("nan"))
    """Percentile bootstrap at 95 % over samples."""
    difference: float = float("nan")
    """Quality less the reference's at the same budget."""
    difference_interval: tuple[float, float] = (float("nan"), float("nan"))
    """On the same resamples for both."""
    room: float | None = None
    """Which share of the room between a die and the oracle it takes, both at the cost realised."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of the samples, by the exit that answered."""
    decision_ms: float | None = None
    """The whole of ``decide`` at the exits that a sample passes, mean a sample."""
    decision_share: float | None = None
    """Of the untouched network's time, where that was measured at this batch."""
    notes: tuple[str, ...] = ()

    @property
    def exceeds(self) -> bool:
        """Whether the budget was not kept here."""
        return self.budget is not None and self.realised > self.budget * (1 + 1e-9)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """What :func:`compare` found."""

    rows: tuple[Row, ...]
    quality: str
    """``accuracy`` or ``mIoU``; ``agreement`` with the untouched network where that is the truth."""
    unit: Unit
    batch: int
    reference: str
    split: str
    fit_split: str
    samples: int
    notes: tuple[str, ...] = ()

    svg: ClassVar[Callable[["Comparison"], str]]
    """The plot of quality against cost alone; the report stands above this room, ``offramp/__init__`` hangs it here."""
    html: ClassVar[Callable[["Comparison"], str]]
    """One self-contained page: plot, table, notes."""

    def of(self, method: str) -> tuple[Row, ...]:
        """A method's rows, by budget."""
        return tuple(row for row in self.rows if row.method == method)

    def table(self) -> str:
        """As text, a line a row."""
        lines = [("method", "budget", "planned", "realised", self.quality, "95 % interval", f"less {self.reference}",
                  "of the room", "decision")]
        for row in self.rows:
            low, high = (f"{100 * one:.2f}" for one in row.difference_interval)
            lines.append((
                row.method, _number(row.budget), _number(row.planned),
                _number(row.realised) + (" (over)" if row.exceeds else ""), _percent(row.quality),
                f"{_percent(row.interval[0])} .. {_percent(row.interval[1])}" if row.interval[0] == row.interval[0]
                else "", f"{100 * row.difference:+.2f} ({low} .. {high})" if row.difference == row.difference else "",
                "" if row.room is None else f"{100 * row.room:.0f} %",
                "" if row.decision_ms is None else f"{row.decision_ms:.3f} ms" + (
                    "" if row.decision_share is None else f" ({100 * row.decision_share:.2f} %)")))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                for line in lines]
        said = dict.fromkeys([*self.notes, *(f"{row.method} at {_number(row.budget)}: {note}"
                                             for row in self.rows for note in row.notes)])
        return "\n".join([*text, *(f"! {note}" for note in said)])

    def to_json(self) -> dict[str, Any]:
        """JSON values; what is not a number is null."""
        page: dict[str, Any] = finite(asdict(self))
        return page


def compare(
    table: ExitTable, policies: Mapping[str, Scheduler | Callable[[float], Plan]], budgets: Sequence[float | str], *,
    fit: ExitTable | None = None, unit: Unit = "macs", batch: int = 1,
    against: Literal["auto", "labels", "backbone"] = "auto", reference: str | None = None, limits: bool = True,
    timed: bool = True, repeats: int = 400, seed: int = 0, progress: Callable[[float, str], None] | None = None,
) -> Comparison:
    """Fit every policy for every budget on ``fit``, obey it on ``table``, and hold it against limits and controls.

    table: the split to judge on, with one head a site. fit: the split to fit on; nothing: half of ``table``, drawn by
        ``seed``, the other half being judged on, and a note says so.
    policies: name -> scheduler, or name -> function from a budget to a plan that was fitted elsewhere.
    budgets: a sample, in ``unit`` ("macs", or "latency_ms" at ``batch``), or "0.6x" of the untouched network.
    against: "labels" or the "backbone"'s own answers; "auto": labels where both splits have them.
    reference: the method that differences are taken to, at the same budget; nothing: the untouched network.
    limits: whether the oracle and the die stand beside (``offramp.policies.limits``; they know the judged split).
    timed: whether each policy's own time is measured (:func:`~offramp.choose.schedule.decision_ms`); times of a budget
        in ``latency_ms`` are counted in any case.
    repeats: resamples of the bootstrap; every method sees the same ones, so that differences are paired.
    progress: called with the part that is done and the name of the method that comes next.

    Controls: the untouched network, and each exit alone for every sample, cut there and with no other head. A method
    that has no plan for a budget keeps its row, with a note. Fit and judged split are told apart by their fingerprints.
    """
    notes: list[str] = []
    if fit is None:
        halves = table.split_rows({"fit": 0.5, "held": 0.5}, seed=seed)
        fit, table = halves["fit"], halves["held"]
        notes.append("No split to fit on was given: fitted on one half of the samples, judged on the other.")
    if reference is not None and reference not in policies:
        raise OfframpError(expected=f"a reference among {', '.join(policies)}", got=repr(reference), where="compare()")
    asked = sorted({budget_of(table, one, unit, batch) for one in budgets})
    if against == "auto":
        against = "labels" if table.has_labels and fit.has_labels else "backbone"
    judge = _Judge(lesson(table, unit=unit, batch=batch, against=against), reference, repeats, seed, timed)
    at: dict[str, dict[float, Row]] = {}
    names = sorted(policies, key=lambda name: name != reference)  # the reference first: the others are held against it
    for done, name in enumerate(names):
        policy = policies[name]
        make = Fitted(fit, policy, unit=unit, batch=batch, against=against).plan if hasattr(policy, "fit") else policy
        for step, budget in enumerate(asked):
            if progress is not None:
                progress((done + step / len(asked)) / len(names), name)
            at.setdefault(name, {})[budget] = judge.policy(name, make, budget)
    if progress is not None:
        progress(1.0, "")
    rows = [judge.static(None), *(judge.static(e) for e in range(len(table.columns) - 1))]
    if limits:
        rows += [judge.limit(find, budget) for find in (oracle, no_information) for budget in asked]
    return Comparison(
        rows=(*rows, *(at[name][budget] for name in policies for budget in asked)), unit=unit, batch=batch,
        quality=_NAMES[table.task, against], reference=reference or UNTOUCHED, split=table.split, fit_split=fit.split,
        samples=len(table), notes=tuple(notes))


class _Judge:
    """One split, resampled once for all methods."""

    def __init__(self, taught: Lesson, reference: str | None, repeats: int, seed: int, timed: bool) -> None:
        self.reference = reference
        self.lesson, self.table, self.timed = taught, taught.table, timed
        self.unit, self.batch = taught.unit, taught.batch
        self.hit, self.union = payload(self.table, taught.against)
        rows = len(self.table)
        self.weights = np.random.default_rng(seed).multinomial(
            rows, np.full(rows, 1 / rows), size=repeats).astype(np.float64)
        self.last = len(self.table.columns) - 1
        # what differences are taken to: a method's rows by budget, or the untouched network at any
        whole = self._resampled(np.full(rows, self.last))
        self._base: dict[float | None, tuple[float, Floats]] = {} if reference else {None: whole}
        self._times: dict[tuple[str, tuple[str, ...]], DecisionTimes] = {}

    def static(self, e: int | None) -> Row:
        """Every sample at exit ``e``; None: the untouched network."""
        column, table = self.last if e is None else e, self.table
        body, head = table.costs.parts(self.unit, batch=self.batch)
        cost = whole_cost(table, self.unit, self.batch) if e is None else float(body[e] + head[e])
        name = UNTOUCHED if e is None else f"all at {table.names[e]}"
        return self._row(np.full(len(table), column), method=name, kind="untouched" if e is None else "static",
                         realised=cost)

    def limit(self, find: Callable[[Lesson, float], Limit], budget: float) -> Row:
        name = find.__name__.replace("_", " ")
        try:
            found = find(self.lesson, budget)
        except PlanError as error:
            return Row(method=name, kind="limit", budget=budget, notes=(str(error),))
        shares = dict(zip(self.table.names, found.shares.tolist(), strict=True))
        given: dict[str, Any] = {"method": name, "kind": "limit", "budget": budget, "realised": found.cost}
        if found.exit_index is not None:
            return self._row(found.exit_index.numpy(), **given)
        return Row(**given, quality=found.quality, shares=shares,
                   difference=found.quality - self._reference(budget)[0])

    def policy(self, name: str, make: Any, budget: float) -> Row:
        try:
            plan: Plan = make(budget)
        except PlanError as error:
            return Row(method=name, budget=budget, notes=(str(error),))
        done = replay(self.table, plan, batch=self.batch)
        added = plan.predicted.get("decision_ms", ())
        spent: float | None = None
        if (self.timed or self.unit == "latency_ms") and plan.exits:
            times = self._timed(name, plan)
            added = added or times.added_ms
            passed = np.cumsum([*times.decide_ms, 0.0])
            spent = float(passed[done.exit_index.numpy()].mean())
        measured = any(one.batch == self.batch for one in self.table.costs.latency)
        realised = float(done.cost(self.unit, batch=self.batch, decision_ms=added).mean())
        planned = plan.predicted.get("cost", plan.predicted.get(self.unit))
        return self._row(
            done.column_of.numpy(), method=name, budget=budget, planned=planned,
            realised=realised, notes=(*plan.notes, *done.notes), decision_ms=spent,
            decision_share=None if spent is None or not measured else spent / whole_cost(
                self.table, "latency_ms", self.batch))

    def _timed(self, name: str, plan: Plan) -> DecisionTimes:
        key = name, plan.exits
        if key not in self._times:
            self._times[key] = decision_ms(plan.policy, self.table, exits=plan.exits, batch=self.batch, repeats=5)
        return self._times[key]

    def _reference(self, budget: float | None) -> tuple[float, Floats]:
        missing = float("nan"), np.full(len(self.weights), np.nan)
        return self._base.get(budget if self.reference else None, missing)

    def _row(self, column: NDArray[np.int64], **given: Any) -> Row:
        value, drawn = self._resampled(column)
        if given["method"] == self.reference:
            self._base[given["budget"]] = value, drawn
        against, theirs = self._reference(given.get("budget"))
        counts = np.bincount(column, minlength=self.last + 1) / len(column)
        room = None
        if given.get("kind", "policy") == "policy":
            paid = max(given["realised"], float(self.lesson.cost[0]))
            low, high = no_information(self.lesson, paid).quality, oracle(self.lesson, paid).quality
            room = (value - low) / (high - low) if high > low else None
        return Row(**given, quality=value, interval=_interval(drawn), difference=value - against,
                   difference_interval=_interval(drawn - theirs), room=room,
                   shares={name: share for name, share in zip(self.table.names, counts.tolist(), strict=True) if share})

    def _resampled(self, column: NDArray[np.int64]) -> tuple[float, Floats]:
        rows = np.arange(len(column))
        hit, union = self.hit[rows, column], self.union[rows, column]
        return float(quality(hit.sum(axis=0), union.sum(axis=0))), quality(self.weights @ hit, self.weights @ union)


def _interval(drawn: Floats) -> tuple[float, float]:
    if np.isnan(drawn).any():
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.5g}"


def _percent(value: float) -> str:
    return "–" if value != value else f"{100 * value:.2f}"

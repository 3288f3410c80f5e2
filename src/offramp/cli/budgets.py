"""Policies by the names that the command line knows: side by side on a run's tables, or one of them as its plan."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from offramp.choose.compare import Comparison, compare
from offramp.choose.guarantee import guarantee
from offramp.choose.plan import save_plan
from offramp.choose.schedule import schedule
from offramp.cli.folder import Run
from offramp.cli.masks import refuse_for_masks
from offramp.cli.say import Settled, fail
from offramp.policies import (
    EENet,
    Geometric,
    LearnedCache,
    MamlStop,
    Pabee,
    Pcee,
    Scheduler,
    Stopping,
    Swept,
    TopShare,
)
from offramp.report.comparison import render_comparison
from offramp.table import Unit, write_atomic
from offramp.types import Plan

__all__ = ["SCHEDULERS", "compare_run", "schedule_run"]

SCHEDULERS: dict[str, Callable[[], Scheduler]] = {
    "stopping": Stopping, "eenet": EENet, "msdnet": Geometric, "branchynet": lambda: Geometric(confidence="entropy"),
    "pabee": Pabee, "pcee": Pcee, "mamlstop": MamlStop, "gati": LearnedCache, "threshold": Swept, "topk": TopShare,
}


def compare_run(run: Run, *, by: str, budgets: str, unit: str, batch: int, quiet: bool = False) -> Comparison:
    """Fitted on the calibration split, judged on the test split; the page is ``comparison.html`` in the run."""
    names = by.split(",")
    _known(names, "some of")
    refuse_for_masks(run.manifest.mask, "compare", "compare")
    if unit not in ("macs", "latency_ms"):
        fail(f"--unit: expected macs or latency_ms, but got {unit!r}.")
    with Settled("comparing", quiet=quiet) as told:
        found = compare(run.table("test"), {name: SCHEDULERS[name]() for name in names}, _budgets(budgets),
                        fit=run.table("calibration"), unit=cast(Unit, unit), batch=batch,
                        progress=lambda done, _: told(done, 0.0))
    write_atomic(run.path / "comparison.html", render_comparison(found))
    return found


def schedule_run(run: Run, *, by: str | None, budget: str | None, max_drop: float | None, confidence: float | None,
                 unit: str, batch: int, against: str, command: str = "", quiet: bool = False) -> Plan:
    """A scheduler's plan, kept as the run's: for a mean budget, or with a promise for samples to come, or both.

    With a ``confidence`` it is fitted on one half of the calibration split and certified on the other.
    """
    refuse_for_masks(run.manifest.mask, "a policy for each image", "--by")
    name = by or "stopping"
    _known([name], "one of")
    if budget is None and confidence is None:
        fail(f"--by {name}: expected --budget, such as 0.6x, or --guarantee 0.95 with --max-drop, but got neither.")
    if budget is not None and confidence is None and max_drop is not None:
        fail("--budget with --max-drop: expected one of them, for a budget is spent as well as it can be; both can be "
             "promised together, with --guarantee 0.95.")
    most, unit = (None, unit) if budget is None else _budget(budget, unit)
    given: dict[str, Any] = {"unit": unit, "batch": batch, "against": against}
    table, scheduler = run.table("calibration"), SCHEDULERS[name]()
    with Settled("fitting", quiet=quiet):
        if confidence is None:
            assert most is not None
            plan = schedule(table, scheduler, budget=most, **given)
        else:
            if max_drop is None and most is None:
                max_drop = 0.01
            plan = guarantee(table, scheduler, max_drop=max_drop, max_cost=most, confidence=confidence, **given)
    save_plan(plan, run.path / "plan.json")
    run.save(command)
    return plan


def _known(names: Sequence[str], how_many: str) -> None:
    for name in names:
        if name not in SCHEDULERS:
            fail(f"--by: expected {how_many} {', '.join(SCHEDULERS)}, but got {name!r}.")


def _budget(text: str, unit: str) -> tuple[float | str, str]:
    """A budget and its unit: "25ms" says it, "0.6x" and plain numbers are in that of ``--minimise``."""
    milliseconds = text.endswith("ms")
    try:
        number = float(text.removesuffix("ms" if milliseconds else "x"))
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        fail(f"--budget: expected a mean a sample, such as 0.6x (of the untouched network), 25ms or 3.5e8 (MACs), but "
             f"got {text!r}.")
    return text if text.endswith("x") else number, "latency_ms" if milliseconds else unit


def _budgets(text: str) -> Sequence[float | str]:
    try:
        found = [one if one.endswith("x") and float(one[:-1]) > 0 else float(one) for one in text.split(",")]
    except ValueError:
        found = []
    if not found:
        fail(f"--budgets: expected numbers such as 0.5x,0.7x (of the untouched network) or 2.5,3, but got {text!r}.")
    return found

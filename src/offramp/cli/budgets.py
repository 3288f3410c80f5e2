"""Policies by the names that the command line knows, side by side on a run's tables."""

from collections.abc import Callable, Sequence
from typing import cast

from offramp.choose.compare import Comparison, compare
from offramp.cli.folder import Run
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

__all__ = ["SCHEDULERS", "compare_run"]

SCHEDULERS: dict[str, Callable[[], Scheduler]] = {
    "stopping": Stopping, "eenet": EENet, "msdnet": Geometric, "branchynet": lambda: Geometric(confidence="entropy"),
    "pabee": Pabee, "pcee": Pcee, "mamlstop": MamlStop, "gati": LearnedCache, "threshold": Swept, "topk": TopShare,
}


def compare_run(run: Run, *, by: str, budgets: str, unit: str, batch: int, quiet: bool = False) -> Comparison:
    """Fitted on the calibration split, judged on the test split; the page is ``comparison.html`` in the run."""
    names = by.split(",")
    for name in names:
        if name not in SCHEDULERS:
            fail(f"--by: expected some of {', '.join(SCHEDULERS)}, with commas, but got {name!r}.")
    if unit not in ("macs", "latency_ms"):
        fail(f"--unit: expected macs or latency_ms, but got {unit!r}.")
    with Settled("comparing", quiet=quiet) as told:
        found = compare(run.table("test"), {name: SCHEDULERS[name]() for name in names}, _budgets(budgets),
                        fit=run.table("calibration"), unit=cast(Unit, unit), batch=batch,
                        progress=lambda done, _: told(done, 0.0))
    write_atomic(run.path / "comparison.html", render_comparison(found))
    return found


def _budgets(text: str) -> Sequence[float | str]:
    try:
        found = [one if one.endswith("x") and float(one[:-1]) > 0 else float(one) for one in text.split(",")]
    except ValueError:
        found = []
    if not found:
        fail(f"--budgets: expected numbers such as 0.5x,0.7x (of the untouched network) or 2.5,3, but got {text!r}.")
    return found

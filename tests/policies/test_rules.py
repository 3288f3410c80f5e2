"""Baselines keep every scheduler's contract, and do what their papers say."""

import pytest

from offramp.policies.lesson import Scheduler
from offramp.policies.rules import Geometric, Pabee, Swept, TopShare
from offramp.testing import SchedulerContract
from offramp.types import Task

SCHEDULERS: dict[str, tuple[Scheduler, float]] = {  # and how much of a budget it may leave
    "msdnet": (Geometric(), 0.05), "branchynet": (Geometric(confidence="entropy"), 0.05),
    "margin": (Geometric(confidence="margin"), 0.05), "swept": (Swept(), 0.05), "top share": (TopShare(), 0.05),
    "random": (Geometric(confidence="random"), 0.05), "pabee": (Pabee(), 1.0),
    "agreement": (Geometric(confidence="repeats"), 1.0), "vote": (Geometric(confidence="vote"), 1.0),
    "swept vote": (Swept(confidence="vote"), 1.0),
}
DENSE = ("msdnet", "swept", "random", "pabee", "agreement")  # the others differ in what is not the table's
CONTRACT = [name for name in dir(SchedulerContract) if name.startswith("test_")]


def suite(name: str, kind: Task) -> SchedulerContract:
    class Suite(SchedulerContract):
        task, samples = kind, 80 if kind == "classify" else 40
        unspent = SCHEDULERS[name][1] * (1 if kind == "classify" else 2)

        def scheduler(self) -> Scheduler:
            return SCHEDULERS[name][0]

    return Suite()


@pytest.mark.parametrize("test", CONTRACT)
@pytest.mark.parametrize(("name", "task"), [*((name, "classify") for name in SCHEDULERS),
                                            *((name, "dense") for name in DENSE)])
def test_every_baseline_keeps_the_contract(name: str, task: Task, test: str) -> None:
    getattr(suite(name, task), test)()

"""Optimal stopping against a tabular dynamic program and against all rules there are."""

from offramp.policies.stopping import Stopping
from offramp.testing import SchedulerContract


class TestStopping(SchedulerContract):
    def scheduler(self) -> Stopping:
        return Stopping(points=16)


class TestDense(SchedulerContract):
    task = "dense"
    samples = 60

    def scheduler(self) -> Stopping:
        return Stopping(points=16)

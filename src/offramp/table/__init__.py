"""Memoised predictions and costs: the one file that the evidence wing works on."""

from offramp.table.costs import Costs, Latency, Unit
from offramp.table.exits import ExitTable
from offramp.table.files import write_atomic

__all__ = ["Costs", "ExitTable", "Latency", "Unit", "write_atomic"]

"""Cutting a network: trace it, list its sites, split it into stages."""

from offramp.graph.cuts import Sites, sites
from offramp.graph.place import place
from offramp.graph.split import Stage, State, begin, split
from offramp.graph.trace import Traced, trace

__all__ = ["Sites", "Stage", "State", "Traced", "begin", "place", "sites", "split", "trace"]

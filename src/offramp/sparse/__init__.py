"""Masked networks at run time: what lies after the first exit runs at active places alone (arXiv:2104.00749)."""

from offramp.sparse.crossover import Crossover
from offramp.sparse.network import Said, Sparse, deploy
from offramp.sparse.plain import Plain, Runner
from offramp.sparse.triton import Triton

__all__ = ["Crossover", "Plain", "Runner", "Said", "Sparse", "Triton", "deploy"]

"""Training of exits: one loop, and recipes that say what it does."""

from offramp.train import recipes
from offramp.train.history import EpochRecord, History
from offramp.train.loop import fit, restore
from offramp.train.recipe import Recipe
from offramp.train.shapes import HeadSearch, search_heads

__all__ = ["EpochRecord", "HeadSearch", "History", "Recipe", "fit", "recipes", "restore", "search_heads"]

"""Deployed networks that obey a plan, and the clock that they are held against."""

from offramp.runtime._deploy import deploy
from offramp.runtime.adaptive import Adaptive, Answer
from offramp.runtime.anytime import Anytime, Refined, Refining
from offramp.runtime.deadline import ByDeadline
from offramp.runtime.pace import Cancel, Deadlines

__all__ = ["Adaptive", "Answer", "Anytime", "ByDeadline", "Cancel", "Deadlines", "Refined", "Refining", "deploy"]

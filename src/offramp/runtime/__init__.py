"""Deployed networks that obey a plan, and the clock that they are held against."""

from offramp.runtime.adaptive import Adaptive, Answer, deploy
from offramp.runtime.anytime import Anytime, Refined

__all__ = ["Adaptive", "Answer", "Anytime", "Refined", "deploy"]

"""Deployed networks that obey a plan, and the clock that they are held against."""

from offramp.runtime.adaptive import Adaptive, Answer, deploy

__all__ = ["Adaptive", "Answer", "deploy"]

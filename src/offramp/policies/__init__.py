"""Who leaves where: rules and learned schedulers that decide at an exit, and how they are fitted to a budget.

A scheduler is fitted to a lesson once and then gives a policy for each budget; ``offramp.schedule`` makes a plan of it,
``offramp.compare`` holds several against each other.
"""

from offramp.policies.cache import LearnedCache
from offramp.policies.eenet import EENet, EENetPolicy
from offramp.policies.lesson import Lesson, Scheduler, lesson
from offramp.policies.limits import no_information, oracle, room_taken
from offramp.policies.mamlstop import MamlStop, StopNets
from offramp.policies.pcee import Pcee, Reliability
from offramp.policies.rules import Agreement, Geometric, Pabee, Patience, Random, Swept, TopShare
from offramp.policies.stopping import Stopping, StoppingPolicy
from offramp.policies.switch import Switch, Switching
from offramp.policies.thresholds import Thresholds

__all__ = [
    "Agreement", "EENet", "EENetPolicy", "Geometric", "LearnedCache", "Lesson", "MamlStop", "Pabee", "Patience", "Pcee",
    "Random", "Reliability", "Scheduler", "StopNets", "Stopping", "StoppingPolicy", "Swept", "Switch", "Switching",
    "Thresholds", "TopShare", "lesson", "no_information", "oracle", "room_taken",
]

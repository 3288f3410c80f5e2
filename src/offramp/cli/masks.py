"""Masked networks: what ``--mask`` makes of a network with exits, its plan, and how it runs up to that plan's exit."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import OfframpError, PlanError
from offramp.graph import place, sites
from offramp.nn.masked import Masked, mask_
from offramp.nn.multiexit import MultiExit
from offramp.nn.redesigned import RedesignedSpec, redesigned
from offramp.nn.slim import Slimmable
from offramp.policies.thresholds import Thresholds
from offramp.record import MASKED_END, model_fingerprint
from offramp.runtime import Adaptive, deploy
from offramp.runtime.anytime import Refined
from offramp.runtime.pace import Deadlines
from offramp.sparse import Sparse
from offramp.sparse import deploy as deploy_masked
from offramp.types import Plan

__all__ = [
    "Until", "deployed", "masked", "own_ends", "redesigned_heads", "refuse_for_masks", "setting_of", "to_its_end",
    "unmasked",
]

CHANNELS = 64
"""Of redesigned heads unless said: ADP-C's on HRNet-W18 and for poses."""


class Until:
    """A masked network at its active places that ends at one of its exits, called as ``Adaptive`` is."""

    def __init__(self, fast: Sparse, end: int) -> None:
        self.fast, self.end = fast, end

    @property
    def deadlines(self) -> Deadlines:
        return self.fast.deadlines

    def __call__(self, images: Tensor) -> Any:
        return self.predict(images).output

    def calibrate(self, images: Tensor) -> None:
        """Make what a size needs once, so that no deadline pays for it."""
        self.predict(images)

    def predict(self, images: Tensor, *, deadline_ms: float | None = None) -> Refined:
        """The last answer by the deadline, at most that of its exit."""
        run = self.fast.anytime(images, deadline_ms=deadline_ms)
        for answer in run:
            if answer.exit_index == self.end:
                break
        return answer


def masked(net: MultiExit, rule: Mapping[str, Any], inputs: Tensor | None) -> Masked:
    """In place; with inputs OfframpError where it could not be run at active places alone in the end."""
    made = mask_(net, **rule)
    if inputs is not None:
        deploy_masked(made, runner="plain").predict(inputs)
    return made


def unmasked(net: Masked) -> MultiExit:
    """The same network without masks, a copy."""
    return copy.deepcopy(net).unmask_()


def deployed(net: MultiExit | Slimmable | Masked, plan: Plan, *, engine: Any, device: torch.device
             ) -> tuple[Adaptive | Until, list[str]]:
    """What a plan runs, and the names of the exits that it may answer at, the last its end."""
    net.to(device)
    names = [*plan.exits, "final"]
    if not isinstance(net, Masked):
        return deploy(net, plan, engine=engine).to(device), names
    if (made_for := plan.fingerprints.get("model")) and made_for != model_fingerprint(net):
        raise PlanError(expected="a plan for this network", where="a masked network's plan",
                        got=f"network {made_for}, this one is {model_fingerprint(net)}: other weights or masks",
                        todo="offramp record and offramp search make one.")
    if not plan.exits:  # the plan is of the network with its masks, and chose to do without
        return deploy(unmasked(net), replace(plan, fingerprints={}), engine=engine).to(device), names
    names = [*(column.name for column in net.net.columns[:-1]), MASKED_END]
    end = names.index(plan.exits[0])
    return Until(deploy_masked(net, engine=engine), end), names[:end + 1]


def to_its_end() -> Plan:
    """The plan of a masked network for which none was searched."""
    return Plan(exits=(MASKED_END,), policy=Thresholds(thresholds=(0.0,)), task="dense", setting="budgeted",
                asked={"setting": "budgeted"})


def setting_of(mask: Mapping[str, Any], asked: str | None) -> str:
    """The setting of a search; OfframpError where there is none such, or masks leave no choice."""
    if mask:
        if asked not in (None, "budgeted"):
            refuse_for_masks(mask, asked, "--setting")
        return "budgeted"
    known = ("input_dependent", "budgeted", "anytime")
    if asked not in (None, *known):
        raise OfframpError(expected=", ".join(known), got=repr(asked), where="--setting")
    return asked or "input_dependent"


def refuse_for_masks(mask: Mapping[str, Any], asked: str, where: str) -> None:
    """OfframpError where masks leave no other choice than where the network ends."""
    if mask:
        raise OfframpError(
            expected="--setting budgeted for a masked network: at which of its exits it ends", got=asked, where=where,
            todo="it goes on pixel by pixel, and a table has the mean of what that costs, not that of single images; "
                 "it answers by a deadline with any plan: offramp run IMAGES --model RUN --deadline-ms 30.")


def own_ends(network: nn.Module, model: str) -> list[str]:
    """Where a network itself says that it ends in parts."""
    ends = getattr(network, "ends", None)
    if not isinstance(ends, tuple) or not all(isinstance(one, str) for one in ends):
        raise OfframpError(expected="a network that names its own ends, such as offramp:hrnet_w18_small", got=model,
                           where="--exits ends", todo="give a number, or names of sites: offramp sites MODEL.")
    return [*ends]


def redesigned_heads(heads: str, network: nn.Module, inputs: Tensor, exits: Any, within: str | None
                     ) -> dict[str, RedesignedSpec]:
    """ADP-C's heads for these exits, ``redesigned`` or ``redesigned:CHANNELS``."""
    _, _, channels = heads.partition(":")
    if channels and not (channels.isdigit() and int(channels)):
        raise OfframpError(expected="redesigned, or with its channels redesigned:128", got=repr(heads), where="--heads")
    names = [site.name for site in place(sites(network, inputs, within=within), exits)]
    return redesigned(names, int(channels or CHANNELS))

"""A slimmable network as one that can be stepped through: with its exits, or none but its end, at each width."""

from typing import Any

import torch

from offramp.nn.attach import attach
from offramp.nn.multiexit import MultiExit
from offramp.nn.slim import Slimmable

__all__ = ["exits_of", "narrow_exits"]


def exits_of(net: MultiExit | Slimmable) -> MultiExit:
    """The network with exits inside a slimmable one; made once, without exits, where it was slimmed without any.

    HeadError where the network's output holds no logits.
    """
    if isinstance(net, MultiExit):
        return net
    if isinstance(net.backbone, MultiExit):
        return net.backbone
    known: Any = vars(net).get("_exits")  # no submodule: its guest would be there twice
    if known is None or known.backbone is not net.backbone:
        with net.at(1.0):
            known = vars(net)["_exits"] = attach(net.backbone, net.example, exits=0)
    made: MultiExit = known
    return made


def narrow_exits(net: Slimmable, width: float) -> MultiExit:
    """A plain dense network of one width, its own end as its last column; weights are copies."""
    with torch.inference_mode(False):
        made = net.narrow(width)
        if isinstance(made, MultiExit):
            return made.retraced()
        exits = exits_of(net)
        return attach(made, net.example, exits=0, task=exits.task, num_classes=exits.num_classes)

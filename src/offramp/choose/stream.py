"""Obey a plan on a table as a stream: batch by batch in a stated order, with a policy that learns on the way."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from offramp.choose.replay import Replay, replay
from offramp.table import ExitTable
from offramp.types import Plan

__all__ = ["replay_stream"]


def replay_stream(table: ExitTable, plan: Plan, *, batch: int, order: Tensor | None = None) -> Replay:
    """What one caller sees that sends the samples in this order (N,), ``batch`` at a time; nothing: as they lie.

    For a policy that keeps an account (``policies.switch.Switch``): it starts anew, gets its turn for each batch and is
    told where the rows left, as by the runtime. Of any other policy it is ``replay``, only slower. ``exit_index`` is in
    the table's order; latency is that of single rows.
    """
    fresh = replace(plan, policy=copy.deepcopy(plan.policy))
    done = replay(table.slice(slice(0)), fresh)
    order = torch.arange(len(table)) if order is None else order
    exit_index = torch.zeros(len(table), dtype=torch.int64)
    for rows in torch.split(order, batch) if len(order) else ():
        begin = getattr(fresh.policy, "begin", None)
        turn: Any = fresh.policy if begin is None else begin(len(rows))
        exit_index[rows] = replay(table.slice(rows), replace(fresh, policy=turn)).exit_index
        if begin is not None:
            turn.observe(exit_index[rows])
    return replace(done, table=table, exit_index=exit_index)

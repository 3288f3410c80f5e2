"""A switch obeyed by a running network does what its replay does, and every pass is charged."""

from typing import Any

import pytest
import torch

import offramp
from offramp.choose.stream import replay_stream
from offramp.errors import OfframpError
from offramp.policies.switch import Switch
from offramp.policies.thresholds import Thresholds
from runtime.nets import EXITS, classifier, images, plan, segmenter


def switch(table: offramp.ExitTable, **more: Any) -> Switch:
    """Rungs at cuts between scores, so that a last bit parts nobody."""
    costs = tuple(table.costs.path(range(len(table.columns))))
    base = Thresholds(thresholds=(0.5, 0.5))
    scores = [base.score(e, table.evidence(range(e + 1))).double().sort().values for e in range(2)]
    cuts = [tuple(float(one[i] + one[i + 1]) / 2 for one in scores) for i in (len(table) * k // 8 for k in (6, 4, 2))]
    return Switch(**{"budget": costs[0] + 0.4 * (costs[-1] - costs[0]), "costs": costs, "horizon": 6,
                     "nominal": tuple(costs[0] + share * (costs[-1] - costs[0]) for share in (0.7, 0.4, 0.1)),
                     "policies": tuple(Thresholds(thresholds=cut) for cut in cuts), **more})


@pytest.mark.parametrize("task", ["classify", "dense"])
def test_live_is_the_replay_in_the_same_order_and_batches(task: Any) -> None:
    net = classifier() if task == "classify" else segmenter()
    data = images(40, 12 if task == "classify" else 16)
    table = offramp.record(net, [data], latency=False, split="stream")
    how = plan(switch(table), task=task)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    for batch in (1, 4, 9):
        replayed = replay_stream(table, how, batch=batch, order=order).exit_index
        assert len(set(replayed.tolist())) == 3
        for shrink in (True, False):
            fast = net.deploy(plan(switch(table), task=task), shrink=shrink)
            live = torch.empty(40, dtype=torch.int64)
            for rows in order.split(batch):
                fast(data[rows])
                live[rows] = fast.last_exits
            assert torch.equal(live, replayed)
            told = fast.plan.policy.account
            assert told.rows == 40 and told.spent == pytest.approx(
                sum(fast.plan.policy.costs[e] for e in live.tolist()))


def test_a_pass_that_breaks_off_is_charged_what_it_reached() -> None:
    net, data = classifier(), images(8)
    table = offramp.record(net, [data], latency=False, split="stream")
    costs = tuple(table.costs.path(range(3)))
    half = Thresholds(thresholds=(switch(table).policies[0].thresholds[0], None))
    one = Switch(budget=costs[1], costs=costs, nominal=(costs[1],), policies=(half,), horizon=1000)
    fast = net.deploy(plan(one))
    stream = fast.stream(data)
    assert one.account.rows == 0, "nothing ran yet"
    first = next(stream)
    assert first.exit_index == 0 and 0 < len(first.rows) < 8 and one.account.rows == 0
    stream.close()
    assert one.account.rows == 8 and one.account.spent == pytest.approx(8 * costs[0]), "all got to the first exit"
    with pytest.raises(OfframpError):
        fast(torch.full_like(data, torch.nan))
    assert one.account.rows == 8, "and an input that is refused there got to none"
    list(fast.anytime(data))
    assert one.account.rows == 16 and one.account.spent == pytest.approx(
        8 * costs[0] + len(first.rows) * costs[0] + (8 - len(first.rows)) * costs[2])
    fast(data[:0])
    assert one.account.rows == 16


def test_other_settings_ask_nobody() -> None:
    net, data = classifier(), images(8)
    table = offramp.record(net, [data], latency=False, split="stream")
    fast = net.deploy(plan(switch(table), EXITS, setting="anytime"))
    fast(data)
    assert len(list(fast.anytime(data))) == 3 and fast.plan.policy.account.rows == 0

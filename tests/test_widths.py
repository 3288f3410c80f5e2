"""Widths through the whole library: recorded, searched, deployed; the narrow networks live are the columns replayed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import offramp
from offramp.choose.replay import replay
from offramp.errors import PlanError
from offramp.nn.slim import Slimmable
from offramp.policies.thresholds import Thresholds
from offramp.table import ExitTable
from offramp.types import Plan
from runtime.nets import Guest, images, stir_

torch.set_num_threads(1)


class Wide(Guest):
    """With channels enough to leave some out."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__(form)
        for name, (c_in, c_out) in {"one": (3, 16), "two": (16, 32), "three": (32, 32)}.items():
            getattr(self, name)[0] = nn.Conv2d(c_in, c_out, 3, 2 if name == "two" else 1, 1, bias=False)
            getattr(self, name)[1] = nn.BatchNorm2d(c_out)
        self.last = nn.Linear(32, 5)


def slim(form: str = "tensor", exits: Any = ("one", "two")) -> Slimmable:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    guest = Wide(form)
    if exits is None:
        net = offramp.slim_(guest, (0.5, 1.0), example_inputs=x)
    else:
        made = offramp.attach(guest, x, exits=exits, heads=offramp.HeadSpec(convs=((16, 3, 1),)))
        net = offramp.slim_(made, (0.5, 1.0), example_inputs=x)
    stir_(net)
    return net.eval()


def recorded(net: Slimmable, rows: int = 48, **how: Any) -> ExitTable:
    labels = torch.arange(rows) % 5
    return offramp.record(net, torch.utils.data.TensorDataset(images(rows), labels), latency=how.pop("latency", False))


@pytest.mark.parametrize("form", ["tensor", "dict"])
def test_every_column_says_what_its_narrow_network_says(form: str) -> None:
    net = slim(form)
    table = recorded(net)
    assert table.names == ("one@0.5", "two@0.5", "final@0.5", "one", "two", "final")
    x = images(48)
    with torch.no_grad():
        told = [*net.narrow(0.5)(x), *net.narrow(1.0)(x)]
    assert table.logits is not None
    for e, logits in enumerate(told):
        torch.testing.assert_close(table.logits[:, e], logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(table.logits[:, 2], table.logits[:, 5], atol=1e-2)
    # the costs are those of networks of their own, counted by the plain counter
    whole = offramp.record(offramp.attach(net.narrow(0.5).backbone, x[:2], exits=("one",)), [x], latency=False)
    assert table.costs.macs[2] == whole.costs.macs[-1] and table.costs.macs[0] == whole.costs.macs[0]
    assert table.costs.widths == (0.5,) * 3 + (1.0,) * 3


def test_without_exits_only_the_widths_remain() -> None:
    net = slim(exits=None)
    assert recorded(net).names == ("final@0.5", "final")
    plan = offramp.search(recorded(net), max_drop=0.9, against="backbone", setting="budgeted")
    assert plan.exits == ("final@0.5",)
    fast = net.deploy(plan)
    torch.testing.assert_close(fast(images(3)), net.narrow(0.5)(images(3)))
    assert sum(p.numel() for p in fast.parameters()) < 0.4 * sum(p.numel() for p in net.parameters())


EXITS = [("one@0.5", "final@0.5", "two"), ("one@0.5", "two"), ("final@0.5",), ("one", "two"), ("two@0.5", "final@0.5")]


@pytest.mark.parametrize("form", ["tensor", "dict"])
@pytest.mark.parametrize("exits", EXITS, ids=str)
def test_live_equals_replay_across_widths(form: str, exits: tuple[str, ...]) -> None:
    net = slim(form)
    table, x = recorded(net, 64), images(64)
    assert table.logits is not None
    scores = table.logits[:, [table.index(name) for name in exits]].softmax(-1).amax(-1)
    policy = Thresholds(thresholds=tuple(float(column.quantile(0.6)) + 1e-4 for column in scores.T))
    plan = Plan(exits=exits, policy=policy, task="classify", fingerprints=table.fingerprints)
    done, fast = replay(table, plan), net.deploy(plan)
    for rows in (slice(0, 64), slice(5, 6), slice(0, 0), slice(3, 20)):
        said = fast(x[rows])
        assert torch.equal(fast.last_exits, done.exit_index[rows])
        said = said["out"] if isinstance(said, dict) else said
        torch.testing.assert_close(said, table.logits[torch.arange(64), done.column_of][rows], rtol=1e-4, atol=1e-5)
    assert len(set(done.exit_index.tolist())) == len(exits) + 1
    everyone = torch.cat([answer.rows for answer in fast.stream(x)])
    assert everyone.sort().values.tolist() == list(range(64))


@pytest.mark.parametrize("how", [{"engine": "compile"}, {"channels_last": True, "fold": True}], ids=str)
def test_a_chain_of_widths_in_other_forms_says_the_same(how: dict[str, Any]) -> None:
    net = slim()
    table, x = recorded(net, 32), images(32)
    assert table.logits is not None
    exits = ("one@0.5", "final@0.5", "two")
    ranked = table.logits[:, [table.index(name) for name in exits]].softmax(-1).amax(-1).sort(0).values
    between = (ranked[18] + ranked[19]) / 2  # no score is near: rounding moves nobody
    plan = Plan(exits=exits, policy=Thresholds(thresholds=tuple(map(float, between))), task="classify")
    plain, other = net.deploy(plan), net.deploy(plan, **how)
    torch.testing.assert_close(other(x), plain(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(other.last_exits, plain.last_exits) and len(set(plain.last_exits.tolist())) > 2


def test_macs_of_a_chain_are_those_of_the_table() -> None:
    from offramp.runtime.bench import macs_to_exits

    net = slim()
    table = recorded(net)
    plan = Plan(exits=("one@0.5", "final@0.5", "two"), policy=Thresholds(thresholds=(0.9, 0.9, 0.9)), task="classify")
    paid = table.costs.path([table.index(name) for name in (*plan.exits, "final")])
    assert list(macs_to_exits(net.deploy(plan), images(2))) == paid.tolist()


def test_anytime_goes_from_width_to_width() -> None:
    net = slim()
    x = images(4)
    plan = Plan(exits=("one@0.5", "final@0.5", "two"), policy=Thresholds(thresholds=(None,) * 3), task="classify",
                setting="anytime")
    fast = net.deploy(plan)
    narrow, whole = net.narrow(0.5)(x), net.narrow(1.0)(x)
    answers = list(fast.anytime(x))
    for one, wanted in zip(answers, (narrow[0], narrow[2], whole[1], whole[2]), strict=True):
        torch.testing.assert_close(one.output, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast(x), whole[2], rtol=1e-4, atol=1e-5)
    assert len(list(fast.anytime(x, deadline_ms=0.0))) == 1


def test_a_deadline_picks_the_width() -> None:
    net = slim()
    front = offramp.search_front(recorded(net), setting="budgeted", minimise="macs")
    assert any(name.endswith("@0.5") for plan in front for name in plan.exits)
    ends = (("one@0.5",), ("final@0.5",), ())
    fast = net.deploy([Plan(exits=one, policy=Thresholds(thresholds=(0.0,) * len(one)), task="classify",
                            setting="budgeted", predicted={"macs": k, "quality": k / 2}) for k, one in enumerate(ends)])
    x = images(1)
    fast.calibrate(x)
    torch.testing.assert_close(fast(x), net.narrow(1.0)(x)[-1], rtol=1e-4, atol=1e-5)
    for k, place in enumerate((0, 2)):
        torch.testing.assert_close(fast.options[k](x), net.narrow(0.5)(x)[place], rtol=1e-4, atol=1e-5)
    fast(x, deadline_ms=1e-6)
    assert sum(fast.picked) == 2 and fast.deadlines.missed == 1


def test_schedulers_learn_from_widths_too() -> None:
    net = slim()
    table = recorded(net, 128)
    plan = offramp.schedule(table, offramp.policies.Swept(), budget="0.9x", against="backbone")
    done, fast = replay(table, plan), net.deploy(plan)
    fast(images(128))
    assert torch.equal(fast.last_exits, done.exit_index)


def test_plans_of_other_widths_are_refused() -> None:
    net = slim()
    plan = Plan(exits=("one@0.25",), policy=Thresholds(thresholds=(0.5,)), task="classify")
    with pytest.raises(PlanError, match="one@0.25"):
        net.deploy(plan)
    with pytest.raises(PlanError, match="not in order of depth"):
        net.deploy(replace(plan, exits=("one", "one@0.5"), policy=Thresholds(thresholds=(0.5, 0.5))))
    with pytest.raises(PlanError, match="columns of one width"):
        offramp.search(recorded(net), max_drop=0.5, tolerance="exact")


@pytest.mark.parametrize("exits", [("one",), None])
def test_a_narrow_copy_made_in_inference_mode_can_be_trained(exits: Any) -> None:
    net = slim(exits=exits)
    with torch.inference_mode():
        made = net.narrow(0.5)
    said = made(images(2))
    torch.stack([said] if exits is None else said).square().sum().backward()
    assert all(p.grad is not None for p in made.parameters())

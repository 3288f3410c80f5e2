"""Placement: the largest part that fits, the best grouping of all, and heads that count."""

import itertools
from typing import Any

import pytest
import timm
import torch
import torchvision

import offramp
from choose.synthetic import classify
from offramp.cost.macs import count
from offramp.cost.memory import param_bytes
from offramp.devices import place
from offramp.errors import OfframpError, PlanError
from runtime.nets import block, classifier, images


def test_on_a_real_network_each_part_fits_and_the_next_does_not() -> None:
    torch.manual_seed(0)
    sites = offramp.sites(torchvision.models.resnet18(weights=None), torch.randn(1, 3, 32, 32))
    found = place(sites, {"phone": 3e6, "watch": 7e5, "hub": 12e6})
    for group in found.groups:
        at = [site.name for site in sites].index(group.exit)
        assert group.cost == sites[at].param_bytes_before <= group.capacity < sites[at + 1].param_bytes_before
    assert [group.devices for group in found.groups] == [("watch",), ("phone",), ("hub",)]
    net = offramp.attach(torchvision.models.resnet18(weights=None), torch.randn(1, 3, 32, 32), exits=found.exits)
    assert [site.name for site in net.sites] == list(found.exits), "what was placed can be built"
    assert found.of("phone").exit == found.exits[1] and "phone" in str(found)


@pytest.mark.parametrize("unit", ["param_bytes", "macs"])
def test_heads_count_where_there_are_some(unit: Any) -> None:
    net = classifier()
    modules = [net.backbone.one, net.head("one")]
    state = net.begin(images(1))
    cost = {"param_bytes": float(param_bytes(*modules)),
            "macs": float(3 * 8 * 9 * 144 + count(net.head("one"), *net.stages[0](state).tensors).total)}[unit]
    exact = place(net, [cost, 1e12], unit=unit)
    assert [(group.exit, group.devices) for group in exact.groups] == [("one", ("device 0",)), ("final", ("device 1",))]
    assert exact.groups[0].cost == cost
    with pytest.raises(PlanError, match=f"smallest part, {cost:g}"):
        place(net, [cost - 1], unit=unit)
    part = net.part(upto=exact.of("device 0").exit)
    assert unit != "param_bytes" or sum(t.nbytes for t in part.state_dict().values()) == cost


def test_measured_units() -> None:
    net = classifier().train()
    clock = place(net, {"fast": 1e9}, unit="latency_ms")
    assert clock.groups[0].exit == "final" and 0 < clock.groups[0].cost < 1e5 and net.training
    with pytest.raises(PlanError, match="latency_ms"):
        place(net, [1e-9], unit="latency_ms")
    peak = place(net, [10**9], unit="peak_bytes").groups[0].cost
    assert peak >= (3 * 144 + 8 * 144) * 4, "the input and the first layer's output are alive together"


def test_a_table_has_all_costs() -> None:
    table = classify()
    assert place(table, [290, 800, 10**6], unit="macs").exits == ("block0", "block2")
    assert place(table, [5.6, 8.1, 20], unit="latency_ms").exits == ("block1", "block2"), "5 + 0.5 and 7.5 + 0.5 ms"


def test_of_several_heads_the_dearest_that_fits() -> None:
    small, wide = offramp.HeadSpec(), offramp.HeadSpec(convs=((4, 3, 1),))
    net = offramp.attach(torch.nn.Sequential(block(3, 8), block(8, 16), torch.nn.AdaptiveAvgPool2d(1),
                                             torch.nn.Flatten(), torch.nn.Linear(16, 5)), images(2), exits=["0"],
                         heads={"0": {"wide": wide, "small": small}})
    bytes_ = {name: param_bytes(net.backbone[0], net.head(f"0/{name}")) for name in ("small", "wide")}
    assert bytes_["small"] < bytes_["wide"]
    for name, capacity in bytes_.items():
        assert place(net, [capacity]).exits == (f"0/{name}",)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, None])
def test_no_grouping_of_neighbours_runs_more(groups: int | None) -> None:
    sites = offramp.sites(timm.create_model("resnet10t", num_classes=3), torch.randn(1, 3, 32, 32))
    draw = torch.Generator().manual_seed(groups or 0)
    least, whole = sites[0].macs_before, sites[-1].macs_before
    capacities = [least + float(one) * whole for one in torch.rand(7, generator=draw)]
    found = place(sites, capacities, unit="macs", groups=groups)
    assert len(found.groups) <= (groups or 7) and sorted(sum((g.devices for g in found.groups), ())) == [
        f"device {i}" for i in range(7)]

    def runs(members: Any) -> float:
        return len(members) * max(site.macs_before for site in sites if site.macs_before <= min(members))

    ranked = sorted(capacities)
    best = max(sum(runs(ranked[a:b]) for a, b in zip((0, *cuts), (*cuts, 7), strict=True))
               for k in range(groups or 7) for cuts in itertools.combinations(range(1, 7), k))
    assert sum(group.cost * len(group.devices) for group in found.groups) == best
    for group in found.groups:
        assert group.capacity == min(capacities[int(name.split()[1])] for name in group.devices) >= group.cost


def test_what_is_asked_amiss() -> None:
    sites = offramp.sites(torch.nn.Sequential(block(3, 4), block(4, 8)), images(2))
    for wrong, match in ((lambda: place(sites, [1e9], unit="latency_ms"), "know no latency_ms"),
                         (lambda: place(sites, []), "0 and None"), (lambda: place(sites, [1e9], groups=0), "1 and 0"),
                         (lambda: place(sites, [1e9]).of("x"), "device 0"), (lambda: place([], [1.0]), "none")):
        with pytest.raises(OfframpError, match=match):
            wrong()

"""Every animal of the zoo can be cut, and what a cut promises holds: the same bits, and the same rows.

OFFRAMP_ALL_SITES=1 drops rows at every shrinkable site, not only at some.
"""

import copy
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from offramp.graph import Sites, State, begin, place, sites, split
from zoo import LIBRARY, ZOO, Animal

ALL_SITES = os.environ.get("OFFRAMP_ALL_SITES") == "1"


@dataclass
class Caught:
    animal: Animal
    model: nn.Module
    inputs: Any
    before: dict[str, Any]
    sites: Sites
    seconds: float


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "training": [m.training for m in model.modules()],
        "attributes": [{k: id(v) for k, v in vars(m).items()} for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "contents": [{k: list(v) for k, v in vars(m).items() if isinstance(v, dict)} for m in model.modules()],
        "grad": [p.requires_grad for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def call(fn: Any, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return fn(**inputs)
    return fn(*inputs) if isinstance(inputs, tuple) else fn(inputs)


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def chained(caught: Caught, names: list[str], model: nn.Module) -> Any:
    assert caught.sites.traced.model is model
    stages = split(caught.sites.traced, names)
    torch.manual_seed(7)  # after split(), which leaves the random state alone but may be asked for it by nobody
    state: Any = call(lambda *a, **k: begin(caught.sites.traced, *a, **k), caught.inputs)
    for stage in stages:
        state = stage(state)
    return state


@pytest.fixture(scope="module", params=ZOO, ids=str)
def caught(request: pytest.FixtureRequest) -> Iterator[Caught]:
    animal = request.param
    model, inputs = animal.model(), animal.inputs()
    before = snapshot(model)
    start = time.process_time()
    found = sites(model, inputs)
    yield Caught(animal, model, inputs, before, found, time.process_time() - start)


def test_guest_left_as_found(caught: Caught) -> None:
    model, before = caught.model, caught.before
    split(caught.sites.traced, [caught.sites[0].name])
    after = snapshot(model)
    assert list(after["state"]) == list(before["state"])
    assert all(torch.equal(after["state"][k], before["state"][k]) for k in before["state"])
    for aspect in ("training", "attributes", "hooks", "contents", "grad"):
        assert after[aspect] == before[aspect], aspect


def test_sites(caught: Caught) -> None:
    found = caught.sites
    assert caught.seconds <= 5
    assert len(found) >= 3
    assert len({site.name for site in found}) == len(found)
    whole = found[0].macs_before + found[0].macs_after
    assert all(site.macs_before + site.macs_after == whole for site in found)
    assert [site.macs_before for site in found] == sorted(site.macs_before for site in found)
    assert [s.param_bytes_before for s in found] == sorted(s.param_bytes_before for s in found)
    assert all(bool(site.why_not) != site.shrinkable for site in found)
    assert all(":" in site.why_not for site in found if not site.shrinkable), "a reason names file and line"
    for site in found:
        caught.model.get_submodule(site.name.split("#")[0])
    assert len(str(found).splitlines()) >= len(found) + 1


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_chained_stages_are_the_network(caught: Caught, mode: str) -> None:
    if mode == "train" and not caught.animal.trains:
        pytest.skip("this network cannot train on inputs so small")
    model = caught.model.train(mode == "train")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        twin = copy.deepcopy(model)
        names = [site.name for site in place(caught.sites, 3)]
        with torch.no_grad():
            said = chained(caught, names, model)
            torch.manual_seed(7)
            expected = call(twin, caught.inputs)
        assert type(said) is type(expected)
        assert pytree.tree_structure(said) == pytree.tree_structure(expected)
        for ours, theirs in zip(tensors(said), tensors(expected), strict=True):
            assert torch.equal(ours, theirs)
        for key, value in model.state_dict().items():
            assert torch.equal(value, twin.state_dict()[key]), key
    finally:
        model.eval()
        for key, value in model.state_dict().items():
            value.copy_(state[key])


def test_dropped_rows_change_no_other(caught: Caught) -> None:
    able = [site for site in caught.sites if site.shrinkable]
    if not ALL_SITES and len(able) > 3:
        able = [able[0], able[len(able) // 2], able[-1]]
    keep = torch.tensor([3, 1])
    with torch.no_grad():
        whole = tensors(call(caught.model, caught.inputs))
        for site in able:
            first, second = split(caught.sites.traced, [site.name])
            state: State = first(call(lambda *a, **k: begin(caught.sites.traced, *a, **k), caught.inputs))
            assert tuple(tuple(t.shape) for t in state.tensors) == tuple(live.shape for live in site.live)
            for all_rows, rows in zip(whole, tensors(second(state.select(keep))), strict=True):
                if all_rows.shape[:1] == (4,):
                    all_rows = all_rows[keep]
                torch.testing.assert_close(rows, all_rows, rtol=1e-4, atol=1e-5 * float(all_rows.abs().max() + 1))
                if rows.ndim > 1 and rows.is_floating_point():
                    assert (rows.argmax(1) == all_rows.argmax(1)).float().mean() > 0.999, site.name


def test_the_zoo_is_large() -> None:
    assert len(LIBRARY) >= 40 and len(ZOO) - len(LIBRARY) >= 8

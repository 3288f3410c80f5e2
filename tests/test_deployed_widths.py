"""Deployed networks of several widths as files: live is loaded, and only what runs is kept."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import offramp
from offramp.errors import FileFormatError, OfframpError
from offramp.nn.slim import Slimmable
from offramp.table.files import write_tensors
from runtime.nets import DenseGuest, images, stir_
from test_widths import EXITS, Wide, slim

torch.set_num_threads(1)


def a_plan(exits: tuple[str, ...], task: str = "classify", **more: Any) -> offramp.Plan:
    policy = offramp.Thresholds(thresholds=(0.24,) * len(exits))
    return offramp.Plan(exits=exits, policy=policy, task=task, **more)  # type: ignore[arg-type]


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    return torch.equal(ours, theirs)


@pytest.mark.parametrize("how", [{}, {"fold": True}, {"dtype": "bf16", "channels_last": True}], ids=str)
@pytest.mark.parametrize("exits", EXITS, ids=str)
def test_live_is_loaded_bit_for_bit(exits: tuple[str, ...], how: dict[str, Any], tmp_path: Path) -> None:
    net, x = slim("dict"), images(24)
    table = offramp.record(net, [x], latency=False)
    assert table.logits is not None
    sure = [table.logits[:, table.index(name)].softmax(-1).amax(-1) for name in exits]
    policy = offramp.Thresholds(thresholds=tuple(float(one.quantile(0.6)) for one in sure))
    fast = net.deploy(replace(a_plan(exits), policy=policy), **how)
    offramp.save_deployed(fast, tmp_path)
    back = offramp.load_deployed(lambda: Wide("dict"), tmp_path)
    assert same(back(x), fast(x)) and back.last_exits.tolist() == fast.last_exits.tolist()
    assert len(set(back.last_exits.tolist())) > 1 and back.plan == fast.plan and back.build == fast.build
    assert all(same(a.output, b.output) for a, b in zip(back.anytime(x), fast.anytime(x), strict=True))


@pytest.mark.parametrize("end", ["final@0.5", "one@0.5", "two"])
def test_a_budgeted_file_holds_that_width_alone(end: str, tmp_path: Path) -> None:
    net, x = slim(), images(5)
    fast = net.deploy(a_plan((end,), setting="budgeted"))
    page = offramp.save_deployed(fast, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    kept = safetensors.torch.load_file(file)
    column, _, width = end.partition("@")
    made: Any = net.narrow(float(width or 1))
    run = [made.backbone] if column == "final" else [made.backbone.one, made.head(column)]
    run += [made.backbone.two] if column == "two" else []
    assert sum(t.nbytes for t in kept.values()) == sum(t.nbytes for part in run for t in part.state_dict().values())
    assert {name.split("/")[0] for name in kept} == {width or "1"} and json.loads(page.read_text())["version"] == 2
    assert torch.equal(offramp.load_deployed(Wide, tmp_path)(x), fast(x))


def test_dense_ends_keep_the_grid_of_their_edges(tmp_path: Path) -> None:
    class Dense(DenseGuest):
        def __init__(self) -> None:
            super().__init__()
            self.one[0], self.one[1] = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
            self.two[0] = nn.Conv2d(16, 16, 3, 1, 1, bias=False)

    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    net = offramp.slim_(offramp.attach(Dense(), x, exits=["one"]), (0.5, 1.0), example_inputs=x)
    stir_(net)
    policy = offramp.Thresholds(confidence="top_edges", thresholds=(0.6,), pixel_thresholds=(0.25,))
    plan = offramp.Plan(exits=("final@0.5",), policy=policy, task="dense")
    fast = net.deploy(plan)
    assert fast.parts[0].stride == 2, "of the deepest exit, which the plan does not name"
    offramp.save_deployed(fast, tmp_path)
    back = offramp.load_deployed(Dense, tmp_path)
    rows = images(12, 16)
    assert same(back(rows), fast(rows)) and back.last_exits.tolist() == fast.last_exits.tolist()
    assert back.parts == fast.parts


def test_a_network_slimmed_without_exits(tmp_path: Path) -> None:
    net, x = slim(exits=None), images(7)
    assert isinstance(net, Slimmable)
    fast = net.deploy(a_plan(("final@0.5",)))
    offramp.save_deployed(fast, tmp_path)
    back = offramp.load_deployed(Wide, tmp_path)
    assert torch.equal(back(x), fast(x)) and back.last_exits.tolist() == fast.last_exits.tolist()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    offramp.save_deployed(slim().deploy(a_plan(("one@0.5", "two"))), tmp_path)
    page = json.loads((tmp_path / "deployed.json").read_text())
    (file,) = tmp_path.glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)

    class Bare(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.three[1] = nn.BatchNorm2d(32, affine=False)

    def refused(match: str, make: Any = Wide, **changes: Any) -> None:
        write_tensors(tmp_path / "x" / "deployed.json", {**page, **changes}, tensors)
        with pytest.raises(OfframpError, match=match):
            offramp.load_deployed(make, tmp_path / "x")

    refused("three.1", Bare)
    refused("whole deployed.json", widths=[{"width": 0.5}])
    first, second = page["widths"]
    evil = {**first, "sizes": {**first["sizes"], "backbone": {"one.0": {"attributes": {"forward": 3}, "tensors": {
        "weight": [8, 3, 3, 3]}}}}}
    refused("forward", widths=[evil, second])
    refused("0.5/backbone.one.0.weight", widths=[{**first, "sizes": second["sizes"]}, second])
    refused("upgrade", version=4)
    with pytest.raises(FileFormatError):
        offramp.load_deployed(Bare, tmp_path)

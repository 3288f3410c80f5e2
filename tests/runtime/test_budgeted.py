"""Budgeted: one exit's answer as a static network, and nothing of what lies deeper."""

import gc
import shutil
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from offramp.errors import OfframpError, PlanError
from offramp.runtime.bench import macs_to_exits
from runtime.nets import Always, block, classifier, images, plan, segmenter


class Refuses:
    """Nobody asks a policy where nothing is decided."""

    def decide(self, exit_index: int, evidence: Any) -> Any:
        raise AssertionError("asked")


def budgeted(*exits: str, **more: Any) -> Any:
    return plan(Refuses(), exits, setting="budgeted", **more)


@pytest.mark.parametrize(("exit_name", "column"), [("one", 0), ("two", 1)])
@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_it_says_what_that_exit_says_bit_for_bit_in_the_networks_form(exit_name: str, column: int, form: str) -> None:
    net, x = classifier(form), images(5)
    with torch.no_grad():
        wanted = net.eval()(x)[column]
    fast = net.deploy(budgeted(exit_name))
    out = fast(x)
    assert type(out) is type(net.backbone(x))
    leaves = [out] if form == "tensor" else list(out) if form == "tuple" else list(out.values())
    assert all(torch.equal(leaf, wanted) for leaf in leaves)
    assert fast.last_exits.tolist() == [0] * 5
    assert [(a.exit_index, a.rows.tolist()) for a in fast.stream(x)] == [(0, list(range(5)))]
    assert fast(images(0)) is not None


def test_without_an_exit_it_is_the_untouched_network() -> None:
    net, x = classifier(), images(3)
    assert torch.equal(net.deploy(budgeted())(x), net.backbone.eval()(x))


@pytest.mark.parametrize("size", [16, 24])
def test_dense_and_other_sizes_than_the_example(size: int) -> None:
    net, x = segmenter(), images(2, size)
    with torch.no_grad():
        wanted = net.eval()(x)[0]
    assert torch.equal(net.deploy(budgeted("one", task="dense"))(x)["out"], wanted)


def test_deeper_weights_are_in_no_list_and_in_no_memory() -> None:
    net, x = classifier(), images(4)
    fast = net.deploy(budgeted("one"))
    kept = {p.data_ptr() for p in fast.parameters()}
    assert kept == {p.data_ptr() for p in (*net.backbone.one.parameters(), *net.head("one").parameters())}
    assert not [n for n in fast.state_dict() if n.startswith(("body.0.two.", "body.0.three.", "body.0.last."))]
    deeper = [weakref.ref(t) for part in (net.backbone.two, net.backbone.three, net.backbone.last, net.head("two"))
              for t in (*part.parameters(), *part.buffers())]
    alive = weakref.ref(net.backbone.one[0].weight)
    before = fast(x)
    del net
    gc.collect()
    assert [ref for ref in deeper if ref() is not None] == [] and alive() is not None
    assert torch.equal(fast(x), before)
    assert fast(images(4, 20)).shape == (4, 5), "inputs of a new kind are traced, which runs the network to its end"
    held = sum(t.untyped_storage().nbytes() for m in fast.modules() for t in vars(m).values() if torch.is_tensor(t))
    assert held < 500, "a zero for each tensor that is gone"


def test_it_moves_and_casts_as_a_module_does() -> None:
    fast = classifier().deploy(budgeted("one"))
    said = fast(images(3))
    double = fast.double()(images(3, 12).double())
    assert double.dtype == torch.float64 and torch.allclose(double.float(), said, atol=1e-5)
    assert fast(images(3, 20).double()).dtype == torch.float64


@pytest.mark.parametrize(("how", "near"), [({"dtype": "bf16"}, 0.1), ({"fold": True}, 1e-5)])
def test_other_forms_say_the_same_to_rounding(how: dict[str, Any], near: float) -> None:
    net, x = classifier(), images(6)
    fast = net.deploy(budgeted("two"), **how)
    with torch.no_grad():
        wanted = net.eval()(x)[1]
    assert fast(x).dtype == wanted.dtype and torch.allclose(fast(x), wanted, atol=near)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled() -> None:
    net, x = classifier(), images(6)
    with torch.no_grad():
        wanted = net.eval()(x)[0]
    assert torch.allclose(net.deploy(budgeted("one"), engine="compile")(x), wanted, atol=1e-5)


def test_macs_are_those_to_the_exit() -> None:
    net = classifier()
    assert macs_to_exits(net.deploy(budgeted("one")), images(1)) == (3 * 8 * 9 * 144 + 8 * 5,)


def test_a_weight_that_a_deeper_layer_shares_stays() -> None:
    import offramp

    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    guest = nn.Sequential(block(3, 4), shared, nn.ReLU(), block(4, 8), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.AvgPool2d(12),
                          nn.Flatten(), nn.Linear(4, 5))
    guest[4].bias = shared.bias
    net = offramp.attach(guest, images(2), exits=["2"], heads=offramp.HeadSpec())
    with torch.no_grad():
        wanted = net.eval()(images(3))[0]
    fast = net.deploy(budgeted("2"))
    assert torch.equal(fast(images(3)), wanted) and "body.0.4.bias" in fast.state_dict()


def test_a_way_through_the_network_that_needs_what_is_gone_is_refused() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.last = block(3, 4), block(4, 4), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] > 16:
                x = x * self.last.bias[0]
            return self.last(self.two(self.one(x)).mean((2, 3)))

    import offramp

    net = offramp.attach(Fork(), images(2), exits=["one"], heads=offramp.HeadSpec())
    fast = net.deploy(budgeted("one"))
    fast(images(2, 14))
    with pytest.raises(OfframpError, match="weights beyond the exit"):
        fast(images(2, 20))


def test_two_exits_are_no_budget() -> None:
    with pytest.raises(PlanError, match="ends at one"):
        classifier().deploy(plan(Always(), setting="budgeted"))

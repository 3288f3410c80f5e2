"""bench: two sides under one timer, and the arithmetic of what arrives."""

import time
from typing import Any

import pytest
import torch
from torch import nn

from offramp.errors import OfframpError
from offramp.runtime._legs import Leg
from offramp.runtime.bench import bench, dense_like, macs_to_exits
from runtime.nets import NEVER, ByLogit, Guest, classifier, images, plan

SOME = ByLogit(0, 1)


@pytest.mark.parametrize("batch", [1, 4])
def test_shares_and_macs_are_those_of_the_rows(batch: int) -> None:
    net, x = classifier(), images(12)
    fast = net.deploy(plan(SOME))
    small = Guest()
    done = bench(fast, net, x, small=small, batch=batch, repeats=3)
    fast(x)
    counts = torch.bincount(fast.last_exits, minlength=3).double() / 12
    assert done.exit_shares == pytest.approx(counts.tolist())
    to_exit = macs_to_exits(fast, x)
    one, two, three, last = 3 * 8 * 9 * 144, 8 * 16 * 9 * 36, 16 * 16 * 9 * 36, 16 * 5
    assert to_exit == (one + 8 * 5, one + 8 * 5 + two + 16 * 5, one + two + three + 8 * 5 + 16 * 5 + last)
    assert done.adaptive.macs == pytest.approx(sum(m * c for m, c in zip(to_exit, counts.tolist(), strict=True)))
    assert done.dense.macs == one + two + three + last and done.small is not None
    assert done.macs_ratio == pytest.approx(done.dense.macs / done.adaptive.macs)
    assert done.share == pytest.approx(done.time_ratio / done.macs_ratio)
    assert done.adaptive.rows_per_s == pytest.approx(1e3 / done.adaptive.row_ms)
    assert done.to_json()["share"] == done.share and "of the saving arrives" in str(done)


def test_the_dense_side_is_the_untouched_network_and_shares_its_form() -> None:
    net, x = classifier(), images(6)
    fast = net.deploy(plan(NEVER))
    with torch.no_grad():
        wanted = net.backbone.eval()(x)
    assert torch.equal(dense_like(fast, net, x)(x), wanted)
    narrow = dense_like(net.deploy(plan(NEVER), dtype="bf16"), net, x)
    assert torch.allclose(narrow(x), wanted, atol=0.1) and narrow(x).dtype == torch.float32
    assert next(narrow.parameters()).dtype == torch.bfloat16
    assert not [m for m in narrow.modules() if isinstance(m, nn.BatchNorm2d)], "folded, as the deployed one is"
    assert next(net.parameters()).dtype == torch.float32


@pytest.mark.parametrize("batch", [1, 3])
def test_a_budgeted_network_costs_what_its_exit_costs(batch: int) -> None:
    net, x = classifier(), images(6)
    done = bench(net.deploy(plan(NEVER, ("one",), setting="budgeted")), net, x, batch=batch, repeats=3)
    to_exit = 3 * 8 * 9 * 144 + 8 * 5
    assert done.adaptive.macs == to_exit and done.to_exit_macs == (to_exit,) and done.exit_shares == (1.0, 0.0)
    assert done.macs_ratio == pytest.approx(done.dense.macs / to_exit) and done.to_exit_ms == ()
    assert "budgeted" in str(done)


@pytest.mark.parametrize("batch", [1, 3])
def test_an_anytime_network_pays_all_heads_and_says_when_each_exit_answers(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = classifier(), images(6)
    fast = net.deploy(plan(NEVER, setting="anytime"))
    advance = Leg._advance

    def slow(leg: Leg, state: Any, *stop: Any) -> Any:
        time.sleep(0.004)
        return advance(leg, state, *stop)

    monkeypatch.setattr(Leg, "_advance", slow)
    done = bench(fast, net, x, batch=batch, repeats=3)
    one, two, three, last = 3 * 8 * 9 * 144, 8 * 16 * 9 * 36, 16 * 16 * 9 * 36, 16 * 5
    assert done.adaptive.macs == one + 8 * 5 + two + 16 * 5 + three + last == done.to_exit_macs[-1]
    first, second, end = done.to_exit_ms
    assert 4 <= first < second - 3 < end - 6 and done.adaptive.p50_ms > second, "heads run, and each leg takes 4 ms"
    assert "answers after" in str(done) and done.to_json()["to_exit_ms"] == done.to_exit_ms


def test_fewer_rows_than_a_batch_are_refused() -> None:
    net = classifier()
    with pytest.raises(OfframpError, match="one batch of 8"):
        bench(net.deploy(plan(NEVER)), net, images(3), batch=8)

"""Widths are switched at once, by thread and task, and nothing that is kept of another moment is ever used."""

import asyncio
import copy
import threading
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from nn.slim_small import X, slimmed
from offramp.errors import WidthError


def test_switching() -> None:
    net = slimmed()
    wanted = {width: net.narrow(width)(X) for width in net.widths}
    with pytest.raises(AssertionError):
        assert torch.allclose(wanted[0.25], wanted[0.5], atol=1e-3)

    def says(width: float) -> bool:
        return torch.allclose(net(X), wanted[width], atol=1e-6)

    net.width = 0.5
    assert net.width == 0.5 and says(0.5)
    with net.at(0.25) as inner:
        assert inner is net and says(0.25)
        with net.at(1.0):
            net.width = 0.25
            assert says(1.0) and net.width == 1.0
        assert says(0.25)
        with pytest.raises(RuntimeError), net.at(0.5):
            raise RuntimeError
        assert says(0.25)
    assert says(0.25) and net.width == 0.25
    for width in (0.3, 2, "0.5", float("nan")):
        with pytest.raises(WidthError, match=r"one of the widths \[0.25, 0.5, 1.0\]"):
            net.width = width  # type: ignore[assignment]
        with pytest.raises(WidthError, match="add_width_"):
            net.narrow(width)  # type: ignore[arg-type]
        with pytest.raises(WidthError, match="add_width_"), net.at(width):  # type: ignore[arg-type]
            pass
    assert net.width == 0.25


def test_threads_do_not_disturb_each_other() -> None:
    net = slimmed()
    wanted = {width: net.narrow(width)(X) for width in net.widths}
    barrier = threading.Barrier(3)
    said: dict[Any, Tensor] = {}
    def meet(*_: Any) -> None:  # all three stand in the middle of the network at once, twice
        barrier.wait(20)

    for layer in (net.backbone.pw, net.backbone.mix):
        layer.register_forward_hook(meet)

    def at(width: float) -> None:
        with net.at(width):
            said[width] = net(X).detach()

    def default() -> None:
        said["default"] = net(X).detach()

    threads = [threading.Thread(target=at, args=(0.25,)), threading.Thread(target=at, args=(0.5,)),
               threading.Thread(target=default)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(said[width], wanted[width], atol=1e-6) for width in (0.25, 0.5))
    assert torch.equal(said["default"], wanted[1.0])


def test_a_switch_in_the_middle_of_a_call_is_for_the_next_call() -> None:
    net = slimmed()
    wanted = {width: net.narrow(width)(X) for width in net.widths}

    def switch(*_: Any) -> None:
        thread = threading.Thread(target=setattr, args=(net, "width", 0.25))
        thread.start()
        thread.join()

    net.backbone.pw.register_forward_hook(switch)
    assert torch.equal(net(X), wanted[1.0])
    assert torch.allclose(net(X), wanted[0.25], atol=1e-6)


def test_tasks_have_widths_of_their_own() -> None:
    net = slimmed()
    wanted = {width: net.narrow(width)(X) for width in net.widths}

    async def say(width: float) -> None:
        with net.at(width):
            for _ in range(3):
                await asyncio.sleep(0)
                assert net.width == width and torch.allclose(net(X), wanted[width], atol=1e-6)

    async def main() -> None:
        await asyncio.gather(*map(say, net.widths))

    asyncio.run(main())
    assert net.width == 1.0


def test_copies_and_neighbours_have_gears_of_their_own() -> None:
    net, other = slimmed(), slimmed()
    net.width = 0.5
    with torch.no_grad():
        net(X)
    twin = copy.deepcopy(net)
    net.width = 0.25
    assert twin.width == 0.5 and other.width == 1.0
    wanted = {width: net.narrow(width)(X) for width in net.widths}
    assert torch.allclose(twin(X), wanted[0.5], atol=1e-6) and torch.allclose(net(X), wanted[0.25], atol=1e-6)
    assert torch.equal(other(X), wanted[1.0])
    with twin.at(1.0), torch.no_grad():
        assert torch.equal(twin(X), wanted[1.0]) and torch.allclose(net(X), wanted[0.25], atol=1e-6)
    with torch.no_grad():
        twin.backbone.stem.weight.zero_()
        assert not torch.allclose(twin(X), wanted[0.5], atol=1e-3)
        assert torch.allclose(net(X), wanted[0.25], atol=1e-6)


def test_what_is_kept_of_weights_is_never_stale() -> None:
    net = slimmed()
    net.width = 0.5
    conv = net.backbone.mix  # reads a concatenation: its slice is a copy

    def fresh() -> None:
        with torch.no_grad():
            said = net(X)
        assert torch.allclose(said, net.narrow(0.5)(X), atol=1e-6)

    fresh()
    with torch.no_grad():
        conv.weight.mul_(2)
    fresh()
    conv.weight.data = conv.weight.data * 2
    fresh()
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))
    fresh()
    for _ in range(20):  # a new tensor soon gets an old one's address
        conv.weight = nn.Parameter(torch.randn(16, 48, 1, 1))
        fresh()
    net.load_state_dict({name: held + 1 for name, held in net.state_dict().items()})
    fresh()
    net.train()
    conv.weight.data.mul_(3)  # counted nowhere
    net.eval()
    fresh()
    net.double()
    with torch.no_grad():
        assert net(X.double()).dtype == torch.float64
    net.float()
    fresh()
    with torch.inference_mode():
        assert torch.allclose(net(X), net.narrow(0.5)(X), atol=1e-6)
    out = net(X)  # what was kept without gradients is no part of a graph
    out.sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.abs().sum() > 0


def test_layers_that_run_again_in_backward_run_at_the_same_width() -> None:
    net = slimmed()
    grads = []
    for again in (False, True):
        net.zero_grad()
        with net.at(0.5):
            said = torch.utils.checkpoint.checkpoint(net, X, use_reentrant=False) if again else net(X)
            said.square().sum().backward()
        grads.append(net.backbone.mix.weight.grad)
    assert torch.equal(*grads) and grads[0].abs().sum() > 0

"""What happens at a cut, on networks small enough to see through."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.cost.macs import count
from offramp.errors import CutError
from offramp.graph import State, begin, place, sites, split, trace


class Net(nn.Module):
    """Four blocks and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.between(block(x))
        return self.head(x)

    def between(self, x: Tensor) -> Tensor:
        return x


def run(traced: Any, names: list[str], *args: Any, **kwargs: Any) -> Any:
    state: Any = begin(traced, *args, **kwargs)
    for stage in split(traced, names):
        state = stage(state)
    return state


def conv_net() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
                         nn.Sequential(nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(inplace=True)),
                         nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))).eval()


@torch.no_grad()
def test_another_size_and_batch() -> None:
    model = conv_net()
    traced = trace(model, torch.randn(2, 3, 16, 16))
    for shape in ((5, 3, 20, 31), (1, 3, 16, 16)):
        x = torch.randn(shape)
        assert torch.equal(run(traced, ["1"], x), model(x))


def test_gradients_are_the_guests() -> None:
    model = conv_net().train()
    traced = trace(model, torch.randn(2, 3, 16, 16))
    x = torch.randn(4, 3, 16, 16)
    twin = copy.deepcopy(model)
    run(traced, ["0", "1"], x).square().sum().backward()
    twin(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_inference_mode_cast_and_autocast() -> None:
    model = conv_net()
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        traced = trace(model, x)
        assert torch.equal(run(traced, ["1"], x), model(x))
    model.double()
    assert torch.equal(run(traced, ["1"], x.double()), model(x.double()))
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(traced, ["1"], x), model(x))


def test_modules_swapped_later_are_seen() -> None:
    model = conv_net()
    x = torch.randn(2, 3, 16, 16)
    traced = trace(model, x)
    stages = split(traced, ["1"])
    model[0][0] = nn.Conv2d(3, 8, 3)
    assert torch.equal(stages[1](stages[0](begin(traced, x))), model(x))


@pytest.mark.parametrize("inference", [False, True])
def test_the_state_survives_a_stage_that_writes_into_it(inference: bool) -> None:
    class Writes(Net):
        def between(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    model = Writes().eval()
    with torch.inference_mode(inference):
        x = torch.randn(2, 8)
        traced = trace(model, x)
    first, second = split(traced, ["blocks.1"])
    with torch.inference_mode(inference), torch.no_grad():
        state = first(begin(traced, x))
        before = state.tensors[0].clone()
        said = second(state)
        assert torch.equal(state.tensors[0], before)
        assert torch.equal(second(state), said) and torch.equal(said, model(x))


def test_no_grad_in_forward_stays() -> None:
    class Partly(Net):
        def between(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                scale = x.abs().mean(1, keepdim=True) + 1
            return x / scale

    model = Partly().eval()  # as when it was traced: only the gradients differ
    x = torch.randn(3, 8)
    traced = trace(model, x)
    run(traced, ["blocks.1"], x).sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).sum().backward()
    for mine, theirs in zip(ours, model.parameters(), strict=True):
        assert theirs.grad is not None and torch.equal(mine, theirs.grad)
    assert torch.is_grad_enabled()


def test_a_cache_that_the_guest_drops_is_not_used_on() -> None:
    class Caches(Net):
        cached: Tensor | None = None

        def between(self, x: Tensor) -> Tensor:
            if self.cached is None:
                self.cached = self.head.weight.detach().sum(0)
            return x + self.cached

    model, x = Caches().eval(), torch.randn(3, 8)
    with torch.no_grad():
        model(x)
        traced = trace(model, x)
        assert torch.equal(run(traced, ["blocks.1"], x), model(x))
        model.head.weight.mul_(2)
        model.cached = None
        assert torch.equal(run(traced, ["blocks.1"], x), model(x))


def test_decisions_on_data_are_watched() -> None:
    class Decides(Net):
        def between(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() >= 0 else x * 3

    model = Decides().eval()
    for parameter in model.parameters():
        parameter.data.abs_()
    traced = trace(model, torch.rand(3, 8))
    stages = split(traced, ["blocks.1"])
    state = begin(traced, torch.rand(2, 8))
    with torch.no_grad():
        stages[0](state)
        model.blocks[0][1] = nn.Identity().eval()
        with pytest.raises(CutError, match=r"decides as when it was traced .*test_cutting.py:\d+"):
            stages[0](begin(traced, torch.rand(2, 8) - 9))


def test_items_stay_symbolic() -> None:
    class Normed(Net):
        def between(self, x: Tensor) -> Tensor:
            return x / (1 + self.head.weight.abs().max().item() + x.detach()[0, 0].item() ** 2)

    model, x = Normed().eval(), torch.randn(3, 8)
    traced = trace(model, torch.randn(3, 8))
    with torch.no_grad():
        assert torch.equal(run(traced, ["blocks.1"], x), model(x))


def test_a_batch_size_that_python_took_away() -> None:
    class Burnt(Net):
        def between(self, x: Tensor) -> Tensor:
            return torch.stack([x[i] * 1.5 for i in range(x.shape[0])])

    model = Burnt().eval()
    found = sites(model, torch.randn(4, 8))
    early = next(site for site in found if site.name == "blocks.1")
    assert not early.shrinkable and "burnt in" in early.why_not and "test_cutting.py:" in early.why_not
    with torch.no_grad():
        for rows in (1, 5):
            x = torch.randn(rows, 8)
            assert torch.equal(run(found.traced, ["blocks.1"], x), model(x))
        state = split(found.traced, ["blocks.1"])[0](begin(found.traced, torch.randn(4, 8)))
    with pytest.raises(CutError, match="burnt in"):
        state.select(torch.tensor([0]))


def test_an_int_that_follows_the_batch_is_named() -> None:
    class Counts(Net):
        def forward(self, x: Tensor) -> Tensor:
            many = x.shape[0] * 2
            for block in self.blocks:
                x = block(x)
            return self.head(x.reshape(many, -1).reshape(many // 2, -1))

    found = sites(Counts(), torch.randn(3, 8))
    assert all("mul" in site.why_not and "test_cutting.py:" in site.why_not for site in found if site.is_block)
    assert "[1]" in str(found)


def test_rows_that_hang_together_are_found() -> None:
    class Mixes(Net):
        def forward(self, x: Tensor) -> Tensor:
            for i, block in enumerate(self.blocks):
                x = block(x)
                if i == 2:
                    x = x - x.mean(0, keepdim=True)
            return self.head(x)

    found = {site.name: site for site in sites(Mixes(), torch.randn(4, 8))}
    assert "depend on the other rows" in found["blocks.0"].why_not and "test_cutting.py:" in found["blocks.0"].why_not


class Double(torch.autograd.Function):
    """Its backward lies, so that one can see whether it is called."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 77


def test_an_autograd_function_keeps_its_backward() -> None:
    class Custom(Net):
        def between(self, x: Tensor) -> Tensor:
            return Double.apply(x)

    model, x = Custom().eval(), torch.randn(2, 8)
    traced = trace(model, x)
    ours = torch.autograd.grad(run(traced, ["blocks.1"], x).sum(), list(model.parameters()))
    theirs = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ops_that_nobody_can_record() -> None:
    def scripted(x: Tensor) -> Tensor:
        return x * 2 + 1

    hidden = torch.jit.script(scripted)

    class Root(Net):
        def between(self, x: Tensor) -> Tensor:
            return hidden(x)

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return hidden(x)

    with pytest.raises(CutError, match=r"aten.*test_cutting.py:\d+.*submodule of its own"):
        sites(Root(), torch.randn(2, 8))
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), Inner()) for _ in range(4))).eval()
    x = torch.randn(3, 8)
    found = sites(model, x)
    with torch.no_grad():
        assert torch.equal(run(found.traced, ["1", "2"], x), model(x))


def test_the_guest_is_restored_when_it_fails() -> None:
    class Fails(Net):
        def between(self, x: Tensor) -> Tensor:
            self.blocks[0].eval()
            self.left = 1
            raise ValueError("no")

    model = Fails()
    original = nn.Module.__call__, nn.Module.__setattr__
    with pytest.raises(CutError, match="inputs on which Fails runs.*ValueError: no"):
        sites(model, torch.randn(2, 8))
    assert (nn.Module.__call__, nn.Module.__setattr__) == original
    assert all(module.training for module in model.modules()) and not hasattr(model, "left")
    assert all(p.requires_grad for p in model.parameters()) and torch.is_grad_enabled()


@pytest.mark.parametrize("inputs", [(), {}, "x", torch.tensor(1.0)])
def test_inputs_without_a_batch(inputs: Any) -> None:
    with pytest.raises(CutError, match="dimension 0 is the batch"):
        sites(Net(), inputs)


def test_nothing_to_cut() -> None:
    with pytest.raises(CutError, match="split its forward into submodules"):
        sites(nn.Linear(3, 3), torch.randn(2, 3))


def test_copies_are_whole() -> None:
    model, x = conv_net(), torch.randn(2, 3, 16, 16)
    stages = split(trace(model, x), ["0"])
    twin, copies = copy.deepcopy((model, stages))
    assert copies[0].traced is copies[1].traced and copies[0].traced.model is twin
    with torch.no_grad():
        twin[2][2].weight.zero_()
        state: State = copies[0](begin(copies[0].traced, x))
        assert torch.equal(copies[1](state), twin(x)) and not torch.equal(twin(x), model(x))


def test_selecting_rows() -> None:
    model, x = Net().eval(), torch.randn(5, 8)
    traced = trace(model, x)
    first, second = split(traced, ["blocks.1"])
    state = first(begin(traced, x))
    assert state.rows == 5
    mask = torch.tensor([True, False, True, False, False])
    with torch.no_grad():
        torch.testing.assert_close(second(state.select(mask)), model(x)[mask])
        assert second(state.select(torch.tensor([], dtype=torch.long))).shape == (0, 3)


def test_graph_modules_are_plain_and_the_guest_owns_all() -> None:
    model, x = conv_net(), torch.randn(2, 3, 16, 16)
    stage = split(trace(model, x), ["1"])[0]
    assert isinstance(stage.module(), torch.fx.GraphModule)
    held = {id(p) for p in model.parameters()}
    assert {id(p) for p in stage.module().parameters()} == held
    swapped = stage.compiled(lambda module: lambda *tensors: module(*(t + 0 for t in tensors)))
    traced = stage.traced
    with torch.no_grad():
        assert torch.equal(swapped(begin(traced, x)).tensors[0], stage(begin(traced, x)).tensors[0])


def test_dropout_draws_the_same_numbers() -> None:
    class Drops(Net):
        def between(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, self.training)

    model, x = Drops(), torch.randn(6, 8)
    traced = trace(model, x)
    stages = split(traced, ["blocks.1"])
    torch.manual_seed(3)
    ours = stages[1](stages[0](begin(traced, x)))
    torch.manual_seed(3)
    assert torch.equal(ours, model(x))
    model.eval()
    assert torch.equal(stages[1](stages[0](begin(traced, x))), model(x))


def test_within_a_detector() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=96)
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 64)]
    found = sites(model, images, within="backbone.body")
    body = model.get_submodule("backbone.body")
    assert found.traced.model is body and model.training and not body._forward_pre_hooks
    chosen = place(found, 3)
    assert all(site.shrinkable for site in chosen)
    body.eval()
    x = torch.rand(3, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = run(found.traced, [site.name for site in chosen], x), body(x)
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    with pytest.raises(CutError, match="the name of a submodule.*backbone.boddy"):
        sites(model, images, within="backbone.boddy")


def test_a_network_traced_on_its_way_is_counted_once() -> None:
    net = conv_net().eval()
    traced = trace(net, torch.rand(2, 3, 16, 16))
    unseen = torch.rand(2, 3, 24, 24)
    stage = split(traced, [])[0]
    assert count(lambda: stage(begin(traced, unseen))).total == count(net, unseen).total


def test_threads_that_meet_a_new_kind_of_call_trace_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.zeros(2, 3, 8, 8))
    real, inside, most = type(traced)._record, [], []

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        try:
            return real(self, *args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(type(traced), "_record", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: traced.program_for((torch.zeros(1, 3, 16, 16),), {}), range(4)))
    assert most == [1] and all(one is found[0] for one in found)

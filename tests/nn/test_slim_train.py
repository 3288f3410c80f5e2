"""Slimmable networks learn: gradients of every width meet in the shared weights, norms are each width's own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nn.slim_small import HALF, X, by_hand, half, slimmed, small
from offramp.errors import WidthError
from offramp.nn.slim import slim_

TARGET = torch.tensor([1, 4])
SHARED = [name for name in HALF if not name.startswith(("bn", "gn", "ln"))]


def loss_of(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, TARGET)


def no_dropout(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_a_width_are_those_of_the_network_cut_by_hand(training: bool) -> None:
    net = slimmed().train(training)
    no_dropout(net)
    apart = {name: held.requires_grad_(not name.endswith(("mean", "var"))) for name, held in half(small()).items()}
    loss_of(by_hand(apart, X, training)).backward()
    with net.at(0.5):
        loss_of(net(X)).backward()
    for name in SHARED:
        whole, small_one = net.backbone.get_parameter(name).grad, apart[name].grad
        assert whole is not None and small_one is not None and small_one.abs().sum() > 0
        assert torch.allclose(whole[HALF[name]], small_one, atol=1e-6), name
        dropped = torch.ones_like(whole)
        dropped[HALF[name]] = 0
        assert not whole[dropped.bool()].any(), f"{name}: what is dropped learns nothing"
    for norm in ("bn", "bn2", "gn", "ln"):
        own = net.backbone.get_submodule(f"{norm}.at_0:5")
        assert torch.allclose(own.weight.grad, apart[f"{norm}.weight"].grad, atol=1e-6)
        assert net.backbone.get_submodule(norm).weight.grad is None
        assert net.backbone.get_submodule(f"{norm}.at_0:25").weight.grad is None


def test_widths_add_up_in_one_parameter() -> None:
    net = slimmed().train()
    no_dropout(net)
    apart = []
    for width in net.widths:
        net.zero_grad()
        with net.at(width):
            loss_of(net(X)).backward()
        apart.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    assert all(one["backbone.mix.weight"].any() for one in apart)
    net.zero_grad()
    for width in net.widths:
        with net.at(width):
            loss_of(net(X)).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None
        assert torch.allclose(p.grad, sum(one.get(name, torch.zeros(())) for one in apart), atol=1e-6), name


def test_statistics_are_each_width_s_own() -> None:
    net = slimmed().train()
    before = {name: held.clone() for name, held in net.backbone.named_buffers()}
    with net.at(0.5):
        net(X)
    changed = {name for name, held in net.backbone.named_buffers() if not torch.equal(held, before[name])}
    assert changed == {f"{norm}.at_0:5.{name}" for norm in ("bn", "bn2")
                       for name in ("running_mean", "running_var", "num_batches_tracked")}
    net.eval()
    after = {name: held.clone() for name, held in net.backbone.named_buffers()}
    with net.at(0.5):
        net(X)
    assert all(torch.equal(held, after[name]) for name, held in net.backbone.named_buffers())


def test_an_optimiser_trains_all_widths_at_once() -> None:
    net = slimmed().train()
    no_dropout(net)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)

    def losses() -> list[float]:
        said = []
        for width in net.widths:
            with net.at(width), torch.no_grad():
                said.append(float(loss_of(net(X))))
        return said

    before = losses()
    for _ in range(15):
        optimiser.zero_grad()
        for width in net.widths:
            with net.at(width):
                loss_of(net(X)).backward()
        optimiser.step()
    assert all(now < 0.5 * then for now, then in zip(losses(), before, strict=True))


def test_recalibrated_statistics_are_the_mean_over_batches() -> None:
    net = slim_(small(), (0.5, 1.0), example_inputs=X)
    batches = [torch.randn(4, 3, 12, 12) for _ in range(3)]
    apart = half(small())
    # the first norm's input, by hand: what the batches have on average
    maps = [nn.functional.conv2d(x, apart["stem.weight"], stride=2, padding=1) for x in batches]
    with net.train().at(0.5):
        net(X)  # statistics that are to be forgotten
    net.backbone.bn2.eval()
    flags, state = [module.training for module in net.modules()], torch.get_rng_state()
    weights = {name: held.clone() for name, held in net.named_parameters()}
    kept = {name: held.clone() for name, held in net.backbone.bn.named_buffers(recurse=False)}
    assert net.recalibrate_((x, "a label") for x in batches) is net
    own = net.backbone.bn.get_submodule("at_0:5")
    assert torch.allclose(own.running_mean, torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0), atol=1e-6)
    assert torch.allclose(own.running_var, torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0), atol=1e-5)
    assert own.num_batches_tracked == 3 and net.backbone.bn.momentum == 0.1
    assert flags == [module.training for module in net.modules()] and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(held, weights[name]) for name, held in net.named_parameters())
    assert all(torch.equal(held, kept[name]) for name, held in net.backbone.bn.named_buffers(recurse=False))
    net.recalibrate_([{"x": x} for x in batches], widths=[1.0])
    assert not torch.allclose(net.backbone.bn.running_mean, kept["running_mean"])
    assert net.backbone.bn2.num_batches_tracked == 3


def test_a_failed_recalibration_changes_nothing() -> None:
    net = slimmed()
    before = {name: held.clone() for name, held in net.state_dict().items()}
    with pytest.raises(RuntimeError):
        net.recalibrate_([X, X[:, :2]])
    with pytest.raises(WidthError, match="at least one batch"):
        net.recalibrate_([])
    with pytest.raises(WidthError, match="pass \\[batch\\]"):
        net.recalibrate_(X)
    with pytest.raises(WidthError, match="one of the widths"):
        net.recalibrate_([X], widths=[0.3])
    assert all(torch.equal(held, before[name]) for name, held in net.state_dict().items())
    assert net.backbone.bn.momentum == 0.1 and not net.backbone.bn.training


def test_a_width_in_between_starts_from_the_next_wider_one() -> None:
    torch.manual_seed(0)
    net = slim_(nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 5, 1)).eval(),
                (0.25, 0.75, 1.0), example_inputs=X)
    wide: Any = net.backbone[1].get_submodule("at_0:75")
    with torch.no_grad():
        for held in (*wide.parameters(), wide.running_mean, wide.running_var):
            held.uniform_(0.5, 1)
    assert net.add_width_(0.6) is net and net.widths == (0.25, 0.6, 0.75, 1.0)
    own: Any = net.backbone[1].get_submodule("at_0:6")
    assert own.weight.shape == (40,) and torch.equal(own.weight, wide.weight[:40])  # 38.4, to a multiple of 8
    assert torch.equal(own.running_var, wide.running_var[:40]) and own.weight is not wide.weight
    narrow = net.narrow(0.6)
    assert narrow[0].out_channels == 40
    with net.at(0.6), torch.no_grad():
        assert torch.equal(net(X), narrow(X))
    net.recalibrate_([X], widths=[0.6])
    with net.at(0.6), torch.no_grad():
        assert not torch.allclose(net(X), narrow(X))
    for width, reason in ((0.6, "has not"), (0.0, "widths in"), (1.5, "widths in")):
        with pytest.raises(WidthError, match=reason):
            net.add_width_(width)
    assert net.widths == (0.25, 0.6, 0.75, 1.0)


def test_a_private_norm_behind_a_concatenation_takes_the_right_channels() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 32, 1), nn.Conv2d(3, 32, 1)
            self.bn, self.c = nn.BatchNorm2d(64), nn.Conv2d(64, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.bn(torch.cat([self.a(x), self.b(x)], 1)))

    model = Joined().eval()
    with torch.no_grad():
        model.bn.weight.copy_(torch.arange(64.0))
    net = slim_(model, (0.25, 0.75, 1.0), example_inputs=X)
    net.add_width_(0.5)
    own: Any = model.bn.get_submodule("at_0:5")
    assert own.weight.tolist() == [*range(16), *range(32, 48)]
    assert net.narrow(0.25).bn.weight.tolist() == [*range(8), *range(32, 40)]

"""slim_: the same weights at several widths, each the plain network that one would cut by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import offramp
from nn.slim_small import X, by_hand, half, slimmed, small
from offramp.cost.memory import param_bytes
from offramp.errors import WidthError
from offramp.nn.slim import slim_, slim_plan


def test_full_width_is_the_untouched_network_bit_for_bit() -> None:
    plain, net = small(), slimmed()
    assert torch.equal(net(X), plain(X)) and net.width == 1.0 and net.widths == (0.25, 0.5, 1.0)
    keys = list(net.backbone.state_dict())
    assert [key for key in keys if "at_" not in key] == list(plain.state_dict())
    assert "bn.at_0:25.running_var" in keys and "ln.at_0:5.weight" in keys and "stem.at_0:5.weight" not in keys
    assert all(isinstance(net.backbone.get_submodule(name), type(module)) for name, module in plain.named_modules())
    torch.manual_seed(0)
    wanted = plain.train()(X)
    torch.manual_seed(0)
    assert torch.equal(net.train()(X), wanted)
    assert torch.equal(net.backbone.bn.running_var, plain.bn.running_var)


def test_half_width_is_the_network_cut_by_hand() -> None:
    net = slimmed()
    wanted = by_hand(half(small()), X)
    with net.at(width=0.5):
        assert torch.allclose(net(X), wanted, atol=1e-6)
        with torch.no_grad():
            assert torch.allclose(net(X), wanted, atol=1e-6)
            assert torch.allclose(net(X), wanted, atol=1e-6), "from what was kept of the first call"
    narrow = net.narrow(0.5)
    assert torch.allclose(narrow(X), wanted, atol=1e-6)
    for name, held in half(small()).items():
        assert torch.equal(narrow.state_dict()[name], held) and narrow.state_dict()[name].is_contiguous(), name


def test_narrow_is_plain_and_small(tmp_path: Path) -> None:
    net, plain = slimmed(), small()
    for width in net.widths:
        narrow = net.narrow(width)
        with net.at(width), torch.no_grad():
            assert torch.equal(narrow(X), net(X))
        assert [type(m) for m in narrow.modules()] == [type(m) for m in plain.modules()]
        assert list(narrow.state_dict()) == list(plain.state_dict())
        assert not {id(p) for p in narrow.parameters()} & {id(p) for p in net.parameters()}
        assert not any("offramp" in name for module in narrow.modules() for name in vars(module))
        save_model(narrow, str(tmp_path / f"{width}.safetensors"))
        fresh = net.narrow(width).apply(lambda m: [nn.init.zeros_(p) for p in m.parameters()] and None)
        load_model(fresh, str(tmp_path / f"{width}.safetensors"))
        assert torch.equal(fresh(X), narrow(X))
    sizes = [(tmp_path / f"{width}.safetensors").stat().st_size for width in net.widths]
    assert sizes == sorted(set(sizes)) and torch.equal(net.narrow(1.0)(X), plain(X))
    assert param_bytes(net.narrow(0.5)) == sum(4 * held.numel() for held in half(plain).values()) + 2 * 8
    half_net = net.narrow(0.5)
    assert (half_net.dw.groups, half_net.gn.num_groups, half_net.gn.num_channels) == (8, 2, 16)
    assert (half_net.mix.in_channels, half_net.mix.out_channels, half_net.act.num_parameters) == (24, 8, 8)
    assert half_net.bn.num_features == 8 and half_net.ln.normalized_shape == (16,) and half_net.head.in_features == 16
    half_net.train()(X).sum().backward()  # it learns on its own
    assert half_net.stem.weight.grad is not None and net.backbone.stem.weight.grad is None


def _timm(name: str, *args: Any, **kwargs: Any) -> nn.Module:
    import timm.layers

    made: nn.Module = getattr(timm.layers, name)(*args, **kwargs)
    return made


KINDS: dict[str, Callable[[], nn.Module]] = {  # between 16 and 16 channels
    "depthwise": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16),
    "grouped": lambda: nn.Conv2d(16, 16, 3, padding="same", groups=2, bias=False),
    "circular": lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(16, 16, 2, 2),
    "transposed, depthwise": lambda: nn.ConvTranspose2d(16, 16, 2, 2, groups=16),
    "batch norm, no affine": lambda: nn.BatchNorm2d(16, affine=False),
    "batch norm, no statistics": lambda: nn.BatchNorm2d(16, track_running_stats=False),
    "synchronised batch norm": lambda: nn.SyncBatchNorm(16),
    "instance norm": lambda: nn.InstanceNorm2d(16),
    "instance norm, affine, statistics": lambda: nn.InstanceNorm2d(16, affine=True, track_running_stats=True),
    "group norm of one": lambda: nn.GroupNorm(1, 16),
    "group norm, no affine": lambda: nn.GroupNorm(2, 16, affine=False),
    "prelu of one": lambda: nn.PReLU(),
    "timm conv": lambda: _timm("Conv2dSame", 16, 16, 3, stride=2),
    "timm norm and activation": lambda: _timm("BatchNormAct2d", 16),
    "timm group norm and activation": lambda: _timm("GroupNormAct", 16, 2),
    "timm layer norm": lambda: _timm("LayerNorm2d", 16),
    "timm layer scale": lambda: _timm("LayerScale2d", 16, 0.1),
    "timm squeeze-excite": lambda: _timm("SqueezeExcite", 16),
    "in 1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16),
                                   nn.Unflatten(2, (12, 12))),
    "in 3d": lambda: nn.Sequential(nn.Unflatten(2, (3, 4)), nn.Conv3d(16, 16, 1), nn.BatchNorm3d(16),
                                   nn.Flatten(2, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_is_what_its_narrow_copy_is(kind: str) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 16, 1), KINDS[kind](), nn.Conv2d(16, 5, 1)).eval()
    for held in (*plain[1].parameters(), *plain[1].buffers()):
        if held.is_floating_point():
            nn.init.uniform_(held, 0.5, 1.5)
    wanted = plain(X)
    net = slim_(plain, (0.5, 1.0), example_inputs=X)
    narrow = net.narrow(0.5)
    assert torch.equal(net(X), wanted) and torch.equal(net.narrow(1.0)(X), wanted)
    assert narrow[0].out_channels == narrow[2].in_channels == 8
    assert param_bytes(narrow) < param_bytes(net.narrow(1.0))
    with net.at(0.5):
        assert torch.equal(net(X), narrow(X))
        with torch.no_grad():
            assert torch.equal(net(X), narrow(X)) and torch.equal(net(X), narrow(X))
        if not isinstance(plain[1], nn.SyncBatchNorm):  # which trains on GPUs only
            assert torch.equal(net.train()(X), narrow.train()(X))
            assert all(torch.equal(a, b) for a, b in zip(net.narrow(0.5).buffers(), narrow.buffers(), strict=True))


def test_a_narrow_network_compiles() -> None:
    narrow = slimmed().narrow(0.5)
    assert torch.allclose(torch.compile(narrow, backend="aot_eager")(X), narrow(X), atol=1e-6)


def test_state_dict_goes_into_a_freshly_slimmed_model(tmp_path: Path) -> None:
    net = slimmed()
    with torch.no_grad():
        for held in net.parameters():
            held.add_(torch.randn_like(held) * 0.1)
    other = slimmed()
    other.load_state_dict(net.state_dict())
    for width in net.widths:
        assert torch.equal(net.narrow(width)(X), other.narrow(width)(X))
    save_model(net, str(tmp_path / "net.safetensors"))
    third = slimmed()
    load_model(third, str(tmp_path / "net.safetensors"))
    third.width = net.width = 0.25
    assert torch.equal(net(X), third(X))


def test_batches_of_one_and_none() -> None:
    net = slimmed()
    for rows in (0, 1):
        for width in net.widths:
            with net.at(width):
                assert torch.equal(net(X[:rows]), net.narrow(width)(X[:rows]))


def test_where_and_plan() -> None:
    model = small()
    found = {name: held.clone() for name, held in model.state_dict().items()}
    plan = slim_plan(model, example_inputs=X)
    assert [type(module) for module in model.modules()] == [type(module) for module in small().modules()]
    assert all(torch.equal(model.state_dict()[name], held) for name, held in found.items())
    assert str(plan) == str(slimmed().plan) and "stem" in str(plan)
    net = slim_(model, (0.5, 1.0), example_inputs=X, where=lambda path, module: path != "pw")
    narrow = net.narrow(0.5)
    assert narrow.pw.weight.shape == (32, 8, 1, 1) and narrow.gn.num_groups == 4 and narrow.scale.shape == (32, 1, 1)
    with net.at(0.5), torch.no_grad():
        assert torch.equal(net(X), narrow(X))


def test_hooks_flags_and_random_states_stay() -> None:
    model, calls = small(), []
    model.pw.register_forward_hook(lambda *_: calls.append("pw"))
    model.stem.weight.requires_grad_(False)
    model.bn.requires_grad_(False)
    model.train()
    model.bn2.eval()
    flags, state = [module.training for module in model.modules()], torch.get_rng_state()
    before = {name: held.clone() for name, held in model.state_dict().items()}
    net = slim_(model, (0.5, 1.0), example_inputs=X)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(model.state_dict()[name], held) for name, held in before.items())
    assert flags == [module.training for path, module in model.named_modules() if "at_" not in path]
    calls.clear()
    with net.at(0.5):
        net(X)
    assert calls == ["pw"] and not model.stem.weight.requires_grad
    assert not model.bn.get_submodule("at_0:5").weight.requires_grad
    narrow = net.narrow(0.5)
    assert not narrow.stem.weight.requires_grad and not narrow.bn.weight.requires_grad
    assert narrow.pw.weight.requires_grad


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.a(x))
        if int(x.shape[1]) != 16:
            raise RuntimeError("made for 16")
        return self.b(x)


def test_failure_puts_everything_back_and_says_where() -> None:
    model = Stubborn().train()
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(WidthError) as caught:
        slim_(model, (0.5, 1.0), example_inputs=X)
    assert "made for 16" in str(caught.value) and "test_slim.py:" in str(caught.value)
    assert classes == [type(module) for module in model.modules()] and list(model.state_dict()) == keys
    assert model.training and not any("_offramp_rig" in vars(module) for module in model.modules())


def test_refusals() -> None:
    net = slimmed()
    for again in (net, net.backbone):
        with pytest.raises(WidthError, match="slimmable already"):
            slim_(again, (0.5, 1.0), example_inputs=X)
    for widths in ((0.5,), (), (0.0, 1.0), (-0.5, 1.0), (1.0, 1.5), (float("nan"), 1.0)):
        with pytest.raises(WidthError, match="1.0 among them"):
            slim_(small(), widths, example_inputs=X)
    assert slim_(small(), (1, 0.5, 0.5), example_inputs=X).widths == (0.5, 1.0)
    spectral = small()
    nn.utils.parametrizations.spectral_norm(spectral.pw)
    own = small()
    own.mix.forward = own.mix.forward  # type: ignore[method-assign]
    for model, reason in ((spectral, "pw"), (own, "mix .Conv2d. has a forward of its own")):
        classes = [type(module) for module in model.modules()]
        with pytest.raises(WidthError, match=reason):
            slim_(model, (0.5, 1.0), example_inputs=X)
        assert classes == [type(module) for module in model.modules()]


def test_tied_weights_heads_of_training_and_layers_that_are_not_called() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 5, 1)
            self.a, self.b, self.aux = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 5, 1)
            self.idle = nn.Conv2d(16, 5, 1)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Any:
            x = self.b(self.a(self.stem(x)))
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    net = slim_(Tied().eval(), (0.5, 1.0), example_inputs=X)
    narrow = net.narrow(0.5)
    assert narrow.a.weight is narrow.b.weight and narrow.a.weight.shape == (8, 8, 1, 1)
    assert narrow.a.bias is not narrow.b.bias
    with net.at(0.5):
        assert torch.equal(net(X), narrow(X))
        assert all(torch.equal(a, b) for a, b in zip(net.train()(X), narrow.train()(X), strict=True))
    assert net.notes == ("idle is not called",) and slimmed().notes == () and narrow.idle.weight.shape == (5, 16, 1, 1)


def test_public_name() -> None:
    assert offramp.slim_ is slim_ and issubclass(WidthError, offramp.OfframpError)

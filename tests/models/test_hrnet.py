"""HRNet: the papers' counts, timm's own answers, any size, and where it can be cut."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import offramp
from offramp.cost.macs import count
from offramp.errors import OfframpError
from offramp.models import load_model
from offramp.models.hrnet import Exchange, HRNet, HRNetPose, HRNetTrunk, hrnet_w18_small

SMALL = "hrnet_w18_small_v2"


@pytest.mark.parametrize("name, size, million_params, convolutions, giga_macs", [
    ("hrnet_w48", (1024, 2048), 65.86, 696.2, 748.62), ("hrnet_w32", (1024, 2048), 29.55, 336.4, 362.02),
    ("hrnet_w18", (1024, 2048), 9.64, 137.3, 147.92), ("hrnet_w18_small", (1024, 2048), 3.94, 71.6, 77.31),
    ("hrnet_w32_pose", (256, 256), 28.54, 9.49, 10.19),
])
def test_counts(
    name: str, size: tuple[int, int], million_params: float, convolutions: float, giga_macs: float
) -> None:
    # convolutions / 2^30: W48 and the poses' as in ADP-C's tables, which resizes for nothing
    with torch.device("meta"):
        net, x = load_model(f"offramp:{name}"), torch.zeros(1, 3, *size)
    macs = count(net, x)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(million_params, abs=0.005)
    assert round(macs.by_op["convolution"] / 2**30, 2 if "pose" in name else 1) == convolutions
    assert set(macs.by_op) <= {"convolution", "upsample_bilinear2d"}
    assert macs.total / 1e9 == pytest.approx(giga_macs, abs=0.006)


def messy(net: nn.Module) -> nn.Module:
    """Norms that do something."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def test_where_timm_can_run_its_maps_are_timms() -> None:
    theirs = messy(timm.create_model(SMALL, features_only=True, feature_location=""))
    trunk, finest = HRNetTrunk(SMALL, mode="nearest"), HRNetTrunk(SMALL, mode="nearest", finest=True)
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        wanted = theirs(x)[1:]
        for net, n in ((trunk, 4), (finest, 1)):
            missing, unexpected = net.eval().load_state_dict(theirs.state_dict(), strict=False)
            assert missing == [] and all(key.startswith("stage4.1.fuse_layers.") for key in unexpected)
            maps = net.maps(x)
            assert len(maps) == n == len(net.channels) and tuple(m.shape[1] for m in maps) == net.channels
            assert all(torch.equal(a, b) for a, b in zip(maps, wanted, strict=n == 4))
    assert unexpected


def test_maps_meet_bilinearly_at_any_size() -> None:
    net = messy(hrnet_w18_small(num_classes=3))
    unit = net.get_submodule("stage3.1")
    assert isinstance(unit, Exchange)
    maps = [torch.randn(1, c, *size) for c, size in ((18, (17, 25)), (36, (9, 13)), (72, (5, 7)))]
    kept = [m.clone() for m in maps]
    with torch.inference_mode():
        said = unit(maps)
        assert all(torch.equal(a, b) for a, b in zip(maps, kept, strict=True)), "what came in stays as it was"
        branches = [branch(m) for branch, m in zip(unit.branches, maps, strict=True)]
        for i, (out, size) in enumerate(zip(said, ((17, 25), (9, 13), (5, 7)), strict=True)):
            rows = enumerate(zip(unit.fuse_layers[i], branches, strict=True))
            terms = [layer[1](layer[0](m)) if j > i else layer(m) for j, (layer, m) in rows]
            terms = [F.interpolate(t, size, mode="bilinear") if t.shape[-2:] != size else t for t in terms]
            torch.testing.assert_close(out, torch.stack(terms).sum(0).clamp(min=0))


def test_the_head_reads_all_branches_at_a_quarter() -> None:
    net = messy(HRNet(SMALL, 5))
    x = torch.randn(1, 3, 67, 98)
    with torch.inference_mode():
        maps = net.maps(x)
        assert [m.shape[-2:] for m in maps] == [(17, 25), (9, 13), (5, 7), (3, 4)]
        joined = torch.cat([F.interpolate(m, (17, 25), mode="bilinear") for m in maps], 1)
        logits = net.last_layer[3](net.last_layer[1](net.last_layer[0](joined)).clamp(min=0))
        torch.testing.assert_close(net(x), F.interpolate(logits, (67, 98), mode="bilinear"))


@pytest.mark.parametrize("training", [False, True])
def test_odd_sizes(training: bool) -> None:
    x = torch.rand(2, 3, 67, 99)
    with torch.no_grad():
        assert hrnet_w18_small(num_classes=5).train(training)(x).shape == (2, 5, 67, 99)
        assert HRNetPose(SMALL, 16).train(training)(x).shape == (2, 16, 17, 25)


@pytest.mark.parametrize("make", [HRNet, HRNetPose])
def test_gradients_reach_every_parameter(make: type[HRNet] | type[HRNetPose]) -> None:
    net = make(SMALL, 4).train()
    net(torch.rand(2, 3, 64, 96)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("make", [HRNet, HRNetPose])
def test_it_is_cut_where_stages_end(make: type[HRNet] | type[HRNetPose]) -> None:
    net = make(SMALL, 4).eval()
    found = offramp.sites(net, torch.rand(2, 3, 64, 96))
    assert net.ends == ("layer1.1", "stage2.0", "stage3.2")
    assert [found.aliases[stage] for stage in ("layer1", "stage2", "stage3")] == list(net.ends)
    by_name = {site.name: site for site in found}
    for name, shapes in zip(net.ends, (
        [(256, 16, 24)], [(18, 16, 24), (36, 8, 12)], [(18, 16, 24), (36, 8, 12), (72, 4, 6)],
    ), strict=True):
        assert by_name[name].shrinkable and [live.shape[1:] for live in by_name[name].live] == shapes


def saved(tmp_path: Path, tensors: dict[str, Tensor]) -> str:
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "trunk.safetensors")
    return str(tmp_path / "trunk.safetensors")


def test_a_trunks_weights_from_a_file(tmp_path: Path) -> None:
    theirs = timm.create_model(SMALL).state_dict()  # with its ImageNet head
    file = saved(tmp_path, theirs)
    net = load_model(f"offramp:hrnet_w18_small?num_classes=3&pretrained={file}")
    own = {key: value for key, value in net.state_dict().items() if not key.startswith("last_layer.")}
    assert own and all(torch.equal(value, theirs[key]) for key, value in own.items())
    with pytest.raises(OfframpError, match=r"missing or of another shape, as layer1\.2"):
        load_model(f"offramp:hrnet_w18?pretrained={file}")


def test_whole_weights_from_a_file(tmp_path: Path) -> None:
    net = hrnet_w18_small(num_classes=3)
    again = load_model("offramp:hrnet_w18_small?num_classes=3", weights=saved(tmp_path, net.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("asked, name, fetches", [
    ("true", SMALL, True), ("ms_in1k", f"{SMALL}.ms_in1k", True), ("false", SMALL, False),
])
def test_what_timm_is_asked_to_fetch(monkeypatch: pytest.MonkeyPatch, asked: str, name: str, fetches: bool) -> None:
    seen: list[Any] = []
    real = timm.create_model

    def create(variant: str, pretrained: bool = False, **options: Any) -> nn.Module:
        seen.append((variant, pretrained))
        return real(variant, **options)

    monkeypatch.setattr(timm, "create_model", create)
    load_model(f"offramp:hrnet_w18_small?pretrained={asked}")
    assert seen == [(name, fetches)]

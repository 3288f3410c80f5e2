"""Parts of a network for devices that cannot hold it: the same answers, their own weights, smaller files."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

import offramp
from offramp.errors import OfframpError, PlanError
from runtime.nets import block, classifier, images, segmenter, stir_


def real(name: str) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    makers = {
        "resnet18": lambda: torchvision.models.resnet18(weights=None, num_classes=7),
        "densenet": lambda: torchvision.models.DenseNet(4, (2, 2, 2), 8, num_classes=7),
        "vit": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32, patch_size=8, depth=3,
                                         embed_dim=24, num_heads=2),
    }
    net = offramp.attach(makers[name]().eval(), torch.randn(2, 3, 32, 32), exits=2)
    stir_(net)
    return net, torch.randn(3, 3, 32, 32)


def size(module: nn.Module, path: Path) -> int:
    safetensors.torch.save_model(module, str(path))
    return path.stat().st_size


@pytest.mark.parametrize("name", ["resnet18", "densenet", "vit"])
def test_on_real_networks(name: str, tmp_path: Path) -> None:
    net, x = real(name)
    one, two = net.columns[0].name, net.columns[1].name
    with torch.no_grad():
        wanted = net.eval()(x)
    part, sender, middle, rest = (net.part(upto=one), net.part(upto=one, frontier=True), net.rest(one, upto=two),
                                  net.rest(after=two))
    assert torch.equal(part(x), wanted[0])
    said, frontier = sender(x)
    assert torch.equal(said, wanted[0]) and len(frontier) >= len(net.sites[0].live)
    again, deeper = middle(*frontier)
    assert torch.equal(again, wanted[1]) and torch.equal(rest(*deeper), wanted[2])
    if net.sites[0].shrinkable:
        few = middle(*(one[1:] if torch.is_tensor(one) and len(one) == 3 else one for one in frontier))[0]
        assert torch.allclose(few, wanted[1][1:], atol=1e-5), "who is sure stays below"
    whole, held = size(net, tmp_path / "whole"), [size(one, tmp_path / "part") for one in (sender, middle, rest)]
    own = [sum(t.nbytes for t in one.state_dict().values()) for one in (sender, middle, rest)]
    assert sum(held) < whole + 3 * 40_000 and all(0 <= file - bytes_ < 60_000 for file, bytes_ in
                                                  zip(held, own, strict=True))
    everything = {t.data_ptr(): t.nbytes for t in net.state_dict().values()}
    for head in (net.columns[0], net.columns[1]):
        assert everything.keys() >= {t.data_ptr() for t in net.head(head.name).state_dict().values()}
    assert sum(own) == sum(everything.values()), "each weight lies on one device, none on two"
    offramp.save_deployed(part, tmp_path / "deployed")
    (file,) = (tmp_path / "deployed").glob("*.safetensors")
    assert 0 <= file.stat().st_size - own[0] < 60_000 and file.stat().st_size < whole
    back = offramp.load_deployed(net.backbone, tmp_path / "deployed")
    assert torch.equal(back(x), wanted[0])


def test_weights_go_to_another_device_by_file(tmp_path: Path) -> None:
    net, x = classifier(), images(4)
    sender, rest = net.part(upto="one", frontier=True), net.rest(after="one")
    safetensors.torch.save_model(rest, str(tmp_path / "rest"))
    other = classifier()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    there = other.rest(after="one")
    safetensors.torch.load_model(there, str(tmp_path / "rest"))
    assert torch.equal(there(*sender(x)[1]), net.eval().backbone(x))


def test_dense_in_the_networks_form_and_other_sizes() -> None:
    net = segmenter().eval()
    for side in (16, 24):
        x = images(2, side)
        with torch.no_grad():
            wanted, whole = net(x), net.backbone(x)
        assert torch.equal(net.part("two")(x)["out"], wanted[1])
        assert net.part("two", dtype="bf16")(x)["out"].dtype == torch.float32
    x = images(2, 16)
    logits, frontier = net.part("two", frontier=True)(x)
    assert torch.equal(logits, net(x)[1]) and torch.equal(net.rest("two")(*frontier)["out"], net.backbone(x)["out"])
    del whole


def test_the_network_it_comes_from_is_left_alone() -> None:
    net, x = classifier("dict"), images(3)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    net.part("one", frontier=True), net.rest("one")
    assert net.training and all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert not net.rest("one").train().training
    frontier = net.part("one", frontier=True)(x)[1]
    assert list(net.rest("one")(*frontier)) == ["out", "aux"], "the end speaks as the network does"


def test_what_is_asked_amiss() -> None:
    net = classifier()
    for wrong in (lambda: net.part("nine", frontier=True), lambda: net.rest("nine"), lambda: net.part("nine")):
        with pytest.raises(PlanError):
            wrong()
    with pytest.raises(PlanError, match="deeper than two"):
        net.rest("two", upto="one")
    with pytest.raises(OfframpError, match="as it is"):
        net.part("one", frontier=True, dtype="bf16")
    with pytest.raises(OfframpError, match="a frontier of 1 tensors"):
        net.rest("one")()

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.last = block(3, 4), block(4, 4), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x * 2 if x.shape[-1] > 16 else x)
            return self.last(self.two(x).mean((2, 3)))

    forked = offramp.attach(Fork(), images(2), exits=["one"], heads=offramp.HeadSpec()).part("one", frontier=True)
    forked(images(2, 14))
    with pytest.raises(OfframpError, match="take another"):
        forked(images(2, 20))

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from offramp.errors import OfframpError
from offramp.models import CifarResNet, load_model, read_weights

SMALL = "offramp:cifar_resnet20"


@pytest.mark.parametrize("spec, classes", [
    ("offramp:scenes_classify?num_classes=3", 3), ("torchvision:mobilenet_v3_small?num_classes=5", 5),
    ("timm:test_resnet.r160_in1k?num_classes=7", 7), ("offramp.models:CifarResNet?depth=8&num_classes=4", 4),
])
def test_classifiers_by_name(spec: str, classes: int) -> None:
    net = load_model(spec)
    assert not net.training and net(torch.rand(2, 3, 64, 64)).shape == (2, classes)


def test_dense_by_name_fetch_nothing_unasked() -> None:
    net = load_model("smp:Unet?encoder_name=mobilenet_v2", num_classes=4)
    assert net(torch.rand(1, 3, 32, 32)).shape == (1, 4, 32, 32)
    net = load_model("torchvision:lraspp_mobilenet_v3_large?num_classes=3")
    assert net(torch.rand(1, 3, 64, 64))["out"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("spec, near", [
    ("torchvison:resnet18", "did you mean torchvision?"), ("torchvision:resnet19", "resnet18"),
    ("timm:mobilenetv2_10", "mobilenetv2_100"), ("smp:DeepLab", "DeepLabV3Plus"),
    ("smp:Unet?encoder_name=resnet19", "resnet18"), ("offramp:cifar_resnet5", "cifar_resnet56"),
    ("cifar_resnet56", "offramp:cifar_resnet56"), ("resnet50", "torchvision:resnet50"), ("hf:", "add the name"),
    ("torchvision:resnet18?weights=IMAGENET1K", "IMAGENET1K_V1"), ("timm:resnet50?weights=a1_in1", "a1_in1k"),
    ("torchvision:resnet18?bogus=3", "with weights=None, bogus=3, but"),
    ("hf:x?trust_remote_code=true", "never runs code"),
    ("hf:x?task=image-classify", "image-classification"), ("torch.nn:Linar", "Linear"),
    ("math:sqrt?x=2", "with x=2, but"),
    ("nope.mod:thing", "importable module 'nope.mod'"),
    ("offramp:scenes_dense?weights=best", "offramp ships no weights"),
    ("builtins:dict", "an nn.Module"),
])
def test_bad_specs_say_what_is_near(spec: str, near: str) -> None:
    with pytest.raises(OfframpError) as error:
        load_model(spec)
    assert near in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_files(tmp_path: Path, suffix: str) -> None:
    source = CifarResNet(20)
    file = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), file)
    else:  # as DataParallel trainers save them
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}, "epoch": 3}, file)
    for net in (load_model(f"{SMALL}?weights={file}"), load_model(SMALL, weights=str(file))):
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in net.state_dict().items())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file(CifarResNet(8, num_classes=4).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(OfframpError, match="missing layer1.1.conv1.weight"):
        load_model(SMALL, weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(OfframpError, match=r"linear.weight \(4, 64\) where the network has \(10, 64\)"):
        load_model("offramp.models:CifarResNet?depth=8", weights=str(tmp_path / "w.safetensors"))


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def test_pickles_with_code_are_refused(tmp_path: Path) -> None:
    torch.save({"x": Bomb(tmp_path / "went-off")}, tmp_path / "w.pth")
    with pytest.raises(OfframpError, match="files that need code to be run are refused"):
        load_model(SMALL, weights=str(tmp_path / "w.pth"))
    assert not (tmp_path / "went-off").exists()
    torch.load(tmp_path / "w.pth", weights_only=False)
    assert (tmp_path / "went-off").exists()  # so the file was armed


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_damaged_and_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(OfframpError, match="no such file"):
        load_model(SMALL, weights=str(tmp_path / name))
    (tmp_path / name).write_bytes(b"\x00" * 50)
    with pytest.raises(OfframpError, match="file of tensors alone"):
        load_model(SMALL, weights=str(tmp_path / name))
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(OfframpError, match="named tensors, but got list"):
        read_weights(tmp_path / "list.pth")


def test_huggingface_from_a_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=32, num_labels=3)
    saved = transformers.DistilBertForSequenceClassification(config)
    saved.save_pretrained(tmp_path)
    same = load_model(f"hf:{tmp_path}?task=text-classification")
    ids = torch.arange(6).view(1, 6)
    # not bit for bit: the two may choose different attention kernels
    assert torch.allclose(same(ids).logits, saved.eval()(ids).logits, atol=1e-6)
    fresh = load_model(f"hf:{tmp_path}?task=text-classification&weights=none", num_classes=5)
    assert fresh(ids).logits.shape == (1, 5)
    assert isinstance(load_model(f"hf:{tmp_path}"), nn.Module)
    with pytest.raises(OfframpError, match="to be built with"):
        load_model("hf:./no/such/folder/here")

from pathlib import Path

import pytest
import torch
from torch import nn

from offramp.data import load_data
from offramp.errors import OfframpError
from offramp.models import CifarResNet, load_model, scenes_classify, scenes_dense


@pytest.mark.parametrize("depth, thousand_params", [(20, 270), (32, 464), (44, 659), (56, 853), (110, 1728)])
def test_parameters_as_in_the_paper(depth: int, thousand_params: int) -> None:
    # He et al., Table 6: 0.27, 0.46, 0.66, 0.85, 1.7 M
    assert sum(p.numel() for p in CifarResNet(depth).parameters()) // 1000 == pytest.approx(thousand_params, abs=2)


def test_depth_must_be_6n_plus_2() -> None:
    with pytest.raises(OfframpError, match="6n \\+ 2"):
        CifarResNet(21)


def test_shortcut_keeps_every_second_pixel_and_pads_channels() -> None:
    net = CifarResNet(8).eval()
    block = net.layer2[0]
    for conv in (block.conv1, block.conv2):
        nn.init.zeros_(conv.weight)
    x = torch.rand(2, 16, 8, 8)
    with torch.inference_mode():
        out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert float(out[:, :8].abs().max()) == float(out[:, 24:].abs().max()) == 0


@pytest.mark.parametrize("name, least", [("cifar10_resnet20", 91.0), ("cifar10_resnet56", 92.5)])
def test_checkpoints_measure_what_they_should(real_data: Path, name: str, least: float) -> None:
    depth = name.removeprefix("cifar10_resnet")
    net = load_model(f"offramp:cifar_resnet{depth}", weights=str(real_data / "checkpoints" / f"{name}.safetensors"))
    test = load_data(f"cifar10:{real_data / 'cifar10'}", "test")
    rows = range(0, len(test), 3)  # 500 images: the full 7,000 give 91.64 and 93.46
    images, labels = (torch.stack(list(part)) for part in zip(*(test[i] for i in rows), strict=True))
    with torch.inference_mode():
        right = (net(images).argmax(1) == labels).float().mean().item() * 100
    assert right > least - 2.5, right


def test_scene_nets_take_any_size_and_spend_most_late() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    dense, kinds = scenes_dense().eval(), scenes_classify().eval()
    with torch.inference_mode():
        assert dense(torch.rand(2, 3, 50, 70)).shape == (2, 11, 50, 70)
        assert kinds(torch.rand(2, 3, 50, 70)).shape == (2, 8)
        for net, late in ((dense, 0.6), (kinds, 0.35)):
            with FlopCounterMode(display=False) as counter:
                net(torch.rand(1, 3, 96, 128))
            counts = counter.get_flop_counts()
            name = type(net).__name__
            share = sum(counts[f"{name}.stage3"].values()) / counter.get_total_flops()
            assert share > late, (name, share)
    assert 0.9e6 < sum(p.numel() for p in dense.parameters()) < 2e6


def test_dense_net_learns_a_rule() -> None:
    torch.manual_seed(0)
    net = scenes_dense(num_classes=2)
    x = torch.rand(4, 3, 32, 32)
    x[:, :, 16:] += 1
    y = (torch.arange(32) >= 16).long().view(1, 32, 1).expand(4, 32, 32)
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(12):
        loss = nn.functional.cross_entropy(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.25, loss.item()

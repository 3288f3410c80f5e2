import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import offramp
from offramp.cost.macs import count
from offramp.models import load_model
from offramp.models.deeplab import AtrousPyramid, MobileNetTrunk

NAMES = ["deeplabv3plus_resnet50", "deeplabv3plus_mobilenetv2"]


@pytest.mark.parametrize("name, million_params, giga_macs", [
    ("deeplabv3plus_resnet50", 40.35, 1463), ("deeplabv3plus_mobilenetv2", 4.53, 18.5),
])
def test_counts_as_in_the_slimseg_paper(name: str, million_params: float, giga_macs: float) -> None:
    with torch.device("meta"):
        net, x = load_model(f"offramp:{name}?num_classes=19"), torch.zeros(1, 3, 1024, 2048)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(million_params, rel=0.002)
    assert count(net, x).total / 1e9 == pytest.approx(giga_macs, rel=0.02)


@pytest.mark.parametrize("name, million_params, giga_macs", [
    ("deeplabv3plus_resnet50", 16.8, 663.5), ("deeplabv3plus_mobilenetv2", 2.7, 6.3),
])
def test_the_head_costs_what_the_paper_gives_it(name: str, million_params: float, giga_macs: float) -> None:
    # SlimSeg, Table 1: all but the backbone; resizing, which is 0.3 G here, is not in the paper's count
    with torch.device("meta"):
        net, x = load_model(f"offramp:{name}"), torch.zeros(1, 3, 1024, 2048)
    rest = sum(p.numel() for n, p in net.named_parameters() if not n.startswith("trunk."))
    assert rest / 1e6 == pytest.approx(million_params, abs=0.051)
    convolutions = count(net, x).by_op["convolution"] - count(net.trunk, x).total
    assert convolutions / 1e9 == pytest.approx(giga_macs, abs=0.51 if giga_macs > 100 else 0.051)


def test_mobilenet_takes_torchvisions_weights_and_gives_its_maps() -> None:
    theirs, trunk = torchvision.models.mobilenet_v2().eval(), MobileNetTrunk().eval()
    missing, unexpected = trunk.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == [] and all(key.startswith(("features.18", "classifier")) for key in unexpected)
    x = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        low, high = trunk(x)
        assert torch.equal(low, theirs.features[:4](x)) and torch.equal(high, theirs.features[:18](x))
    assert (low.shape[1:], high.shape[1:]) == ((24, 17, 25), (320, 3, 4))


def test_the_pyramid_looks_as_far_as_it_says() -> None:
    pyramid = AtrousPyramid(1, 2, (2, 5)).eval()
    x = torch.zeros(1, 1, 21, 21)
    x[0, 0, 10, 10] = 1
    with torch.no_grad():
        for branch, reach in zip(pyramid.branches, (0, 2, 5), strict=True):
            branch[0].weight.fill_(1)
            rows = branch(x)[0, 0].nonzero()[:, 0].unique().tolist()
            assert rows == sorted({10 - reach, 10, 10 + reach})
        assert pyramid(x).shape == (1, 2, 21, 21)


@pytest.mark.parametrize("name", NAMES)
def test_odd_sizes_gradients_and_the_map_at_a_quarter(name: str) -> None:
    torch.manual_seed(0)
    net, seen = load_model(f"offramp:{name}?num_classes=4"), list[Tensor]()
    net.get_submodule(net.low_level).register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.inference_mode():
        assert net(torch.rand(1, 3, 67, 99)).shape == (1, 4, 67, 99)
    assert seen[0].shape[-2:] == (17, 25)
    loss = F.cross_entropy(net.train()(torch.rand(2, 3, 65, 97)), torch.randint(4, (2, 65, 97)))
    loss.backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12] == []


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_cut_and_needs_no_input_then(name: str) -> None:
    net = load_model(f"offramp:{name}?num_classes=4")
    (site,) = (site for site in offramp.sites(net, torch.rand(2, 3, 34, 50)) if site.name == "classifier")
    assert site.shrinkable and [tensor.name for tensor in site.live] == ["classifier"]

"""MACs against closed forms and against torch's own counter, which counts two operations for each."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from offramp.cost import macs
from zoo import LIBRARY, Animal


def total(fn: object, *args: Tensor) -> int:
    return macs.count(fn, *args).total  # type: ignore[arg-type]


def test_convolutions() -> None:
    x = torch.zeros(2, 8, 9, 9)
    assert total(nn.Conv2d(8, 12, 3, padding=1), x) == 2 * 12 * 8 * 9 * 81
    assert total(nn.Conv2d(8, 12, 3, padding=1, groups=4), x) == 2 * 12 * 2 * 9 * 81
    assert total(nn.Conv2d(8, 8, 3, stride=2, dilation=2, groups=8), x) == 2 * 8 * 9 * 3 * 3
    assert total(nn.ConvTranspose2d(8, 6, 4, stride=2), x) == 2 * 81 * 8 * 6 * 16
    assert total(nn.ConvTranspose2d(8, 6, 4, stride=2, groups=2), x) == 2 * 81 * 8 * 3 * 16
    assert total(nn.Conv1d(4, 5, 3), torch.zeros(1, 4, 10)) == 5 * 4 * 3 * 8
    assert total(nn.Conv3d(2, 3, 2), torch.zeros(1, 2, 4, 4, 4)) == 3 * 2 * 8 * 27


def test_products() -> None:
    assert total(nn.Linear(6, 7), torch.zeros(2, 5, 6)) == 2 * 5 * 6 * 7
    assert total(torch.matmul, torch.zeros(3, 4, 5), torch.zeros(3, 5, 6)) == 3 * 4 * 5 * 6
    assert total(torch.mv, torch.zeros(4, 5), torch.zeros(5)) == 20
    assert total(torch.baddbmm, torch.zeros(3, 4, 6), torch.zeros(3, 4, 5), torch.zeros(3, 5, 6)) == 360
    assert total(torch.addmm, torch.zeros(4, 6), torch.zeros(4, 5), torch.zeros(5, 6)) == 120
    assert total(lambda a, b: torch.einsum("nij,njk->nik", a, b), torch.zeros(3, 4, 5), torch.zeros(3, 5, 6)) == 360


def test_attention() -> None:
    q, k = torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 11, 8)
    assert total(F.scaled_dot_product_attention, q, k, k) == 2 * (2 * 3 * 7 * 11 * 8)
    x = torch.zeros(2, 7, 8)
    closed = 2 * 7 * (3 + 1) * 8 * 8 + 2 * 2 * 7 * 7 * 8
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    assert total(attention.train(), x, x, x) == closed
    assert total(attention.eval(), x, x, x) == closed, "the fused op of eval mode counts the same"
    layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
    assert total(layer.train(), x) == total(layer.eval(), x) == closed + 2 * 7 * 2 * 8 * 32


def test_recurrence() -> None:
    assert total(nn.LSTM(5, 6, batch_first=True), torch.zeros(2, 7, 5)) == 2 * 7 * 4 * 6 * (5 + 6)
    assert total(nn.GRU(5, 6), torch.zeros(7, 2, 5)) == 2 * 7 * 3 * 6 * (5 + 6)


def test_bilinear_resizing_is_four_an_element() -> None:
    x = torch.zeros(2, 3, 4, 4)
    counted = macs.count(F.interpolate, x, size=(8, 6), mode="bilinear")
    assert counted.by_op == {"upsample_bilinear2d": 4 * 2 * 3 * 8 * 6}
    assert total(lambda x: F.interpolate(x, scale_factor=2.0), x) == 0


def test_what_is_not_counted_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    counted = macs.count(model.eval(), torch.zeros(1, 3, 4, 4))
    assert set(counted.uncounted) == {"native_batch_norm", "relu"}
    assert "relu x1" in str(counted) and "G MACs" in str(counted)


@pytest.mark.parametrize(("name", "size", "giga"), [
    ("resnet50", 224, 4.09), ("fcn_resnet50", 520, 142.73), ("deeplabv3_resnet50", 520, 168.73),
])
def test_published_sizes(name: str, size: int, giga: float) -> None:
    torchvision = pytest.importorskip("torchvision")
    options = {} if name == "resnet50" else {"weights_backbone": None, "aux_loss": False}
    model = torchvision.models.get_model(name, weights=None, **options).eval().to("meta")
    counted = macs.count(model, torch.empty(1, 3, size, size, device="meta"))
    resizing = counted.by_op.get("upsample_bilinear2d", 0)
    assert (counted.total - resizing) / 1e9 == pytest.approx(giga, abs=0.005)


FEW = [animal for animal in LIBRARY if animal.name.split(":")[1] in {
    "densenet121", "vit_b_16", "swin_t", "convnext_tiny", "hrnet_w18_small", "convnextv2_atto", "mobilevit_xxs",
    "UnetPlusPlus", "BertForSequenceClassification", "SegformerForSemanticSegmentation",
}]


@pytest.mark.parametrize("animal", FEW, ids=str)
def test_twice_as_many_as_torch_counts(animal: Animal) -> None:
    model, inputs = animal.model(), animal.inputs()
    kwargs = inputs if isinstance(inputs, dict) else {}
    args = () if isinstance(inputs, dict) else (inputs,)
    with FlopCounterMode(display=False) as witness:  # with gradients: torch counts no fused eval-mode attention
        model(*args, **kwargs)
    counted = macs.count(model, *args, **kwargs)
    resizing = counted.by_op.get("upsample_bilinear2d", 0)
    assert 2 * (counted.total - resizing) == witness.get_total_flops()

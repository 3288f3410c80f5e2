"""Layer Cascade beside MESS (6.2): how much of a map one pixel of the output reads, and Table 3's comparison.

    python benchmarks/papers/mess_cascade.py            # the receptive fields; nothing is computed, only counted

``table3`` takes a network that somebody trained.
"""

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import offramp  # noqa: E402
from claims import Sheet  # noqa: E402
from offramp.cost.fields import fields  # noqa: E402
from offramp.functional.metrics import mean_iou  # noqa: E402
from offramp.layer_cascade import layer_cascade  # noqa: E402

SIZE, MAP = 520, 65


def block_fields(name: str) -> dict[str, float]:
    """Share of each block's map that the middle pixel of torchvision's network reads, from layer 2 on."""
    with torch.device("meta"):
        net = getattr(torchvision.models.segmentation, name)(
            weights=None, weights_backbone=None, aux_loss=False, num_classes=21).eval()
    blocks = [(f"layer{k}.{i}", block) for k in (2, 3, 4) for i, block in enumerate(net.backbone[f"layer{k}"])]
    want = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    want[0, SIZE // 2, SIZE // 2] = True
    found = {}
    for k, (place, block) in enumerate(blocks):
        after = [later for _, later in blocks[k + 1 :]]
        tail = nn.Sequential(*after, net.classifier, nn.Upsample((SIZE, SIZE), mode="bilinear"))
        features = torch.empty(1, block.conv3.out_channels, MAP, MAP, device="meta")
        found[place] = float(fields(tail, features).needed(want).inputs[0].double().mean())
    return found


def receptive_fields(sheet: Sheet) -> None:
    """One pixel's share of the maps of an FCN and of a DeepLabV3 head on a dilated ResNet-50."""
    for name, paper in (("fcn_resnet50", 0.45), ("deeplabv3_resnet50", 1.0)):
        for place, share in block_fields(name).items():
            sheet.add(f"{name}: one pixel reads of {place}", share, unit="share", paper=paper)


def table3(net: Any, calibration: Any, test: Any, exits: Sequence[str], sheet: Sheet, *, name: str,
           drops: Sequence[float] = (0.001, 0.005, 0.01),
           grid: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01),
           tables: tuple[Any, Any] | None = None) -> None:
    """Pixels leaving one by one against whole images leaving, thresholds of both tuned on calibration, shown on test.

    Shares are of the backbone's MACs on the same images. ``tables`` are those of the two splits, if there already.
    """
    lists = [list(one) for one in product(grid, repeat=len(exits))]
    tuned = layer_cascade(net, calibration, exits=exits, thresholds=lists)
    fitted, shown = tables or (offramp.record(net, calibration, latency=False),
                               offramp.record(net, test, split="test", latency=False))
    for drop in drops:
        point = tuned.cheapest(max_drop=drop)
        assert point is not None, "a threshold above 1 in the grid keeps every pixel for the backbone"
        found = layer_cascade(net, test, exits=exits, thresholds=[point.thresholds])
        ours = found.points[0]
        image = offramp.replay(shown, offramp.search(fitted, max_drop=drop))
        assert image.confusion is not None
        said = f"{name}, {drop * 100:g} points asked"
        sheet.add(f"{said}: Layer Cascade", ours.macs / found.backbone_macs, unit="of MACs")
        sheet.add(f"{said}: whole images", float(image.macs.mean()) / found.backbone_macs, unit="of MACs")
        sheet.add(f"{said}: Layer Cascade's drop", (found.backbone_miou - ours.miou) * 100, unit="points")
        sheet.add(f"{said}: whole images' drop", (found.backbone_miou - float(mean_iou(image.confusion))) * 100,
                  unit="points")


if __name__ == "__main__":
    torch.set_num_threads(1)
    receptive_fields(Sheet("mess-fields"))

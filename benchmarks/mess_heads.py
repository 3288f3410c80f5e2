"""What it takes to train MESS's 384 heads together: one step of all, of one, and of each on its own.

    OMP_NUM_THREADS=1 python benchmarks/mess_heads.py

Batches of 8 images of 240 x 320, one thread, frozen networks of MobileNetV2's and ResNet-18's size. A step is the
frozen network's features once, then each head's forward, its loss at the map's own size, and its gradients, one head
after another. CPU seconds of this process, so that neighbours on the machine count little; medians of ``--repeats``.
"""

import argparse
import statistics
import time
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import offramp
from claims import Sheet
from offramp.train.batches import Batch
from offramp.train.features import frontiers

CLASSES, ROWS, SIZE = 12, 8, (240, 320)


class Segmenter(nn.Module):
    """A timm backbone of output stride 16 under an FCN head."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, pretrained=False, output_stride=16)
        width = self.body.feature_info.channels()[-1]
        self.head = nn.Sequential(nn.Conv2d(width, width // 4, 3, padding=1, bias=False), nn.BatchNorm2d(width // 4),
                                  nn.ReLU(), nn.Conv2d(width // 4, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = int(x.shape[-2]), int(x.shape[-1])
        return F.interpolate(self.head(self.body(x)[-1]), size, mode="bilinear")


def cpu_s(fn: Any, repeats: int) -> float:
    """Median CPU seconds of a call, after one that is not counted."""
    fn()
    found = []
    for _ in range(repeats):
        started = time.process_time()
        fn()
        found.append(time.process_time() - started)
    return statistics.median(found)


def measure(sheet: Sheet, name: str, repeats: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS, 3, *SIZE)
    net = offramp.attach(Segmenter(name).eval(), x[:2], exits=6, heads=offramp.mess_space(), keep_costly=True)
    net.freeze_backbone_().train()
    labels = torch.randint(CLASSES, (ROWS, *SIZE))
    batch = Batch(args=(x,), kwargs={})

    def features() -> Any:
        with torch.no_grad():
            return frontiers(net, batch)[0]

    seen = features()

    def step(column: int, k: int) -> None:
        logits = net.head(net.columns[column].name).coarse(*seen[k])
        goal = F.interpolate(labels[:, None].float(), logits.shape[-2:], mode="nearest")[:, 0].long()
        F.cross_entropy(logits, goal).backward()

    once = cpu_s(features, repeats)
    place = {column: k for k in range(len(net.sites)) for column in net.columns_at(k)}
    each = {column: cpu_s(lambda c=column, k=k: step(c, k), repeats) for column, k in place.items()}
    fcn = statistics.median(each[c] for c in place if net.columns[c].head == "crm1-b0-plain-fcn")
    together = once + sum(each.values())
    apart = sum(once + seconds for seconds in each.values())
    macs = [net.head(net.columns[c].name).macs() for c in place]
    whole = net.sites[0].macs_before + net.sites[0].macs_after
    said = f"{name}, {len(each)} heads"
    sheet.add(f"{said}: the frozen network's features", once, unit="s")
    sheet.add(f"{said}: a head, median / mean {statistics.fmean(each.values()):.3f}",
              statistics.median(each.values()), unit="s")
    sheet.add(f"{said}: a step of all together", together, unit="s")
    sheet.add(f"{said}: that, over a step with one plain FCN head", together / (once + fcn), unit="x")
    sheet.add(f"{said}: that, over a step with a head of mean cost",
              together / (once + statistics.fmean(each.values())), unit="x")
    sheet.add(f"{said}: each trained on its own, over all together", apart / together, unit="x")
    sheet.add(f"{said}: MACs of all heads over the network's own", sum(macs) / whole, unit="x")
    speed = 3 * 2 * ROWS * sum(macs) / sum(each.values()) / 1e9
    a = torch.randn(1024, 1024)
    sheet.add(f"{said}: arithmetic, share of a plain matrix product's speed",
              speed / (2 * 1024**3 / cpu_s(lambda: a @ a, 5) / 1e9), unit="1")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--networks", default="mobilenetv2_100,resnet18")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sheet = Sheet("mess_heads")
    for name in args.networks.split(","):
        measure(sheet, name, args.repeats)


if __name__ == "__main__":
    main()

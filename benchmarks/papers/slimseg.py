"""SlimSeg's tables, and the time that its widths really take: paper | ours.

    python benchmarks/papers/slimseg.py --part costs                      # Table 2's parameters and MACs: two minutes
    python benchmarks/papers/slimseg.py --part clock --part switch        # a quiet machine, ten minutes
    python benchmarks/papers/slimseg.py --part table2 --on camvid --data ../shared/data --seeds 0 1 2
    python benchmarks/papers/slimseg.py --quick                           # checks the path, not the figures
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from slimseg_clock import ENGINES, timed  # noqa: E402
from slimseg_train import LOSSES, WIDTHS, independent, slimmable  # noqa: E402

import offramp  # noqa: E402
from claims import Sheet  # noqa: E402
from offramp.cost.macs import count  # noqa: E402
from offramp.models import load_model  # noqa: E402

TABLE2 = {  # (params in M, MACs in G) at 1.0, 0.75, 0.5 and 0.25 (MobileNetV2: 0.35)
    "sfnet_resnet50": ((31.20, 607.9), (17.57, 343.4), (7.82, 153.9), (1.97, 39.4)),
    "sfnet_resnet18": ((12.87, 243.4), (7.24, 137.4), (3.22, 61.5), (0.79, 15.7)),
    "sfnet_dfnetv2": ((17.88, 80.2), (10.06, 45.2), (4.48, 20.2), (1.12, 5.2)),
    "sfnet_dfnetv1": ((8.42, 32.8), (4.74, 18.6), (2.11, 8.4), (0.52, 2.2)),
    "deeplabv3plus_resnet50": ((40.35, 1463.0), (22.71, 824.3), (10.11, 347.6), (2.54, 92.9)),
    "deeplabv3plus_mobilenetv2": ((4.53, 18.5), (2.57, 12.2), (1.16, 5.7), (0.57, 3.3)),
}
WHOLE = {"sfnet_resnet50": 31.29, "sfnet_resnet18": 12.89, "sfnet_dfnetv2": 17.91, "sfnet_dfnetv1": 8.44,
         "deeplabv3plus_resnet50": 40.44, "deeplabv3plus_mobilenetv2": 4.58}
"""Parameters of all four widths together, in M."""
PAPER_MIOU = {1.0: (75.0, 75.6), 0.75: (74.0, 74.8), 0.5: (71.4, 72.5), 0.25: (65.5, 67.3)}
"""SFNet-ResNet18 on Cityscapes: (alone, slimmable)."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument("--on", choices=("scenes", "camvid"), default="scenes", help="what the tables train on")
    options.add_argument("--work", type=Path, default=Path("runs/slimseg"), help="weights, logs and tables")
    options.add_argument("--part", choices=sorted(PARTS), action="append", help="several may be given; all by default")
    options.add_argument("--network", default="sfnet_resnet18", help="that the tables train")
    options.add_argument("--networks", nargs="+", default=["sfnet_resnet18", "sfnet_resnet50"],
                         help="that are held against the clock")
    options.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    options.add_argument("--size", default="96x128", help="of the pictures that the tables train on")
    options.add_argument("--scenes", type=int, default=1000, help="pictures to draw, of which 60 %% train")
    options.add_argument("--epochs", type=int, default=12)
    options.add_argument("--start", choices=("trained", "nothing"), default="trained", help="what the rows start from")
    options.add_argument("--lr", type=float, default=0.01)
    options.add_argument("--radius", type=int, choices=(1, 3, 5), default=3,
                         help="of boundaries, in pixels: 3 in the paper, on sides ten times as long")
    options.add_argument("--boundary-weight", type=float, default=10.0, help="of the boundary's loss: 10 in the paper")
    options.add_argument("--no-ohem", dest="ohem", action="store_false",
                         help="labels teach all pixels, as wider widths do, not the hard ones alone")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--device", default="cpu")
    options.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the training passes")
    options.add_argument("--progress", action="store_true")
    options.add_argument("--quick", action="store_true")
    args = options.parse_args()
    if args.quick:
        args.work, args.epochs, args.repeats, args.size = args.work / "quick", 1, 1, "64x96"
        args.network, args.networks = "sfnet_dfnetv1", ["sfnet_dfnetv1"]
    for part in args.part or PARTS:
        where = f"-{args.on}" if part.startswith("table") else ""
        PARTS[part](args, Sheet(f"slimseg-{part}{where}" + "-quick" * args.quick))


def widths_of(name: str) -> tuple[float, ...]:
    return (0.35, *WIDTHS[1:]) if name.endswith("mobilenetv2") else WIDTHS


def ready(name: str) -> Any:
    torch.manual_seed(0)
    net = load_model(f"offramp:{name}?num_classes=19").eval()
    return offramp.slim_(net, widths_of(name), example_inputs=torch.randn(1, 3, 64, 128))


def params_of(net: nn.Module) -> float:
    return sum(p.numel() for p in net.parameters()) / 1e6


def costs(args: argparse.Namespace, sheet: Sheet) -> None:
    """Table 2: parameters, and MACs at 1024x2048 counted on the meta device."""
    for name in TABLE2 if not args.quick else args.networks:
        net = ready(name)
        sheet.add(f"{name}, all widths together: parameters", params_of(net), unit="M", paper=WHOLE[name])
        for width, (weights, cost) in zip(sorted(net.widths, reverse=True), TABLE2[name], strict=True):
            narrow = net.narrow(width).to("meta")
            got = count(narrow, torch.empty(1, 3, 1024, 2048, device="meta")).total / 1e9
            sheet.add(f"{name} at {width:g}: parameters", params_of(narrow), unit="M", paper=weights)
            sheet.add(f"{name} at {width:g}: parameters off the paper's", 100 * abs(params_of(narrow) / weights - 1),
                      unit="%", bar="<= 2")
            sheet.add(f"{name} at {width:g}: MACs at 1024x2048", got, unit="G", paper=cost)
            sheet.add(f"{name} at {width:g}: MACs off the paper's", 100 * abs(got / cost - 1), unit="%", bar="<= 3")


def clock(args: argparse.Namespace, sheet: Sheet) -> None:
    """What 0.25 saves in time against 1.0, batch 1, 512x1024: each side by its fastest engine."""
    size = (128, 256) if args.quick else (512, 1024)
    for name in args.networks:
        net = ready(name)
        few = torch.empty(1, 3, *size, device="meta")
        macs = {width: count(net.narrow(width).to("meta"), few).total for width in (0.25, 1.0)}
        ratio = macs[1.0] / macs[0.25]
        best: dict[float, float] = {}
        for engine in args.engines:
            took = timed({width: net.narrow(width).eval() for width in (0.25, 1.0)}, engine, size, args.repeats)
            for width, ms in took.items():
                sheet.add(f"{name} at {width:g}, {engine}: a picture", ms, unit="ms")
                best[width] = min(best.get(width, ms), ms)
            sheet.add(f"{name}, {engine} on both sides: share of the saving in MACs ({ratio:.1f}x) that arrives",
                      100 * took[1.0] / took[0.25] / ratio, unit="%", paper=33)
        sheet.add(f"{name}, the fastest engine on each side: share of the saving that arrives",
                  100 * best[1.0] / best[0.25] / ratio, unit="%", bar=">= 60", paper=33)


def switch(args: argparse.Namespace, sheet: Sheet) -> None:
    """What changing the width costs beside a forward pass, and the file of four widths beside four files."""
    for name in args.networks:
        net = ready(name)
        x = torch.randn(1, 3, 64, 128) if args.quick else torch.randn(1, 3, 256, 512)
        fixed: dict[float, list[float]] = {width: [] for width in net.widths}
        turns: list[float] = []
        with torch.inference_mode():
            for _ in range(2 + args.repeats):
                for width in net.widths:  # the same width again and again, then another one at every call
                    net.width = width
                    net(x)
                    fixed[width].append(_ms(net, x))
                began = time.perf_counter()
                for width in net.widths:
                    net.width = width
                    net(x)
                turns.append(1e3 * (time.perf_counter() - began))
        alone = sum(statistics.median(times[2:]) for times in fixed.values())
        turned = statistics.median(turns[2:])
        sheet.add(f"{name}: four calls that change the width, over four that do not", 100 * (turned / alone - 1),
                  unit="%", bar="<= 1")
        for width in net.widths:
            narrow = net.narrow(width).eval()
            net.width = width
            pairs = []
            with torch.inference_mode():
                for _ in range(2 + args.repeats):
                    pairs.append((_ms(net, x), _ms(narrow, x)))
            sheet.add(f"{name} at {width:g}: the switched network's time over the narrow one's",
                      statistics.median(one / other for one, other in pairs[2:]), unit="x")
        with tempfile.TemporaryDirectory() as folder:
            save_file({k: v.contiguous() for k, v in net.state_dict().items()}, f"{folder}/all.safetensors")
            whole = Path(f"{folder}/all.safetensors").stat().st_size
            apart = 0
            for width in net.widths:
                path = Path(f"{folder}/{width}.safetensors")
                save_file({k: v.contiguous() for k, v in net.narrow(width).state_dict().items()}, path)
                apart += path.stat().st_size
        sheet.add(f"{name}: one file of four widths, of four files", 100 * whole / apart, unit="%", bar="<= 55",
                  paper="about 50")


def _ms(net: Any, x: torch.Tensor) -> float:
    began = time.perf_counter()
    net(x)
    return 1e3 * (time.perf_counter() - began)


def table2(args: argparse.Namespace, sheet: Sheet) -> None:
    """Slimmable against independent networks, of equal steps."""
    ours: dict[float, list[float]] = {width: [] for width in WIDTHS}
    for seed in args.seeds:
        together = slimmable(args, seed)
        for width in sorted(WIDTHS):
            alone = independent(args, seed, width)
            sheet.add(f"seed {seed}, {width:g}: alone", alone, unit="% mIoU", paper=PAPER_MIOU[width][0])
            sheet.add(f"seed {seed}, {width:g}: slimmable", together[width], unit="% mIoU", paper=PAPER_MIOU[width][1])
            ours[width].append(together[width] - alone)
    for width, gains in ours.items():
        error = f" (s.e. {statistics.stdev(gains) / len(gains) ** 0.5:.2f})" if len(gains) > 1 else ""
        sheet.add(f"{width:g}: slimmable over alone, mean of {len(gains)}{error}", statistics.mean(gains),
                  unit="points", bar=">= 0", paper=round(PAPER_MIOU[width][1] - PAPER_MIOU[width][0], 1))
    most = statistics.mean(ours[0.25]) - max(statistics.mean(gains) for gains in ours.values())
    sheet.add("the gain at 0.25 less the largest gain", most, unit="points", bar=">= 0", paper=0)


def table3(args: argparse.Namespace, sheet: Sheet) -> None:
    """With and without distillation, and each of the boundary's losses; in order at the narrowest width."""
    paper = {("seg", None): 71.82, ("seg + b", None): 73.08, ("seg + g", None): 72.49, ("seg + b + g", None): 73.63,
             ("seg", "prev"): 71.94, ("seg + b", "prev"): 73.12, ("seg + g", "prev"): 72.94,
             ("seg + b + g", "prev"): 74.40}
    reached = {}
    for (losses, teacher), theirs in paper.items():
        reached[losses, teacher] = _mean(args, losses, teacher)
        sheet.add(f"{losses}, teacher {teacher}, at 0.25", reached[losses, teacher], unit="% mIoU", paper=theirs)
    for losses in LOSSES:
        sheet.add(f"{losses}: distillation over labels at 0.25", reached[losses, "prev"] - reached[losses, None],
                  unit="points", bar=">= 0", paper=round(paper[losses, "prev"] - paper[losses, None], 2))
    for teacher in (None, "prev"):
        for more, less in (("seg + b", "seg"), ("seg + g", "seg"), ("seg + b + g", "seg + b"),
                           ("seg + b + g", "seg + g")):
            sheet.add(f"teacher {teacher}: {more} over {less} at 0.25", reached[more, teacher] - reached[less, teacher],
                      unit="points", bar=">= 0", paper=round(paper[more, teacher] - paper[less, teacher], 2))


def table4(args: argparse.Namespace, sheet: Sheet) -> None:
    """Who teaches: the next wider width is best at the narrowest."""
    paper = {None: 73.63, "prev": 74.40, "largest": 73.64, "mean": 73.24, "larger": 73.25}
    reached = {}
    for teacher, theirs in paper.items():
        reached[teacher] = _mean(args, "seg + b + g", teacher)
        sheet.add(f"teacher {teacher}, at 0.25", reached[teacher], unit="% mIoU", paper=theirs)
    for teacher in paper:
        if teacher != "prev":
            sheet.add(f"prev over {teacher} at 0.25", reached["prev"] - reached[teacher], unit="points", bar=">= 0",
                      paper=round(paper["prev"] - paper[teacher], 2))


def _mean(args: argparse.Namespace, losses: str, teacher: str | None) -> float:
    return statistics.mean(slimmable(args, seed, losses, teacher)[0.25] for seed in args.seeds)


PARTS = {"costs": costs, "clock": clock, "switch": switch, "table2": table2, "table3": table3, "table4": table4}

if __name__ == "__main__":
    main()

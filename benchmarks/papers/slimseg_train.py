"""Networks and trainings behind ``slimseg.py``: every run is resumable and lies under ``--work``.

The paper's rows are 100,000 steps of crops of 768x768 on two GPUs. Two cores have time for a hundredth of that, in
which narrow widths learn little from the soft answers of wider ones that know little themselves (docs/LOG.md). So
all rows start from one trained network, as a user's would (``--start``): scenes, which stand for ImageNet, then
CamVid. Both sides of a comparison start from its slices and see the same number of steps. ``--start nothing`` is the
other regime.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import offramp  # noqa: E402
from offramp.data import camvid, load_data  # noqa: E402
from offramp.data.base import Prepare  # noqa: E402
from offramp.functional.metrics import mean_iou  # noqa: E402
from offramp.models import load_model  # noqa: E402
from offramp.nn.slim import Slimmable  # noqa: E402
from offramp.table import ExitTable  # noqa: E402
from offramp.train.augment import scale_crop_flip  # noqa: E402

WIDTHS = (0.25, 0.5, 0.75, 1.0)
LOSSES = {"seg": (0.0, 0.0), "seg + b": (1.0, 0.0), "seg + g": (0.0, 1.0), "seg + b + g": (1.0, 1.0)}
"""Table 3's rows: weights of the boundary's loss, times ``--boundary-weight``, and of the guided one."""


def size_of(args: argparse.Namespace) -> tuple[int, int]:
    high, wide = args.size.split("x")
    return int(high), int(wide)


def splits(args: argparse.Namespace) -> tuple[Any, Any]:
    """(to train on, to judge on)."""
    if args.on == "camvid":
        rows = camvid(args.data / "camvid", prepare=Prepare(size=size_of(args)))
        train, held = rows.split("train"), torch.utils.data.ConcatDataset([rows.split("calibration"),
                                                                           rows.split("test")])
    else:
        train = load_data(f"scenes?n={args.scenes}&size={args.size}&seed=0").split("train")
        held = load_data(f"scenes?n=300&size={args.size}&seed=99").split("train")
    if args.quick:
        train, held = torch.utils.data.Subset(train, range(16)), torch.utils.data.Subset(held, range(8))
    return train, held


def fresh(args: argparse.Namespace, seed: int) -> nn.Module:
    """The network that a row starts from; what is drawn in training follows from the seed anyway."""
    torch.manual_seed(seed)
    net = load_model(f"offramp:{args.network}?num_classes=11")
    if args.start == "trained":
        net.load_state_dict(safetensors.torch.load_file(start(args)))
    return net


def start(args: argparse.Namespace) -> Path:
    """Weights of the whole network, by AdamW: few steps from far away are slow with SGD at the paper's rate."""
    folder = args.work / f"start-{args.network}-{args.size}"
    path = folder / f"{args.on}.safetensors"
    if not path.is_file():
        torch.manual_seed(0)
        net = load_model(f"offramp:{args.network}?num_classes=11")
        args = argparse.Namespace(**{**vars(args), "radius": 3, "ohem": True})  # one start for all rows
        for on, epochs in (("scenes", 12), ("camvid", 40))[:2 if args.on == "camvid" else 1]:
            how = replace(recipe(args, net, 0, "seg", None), epochs=1 if args.quick else epochs, optimiser="adamw",
                          lr=1e-3, weight_decay=0.02, schedule="cosine", warmup=0.05, clip=1.0)
            train, _ = splits(argparse.Namespace(**{**vars(args), "on": on}))
            offramp.fit(net, train, how, run_dir=folder / on, device=args.device, checkpoint_every=50,
                        progress=args.progress)
        safetensors.torch.save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    return path


def slimmed(args: argparse.Namespace, seed: int) -> Slimmable:
    example = torch.randn(2, 3, *size_of(args), generator=torch.Generator().manual_seed(0))
    return offramp.slim_(fresh(args, seed), WIDTHS, example_inputs=example)


def recipe(args: argparse.Namespace, net: nn.Module, seed: int, losses: str, teacher: str | None) -> offramp.Recipe:
    """The paper's 4.2, but for the size of crops and the number of steps."""
    boundary, guided = LOSSES[losses]
    weights = boundary * args.boundary_weight, guided
    high, wide = size_of(args)
    crop = (high * 3 // 4 // 8 * 8, wide * 3 // 4 // 8 * 8)
    return offramp.recipes.slim(
        epochs=args.epochs, boundary=net.low_level if weights[0] else None, weights=weights, distill=teacher,
        ohem=args.ohem, radius=args.radius, lr=args.lr, batch_size=8, seed=seed,
        augment_pair=scale_crop_flip(crop=crop))


def trained(args: argparse.Namespace, name: str, net: nn.Module, how: offramp.Recipe) -> dict[float, float]:
    """mIoU in % at each width, of a run that is made or found."""
    kind = f"{args.on}-{args.network}-{args.size}-{args.epochs}-{args.precision}-from-{args.start}"
    folder = args.work / kind / name
    train, held = splits(args)
    if not (folder / "table" / "table.json").is_file():
        offramp.fit(net, train, how, run_dir=folder, device=args.device, checkpoint_every=50, progress=args.progress,
                    precision=None if args.precision == "fp32" else "bf16")
        slim = net if isinstance(net, Slimmable) else offramp.attach(
            net, torch.randn(2, 3, *size_of(args)), exits=0)
        offramp.record(slim, torch.utils.data.DataLoader(held, batch_size=8), split="held", device=args.device,
                       latency=False, confidences=("top",)).save(folder / "table")
    table = ExitTable.load(folder / "table")
    assert table.confusion is not None
    reached = mean_iou(table.confusion.sum(0))
    return {column.width: 100 * float(value) for column, value in zip(table.columns, reached, strict=True)}


def slimmable(args: argparse.Namespace, seed: int, losses: str = "seg + b + g", teacher: str | None = "prev"
              ) -> dict[float, float]:
    """All widths together (Algorithm 1)."""
    net = slimmed(args, seed)
    how = recipe(args, net.backbone, seed, losses, teacher)
    return trained(args, f"slim-{losses.replace(' ', '')}{_how(args, losses)}-{teacher}-seed{seed}", net, how)


def independent(args: argparse.Namespace, seed: int, width: float) -> float:
    """One width alone, by the same losses, from labels."""
    net = slimmed(args, seed)
    made = net.narrow(width)
    how = recipe(args, net.backbone, seed, "seg + b + g", None)
    return trained(args, f"alone-{width:g}{_how(args, 'seg + b + g')}-seed{seed}", made, how)[1.0]


def _how(args: argparse.Namespace, losses: str) -> str:
    """What differs from the paper, in the names of those runs that read it."""
    boundary, guided = LOSSES[losses]
    weight = f"-w{args.boundary_weight:g}" if boundary and args.boundary_weight != 10 else ""
    radius = f"-r{args.radius}" if (boundary or guided) and args.radius != 3 else ""
    return radius + weight + "-easy" * (not args.ohem)

"""ADP-C's Table 2 (arXiv:2104.00749, 4.2): poses by an HRNet with four exits, plain, redesigned, and masked by value.

    python benchmarks/papers/adpc_pose.py                          # stick figures, a small network: an hour of a core
    python benchmarks/papers/adpc_pose.py --data mpii/ --network hrnet_w32 --size 256x256 --epochs 210 --batch 128
    python benchmarks/papers/adpc_pose.py --quick                  # minutes; its figures mean nothing

Rows are trained alike, one after another, from one start: the network alone; with plain exits; with redesigned ones;
these masked where the largest value is below 0.002, from epoch 10 on. PCKh@0.5 is of splits that no row has seen, by
the flip test, as the paper's. Every run is resumable and lies under ``--work``. On the small scale of figures the
paper's numbers are for orientation; its MACs are convolutions' alone, in units of 2^30, ours all, in 1e9.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import offramp  # noqa: E402
from claims import Sheet  # noqa: E402
from offramp.data import JOINT_PAIRS, Poses, load_data, pose_change  # noqa: E402
from offramp.functional.poses import decode, mirrored_back  # noqa: E402
from offramp.models import HRNetPose  # noqa: E402
from offramp.nn.masked import Masked  # noqa: E402
from offramp.prices import costs_of  # noqa: E402

PAPER = {"single": (90.33, None, 9.49, None), "plain": (90.31, 74.60, 9.51, 4.73), "RH": (90.26, 79.16, 9.55, 4.76),
         "RH + CA": (90.20, 79.04, 3.88, 2.44)}
"""PCKh@0.5 at the last exit and on average, MACs / 2^30 likewise."""
SWEEP = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, help="MPII as HRNet's authors lay it out; nothing for stick figures")
    options.add_argument("--network", default="hrnet_w18_small", help="of timm's HRNets")
    options.add_argument("--pretrained", default="", help="a file of timm's ImageNet weights of that network")
    options.add_argument("--size", default="64x64")
    options.add_argument("--figures", type=int, default=2000, help="to train on; as many to judge on as --held says")
    options.add_argument("--held", type=int, default=500)
    options.add_argument("--epochs", type=int, default=50)
    options.add_argument("--mask-from", type=int, default=10)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--channels", type=int, default=64, help="of redesigned exits")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--rows", nargs="+", default=list(PAPER), choices=list(PAPER))
    options.add_argument("--device", default="cpu")
    options.add_argument("--work", type=Path, default=Path("runs/adpc_pose"))
    options.add_argument("--progress", action="store_true")
    options.add_argument("--quick", action="store_true")
    args = options.parse_args()
    if args.quick:
        args.work, args.figures, args.held, args.epochs, args.mask_from = args.work / "quick", 32, 16, 2, 1
    table(args, Sheet(f"adpc-pose-{'mpii' if args.data else 'figures'}" + "-quick" * args.quick))


def table(args: argparse.Namespace, sheet: Sheet) -> None:
    """Table 2, and what other thresholds would do to the trained masked network."""
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in args.rows}
    for seed in args.seeds:
        for row in args.rows:
            made = measured(args, row, seed)
            found[row].append(made)
            last, mean, last_macs, mean_macs = PAPER[row]
            scores, macs = made["pckh"], [count / 1e9 for count in made["macs"]]
            for exit_, (score, cost) in enumerate(zip(scores, macs, strict=True), 1):
                sheet.add(f"{row}, seed {seed}, exit {exit_}: PCKh@0.5", 100 * score, unit="%",
                          paper=last if exit_ == len(scores) else None)
                sheet.add(f"{row}, seed {seed}, exit {exit_}: MACs", cost, unit="G",
                          paper=last_macs if exit_ == len(scores) else None)
            if row != "single":
                sheet.add(f"{row}, seed {seed}: PCKh@0.5, mean of exits", 100 * statistics.mean(scores), unit="%",
                          paper=mean)
                sheet.add(f"{row}, seed {seed}: MACs, mean of exits", statistics.mean(macs), unit="G", paper=mean_macs)
            for threshold, (score, cost) in made.get("sweep", {}).items():
                sheet.add(f"{row}, seed {seed}, run at {threshold}: PCKh@0.5, last exit", 100 * score, unit="%")
                sheet.add(f"{row}, seed {seed}, run at {threshold}: MACs, last exit", cost / 1e9, unit="G")

    def mean_of(row: str, what: str, early: bool = False) -> float:
        return statistics.mean(statistics.mean(m[what]) if early else m[what][-1] for m in found[row])

    if {"plain", "RH"} <= set(args.rows):
        sheet.add("redesigned over plain exits, mean of exits", 100 * (mean_of("RH", "pckh", True)
                  - mean_of("plain", "pckh", True)), unit="points", bar=">= 0", paper=4.56)
    if {"single", "RH + CA"} <= set(args.rows):
        sheet.add("RH + CA: last exit over the network alone", 100 * (mean_of("RH + CA", "pckh")
                  - mean_of("single", "pckh")), unit="points", bar=">= -0.5", paper=-0.13)
        sheet.add("RH + CA: MACs saved against the network alone", 100 * (1 - mean_of("RH + CA", "macs")
                  / mean_of("single", "macs")), unit="%", bar=">= 40", paper=59.1)


def size_of(args: argparse.Namespace) -> tuple[int, int]:
    high, wide = args.size.split("x")
    return int(high), int(wide)


def splits(args: argparse.Namespace) -> tuple[Poses, Poses]:
    """(to train on, to judge on)."""
    if args.data:
        source = load_data(f"mpii:{args.data}", size=size_of(args))
        train, held = source.split("train", augment=pose_change()), source.split("valid")
    else:
        spec = f"figures?size={args.size}&sigma=1&n="
        train = load_data(f"{spec}{args.figures}", "train", augment=pose_change())
        held = load_data(f"{spec}{2 * args.held}", "test")
    assert isinstance(train, Poses) and isinstance(held, Poses)
    return train, held


def network(args: argparse.Namespace, row: str, seed: int) -> torch.nn.Module:
    """Heatmaps begin near zero, as the authors' do, whose layers start with a deviation of 0.001."""
    torch.manual_seed(seed)
    guest = HRNetPose(args.network, 16, pretrained=args.pretrained or False)
    heads = (offramp.redesigned(guest.ends, args.channels) if row.startswith("RH") else
             dict.fromkeys(guest.ends, offramp.RedesignedSpec(down=0, channels=0, finest=True)))
    net = offramp.attach(guest, torch.zeros(2, 3, *size_of(args)), exits=() if row == "single" else guest.ends,
                         heads=heads, keep_costly=True)
    for last in (guest.final_layer, *(head.last for head in net.heads.modules() if hasattr(head, "last"))):
        torch.nn.init.normal_(last.weight, std=0.001)
        torch.nn.init.zeros_(last.bias)
    return offramp.mask_(net, confidence="value") if row.endswith("CA") else net


def measured(args: argparse.Namespace, row: str, seed: int) -> dict[str, Any]:
    """PCKh and MACs of each exit, of a run that is made or found."""
    kind = f"{'mpii' if args.data else f'figures{args.figures}'}-{args.network}-{args.size}-{args.epochs}-{args.lr:g}"
    folder = args.work / kind / f"{row.replace(' ', '')}-seed{seed}"
    kept = folder / "measured.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    (train, held), net = splits(args), network(args, row, seed)
    how = replace(offramp.recipes.anytime(epochs=args.epochs, says="heatmaps", mask_from=args.mask_from, lr=args.lr,
                                          batch_size=args.batch, weight_decay=1e-4, seed=seed),
                  optimiser="adamw", schedule="cosine")
    offramp.fit(net, train, how, run_dir=folder, device=args.device, checkpoint_every=50, progress=args.progress)
    net.to(args.device).eval()
    scores, macs = judged(net, held, args)
    made: dict[str, Any] = {"pckh": scores, "macs": macs}
    if isinstance(net, Masked):
        made["sweep"] = {}
        for threshold in SWEEP:
            net.threshold = threshold
            scores, macs = judged(net, held, args)
            made["sweep"][str(threshold)] = scores[-1], macs[-1]
    part = kept.with_suffix(".part")
    part.write_text(json.dumps(made))
    part.replace(kept)
    return made


def judged(net: Any, held: Poses, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """PCKh@0.5 of each exit by the flip test, and the mean MACs of one pass up to it."""
    points: list[list[Tensor]] = []
    spent: list[Tensor] = []
    masked = net if isinstance(net, Masked) else None
    for first in range(0, len(held), args.batch):
        x = torch.stack([held[i][0] for i in range(first, min(first + args.batch, len(held)))]).to(args.device)
        with torch.no_grad():
            if masked is not None:
                answers, macs = masked.counted(x)
                said, mirrored = answers.logits, masked(x.flip(-1))
                spent.append(macs.double().mean(0) * len(x))
            else:
                said, mirrored = net(x), net(x.flip(-1))
        points.append([decode((one + mirrored_back(other, JOINT_PAIRS)) / 2)[0].cpu()
                       for one, other in zip(said, mirrored, strict=True)])
    scores = [held.pckh(torch.cat(column)).mean for column in zip(*points, strict=True)]
    if masked is not None:
        return scores, (torch.stack(spent).sum(0) / len(held)).tolist()
    costs = costs_of(net)
    return scores, [float(macs + heads) for macs, heads in zip(costs.macs, accumulate(costs.head_macs), strict=True)]


if __name__ == "__main__":
    main()

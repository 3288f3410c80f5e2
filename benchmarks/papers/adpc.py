"""ADP-C's tables: counts of MACs, redesigned heads, masks that are trained with, and which masks: paper | ours.

    python benchmarks/papers/adpc.py --part macs                          # HRNet-W48, W18 and poses: a minute
    python benchmarks/papers/adpc.py --part train --on camvid --data ../shared/data --seeds 0 1 2
    python benchmarks/papers/adpc.py --part criteria --part heads --on camvid
    python benchmarks/papers/adpc.py --quick                              # checks the path, not the figures
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from adpc_train import ROWS, Reached, masked, reached, thresholds_for, trained  # noqa: E402

import offramp  # noqa: E402
from claims import Sheet  # noqa: E402
from offramp.cost.macs import MacCounter  # noqa: E402
from offramp.models import load_model  # noqa: E402

MACS = {  # convolutions up to each exit: in units of 2^30, as the paper prints them, and of 1e9
    ("hrnet_w48", "plain"): ((48.44, 113.46, 388.88, 722.20), (52.0, 121.8, 417.6, 775.5)),
    ("hrnet_w48", "RH"): ((41.92, 105.56, 368.03, 701.35), (45.0, 113.4, 395.2, 753.1)),
    ("hrnet_w18_small", "plain"): ((31.44, 42.56, 59.53, 82.88), (33.8, 45.7, 63.9, 89.0)),
    ("hrnet_w18_small", "RH"): ((23.69, 34.74, 49.87, 73.23), (25.4, 37.3, 53.6, 78.6)),
}
POSES = {"alone": (9.49, None), "plain": (9.51, 4.73), "RH": (9.55, 4.76)}
"""Table 2: (the last exit's, the mean of all exits')."""
TABLE1 = {"alone": ((80.7,), (696.2,)), "EE": ((34.3, 59.0, 76.9, 80.4), (48.4, 113.4, 388.9, 722.2)),
          "RH": ((44.6, 60.2, 76.6, 79.9), (41.9, 105.6, 368.0, 701.3)),
          "RH + CA": ((44.3, 60.1, 76.8, 81.3), (41.9, 93.9, 259.3, 387.1))}
"""HRNet-W48 on Cityscapes: mIoU in %, and MACs in 2^30."""
TRIED = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
"""Thresholds for masks, one of which is chosen on the calibration split."""
SHARES = (0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
"""Of places that exits settle, in Fig. 7's order of criteria."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument("--on", choices=("scenes", "camvid"), default="scenes", help="what is trained on")
    options.add_argument("--work", type=Path, default=Path("runs/adpc"), help="weights, logs and tables")
    options.add_argument("--part", choices=sorted(PARTS), action="append", help="several may be given; all by default")
    options.add_argument("--network", default="hrnet_w48/3", help="that is trained; /3: with a third of its channels")
    options.add_argument("--size", default="96x128", help="of the pictures that are trained on")
    options.add_argument("--start-size", help="of the pictures that the start was trained on; --size by default")
    options.add_argument("--halvings", type=int, nargs=3, default=ROWS["RH"],
                         help="of redesigned heads: 3 2 1 in the paper, on sides ten times as long")
    options.add_argument("--scenes", type=int, default=600, help="pictures to draw and to train on")
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--start", choices=("trained", "nothing"), default="trained", help="what the rows start from")
    options.add_argument("--threshold", type=float, default=0.998, help="of the masks that are trained with")
    options.add_argument("--lr", type=float, default=0.01)
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--device", default="cpu")
    options.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the training passes")
    options.add_argument("--progress", action="store_true")
    options.add_argument("--quick", action="store_true")
    args = options.parse_args()
    if args.quick:
        args.work, args.epochs, args.size, args.scenes = args.work / "quick", 1, "64x96", 16
        args.network = "hrnet_w18_small/2"
    for part in args.part or PARTS:
        where = "" if part == "macs" else f"-{args.on}-{args.size}"
        PARTS[part](args, Sheet(f"adpc-{part}{where}" + "-quick" * args.quick))


def counted(name: str, heads: str | None, size: tuple[int, int]) -> list[int]:
    """MACs of convolutions up to each exit and the end, heads on the way included.

    Counted on small pictures of the same shape, of which all sides that occur are whole parts: times the area, exactly.
    """
    guest: Any = load_model(f"offramp:{name}")
    pose = name.endswith("pose")
    specs = {"RH": offramp.redesigned(guest.ends, 128 if "w48" in name else 64), "plain": {
        end: offramp.RedesignedSpec(down=0, channels=0 if pose else None, finest=pose) for end in guest.ends}}
    few = torch.zeros(1, 3, 64, 64 * size[1] // size[0])
    net = offramp.attach(guest, few, exits=guest.ends if heads else 0, heads=specs[heads] if heads else None).eval()
    counter, found = MacCounter(), []
    with torch.no_grad(), counter:
        state: Any = net.begin(few)
        for k in range(len(net.stages)):
            state, _ = net.step(k, state)
            found.append(counter.macs().by_op["convolution"] * (size[0] // 64) ** 2)
    return found


def macs(args: argparse.Namespace, sheet: Sheet) -> None:
    """What every exit costs at 1024x2048, and a pose at 256x256, to the last digit that is printed."""
    for (name, kind), (binary, decimal) in MACS.items():
        if args.quick and name == "hrnet_w48":
            continue
        got = counted(name, kind, (1024, 2048))
        for k, count in enumerate(got):
            sheet.add(f"{name}, {kind}, exit {k + 1}: MACs", count / 2**30, unit="2^30", paper=binary[k])
            sheet.add(f"{name}, {kind}, exit {k + 1}: MACs", count / 1e9, unit="1e9", paper=decimal[k])
        off = max(abs(round(count / 2**30, 2) - theirs) for count, theirs in zip(got, binary, strict=True))
        sheet.add(f"{name}, {kind}: largest difference from the paper's, rounded alike", off, unit="2^30",
                  bar="<= 0.001")
    for kind, (last, mean) in POSES.items():
        got = counted("hrnet_w32_pose", None if kind == "alone" else kind, (256, 256))
        sheet.add(f"hrnet_w32_pose, {kind}: MACs", got[-1] / 2**30, unit="2^30", paper=last)
        off = abs(round(got[-1] / 2**30, 2) - last)
        if mean is not None:
            average = sum(got) / len(got) / 2**30
            sheet.add(f"hrnet_w32_pose, {kind}, mean of all exits: MACs", average, unit="2^30", paper=mean)
            off = max(off, abs(round(average, 2) - mean))
        sheet.add(f"hrnet_w32_pose, {kind}: largest difference from the paper's, rounded alike", off, unit="2^30",
                  bar="<= 0.001")


def train(args: argparse.Namespace, sheet: Sheet) -> None:
    """Table 1: redesigned heads lift early exits, masks keep the last answer at fewer MACs."""
    lifts: list[list[float]] = [[], []]
    dearer: list[list[float]] = [[], []]
    drops: dict[str, list[float]] = {"trained": [], "chosen": []}
    saved: dict[str, list[float]] = {"trained": [], "chosen": []}
    for seed in args.seeds:
        rows = {}
        for row in TABLE1:
            net = trained(args, row, seed)
            rows[row] = reached(args, net, row, seed, "test")
            show(sheet, f"seed {seed}, {row}", rows[row], TABLE1[row])
        for k in range(2):
            lifts[k].append(rows["RH"].miou[k] - rows["EE"].miou[k])
            dearer[k].append(100 * (rows["RH"].macs[k] / rows["EE"].macs[k] - 1))
        # on pictures that are neither trained nor judged on: the highest saving that costs no more than 0.2 points
        wanted = reached(args, trained(args, "alone", seed), "alone", seed, "calibration").miou[-1] - 0.2
        tried = {}
        for threshold in sorted({*TRIED, args.threshold}):
            net.threshold = threshold
            tried[threshold] = reached(args, net, "RH + CA", seed, "calibration")
        good = [threshold for threshold in sorted(tried, reverse=True) if tried[threshold].miou[-1] >= wanted]
        net.threshold = min(good, key=lambda threshold: tried[threshold].macs[-1], default=args.threshold)
        chosen = reached(args, net, "RH + CA", seed, "test")
        show(sheet, f"seed {seed}, RH + CA at {net.threshold:g}, chosen on calibration", chosen, ((), ()))
        for how, at in (("trained", rows["RH + CA"]), ("chosen", chosen)):
            drops[how].append(rows["alone"].miou[-1] - at.miou[-1])
            saved[how].append(100 * (1 - at.macs[-1] / rows["alone"].macs[-1]))
    for k, (lift, dear) in enumerate(zip(lifts, dearer, strict=True)):
        theirs = TABLE1["RH"][0][k] - TABLE1["EE"][0][k]
        sheet.add(f"exit {k + 1}: RH over EE, {of(lift)}", statistics.mean(lift), unit="points", bar=">= 0",
                  paper=round(theirs, 1))
        sheet.add(f"exit {k + 1}: what RH costs more than EE", statistics.mean(dear), unit="%", bar="<= 0",
                  paper=round(100 * (TABLE1["RH"][1][k] / TABLE1["EE"][1][k] - 1), 1))
    for how in drops:
        rule = f"{args.threshold:g}, as trained with" if how == "trained" else "the threshold chosen on calibration"
        judged = how == "chosen"
        sheet.add(f"RH + CA at {rule}: what the last exit loses, {of(drops[how])}", statistics.mean(drops[how]),
                  unit="points", bar="<= 0.2" if judged else "", paper=-0.6)
        sheet.add(f"RH + CA at {rule}: fewer MACs than the network alone, {of(saved[how])}",
                  statistics.mean(saved[how]), unit="%", bar=">= 40" if judged else "", paper=44.4)


def show(sheet: Sheet, what: str, at: Reached, paper: tuple[Sequence[float], Sequence[float]]) -> None:
    for k, (miou, cost) in enumerate(zip(at.miou, at.macs, strict=True)):
        theirs = [column[k] if column else None for column in paper]
        exit_ = f"exit {k + 1}" if len(at.miou) > 1 else "its end"
        sheet.add(f"{what}, {exit_}: mIoU", miou, unit="%", paper=theirs[0])
        sheet.add(f"{what}, {exit_}: MACs", cost / 1e6, unit="M", paper=theirs[1])


def of(values: Sequence[float]) -> str:
    error = f" (s.e. {statistics.stdev(values) / len(values) ** 0.5:.2f})" if len(values) > 1 else ""
    return f"mean of {len(values)}{error}"


def criteria(args: argparse.Namespace, sheet: Sheet) -> None:
    """Fig. 7, masks at inference alone: all confidences far above chance, thresholds above shares, entropy above top.

    Its axes are means over the exits. Curves are held against each other at equal MACs, where all of them reach; the
    last exit's alone are shown beside.
    """
    gaps: dict[tuple[str, str], list[float]] = {}
    lasts: dict[tuple[str, str], list[float]] = {}
    for seed in args.seeds:
        net: Any = trained(args, "RH", seed)
        curves: dict[str, list[Reached]] = {}
        for name, confidence in (("top", "top"), ("entropy", "entropy"), ("top share", "top"), ("random", "random")):
            by_share = name in ("top share", "random")
            shares = SHARES[1::3] if args.quick else SHARES
            for level in shares if by_share else thresholds_for(args, net, confidence, shares):
                rule = {"share" if by_share else "threshold": level}
                at = masked(args, net, "RH", seed, confidence=confidence, **rule)
                curves.setdefault(name, []).append(at)
                cost, miou = at.means
                sheet.add(f"seed {seed}, {name} {level:.4f}, mean of all exits: mIoU at {cost / 1e6:.1f} M", miou,
                          unit="%")
        for better, worse in (("top", "random"), ("entropy", "random"), ("top share", "random"), ("top", "top share"),
                              ("entropy", "top")):
            half = (better, worse) == ("entropy", "top")
            gaps.setdefault((better, worse), []).append(gap(curves, better, worse, low=half))
            lasts.setdefault((better, worse), []).append(gap(curves, better, worse, last=True, low=half))
    for (better, worse), found in gaps.items():
        where = "at equal MACs, the fewer half of them" if (better, worse) == ("entropy", "top") else "at equal MACs"
        sheet.add(f"{better} over {worse} {where}, mean of all exits, {of(found)}", statistics.mean(found),
                  unit="points", bar=">= 0", paper="above")
        sheet.add(f"{better} over {worse} {where}, the last exit", statistics.mean(lasts[better, worse]),
                  unit="points")


def gap(curves: dict[str, list[Reached]], better: str, worse: str, *, last: bool = False, low: bool = False) -> float:
    """Mean mIoU of one curve over another's, on the MACs that all curves span (``low``: the fewer half of these)."""
    lines = {}
    for name, points in curves.items():
        lines[name] = np.array(sorted((at.macs[-1], at.miou[-1]) if last else at.means for at in points)).T
    least, most = max(line[0][0] for line in lines.values()), min(line[0][-1] for line in lines.values())
    most = (least + most) / 2 if low else most
    at = np.linspace(least, most, 50)
    one, other = (np.interp(at, *lines[name]) for name in (better, worse))
    return float((one - other).mean())


def heads(args: argparse.Namespace, sheet: Sheet) -> None:
    """Fig. 6: halving the map N - i times before exit i is best at every exit."""
    found: dict[str, list[Reached]] = {}
    args = argparse.Namespace(**{**vars(args), "halvings": ROWS["RH"]})
    for seed in args.seeds:
        for row in ("RH", "D = 1/1/1", "D = 3/3/3"):
            found.setdefault(row, []).append(reached(args, trained(args, row, seed), row, seed, "test"))
            show(sheet, f"seed {seed}, D = {'/'.join(map(str, ROWS[row] or ()))}", found[row][-1], ((), ()))
    for row in ("D = 1/1/1", "D = 3/3/3"):
        for k in range(4):
            gains = [ours.miou[k] - theirs.miou[k] for ours, theirs in zip(found["RH"], found[row], strict=True)]
            sheet.add(f"exit {k + 1}: D = 3/2/1 over {row}, {of(gains)}", statistics.mean(gains), unit="points",
                      bar=">= 0", paper="above")


PARTS = {"macs": macs, "train": train, "criteria": criteria, "heads": heads}

if __name__ == "__main__":
    main()

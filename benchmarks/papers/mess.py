"""MESS on CamVid at 240x320: paper | ours.

    python benchmarks/papers/mess.py --data ../shared/data --part table5     # each part is resumable under --work
    python benchmarks/papers/mess.py --data ../shared/data --part table6
    python benchmarks/papers/mess.py --data ../shared/data --quick           # checks the path, not the figures

The paper's networks are ResNet-50s on COCO, ours a ResNet-18 and a MobileNetV2 dilated to 1/16; its figures stand
beside ours for their order, not for their size.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from mess_cascade import receptive_fields
from mess_choose import costs, fig4, table2, table3, table7  # noqa: E402
from mess_train import LOSSES, first_stage, quality, second_stage, stage  # noqa: E402

from claims import Sheet  # noqa: E402

PAPER5 = {  # mIoU of exits 1 to 6 (Table 5, DRN-50 on COCO)
    "final_only": (None, None, None, None, None, 59.02), "joint": (29.02, 40.67, 48.64, 51.69, 55.34, 58.33),
    "exit_aware": (28.21, 39.61, 47.13, 50.81, 56.11, 59.90), "frozen": (23.94, 31.50, 38.24, 44.73, 54.32, 59.02),
    "two_stage": (32.40, 43.34, 50.81, 53.73, 57.90, 59.90),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument("--work", type=Path, default=Path("runs/mess"), help="weights, logs and tables")
    options.add_argument("--part", choices=sorted(PARTS), action="append", help="several may be given; all by default")
    options.add_argument("--backbones", nargs="+", default=["resnet18", "mobilenetv2_100"])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--start-epochs", type=int, default=60, help="on CamVid, of all rows' start")
    options.add_argument("--epochs", type=int, default=12, help="of every end-to-end row")
    options.add_argument("--head-epochs", type=int, default=20, help="of every frozen row")
    options.add_argument("--space-epochs", type=int, default=6, help="of all heads of the space together")
    options.add_argument("--whole-space", action="store_true", help="64 heads a site instead of 48")
    options.add_argument("--one-head", action="store_true", help="Table 5's heads instead of the space")
    options.add_argument("--time-limit", type=float, default=300, help="seconds a search may take")
    options.add_argument("--views", type=int, default=2, help="augmented views whose features are cached")
    options.add_argument("--scenes", type=int, default=800, help="pictures that stand for ImageNet")
    options.add_argument("--scene-epochs", type=int, default=4)
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    options.add_argument("--progress", action="store_true")
    options.add_argument("--long", action="store_true", help="end-to-end rows for --start-epochs from scenes, by AdamW")
    options.add_argument("--quick", action="store_true", help="one seed, one epoch of everything, under another name")
    args = options.parse_args()
    if args.quick:
        args.seeds, args.epochs, args.head_epochs, args.scenes, args.scene_epochs = [0], 1, 1, 16, 1
        args.start_epochs, args.space_epochs = 1, 1
        args.backbones, args.views, args.work = args.backbones[:1], 1, args.work / "quick"
    torch.set_num_threads(args.threads)
    for part in args.part or PARTS:
        PARTS[part](args, Sheet(f"mess-{part}" + "-long" * args.long + "-one" * args.one_head + "-quick" * args.quick))


def table5(args: argparse.Namespace, sheet: Sheet) -> None:
    """Two stages against end to end and frozen, the same iterations and heads for every row."""
    backbone = args.backbones[0]
    rows: dict[str, list[list[float]]] = {row: [] for row in PAPER5}
    for seed in args.seeds:
        for row in ("final_only", "exit_aware", "joint"):
            net = first_stage(args, backbone, row, seed)
            rows[row].append(quality(args, net, stage(args, backbone, row, seed)))
            print(f"seed {seed}  {row:<12}", *(f"{v:6.2f}" for v in rows[row][-1]), flush=True)
        for name, row in (("frozen", "final_only"), ("two_stage", "exit_aware")):
            net = second_stage(args, backbone, row, seed, "frozen")
            rows[name].append(quality(args, net, f"{stage(args, backbone, row, seed)}-frozen-fcn"))
            print(f"seed {seed}  {name:<12}", *(f"{v:6.2f}" for v in rows[name][-1]), flush=True)
    for row, seeds in rows.items():
        for e, values in enumerate(zip(*seeds, strict=True)):
            if row != "final_only" or e == len(seeds[0]) - 1:
                sheet.add(f"{row}, exit {e + 1}: mIoU, mean of {len(values)} seeds", statistics.mean(values), unit="%",
                          paper=PAPER5[row][e])
    for e in range(len(rows["frozen"][0]) - 1):
        judge(sheet, f"two stages over frozen, exit {e + 1}", rows["two_stage"], rows["frozen"], e,
              PAPER5["two_stage"][e] - PAPER5["frozen"][e])
    judge(sheet, "two stages over end to end, last exit", rows["two_stage"], rows["joint"], -1, 1.57)
    judge(sheet, "two stages over the plain network, last exit", rows["two_stage"], rows["final_only"], -1, 0.88, "")


def table6(args: argparse.Namespace, sheet: Sheet) -> None:
    """What the heads learn from, on the exit-aware backbone: labels, and the final exit in three ways."""
    for backbone in args.backbones:
        rows: dict[str, list[list[float]]] = {loss: [] for loss in LOSSES}
        for seed in args.seeds:
            for loss in LOSSES:
                net = second_stage(args, backbone, "exit_aware", seed, loss)
                rows[loss].append(quality(args, net, f"{stage(args, backbone, 'exit_aware', seed)}-{loss}-fcn"))
                print(f"{backbone}  seed {seed}  {loss:<12}", *(f"{v:6.2f}" for v in rows[loss][-1]), flush=True)
        early = range(len(rows["mess"][0]) - 1)
        for loss, seeds in rows.items():
            for e in early:
                sheet.add(f"{backbone}, {loss}, exit {e + 1}: mIoU, mean of {len(seeds)} seeds",
                          statistics.mean(one[e] for one in seeds), unit="%")
        for loss in LOSSES[:-1]:
            for e in early:
                judge(sheet, f"{backbone}: PFD over {loss}, exit {e + 1}", rows["mess"], rows[loss], e)


def judge(sheet: Sheet, claim: str, ours: list[list[float]], theirs: list[list[float]], e: int,
          paper: float | None = None, bar: str = ">= 0") -> None:
    """The mean difference over seeds, and its standard error where there are several."""
    apart = [a[e] - b[e] for a, b in zip(ours, theirs, strict=True)]
    spread = f" (s.e. {statistics.stdev(apart) / len(apart) ** 0.5:.2f})" if len(apart) > 1 else ""
    sheet.add(claim + spread, statistics.mean(apart), unit="points", bar=bar, paper=paper)


PARTS = {"table5": table5, "table6": table6, "table2": table2, "table7": table7, "fig4": fig4, "costs": costs,
         "table3": table3, "fields": lambda args, sheet: receptive_fields(sheet)}

if __name__ == "__main__":
    main()

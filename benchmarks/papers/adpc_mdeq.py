"""ADP-C's control, Table 1: the solver's iterates of an equilibrium network as anytime predictions, beside exits.

    python benchmarks/papers/adpc_mdeq.py                  # scenes; trains both sides, or finds them under --work
    python benchmarks/papers/adpc_mdeq.py --alone          # the iterates alone
    python benchmarks/papers/adpc_mdeq.py --quick          # checks the path, not the figures

The paper's MDEQ stands to its HRNet-W48 as ours, of half the channels and expansion 2, to HRNet-W18-small: an
application costs 7 to 8 % of that network. Its figures are those of two applications for each iterate, ours of one.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from adpc import TABLE1  # noqa: E402
from adpc_train import ROWS, Reached, example, fit, reached, recipe, split_of, trained  # noqa: E402

import offramp  # noqa: E402
from claims import Sheet  # noqa: E402
from offramp.functional.metrics import mean_iou  # noqa: E402
from offramp.models import MDEQ  # noqa: E402
from offramp.table import ExitTable  # noqa: E402

PAPER = {1: (1.1, 227.2), 2: (1.1, 325.3), 4: (17.3, 521.6), 6: (38.7, 717.9), 8: (65.5, 914.2), 10: (72.4, 1110.5)}
"""MDEQ-small on Cityscapes, by iterate: mIoU in %, and MACs in 2^30 (Tables 1 and 3)."""
START_EPOCHS = 20
"""Of HRNet's start on scenes, by AdamW: the control sees as many steps as it and its exits together."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", type=Path, default=Path("runs/adpc"), help="weights, logs and tables")
    options.add_argument("--size", default="96x128", help="of the pictures")
    options.add_argument("--scenes", type=int, default=600, help="pictures to draw and to train on")
    options.add_argument("--epochs", type=int, default=20, help="of the exits; the control has 20 more")
    options.add_argument("--lr", type=float, default=0.01, help="of the exits")
    options.add_argument("--gradient-steps", type=int, default=0, help="of the implicit gradient; 0 takes one step's")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--device", default="cpu")
    options.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the training passes")
    options.add_argument("--alone", action="store_true", help="without the exits beside")
    options.add_argument("--progress", action="store_true")
    options.add_argument("--quick", action="store_true")
    args = options.parse_args()
    args.on, args.start, args.start_size, args.halvings = "scenes", "trained", None, ROWS["RH"]
    if args.quick:
        args.work, args.epochs, args.size, args.scenes = args.work / "quick", 1, "64x96", 16
    sheet = Sheet("adpc-mdeq" + "-quick" * args.quick)
    for seed in args.seeds:
        control = iterates(args, seed)
        for (k, paper), miou, macs in zip(PAPER.items(), control.miou, control.macs, strict=True):
            sheet.add(f"seed {seed}, MDEQ, iterate {k}: mIoU", miou, unit="%", paper=paper[0])
            sheet.add(f"seed {seed}, MDEQ, iterate {k}: MACs", macs / 1e6, unit="M", paper=paper[1])
        if not args.alone:
            beside(args, sheet, seed, control)


def iterates(args: argparse.Namespace, seed: int) -> Reached:
    """Of a control that is trained, or found."""
    torch.manual_seed(seed)
    net = MDEQ(11, channels=(16, 32, 64, 128), expansion=2, steps=10, gradient_steps=args.gradient_steps)
    epochs = 1 if args.quick else START_EPOCHS + args.epochs
    plain = offramp.recipes.slim(epochs=epochs, ohem=False, distill=None, seed=seed, batch_size=8,
                                 augment_pair=recipe(args, seed).augment_pair)
    how = replace(plain, optimiser="adamw", lr=2e-3, weight_decay=0.02, schedule="cosine", warmup=0.05, clip=1.0)
    folder = args.work / f"mdeq-{args.scenes}x{args.size}-{epochs}-{args.gradient_steps}-{args.precision}-seed{seed}"
    fit(args, net, how, folder, split_of(args, "train"))
    if not (folder / "test" / "table.json").is_file():
        made = offramp.attach(net, example(args), exits=net.exits(*[*PAPER][:-1]), heads=net.decoder)
        offramp.record(made, DataLoader(split_of(args, "test"), batch_size=8), split="test", device=args.device,
                       latency=False, confidences=("top",), agreement=False, boundary_errors=False
                       ).save(folder / "test")
    table = ExitTable.load(folder / "test")
    assert table.confusion is not None
    alone = [body + head for body, head in zip(table.costs.macs, table.costs.head_macs, strict=True)]
    return Reached(miou=tuple(100 * float(value) for value in mean_iou(table.confusion.sum(0))),
                   macs=tuple(map(float, alone)))  # each iterate with one head: its own


def beside(args: argparse.Namespace, sheet: Sheet, seed: int, control: Reached) -> None:
    """Each exit against the best iterate that costs no more, or the cheapest where none does."""
    for row in ("EE", "RH"):
        at = reached(args, trained(args, row, seed), row, seed, "test")
        for k, (miou, macs) in enumerate(zip(at.miou, at.macs, strict=True)):
            sheet.add(f"seed {seed}, {row}, exit {k + 1}: mIoU at {macs / 1e6:.1f} M MACs", miou, unit="%",
                      paper=TABLE1[row][0][k])
            within = [quality for quality, cost in zip(control.miou, control.macs, strict=True) if cost <= macs]
            rival = max(within, default=control.miou[0])
            what = "the best iterate for no more MACs" if within else "the first iterate, which costs more"
            sheet.add(f"seed {seed}, {row}, exit {k + 1} over {what}", miou - rival, unit="points", bar=">= 0",
                      paper="above")


if __name__ == "__main__":
    main()

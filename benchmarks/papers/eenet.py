"""EENet's schedules and ours on CIFAR-10 with a ResNet-56, and on dense tables: paper | ours.

    python benchmarks/papers/eenet.py --data ../shared/data                # about two hours on two cores, resumable
    python benchmarks/papers/eenet.py --data ../shared/data --part gains   # one part of it
    python benchmarks/papers/eenet.py --data ../shared/data --quick        # checks the path, not the figures

Three exits, trained on 20,000 labelled images; schedules are fitted on one half of 7,000 others and judged on the other
half. The paper's network is another ResNet-56 (bottlenecks, 93.90 %), its device too: losses are held against each
network's own.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from eenet_train import VARIANTS, adapted, candidates, corrupted, held, recorded, scenes, tables  # noqa: E402

import offramp  # noqa: E402
from claims import Sheet  # noqa: E402
from offramp.choose.guarantee import family, guarantee  # noqa: E402
from offramp.choose.stream import replay_stream  # noqa: E402
from offramp.errors import PlanError  # noqa: E402
from offramp.policies.cache import LearnedCache  # noqa: E402
from offramp.policies.eenet import EENet  # noqa: E402
from offramp.policies.mamlstop import MamlStop  # noqa: E402
from offramp.policies.pcee import Pcee  # noqa: E402
from offramp.policies.rules import Geometric, Pabee, Swept, TopShare  # noqa: E402
from offramp.policies.stopping import Stopping  # noqa: E402
from offramp.policies.switch import Switching  # noqa: E402
from offramp.runtime.bench import bench  # noqa: E402
from offramp.table import ExitTable  # noqa: E402

GAINS = {1.34: 0.06, 1.56: 1.00, 1.88: 5.00}
"""Speed gain -> points that EENet loses there (Table 1)."""
HELD_BACK = 1.005
ORDER = ("EENet", "MSDNet", "BranchyNet", "PABEE")
METHODS = {
    "EENet": EENet(), "MSDNet": Geometric(), "BranchyNet": Geometric(confidence="entropy"), "PABEE": Pabee(),
    "MAML-stop": MamlStop(), "Gati": LearnedCache(), "PCEE": Pcee(), "one threshold": Swept(), "top-k %": TopShare(),
    "ours": Stopping(),
}
ABLATIONS = {"EENet, scores alone": EENet(distribution="geometric"), "EENet, distribution alone": EENet(scores="top")}
TIGHT = ("0.45x", "0.5x", "0.55x", "0.6x")
ALL = (*TIGHT, "0.65x", "0.7x", "0.75x", "0.8x", "0.9x")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument("--work", type=Path, default=Path("runs/eenet2"), help="weights, logs and tables")
    options.add_argument("--part", choices=sorted(PARTS), action="append", help="several may be given; all by default")
    options.add_argument("--splits", type=int, default=10, help="halvings of the table that an order is averaged over")
    options.add_argument("--draws", type=int, default=1000, help="resamplings for the guarantee")
    options.add_argument("--device", default="cpu")
    options.add_argument("--progress", action="store_true")
    options.add_argument("--quick", action="store_true")
    args = options.parse_args()
    if args.quick:
        args.work, args.splits, args.draws = args.work / "quick", 1, 5
    for part in args.part or PARTS:
        PARTS[part](args, Sheet(f"eenet-{part}" + "-quick" * args.quick))


def exits(args: argparse.Namespace, sheet: Sheet) -> None:
    """Which two early exits pay in milliseconds: every pair of sites and heads, judged on the calibration half alone.

    By the points that one common threshold loses at the three gains; the first is what ``eenet_train.HEADS`` says.
    """
    fit = candidates(args).split_rows({"calibration": 0.5, "test": 0.5}, seed=0)["calibration"]
    whole = fit.costs.at(batch=1).dense_p50_ms
    ranked = []
    for one, other in itertools.combinations(fit.columns[:-1], 2):
        if one.site != other.site:
            table = fit.select([one.name, other.name])
            lost = [100 * _lost(table, whole / gain) for gain in GAINS]
            ranked.append((sum(lost), f"{one.name} and {other.name}", lost))
    for _, pair, lost in sorted(ranked)[:8]:
        for gain, points in zip(GAINS, lost, strict=True):
            sheet.add(f"{pair}: points lost at {gain}x, calibration half", points, unit="points")


def _lost(table: ExitTable, budget_ms: float) -> float:
    try:
        plan = offramp.schedule(table, Swept(), budget=budget_ms, unit="latency_ms")
    except PlanError:  # even the first exit costs more
        return 1.0
    return float(plan.predicted["drop"])


def gains(args: argparse.Namespace, sheet: Sheet) -> None:
    """Table 1's speed gains, in measured milliseconds: heads and policies counted, against the untouched network.

    Means over the halvings; the exits were chosen on the calibration half of the first. Half a percent of the time is
    held back, lest what is realised on test be over the budget.
    """
    for variant in VARIANTS:
        lost: dict[tuple[str, float], list[float]] = {}
        speed: dict[tuple[str, float], list[float]] = {}
        for halving in range(args.splits):
            fit, test = tables(args, variant, 0, halving)
            base = tables(args, "frozen", 0, halving)[1]
            right = float((base.logits[:, -1].argmax(-1) == base.labels).double().mean())
            whole = fit.costs.at(batch=1).dense_p50_ms
            found = offramp.compare(test, {"EENet": EENet(), "ours": Stopping()},
                                    [whole / gain / HELD_BACK for gain in GAINS], fit=fit, unit="latency_ms",
                                    limits=False, repeats=2)
            for name in ("EENet", "ours"):
                for gain, row in zip(GAINS, sorted(found.of(name), key=lambda one: -(one.budget or 0)), strict=True):
                    lost.setdefault((name, gain), []).append(100 * (right - row.quality))
                    speed.setdefault((name, gain), []).append(whole / row.realised)
        for (name, gain), points in lost.items():
            share, error = 1.0 if name == "EENet" else 0.5, ""
            if len(points) > 1:
                error = f" (sd {statistics.stdev(points):.2f})"
            about = f"{variant}, {name} at {gain}x, mean of {len(points)} halvings"
            sheet.add(f"{about}: points lost to the untouched network{error}", statistics.mean(points), unit="points",
                      bar=f"<= {share * GAINS[gain]:g}", paper=GAINS[gain])
            sheet.add(f"{about}: speed gain on test, by the table", statistics.mean(speed[name, gain]), unit="x",
                      bar=f">= {gain}")
        fit, _ = tables(args, variant, 0)
        on_the_clock(args, sheet, variant, fit, fit.costs.at(batch=1).dense_p50_ms)


def on_the_clock(args: argparse.Namespace, sheet: Sheet, variant: str, fit: ExitTable, whole: float) -> None:
    """The deployed network beside the untouched one, image by image."""
    net = adapted(args, variant, 0)
    rows = held(args)
    images = torch.stack([rows[i][0] for i in range(0, len(rows), 35)])
    for gain in GAINS:
        plan = offramp.schedule(fit, Stopping(), budget=whole / gain / HELD_BACK, unit="latency_ms")
        took = bench(net.deploy(plan), net, images, batch=1, repeats=3 if args.quick else 15, budget_s=60)
        sheet.add(f"{variant}, ours at {gain}x: the same on the clock, batch 1", took.time_ratio, unit="x",
                  bar=f">= {gain}")


def order(args: argparse.Namespace, sheet: Sheet) -> None:
    """Tables 1-2: who is ahead at tight budgets, and Fig. 6's ablations; in MACs, on one table halved several times."""
    for variant in VARIANTS:
        whole = recorded(args, variant, 0)
        scored: dict[str, list[list[float]]] = {}
        for seed in range(args.splits):
            halves = whole.split_rows({"fit": 0.5, "test": 0.5}, seed=seed)
            found = offramp.compare(halves["test"], {**METHODS, **ABLATIONS}, ALL, fit=halves["fit"], timed=False,
                                    limits=False, repeats=2)
            for name in (*METHODS, *ABLATIONS):
                rows = sorted(found.of(name), key=lambda one: one.budget or 0)
                scored.setdefault(name, []).append([100 * row.quality for row in rows])
            print(f"{variant}: halving {seed + 1} of {args.splits}", flush=True)
        standing(sheet, variant, scored)


def standing(sheet: Sheet, about: str, scored: dict[str, list[list[float]]]) -> None:
    """Means over the halvings; differences are paired."""
    for name, halvings in scored.items():
        for k, budget in enumerate(ALL):
            sheet.add(f"{about}, {name} at {budget}", statistics.mean(one[k] for one in halvings), unit="%")
    for better, worse in zip(ORDER, ORDER[1:], strict=False):
        versus(sheet, about, scored, better, worse, range(len(TIGHT)), ">= 0", "tight budgets")
    for alone in ABLATIONS:
        versus(sheet, about, scored, "EENet", alone, range(len(TIGHT)), ">= 0", "tight budgets")
    for name in (*METHODS, *ABLATIONS):
        if name != "ours":
            for k, budget in enumerate(ALL):
                versus(sheet, about, scored, "ours", name, (k,), ">= 0", budget)


def versus(sheet: Sheet, about: str, scored: dict[str, list[list[float]]], one: str, other: str, at, bar: str,
           where: str) -> None:
    apart = [statistics.mean(a[k] - b[k] for k in at) for a, b in zip(scored[one], scored[other], strict=True)]
    error = f" (s.e. {statistics.stdev(apart) / len(apart) ** 0.5:.2f})" if len(apart) > 1 else ""
    sheet.add(f"{about}: {one} over {other}, {where}{error}", statistics.mean(apart), unit="points", bar=bar)


def overhead(args: argparse.Namespace, sheet: Sheet) -> None:
    """Table 3: what deciding costs beside the network, at batch 1 and 128; ``benchmarks/eenet_fit.py`` times fits."""
    from offramp.choose.schedule import decision_ms

    fit, _ = tables(args, "frozen", 0)
    dense = fit.costs.at(batch=1).dense_p50_ms
    for name in ("EENet", "ours"):
        started = time.perf_counter()
        plan = offramp.schedule(fit, METHODS[name], budget="0.6x")
        sheet.add(f"{name}: fit on {len(fit)} samples x 3 exits x 10 classes", time.perf_counter() - started, unit="s",
                  bar="<= 20")
        for batch in (1, 128):
            took = decision_ms(plan.policy, fit, exits=plan.exits, batch=batch)
            sheet.add(f"{name}: dearest decision of a row, batch {batch}", 1000 * max(took.decide_ms), unit="us",
                      paper=10)
            sheet.add(f"{name}: all decisions, share of the network's time at batch 1, rows decided {batch} at a time",
                      100 * sum(took.decide_ms) / dense, unit="%", bar="<= 0.5", paper="0.2-0.4")


def promise(args: argparse.Namespace, sheet: Sheet) -> None:
    """How often a guarantee of 95 % is broken, over resamplings of a real table, with labels and without."""
    parts = recorded(args, "frozen", 0).split_rows({"fit": 0.3, "world": 0.7}, seed=0)
    world = parts["world"]
    for against in ("labels", "backbone"):
        plans = family(parts["fit"], Stopping(), against=against, steps=20)
        draws = torch.Generator().manual_seed(0)
        broken = silent = 0
        saved = []
        truth = {id(plan.policy): offramp.replay(world, plan) for plan in plans}
        for _ in range(args.draws):
            rows = torch.randint(len(world), (2000,), generator=draws)
            try:
                got = guarantee(world.slice(rows), plans, max_drop=0.01, confidence=0.95, against=against)
            except PlanError:
                silent += 1
                continue
            seen = truth[id(got.policy)]
            loss = seen.drop if against == "labels" else 1 - float(seen.agrees.mean())
            broken += loss > 0.01
            saved.append(1 - float(seen.macs.mean()) / seen.backbone_macs)
        sheet.add(f"against the {against}: draws of {args.draws} whose plan loses more than a point", 100 * broken
                  / args.draws, unit="%", bar="<= 5")
        sheet.add(f"against the {against}: draws where no plan could be promised", 100 * silent / args.draws, unit="%")
        if saved:
            sheet.add(f"against the {against}: MACs saved by the plans promised, mean", 100 * statistics.mean(saved),
                      unit="%")


def drift(args: argparse.Namespace, sheet: Sheet) -> None:
    """Table 5: a stream whose second half is corrupted; the budget, with a fixed schedule and with a switch."""
    halves = recorded(args, "frozen", 0).split_rows({"calibration": 0.5, "test": 0.5}, seed=0)
    fit, test = halves["calibration"], halves["test"]
    noisy = corrupted(args, "frozen", 0)
    stream = ExitTable.concat([test, noisy])
    for name, scheduler in (("EENet", EENet()), ("ours", Stopping())):
        for budget in ("0.5x", "0.6x", "0.7x"):
            for how, made in (("fixed", scheduler), ("switch", Switching(scheduler=scheduler))):
                plan = offramp.schedule(fit, made, budget=budget)
                seen = replay_stream(stream, plan, batch=1 if how == "switch" else 64)
                off = 100 * (float(seen.macs.mean()) / plan.asked["budget"] - 1)
                sheet.add(f"{name}, {how}, {budget}: off the budget", abs(off), unit="%",
                          bar="<= 1" if how == "switch" else "",
                          paper=0.67 if how == "switch" else None)
                sheet.add(f"{name}, {how}, {budget}: accuracy over the stream", 100 * seen.quality, unit="%")


def dense(args: argparse.Namespace, sheet: Sheet) -> None:
    """Image-level policies on street scenes: EENet and ours against the mean confidence, mIoU at equal cost."""
    whole = scenes(args)
    scored: dict[str, list[list[float]]] = {}
    methods = {"EENet": EENet(), "MSDNet": Geometric(), "one threshold": Swept(), "ours": Stopping()}
    for seed in range(args.splits):
        halves = whole.split_rows({"fit": 0.5, "test": 0.5}, seed=seed)
        found = offramp.compare(halves["test"], methods, ALL, fit=halves["fit"], timed=False, limits=False, repeats=2)
        for name in methods:
            rows = sorted(found.of(name), key=lambda one: one.budget or 0)
            scored.setdefault(name, []).append([100 * row.quality for row in rows])
    for name, halvings in scored.items():
        for k, budget in enumerate(ALL):
            sheet.add(f"scenes, {name} at {budget}: mIoU", statistics.mean(one[k] for one in halvings), unit="%")
    for name in ("EENet", "ours"):
        for other in ("MSDNet", "one threshold"):
            versus(sheet, "scenes", scored, name, other, range(len(TIGHT)), ">= 0", "tight budgets")
            versus(sheet, "scenes", scored, name, other, range(len(ALL)), ">= 0", "all budgets")


PARTS = {"exits": exits, "gains": gains, "order": order, "overhead": overhead, "promise": promise, "drift": drift,
         "dense": dense}

if __name__ == "__main__":
    main()

"""Deadlines under load: are answers there in time, and how good are they beside static networks?

A network for ``scenes`` with three redesigned exits is trained once (resumable, under ``--work``). Then, beside a
process that burns a core for random spells, a thousand calls ``fast.predict(x, deadline_ms=...)`` with random
deadlines are timed from outside. Static networks are the same weights cut at each exit, deployed for a budget; one may
be asked at a deadline if its 95th percentile, measured in turn with the others under the same load, is not above it.
It is then taken to be in time always, which favours it.

    python benchmarks/anytime.py                  # an hour at most; again: from where it was
    python benchmarks/anytime.py --trained runs/adpc   # CamVid, by the network with redesigned exits of adpc.py
    python benchmarks/anytime.py --quick          # a minute: that it runs
    python benchmarks/anytime.py --only latency   # no training: random weights, no quality
"""

import argparse
import multiprocessing
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import offramp
from claims import Sheet
from offramp.data import load_data
from offramp.functional.metrics import confusion, mean_iou
from offramp.models import load_model
from offramp.runtime import Adaptive
from offramp.types import Plan

CLASSES = 11
EXITS = ("stage1.1", "stage2.2", "stage3.4")
GRACE_MS = 2.0
BINS = 10


def burn(mean_s: float, seed: int) -> None:
    """Busy and idle in turn, each for a random time."""
    draw = random.Random(seed)
    while True:
        until = time.perf_counter() + draw.expovariate(1 / mean_s)
        while time.perf_counter() < until:
            pass
        time.sleep(draw.expovariate(1 / mean_s))


def network(args: argparse.Namespace) -> tuple[offramp.MultiExit, Any]:
    """A network with exits, and pictures that it was not trained on."""
    if args.trained:
        sys.path.insert(0, str(Path(__file__).parent / "papers"))
        from adpc_masks import run_of
        from adpc_train import split_of, trained

        run = run_of(args.trained, args.data, "camvid")
        return trained(run, "RH", 0), split_of(run, "test")
    torch.manual_seed(0)
    high, wide = (int(side) for side in args.size.split("x"))
    net = offramp.attach(load_model(f"offramp:scenes_dense?num_classes={CLASSES}"), torch.randn(2, 3, high, wide),
                         exits=EXITS, heads=offramp.redesigned(EXITS, 64))
    if args.only != "latency":
        train = load_data(f"scenes?n={args.scenes}&size={args.size}&seed=0").split("train")
        offramp.fit(net, train, offramp.recipes.anytime(epochs=args.epochs, lr=0.05, batch_size=8),
                    run_dir=args.work / ("quick" if args.quick else args.size))
    return net.eval(), load_data(f"scenes?n={16 if args.quick else 200}&size={args.size}&seed=99").split("test")


def deployed(net: offramp.MultiExit, exits: tuple[str, ...], setting: str, engine: str) -> Adaptive:
    plan = Plan(exits=exits, policy=offramp.Thresholds(thresholds=(None,) * len(exits)), task="dense", setting=setting)
    return net.deploy(plan, engine=engine)


def timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def p95(times: list[float]) -> float:
    return float(torch.tensor(times, dtype=torch.float64).quantile(0.95))


def asking(fast: Adaptive, x: Tensor, repeats: int) -> float:
    """The part of a call's time that its questions between layers take: those it asks, at what each costs."""
    from offramp.runtime.pace import Watch

    counted = []
    with torch.inference_mode():
        state: Any = fast.begin(x)
        for leg in fast.legs[:-1]:
            state = leg.run(state, lambda: bool(counted.append(0)))[0]
        fast.legs[-1].only_stage(state, lambda: bool(counted.append(0)))
    watch = Watch(1e18)
    watch.begin(False, [0.5] * len(counted), 1.0)
    each = timed(lambda: [watch() for _ in counted * 100]) / (100 * max(1, len(counted)))
    whole = statistics.median(timed(lambda: list(fast.anytime(x))) for _ in range(repeats))
    return each * len(counted) / whole


def confusions(net: offramp.MultiExit, images: Tensor, labels: Tensor) -> Tensor:
    """Of each image and exit (N, E, K, K)."""
    made = []
    with torch.inference_mode():
        for image, truth in zip(images, labels, strict=True):
            said = torch.cat(net(image[None])).argmax(1)
            made.append(confusion(said, truth.expand_as(said), CLASSES))
    return torch.stack(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/anytime"))
    parser.add_argument("--trained", type=Path, help="where adpc.py trained on CamVid at 192x256 for 10 epochs")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="where --trained finds CamVid")
    parser.add_argument("--size", default="192x256")
    parser.add_argument("--scenes", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--engine", choices=("eager", "compile"), default="eager")
    parser.add_argument("--threads", type=int, help="of torch: under load several wait for the one whose core is taken")
    parser.add_argument("--burners", type=int, default=1, help="processes that burn a core each")
    parser.add_argument("--only", choices=("latency",))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.size, args.scenes, args.epochs, args.calls = "64x96", 16, 1, 60
    if args.threads:
        torch.set_num_threads(args.threads)
    how = "-camvid" * bool(args.trained) + f"-{args.threads}" * bool(args.threads) + "-quick" * args.quick
    sheet = Sheet(f"anytime{how}")
    net, data = network(args)
    exits = tuple(column.name for column in net.columns[:-1])
    images = torch.stack([data[i][0] for i in range(len(data))])
    labels = torch.stack([data[i][1] for i in range(len(data))]).long()
    fast = deployed(net, exits, "anytime", args.engine)
    statics = {name: deployed(net, (name,) if name else (), "budgeted", args.engine) for name in (*exits, "")}
    fast.calibrate(images[:1])
    sheet.add("time that asking between layers takes, of a whole call", asking(fast, images[:1], 10), unit="1",
              bar="<= 0.01")

    burners = [multiprocessing.get_context("spawn").Process(target=burn, args=(0.2, seed), daemon=True)
               for seed in range(args.burners)]
    for burner in burners:
        burner.start()
    try:
        time.sleep(2)  # they are started anew, with what they import
        rounds = 10 if args.quick else 150
        first: list[float] = []
        static: dict[str, list[float]] = {name: [] for name in statics}
        for turn in range(rounds):
            x = images[turn % len(images)][None]
            first += [one.elapsed_ms for one in fast.anytime(x) if one.exit_index == 0]
            for name, one in statics.items():
                static[name].append(timed(lambda one=one, x=x: one(x)))
        late = {name: p95(times[2:]) for name, times in static.items()}
        floor = p95(first[2:])
        draw = random.Random(0)
        deadlines = [draw.uniform(0.5 * floor, 1.3 * late[""]) for _ in range(args.calls)]
        fast.deadlines.reset()
        calls = []
        for k, deadline in enumerate(deadlines):
            x = images[k % len(images)][None]
            began = time.perf_counter()
            answer = fast.predict(x, deadline_ms=deadline)
            took = 1e3 * (time.perf_counter() - began)
            calls.append((deadline, took, answer.exit_index, k % len(images)))
            time.sleep(draw.expovariate(1 / 0.005))
    finally:
        for burner in burners:
            burner.terminate()
            burner.join()

    for name, ms in late.items():
        sheet.add(f"static network to {name or 'its end'}: p95 under load", ms, unit="ms")
    sheet.add("first exit: p95 under load", floor, unit="ms")
    held = [took <= deadline + GRACE_MS for deadline, took, _, _ in calls if deadline > floor]
    sheet.add("calls with a deadline above the first exit's p95", len(held), unit="calls")
    sheet.add("answers within the deadline + 2 ms, deadlines above the first exit's p95", statistics.mean(held),
              unit="1", bar=">= 0.99")
    over = [took - deadline for deadline, took, _, _ in calls if deadline > floor and took > deadline + GRACE_MS]
    sheet.add("largest delay beyond deadline + 2 ms", max(over, default=0.0), unit="ms")
    sheet.add("deadlines missed at all, impossible ones too", fast.deadlines.missed, unit="calls")
    for exit_index in range(len(exits) + 1):
        sheet.add(f"answers from exit {exit_index + 1}", sum(call[2] == exit_index for call in calls), unit="calls")
    if args.only == "latency":
        return

    found = confusions(net, images, labels)
    names = list(late)
    for k, name in enumerate(names):
        sheet.add(f"mIoU of {name or 'the end'}", mean_iou(found[:, k].sum(0)), unit="1")
    width = (max(deadlines) - floor) / BINS
    gains = []
    for b in range(BINS):
        low, high = floor + b * width, floor + (b + 1) * width
        here = [call for call in calls if low < call[0] <= high and min(late.values()) <= call[0]]
        if not here:
            continue
        best = [max((k for k in range(len(names)) if late[names[k]] <= call[0]),
                    key=lambda k: float(mean_iou(found[:, k].sum(0)))) for call in here]
        ours = float(mean_iou(torch.stack([found[call[3], call[2]] for call in here]).sum(0)))
        theirs = float(mean_iou(torch.stack([found[call[3], k] for call, k in zip(here, best, strict=True)]).sum(0)))
        gains.append(ours - theirs)
        sheet.add(f"mIoU by {low:.0f} to {high:.0f} ms", ours, unit="1", paper=f"{theirs:.3f}")
    if gains:
        sheet.add("mIoU over the best static network in time, the least of all deadlines", min(gains), unit="1",
                  bar=">= 0")
        sheet.add("the same, in the mean", statistics.mean(gains), unit="1")


if __name__ == "__main__":
    main()

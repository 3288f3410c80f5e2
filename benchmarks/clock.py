"""How much of the saving in MACs arrives on the clock: deployed networks beside their own fastest dense form.

    python benchmarks/clock.py [--quick] [--models resnet50 ...] [--engines eager compile] [--dtypes fp32 bf16]
                               [--batches 1 32] [--fresh]

share = (dense time / adaptive time) / (dense MACs / adaptive MACs), heads, decisions and copies counted. Weights are
random: the clock does not see them. Thresholds are quantiles of the confidences, so that a stated share of the rows
leaves at each exit. Every cell runs in a process of its own with a steady allocator (see offramp.cost.latency), dense
and adaptive in turn, and is kept as soon as it is done; a second start goes on where the first one stopped. Run it on
a quiet machine: cells whose threads had to wait say so, and are measured again by the next start.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import models
from torchvision.models import segmentation

import offramp
from offramp.cost.latency import describe_machine, with_steady_allocator_
from offramp.nn.tune import tune_
from offramp.runtime.bench import bench, dense_like
from offramp.types import Evidence, Plan

RESULTS = Path(__file__).parent / "results" / "clock.json"
BAR = {1: 0.90, 32: 0.95}
SHARES = (0.3, 0.3)
"""Of all rows, at the first and at the second exit."""
# Exits where a user who minimises latency_ms would put them: not in the early stages, whose wide maps and few
# channels run at a lower rate of MACs than the rest. They save 23 % (resnet50) to 29 % of the MACs.
CELLS: dict[str, dict[str, Any]] = {
    "resnet50": {"size": 224, "exits": ("layer3.0", "layer3.3"), "rows": {1: 32, 32: 32}},
    "fcn_resnet50": {"size": 520, "exits": ("backbone.layer4.0", "backbone.layer4.1"), "rows": {1: 10, 32: 32}},
    "deeplabv3_resnet50": {"size": 520, "exits": ("backbone.layer4.0", "backbone.layer4.1"), "rows": {1: 10, 32: 32}},
}


class Spy:
    """A policy that keeps every score; all rows go on to the last exit and leave there, since no score comes after."""

    def __init__(self, policy: Any, exits: int) -> None:
        self.policy, self.exits, self.scores = policy, exits, {}
        self.reads = getattr(policy, "reads", None)

    def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
        score = self.policy.score(exit_index, evidence)
        self.scores.setdefault(exit_index, []).append(score)
        return torch.full((len(score),), exit_index == self.exits - 1)


def thresholds(scores: dict[int, list[Tensor]], shares: tuple[float, ...]) -> tuple[float, ...]:
    """Between two neighbouring scores, so that these shares of all rows leave and rounding moves none."""
    table = torch.stack([torch.cat(scores[k]).double() for k in range(len(shares))], dim=1)
    alive, found = torch.ones(len(table), dtype=torch.bool), []
    for k, share in enumerate(shares):
        ranked = table[alive, k].sort(descending=True).values
        quota = min(round(share * len(table)), len(ranked) - 1)
        found.append(float((ranked[quota - 1] + ranked[quota]) / 2) if quota else 2.0)
        alive &= table[:, k] < found[-1]
    return tuple(found)


def inputs_of(rows: int, size: int) -> Tensor:
    """Noise of many contrasts and scales: rows that differ in their confidence."""
    draw = torch.Generator().manual_seed(1)
    coarse = torch.randn(rows, 3, size // 8, size // 8, generator=draw)
    x = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return x * torch.linspace(0.2, 3.0, rows)[:, None, None, None]


def cell(model: str, engine: str, dtype: str, batch: int, quick: bool) -> dict[str, Any]:
    """Build, deploy and time one setting."""
    torch.manual_seed(0)
    about = CELLS[model]
    size = 96 if quick else about["size"]
    rows = about["rows"][batch] if not quick else max(batch, 4) if batch == 1 else 8
    batch_now = batch if not quick or batch == 1 else 8
    dense = model != "resnet50"
    slow = dense and batch > 1  # half a minute a call: shrinking is known to pay there
    make = getattr(segmentation if dense else models, model)
    guest = make(weights=None, **({"weights_backbone": None} if dense else {})).eval()
    x = inputs_of(rows, size)
    narrow = torch.bfloat16 if dtype == "bf16" else torch.float32
    tuned: list[Any] = []
    if model.startswith("deeplab"):  # on both sides: measured in the type that will run
        probe = guest.to(narrow)
        tuned = [vars(one) for one in tune_(probe, x[:1].to(narrow), repeats=3)]
        guest = probe.to(torch.float32)
    net = offramp.attach(guest, x[:2], exits=about["exits"], heads=head_of)
    base = offramp.Thresholds(thresholds=(0.0,) * len(about["exits"]))
    spy = Spy(base, len(about["exits"]))

    def deployed(policy: Any) -> Any:
        return offramp.deploy(net, Plan(exits=about["exits"], policy=policy, task=net.task), engine=engine, dtype=dtype,
                              channels_last=True, shrink=True if slow else "auto")

    fast = deployed(spy)
    for start in range(0, rows, batch_now):
        fast(x[start : start + batch_now])
    fast.plan.policy.policy = offramp.Thresholds(thresholds=thresholds(spy.scores, SHARES))
    fast.plan.policy.decide = fast.plan.policy.policy.decide  # the spied network itself is timed: compiled once
    plain = dense_like(fast, guest, x[:2])
    if slow:  # bench answers every row once before it times: the dense side must be as warm, and no more
        with torch.inference_mode():
            plain(x)
    done = bench(fast, plain, x, batch=batch_now, repeats=2 if slow else 3 if quick else 12 if batch == 1 else 7,
                 warmup=0 if slow else 2, budget_s=6 if quick else 60 if slow else 30)
    print(done, flush=True)
    return {**done.to_json(), "model": model, "cell_batch": batch, "exits": list(about["exits"]), "size": size,
            "tuned": tuned, "quiet": done.adaptive.quiet and done.dense.quiet}


def head_of(about: Any) -> Any:
    """Cheap on the clock: pool, then one linear; dense: a 1x1 convolution on the site's own map."""
    return offramp.HeadSpec()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny inputs: does it run?")
    parser.add_argument("--models", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--engines", nargs="+", default=["eager", "compile"], choices=["eager", "compile"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32], choices=[1, 32])
    parser.add_argument("--fresh", action="store_true", help="measure again what is already there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        with_steady_allocator_()
        model, engine, dtype, batch = args.cell.split(",")
        found = cell(model, engine, dtype, int(batch), args.quick)
        args.out.write_text(json.dumps(found))
        return
    if args.quick and args.out == RESULTS:
        args.out = RESULTS.with_name("clock-quick.json")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    page = json.loads(args.out.read_text()) if args.out.exists() and not args.fresh else {"cells": {}, "seconds": 0.0}
    wanted = [f"{m},{e},{d},{b}" for m in args.models for e in args.engines for d in args.dtypes for b in args.batches]
    for name in wanted:
        if page["cells"].get(name, {}).get("quiet"):
            continue
        print(f"--- {name}", flush=True)
        start, part = time.perf_counter(), args.out.with_suffix(".cell")
        command = [sys.executable, __file__, "--cell", name, "--out", str(part), *(["--quick"] * args.quick)]
        subprocess.run(command, check=True)
        page["cells"][name] = json.loads(part.read_text())
        part.unlink()
        page["seconds"] += time.perf_counter() - start
        write(args.out, page, args.quick)
    show(page)


def write(path: Path, page: dict[str, Any], quick: bool) -> None:
    cells = page["cells"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    claims = [{
        "claim": f"share of the MAC saving on the clock, {name.replace(',', ' ')}", "paper": None, "ours": one["share"],
        "unit": "ratio", "bar": f">= {BAR[one['cell_batch']]:.2f}", "holds": one["share"] >= BAR[one["cell_batch"]],
    } for name, one in cells.items()]
    page = {"command": "python benchmarks/clock.py" + " --quick" * quick, "machine": describe_machine(),
            "commit": commit.stdout.strip(), "seconds": page["seconds"], "claims": claims, "cells": cells}
    path.write_text(json.dumps(page, indent=1) + "\n")


def show(page: dict[str, Any]) -> None:
    print(f"\n{'cell':42}{'dense ms':>10}{'adaptive':>10}{'MACs x':>8}{'time x':>8}{'share':>8}{'bar':>7}")
    for name, one in page["cells"].items():
        bar = BAR[one["cell_batch"]]
        print(f"{name.replace(',', ' '):42}{one['dense']['row_ms']:10.2f}{one['adaptive']['row_ms']:10.2f}"
              f"{one['macs_ratio']:8.3f}{one['time_ratio']:8.3f}{one['share']:8.3f}{bar:7.2f}"
              f"{'' if one['share'] >= bar else '  missed'}{'' if one['quiet'] else '  (busy machine)'}")


if __name__ == "__main__":
    main()

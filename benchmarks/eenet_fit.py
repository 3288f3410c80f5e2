"""How long EENet takes to fit, and a decision costs (arXiv:2301.07099, 4.4): 10,000 samples x 4 exits x 100 classes.

    OMP_NUM_THREADS=2 python benchmarks/eenet_fit.py [--samples N]

The paper takes under five minutes for a fit on a graphics card. CPU time of this process is what is judged, beside the
wall's: what others do to the machine is not the scheduler's.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from choose.synthetic import classify
from claims import Sheet
from offramp.policies.eenet import EENet, EENetPolicy
from offramp.policies.lesson import lesson
from offramp.types import Evidence


def microseconds(fn: Callable[[], Any], times: int = 50, rounds: int = 20) -> float:
    """The least mean CPU time of a call over the rounds."""
    fn()
    least = float("inf")
    for _ in range(rounds):
        started = time.process_time()
        for _ in range(times):
            fn()
        least = min(least, (time.process_time() - started) / times)
    return least * 1e6


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--samples", type=int, default=10_000)
    samples = options.parse_args().samples
    sheet = Sheet("eenet_fit")
    taught = lesson(classify(samples, 3, 100, skill=(1.5, 4.0)))
    budget = 0.6 * float(taught.cost[-1])
    wall, cpu = time.perf_counter(), time.process_time()
    at = EENet().fit(taught)
    policy = at(budget)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    shape = f"{samples} samples x 4 exits x 100 classes"
    sheet.add(f"{shape}: fit for a first budget, CPU time", cpu, unit="s", bar="<= 20", paper="< 300 s")
    sheet.add(f"{shape}: the same on the wall, {torch.get_num_threads()} threads", wall, unit="s")
    started = time.process_time()
    at(0.8 * budget)
    sheet.add(f"{shape}: each further budget, CPU time", time.process_time() - started, unit="s")
    assert len(policy.thresholds) == 3
    for rows in (1, 128):
        for e in range(3):
            seen = Evidence(logits=torch.randn(rows, e + 1, 10))
            small = EENetPolicy(weights=tuple((0.1,) * (13 + k) for k in range(3)), thresholds=(0.5,) * 3)
            sheet.add(f"10 classes, a batch of {rows}: decision at exit {e + 1}, CPU time",
                      microseconds(lambda small=small, e=e, seen=seen: small.decide(e, seen)), unit="us")


if __name__ == "__main__":
    main()

"""What a user waits for: the import, `sites` on every network of the bestiary, a search of all subsets of 8 exits.

    python benchmarks/speed.py

Wall times on two threads, each the median of three; run it on a quiet machine.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import offramp
from claims import Sheet
from offramp.table import Costs
from offramp.types import ExitColumn
from zoo import LIBRARY


def median_s(fn: Callable[[], Any], times: int = 3) -> float:
    """Median wall time of a call."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        fn()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def table(samples: int = 10_000, exits: int = 8, classes: int = 10) -> offramp.ExitTable:
    """Exits that know more the deeper they are, and are surer where they are right."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (samples,), generator=draw)
    hard = torch.rand(samples, generator=draw)
    logits = torch.randn(samples, exits + 1, classes, generator=draw)
    for e in range(exits + 1):
        logits[torch.arange(samples), e, labels] += 1 + 0.5 * (e + 1) + 4 * (1 - hard)
    names = [f"exit{e}" for e in range(exits)]
    macs = tuple(1_000_000 * (e + 1) for e in range(exits + 1))
    nothing = (0,) * (exits + 1)
    return offramp.ExitTable(
        task="classify", columns=(*(ExitColumn(name=n, site=n) for n in names), ExitColumn(name="final", site="final")),
        costs=Costs(macs=macs, head_macs=(*(50_000,) * exits, 0), param_bytes=nothing, head_param_bytes=nothing,
                    peak_bytes=nothing, latency=()),
        split="calibration", fingerprints={"model": "m", "data": "d", "split": "calibration:0"}, labels=labels,
        logits=logits, class_names=(), meta={},
    )


def main() -> None:
    torch.set_num_threads(2)
    sheet = Sheet("speed")
    code = "import time; s = time.perf_counter(); import offramp; print(time.perf_counter() - s)"
    lean = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
            for _ in range(3)]
    sheet.add("import offramp", statistics.median(lean), unit="s", bar="<= 2")
    whole = code.replace("import offramp;", "import offramp; [getattr(offramp, name) for name in offramp.__all__];")
    lean = [float(subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=True).stdout)
            for _ in range(3)]
    sheet.add("import offramp and touch every public name (torch, torchvision)", statistics.median(lean), unit="s")
    slowest, cut = ("", 0.0), 0
    for animal in LIBRARY:
        model, inputs = animal.model(), animal.inputs()
        seconds = median_s(lambda m=model, x=inputs, w=animal.within: offramp.sites(m, x, within=w), 2)
        print(f"  {animal!s:<48} {seconds:6.2f} s", flush=True)
        slowest, cut = max(slowest, (str(animal), seconds), key=lambda one: one[1]), cut + 1
    sheet.add(f"sites, slowest of {cut} networks ({slowest[0]})", slowest[1], unit="s", bar="<= 5")
    sheet.add("library networks that cut", cut, unit="", bar=">= 38")
    known = table()
    sheet.add("search: all subsets of 8 exits x 100 thresholds, 10,000 samples",
              median_s(lambda: offramp.search(known, max_drop=0.01, steps=100)), unit="s", bar="<= 10")


if __name__ == "__main__":
    main()

"""What a benchmark writes: its claims beside what the paper or the plan asks, ``holds`` computed, never typed in."""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
_TESTS = {">=": lambda ours, bar: ours >= bar, "<=": lambda ours, bar: ours <= bar}


@dataclass(frozen=True, kw_only=True)
class Claim:
    claim: str
    paper: float | str | None
    ours: float
    unit: str
    bar: str
    """``>= 0.95`` or ``<= 10``; empty for a figure that is shown and not judged."""

    @property
    def holds(self) -> bool | None:
        """Whether ours meets the bar.

        >>> Claim(claim="share", paper=None, ours=0.96, unit="1", bar=">= 0.95").holds
        True
        """
        if not self.bar:
            return None
        sign, value = self.bar.split()
        return bool(_TESTS[sign](self.ours, float(value)))


@dataclass
class Sheet:
    """One result file; every claim is written as soon as it is known, so that a broken run loses nothing."""

    name: str
    started: float = field(default_factory=time.perf_counter)
    claims: list[Claim] = field(default_factory=list)

    def add(self, claim: str, ours: float, *, unit: str, bar: str = "", paper: float | str | None = None) -> None:
        made = Claim(claim=claim, paper=paper, ours=float(ours), unit=unit, bar=bar)
        self.claims.append(made)
        verdict = {True: "holds", False: "MISSED", None: ""}[made.holds]
        print(f"{claim:<72} paper {paper if paper is not None else '-':>8} | ours {made.ours:<9.4g} {unit:<7} "
              f"{bar:<8} {verdict}", flush=True)
        self.write()

    def write(self) -> Path:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        record = {
            "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).as_posix().split("benchmarks/")[-1],
                                 *sys.argv[1:]]),
            "machine": machine(), "commit": commit(), "seconds": round(time.perf_counter() - self.started, 1),
            "claims": [{**asdict(claim), "holds": claim.holds} for claim in self.claims],
        }
        part = path.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(path)
        return path


def machine() -> str:
    """Processor, cores and torch: what a figure depends on."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        name = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
                     if line.startswith("model name")), name)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def commit() -> str:
    """The commit measured, with + when the tree differs from it."""
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "--", "../src"], cwd=here, capture_output=True, text=True)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")

"""How long callables take, side by side: interleaved, warmed up, without the samples that had to wait for a core."""

import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offramp.errors import OfframpError

__all__ = [
    "STEADY_ALLOCATOR", "Timing", "allocator", "describe_machine", "measure", "quiet_share", "with_steady_allocator_",
]

STEADY_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_TOP_PAD_": "268435456",
}
"""glibc settings under which a large output is not a fresh mmap: page faults can otherwise cost more than the layer."""

_GIVE_UP = 4  # times the asked repeats, when the machine is so busy that most samples are dropped


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one callable, among others that ran in turn with it."""

    p50_ms: float
    p95_ms: float
    spread_ms: float
    """Between the quartiles."""
    repeats: int
    """Samples that were kept."""
    dropped: int
    """Samples whose threads waited for a core, and so measured the neighbours."""
    quiet: bool
    """False where the machine was too busy to find enough undelayed samples: the least delayed were kept."""
    samples_ms: tuple[float, ...] = ()

    def __str__(self) -> str:
        note = "" if self.quiet else ", busy machine"
        return f"{self.p50_ms:.3g} ms (p95 {self.p95_ms:.3g}, {self.repeats} samples{note})"

    @staticmethod
    def of(samples_ms: list[float], *, dropped: int = 0, quiet: bool = True) -> "Timing":
        """Summarise samples.

        >>> Timing.of([3.0, 1.0, 2.0]).p50_ms
        2.0
        """
        kept = torch.tensor(sorted(samples_ms), dtype=torch.float64)
        low, middle, high, late = (float(kept.quantile(q)) for q in (0.25, 0.5, 0.75, 0.95))
        return Timing(p50_ms=middle, p95_ms=late, spread_ms=high - low, repeats=len(samples_ms), dropped=dropped,
                      quiet=quiet, samples_ms=tuple(samples_ms))


def measure(
    fns: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 20,
    warmup: int = 3,
    budget_s: float | None = None,
    device: torch.device | str | None = None,
    max_delay: float = 0.02,
    inference: bool = True,
) -> dict[str, Timing]:
    """Time callables in turn (A B C, B C A, ...), so that a drift of the machine falls on all of them alike.

    budget_s: stops early once it is spent and every callable has three samples; the warm-up counts.
    device: when CUDA, each sample waits for the device at both ends.
    max_delay: a sample is dropped when a thread of this process waited on the run queue for more than this share of
        it (Linux tells; elsewhere nothing is dropped).
    inference: whether to run under ``torch.inference_mode``.
    """
    if not fns or repeats < 1:
        raise OfframpError(expected="callables and repeats >= 1", got=f"{len(fns)} and {repeats}", where="measure()")
    names, started = list(fns), time.perf_counter()
    wait = torch.cuda.synchronize if device is not None and torch.device(device).type == "cuda" else None
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}  # (delay share, ms)
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall on whichever callable happens to run
    try:
        with torch.inference_mode() if inference else nullcontext():
            for name in names:
                for turn in range(warmup):
                    if turn and budget_s is not None and time.perf_counter() - started > budget_s / 2:
                        break
                    fns[name]()
            for turn in range(repeats * _GIVE_UP):
                for offset in range(len(names)):
                    name = names[(turn + offset) % len(names)]
                    found[name].append(_sample(fns[name], wait))
                spent = budget_s is not None and time.perf_counter() - started > budget_s
                kept = min(sum(delay <= max_delay for delay, _ in found[name]) for name in names)
                if kept >= repeats or (spent and turn >= 2):
                    break
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(samples, repeats, max_delay) for name, samples in found.items()}


def _sample(fn: Callable[[], Any], wait: Callable[[], None] | None) -> tuple[float, float]:
    if wait:
        wait()
    before, start = _delays_ns(), time.perf_counter_ns()
    fn()
    if wait:
        wait()
    took = time.perf_counter_ns() - start
    after = _delays_ns()
    worst = max((after[thread] - before.get(thread, 0) for thread in after), default=0)
    return worst / max(took, 1), took / 1e6


def _summary(samples: list[tuple[float, float]], repeats: int, max_delay: float) -> Timing:
    kept = [ms for delay, ms in samples if delay <= max_delay]
    enough = len(kept) >= min(repeats, max(3, len(samples) // 3))
    if not enough:  # the least delayed third is the best there is, and the reader is told
        kept = [ms for _, ms in sorted(samples)[: max(3, len(samples) // 3)]]
    return Timing.of(kept, dropped=len(samples) - len(kept), quiet=enough)


def _delays_ns() -> dict[str, int]:
    """Nanoseconds that each thread of this process has so far waited, runnable, for a core."""
    delays = {}
    try:
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/schedstat", "rb") as file:
                delays[thread] = int(file.read().split()[1])
    except (OSError, IndexError, ValueError):  # not Linux, or a thread that ended meanwhile
        pass
    return delays


def quiet_share(seconds: float = 0.2) -> float:
    """Share of its wish that a busy loop on every torch thread gets from this machine just now; 1.0 is quiet."""
    x = torch.randn(512, 512)
    before, start = _delays_ns(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        x @ x
    took, after = time.perf_counter() - start, _delays_ns()
    worst = max((after[thread] - before.get(thread, 0) for thread in after), default=0)
    return max(0.0, 1 - worst / 1e9 / took)


def allocator() -> dict[str, Any]:
    """Which allocator settings this process runs under; ``steady`` where large outputs are no fresh mmaps."""
    found = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    preload = os.environ.get("LD_PRELOAD", "")
    steady = all(name in found for name in STEADY_ALLOCATOR) or any(
        name in preload for name in ("jemalloc", "tcmalloc", "mimalloc")
    )
    return {**found, **({"LD_PRELOAD": preload} if preload else {}), "steady": steady}


def with_steady_allocator_() -> None:
    """Start this program again with a steady allocator, unless it has one; call it first in a script.

    The process image is replaced: nothing before the call is kept, and the command line stays the same.
    """
    if allocator()["steady"] or not sys.platform.startswith("linux"):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, sys.orig_argv, {**os.environ, **STEADY_ALLOCATOR})


def describe_machine() -> dict[str, Any]:
    """What a timing should be quoted with: processor, instruction set, threads, versions, allocator."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
        "python": platform.python_version(), "system": platform.platform(), "allocator": allocator(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }

"""ADP-C on the clock: whole networks at their active places against their fastest dense execution, everything counted.

    python benchmarks/papers/adpc_clock.py                                # W18 and W48 at 512x1024: half an hour
    python benchmarks/papers/adpc_clock.py --masks runs/adpc               # those of a network that adpc.py trained
    python benchmarks/papers/adpc_clock.py --quick                        # checks the path, not the figures

R = speedup / MAC ratio: 1 where all MACs that a mask saves are saved on the clock. MACs are convolutions' alone, as in
the paper, so that interpolation is held against us. Time is of all that a call does: confidences, masks, their
geometry, loading and storing maps, interpolation, logits carried over and resized. Both sides say all four answers, in
one process, in turn; samples whose threads waited for a core are dropped. glibc gives both sides the memory that they
gave back before (:data:`offramp.cost.latency.STEADY_ALLOCATOR`): with its defaults page faults make the dense side much
slower. Weights are random, for the clock does not see them; masks are given.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from adpc_dense import ENGINES, Branch, Dense, made, restricted  # noqa: E402
from adpc_masks import kept  # noqa: E402

import offramp  # noqa: E402
from claims import Sheet  # noqa: E402
from offramp._kernel.ops import Conv, Program  # noqa: E402
from offramp.cost.latency import measure, with_steady_allocator_  # noqa: E402
from offramp.models import load_model  # noqa: E402
from offramp.sparse import network as network_module  # noqa: E402
from offramp.sparse.crossover import drawn  # noqa: E402

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
BARS = ((0.3, 0.90), (0.1, 0.80))
"""From this density on, R shall be at least that."""
PAPER = 0.82
"""Against its own slow convolutions, interpolation and geometry not counted."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--networks", nargs="+", default=["hrnet_w18_small", "hrnet_w48"])
    options.add_argument("--size", default="512x1024")
    options.add_argument("--densities", type=float, nargs="+", default=DENSITIES, help="of the masks that are made")
    options.add_argument("--masks", type=Path, help="where adpc.py trained: that network's masks are taken")
    options.add_argument("--masks-on", choices=("scenes", "camvid"), default="scenes", help="what it was trained on")
    options.add_argument("--data", type=Path, default=Path("../shared/data"), help="where --masks finds its pictures")
    options.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="of the dense side")
    options.add_argument("--part", choices=("whole", "branches"), action="append", help="both by default")
    options.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options.add_argument("--repeats", type=int, default=11)
    options.add_argument("--threads", type=int)
    options.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                         help="cpu: one thread's own time, which neighbours on its core do not lengthen")
    options.add_argument("--quick", action="store_true")
    args = options.parse_args()
    with_steady_allocator_()
    if args.quick:
        args.networks, args.size, args.densities, args.repeats = ["hrnet_w18_small"], "64x128", [0.1, 0.5], 2
        args.engines = args.engines if args.engines != ENGINES else ["eager"]
    if args.threads or args.clock == "cpu":
        torch.set_num_threads(1 if args.clock == "cpu" else args.threads)
    how = f"-masks-{args.masks_on}" * bool(args.masks) + "-branches" * (args.part == ["branches"])
    how += "-quick" * args.quick
    for name in args.networks:
        sheet = Sheet(f"adpc-clock-{name}-{args.precision}-{args.threads or torch.get_num_threads()}{how}")
        network(args, sheet, name)


class Held:
    """Gives masks from outside to deployed networks, after these have taken their own."""

    def __init__(self) -> None:
        self.masks: Sequence[Tensor] = ()
        takes = network_module.onward
        network_module.onward = lambda masked, coarse, k, before: takes(masked, coarse, k, before).copy_(self.masks[k])


def network(args: argparse.Namespace, sheet: Sheet, name: str) -> None:
    high, wide = map(int, args.size.split("x"))
    parts = args.part or ["whole", "branches"]
    torch.manual_seed(0)
    guest: Any = load_model(f"offramp:{name}").eval()
    x, few = torch.rand(1, 3, high, wide), torch.rand(2, 3, high // 4, wide // 4)  # small: tracing keeps maps
    net = offramp.attach(guest, few, exits=guest.ends, keep_costly=True,
                         heads=offramp.redesigned(guest.ends, 128 if "w48" in name else 64)).eval()
    with torch.no_grad():
        start = net.begin(x)
        after = net.stages[0](start)
        small = net.begin(few[:1])
        dense = {} if "whole" not in parts else {
            "whole": _engines(args, Dense(net, small, start.values), (x,)),
            "after exit 1": _engines(args, Dense(net, net.stages[0](small), after.values, 1),
                                     (*after.tensors, *after.carried))}
    masked = offramp.mask_(net)
    narrow = {} if args.precision == "fp32" else {"dtype": torch.bfloat16}
    fast: Any = masked.deploy(**narrow)
    held = Held()
    masked.enabled = False
    full = [float(cost) for cost in masked.macs(x)[0]]
    size = fast._first((x,), {})[1].shape[2:]
    masks = [[drawn(size, density)[None, None]] * len(net.sites) for density in args.densities]
    if args.masks:
        masks = kept(args.masks, args.data, args.masks_on, size)
    ready: dict[int, tuple[Branch, Any, Any]] = {}
    for one in masks:
        held.masks = one
        density = float(one[0].float().mean())
        what = f"{name}, {'trained masks, ' if args.masks else ''}density {density:.2f}"
        first = fast._first((x,), {})
        if "whole" in parts:
            later = sum(said[1] for said in fast._announced(*first) if isinstance(said, tuple))
            ratios = {"whole": full[-1] / (full[0] + later), "after exit 1": (full[-1] - full[0]) / later}
            calls = {"whole": lambda: [said.logits for said in fast.steps(x)],
                     "after exit 1": lambda first=first: [said.logits for said in list(fast._walk(*first))[1:]]}
            for part, call in calls.items():
                compared(args, sheet, f"{what}, {part}", call, dense[part], ratios[part], density)
        if "branches" in parts:
            with fast._lent(*first[:2]) as (lowered, _):
                program = lowered.program
            ready = ready or _branches(args, fast, program)
            branches(args, sheet, what, program, ready, one[0])


def _branches(args: argparse.Namespace, fast: Any, program: Program) -> dict[int, tuple[Branch, Any, Any]]:
    """By level, its layers as a module, the sparse side's runner and the engines of the dense one."""
    found = {}
    for at in range(len(program.levels)):
        part = restricted(program, at)
        if not any(isinstance(op, Conv) for op in part.segments[0].ops):
            continue
        branch = Branch(part).eval()
        maps = [torch.rand(1, program.maps[i].channels, program.levels[program.maps[i].level].height,
                           program.levels[program.maps[i].level].width) for i in branch.inputs]
        runner = fast._make(part)
        for i, given in zip(branch.inputs, maps, strict=True):
            runner.write(i, given[0])
        with torch.no_grad():
            found[at] = branch, runner, _engines(args, branch, maps)
    return found


def branches(args: argparse.Namespace, sheet: Sheet, what: str, program: Program,
             ready: Mapping[int, tuple[Branch, Any, Any]], mask: Tensor) -> None:
    """What writes maps of one size, all stages after the first exit together, its inputs being there already."""
    for at, (branch, runner, engines) in ready.items():
        level = program.levels[at]

        def call(runner: Any = runner) -> None:
            runner.settle(mask[0, 0])
            runner.run(0)

        call()
        here = F.interpolate(mask.to(torch.uint8), (level.height, level.width), mode="nearest").bool()
        sparse = int(here.sum()) * branch.macs()
        compared(args, sheet, f"{what}, branch {level.height}x{level.width}", call, engines,
                 branch.macs() * here.numel() / sparse, None)


def compared(args: argparse.Namespace, sheet: Sheet, what: str, call: Callable[[], Any],
             dense: Mapping[str, Callable[[], Any]], ratio: float, density: float | None) -> None:
    """R against whichever engine is the fastest."""
    found = clocked(args, {"sparse": call, **dense})
    engine = min(dense, key=lambda name: found[name][0])
    ours, theirs = found["sparse"], found[engine]
    for name, (ms, spread) in found.items():
        sheet.add(f"{what}: {name}{' (the fastest)' if name == engine else ''}, quartiles {spread:.1f} apart", ms,
                  unit="ms")
    bar = "" if density is None else next((f">= {least:g}" for above, least in bars(args) if density >= above - 0.005),
                                          "")
    sheet.add(f"{what}: {theirs[0] / ours[0]:.2f}x faster for {ratio:.2f}x fewer MACs: R",
              theirs[0] / ours[0] / ratio, unit="1", bar=bar, paper=PAPER if density is not None else None)


def bars(args: argparse.Namespace) -> Sequence[tuple[float, float]]:
    return BARS if args.precision == "fp32" else ()


def clocked(args: argparse.Namespace, calls: Mapping[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """By name (median, distance of quartiles) in ms."""
    if args.clock == "wall":
        return {name: (timing.p50_ms, timing.spread_ms) for name, timing in measure(
            calls, repeats=args.repeats).items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for turn in range(args.repeats + 2):
            for name, call in calls.items():
                began = time.thread_time()
                call()
                if turn > 1:
                    samples[name].append(1e3 * (time.thread_time() - began))
    quartiles = {name: statistics.quantiles(times, n=4) for name, times in samples.items()}
    return {name: (middle, high - low) for name, (low, middle, high) in quartiles.items()}


def _engines(args: argparse.Namespace, net: Any, tensors: Sequence[Tensor]) -> dict[str, Callable[[], Any]]:
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    return {engine: made(net, engine, tensors, dtype) for engine in args.engines}


if __name__ == "__main__":
    main()

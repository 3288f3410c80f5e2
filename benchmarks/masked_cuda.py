"""Masked HRNets on a CUDA device: Triton's kernels at active places against the fastest dense execution, by density.

    python benchmarks/masked_cuda.py              # on a device: W18 and W48 at 512x1024
    python benchmarks/masked_cuda.py --quick      # checks the path; interpreted, slowly, where no device is

Written where there was no such device: until a result file lies beside it, nothing but its path has been checked.

What is compared is all that comes after the first exit, batch 1: three stages, three heads and the network's end.
Dense: norms folded, channels_last, ``cudnn.benchmark``; by PyTorch's own kernels in a CUDA graph, and by
``torch.compile(mode="max-autotune")``; whichever is the faster counts. Ours: ``runner`` takes the frontier's maps,
given masks with their geometry, and gives the exits' logits; ``call`` is what a user calls, with confidences, masks and
the waits of the host. R = speedup / (1 / density), for the part that masks leave to do; interpolation is not counted as
work. Break-even is where ``runner`` and dense cross. Masks are blobs with thin borders: smooth noise above a quantile,
the same after each exit. Weights are random: no clock sees them.
"""

import argparse
import copy
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from torch import Tensor, nn
from torch.nn import functional as F

import offramp
from claims import Sheet
from offramp.cost.latency import measure
from offramp.models import load_model
from offramp.nn.guest import fold_batch_norms_
from offramp.nn.masked import coarse_logits
from offramp.sparse import Plain, Runner, Sparse, Triton

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
PRECISIONS = ("fp32", "tf32", "bf16")
WITHIN = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
"""How far Triton's logits may be from Plain's, of the largest; only the first is a claim about the kernels."""


class After(nn.Module):
    """The stages after the first exit, on all places: (tensors) -> the logits of their exits, before resizing."""

    def __init__(self, net: offramp.MultiExit, state: Any) -> None:
        super().__init__()
        net = copy.deepcopy(net)
        self.values, self.lives = state.values, [len(site.live) for site in net.sites]
        self.stages = nn.ModuleList(stage.module(state.program) for stage in net.stages[1:])
        self.heads = nn.ModuleList(net.head(net.columns[net.columns_at(k)[0]].name) for k in range(1, len(net.sites)))
        for stage in self.stages:
            fold_batch_norms_(stage, stage.graph)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        given: Any = (*tensors, *self.values)
        said = []
        for k, stage in enumerate(self.stages, 1):
            given = stage(*given)
            if k < len(self.lives):
                said.append(coarse_logits(self.heads[k - 1], given[: self.lives[k]])[0])
        return [*said, given[0]]


def blobs(size: Sequence[int], density: float, device: str) -> Tensor:
    """bool (1, 1, h, w)."""
    noise = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(F.avg_pool2d(noise, 9, 1, 4), 5, 1, 2).flatten()
    kept = smooth.argsort(descending=True)[: math.ceil(density * smooth.numel())]
    return torch.zeros(smooth.shape, dtype=torch.bool).index_fill_(0, kept, True).view(1, 1, *size).to(device)


def dense_of(net: offramp.MultiExit, state: Any, engines: Sequence[str]) -> dict[str, Callable[[], Any]]:
    after, tensors = After(net, state).eval(), (*state.tensors, *state.carried)
    tensors = tuple(t.contiguous(memory_format=torch.channels_last) for t in tensors)
    after = after.to(tensors[0].device, memory_format=torch.channels_last)
    found: dict[str, Callable[[], Any]] = {}
    if "eager" in engines:
        found["dense, eager"] = lambda: after(*tensors)
    if "graph" in engines:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside), torch.inference_mode():
            for _ in range(3):
                after(*tensors)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.inference_mode():
            after(*tensors)
        found["dense, graph"] = graph.replay
    if "compile" in engines:
        compiled = torch.compile(after, mode="max-autotune", fullgraph=True)
        found["dense, compiled"] = lambda: compiled(*tensors)
    return found


def ran(runner: Runner, lowered: Any, state: Any, mask: Tensor, outs: Sequence[Tensor]) -> None:
    for map_, tensor in zip(lowered.frontiers[0], (*state.tensors, *state.carried), strict=True):
        if map_ is not None:
            runner.write(map_, tensor[0])
    for k, (map_, out) in enumerate(zip(lowered.logits, outs, strict=True)):
        runner.settle(mask[0, 0])
        runner.run(k)
        runner.read_active(map_, out)


def give_(fast: Sparse, mask: Tensor) -> None:
    """Masks from outside, after the network has taken its own, which is part of the time."""
    takes = type(fast.masked).goes_on

    def goes_on(coarse: Tensor, k: int) -> Tensor:
        own = takes(fast.masked, coarse, k)
        return mask if own.shape == mask.shape else torch.ones_like(own)

    vars(fast.masked)["goes_on"] = goes_on


@torch.inference_mode()
def network(args: argparse.Namespace, sheet: Sheet, name: str, precision: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    high, wide = map(int, args.size.split("x"))
    torch.manual_seed(0)
    with torch.inference_mode(False):
        guest: Any = load_model(f"offramp:{name}").eval().to(device, dtype)
        x = torch.rand(2, 3, high, wide, device=device, dtype=dtype)
        net = offramp.attach(guest, x, exits=guest.ends, keep_costly=True,
                             heads=offramp.redesigned(guest.ends, 128 if "w48" in name else 64))
        net = net.to(device, dtype).eval()
        x = x[:1]
        with torch.no_grad():
            state = net.stages[0](net.begin(x))
        dense = dense_of(net, state, args.engines)
        fast = Sparse(copy.deepcopy(offramp.mask_(net)), engine="eager", runner=Triton, dense_above=1.0, dtype=None)
    first = fast._first((x,), {})
    with fast._lent(*first[:2]) as (lowered, _):
        runner, plain = Triton(lowered.program), Plain(lowered.program)
    sizes = [(lowered.program.maps[map_].channels, lowered.program.levels[lowered.program.maps[map_].level])
             for map_ in lowered.logits]
    outs, known = ([torch.zeros(channels, level.height, level.width, device=device, dtype=dtype)
                    for channels, level in sizes] for _ in range(2))
    crossing = 0.0
    for density in args.densities:
        mask = blobs(first[1].shape[2:], density, device)
        what = f"{name}, {precision}, density {density:g}"
        ran(runner, lowered, first[0], mask, outs)
        ran(plain, lowered, first[0], mask, known)
        error = max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-9)) for a, b in
                    zip(outs, known, strict=True))
        sheet.add(f"{what}: logits, furthest from Plain's", error, unit="1", bar=f"<= {WITHIN[precision]:g}")
        give_(fast, mask)
        calls = {"runner": lambda mask=mask: ran(runner, lowered, first[0], mask, outs),
                 "call": lambda: list(fast._walk(*first))[1:], **dense}
        patience = {} if device == "cuda" else {"warmup": 0, "max_delay": 1.0}
        times = measure(calls, repeats=args.repeats, device=device, **patience)
        best = min(dense, key=lambda engine: times[engine].p50_ms)
        for engine, timing in times.items():
            sheet.add(f"{what}: {engine}{' (the fastest)' * (engine == best)}", timing.p50_ms, unit="ms")
        for ours in ("runner", "call"):
            speedup = times[best].p50_ms / times[ours].p50_ms
            sheet.add(f"{what}: {ours} is {speedup:.2f}x as fast: R", speedup * density, unit="1")
        if times["runner"].p50_ms < times[best].p50_ms:
            crossing = max(crossing, density)
    sheet.add(f"{name}, {precision}: the largest density at which runner wins", crossing, unit="1")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--networks", nargs="+", default=["hrnet_w18_small", "hrnet_w48"])
    options.add_argument("--size", default="512x1024")
    options.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    options.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    options.add_argument("--engines", nargs="+", choices=("eager", "graph", "compile"), default=("graph", "compile"))
    options.add_argument("--repeats", type=int, default=50)
    options.add_argument("--quick", action="store_true")
    args = options.parse_args()
    here = torch.cuda.is_available()
    if args.quick:
        args.networks, args.size, args.densities, args.repeats = args.networks[:1], "32x64", (0.3,), 3 if here else 1
        args.engines = ("eager", "graph") if here else ("eager",)
        args.precisions = args.precisions if here else ("fp32",)
    elif not here:
        raise SystemExit("no CUDA device here: --quick checks the path in Triton's interpreter")
    sheet = Sheet("masked-cuda" + "-quick" * args.quick)
    for name in args.networks:
        for precision in args.precisions:
            network(args, sheet, name, precision)


if __name__ == "__main__":
    main()

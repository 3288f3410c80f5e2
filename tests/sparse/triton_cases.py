"""What programs say on Triton's kernels, held against PyTorch on whole maps in float64; run by ``test_triton.py``.

Triton decides when it is imported whether its kernels are compiled or interpreted, so that without a device the cases
run in a process of their own: ``python triton_cases.py`` writes what came of each, as JSON.
"""

import copy
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel.masks import MASKS, mask_of
from kernel.programs import BILINEAR, CORNERS, NEAREST, some_network
from kernel.witness import Sketch, simulate, stands
from offramp import mask_
from offramp._kernel.ops import Conv, Op, Pool, Program, Sum, Term, Window
from offramp.errors import OfframpError
from offramp.sparse import Plain, Sparse, Triton
from sparse.nets import agree as alike
from sparse.nets import mixed

# kept small: the interpreter goes place by place
small_network = partial(some_network, operations=6, most=(11, 13), kernels=(1, 3, 3, 5, (1, 7), (3, 1)))


def agree(
    program: Program, given: dict[int, Tensor], masks: Sequence[Tensor], device: str, within: float = 1e-4
) -> Triton:
    """Kept maps are the simulation's where they must stand, and densities those of ``Plain``."""
    runner, plain = Triton(moved(program, device)), Plain(program)
    for rows in runner._maps:
        rows.fill_(torch.nan)  # what is read and was never written, would show
    for map_, x in given.items():
        runner.write(map_, x.to(device))
    for number, mask in enumerate(masks):
        runner.settle(mask.to(device))
        plain.settle(mask)
        for level in range(len(program.levels)):
            assert abs(runner.density(level) - plain.density(level)) < 1e-6, f"density of level {level}"
        assert runner.run(number)
    expected = simulate(program, given, masks)
    under = {op.out.map: mask for segment, mask in zip(program.segments, masks, strict=True) for op in segment.ops}
    for map_ in sorted(program.kept):
        place = stands(program, program.maps[map_].region, under.get(map_, masks[0]))
        known = expected[map_][:, place]
        size = max(1.0, known.abs().max().item()) if known.numel() else 1.0
        torch.testing.assert_close(runner.read(map_).cpu().double()[:, place], known, rtol=0, atol=within * size,
                                   msg=lambda m, at=map_: f"map {at}: {m}")
        plain.settle(under.get(map_, masks[0]))
        active = plain._active(program.maps[map_].level)
        if map_ in under and under[map_] is masks[-1]:
            out = torch.full_like(expected[map_], 7.0, dtype=torch.float32)
            runner.read_active(map_, (there := out.to(device)))
            torch.testing.assert_close(there.cpu().double()[:, active], expected[map_][:, active], rtol=0,
                                       atol=within * size)
            assert (there.cpu()[:, ~active] == 7).all(), "settled places were written"
    return runner


def moved(program: Program, device: str, dtype: torch.dtype = torch.float32) -> Program:
    def to(op: Op) -> Op:
        names = ("weight", "scale", "shift", "bare") if isinstance(op, Conv) else (
            ("scale", "shift") if isinstance(op, Sum) else ())
        return replace(op, **{name: getattr(op, name).to(device, dtype) for name in names
                              if getattr(op, name) is not None})

    return replace(program, segments=tuple(
        replace(part, ops=tuple(to(op) for op in part.ops)) for part in program.segments))


def network(seed: int, device: str) -> None:
    agree(*small_network(seed, MASKS[seed % len(MASKS)]), device)


def of_masks(kind: str, device: str) -> None:
    """Every kind of mask under the operations of an HRNet: branches, strides, resizes up, residuals."""
    sketch = Sketch(3)
    fine, coarse = sketch.map(18, 9, 14), sketch.map(36, 5, 7)
    for _ in range(2):
        fine = sketch.conv(fine, 18, residual=fine, lam=3.0)
        coarse = sketch.conv(coarse, 36, groups=2, residual=coarse)
    up, out = sketch.conv(coarse, 18, 1, relu=False), sketch.map(18, 9, 14)
    sketch.add(Sum((Term(sketch.whole(fine)), Term(sketch.whole(up), BILINEAR)), sketch.whole(out), relu=True))
    down = sketch.conv(fine, 36, stride=2, residual=coarse)
    last = sketch.conv(out, 20, (3, 5), dilation=2, relu=False)
    mask = mask_of(kind, 9, 14, 0.3, sketch.draw)
    given = {map_: torch.randn(sketch.maps[map_][1], *sketch.size(map_), generator=sketch.draw) for map_ in (0, 1)}
    agree(sketch.program([0, 1, down, last]), given, [mask], device)


def of_resizes(device: str) -> None:
    """To the last bit of where they read."""
    for size, how in ((size, how) for size in (1, 2, 7, 12) for how in (BILINEAR, CORNERS, NEAREST)):
        sketch = Sketch(size)
        x = torch.randn(1, size, 15 - size, generator=sketch.draw)
        first, outs = sketch.map(1, size, 15 - size), []
        for to in (1, 5, 7, 18):
            out = sketch.map(1, to, 20 - to)
            outs.append(sketch.add(Sum((Term(sketch.whole(first), how),), sketch.whole(out))))
        outs.append(sketch.conv(first, 1))
        agree(sketch.program([first, *outs]), {first: x}, [torch.ones(1, 1, dtype=torch.bool)], device, 1e-6)


def of_ragged_means(device: str) -> None:
    """Where windows leave the map by more than its padding, as with ``ceil_mode``, these rows are never counted."""
    for padding, counts in ((0, True), (1, True), (1, False)):
        x = torch.randn(1, 5, 8, 6)
        expected = F.avg_pool2d(x, 3, 2, padding, ceil_mode=True, count_include_pad=counts)[0]
        sketch = Sketch()
        first, out = sketch.map(5, 8, 6), sketch.map(5, *expected.shape[1:])
        sketch.add(Pool(sketch.whole(first), sketch.whole(out), Window((3, 3), (2, 2), (padding,) * 2), "mean", counts))
        program = sketch.program([first, out, sketch.conv(first, 1)])
        runner = Triton(moved(program, device))
        runner.write(first, x[0].to(device))
        runner.settle(torch.ones(8, 6, dtype=torch.bool, device=device))
        assert runner.run(0)
        torch.testing.assert_close(runner.read(out).cpu(), expected)


def of_a_sharp_kernel(device: str) -> None:
    """exp(-30^2) is 0 in any float: the nearest all the same; and what is not a number stays one, far from others."""
    sketch = Sketch()
    first = sketch.map(1, 5, 12)
    raw = sketch.conv(first, 1, 1, relu=True, lam=30.0)
    op = sketch.segments[-1][-1]
    assert isinstance(op, Conv)
    one = torch.ones(1)
    sketch.segments[-1][-1] = replace(op, weight=torch.ones(1, 1, 1, 1), scale=one, shift=0 * one, bare=0 * one)
    last = sketch.conv(raw, 1)  # reads beside the active places
    mask = torch.zeros(5, 12, dtype=torch.bool)
    mask[2, 2] = mask[2, 4] = mask[0, 0] = mask[3, 11] = True
    x = torch.arange(60.0).reshape(1, 5, 12)
    x[0, 3, 11] = torch.nan
    runner = Triton(moved(sketch.program([first, raw, last]), device))
    runner.write(first, x.to(device))
    runner.settle(mask.to(device))
    assert runner.run(0)
    got, x = runner.read(raw)[0].cpu(), x[0]
    assert got[2, 3] == (x[2, 2] + x[2, 4]) / 2 and got[1, 5] == x[2, 4] and got[0, 1] == x[0, 0]
    assert got[1, 1] == (x[2, 2] + x[0, 0]) / 2  # two corners, equally far
    assert got[3, 11].isnan() and got[2, 10].isnan()


def of_halves(device: str) -> None:
    """As Plain's, which rounds in the same places but for the sums within an operation. bfloat16 on a device alone: the
    interpreter multiplies its bits as numbers."""
    for dtype, within in ((torch.float16, 4e-3), *([(torch.bfloat16, 3e-2)] if device == "cuda" else [])):
        program, given, masks = small_network(3, "random")
        program = moved(program, device, dtype)
        runner, plain = Triton(program), Plain(program)
        for number, mask in enumerate(masks):
            for one in (runner, plain):
                if not number:
                    for map_, x in given.items():
                        one.write(map_, x.to(device, dtype))
                one.settle(mask.to(device))
                assert one.run(number)
        last = max(program.kept)
        found, known = (torch.zeros(program.maps[last].channels, *plain.read(last).shape[1:], device=device)
                        for _ in range(2))
        runner.read_active(last, found)
        plain.read_active(last, known)
        assert known.any()
        torch.testing.assert_close(found, known, rtol=0, atol=within * float(known.abs().max()))


def of_a_masked_network(device: str) -> None:
    """From end to end, against the dense simulation."""
    net, x = mixed((16, 20), batch=2)
    masked = mask_(net.to(device), share=0.5)
    fast = Sparse(copy.deepcopy(masked), engine="eager", runner=Triton, dense_above=1.0, dtype=None)
    with torch.no_grad():
        masks = alike(masked, fast, x.to(device))
    assert 0 < float(masks[0].float().mean()) < 1


def of_a_stop(device: str) -> None:
    """A run that is stopped says so, and is not gone on with; after a new mask all is as ever."""
    program, given, masks = small_network(2, "random")
    runner = Triton(moved(program, device))
    for asked in ({"stop": torch.ones(1, dtype=torch.int32)}, {"deadline_ns": 1}):
        runner.settle(masks[0].to(device))
        assert runner.run(0, **asked) is False
        try:
            runner.run(0)
        except OfframpError as error:
            assert "settle" in str(error)
        else:
            raise AssertionError("a stopped run was gone on with")
    for map_, x in given.items():
        runner.write(map_, x.to(device))
    for number, mask in enumerate(masks):
        runner.settle(mask.to(device))
        assert runner.run(number, torch.zeros(1, dtype=torch.int32), time.monotonic_ns() + 10**12)
    last = max(program.kept)
    expected = simulate(program, given, masks)[last]
    place = stands(program, program.maps[last].region, masks[-1])
    torch.testing.assert_close(runner.read(last).cpu().double()[:, place], expected[:, place], rtol=1e-4, atol=1e-4)


CASES: dict[str, Callable[[str], None]] = {
    **{f"network {seed}": partial(network, seed) for seed in range(14)},
    **{f"mask: {kind}": partial(of_masks, kind) for kind in MASKS},
    "resizes": of_resizes, "ragged means": of_ragged_means, "a sharp kernel": of_a_sharp_kernel, "halves": of_halves,
    "a masked network": of_a_masked_network, "a stop": of_a_stop,
}


def main() -> None:
    said = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        try:
            case("cpu")
            said[name] = ""
        except Exception:
            said[name] = traceback.format_exc()
        Path(sys.argv[1]).write_text(json.dumps(said))


if __name__ == "__main__":
    main()

"""Programs to run, drawn or given, and whether the kernel agrees with their dense simulation."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernel.masks import mask_of
from kernel.witness import Sketch, simulate, stands
from offramp import _kernel as kernel
from offramp._kernel.ops import (
    Pool,
    Program,
    Resize,
    Sum,
    Term,
    View,
    Window,
)

BILINEAR, CORNERS, NEAREST = Resize("bilinear"), Resize("bilinear", True), Resize("nearest")
KERNELS = (1, 3, 3, 5, 7, (1, 7), (3, 1))


def agree(
    program: Program, given: dict[int, Tensor], masks: Sequence[Tensor], isa: str | None = None, *,
    within: float = 2e-5, dtype: torch.dtype = torch.float32,
) -> kernel.Kernel:
    """All kept maps are the simulation's where they must stand."""
    runner = kernel.Kernel(program, isa=isa, dtype=dtype)
    for inside in insides(runner):
        inside.fill_(torch.nan)  # what is read and was never written, would show
    for map_, x in given.items():
        runner.write(map_, x)
    for number, mask in enumerate(masks):
        runner.settle(mask)
        assert runner.run(number)
    expected = simulate(program, given, masks)
    under = {op.out.map: mask for segment, mask in zip(program.segments, masks, strict=True) for op in segment.ops}
    for map_ in sorted(program.kept):
        place = stands(program, program.maps[map_].region, under.get(map_, masks[0]))
        found, known = runner.read(map_).double()[:, place], expected[map_][:, place]
        size = max(1.0, known.abs().max().item()) if known.numel() else 1.0
        torch.testing.assert_close(found, known, rtol=0, atol=within * size, msg=lambda m, at=map_: f"map {at}: {m}")
    for inside in insides(runner):
        inside.zero_()
    assert not any(memory.any() for memory in runner._memory), "a frame was written"
    return runner


def insides(runner: kernel.Kernel) -> list[Tensor]:
    """All memory but frames, each (C, H, W)."""
    return [memory.as_strided((own.channels, own.height, own.width), (1, own.row, own.channels), own.origin)
            for memory, own in zip(runner._memory, runner._layout.buffers, strict=True)]


def some_network(
    seed: int, kind: str, operations: int = 9, most: tuple[int, int] = (21, 25), kernels: Sequence[Any] = KERNELS
) -> tuple[Program, dict[int, Tensor], list[Tensor]]:
    """Operations of all kinds over one another's outputs, in two segments; few maps are kept, so that memory is shared.

    most: places down and across. kernels: of convolutions.
    """
    draw = random.Random(seed)
    sketch = Sketch(seed)
    height, width = draw.randint(1, most[0]), draw.randint(1, most[1])
    first = sketch.map(draw.choice([1, 3, 16, 18, 36]), height, width)
    maps = [first]
    for number in range(operations):
        if number == operations // 2:
            sketch.segments.append([])
        source = draw.choice(maps[-3:])
        tall, wide = sketch.size(source)
        channels = sketch.maps[source][1]
        what = draw.choice(["conv", "conv", "conv", "sum", "cat", "pool"])
        if what == "conv":
            maps.append(some_conv(sketch, source, maps, draw, kernels))
        elif what == "sum":
            like = [other for other in maps if sketch.maps[other][1] == channels]
            terms = tuple(
                Term(sketch.whole(other), draw.choice([None, BILINEAR]) if sketch.size(other) == (tall, wide)
                     else draw.choice([BILINEAR, CORNERS, NEAREST]))
                for other in draw.sample(like, draw.randint(1, min(3, len(like)))))
            finish = [torch.randn(channels, generator=sketch.draw) if draw.random() < 0.5 else None for _ in range(2)]
            out = sketch.map(channels, tall, wide)
            maps.append(sketch.add(Sum(terms, sketch.whole(out), *finish, draw.random() < 0.5)))
        elif what == "cat":
            other = draw.choice(maps)
            out = sketch.map(channels + sketch.maps[other][1], tall, wide)
            sketch.add(Sum((Term(sketch.whole(source)),), View(out, 0, channels)))
            sketch.add(Sum((Term(sketch.whole(other), draw.choice([BILINEAR, NEAREST])),),
                           View(out, channels, sketch.maps[other][1])))
            maps.append(out)
        else:
            stride = draw.choice([1, 2])
            out = sketch.map(channels, (tall - 1) // stride + 1, (wide - 1) // stride + 1)
            maps.append(sketch.add(Pool(sketch.whole(source), sketch.whole(out), Window((3, 3), (stride,) * 2, (1, 1)),
                                        draw.choice(["mean", "max"]), draw.random() < 0.5)))
    kept = {first, maps[-1], *draw.sample(maps, 2)} - {None}
    mask = mask_of(kind, draw.randint(1, height), draw.randint(1, width), draw.uniform(0.02, 0.7), sketch.draw)
    later = mask & (torch.rand(mask.shape, generator=sketch.draw) < draw.choice([0.3, 1.0]))
    x = torch.randn(sketch.maps[first][1], height, width, generator=sketch.draw)
    return sketch.program(sorted(kept)), {first: x}, [mask, later]


def some_conv(
    sketch: Sketch, source: int, maps: list[int], draw: random.Random, kernels: Sequence[Any] = KERNELS
) -> int:
    channels = sketch.maps[source][1]
    count = draw.randint(1, channels)
    view = draw.choice([sketch.whole(source), View(source, draw.randint(0, channels - count), count)])
    size = draw.choice(kernels)
    stride, dilation = draw.choice([(1, 1), (1, 1), (2, 1), (1, 2), (3, 1), (2, 3)])
    groups = draw.choice([1, 1, view.count, max(n for n in (1, 2, 3) if view.count % n == 0)])
    outputs = view.count if groups == view.count else groups * draw.choice([1, 7, 16, 24, 33, 50])
    like = [other for other in maps if sketch.maps[other] == (sketch.maps[source][0], outputs)]
    residual = draw.choice(like) if like and stride == 1 and draw.random() < 0.7 else None
    return sketch.conv(view, outputs, size, stride=stride, dilation=dilation, groups=groups, residual=residual,
                       relu=draw.random() < 0.5, lam=draw.choice([0.0, 0.3, 1.0, 3.0]))

"""One kernel's calls: given up, one at a time, what goes in and out, and what is refused."""

import re
import threading
import time
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from kernel.masks import mask_of
from kernel.witness import Sketch
from offramp import _kernel as kernel
from offramp._kernel.ops import Conv, Level, Op, Pool, Read, Region, Resize, Segment, Sum, Term, View, Window
from offramp.errors import OfframpError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    HERE = kernel.available()
pytestmark = pytest.mark.skipif(not HERE, reason="the kernel was not built")
BILINEAR = Resize("bilinear")


def a_chain(length: int = 40, size: int = 48) -> tuple[kernel.Kernel, int, int]:
    sketch = Sketch()
    first = last = sketch.map(32, size, size)
    for number in range(length):
        if number == length // 2:
            sketch.segments.append([])
        last = sketch.conv(last, 32)
    runner = kernel.Kernel(sketch.program([first, last]))
    runner.write(first, torch.ones(32, size, size))
    runner.settle(torch.ones(size, size, dtype=torch.bool))
    return runner, first, last


def test_a_run_is_given_up_by_a_flag_or_a_deadline_and_begins_anew() -> None:
    runner, first, last = a_chain()
    stop = torch.zeros(1, dtype=torch.int32)
    assert runner.run(0, stop, time.monotonic_ns() + 10**12)
    stop.fill_(1)
    assert not runner.run(1, stop)
    with pytest.raises(OfframpError, match="segment 0 completed before"):
        runner.run(1)
    assert not runner.run(0, deadline_ns=time.monotonic_ns() - 1) and not runner.run(0, deadline_ns=0)
    started = time.monotonic_ns()
    assert runner.run(0) and runner.run(1)
    took = time.monotonic_ns() - started
    said = runner.read(last)
    assert not runner.run(0, deadline_ns=time.monotonic_ns() + took // 20)  # within the segment
    assert runner.run(0) and runner.run(1) and torch.equal(runner.read(last), said)
    with pytest.raises(OfframpError, match="segment 0 completed before"):
        runner.run(1)


def test_a_flag_set_by_another_thread_ends_a_run_within_a_segment(two_threads: None) -> None:
    runner, _, _ = a_chain(80, 128)
    stop = torch.zeros((), dtype=torch.int32)
    other = threading.Timer(0.01, lambda: stop.fill_(1))
    other.start()
    assert not runner.run(0, stop)
    other.join()


def test_a_kernel_is_for_one_call_at_a_time() -> None:
    runner, first, last = a_chain(80, 128)
    worker = threading.Thread(target=runner.run, args=(0,))
    worker.start()
    calls = [lambda: runner.settle(torch.ones(2, 2, dtype=torch.bool)), lambda: runner.run(0),
             lambda: runner.write(first, torch.zeros(32, 128, 128)), lambda: runner.read(last),
             lambda: runner.write_region(first, torch.zeros(32, 128, 128)),
             lambda: runner.read_active(last, torch.zeros(32, 128, 128))]
    while not runner._lock.locked():
        pass
    for call in calls:
        with pytest.raises(OfframpError, match="a kernel of its own"):
            call()
    worker.join()
    assert runner.run(1)


@pytest.mark.parametrize("last", [False, True])
def test_what_is_written_is_read_in_any_order_of_memory(last: bool) -> None:
    sketch = Sketch()
    first = sketch.map(5, 6, 7)
    runner = kernel.Kernel(sketch.program([first]))
    order = torch.channels_last if last else torch.contiguous_format
    x, out = (torch.randn(1, 5, 6, 7).contiguous(memory_format=order)[0] for _ in range(2))
    runner.write(first, x)
    assert torch.equal(runner.read(first), x)
    mask, before = mask_of("random", 6, 7, 0.5, sketch.draw), out.clone()
    runner.settle(mask)
    runner.read_active(first, out)
    assert torch.equal(out, torch.where(mask, x, before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "empty", "full", "one"])
def test_a_region_is_written_and_nothing_beside_it(kind: str, dtype: torch.dtype, two_threads: None) -> None:
    """What the convolutions read: active places and those beside them."""
    sketch = Sketch()
    first = sketch.map(5, 40, 41)
    runner = kernel.Kernel(sketch.program([first, sketch.conv(first, 4)]), dtype=dtype)
    mask = mask_of(kind, 40, 41, 0.2, sketch.draw)
    reads = F.max_pool2d(mask[None].float(), 3, 1, 1)[0].bool()
    runner.settle(mask)
    for given in (torch.float32, torch.bfloat16):
        for x in (torch.randn(5, 40, 41).to(given), torch.randn(40, 5, 41).to(given).transpose(0, 1)):
            runner.write(first, torch.full((5, 40, 41), 7.0))
            runner.write_region(first, x)
            assert torch.equal(runner.read(first), torch.where(reads, x, 7.0).to(dtype))


def test_a_view_is_the_map_itself() -> None:
    sketch = Sketch()
    first = sketch.map(5, 6, 7)
    runner, x = kernel.Kernel(sketch.program([first])), torch.randn(5, 6, 7)
    view = runner.view(first)
    runner.write(first, x)
    assert torch.equal(view, x) and view.stride(0) == 1
    with pytest.raises(OfframpError, match="which are kept"):
        runner.view(1)


def test_faults_are_named() -> None:
    sketch = Sketch()
    first, other = sketch.map(6, 8, 8), sketch.map(6, 4, 4)
    good = sketch.conv(first, 6)
    program = sketch.program([first, other])
    op = sketch.segments[0][0]
    assert isinstance(op, Conv) and kernel.faults(program) == []
    whole, small, out = sketch.whole(first), sketch.whole(other), sketch.whole(good)
    faults: list[tuple[Op, str]] = [
        (replace(op, weight=torch.ones(6, 3, 3, 3)), "weight (6, 3, 3, 3)"),
        (replace(op, groups=4), "in 4 groups"),
        (replace(op, shift=torch.ones(5)), "shift (5,)"),
        (replace(op, lam=float("nan")), "lambda nan"),
        (replace(op, scale=torch.ones(6, device="meta")), "scale of"),
        (replace(op, weight=op.weight.to(torch.int8)), "weight of torch.int8"),
        (replace(op, out=View(good, 1, 6)), "no part of a map"),
        (replace(op, out=whole), "writes what it reads"),
        (replace(op, source=out), "which nobody has written"),
        (replace(op, residual=small), "a residual of another size"),
        (replace(op, window=Window((3, 3), (0, 1))), "stride=(0, 1)"),
        (Pool(View(first, 0, 5), out, Window((3, 3)), "max"), "5 channels into 6"),
        (Sum((), out), "no terms"),
        (Sum((Term(small),), out), "not resized"),
        (Sum((Term(View(first, 0, 5)),), out), "5 channels into 6"),
        (Sum((Term(out, BILINEAR),), out), "writes what it reads"),
        (Sum((Term(whole),), out, scale=torch.ones(3)), "scale (3,)"),
    ]
    for bad, words in faults:
        wrong = replace(program, segments=(Segment("late", (bad,)),))
        told = kernel.faults(wrong)
        assert any(words in fault and "'late'" in fault for fault in told), (words, told)
        with pytest.raises(OfframpError, match=re.escape(words)):
            kernel.Kernel(wrong)
    shapes = [
        (replace(program, kept=frozenset([9])), "are no maps"),
        (replace(program, levels=(Level(70000, 1), Level(4, 4))), "70000 x 1"),
        (replace(program, maps=(replace(program.maps[0], region=9), *program.maps[1:])), "region that is none"),
        (replace(program, maps=(replace(program.maps[0], level=1), *program.maps[1:])), "its region is of another"),
        (replace(program, regions=(Region(0, (Read(0, 0, BILINEAR),)),)), "a region not before it"),
    ]
    for wrong, words in shapes:
        assert any(words in fault for fault in kernel.faults(wrong)), (words, kernel.faults(wrong))


def test_calls_that_do_not_fit_are_refused() -> None:
    runner, first, last = a_chain(2, 4)
    calls = [
        (lambda: kernel.Kernel(runner.program, isa="sse9"), "instruction sets"),
        (lambda: kernel.Kernel(runner.program, cutoff=1.0), "cutoff"),
        (lambda: runner.settle(torch.ones(4, 4)), "a mask (H, W) of bool"),
        (lambda: runner.settle(torch.ones(1, 4, 4) > 0), "a mask (H, W) of bool"),
        (lambda: runner.settle(torch.ones(0, 4) > 0), "a mask (H, W) of bool"),
        (lambda: runner.write(first, torch.ones(32, 4, 5)), "shape (32, 4, 4)"),
        (lambda: runner.read(1), "which are kept"),
        (lambda: runner.read_active(last, torch.ones(32, 4, 4).double()), "float32"),
        (lambda: runner.write_region(first, torch.ones(32, 4, 4).double()), "float32"),
        (lambda: runner.write_region(first, torch.ones(32, 4, 5)), "shape (32, 4, 4)"),
        (lambda: runner.run(2), "a segment of 2"),
        (lambda: runner.run(0, torch.zeros(1)), "one int32"),
    ]
    for call, words in calls:
        with pytest.raises(OfframpError, match=re.escape(words)):
            call()

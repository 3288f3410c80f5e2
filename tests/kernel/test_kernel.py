"""The compiled kernel against a dense simulation by PyTorch, in float64, of every instruction set of this machine."""

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernel.witness import halo_of, interpolated, simulated
from offramp import _kernel as kernel
from offramp._kernel import native
from offramp.errors import OfframpError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    HERE = kernel.available()
needs_kernel = pytest.mark.skipif(not HERE, reason="the kernel was not built")
SETS = kernel.isas()
MASKS = ["empty", "full", "one", "borders", "all but one", "random"]


def mask_of(kind: str, height: int, width: int, density: float, draw: torch.Generator) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    spot = tuple(int(torch.randint(size, (1,), generator=draw)) for size in (height, width))
    if kind in ("full", "all but one"):
        mask[:] = True
    if kind in ("one", "all but one"):
        mask[spot] = kind == "one"
    if kind == "borders":
        mask[[0, -1]], mask[:, [0, -1]] = True, True
    return torch.rand(height, width, generator=draw) < density if kind == "random" else mask


def agree(
    mask: Tensor, inputs: int, outputs: int, size: int, stride: int, isa: str, draw: torch.Generator, *,
    odd: tuple[int, int] = (0, 0), extras: int = 7, sharpness: float = 1.0, threads: int = 1, cutoff: float = 2.0**-26,
) -> None:
    """One convolution both ways: the same at active and halo places; the frame and the rest untouched."""
    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    height, width = mask.shape
    tall, wide = (n if stride == 1 else 2 * n - o for n, o in zip((height, width), odd, strict=True))
    x, weight = some(inputs, tall, wide), some(outputs, inputs, size, size) / (inputs * size * size) ** 0.5
    scale, shift = (some(outputs), some(outputs)) if extras & 1 else (None, None)
    residual = some(outputs, height, width) if extras & 2 else None
    relu = bool(extras & 4)
    expected = simulated(x, weight, mask, stride=stride, scale=scale, shift=shift, residual=residual, relu=relu,
                         sharpness=sharpness).permute(1, 2, 0)
    source, out = kernel.framed(tall, wide, inputs), torch.full((height + 2, width + 2, outputs), torch.nan)
    source[1:-1, 1:-1] = x.permute(1, 2, 0)
    extra = None
    if residual is not None:
        extra = kernel.framed(height, width, outputs)
        extra[1:-1, 1:-1] = residual.permute(1, 2, 0)
    kernel.convolve(kernel.pack(weight, isa), source, out, kernel.find_places(mask), stride=stride, scale=scale,
                    shift=shift, residual=extra, relu=relu, sharpness=sharpness, threads=threads, cutoff=cutoff)
    found = out[1:-1, 1:-1].double()
    assert torch.equal(found.isnan(), expected.isnan()), "other places were written than active ones and their halo"
    assert out[[0, -1]].isnan().all() and out[:, [0, -1]].isnan().all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("isa", SETS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_kernel_is_the_dense_simulation(isa: str, data: st.DataObject) -> None:
    channels = st.sampled_from([1, 3, 16, 18, 36, 48, 64, 96, 130])
    inputs, outputs = data.draw(channels), data.draw(channels)
    height, width = data.draw(st.integers(1, 13)), data.draw(st.integers(1, 17))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    mask = mask_of(data.draw(st.sampled_from(MASKS)), height, width, data.draw(st.floats(0.02, 0.9)), draw)
    agree(mask, inputs, outputs, data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([1, 2])), isa, draw,
          odd=data.draw(st.tuples(st.integers(0, 1), st.integers(0, 1))), extras=data.draw(st.integers(0, 7)),
          sharpness=data.draw(st.sampled_from([0.0, 0.3, 1.0, 3.0])))


@needs_kernel
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("kind", MASKS)
def test_every_kind_of_mask(kind: str, isa: str) -> None:
    draw = torch.Generator().manual_seed(3)
    agree(mask_of(kind, 9, 11, 0.3, draw), 18, 36, 3, 1, isa, draw)


@needs_kernel
@pytest.mark.parametrize("isa", SETS)
def test_blocks_of_channels_one_after_the_other_on_two_threads(isa: str) -> None:
    """Weights of more than 1 MB, more places than a chunk, and a pool: other loops than small networks take."""
    draw = torch.Generator().manual_seed(4)
    agree(mask_of("random", 24, 23, 0.5, draw), 180, 181, 3, 1, isa, draw, threads=2)
    agree(mask_of("random", 40, 41, 0.4, draw), 5, 21, 3, 2, isa, draw, threads=2)


@needs_kernel
def test_places_by_brute_force() -> None:
    draw = torch.Generator().manual_seed(5)
    for kind in MASKS:
        mask = mask_of(kind, 8, 12, 0.2, draw)
        places = kernel.find_places(mask)
        inside = torch.arange(10 * 14).reshape(10, 14)[1:-1, 1:-1]
        assert places.active.tolist() == inside[mask].tolist()
        assert places.halo.tolist() == inside[halo_of(mask)].tolist()
        assert places.density == pytest.approx(mask.double().mean().item())
        assert sorted(places.slot[places.slot >= 0].tolist()) == list(range(places.rows))
        place_of = {slot: place for slot, place in zip(places.slot.tolist(), places.active.tolist(), strict=True)}
        for i, at in enumerate(places.halo.tolist()):
            span = slice(int(places.start[i]), int(places.start[i + 1]))
            got = {(place_of[s], d) for s, d in zip(places.source[span].tolist(), places.square[span].tolist(),
                                                     strict=True)}
            y, x = divmod(at, 14)
            assert got == {(other, d) for other in places.active.tolist()
                           if max(abs(other // 14 - y), abs(other % 14 - x)) <= 3
                           and (d := (other // 14 - y) ** 2 + (other % 14 - x) ** 2)}
            assert places.square[span].tolist() == sorted(places.square[span].tolist())


@needs_kernel
def test_a_sharp_kernel_takes_the_nearest_and_not_nothing() -> None:
    """exp(-30^2) is 0 in any float: the papers' quotient as it is printed would be 0 / 0."""
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[2, 2] = mask[2, 4] = mask[0, 0] = True
    x = torch.arange(30.0).reshape(5, 6, 1)
    source, out = kernel.framed(5, 6, 1), kernel.framed(5, 6, 1)
    source[1:-1, 1:-1] = x
    kernel.convolve(kernel.pack(torch.ones(1, 1, 1, 1)), source, out, kernel.find_places(mask), sharpness=30.0)
    got = out[1:-1, 1:-1, 0]
    assert got[2, 3] == (x[2, 2] + x[2, 4]) / 2 and got[1, 5] == x[2, 4] and got[0, 1] == x[0, 0]
    assert got[1, 1] == (x[2, 2] + x[0, 0]) / 2  # two corners, equally far
    assert interpolated(x.permute(2, 0, 1).double(), mask, 30.0).isnan().any()


@needs_kernel
@pytest.mark.parametrize(("cutoff", "within"), [(0.0, 1e-6), (2.0**-26, 1e-6), (1e-3, 3e-3)])
def test_what_a_cutoff_costs(cutoff: float, within: float) -> None:
    draw = torch.Generator().manual_seed(6)
    mask, weight = mask_of("random", 20, 20, 0.3, draw), torch.randn(4, 4, 1, 1, generator=draw)
    x = torch.randn(4, 20, 20, generator=draw)
    expected = simulated(x, weight, mask, stride=1, scale=None, shift=None, residual=None, relu=False, sharpness=3.0)
    source, out = kernel.framed(20, 20, 4), torch.full((22, 22, 4), torch.nan)
    source[1:-1, 1:-1] = x.permute(1, 2, 0)
    kernel.convolve(kernel.pack(weight), source, out, kernel.find_places(mask), sharpness=3.0, cutoff=cutoff)
    error = (out[1:-1, 1:-1].permute(2, 0, 1) - expected).abs().nan_to_num(0).max().item()
    assert error < within * x.abs().max().item()
    assert (error > 1e-5) == (cutoff == 1e-3)


@needs_kernel
def test_a_chain_closes_on_its_halo() -> None:
    """Three masked convolutions, strided ones under nested masks: no place is read that was not written."""
    draw = torch.Generator().manual_seed(7)
    fine = mask_of("random", 16, 20, 0.1, draw)
    coarse = fine[::2, ::2]  # by nearest, so that the fine mask holds what the coarse one reads from
    weights = [torch.randn(6, 6, 3, 3, generator=draw) / 7 for _ in range(3)]
    x = torch.randn(6, 16, 20, generator=draw)
    y, source = x, kernel.framed(16, 20, 6)
    source[1:-1, 1:-1] = x.permute(1, 2, 0)
    for weight, mask, stride in zip(weights, (fine, fine, coarse), (1, 1, 2), strict=True):
        raw = nn.functional.conv2d(y[None].double(), weight.double(), stride=stride, padding=1)[0]
        filled = interpolated(raw, mask, 3.0).nan_to_num(1e9)  # far from any active place: must never be read
        y = torch.where(mask, raw, filled)
        out = torch.full((mask.shape[0] + 2, mask.shape[1] + 2, 6), torch.nan)
        out[[0, -1]], out[:, [0, -1]] = 0, 0
        kernel.convolve(kernel.pack(weight), source, out, kernel.find_places(mask), stride=stride)
        source = out
    torch.testing.assert_close(source[1:-1, 1:-1].permute(2, 0, 1)[:, coarse].double(), y[:, coarse], rtol=1e-5,
                               atol=1e-5)


@needs_kernel
def test_residual_may_be_the_output_and_a_nan_stays() -> None:
    mask = torch.tensor([[True, False, False, True]])
    source, out = kernel.framed(1, 4, 1), kernel.framed(1, 4, 1)
    source[1, 1:-1, 0], out[1, 1:-1, 0] = torch.tensor([1.0, 0.0, 0.0, torch.nan]), torch.tensor([5.0, 6.0, 7.0, 8.0])
    kernel.convolve(kernel.pack(torch.ones(1, 1, 1, 1)), source, out, kernel.find_places(mask), residual=out, relu=True,
                    sharpness=30.0)
    assert out[1, 1:3, 0].tolist() == [6.0, 7.0] and out[1, 3:5].isnan().all()


@needs_kernel
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp is Linux's")
def test_threads_are_torchs_own() -> None:
    """After torch has its two threads, a call on two adds none; and numbers too small to be normal keep their value."""
    code = """
import os, torch
from offramp import _kernel as kernel
assert kernel.shares_threads()
torch.set_num_threads(2)
torch.randn(400, 400) @ torch.randn(400, 400); torch.randn(1 << 20).sin()
before = len(os.listdir("/proc/self/task"))
source, out = kernel.framed(64, 64, 16), kernel.framed(64, 64, 16)
places = kernel.find_places(torch.ones(64, 64, dtype=torch.bool))
for _ in range(3):
    kernel.convolve(kernel.pack(torch.randn(16, 16, 3, 3)), source, out, places)
assert len(os.listdir("/proc/self/task")) == before, (before, os.listdir("/proc/self/task"))
tiny = torch.full((1,), 1e-40)
assert (tiny * 1.0).item() != 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@needs_kernel
def test_faults_are_named() -> None:
    places, packed = kernel.find_places(torch.ones(4, 5)  > 0), kernel.pack(torch.ones(2, 3, 3, 3))
    source, out = kernel.framed(4, 5, 3), kernel.framed(4, 5, 2)
    faults = [
        (lambda: kernel.find_places(torch.ones(4, 5)), "mask"),
        (lambda: kernel.find_places(torch.ones(1, 4, 5) > 0), "mask"),
        (lambda: kernel.pack(torch.ones(2, 3, 5, 5)), "k = 1 or 3"),
        (lambda: kernel.pack(torch.ones(2, 3, 3, 3).double()), "float32"),
        (lambda: kernel.pack(torch.ones(2, 3, 3, 3), "sse9"), "instruction sets"),
        (lambda: kernel.convolve(packed, source, out, places, stride=3), "stride 1 or 2"),
        (lambda: kernel.convolve(packed, source, out, places, stride=2), "framed source"),
        (lambda: kernel.convolve(packed, source[:-1], out, places), "framed source"),
        (lambda: kernel.convolve(packed, out, out, places), "framed source"),
        (lambda: kernel.convolve(packed, source, source, places), "out of shape"),
        (lambda: kernel.convolve(packed, source, out[:, 1:], places), "contiguous"),
        (lambda: kernel.convolve(packed, source, out, places, scale=torch.ones(3)), "scale of shape"),
        (lambda: kernel.convolve(packed, source, out, places, residual=source), "residual of shape"),
        (lambda: kernel.convolve(packed, source.double(), out, places), "float32"),
        (lambda: kernel.convolve(packed, source, out, places, cutoff=1.0), "cutoff"),
        (lambda: kernel.convolve(packed, source, out, places, sharpness=float("nan")), "sharpness"),
        (lambda: kernel.convolve(kernel.pack(torch.ones(3, 3, 1, 1)), source, source, places), "apart"),
    ]
    for call, words in faults:
        with pytest.raises(OfframpError, match=re.escape(words)):
            call()
    some = kernel.find_places(torch.eye(4) > 0)
    with pytest.raises(OfframpError, match="floats to work in"):
        kernel.convolve(packed, kernel.framed(4, 4, 3), kernel.framed(4, 4, 2), some, raw=torch.empty(3))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_where_there_is_a_compiler_the_kernel_was_built() -> None:
    """The build is optional, and would fail in silence; then all else here would be skipped."""
    assert HERE and kernel.isa() == SETS[0] and "portable" in SETS


def test_without_a_library_one_warning_says_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (native.loaded, native.instruction_sets):
        cached.cache_clear()
    monkeypatch.setattr(native, "_files", list)
    try:
        with pytest.warns(UserWarning, match="compiled CPU kernel is not in use.*30 %.*reinstall") as told:
            assert not kernel.available() and not kernel.available()
        assert len(told) == 1 and kernel.isa() == "none" and kernel.isas() == () and not kernel.shares_threads()
        with pytest.raises(OfframpError, match="available"):
            kernel.find_places(torch.ones(2, 2) > 0)
    finally:
        for cached in (native.loaded, native.instruction_sets):
            cached.cache_clear()


def test_a_file_that_is_no_library_of_these_sources_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bad = tmp_path / "_native.so"
    bad.write_bytes(b"no library")
    monkeypatch.setattr(native, "_files", lambda: [bad])
    assert "cannot be loaded" in str(native._load())
    if HERE:
        monkeypatch.undo()
        monkeypatch.setattr(native, "INTERFACE", 7)
        assert "other sources" in str(native._load())

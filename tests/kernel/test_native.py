"""Whether the compiled library is there, loads, and shares torch's threads."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from kernel.witness import Sketch
from offramp import _kernel as kernel
from offramp._kernel import native
from offramp.errors import OfframpError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    HERE = kernel.available()
needs_kernel = pytest.mark.skipif(not HERE, reason="the kernel was not built")


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_where_there_is_a_compiler_the_kernel_was_built() -> None:
    """The build is optional, and would fail in silence; then all else here would be skipped."""
    assert HERE and kernel.isa() == kernel.isas()[0] and "portable" in kernel.isas()


def test_sanitizers_have_nothing_to_say(tmp_path: Path) -> None:
    """Every operation under the address and undefined-behaviour sanitizers, on buffers of exactly its size."""
    made, empty = shutil.which("make"), tmp_path / "empty.cpp"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    empty.write_text("int main() {}")
    checks = ["-fsanitize=address,undefined", str(empty), "-o", str(tmp_path / "empty")]
    if made is None or compiler is None or subprocess.run([compiler, *checks], check=False).returncode:
        pytest.skip("there is no make, or no compiler with sanitizers: memory is not checked here")
    done = subprocess.run([made, "-j2", "sanitize", f"CXX={compiler}"], cwd=Path(__file__).parents[2], check=False,
                          capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "operations agree, no sanitizer spoke" in done.stdout


@needs_kernel
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp is Linux's")
def test_threads_are_torchs_own() -> None:
    """After torch has its two threads, a run on two adds none; and numbers too small to be normal keep their value."""
    code = """
import os, torch
from kernel.witness import Sketch
from offramp import _kernel as kernel
assert kernel.shares_threads()
torch.set_num_threads(2)
torch.randn(400, 400) @ torch.randn(400, 400); torch.randn(1 << 20).sin()
before = len(os.listdir("/proc/self/task"))
sketch = Sketch()
first = sketch.map(16, 64, 64)
last = sketch.conv(sketch.conv(first, 16), 16)
runner = kernel.Kernel(sketch.program([first, last]))
runner.settle(torch.ones(64, 64, dtype=torch.bool))
for _ in range(3):
    assert runner.run(0)
assert len(os.listdir("/proc/self/task")) == before, (before, os.listdir("/proc/self/task"))
tiny = torch.full((1,), 1e-40)
assert (tiny * 1.0).item() != 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parents[1])


def test_without_a_library_one_warning_says_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (native.loaded, native.instruction_sets):
        cached.cache_clear()
    monkeypatch.setattr(native, "_files", list)
    sketch = Sketch()
    program = sketch.program([sketch.map(1, 2, 2)])
    try:
        with pytest.warns(UserWarning, match="compiled CPU kernel is not in use.*30 %.*reinstall") as told:
            assert not kernel.available() and not kernel.available()
        assert len(told) == 1 and kernel.isa() == "none" and kernel.isas() == () and not kernel.shares_threads()
        with pytest.raises(OfframpError, match="available"):
            kernel.Kernel(program)
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

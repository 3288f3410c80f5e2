"""The library compiled for a machine without tiles: their instructions are emulated, or caught one by one."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import pytest

from offramp import _kernel as kernel
from offramp._kernel import native

_SOURCES = Path(kernel.__file__).parent
_FLAGS = ["-std=gnu++17", "-g0", "-w", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
_NO_EDITS: Mapping[str, tuple[str, str]] = MappingProxyType({})
_NO_QUESTIONS = {
    "kernel.cpp": ("runs(3) && has_tiles()", "runs(3)"),  # and without asking the CPU
    "proof.cpp": ("{SIGILL,", "{SIGUSR2,"),
}


class TileBuilds:
    """Builds of the library under one folder; files that no build changes are compiled once."""

    def __init__(self, folder: Path) -> None:
        found = shutil.which("g++") or shutil.which("clang++")
        if found is None:
            pytest.skip("tiles are not tested: there is no C++ compiler to emulate them with")
        self._folder, self._compiler = folder, found
        self._built: dict[tuple[object, ...], Path] = {}

    def emulated(self, edits: Mapping[str, tuple[str, str]] = _NO_EDITS) -> Path:
        """edits: by file, words that must stand in it once and those that stand there instead; a changed header is
        that of amx_bf16.cpp alone."""
        return self._library(edits, "-O1", "-DOFFRAMP_EMULATE_TILES=1")

    def illegal(self) -> Path:
        """As it is installed, but that the CPU is not asked for tiles and illegal instructions are left to others."""
        return self._library(_NO_QUESTIONS, "-O3")

    def traps(self) -> Path:
        """What carries out illegal instructions."""
        out = self._folder / "traps.so"
        self._run("-shared", *_FLAGS[:-3], "-O1", str(Path(__file__).with_name("traps.cpp")), "-o", str(out))
        return out

    def _library(self, edits: Mapping[str, tuple[str, str]], *flags: str) -> Path:
        key = (*sorted(edits.items()), *flags)
        if key not in self._built:
            sources = self._folder / f"sources{len(self._built)}"
            shutil.copytree(_SOURCES, sources, ignore=shutil.ignore_patterns("*.py", "*.so", "__pycache__"))
            for name, (old, new) in edits.items():
                text = (sources / name).read_text()
                assert text.count(old) == 1, (name, old)
                (sources / name).write_text(text.replace(old, new))
            own = {*edits, "amx_bf16.cpp"} if edits else set()
            objects = []
            for source in sorted(sources.glob("*.cpp")):
                out = (source if source.name in own else self._folder / source.name).with_suffix(".o")
                if not out.exists():
                    self._run(*_FLAGS, *flags, "-c", str(source), "-o", str(out))
                objects.append(str(out))
            self._built[key] = sources / "library.so"
            self._run("-shared", *objects, "-o", str(self._built[key]))
        return self._built[key]

    def _run(self, *words: str) -> None:
        subprocess.run([self._compiler, *words], check=True, timeout=300)


@contextmanager
def library(file: Path) -> Iterator[None]:
    """Kernels made within are another library's."""
    before = native._files
    try:
        native._files = lambda: [file]
        _forget()
        yield
    finally:
        native._files = before
        _forget()


def _forget() -> None:
    for cached in (native.loaded, native.instruction_sets):
        cached.cache_clear()

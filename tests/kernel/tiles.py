"""The library compiled for a machine without tiles, their instructions emulated."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from offramp import _kernel as kernel

_SOURCES = Path(kernel.__file__).parent
_FLAGS = ["-std=gnu++17", "-O1", "-g0", "-w", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
_NO_EDITS: Mapping[str, tuple[str, str]] = MappingProxyType({})


class EmulatedTiles:
    """Builds of the library under one folder; files that no build changes are compiled once."""

    def __init__(self, folder: Path) -> None:
        found = shutil.which("g++") or shutil.which("clang++")
        if found is None:
            pytest.skip("tiles are not tested: there is no C++ compiler to emulate them with")
        self._folder, self._compiler = folder, found
        self._built: dict[tuple[tuple[str, tuple[str, str]], ...], Path] = {}

    def library(self, edits: Mapping[str, tuple[str, str]] = _NO_EDITS) -> Path:
        """edits: by file, words that must stand in it once and those that stand there instead; a changed header is
        that of amx_bf16.cpp alone."""
        key = tuple(sorted(edits.items()))
        if key not in self._built:
            sources = self._folder / f"sources{len(self._built)}"
            shutil.copytree(_SOURCES, sources, ignore=shutil.ignore_patterns("*.py", "*.so", "__pycache__"))
            for name, (old, new) in edits.items():
                text = (sources / name).read_text()
                assert text.count(old) == 1, (name, old)
                (sources / name).write_text(text.replace(old, new))
            changed = {"amx_bf16.cpp" if name.endswith(".hpp") else name for name in edits}
            objects = [self._object(source, source.name in changed) for source in sorted(sources.glob("*.cpp"))]
            self._built[key] = sources / "library.so"
            self._run("-shared", *map(str, objects), "-o", str(self._built[key]))
        return self._built[key]

    def _object(self, source: Path, changed: bool) -> Path:
        out = (source if changed else self._folder / source.name).with_suffix(".o")
        if not out.exists():
            self._run(*_FLAGS, "-DOFFRAMP_EMULATE_TILES=1", "-c", str(source), "-o", str(out))
        return out

    def _run(self, *words: str) -> None:
        subprocess.run([self._compiler, *words], check=True, timeout=300)

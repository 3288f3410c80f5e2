"""Finds and loads the compiled library, and hands it the threads that torch runs on."""

import ctypes
import functools
import importlib.machinery
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

__all__ = ["INTERFACE", "Conv", "instruction_sets", "loaded"]

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Conv(ctypes.Structure):
    """One masked convolution, field by field as kernel.hpp has it."""

    _fields_ = [
        *((name, _POINTER) for name in (
            "input", "output", "weight", "scale", "shift", "residual", "raw", "active", "slot", "halo", "start",
            "source", "square")),
        ("num_active", _LONG), ("num_halo", _LONG),
        *((name, _INT) for name in (
            "input_width", "output_width", "inputs", "outputs", "kernel", "stride", "relu", "isa", "threads")),
        ("sharpness", _FLOAT), ("cutoff", _FLOAT),
    ]


INTERFACE = 1000 * 1 + ctypes.sizeof(Conv)
_SIGNATURES = {
    "offramp_isa": (ctypes.c_char_p, [_INT]),
    "offramp_parallel": (None, [_POINTER]),
    "offramp_can_share": (_INT, []),
    "offramp_places": (None, [_POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER, _POINTER]),
    "offramp_neighbours": (None, [_INT, _POINTER, _POINTER, _LONG, _POINTER, _LONG, *[_POINTER] * 5]),
    "offramp_packed_floats": (_LONG, [_INT] * 4),
    "offramp_pack": (None, [_INT, _POINTER, _INT, _INT, _INT, _POINTER]),
    "offramp_conv": (None, [ctypes.POINTER(Conv)]),
}


def _files() -> list[Path]:
    here = Path(__file__).parent
    return [path for end in importlib.machinery.EXTENSION_SUFFIXES if (path := here / f"_native{end}").is_file()]


def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    files = _files()
    if not files:
        return "it was not built: no C++ compiler was found when offramp was installed"
    try:
        found = ctypes.CDLL(str(files[0]))
        found.offramp_interface.restype = _LONG
        if found.offramp_interface() != INTERFACE:
            return f"{files[0].name} was built from other sources than these"
        for name, (gives, takes) in _SIGNATURES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = gives, takes
    except (OSError, AttributeError) as error:
        return f"{files[0].name} cannot be loaded ({error})"
    # The very libgomp that torch links: a second pool of threads would fight the first one for the cores.
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        found.offramp_parallel(ctypes.cast(torch_cpu.GOMP_parallel, _POINTER))
    except (OSError, AttributeError):
        pass  # torch runs on other threads here: one thread, and shares_threads() says so
    return found


@functools.cache
def loaded() -> ctypes.CDLL | None:
    """The loaded library; None, after one warning in the life of the process, where there is none."""
    found = _load()
    if isinstance(found, str):
        warnings.warn(
            f"offramp's compiled CPU kernel is not in use: {found}. Masked networks give the same answers through "
            "PyTorch, but above some 30 % of active pixels that is slower than no mask at all. What to do: install a "
            "C++17 compiler (g++ or clang++) and reinstall offramp.", stacklevel=3)
        return None
    return found


@functools.cache
def instruction_sets() -> Mapping[str, int]:
    """The instruction sets that the library was built for and this machine runs, best first, with their numbers."""
    lib = loaded()
    if lib is None:
        return MappingProxyType({})
    names = {number: lib.offramp_isa(number) for number in (2, 1, 0)}
    return MappingProxyType({name.decode(): number for number, name in names.items() if name is not None})

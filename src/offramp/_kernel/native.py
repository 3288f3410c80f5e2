"""Finds and loads the compiled library, and hands it the threads that torch runs on; its structures, as kernel.hpp has
them, field by field."""

import ctypes
import functools
import importlib.machinery
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

__all__ = [
    "CONV", "DEPTHWISE", "INTERFACE", "POOL", "SQUARES", "SUM", "Axis", "Conv", "Isa", "Level", "List", "Op", "Plan",
    "Plane", "Pool", "Read", "Region", "Sum", "Term", "Window", "instruction_sets", "loaded",
]

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_PAIR = _INT * 2
CONV, DEPTHWISE, SUM, POOL = range(4)
SQUARES = 19


class List(ctypes.Structure):
    _fields_ = [("at", _POINTER), ("count", _LONG), ("room", _LONG)]


class Window(ctypes.Structure):
    _fields_ = [("kernel", _PAIR), ("stride", _PAIR), ("padding", _PAIR), ("dilation", _PAIR)]


class Axis(ctypes.Structure):
    _fields_ = [("first", _POINTER), ("second", _POINTER), ("part", _POINTER)]


class Level(ctypes.Structure):
    _fields_ = [("height", _INT), ("width", _INT), ("on", List), ("active", List), ("rows", List), ("wanted", List),
                ("halo", List), ("number", List), ("start", List), ("source", List), ("excess", List), ("saves", List)]


class Read(ctypes.Structure):
    _fields_ = [("level", _INT), ("region", _INT), ("resized", _INT), ("unused", _INT), ("window", Window),
                ("rows", Axis), ("columns", Axis)]


class Region(ctypes.Structure):
    _fields_ = [("level", _POINTER), ("reads", _POINTER), ("num_reads", _INT), ("interpolates", _INT), ("all", List),
                ("halo", List), ("rows", List)]


class Plane(ctypes.Structure):
    _fields_ = [("at", _POINTER), ("row", _LONG), ("step", _LONG)]


class Conv(ctypes.Structure):
    _fields_ = [
        ("source", Plane), ("out", Plane), ("residual", Plane),
        *((name, _POINTER) for name in ("weight", "scale", "shift", "bare", "jump")),
        *((name, _INT) for name in ("runs", "run", "inputs", "outputs", "groups", "relu")),
        ("stride", _PAIR), ("padding", _PAIR), ("reach", _INT), ("unused", _INT), ("falloff", _FLOAT * (SQUARES + 1)),
    ]


class Term(ctypes.Structure):
    _fields_ = [("source", Plane), ("rows", Axis), ("columns", Axis)]


class Sum(ctypes.Structure):
    _fields_ = [("out", Plane), ("terms", _POINTER), ("scale", _POINTER), ("shift", _POINTER), ("count", _INT),
                ("channels", _INT), ("relu", _INT), ("unused", _INT)]


class Pool(ctypes.Structure):
    _fields_ = [("source", Plane), ("out", Plane), ("window", Window), ("height", _INT), ("width", _INT),
                ("channels", _INT), ("mean", _INT), ("counts_padding", _INT), ("unused", _INT)]


class Enlarging(ctypes.Structure):
    _fields_ = [("source", _POINTER), ("to", _POINTER), ("rows", Axis), ("columns", Axis),
                *((name, _LONG) for name in ("width", "channels", "height_to", "width_to"))]


class Judging(ctypes.Structure):
    _fields_ = [("logits", _POINTER), ("within", _POINTER), ("out", _POINTER), ("places", _LONG), ("channels", _LONG),
                ("threshold", _FLOAT), ("slack", _FLOAT)]


class Op(ctypes.Structure):
    _fields_ = [("kind", _INT), ("raw", _INT), ("rows", _PAIR), ("body", _POINTER), ("region", _POINTER),
                ("needs", _POINTER), ("num_needs", _LONG)]


class Plan(ctypes.Structure):
    _fields_ = [("levels", _POINTER), ("regions", _POINTER), ("ops", _POINTER), ("num_levels", _LONG),
                ("num_regions", _LONG), ("num_ops", _LONG), ("num_raws", _LONG), ("raws", _POINTER),
                ("phases", _POINTER), ("scratch", List), ("spans", List), ("isa", _INT), ("excess", _INT)]


INTERFACE = 1000000 * 9 + sum(map(ctypes.sizeof, (
    Level, Region, Read, Conv, Term, Sum, Pool, Enlarging, Judging, Op, Plan)))
_SIGNATURES = {
    "offramp_isa": (ctypes.c_char_p, [_INT]),
    "offramp_proves": (_INT, [_INT]),
    "offramp_parallel": (None, [_POINTER]),
    "offramp_can_share": (_INT, []),
    "offramp_pair": (_INT, [_INT]),
    "offramp_packed_units": (_LONG, [_INT] * 5),
    "offramp_pack": (None, [_INT, _POINTER, _INT, _INT, _INT, _INT, _POINTER]),
    "offramp_settle": (_INT, [ctypes.POINTER(Plan), _POINTER, _INT, _INT]),
    "offramp_run": (_LONG, [ctypes.POINTER(Plan), _LONG, _LONG, _INT, _POINTER, _LONG]),
    "offramp_read_active": (None, [_INT, _POINTER, ctypes.POINTER(Plane), _LONG, _POINTER, _LONG, _LONG, _LONG, _INT]),
    "offramp_write_region": (None, [_INT, _POINTER, ctypes.POINTER(Plane), _LONG, _POINTER, _LONG, _LONG, _LONG, _INT,
                                    _INT]),
    "offramp_enlarge": (_INT, [_INT, ctypes.POINTER(Enlarging), _INT]),
    "offramp_judge": (None, [_INT, ctypes.POINTER(Judging), _INT]),
    "offramp_release": (None, [ctypes.POINTER(Plan)]),
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


class Isa(NamedTuple):
    number: int
    stores: torch.dtype
    """What its maps hold."""


@functools.cache
def instruction_sets() -> Mapping[str, Isa]:
    """The instruction sets that the library was built for and this machine runs, best first.

    Tiles (amx_bf16) are among them only if, once in the life of the process, they give what avx512_bf16 does.
    """
    lib = loaded()
    if lib is None:
        return MappingProxyType({})
    names = {number: name.decode() for number in (4, 3, 2, 1, 0) if (name := lib.offramp_isa(number)) is not None}
    for number in [number for number in names if not lib.offramp_proves(number)]:
        warnings.warn(
            f"offramp's compiled CPU kernel does not use {names.pop(number)} here: this machine announces it, but a "
            f"trial of it failed or gave other numbers than {names[number - 1]}, which is used instead and is slower. "
            "What to do: nothing, or report it with the CPU's name and the operating system's.", stacklevel=3)
    return MappingProxyType({name: Isa(number, (torch.float32, torch.bfloat16)[lib.offramp_pair(number) - 1])
                             for number, name in names.items()})

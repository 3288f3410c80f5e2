"""What can be asked of the compiled kernel before there is a program: whether it is there, and on what it runs."""

import ctypes

import torch

from offramp._kernel.native import instruction_sets, loaded
from offramp.errors import OfframpError

__all__ = ["available", "isa", "isas", "needed", "shares_threads"]


def available() -> bool:
    """Whether the kernel was built and loads; if not, the first call of a process warns what that costs."""
    return loaded() is not None


def isas(dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """The instruction sets of this machine that the kernel has code for, best first; none where it is not available.

    For bfloat16 those that multiply it come before those that store and work in float32 and round at the door alone.
    "amx_bf16", products by tiles, is proven in emulation and has never run on hardware: where a CPU has tiles, a trial
    against "avx512_bf16" decides once a process whether it is among them, with a warning if not.
    """
    sets = instruction_sets()
    return tuple(sorted((name for name, isa in sets.items() if isa.stores in (dtype, torch.float32)),
                        key=lambda name: sets[name].stores != dtype))


def isa(dtype: torch.dtype = torch.float32) -> str:
    """The instruction set in use: "avx512", "avx2", "portable", or "none" where the kernel is not available; for
    bfloat16 "amx_bf16" and "avx512_bf16" too."""
    return next(iter(isas(dtype)), "none")


def shares_threads() -> bool:
    """Whether the kernel works on torch's own pool of threads; if not, on the calling thread alone."""
    lib = loaded()
    return lib is not None and bool(lib.offramp_can_share())


def needed(where: str) -> ctypes.CDLL:
    """The loaded library; OfframpError where there is none."""
    lib = loaded()
    if lib is None:
        raise OfframpError(expected="the compiled kernel", got="an installation without it", where=where,
                           todo="ask available() first, or reinstall offramp where there is a C++17 compiler")
    return lib

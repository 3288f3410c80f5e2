"""One map brought to another size, all of it: what answers need in the end."""

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from offramp._kernel import native
from offramp._kernel.axes import axis_of
from offramp._kernel.door import available, isa, needed
from offramp._kernel.ops import Resize
from offramp.errors import OfframpError

__all__ = ["enlarge", "enlarges"]


def enlarges(x: Tensor) -> bool:
    """Whether :func:`enlarge` takes this map, and need not copy it first."""
    return (x.dtype == torch.float32 and x.device.type == "cpu" and x.ndim == 4 and x.numel() > 0
            and x.is_contiguous(memory_format=torch.channels_last) and not (torch.is_grad_enabled() and x.requires_grad)
            and available())


def enlarge(x: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """``torch.nn.functional.interpolate(x, size, mode="bilinear")`` on torch's threads, up to rounding.

    x: (N, C, H, W), float32 on the CPU, place by place (channels last), as the result is; not differentiable.
    """
    lib = needed("enlarge()")
    if not enlarges(x) or min(size) < 1:
        raise OfframpError(expected="a map (N, C, H, W) of float32 on the CPU in channels_last, and a size",
                           got=f"{x.dtype} {tuple(x.shape)} of strides {x.stride()}, {size}", where="enlarge()",
                           todo="x.contiguous(memory_format=torch.channels_last), or torch's own interpolate")
    count, channels, height, width = x.shape
    out = torch.empty(count, *size, channels)
    rows, columns = _axis(align_corners, height, size[0]), _axis(align_corners, width, size[1])
    number = native.instruction_sets()[isa()].number
    for n in range(count):
        one = native.Enlarging(x[n].data_ptr(), out[n].data_ptr(), _told(rows), _told(columns), width, channels, *size)
        if not lib.offramp_enlarge(number, ctypes.byref(one), torch.get_num_threads()):
            raise MemoryError("no memory for a row of a map")
    return out.permute(0, 3, 1, 2)


@lru_cache(64)
def _axis(align_corners: bool, size: int, to: int) -> tuple[Tensor, Tensor, Tensor]:
    first, second, part = axis_of(Resize("bilinear", align_corners), size, to)
    assert part is not None
    return first, second, part


def _told(axis: tuple[Tensor, Tensor, Tensor]) -> native.Axis:
    return native.Axis(*(one.data_ptr() for one in axis))

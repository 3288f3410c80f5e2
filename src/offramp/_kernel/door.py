"""The kernel's one door: typed functions over CPU tensors, which are checked here and nowhere below."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp._kernel.native import Conv, instruction_sets, loaded
from offramp.errors import OfframpError

__all__ = [
    "Packed", "Places", "available", "convolve", "find_places", "framed", "isa", "isas", "pack", "shares_threads",
]

_WINDOW = 3
_AROUND = (2 * _WINDOW + 1) ** 2 - 1
_MOST = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Places:
    """Where a mask works: indices into a frame (H + 2, W + 2), int32, in the order of the rows."""

    height: int
    width: int
    active: Tensor
    """(A,)."""
    halo: Tensor
    """Settled places next to an active one, diagonally too: those that a 3x3 convolution at an active place reads."""
    slot: Tensor
    """(A,), the row of the raw copy that the halo reads this active place from, or -1."""
    rows: int
    """Of the raw copy."""
    start: Tensor
    """(halo + 1,), where the neighbours of each halo place begin in the two that follow."""
    source: Tensor
    """Rows of the raw copy, the nearest neighbours first."""
    square: Tensor
    """Their squared distances, uint8."""

    @property
    def density(self) -> float:
        """The part of all places that is active."""
        return len(self.active) / max(1, self.height * self.width)


@dataclass(frozen=True, eq=False)
class Packed:
    """Weights of a convolution in the order in which one instruction set reads them."""

    data: Tensor
    inputs: int
    outputs: int
    kernel: int
    isa: str


def available() -> bool:
    """Whether the kernel was built and loads; if not, the first call of a process warns what that costs."""
    return loaded() is not None


def isas() -> tuple[str, ...]:
    """The instruction sets of this machine that the kernel has code for, best first; none where it is not available."""
    return tuple(instruction_sets())


def isa() -> str:
    """The instruction set in use: "avx512", "avx2", "portable", or "none" where the kernel is not available."""
    return next(iter(isas()), "none")


def shares_threads() -> bool:
    """Whether the kernel works on torch's own pool of threads; if not, on the calling thread alone."""
    lib = loaded()
    return lib is not None and bool(lib.offramp_can_share())


def framed(height: int, width: int, channels: int) -> Tensor:
    """A buffer of zeros (H + 2, W + 2, C); its inside, ``[1:-1, 1:-1]``, holds the activations.

    >>> framed(4, 6, 3).shape
    torch.Size([6, 8, 3])
    """
    return torch.zeros(height + 2, width + 2, channels)


def find_places(mask: Tensor) -> Places:
    """Active places, their halo and what each halo place is interpolated from: mask (H, W), bool or uint8."""
    lib = _needed("find_places()")
    if mask.ndim != 2 or mask.dtype not in (torch.bool, torch.uint8) or mask.device.type != "cpu":
        raise OfframpError(expected="a mask (H, W) of bool or uint8 on the CPU", got=_told(mask),
                           where="find_places()", todo="mask[i] for one image of a batch, .cpu() for another device")
    mask = mask.contiguous()
    height, width = mask.shape
    if (height + 2) * (width + 2) * _AROUND > _MOST:
        raise OfframpError(expected="a mask whose neighbours fit 32 bits (some 44 million places)",
                           got=f"{height} x {width}", where="find_places()", todo="cut the picture into parts")

    def ints(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32)

    chart = ints((height + 2 * _WINDOW) * (width + 2 * _WINDOW))
    active, halo = ints(height * width), ints(height * width)
    counts = (ctypes.c_int64 * 2)()
    lib.offramp_places(mask.data_ptr(), height, width, chart.data_ptr(), active.data_ptr(), halo.data_ptr(), counts)
    active, halo = active[:counts[0]], halo[:counts[1]]
    slot, start, source = ints(len(active)), ints(len(halo) + 1), ints(len(halo) * _AROUND)
    square = torch.empty(len(halo) * _AROUND, dtype=torch.uint8)
    lib.offramp_neighbours(width, chart.data_ptr(), active.data_ptr(), len(active), halo.data_ptr(), len(halo),
                           slot.data_ptr(), start.data_ptr(), source.data_ptr(), square.data_ptr(), counts)
    return Places(height, width, active, halo, slot, counts[1], start, source[:counts[0]], square[:counts[0]])


def pack(weight: Tensor, isa: str | None = None) -> Packed:
    """Weights (C_out, C_in, k, k) of a dense convolution, k = 1 or 3, in the kernel's order; ``isa`` asks for another
    instruction set than the best one. A later change of ``weight`` is not seen."""
    lib = _needed("pack()")
    _float(weight, "weight", "pack()")
    if weight.ndim != 4 or weight.shape[2:] not in ((1, 1), (3, 3)) or 0 in weight.shape:
        raise OfframpError(expected="a weight (C_out, C_in, k, k) with k = 1 or 3", got=_told(weight), where="pack()",
                           todo="run other convolutions through PyTorch")
    name = isas()[0] if isa is None else isa
    if name not in isas():
        raise OfframpError(expected=f"one of this machine's instruction sets {isas()}", got=repr(isa), where="pack()")
    number, (outputs, inputs, kernel, _) = instruction_sets()[name], weight.shape
    data = torch.empty(lib.offramp_packed_floats(number, inputs, outputs, kernel))
    lib.offramp_pack(number, weight.detach().contiguous().data_ptr(), inputs, outputs, kernel, data.data_ptr())
    return Packed(data, inputs, outputs, kernel, name)


def convolve(
    packed: Packed, source: Tensor, out: Tensor, places: Places, *, stride: int = 1, scale: Tensor | None = None,
    shift: Tensor | None = None, residual: Tensor | None = None, relu: bool = False, sharpness: float = 3.0,
    cutoff: float = 2.0**-26, threads: int | None = None, raw: Tensor | None = None,
) -> None:
    """Convolve at the active places of ``out``, interpolate at their halo, and finish both:

    y = relu(scale * I(conv(source)) + shift + residual), padding (k - 1) / 2. No other place of ``out`` is touched. At
    a halo place I is the mean of the raw convolution at the active places s of its 7x7 window under
    exp(-sharpness^2 |p - s|^2) (ADP-C, Eq. 3, normalised as its equation says: by the active weights; its code divides
    by all of them). Weights below ``cutoff`` times the nearest one's are left out: at 2^-26 that is below what float32
    resolves of the largest neighbour, 1e-3 leaves 2 or 3 of them, 0 keeps all.

    Buffers are framed: ``source`` (H_in + 2, W_in + 2, C_in), ``out`` and ``residual`` (H + 2, W + 2, C_out), with
    H = ceil(H_in / stride); ``residual`` may be ``out``. ``scale`` and ``shift`` (C_out,) are a folded batch norm.
    ``raw``: floats to work in, at least rows x C_out rounded up to 16. ``threads``: torch's number of them.
    """
    lib, where = _needed("convolve()"), "convolve()"
    for name, tensor in (("source", source), ("out", out), ("residual", residual), ("scale", scale), ("shift", shift)):
        if tensor is not None:
            _float(tensor, name, where)
            if not tensor.is_contiguous():
                raise OfframpError(expected=f"{name} contiguous", got=f"strides {tensor.stride()}", where=where,
                                   todo="allocate it with framed(), and write to its inside")
    if stride not in (1, 2):
        raise OfframpError(expected="stride 1 or 2", got=str(stride), where=where)
    shape = (places.height + 2, places.width + 2, packed.outputs)
    height, width = (-(-(size - 2) // stride) for size in (source.shape[:2] if source.ndim == 3 else (0, 0)))
    if source.ndim != 3 or (height, width, source.shape[2]) != (places.height, places.width, packed.inputs):
        raise OfframpError(
            expected=f"a framed source of {packed.inputs} channels for an output of {places.height} x {places.width} "
                     f"at stride {stride}", got=_told(source), where=where, todo="framed(height, width, channels)")
    for name, tensor, size in (("out", out, shape), ("residual", residual, shape), ("scale", scale, shape[2:]),
                               ("shift", shift, shape[2:])):
        if tensor is not None and tensor.shape != size:
            raise OfframpError(expected=f"{name} of shape {size}", got=_told(tensor), where=where)
    if out.data_ptr() == source.data_ptr():
        raise OfframpError(expected="out and source apart", got="one buffer for both", where=where)
    if not sharpness >= 0 or not 0 <= cutoff < 1:
        raise OfframpError(expected="sharpness >= 0 and 0 <= cutoff < 1", got=f"{sharpness} and {cutoff}", where=where)
    need = places.rows * -(-packed.outputs // 16) * 16
    if raw is None:
        raw = torch.empty(need)
    _float(raw, "raw", where)
    if raw.numel() < need or not raw.is_contiguous():
        raise OfframpError(expected=f"{need} contiguous floats to work in", got=_told(raw), where=where)

    def at(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    lib.offramp_conv(Conv(
        at(source), at(out), at(packed.data), at(scale), at(shift), at(residual), at(raw), at(places.active),
        at(places.slot), at(places.halo), at(places.start), at(places.source), at(places.square), len(places.active),
        len(places.halo), source.shape[1], out.shape[1], packed.inputs, packed.outputs, packed.kernel, stride,
        int(relu), instruction_sets()[packed.isa], torch.get_num_threads() if threads is None else threads,
        abs(float(sharpness)), float(cutoff)))


def _needed(where: str) -> ctypes.CDLL:
    lib = loaded()
    if lib is None:
        raise OfframpError(expected="the compiled kernel", got="an installation without it", where=where,
                           todo="ask available() first, or reinstall offramp where there is a C++17 compiler")
    return lib


def _float(tensor: Tensor, name: str, where: str) -> None:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise OfframpError(expected=f"{name} of float32 on the CPU", got=_told(tensor), where=where)


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"

"""What the kernel must say, by PyTorch on whole pictures: convolve, mask, interpolate by an unfold, finish. float64."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, unfold


def interpolated(raw: Tensor, mask: Tensor, sharpness: float) -> Tensor:
    """raw (C, H, W), mask (H, W): every place's mean of the active ones in its 7x7 window; the papers' equation."""
    channels, height, width = raw.shape
    step = torch.arange(-3, 4, dtype=raw.dtype)
    weight = torch.exp(-sharpness**2 * (step[:, None]**2 + step**2))
    weight[3, 3] = 0
    active = unfold(mask[None, None].to(raw.dtype), 7, padding=3).reshape(49, -1) * weight.reshape(49, 1)
    seen = unfold((raw * mask)[None], 7, padding=3).reshape(channels, 49, -1)
    return ((seen * active).sum(1) / active.sum(0)).reshape(channels, height, width)


def halo_of(mask: Tensor) -> Tensor:
    return (max_pool2d(mask[None, None].float(), 3, 1, 1)[0, 0] > 0) & ~mask


def simulated(
    x: Tensor, weight: Tensor, mask: Tensor, *, stride: int, scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, relu: bool, sharpness: float,
) -> Tensor:
    """x (C_in, H_in, W_in) -> (C_out, H, W), as float64; what is neither active nor halo is NaN."""
    raw = conv2d(x[None].double(), weight.double(), stride=stride, padding=weight.shape[-1] // 2)[0]
    y = torch.where(mask, raw, interpolated(raw, mask, sharpness))
    if scale is not None:
        y = y * scale[:, None, None]
    if shift is not None:
        y = y + shift[:, None, None]
    if residual is not None:
        y = y + residual
    if relu:
        y = y.relu()
    return y.where(mask | halo_of(mask), torch.nan)

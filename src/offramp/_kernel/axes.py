"""Where each place of a resized map reads, as torch works it out."""

import torch
from torch import Tensor

from offramp._kernel.ops import Resize

__all__ = ["axis_of"]


def axis_of(resize: Resize, size: int, to: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where each of ``to`` places of an axis reads, out of ``size``: first (to,), second (to,), the second's part.

    No part: the first alone, by nearest. In float32, as ``torch.nn.functional.interpolate`` to a given size works it
    out, so that no place is read off by one.
    """
    place = torch.arange(to, dtype=torch.float32)
    if resize.mode == "nearest":
        if size == to:
            first = torch.arange(to)
        else:
            first = (place * (torch.tensor(float(size)) / to)).floor().long().clamp_(max=size - 1)
        return first.int(), first.int(), None
    if size == to:
        first, part = torch.arange(to), torch.zeros(to)
    else:
        if resize.align_corners:
            at = place * (torch.tensor(float(size - 1)) / (to - 1) if to > 1 else torch.tensor(0.0))
        else:
            # rounded once, as compilers make one instruction of torch's product and difference: 7e-6 of a place
            scale = torch.tensor(float(size)) / to
            at = ((place + 0.5).double() * scale.double() - 0.5).float().clamp_(min=0)
        first = at.long().clamp_(max=size - 1)
        part = (at - first).clamp_(0, 1)
    return first.int(), (first + 1).clamp_(max=size - 1).int(), part

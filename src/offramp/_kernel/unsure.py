"""Where logits are not sure of a class: what masks are read off."""

import ctypes

import torch
from torch import Tensor

from offramp._kernel import native
from offramp._kernel.door import isa, needed
from offramp._kernel.enlarge import enlarges
from offramp.errors import OfframpError

__all__ = ["unsure"]

_SLACK = 1e-5  # of a probability, some ten times what rounding makes of it


def unsure(logits: Tensor, threshold: float, within: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where the largest probability of logits is below a threshold, and where it is so near that another rounding might
    say otherwise, both bool (N, 1, H, W); on torch's threads.

    logits: (N, K, H, W), float32 on the CPU, place by place (channels last), as ``enlarges`` asks for. within: bool
    (N, 1, H, W), the places that are looked at; elsewhere both are false. What is not a number is always near.
    """
    lib = needed("unsure()")
    if not enlarges(logits):
        raise OfframpError(expected="logits (N, K, H, W) of float32 on the CPU in channels_last",
                           got=f"{logits.dtype} {tuple(logits.shape)} of strides {logits.stride()}", where="unsure()")
    count, channels, height, width = logits.shape
    found = torch.empty(count, 1, height, width, dtype=torch.uint8)
    looked = None if within is None else within.contiguous()
    judged = native.Judging(logits.data_ptr(), None if looked is None else looked.data_ptr(), found.data_ptr(),
                            found.numel(), channels, threshold, _SLACK)
    lib.offramp_judge(native.instruction_sets()[isa()].number, ctypes.byref(judged), torch.get_num_threads())
    return found == 1, found == 2

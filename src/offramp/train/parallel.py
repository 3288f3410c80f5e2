"""What several processes need beyond accelerate: batch norm over the whole batch, on any backend."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["shared_batch_norm"]


@contextmanager
def shared_batch_norm(module: nn.Module, processes: int) -> Iterator[None]:
    """Let every training-mode batch norm see all processes' rows, so that two processes give one process's result.

    torch's SyncBatchNorm does the same on GPUs alone, and replaces the modules; this leaves them in place.
    """
    changed = [m for m in module.modules() if isinstance(m, _BatchNorm)] if processes > 1 else []
    for norm in changed:
        norm.forward = partial(_forward, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in changed:
            del norm.forward


def _forward(norm: _BatchNorm, x: Tensor) -> Tensor:
    if not norm.training:
        return type(norm).forward(norm, x)
    wide = x.float()
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
    dist.all_reduce(count)
    mean: Tensor = all_reduce(wide.sum(axes)) / count
    centred = wide - mean.view(shape)
    var: Tensor = all_reduce(centred.square().sum(axes)) / count
    if norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            rate = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), rate)
            norm.running_var.lerp_((var * count / (count - 1).clamp(min=1)).to(norm.running_var.dtype), rate)
    out = centred * (var + norm.eps).rsqrt().view(shape)
    if norm.affine:
        out = out * norm.weight.view(shape) + norm.bias.view(shape)
    return out.to(x.dtype)

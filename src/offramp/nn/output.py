"""Where the logits live in a network's output, and how an early answer takes their place.

Networks answer with a tensor, a tuple, a dict (``{"out": ..., "aux": ...}``) or a dataclass such as transformers'
``ModelOutput``. An early exit's answer has the same type and keys.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from offramp.errors import HeadError
from offramp.types import Task

__all__ = ["form_of", "read_logits", "task_of", "with_logits"]

_KEYS = ("logits", "out")


def read_logits(output: Any) -> Tensor:
    """The logits in a network's output: the tensor itself, the key ``logits`` or ``out``, or the first of a tuple.

    HeadError when nothing there is plainly the logits (a list of feature maps, say): pass ``logits=`` to ``attach``.

    >>> import torch
    >>> read_logits({"out": torch.zeros(2, 3), "aux": torch.ones(2, 3)}).sum()
    tensor(0.)
    """
    if isinstance(output, Tensor):
        return output
    for key in _KEYS:
        value = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if isinstance(value, Tensor):
            return value
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(tensors) == 1 or (isinstance(output, tuple) and len(shapes) == 1):
        return tensors[0]
    keys = list(output) if isinstance(output, Mapping) else f"{len(tensors)} tensors of {len(shapes)} shapes"
    raise HeadError(
        expected="an output with logits (a tensor, or the key 'logits' or 'out')",
        got=f"{type(output).__name__} with {keys}",
        where="attach()",
        todo="pass logits=function that reads them from the output",
    )


def with_logits(template: Any, logits: Tensor, read: Callable[[Any], Tensor] = read_logits) -> Any:
    """An output of the template's type and keys whose every tensor of the logits' shape is ``logits``.

    ``template`` may have another number of rows. HeadError when it holds a floating-point tensor that an exit cannot
    answer for: of another shape than the logits'.
    """
    if isinstance(template, Tensor):
        return logits
    shape = read(template).shape[1:]

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.shape[1:] != shape:
            raise HeadError(
                expected=f"an output whose tensors all have the logits' shape {tuple(shape)} a row",
                got=f"one of {tuple(leaf.shape[1:])}",
                where="deploy()",
                todo="wrap the network so that it returns its logits alone",
            )
        return logits

    return pytree.tree_map(fill, template)


def form_of(template: Any, logits: Tensor) -> Callable[[Tensor], Any]:
    """A function from logits to an output of the template's type and keys, where ``logits`` are the template's own.

    It holds the output's form, nothing of its size.
    """
    empty, form = logits[:0].clone(), pytree.tree_map(lambda t: t[:0].clone() if isinstance(t, Tensor) else t, template)
    return lambda said: with_logits(form, said, lambda _: empty)


def task_of(logits: Tensor) -> Task:
    """``classify`` for logits (N, K), ``dense`` for (N, K, H, W); HeadError for others."""
    if logits.ndim == 2 and logits.shape[1] >= 2:
        return "classify"
    if logits.ndim == 4 and logits.shape[1] >= 2:
        return "dense"
    raise HeadError(
        expected="logits of shape (N, K) or (N, K, H, W) with K >= 2",
        got=str(tuple(logits.shape)),
        where="attach()",
        todo="pass logits=function that reads such a tensor from the output",
    )

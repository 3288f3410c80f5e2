"""What the recorder knows of torch: which calls are sizes, which hand data to Python, which modules are one node."""

import functools
import operator
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import GetSetDescriptorType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import resolve_name

from offramp.errors import CutError
from offramp.graph._guest import flat

__all__ = [
    "DATA_READS", "OPERATORS", "SIZES", "applier", "attribute", "autocast", "fingerprint", "has_storage",
    "holds_tensor", "is_leaf", "same_as_traced", "where_of",
]

CONTAINERS = (
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder,
)
_PLUMBING = tuple(  # folders: torchvision's path begins as torch's does
    str(folder) + os.sep for folder in (Path(torch.__file__).parent, Path(__file__).parent,
                                        Path(__file__).parents[1] / "cost"))

SIZES = {"size", "numel", "nelement", "__len__"}
DATA_READS = {
    "__bool__", "__int__", "__index__", "__float__", "__contains__", "item", "tolist", "numpy", "equal", "allclose",
    "is_nonzero", "__array__",
}
# A dunder's name -> (operator, whether the operands are swapped).
OPERATORS: dict[str, tuple[Callable[..., Any], bool]] = {
    **{f"__{n}__": (getattr(operator, n), False)
       for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift",
                 "rshift", "eq", "ne", "lt", "le", "gt", "ge", "neg", "invert", "getitem", "setitem", "iadd", "isub",
                 "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")},
    "__and__": (operator.and_, False), "__or__": (operator.or_, False),
    **{f"__r{n}__": (getattr(operator, n), True)
       for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")},
}


@functools.cache
def applier(function: type) -> Callable[..., Any]:
    """``function.apply`` as one object that a graph can name and two traces share."""
    def apply(*args: Any, **kwargs: Any) -> Any:
        return function.apply(*args, **kwargs)  # type: ignore[attr-defined]

    apply.__name__ = apply.__qualname__ = f"{function.__name__}_apply"
    return apply


def same_as_traced(value: Any, expected: Any, where: str) -> None:
    """Watch a value on which Python decided something while the network was traced."""
    if isinstance(expected, torch.Tensor) or hasattr(expected, "__array__"):
        same = bool((torch.as_tensor(value) == torch.as_tensor(expected)).all())
    else:
        same = value == expected
    if not same:
        raise CutError(
            expected=f"inputs on which the network decides as when it was traced ({str(expected)[:60]} at {where})",
            got=str(value)[:60], where="stage()",
            todo="give attach() example inputs like these, or make that decision with torch.where",
        )


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one node: torch's own ones, and scripts and graphs, into which nobody can look."""
    if isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
        return True
    kind = type(module)
    return kind.__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, CONTAINERS)


def autocast() -> tuple[bool, bool]:
    """Whether autocast is on, on the CPU and on the GPU."""
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def attribute(func: Any) -> str:
    """The name of the tensor attribute that a descriptor's ``__get__`` or ``__set__`` is for."""
    owner = func.__self__
    return owner.__name__ if isinstance(owner, GetSetDescriptorType) else getattr(owner, "__name__", resolve_name(func))


def holds_tensor(value: Any) -> bool:
    """Whether there is a tensor somewhere inside."""
    return any(isinstance(leaf, Tensor) for leaf in flat(value)[0])


def has_storage(tensor: Tensor) -> bool:
    """Whether views of it can be told by their storage."""
    return tensor.layout is torch.strided and not tensor.is_nested


def fingerprint(tensor: Tensor) -> Tensor | None:
    """The norm of every row: enough to see a row that changes with its neighbours, at the price of a ReLU."""
    if tensor.ndim == 0 or tensor.numel() == 0 or tensor.layout is not torch.strided or tensor.is_complex():
        return None
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        norms: Tensor = torch.linalg.vector_norm(tensor.detach().reshape(tensor.shape[0], -1).float(), dim=1)
    return norms


def where_of() -> str:
    """File and line of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_PLUMBING) and not file.startswith("<"):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"

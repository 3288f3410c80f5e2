"""Which torch calls are sizes, which hand data to Python, and which are Python's own operators."""

import operator
from collections.abc import Callable
from typing import Any

import torch

from offramp.errors import CutError

__all__ = ["DATA_READS", "OPERATORS", "SIZES", "same_as_traced"]

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

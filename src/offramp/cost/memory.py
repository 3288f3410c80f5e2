"""Bytes: of parameters, and of the tensors alive at once while something runs."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["param_bytes", "peak_bytes"]


def param_bytes(*modules: nn.Module) -> int:
    """Of the parameters and buffers of modules; shared ones count once.

    >>> param_bytes(nn.Linear(3, 2))
    32
    """
    seen: dict[int, int] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def peak_bytes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Largest sum of bytes of the tensors alive at once while ``fn(*args, **kwargs)`` runs, its inputs included.

    Counts what PyTorch's operators return, on any device; neither parameters nor scratch space inside an operator.

    >>> peak_bytes(lambda x: (x + 1).sum(), torch.zeros(1000))
    8004
    """
    counter = _Counter()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            counter.see(leaf)
    with torch.no_grad(), counter:
        fn(*args, **kwargs)
    return counter.peak


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive, self.peak = 0, 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def see(self, tensor: Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # no storage behind it: a wrapper subclass, or a sparse tensor
            return
        key, size = id(storage), storage.nbytes()
        known = self._known.get(key)
        if known is not None and known() is storage:
            return

        def forget(_: Any) -> None:
            self.alive -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, forget)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in given:
                self.see(leaf)
        return result

"""Leave the guest as found: whatever a look inside disturbs is put back, also when it fails."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["as_found", "flat", "rebuild", "random_state_kept"]


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put torch's, numpy's and Python's random states back on leaving."""
    cpu, numpy_state, python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        np.random.set_state(numpy_state)
        random.setstate(python)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def as_found(model: nn.Module, *, mode: bool | None = None) -> Iterator[None]:
    """Run the model inside without a trace: flags, attributes, buffers, hooks and random states come back.

    mode: True or False puts every module in train or eval mode meanwhile. No parameter asks for a gradient inside.
    """
    modules = list(model.modules())
    attributes = [(module, dict(vars(module))) for module in modules]
    # Registries of parameters, buffers, hooks ... and whatever the network keeps for itself, caches for one.
    held = [
        (value, kind(value))  # copy.copy() of an OrderedDict of hooks, mostly empty, takes ten times as long
        for module in modules
        for value in vars(module).values()
        for kind in (dict, list, set)
        if isinstance(value, kind)
    ]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        if mode is not None:
            for module in modules:
                module.training = mode  # not .train(): users override it, to freeze their norms for one
        # Not no_grad(): a forward that turns gradients off and on again should be seen doing so.
        for parameter in wanting:
            parameter.requires_grad_(False)
        with random_state_kept():
            yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
        for module, before in attributes:
            now = vars(module)
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update(before)
        for container, contents in held:
            _refill(container, contents)
        with torch.no_grad():
            for buffer, values in buffers:
                # Batch norms write their statistics behind the version counter's back, so values are compared.
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


def _refill(container: Any, contents: Any) -> None:
    if isinstance(container, set):
        same = container == contents
    elif isinstance(container, dict):
        same = list(container) == list(contents) and all(container[key] is contents[key] for key in contents)
    else:
        same = len(container) == len(contents) and all(a is b for a, b in zip(container, contents, strict=True))
    if not same:
        container.clear()
        (container.extend if isinstance(container, list) else container.update)(contents)


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; -1 where nobody counts."""
    return -1 if tensor.is_inference() else tensor._version


def flat(value: Any) -> tuple[list[Any], Any]:
    """The leaves of nested lists, tuples, mappings and dataclasses, and a recipe by which :func:`rebuild` undoes it.

    torch's pytree knows only registered containers; networks return any mapping or dataclass.
    """
    leaves: list[Any] = []

    def walk(item: Any) -> Any:
        if isinstance(item, tuple) and type(item) is not torch.Size:
            parts = [walk(part) for part in item]
            kind = type(item)
            return lambda take: kind(*(p(take) for p in parts)) if hasattr(kind, "_fields") else kind(
                p(take) for p in parts)
        if type(item) is list:
            parts = [walk(part) for part in item]
            return lambda take: [p(take) for p in parts]
        if isinstance(item, dict):
            named = {key: walk(part) for key, part in item.items()}
            return lambda take: _like(item, {key: p(take) for key, p in named.items()})
        if hasattr(item, "__dataclass_fields__") and not isinstance(item, type):
            fields = {name: walk(getattr(item, name)) for name in item.__dataclass_fields__}
            return lambda take: _with_fields(item, {name: p(take) for name, p in fields.items()})
        leaves.append(item)
        return lambda take: next(take)

    return leaves, walk(value)


def rebuild(recipe: Any, leaves: Any) -> Any:
    """The structure that :func:`flat` took apart, around other leaves."""
    return recipe(iter(leaves))


def _like(template: Any, items: dict[Any, Any]) -> Any:
    """A mapping of the template's type: dict, OrderedDict, transformers' ModelOutput ..."""
    if type(template) is dict:
        return items
    if hasattr(template, "__dataclass_fields__"):  # ModelOutput: a mapping and a dataclass, built by field names
        return type(template)(**items)
    made = template.copy() if hasattr(template, "copy") else type(template)()
    for key, value in items.items():
        made[key] = value
    return made


def _with_fields(template: Any, fields: dict[str, Any]) -> Any:
    made = object.__new__(type(template))
    for name, value in {**vars(template), **fields}.items():
        object.__setattr__(made, name, value)
    return made

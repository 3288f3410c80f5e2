"""How large a network's layers are, as values: with them the code of a wide network holds a narrow one's weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import FileFormatError

__all__ = ["ATTRIBUTES", "resize_", "sizes_of"]

ATTRIBUTES = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels",
              "num_groups", "num_parameters", "normalized_shape")
"""In which torch's layers say how many channels they have."""

Sizes = Mapping[str, Mapping[str, Mapping[str, Any]]]


def sizes_of(net: nn.Module) -> dict[str, dict[str, dict[str, Any]]]:
    """By the path of each layer that holds tensors: ``attributes`` and, of its ``tensors``, the shapes.

    >>> sizes_of(nn.Sequential(nn.Linear(3, 2, bias=False)))
    {'0': {'attributes': {'in_features': 3, 'out_features': 2}, 'tensors': {'weight': [2, 3]}}}
    """
    found = {}
    for path, module in net.named_modules():
        if own := {name: list(held.shape) for name, held in _own(module).items()}:
            known = {name: getattr(module, name) for name in ATTRIBUTES if name in vars(module)}
            found[path] = {"attributes": {name: list(value) if isinstance(value, tuple) else value
                                          for name, value in known.items()}, "tensors": own}
    return found


def resize_(net: nn.Module, sizes: Sizes, where: str) -> None:
    """Give layers these sizes, in place; tensors that change are zeros then, and tied ones stay tied.

    Layers that ``sizes`` leaves out stay. FileFormatError where it is not of this network.
    """
    memo: dict[int, Tensor] = {}
    try:
        for path, size in sizes.items():
            module = net.get_submodule(path)
            own, attributes = _own(module), dict(size["attributes"])
            if set(own) != set(size["tensors"]) or any(one not in ATTRIBUTES or one not in vars(module)
                                                       for one in attributes):
                raise KeyError(f"{path}: {sorted(own)}, not {sorted(size['tensors'])}, {sorted(attributes)}")
            for name, held in own.items():
                shape = torch.Size(map(int, size["tensors"][name]))
                if held.shape == shape:
                    continue
                if id(held) not in memo:
                    zeros = torch.zeros(shape, dtype=held.dtype, device=held.device)
                    learns = isinstance(held, nn.Parameter)
                    memo[id(held)] = nn.Parameter(zeros, held.requires_grad) if learns else zeros
                setattr(module, name, memo[id(held)])
            for name, value in attributes.items():
                setattr(module, name, tuple(map(int, value)) if isinstance(value, list) else int(value))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise FileFormatError(expected="sizes of this network's layers", got=str(error), where=where,
                              todo="build the network with the code that it was saved with.") from error


def _own(module: nn.Module) -> dict[str, Tensor]:
    return {name: held for name, held in (*module._parameters.items(), *module._buffers.items()) if held is not None}

"""Reads weights from files without running anything in them: safetensors, or ``torch.load(weights_only=True)``."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from offramp.errors import OfframpError

__all__ = ["WEIGHT_SUFFIXES", "load_weights_", "read_weights"]

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
SHOWN = 5


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name; a checkpoint's ``state_dict`` is taken out and DataParallel's prefix dropped."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise OfframpError(expected="a file of weights", got=f"no such file {str(path)!r}", where="weights",
                           todo="check the path")
    try:
        content: Any
        if file.suffix == ".safetensors":
            content = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise OfframpError(
            expected="a file of tensors alone (safetensors, or what torch.load(weights_only=True) accepts)",
            got=f"{file}: {str(error).splitlines()[0][:200]}", where="weights",
            todo="save it again as safetensors; files that need code to be run are refused",
        ) from error
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()) or not content:
        raise OfframpError(expected="named tensors", got=f"{type(content).__name__} in {file}", where="weights",
                           todo="save model.state_dict() in it")
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def load_weights_(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill a network from a file, strictly: every name and shape must fit. Returns the same network."""
    ours, theirs = model.state_dict(), read_weights(path)
    faults = [f"missing {key}" for key in ours if key not in theirs and not key.endswith("num_batches_tracked")]
    faults += [f"unknown {key}" for key in theirs if key not in ours]
    faults += [
        f"{key} {tuple(theirs[key].shape)} where the network has {tuple(ours[key].shape)}"
        for key in ours if key in theirs and theirs[key].shape != ours[key].shape
    ]
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise OfframpError(expected=f"weights of a {type(model).__name__}", got="; ".join(faults[:SHOWN]) + more,
                           where=str(path), todo="name the network these weights were saved from, with its num_classes")
    # Counters that some savers leave out: they steer nothing while batch norm has a fixed momentum.
    model.load_state_dict({**{k: v for k, v in ours.items() if k not in theirs}, **theirs})
    return model

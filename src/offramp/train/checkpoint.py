"""A checkpoint is one safetensors file, replaced atomically: weights, optimiser, mean of weights, JSON in its header.

A run killed at any moment finds either the old file or the new one. Loading runs no code from the file.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.errors import DataError, FileFormatError

__all__ = ["load", "optimiser_tensors", "restore_optimiser", "save"]

VERSION = 1


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write beside, flush to the disk, then rename over the old file."""
    part = path.with_suffix(".part")
    header = {"type": "offramp.checkpoint", "version": str(VERSION), "state": json.dumps(state)}
    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(flat, part, metadata=header)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise DataError(
            expected="room to write a checkpoint", got=str(error), where=str(path),
            todo="free some space, then run again",
        ) from error


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state; FileFormatError when the file is damaged, of another kind or from a future version."""
    where, todo = str(path), "remove the file, or give another run_dir, to start again"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise FileFormatError(expected="a readable checkpoint", got=str(error), where=where, todo=todo) from error
    if header.get("type") != "offramp.checkpoint" or header.get("version") != str(VERSION):
        got = f"type {header.get('type')!r}, version {header.get('version')!r}"
        raise FileFormatError(expected=f"a checkpoint of version {VERSION}", got=got, where=where, todo=todo)
    return tensors, json.loads(header["state"])


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat names ``optimiser.INDEX.KEY``; rates follow from the step and are not kept."""
    flat = {}
    for index, entries in optimiser.state_dict()["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                flat[f"optimiser.{index}.{key}"] = value
            else:
                assert value is None, f"{key} of the optimiser is {type(value)}, which the file cannot hold"
    return flat


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`optimiser_tensors`, into a fresh optimiser over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})

"""Putting rows that left at different exits back together, in the order in which they came."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Assembly", "rows_of"]

_LARGE_ROW = 1 << 18  # elements; above it a copy row by row beats a gather that is then scattered


def rows_of(output: Any, picked: Tensor | None) -> Any:
    """Some rows of every tensor of an output; None: all."""
    if picked is None:
        return output
    return pytree.tree_map(lambda leaf: leaf[picked] if isinstance(leaf, Tensor) else leaf, output)


class Assembly:
    """The output of a whole call, filled piece by piece."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._leaves: list[Any] | None = None
        self._spec: Any = None
        self._whole: Any = None

    def add(self, rows: Tensor | None, picked: Tensor | None, output: Any) -> None:
        """Rows ``picked`` of ``output`` (None: all) belong to places ``rows`` of the call (None: all, in order)."""
        if rows is None:
            self._whole = rows_of(output, picked)  # nothing is copied where all rows leave at one exit
            return
        leaves, spec = pytree.tree_flatten(output)
        if self._leaves is None:
            self._spec = spec
            self._leaves = [_room(leaf, self._count) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for room, leaf in zip(self._leaves, leaves, strict=True):
            if isinstance(leaf, Tensor):
                _copy(room, rows, leaf, picked)

    def output(self) -> Any:
        """The whole."""
        return self._whole if self._leaves is None else pytree.tree_unflatten(self._leaves, self._spec)


def _room(like: Tensor, count: int) -> Tensor:
    order = torch.contiguous_format
    if like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
        order = torch.channels_last
    return torch.empty((count, *like.shape[1:]), dtype=like.dtype, device=like.device, memory_format=order)


def _copy(room: Tensor, rows: Tensor, source: Tensor, picked: Tensor | None) -> None:
    if room[:1].numel() < _LARGE_ROW:
        room[rows] = source if picked is None else source[picked]
        return
    places = range(len(rows)) if picked is None else picked.tolist()
    for row, place in zip(rows.tolist(), places, strict=True):
        room[row].copy_(source[place])

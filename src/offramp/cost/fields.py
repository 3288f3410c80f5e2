"""Receptive fields, counted: which places of its inputs a result needs, and the MACs of computing no more than that.

M masks (pixels that somebody wants), H W space. One run is recorded op by op; then masks of wanted output places go
backwards through it. Places are those of a tensor's last two axes; a place is needed as soon as a needed place of some
later op reads it, whatever the channel. Every op read here is separable: what a row of its output reads does not depend
on the column. An op that nobody described here reads all of its inputs, and is listed.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from offramp.cost.macs import macs_of_op

__all__ = ["Fields", "Needed", "fields"]

ALL: Final = "all"
Reads = Tensor | str | None
"""What places on one axis are read: the same, all, or (K, I) the outputs that read input i (their number for none)."""
_SAME = {
    "native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "cudnn_batch_norm",
    "clone", "_to_copy", "detach", "alias", "copy_", "expand", "native_dropout", "dropout", "lift_fresh", "fill_",
    "hardswish", "hardswish_", "_prelu_kernel", "log_sigmoid_forward",  # pointwise, though torch does not tag them so
}
_CONV = {"convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "convolution_overrideable", "conv2d"}
_POOL = {"max_pool2d_with_indices", "max_pool2d", "mkldnn_max_pool2d", "avg_pool2d"}
_REDUCE = {"mean", "sum", "amax", "amin", "argmax"}
_MOVE = {"view", "_unsafe_view", "reshape", "unsqueeze", "transpose", "permute"}
_PIECE = {"cat", "split", "split_with_sizes", "chunk", "slice", "_softmax", "_log_softmax"}


@dataclass(frozen=True, eq=False)
class _Op:
    name: str
    macs: int
    size: tuple[int, int]
    """Places of its result, its last two axes; (1, 1) where it is wanted whole or not at all, as with fewer axes."""
    reads: tuple[tuple[int, Reads, Reads], ...] = ()
    """(op that made an input, rows, columns)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Needed:
    """What M masks need."""

    inputs: tuple[Tensor, ...]
    """For each tensor given, its needed places (M, H, W) bool."""
    macs: Tensor
    """(M,) float64: the MACs of each op times the share of its places that are needed, added up."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fields:
    """One recorded run, for one sample of one size."""

    ops: Sequence[_Op]
    inputs: Sequence[int]
    outputs: Sequence[int]
    unknown: Mapping[str, int] = field(default_factory=dict)
    """Calls of ops that count as reading everything since nothing says what they read."""

    @property
    def macs(self) -> int:
        """Of everything that was recorded, per sample."""
        return sum(op.macs for op in self.ops)

    def needed(self, *masks: Tensor) -> Needed:
        """Wanted places of each output, bool (M, H, W), in; needed places of each input, and the MACs, out."""
        assert len(masks) == len(self.outputs), "a mask for each output"
        rows = len(masks[0])
        need: list[Tensor | None] = [None] * len(self.ops)
        total = torch.zeros(rows, dtype=torch.float64, device=masks[0].device)

        def want(at: int, mask: Tensor) -> None:
            if self.ops[at].size == (1, 1):
                mask = mask.flatten(1).any(1)[:, None, None]
            before = need[at]
            need[at] = mask if before is None else before | mask

        for at, mask in zip(self.outputs, masks, strict=True):
            want(at, mask)
        for at in range(len(self.ops) - 1, -1, -1):
            op, wanted = self.ops[at], need[at]
            if wanted is None or not bool(wanted.any()):
                continue
            mask = wanted[:1] if bool(wanted.all()) else wanted  # before the first exit, one row stands for all
            total += op.macs * mask.flatten(1).double().mean(1)
            for source, down, across in op.reads:
                height, width = self.ops[source].size
                want(source, _back(_back(mask, down, 1, height), across, 2, width))
            if at not in self.inputs:
                need[at] = None
        found = []
        for at in self.inputs:
            none = torch.zeros(1, *self.ops[at].size, dtype=torch.bool, device=total.device)
            wanted = need[at]
            found.append((none if wanted is None else wanted).expand(rows, -1, -1))
        return Needed(inputs=tuple(found), macs=total)


def fields(fn: Callable[..., Any], /, *inputs: Tensor) -> Fields:
    """Record one call ``fn(*inputs)`` on one sample; the places of every tensor in its answer may then be asked for.

    >>> import torch.nn as nn
    >>> net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=2, dilation=2))
    >>> want = torch.zeros(1, 9, 9, dtype=torch.bool)
    >>> want[0, 4, 4] = True
    >>> needed = fields(net, torch.zeros(1, 1, 9, 9)).needed(want)
    >>> int(needed.inputs[0].sum()), int(needed.macs)  # 7 x 7 places; one place of the last layer, nine of the first
    (49, 90)
    """
    tape = _Tape(inputs)
    with torch.inference_mode(False), torch.no_grad(), tape:
        said = [leaf for leaf in pytree.tree_leaves(fn(*inputs)) if isinstance(leaf, Tensor)]
        outputs = [tape.at[leaf] for leaf in said]
    return Fields(ops=tape.ops, inputs=range(len(inputs)), outputs=outputs, unknown=dict(tape.unknown))


class _Tape(TorchDispatchMode):
    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[_Op] = []
        self.at = WeakTensorKeyDictionary()
        self.sharing: dict[int, list[Any]] = {}
        self.unknown: Counter[str] = Counter()
        for tensor in inputs:
            self._made(tensor, _Op("input", 0, _size(tensor)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._note(func, args, kwargs or {}, out)
        return out

    def _made(self, tensor: Tensor, op: _Op) -> None:
        self.ops.append(op)
        self._points(tensor, len(self.ops) - 1)

    def _points(self, tensor: Tensor, at: int | None) -> None:
        if at is not None:
            self.at[tensor] = at
        family = self.sharing.setdefault(tensor.untyped_storage()._cdata, [])
        family[:] = [one for one in family if one() is not None and one() is not tensor] + [weakref.ref(tensor)]

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        sources = [tensor for tensor in given if tensor in self.at]
        if not outs or not sources:
            for tensor in outs:
                self._points(tensor, None)
            return
        name = func.overloadpacket.__name__
        macs, size = macs_of_op(func, args, kwargs, out) or 0, _size(outs[0])
        told = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        reads = [_read(func, name, told, tensor, outs[0]) for tensor in sources]
        relatives = self._relatives(outs[0]) if func._schema.is_mutable else []
        known = not relatives and all(reads)
        if not known:
            if size != (1, 1) or any(self.ops[self.at[tensor]].size != (1, 1) for tensor in sources):
                self.unknown[f"{name} into a view" if relatives else name] += 1
            size, reads = (1, 1), [(ALL, ALL)] * len(sources)
            # what was written through one name is read through the others
            more = [one for one in relatives if one in self.at and all(one is not s for s in sources)]
            sources, reads = sources + more, reads + [(ALL, ALL)] * len(more)
        made = _Op(name, macs, size, tuple(
            (self.at[tensor], *read) for tensor, read in zip(sources, reads, strict=True) if read))
        self._made(outs[0], made)
        at, whole = len(self.ops) - 1, tuple((source, ALL, ALL) for source, _, _ in made.reads)
        for tensor in relatives:
            self._points(tensor, at)
        for tensor in outs[1:]:
            if made.size in (_size(tensor), (1, 1)):
                self._points(tensor, at)
            else:  # a norm's statistics
                self._made(tensor, _Op(name, 0, (1, 1), whole))

    def _relatives(self, tensor: Tensor) -> list[Tensor]:
        family = self.sharing.get(tensor.untyped_storage()._cdata, [])
        return [one for ref in family if (one := ref()) is not None and one is not tensor]


def _size(tensor: Tensor) -> tuple[int, int]:
    return (int(tensor.shape[-2]), int(tensor.shape[-1])) if tensor.ndim > 3 else (1, 1)


def _read(func: Any, name: str, told: Mapping[str, Any], source: Tensor, out: Tensor) -> tuple[Reads, Reads] | None:
    """What the result reads of one input, rows and columns; None where nobody knows."""
    inner, outer, rank = _size(source), _size(out), source.ndim
    if inner == (1, 1):
        return ALL, ALL
    if name in _SAME or torch.Tag.pointwise in func.tags:
        each = [None if i == o else ALL if i == 1 else "" for i, o in zip(inner, outer, strict=True)]
        return None if "" in each else (each[0], each[1])
    if name in _REDUCE:
        dims = told.get("dim")
        reduced = {d % rank for d in ([dims] if isinstance(dims, int) else dims or range(rank))}
        if {rank - 2, rank - 1} <= reduced:
            return ALL, ALL
        both = [ALL if rank - 2 + axis in reduced else None for axis in (0, 1)]
        return (both[0], both[1]) if out.ndim == rank else None
    if name == "native_group_norm":
        return ALL, ALL
    if name in _PIECE:
        dim = int(told.get("dim", 0)) % rank
        if dim < rank - 2:
            return None, None
        if name != "slice":
            return None
        axis, taken = dim - rank, torch.arange(source.shape[dim])
        taken = taken[slice(told.get("start"), told.get("end"), told.get("step", 1))]
        moved = _index(taken[:, None] == torch.arange(source.shape[dim]))
        return (moved, None) if axis == -2 else (None, moved)
    if name in _MOVE:
        return (None, None) if _stays(name, told, rank, inner, outer) else None
    if rank != 4 or source is not told.get("self", told.get("input")):
        return None
    if name in _CONV and told["weight"].ndim == 4:
        kernel, turned = told["weight"].shape[2:], bool(told.get("transposed", False))
        return _windows(inner, outer, kernel, told, turned)
    if name in _POOL:
        return _windows(inner, outer, told["kernel_size"], told, False)
    if name == "constant_pad_nd":
        left, _, top = (*told["pad"], 0, 0)[:3]
        down, across = (_index(torch.arange(o)[:, None] - start == torch.arange(i))
                        for i, o, start in zip(inner, outer, (top, left), strict=True))
        return down, across
    if "adaptive" in name and "pool2d" in name:
        down, across = (_index(_parts(i, o)) for i, o in zip(inner, outer, strict=True))
        return down, across
    if name.startswith(("upsample", "_upsample")):
        return _resized(func, told, inner, outer)
    return None


def _stays(name: str, told: Mapping[str, Any], rank: int, inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    """Whether a rearrangement leaves the last two axes as they are."""
    if inner != outer:
        return False
    if name == "transpose":
        return bool(max(told["dim0"] % rank, told["dim1"] % rank) < rank - 2)
    if name == "permute":
        return [d % rank for d in told["dims"]][-2:] == [rank - 2, rank - 1]
    return name != "unsqueeze" or bool(told["dim"] % (rank + 1) < rank - 1)


def _pair(value: Any, default: Sequence[int]) -> Sequence[int]:
    found = [value] if isinstance(value, int) else list(value if value is not None else ()) or list(default)
    return found * 2 if len(found) == 1 else found


def _windows(inner: tuple[int, int], outer: tuple[int, int], kernel: Any, told: Mapping[str, Any], turned: bool
             ) -> tuple[Reads, Reads]:
    kernel = _pair(kernel, (1,))
    stride = _pair(told.get("stride"), kernel if "kernel_size" in told else (1,))
    padding, dilation = _pair(told.get("padding"), (0,)), _pair(told.get("dilation"), (1,))
    found = []
    for axis, (i, o) in enumerate(zip(inner, outer, strict=True)):
        if turned:  # each input place is spread over a window of outputs
            i, o = o, i
        offsets = torch.arange(kernel[axis]) * dilation[axis] - padding[axis]
        places = torch.arange(o)[:, None] * stride[axis] + offsets
        reads = (places[:, :, None] == torch.arange(i)).any(1)
        reads = reads.T if turned else reads
        same = reads.shape[0] == reads.shape[1] and bool((reads == torch.eye(len(reads), dtype=torch.bool)).all())
        found.append(None if same else _index(reads))
    return found[0], found[1]


def _parts(inner: int, outer: int) -> Tensor:
    """Adaptive pooling: output o reads floor(o I / O) to ceil((o + 1) I / O)."""
    return torch.tensor([[o * inner // outer <= i < math.ceil((o + 1) * inner / outer) for i in range(inner)]
                         for o in range(outer)])


def _resized(func: Any, told: Mapping[str, Any], inner: tuple[int, int], outer: tuple[int, int]) -> tuple[Reads, Reads]:
    """The op itself says which rows it mixes: channel i of its input is 1 in row i alone."""
    resize, found = func.overloadpacket.default, []
    known = {a.name for a in resize._schema.arguments}
    for axis, (i, o) in enumerate(zip(inner, outer, strict=True)):
        shape, size = ((1, i, i, 1), [o, 1]) if axis == 0 else ((1, i, 1, i), [1, o])
        factors = told.get("scale_factors") or (told.get("scales_h"), told.get("scales_w"))
        scales = {"scales_h": factors[0], "scales_w": None} if axis == 0 else {"scales_h": None, "scales_w": factors[1]}
        rest = {"align_corners": told["align_corners"]} if "align_corners" in known else {}
        found.append(_index(resize(torch.eye(i).view(shape), size, **rest, **scales).view(i, o).T != 0))
    return found[0], found[1]


def _index(reads: Tensor) -> Tensor:
    """(O, I) bool, output o reads input i -> (K, I): for each input the outputs that read it, O filling the rest."""
    most = max(1, int(reads.sum(0).max()) if reads.numel() else 1)
    held, order = reads.T.int().sort(dim=1, descending=True, stable=True)
    return torch.where(held > 0, order, reads.shape[0])[:, :most].T.contiguous()


def _back(mask: Tensor, reads: Reads, dim: int, size: int) -> Tensor:
    """Wanted outputs to needed inputs, along one axis of (M, H, W)."""
    if reads is None:
        return mask
    if isinstance(reads, str):
        return mask.any(dim, keepdim=True).expand(*mask.shape[:dim], size, *mask.shape[dim + 1:])
    padded = F.pad(mask, (0, 1) if dim == 2 else (0, 0, 0, 1))
    reads = reads.to(mask.device)
    found = padded.index_select(dim, reads[0])
    for row in reads[1:]:
        found |= padded.index_select(dim, row)
    return found

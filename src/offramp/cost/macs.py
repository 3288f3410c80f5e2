"""Multiply-accumulates, counted while the thing runs; every op that was not counted is listed.

Counted: convolutions (grouped, transposed, dilated), matrix products, attention, and bilinear resizing at 4 per output
element. Not counted, but listed by name: norms, activations, pooling and the like. 1e9-based; never "flops".
"""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["MacCounter", "Macs", "count", "macs_of_op", "not_counted"]

_running = threading.local()

Formula = Callable[..., int]


@dataclass(frozen=True, kw_only=True)
class Macs:
    """What one call cost, for the whole batch that it was given."""

    total: int
    by_op: Mapping[str, int] = field(default_factory=dict)
    """MACs by the name of the op, as in ``{"convolution": 118013952}``."""
    uncounted: Mapping[str, int] = field(default_factory=dict)
    """Calls of ops that compute but are not counted, as in ``{"relu_": 17}``."""

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {macs / 1e9:.3f}" for name, macs in sorted(self.by_op.items(), key=lambda i: -i[1]))
        skipped = ", ".join(f"{name} x{calls}" for name, calls in sorted(self.uncounted.items()))
        return f"{self.total / 1e9:.3f} G MACs ({parts}); not counted: {skipped or 'nothing'}"


def count(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Macs:
    """MACs of one call ``fn(*args, **kwargs)``, for all its rows; nothing but the call's own effects happens.

    >>> count(torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.zeros(1, 3, 10, 10)).total == 8 * 3 * 9 * 100
    True
    """
    counter = MacCounter()
    with torch.no_grad(), counter:
        fn(*args, **kwargs)
    return counter.macs()


class MacCounter(TorchDispatchMode):
    """Counts while it is entered; ``total`` may be read at any time, so that a tracer can take differences."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self._by_op: Counter[str] = Counter()
        self._uncounted: Counter[str] = Counter()

    def __enter__(self) -> "MacCounter":
        _running.counters = [*getattr(_running, "counters", ()), self]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _running.counters = [one for one in _running.counters if one is not self]

    def macs(self) -> Macs:
        return Macs(total=self.total, by_op=dict(self._by_op), uncounted=dict(self._uncounted))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.note(func, args, kwargs or {}, out)
        return out

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count one op that has run."""
        macs = macs_of_op(func, args, kwargs, out)
        name = func.overloadpacket.__name__
        if macs is not None:
            self.total += macs
            self._by_op[name] += macs
        elif not _is_free(func):
            self._uncounted[name] += 1


@contextmanager
def not_counted() -> Iterator[None]:
    """What runs within is nobody's cost: a network that is traced on its way runs twice and is used once."""
    kept = [(one, one.total, one._by_op.copy(), one._uncounted.copy()) for one in getattr(_running, "counters", ())]
    try:
        yield
    finally:
        for one, total, by_op, uncounted in kept:
            one.total, one._by_op, one._uncounted = total, by_op, uncounted


def macs_of_op(func: Any, args: Any, kwargs: Any, out: Any) -> int | None:
    """MACs of one aten op from its arguments and its output; None where no formula is known."""
    formula = _FORMULAS.get(func.overloadpacket.__name__)
    return formula(*args, out=out, **{k: v for k, v in kwargs.items() if k != "out"}) if formula else None


def _first(out: Any) -> Tensor:
    return next(leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor))


def _convolution(x: Tensor, weight: Tensor, *rest: Any, out: Any, transposed: bool = False, **_: Any) -> int:
    # aten.convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups). The weight is
    # (out, in / groups, *kernel), or (in, out / groups, *kernel) when transposed: then each *input* place is spread.
    if len(rest) > 4 and isinstance(rest[4], bool):
        transposed = rest[4]
    places = x if transposed else _first(out)
    return int(places.numel() * math.prod(weight.shape[1:]))


def _mm(a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    return int(a.numel() * b.shape[-1]) if b.ndim > 1 else int(a.numel())


def _addmm(_bias: Tensor, a: Tensor, b: Tensor, *_: Any, out: Any, **__: Any) -> int:
    return _mm(a, b, out=out)


def _linear(x: Tensor, weight: Tensor, *_: Any, out: Any, **__: Any) -> int:
    return int(x.numel() * weight.shape[0])


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, out: Any, **__: Any) -> int:
    # (N, heads, T, D) each; scores q k^T, then scores v. Grouped heads of k and v are repeated, so q's heads count.
    return int(q.numel() * k.shape[-2] + q.shape[:-1].numel() * k.shape[-2] * v.shape[-1])


def _native_mha(query: Tensor, key: Tensor, value: Tensor, embed_dim: int, *_: Any, out: Any, **__: Any) -> int:
    # (N, T, D): in- and out-projections, scores, and their product with the values.
    rows, keys = query.shape[0] * query.shape[1], key.shape[0] * key.shape[1]
    return int(2 * (rows + keys) * embed_dim**2 + 2 * rows * key.shape[1] * embed_dim)


def _encoder_layer(src: Tensor, embed_dim: int, *rest: Any, out: Any, **__: Any) -> int:
    # torch._transformer_encoder_layer_fwd(src, embed_dim, heads, qkv w, qkv b, proj w, proj b, gelu, norm first, eps,
    # norm 1 w, b, norm 2 w, b, ffn w 1, b, ffn w 2, b, ...)
    widest = next(w.shape[0] for w in rest[12:] if isinstance(w, Tensor) and w.ndim == 2)
    rows = src.shape[0] * src.shape[1]
    return _native_mha(src, src, src, embed_dim, out=out) + int(2 * rows * embed_dim * widest)


def _rnn_layer(x: Tensor, weight_input: Tensor, weight_hidden: Tensor, *_: Any, out: Any, **__: Any) -> int:
    # One layer and direction of a recurrent net, (T, N, D): both matrices for every step of every row.
    return int(x.shape[0] * x.shape[1] * (weight_input.numel() + weight_hidden.numel()))


def _bilinear(*_: Any, out: Any, **__: Any) -> int:
    return 4 * _first(out).numel()


_FORMULAS: dict[str, Formula] = {
    **dict.fromkeys(
        ("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution", "convolution_overrideable",
         "miopen_convolution", "_slow_conv2d_forward", "conv2d"), _convolution),
    "cudnn_convolution_transpose": lambda x, w, *rest, out, **_: int(x.numel() * math.prod(w.shape[1:])),
    **dict.fromkeys(("mm", "bmm", "matmul", "mv", "dot", "vdot"), _mm),
    **dict.fromkeys(("addmm", "addmm_", "_addmm_activation", "baddbmm", "baddbmm_", "addbmm", "addmv"), _addmm),
    **dict.fromkeys(("linear", "mkldnn_linear", "_linear_prepack"), _linear),
    **dict.fromkeys(
        ("scaled_dot_product_attention", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
         "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
         "_flash_attention_forward", "_efficient_attention_forward", "_scaled_dot_product_attention_math"), _attention),
    "_native_multi_head_attention": _native_mha,
    "_transformer_encoder_layer_fwd": _encoder_layer,
    "mkldnn_rnn_layer": _rnn_layer,
    **dict.fromkeys(("upsample_bilinear2d", "_upsample_bilinear2d_aa"), _bilinear),
}

# Moving, making and naming memory: no arithmetic, so not worth a line in the list.
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "zeros", "zeros_like", "new_zeros",
    "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "arange", "scalar_tensor", "clone", "copy_",
    "_to_copy", "fill_", "zero_", "cat", "stack", "index_select", "gather", "embedding", "constant_pad_nd",
    "lift_fresh", "lift_fresh_copy", "lift", "_local_scalar_dense", "is_same_size", "contiguous", "repeat", "index",
    "index_put_", "flip", "roll", "native_dropout", "dropout", "bernoulli_", "randn", "rand", "randint", "normal_",
    "uniform_", "equal", "tril", "triu", "eye", "detach_", "resize_", "set_", "_reshape_alias", "pixel_shuffle",
}


def _is_free(func: Any) -> bool:
    return func.is_view or func.overloadpacket.__name__ in _FREE

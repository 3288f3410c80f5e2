"""A deployed network beside the untouched one and a smaller one: one timer, in turn, each in its fastest form."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from offramp.cost import macs
from offramp.cost.latency import Timing, describe_machine, measure
from offramp.errors import OfframpError
from offramp.graph import split, trace
from offramp.nn.guest import fold_batch_norms_
from offramp.nn.multiexit import MultiExit
from offramp.runtime._legs import Build
from offramp.runtime.adaptive import Adaptive

__all__ = ["Bench", "Dense", "Side", "bench", "dense_like", "macs_to_exits"]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One network's times: of a call, and of a row in the mean."""

    p50_ms: float
    p95_ms: float
    row_ms: float
    rows_per_s: float
    macs: float
    """Of a row, in the mean over the inputs; heads counted."""
    quiet: bool
    """False where the machine was too busy to trust this."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What came of it; ``share`` is how much of the saving in MACs arrives on the clock."""

    batch: int
    engine: str
    dtype: str
    adaptive: Side
    dense: Side
    small: Side | None
    exit_shares: tuple[float, ...]
    macs_ratio: float
    """Dense MACs / adaptive MACs."""
    time_ratio: float
    """Dense time / adaptive time, of a row in the mean."""
    setting: str = "input_dependent"
    to_exit_ms: tuple[float, ...] = ()
    """Of an anytime plan: from a call of a batch to each exit's answer, the last being the end."""
    to_exit_macs: tuple[float, ...] = ()
    """Of any plan: of a row to each exit, heads on the way counted."""
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """``time_ratio / macs_ratio``: 1 where every MAC saved is saved on the clock."""
        return self.time_ratio / self.macs_ratio

    def to_json(self) -> dict[str, Any]:
        """Plain values, ``share`` among them."""
        return {**asdict(self), "share": self.share}

    def __str__(self) -> str:
        lines = [f"{self.engine} {self.dtype}, batch {self.batch}, rows by exit "
                 + " / ".join(f"{share:.0%}" for share in self.exit_shares),
                 f"{'':10}{'p50 ms':>10}{'p95 ms':>10}{'rows/s':>10}{'GMACs/row':>11}"]
        mine = "adaptive" if self.setting == "input_dependent" else self.setting
        for name, side in ((mine, self.adaptive), ("untouched", self.dense), ("smaller", self.small)):
            if side is not None:
                lines.append(f"{name:10}{side.p50_ms:10.2f}{side.p95_ms:10.2f}{side.rows_per_s:10.2f}"
                             f"{side.macs / 1e9:11.3f}" + ("" if side.quiet else "  (busy machine)"))
        if self.to_exit_ms:
            lines.append("answers after " + ", ".join(f"{ms:.2f}" for ms in self.to_exit_ms) + " ms")
        lines.append(f"{self.macs_ratio:.3f}x fewer MACs, {self.time_ratio:.3f}x faster: "
                     f"{self.share:.3f} of the saving arrives")
        return "\n".join(lines)


class Dense(nn.Module):
    """A network without exits in its fastest form of one engine; made by :func:`dense_like`."""

    def __init__(self, model: nn.Module, build: Build, wide: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self._build, self._wide = build, wide if build.dtype is not None else None
        self._run: Callable[..., Any] = (
            torch.compile(model, options={"freezing": True}) if build.engine == "compile" else model
        )

    @torch.inference_mode()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._build.prepare((args, kwargs))
        output = self._run(*args, **kwargs)
        return output if self._wide is None else pytree.tree_map(self._widen, output)

    def _widen(self, leaf: Any) -> Any:
        return leaf.to(self._wide) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def dense_like(fast: Adaptive, model: nn.Module, example_inputs: Any) -> Dense:
    """A plain network with all that ``fast`` was given, exits aside: engine, type, layout, folded batch norms.

    The model is copied, or shared where nothing about it changes; it is left as found.
    """
    build = fast.build
    guest = model.backbone if isinstance(model, MultiExit) else model
    memo = {} if build.copies else {id(t): t for t in (*guest.parameters(), *guest.buffers())}
    twin = copy.deepcopy(guest, memo).eval()
    if build.fold:
        fold_batch_norms_(twin, split(trace(twin, example_inputs), [])[0].module().graph, "guest.")
    wide = next((p.dtype for p in guest.parameters()), torch.float32)
    return Dense(build.convert_(twin), build, wide)


def bench(
    fast: Adaptive,
    baseline: nn.Module,
    inputs: Any,
    *,
    small: nn.Module | None = None,
    batch: int = 1,
    repeats: int = 15,
    warmup: int = 2,
    budget_s: float | None = 60.0,
) -> Bench:
    """Time a deployed network beside the untouched one, and beside a smaller static one where it is given.

    baseline: the untouched network, or the :class:`MultiExit` that holds it; brought to its fastest form of the same
        engine by :func:`dense_like` (one made before may be passed, compiled code and all).
    inputs: a tensor, a tuple of arguments or a dict of keyword arguments, with as many rows as shall be answered.
        At batch 1 one row of each exit is timed and weighted by how many rows leave there; at larger batches every
        whole batch is timed. Of an anytime plan the whole refinement is timed, and the time to each exit's answer.
    """
    rows = _rows(inputs)
    if batch < 1 or rows < batch:
        raise OfframpError(expected=f"at least one batch of {batch} rows", got=f"{rows} rows", where="bench()")
    chunks = [_pick(inputs, slice(start, start + batch)) for start in range(0, rows - batch + 1, batch)]
    plain = baseline if isinstance(baseline, Dense) else dense_like(fast, baseline, chunks[0])
    smaller = small if small is None or isinstance(small, Dense) else dense_like(fast, small, chunks[0])
    exits = []
    if batch > 1 and fast.shrink == "auto":
        fast.calibrate(*_args(chunks[0]), **_kwargs(chunks[0]))
    for chunk in chunks:
        fast(*_args(chunk), **_kwargs(chunk))
        exits.append(fast.last_exits)
    where = torch.cat(exits)
    shares = torch.bincount(where, minlength=len(fast.plan.exits) + 1).double() / len(where)
    chosen = _representatives(where) if batch == 1 else {f"batch {i}": (i, 1.0) for i in range(len(chunks))}
    refines, ends = fast.plan.setting == "anytime", range(len(fast.legs))
    fns: dict[str, Callable[[], Any]] = {
        name: _until(fast, chunks[i], ends[-1]) if refines else _call(fast, chunks[i])
        for name, (i, _) in chosen.items()
    }
    if refines:
        fns |= {f"to {k}": _until(fast, chunks[0], k) for k in ends}
    fns["dense"] = _call(plain, chunks[0])
    if smaller is not None:
        fns["small"] = _call(smaller, chunks[0])
    device = next((t.device for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)), None)
    times = measure(fns, repeats=repeats, warmup=warmup, budget_s=budget_s, device=device)
    to_exit = torch.tensor(macs_to_exits(fast, chunks[0]), dtype=torch.float64)
    parts = [(times[name], weight) for name, (_, weight) in chosen.items()]
    adaptive = _side(parts, batch, float(to_exit[where].mean()))
    one = _pick(chunks[0], slice(0, 1))
    dense = _side([(times["dense"], 1.0)], batch, _macs(plain, one))
    dtype = fast.build.dtype or next((p.dtype for p in fast.parameters()), torch.float32)
    return Bench(
        batch=batch, engine=fast.engine, dtype=str(dtype).removeprefix("torch."), adaptive=adaptive, dense=dense,
        small=None if smaller is None else _side([(times["small"], 1.0)], batch, _macs(smaller, one)),
        exit_shares=tuple(shares.tolist()), macs_ratio=dense.macs / adaptive.macs,
        time_ratio=dense.row_ms / adaptive.row_ms, setting=fast.plan.setting,
        to_exit_ms=tuple(times[f"to {k}"].p50_ms for k in ends) if refines else (),
        to_exit_macs=tuple(to_exit.tolist()), machine=describe_machine(),
    )


@torch.inference_mode()
def macs_to_exits(fast: Adaptive, inputs: Any) -> tuple[int, ...]:
    """MACs that a row pays which leaves at each exit, the last being the end; heads passed on the way counted."""
    one = _pick(inputs, slice(0, 1))
    state: Any = fast.begin(*_args(one), **_kwargs(one))
    spent, found = 0, []
    for leg in fast.legs:
        if leg.fresh is not None:
            state = leg.fresh((_args(one), _kwargs(one)), None)
        spent += macs.count(leg.plain, state).total
        state = leg.plain(state)
        if leg.head is not None:
            spent += macs.count(leg.head, *state.tensors).total
        found.append(spent)
    return tuple(found)


@torch.inference_mode()
def _macs(dense: Dense, inputs: Any) -> float:
    args, kwargs = dense._build.prepare((_args(inputs), _kwargs(inputs)))
    return float(macs.count(dense.model, *args, **kwargs).total)


def _representatives(where: Tensor) -> dict[str, tuple[int, float]]:
    """Rows to time at batch 1: the first of each exit, weighted by the rows that leave there."""
    return {
        f"exit {index}": (int((where == index).nonzero()[0]), float((where == index).double().mean()))
        for index in sorted(set(where.tolist()))
    }


def _side(parts: Sequence[tuple[Timing, float]], batch: int, row_macs: float) -> Side:
    total = sum(weight for _, weight in parts)
    call_ms = sum(timing.p50_ms * weight for timing, weight in parts) / total
    samples = sorted((ms, weight / len(timing.samples_ms)) for timing, weight in parts for ms in timing.samples_ms)
    return Side(p50_ms=_quantile(samples, 0.5), p95_ms=_quantile(samples, 0.95), row_ms=call_ms / batch,
                rows_per_s=1e3 * batch / call_ms, macs=row_macs, quiet=all(timing.quiet for timing, _ in parts))


def _quantile(samples: Sequence[tuple[float, float]], q: float) -> float:
    """Of sorted (value, weight): the first value up to which a share ``q`` of the weight lies."""
    total, seen = sum(weight for _, weight in samples), 0.0
    for value, weight in samples:
        seen += weight
        if seen >= q * total - 1e-12:
            return value
    return samples[-1][0]


def _args(inputs: Any) -> tuple[Any, ...]:
    return () if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, tuple) else (inputs,)


def _kwargs(inputs: Any) -> dict[str, Any]:
    return dict(inputs) if isinstance(inputs, Mapping) else {}


def _rows(inputs: Any) -> int:
    return next((len(leaf) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def _pick(inputs: Any, rows: slice) -> Any:
    count = _rows(inputs)
    return pytree.tree_map(
        lambda leaf: leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count else leaf, inputs
    )


def _until(fast: Adaptive, inputs: Any, k: int) -> Callable[[], Any]:
    """To the answer of exit k, by way of those before it."""
    args, kwargs = _args(inputs), _kwargs(inputs)
    return lambda: next(one for one in fast.anytime(*args, **kwargs) if one.exit_index == k)


def _call(network: nn.Module, inputs: Any) -> Callable[[], Any]:
    args, kwargs = _args(inputs), _kwargs(inputs)
    return lambda: network(*args, **kwargs)

"""What each exit of a network costs: counted on inputs like those it meets, and timed where that is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from offramp.cost import macs
from offramp.cost.latency import Timing, measure
from offramp.cost.memory import param_bytes, peak_bytes
from offramp.functional.confidence import top
from offramp.functional.summaries import bin_scores
from offramp.nn.guest import evaluating
from offramp.nn.multiexit import MultiExit
from offramp.nn.slim import Slimmable
from offramp.nn.widths import exits_of, narrow_exits
from offramp.table import Costs, Latency

__all__ = ["Inputs", "costs_of", "price"]


@dataclass
class Inputs:
    """Some samples, as a network takes them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]

    def rows(self, count: int) -> "Inputs":
        """The first ``count`` rows, from the start again where there are too few."""
        have = len(self.tensors()[0])
        index = torch.arange(count) % have

        def take(leaf: Any) -> Any:
            return leaf[index.to(leaf.device)] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == have else leaf

        args, kwargs = pytree.tree_map(take, (self.args, self.kwargs))
        return Inputs(args, kwargs, None)


def costs_of(net: MultiExit | Slimmable, *, latency: Mapping[str, Any] | None = None) -> Costs:
    """What each exit costs, at each width, on a sample like those that ``net`` was attached with.

    Times are taken only where ``latency`` says how, as ``record`` takes it.
    """
    batch = Inputs(*exits_of(net).traced.example(), None)
    home = next((p.device for p in net.parameters()), torch.device("cpu"))
    with evaluating(net):
        return price(net, batch, home, latency)


def price(net: MultiExit | Slimmable, batch: Inputs, device: torch.device,
               latency: Mapping[str, Any] | None) -> Costs:
    """Of each width as it is deployed: a narrow network of its own."""
    if isinstance(net, MultiExit):
        return _costs(net, batch, device, latency)
    parts = {}
    for width in net.widths:
        narrow = narrow_exits(net, width)
        with evaluating(narrow):
            parts[width] = _costs(narrow, batch, device, latency)
    return Costs.of_widths(parts)


def _costs(net: MultiExit, batch: Inputs, device: torch.device, latency: Mapping[str, Any] | None) -> Costs:
    """Counted and measured on the inputs that were recorded, not on those that the network was attached with."""
    one = batch.rows(1)
    state: Any = net.begin(*one.args, **one.kwargs)
    total, peak = 0, 0
    columns: dict[str, list[int]] = {
        name: [] for name in ("macs", "head_macs", "param_bytes", "head_param_bytes", "peak")
    }
    for k in range(len(net.stages)):
        total += int(macs.count(net.stages[k], state).total)
        peak = max(peak, peak_bytes(net.step, k, state))
        after = net.stages[k](state)
        if k == len(net.sites):
            rows = [(total, 0, param_bytes(net.backbone), 0, peak)]
        else:
            heads = [net.head(net.columns[c].name) for c in net.columns_at(k)]
            rows = [
                (total, int(macs.count(head, *after.tensors).total), net.sites[k].param_bytes_before, param_bytes(head),
                 peak) for head in heads
            ]
        for row in rows:
            for name, value in zip(columns, row, strict=True):
                columns[name].append(value)
        state = after
    measured = () if latency is None else tuple(
        _latency(net, batch.rows(size), size, device, latency) for size in latency.get("batches", (1,))
    )
    return Costs(macs=tuple(columns["macs"]), head_macs=tuple(columns["head_macs"]),
                 param_bytes=tuple(columns["param_bytes"]), head_param_bytes=tuple(columns["head_param_bytes"]),
                 peak_bytes=tuple(columns["peak"]), latency=measured)


def _latency(net: MultiExit, batch: Inputs, size: int, device: torch.device, options: Mapping[str, Any]) -> Latency:
    """Stages, heads with their decision, and the untouched network, in turn under one timer."""
    decide = top if net.task == "classify" else lambda logits: bin_scores(top(logits))
    fns: dict[str, Any] = {"dense": lambda: net.backbone(*batch.args, **batch.kwargs)}
    state: Any = net.begin(*batch.args, **batch.kwargs)
    for k in range(len(net.stages)):
        after = net.stages[k](state)
        fns[f"stage {k}"] = lambda k=k, state=state: net.stages[k](state)
        for c in net.columns_at(k) if k < len(net.sites) else ():
            head = net.head(net.columns[c].name)
            fns[f"head {c}"] = lambda head=head, after=after: decide(head(*after.tensors))
        state = after
    times = measure(fns, device=device, repeats=int(options.get("repeats", 15)),
                    budget_s=float(options.get("budget_s", 5.0)))
    body_50, body_95, head_50, head_95 = [], [], [], []
    for k in range(len(net.stages)):
        p50, p95 = _sum([times[f"stage {i}"] for i in range(k + 1)])
        for c in net.columns_at(k) if k < len(net.sites) else (len(net.columns) - 1,):
            head_time = times.get(f"head {c}")
            body_50.append(p50)
            body_95.append(p95)
            head_50.append(head_time.p50_ms if head_time else 0.0)
            head_95.append(head_time.p95_ms if head_time else 0.0)
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    return Latency(
        device=device.type, engine="eager", dtype=str(dtype).removeprefix("torch."), batch=size,
        backbone_p50_ms=tuple(body_50), backbone_p95_ms=tuple(body_95), head_p50_ms=tuple(head_50),
        head_p95_ms=tuple(head_95), dense_p50_ms=times["dense"].p50_ms, dense_p95_ms=times["dense"].p95_ms,
    )


def _sum(parts: Sequence[Timing]) -> tuple[float, float]:
    """Medians add; their distances to p95 add in quadrature, as those of independent stages do."""
    middle = sum(one.p50_ms for one in parts)
    return middle, middle + float(sum((one.p95_ms - one.p50_ms) ** 2 for one in parts)) ** 0.5

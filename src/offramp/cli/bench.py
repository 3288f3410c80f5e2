"""Clocks side by side: the untouched network, the deployed one, and the network cut at one exit for every sample."""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.choose.replay import replay
from offramp.cli.folder import Run
from offramp.cli.masks import Until, deployed, unmasked
from offramp.cli.say import note
from offramp.cost.latency import Timing, describe_machine, measure
from offramp.errors import OfframpError
from offramp.graph import begin, split
from offramp.nn.guest import evaluating
from offramp.nn.masked import Masked
from offramp.nn.multiexit import MultiExit
from offramp.nn.slim import Slimmable
from offramp.nn.widths import narrow_exits
from offramp.runtime import Adaptive, deploy
from offramp.table import ExitTable, write_atomic
from offramp.types import Plan

__all__ = ["CutAt", "bench_run"]

BUSY = "The machine was busy: threads waited for a core in many samples, and the least delayed were kept. " \
       "Repeat on a quiet machine before quoting these times."


class CutAt(nn.Module):
    """A smaller static network for every sample: the backbone, of one width, up to an exit with its head or the end."""

    def __init__(self, net: MultiExit | Slimmable, column: str) -> None:
        super().__init__()
        if isinstance(net, Slimmable):
            column, _, width = column.partition("@")
            net = narrow_exits(net, float(width or 1))
        self._traced = net.traced
        self.head: nn.Module | None = None
        if column == "final":  # of a narrower network
            self.stage = split(net.traced, [])[0]
        else:
            site = next(one.site for one in net.columns if one.name == column)
            self.stage, self.head = split(net.traced, [site])[0], net.head(column)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        after: Any = self.stage(begin(self._traced, *args, **kwargs))
        return after if self.head is None else self.head(*after.tensors)


def bench_run(
    run: Run, *, batches: Sequence[int] = (1, 32), repeats: int = 40, engine: Any = "eager", dtype: Any = None,
    device: str | None = None, budget_s: float = 60.0, quiet: bool = False,
) -> dict[str, Any]:
    """Time the networks in turn on the test split's own samples, and keep the figures in bench.json."""
    net, plan, table = run.net, run.plan(), run.table("test")
    where = torch.device(device or "cpu")
    net.to(where)
    if isinstance(net, Masked):
        networks, spent_by = _masked(net, plan, table, engine, dtype, where)
    else:
        networks, spent_by = _adapted(net, plan, table, engine, dtype, where)
    data, rows, quiet_machine = run.source.split("test", labels=False), [], True
    static = [network for network in networks.values() if isinstance(network, nn.Module)]
    with evaluating(net, *static):
        for batch in batches:
            if not quiet:
                note(f"timing {len(networks)} networks at batch {batch}")
            turns = max(4, min(repeats, 4 * repeats // max(batch, 1)))
            inputs = _inputs(data, batch, turns, where)
            fns = {name: _over(network, inputs) for name, network in networks.items()}
            times = measure(fns, repeats=turns, device=where, budget_s=budget_s / len(batches))
            quiet_machine &= all(one.quiet for one in times.values())
            rows += [_row(name, batch, time) for name, time in times.items()]
    page = {
        "format": "offramp.bench", "version": 1, "rows": rows,
        "macs": spent_by,
        "setting": {"device": str(where), "engine": engine, "dtype": dtype or "float32",
                    "threads": torch.get_num_threads()},
        "machine": describe_machine(),
        "note": "" if quiet_machine else BUSY,
    }
    write_atomic(run.path / "bench.json", json.dumps(page, indent=1) + "\n")
    return page


def _adapted(net: MultiExit | Slimmable, plan: Plan, table: ExitTable, engine: Any, dtype: Any, where: torch.device
             ) -> tuple[dict[str, Callable[[Tensor], Any]], dict[str, float]]:
    """The networks to time, and what each spends on a sample."""
    fast = deploy(net, plan, engine=engine, dtype=dtype).to(where)
    mine = "adaptive" if plan.setting == "input_dependent" else plan.setting
    columns = [*map(table.index, plan.exits), len(table.names) - 1]
    spent = (float(replay(table, plan).macs.mean()) if plan.setting == "input_dependent"
             else table.costs.price(columns, setting=plan.setting))
    prices = {name: float(table.costs.path([e])[0]) for e, name in enumerate(table.names[:-1])}
    nearest = min(prices, key=lambda name: abs(prices[name] - spent))
    untouched = net.backbone if isinstance(net, MultiExit) else narrow_exits(net, 1.0).backbone
    networks: dict[str, Callable[[Tensor], Any]] = {"untouched": untouched, mine: fast}
    if plan.setting == "anytime":
        networks[mine] = _until(fast, len(plan.exits))
        networks |= {f"anytime: first {name}": _until(fast, k) for k, name in enumerate(plan.exits)}
    spent_by = {"untouched": float(table.costs.macs[-1]), mine: spent}
    if plan.setting != "budgeted":  # which is static itself
        networks[f"static: cut at {nearest}"] = CutAt(net, nearest)
        spent_by["static"] = prices[nearest]
    return networks, spent_by


def _masked(net: Masked, plan: Plan, table: ExitTable, engine: Any, dtype: Any, where: torch.device
            ) -> tuple[dict[str, Callable[[Tensor], Any]], dict[str, float]]:
    """The network without masks, the masked one up to the plan's exit, and up to each before."""
    if dtype not in (None, "fp32"):
        raise OfframpError(expected="--dtype fp32 for a masked network", got=dtype, where="--dtype",
                           todo="leave it out: the kernel computes in fp32.")
    fast, names = deployed(net, plan, engine=engine, device=where)
    networks: dict[str, Callable[[Tensor], Any]] = {"untouched": unmasked(net).backbone}
    spent_by = {"untouched": float(table.costs.macs[-1])}
    if isinstance(fast, Until):
        networks["masked"] = fast
        networks |= {f"masked: first {name}": Until(fast.fast, k) for k, name in enumerate(names[:-1])}
        spent_by["masked"] = float(table.costs.macs[table.index(names[-1])])
    return networks, spent_by


def _inputs(data: Any, batch: int, turns: int, where: torch.device) -> list[Tensor]:
    """Up to ``turns`` batches of different samples, spread over the split."""
    count = max(1, min(turns, len(data) // batch))
    step = max(1, len(data) // (count * batch))
    order = [(i * step) % len(data) for i in range(count * batch)]
    images = [data[i] for i in order]
    return [torch.stack(images[i * batch:(i + 1) * batch]).to(where) for i in range(count)]


def _until(fast: Adaptive, k: int) -> Callable[[Tensor], Any]:
    return lambda x: next(one for one in fast.anytime(x) if one.exit_index == k)


def _over(network: Callable[[Tensor], Any], inputs: Sequence[Tensor]) -> Callable[[], Any]:
    turn = itertools.cycle(inputs)
    return lambda: network(next(turn))


def _row(name: str, batch: int, time: Timing) -> dict[str, Any]:
    mean = sum(time.samples_ms) / len(time.samples_ms)
    return {"network": name, "batch": batch, "p50_ms": time.p50_ms, "p95_ms": time.p95_ms,
            "throughput_per_s": 1000 * batch / mean, "samples": time.repeats, "dropped": time.dropped}

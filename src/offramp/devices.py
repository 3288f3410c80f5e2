"""Exits for unequal devices: each holds the largest part of a network that fits (EENet, 3.1). M devices, K groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from offramp.errors import OfframpError, PlanError
from offramp.nn.multiexit import MultiExit
from offramp.prices import costs_of
from offramp.table import Costs, ExitTable, Unit
from offramp.types import ExitSite

__all__ = ["Group", "Placement", "place"]


@final
@dataclass(frozen=True, kw_only=True)
class Group:
    """Devices that hold the same part."""

    exit: str
    """Where their part ends; ``final``: they hold the whole network."""
    cost: float
    """Of the part, its head counted."""
    capacity: float
    """The least of the group's."""
    devices: tuple[str, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which part each device holds; smallest parts first. Prints as a table."""

    groups: tuple[Group, ...]
    unit: Unit

    @property
    def exits(self) -> tuple[str, ...]:
        """The early exits to build, in order of depth: ``attach(..., exits=placement.exits)`` for places of bare sites,
        ``net.part(upto=exit)`` of a network that has them."""
        return tuple(group.exit for group in self.groups if group.exit != "final")

    def of(self, device: str) -> Group:
        """The group of a device."""
        for group in self.groups:
            if device in group.devices:
                return group
        raise OfframpError(expected=f"one of {', '.join(name for group in self.groups for name in group.devices)}",
                           got=repr(device), where="Placement.of()")

    def __str__(self) -> str:
        lines = [("part up to", str(self.unit), "capacity", "devices")]
        lines += [(one.exit, f"{one.cost:,.6g}", f"{one.capacity:,.6g}", ", ".join(one.devices)) for one in self.groups]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                         for line in lines)


def place(
    where: MultiExit | ExitTable | Sequence[ExitSite], capacities: Mapping[str, float] | Sequence[float], *,
    unit: Unit = "param_bytes", groups: int | None = None, batch: int = 1,
) -> Placement:
    """Choose exits so that each device holds the largest part whose cost is at most the least capacity of its group.

    where: a network with exits or its table, each exit then costing the way to it and its own head, as a budgeted plan
        does; or the sites of a network (``offramp.sites``), for "param_bytes" and "macs" alone, no head counted.
    capacities: a device's name -> what it can hold; a sequence names them ``device 0`` and on.
    unit: "param_bytes", "macs" a sample, "latency_ms" a sample at ``batch`` (of a network: measured here, which is the
        device's clock only if this is such a device), or "peak_bytes" of live tensors of a sample.
    groups: at most so many different parts, the whole network among them; nothing: each device its own largest.

    Devices are sorted and cut into groups of neighbours by dynamic programming, so that the macs that all devices can
    run together are the most of any such grouping (EENet leaves the clustering open). PlanError where a device cannot
    hold the first part.
    """
    if isinstance(capacities, Mapping):
        named = [(name, float(capacity)) for name, capacity in capacities.items()]
    else:
        named = [(f"device {i}", float(capacity)) for i, capacity in enumerate(capacities)]
    devices = sorted(named, key=lambda one: one[1])
    if not devices or (groups is not None and groups < 1):
        raise OfframpError(expected="devices, and at least one group", got=f"{len(devices)} and {groups}",
                           where="place()")
    parts = _parts(where, unit, batch)
    held = []
    for name, capacity in devices:
        fitting = [i for i, part in enumerate(parts) if part[1] <= capacity]
        if not fitting:
            small = min(parts, key=lambda part: part[1])
            raise PlanError(expected=f"devices that hold the smallest part, {small[1]:g} {unit} up to {small[0]}",
                            got=f"{name} with {capacity:g}", where="place()",
                            todo="leave that device out, or give the network an earlier exit or a smaller head.")
        held.append(fitting[-1])
    starts = _grouped([parts[i][2] for i in held], groups or len(devices))
    made: list[Group] = []
    for start, stop in zip(starts, [*starts[1:], len(devices)], strict=True):
        name, cost, _ = parts[held[start]]
        names = tuple(device for device, _ in devices[start:stop])
        if made and made[-1].exit == name:
            before = made.pop()
            names, start = (*before.devices, *names), start - len(before.devices)
        made.append(Group(exit=name, cost=cost, capacity=devices[start][1], devices=names))
    return Placement(groups=tuple(made), unit=unit)


def _parts(where: Any, unit: Unit, batch: int) -> list[tuple[str, float, float]]:
    """(name, cost, macs of the way to it) of each part, the largest last; of heads at one site the dearest last."""
    if isinstance(where, MultiExit | ExitTable):
        costs: Costs = where.costs if isinstance(where, ExitTable) else costs_of(
            where, latency={"batches": (batch,)} if unit == "latency_ms" else None)
        found = [(column.name, costs.price([k], unit, setting="budgeted", batch=batch), float(costs.macs[k]))
                 for k, column in enumerate(where.columns)]
        return sorted(found, key=lambda part: (part[2], part[0] == "final", part[1]))
    if unit not in ("param_bytes", "macs"):
        raise OfframpError(expected="a network with exits, or its table", got=f"sites, which know no {unit}",
                           where="place()", todo="place by 'param_bytes' or 'macs', or attach exits first.")
    sites = list(where)
    if not sites:
        raise OfframpError(expected="at least one site", got="none", where="place()")
    return [(site.name, float(site.macs_before if unit == "macs" else site.param_bytes_before),
             float(site.macs_before)) for site in sites]


def _grouped(worth: Sequence[float], most: int) -> list[int]:
    """Where each of at most ``most`` groups of neighbours starts, ``worth`` rising: each member is worth its first.

    Exact: before the last of the best ``g`` groups stand the best ``g - 1``.
    """
    count = len(worth)
    best = [[worth[0] * n for n in range(count + 1)]]
    cut: list[list[int]] = [[0] * (count + 1)]
    for _ in range(1, min(most, count)):
        row, starts = [0.0] * (count + 1), [0] * (count + 1)
        for n in range(1, count + 1):
            starts[n] = max(range(n), key=lambda s: best[-1][s] + worth[s] * (n - s))  # noqa: B023
            row[n] = best[-1][starts[n]] + worth[starts[n]] * (n - starts[n])
        best.append(row)
        cut.append(starts)
    at, found = count, []
    for starts in reversed(cut):
        found.append(starts[at])
        at = starts[at]
        if at == 0:
            break
    return sorted(set(found))

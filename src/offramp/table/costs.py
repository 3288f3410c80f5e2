"""What leaving at each column of a table costs. E exits, the last being the backbone.

A network of several widths has the columns of each, the narrowest first. Whoever goes from a narrower column to a
wider one starts again from the input: nothing of the narrower run is used, all of it is paid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from offramp.errors import FileFormatError, OfframpError, PlanError
from offramp.types import Setting

__all__ = ["Costs", "Latency", "Unit"]

Unit = Literal["macs", "latency_ms", "peak_bytes", "param_bytes"]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Measured times of one setting; every sequence has one value a column, milliseconds a batch of ``batch``."""

    device: str
    engine: str
    dtype: str
    batch: int
    backbone_p50_ms: tuple[float, ...]
    """Cumulative, input to site; of the last column: the whole staged backbone."""
    backbone_p95_ms: tuple[float, ...]
    head_p50_ms: tuple[float, ...]
    """The head alone with its decision; 0 for the last column."""
    head_p95_ms: tuple[float, ...]
    dense_p50_ms: float
    """The untouched network under the same timer."""
    dense_p95_ms: float

    def select(self, columns: Sequence[int]) -> "Latency":
        """The times of some columns, in the given order."""
        times: dict[str, Any] = {name: tuple(getattr(self, name)[column] for column in columns) for name in _TIMES}
        return replace(self, **times)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of each column, backbone and head apart, so that any choice of exits can be priced."""

    macs: tuple[int, ...]
    """Of the backbone, a sample, input to site: cumulative."""
    head_macs: tuple[int, ...]
    """A sample; 0 for the last column."""
    param_bytes: tuple[int, ...]
    """Of the backbone, input to site: cumulative."""
    head_param_bytes: tuple[int, ...]
    peak_bytes: tuple[int, ...]
    latency: tuple[Latency, ...] = ()
    widths: tuple[float, ...] = ()
    """Of each column, rising; nothing: all columns are of one width. Other sequences are cumulative within a width."""

    def __post_init__(self) -> None:
        for name in ("macs", "head_macs", "param_bytes", "head_param_bytes", "peak_bytes"):
            object.__setattr__(self, name, tuple(int(value) for value in getattr(self, name)))
        object.__setattr__(self, "latency", tuple(self.latency))
        object.__setattr__(self, "widths", tuple(map(float, self.widths)) if len(set(self.widths)) > 1 else ())
        columns = len(self.macs)
        faults = [
            f"{name} has {len(getattr(self, name))} values"
            for name in ("head_macs", "param_bytes", "head_param_bytes", "peak_bytes")
            if len(getattr(self, name)) != columns
        ]
        for index, one in enumerate(self.latency):
            faults += [
                f"latency[{index}].{name} has {len(getattr(one, name))} values" for name in _TIMES
                if len(getattr(one, name)) != columns
            ]
        if self.widths and (len(self.widths) != columns or list(self.widths) != sorted(self.widths)):
            faults.append(f"widths {self.widths}, not one a column, the narrowest first")
        if not faults and columns:
            # the last column may be another run: of a masked network the one without masks
            if any(self.macs[e + 1] < self.macs[e] for e in range(columns - 2) if not self._restarts(e, e + 1)):
                faults.append(f"macs {self.macs} fall with depth")
            if self.head_macs[-1]:
                faults.append(f"the last column, the backbone itself, has a head of {self.head_macs[-1]} macs")
        if faults:
            raise OfframpError(expected=f"{columns} columns of costs in order of depth", got="; ".join(faults),
                               where="Costs")

    def path(self, columns: Sequence[int], unit: Unit = "macs", *, batch: int = 1, device: str | None = None,
             engine: str | None = None, dtype: str | None = None) -> NDArray[np.float64]:
        """What a sample pays that leaves at each of the chosen columns, the heads passed on the way counted.

        ``columns`` are indices in order of depth. ``latency_ms`` is the median time of a batch divided by ``batch``,
        so a row that leaves is taken to give back its share of the batch; what shrinking really gives back is for
        the runtime to measure. Where several settings were measured, ``device``, ``engine`` and ``dtype`` pick one,
        else the first with that batch.
        """
        chosen = list(columns)
        body, head = self.parts(unit, batch=batch, device=device, engine=engine, dtype=dtype)
        priced: NDArray[np.float64] = body[chosen] + np.cumsum(head[chosen])
        for k in range(1, len(chosen)):  # a narrower run given up is paid up to where it ended
            if self._restarts(chosen[k - 1], chosen[k]):
                priced[k:] += body[chosen[k - 1]]
        return priced

    def one_width(self, where: str) -> "Costs":
        """Itself; PlanError where columns of several widths share no work, which ``where`` builds upon."""
        if self.widths:
            raise PlanError(expected="columns of one width", got=f"the widths {sorted(set(self.widths))}", where=where,
                            todo="select the full width's columns, or search with tolerance='joint'.")
        return self

    def _restarts(self, one: int, other: int) -> bool:
        return bool(self.widths) and self.widths[one] != self.widths[other]

    def parts(self, unit: Unit = "macs", *, batch: int = 1, device: str | None = None, engine: str | None = None,
              dtype: str | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(body, head), both (E,): a sample's way to each column's site, and the column's head alone; as ``path``.

        The way is that of the column's own width, as if no narrower one had run before.
        """
        if unit == "macs":
            return np.array(self.macs, np.float64), np.array(self.head_macs, np.float64)
        if unit == "latency_ms":
            one = self.at(batch=batch, device=device, engine=engine, dtype=dtype)
            return np.array(one.backbone_p50_ms) / batch, np.array(one.head_p50_ms) / batch
        raise OfframpError(expected="unit 'macs' or 'latency_ms'", got=repr(unit), where="Costs.path()",
                           todo="bytes belong to a whole plan: Costs.price().")

    def price(self, columns: Sequence[int], unit: Unit = "macs", *, setting: Setting = "input_dependent",
              shares: Sequence[float] | None = None, batch: int = 1) -> float:
        """What a whole plan costs in its setting (MESS, Table 1): ``columns`` in order of depth, the last included.

        ``budgeted``: the first of ``columns`` alone, the backbone up to its site and its head; what lies deeper is
        gone, its bytes too. ``anytime``: the whole backbone and every head. ``input_dependent``: the mean of ``path``
        over ``shares``, one a column; every sample that reaches an exit pays its head. Bytes: ``param_bytes`` of all
        that is kept; ``peak_bytes`` of the column that needs most, live tensors of a sample as the table has them.
        """
        chosen = list(columns[:1] if setting == "budgeted" else columns)
        if unit == "peak_bytes":
            return float(max(self.peak_bytes[column] for column in chosen))
        if unit == "param_bytes":  # each width is a network of its own there
            ends = [one for one, after in zip(chosen, [*chosen[1:], None], strict=True)
                    if after is None or self._restarts(one, after)]
            return float(sum(self.param_bytes[column] for column in ends)
                         + sum(self.head_param_bytes[column] for column in chosen))
        paid = self.path(chosen, unit, batch=batch)
        if setting != "input_dependent":
            return float(paid[-1])
        if shares is None or len(shares) != len(chosen):
            raise OfframpError(expected=f"{len(chosen)} shares, one a column", got=repr(shares), where="Costs.price()")
        return float(paid @ np.asarray(shares, np.float64))

    def at(self, *, batch: int = 1, device: str | None = None, engine: str | None = None,
           dtype: str | None = None) -> Latency:
        """The first measured latency of this setting."""
        for one in self.latency:
            if one.batch == batch and device in (None, one.device) and engine in (None, one.engine) \
                    and dtype in (None, one.dtype):
                return one
        known = [f"batch {one.batch} on {one.device}, {one.engine}, {one.dtype}" for one in self.latency]
        raise PlanError(
            expected=f"latencies measured at batch {batch}"
                     + "".join(f", {name} {value}" for name, value in
                               (("device", device), ("engine", engine), ("dtype", dtype)) if value),
            got=f"{'; '.join(known) or 'none'}", where="Costs",
            todo="record the table with that setting, or minimise 'macs'.",
        )

    def select(self, columns: Sequence[int]) -> "Costs":
        """The costs of some columns, in the given order."""
        def pick(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[column] for column in columns)

        return Costs(
            **{name: pick(getattr(self, name)) for name in _COUNTS},
            latency=tuple(one.select(columns) for one in self.latency), widths=pick(self.widths) if self.widths else (),
        )

    @staticmethod
    def of_widths(parts: Mapping[float, "Costs"]) -> "Costs":
        """The costs of one network at several widths, each with columns of its own; "dense" is the full width."""
        chosen = sorted(parts)
        settings = {(one.device, one.engine, one.dtype, one.batch) for one in parts[chosen[-1]].latency}
        times = []
        for device, engine, dtype, batch in sorted(settings):
            ones = [parts[width].at(batch=batch, device=device, engine=engine, dtype=dtype) for width in chosen]
            joined: dict[str, Any] = {name: tuple(ms for one in ones for ms in getattr(one, name)) for name in _TIMES}
            times.append(replace(ones[-1], **joined))
        return Costs(
            **{name: tuple(value for width in chosen for value in getattr(parts[width], name)) for name in _COUNTS},
            latency=tuple(times), widths=tuple(width for width in chosen for _ in parts[width].macs),
        )

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Costs":
        """Read what ``dataclasses.asdict`` gave."""
        try:
            return Costs(
                **{name: tuple(data[name]) for name in _COUNTS},
                latency=tuple(
                    Latency(**{**one, **{name: tuple(map(float, one[name])) for name in _TIMES}})
                    for one in data["latency"]
                ),
                widths=tuple(data.get("widths", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(expected="costs as ExitTable.save writes them", got=repr(error),
                                  where="Costs.from_json()") from error


_COUNTS = ("macs", "head_macs", "param_bytes", "head_param_bytes", "peak_bytes")
_TIMES = ("backbone_p50_ms", "backbone_p95_ms", "head_p50_ms", "head_p95_ms")

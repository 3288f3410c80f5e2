"""Obey a plan on a table: who leaves where, how right they are, what it costs. N samples, m chosen columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from offramp.errors import PlanError
from offramp.functional.metrics import mean_iou
from offramp.policies.scored import checked
from offramp.table import ExitTable, Unit
from offramp.types import Plan, Setting

__all__ = ["Replay", "replay"]

_CHUNK = 4096  # rows gathered at a time: evidence is a copy, and 1000 classes at 8 exits are large


@dataclass(frozen=True, kw_only=True, eq=False)
class Replay:
    """What a plan does to the samples of a table."""

    table: ExitTable
    exit_index: Tensor
    """(N,) int64 into the plan's exits, the last being the backbone: what the runtime's ``last`` holds."""
    columns: tuple[int, ...]
    """The table's column of each index."""
    latency_batch: int | None
    """The batch at which ``latency_ms`` holds; None where none was measured."""
    notes: tuple[str, ...] = ()
    """What a report must warn of."""
    setting: Setting = "input_dependent"
    """The plan's, which says what its costs mean."""
    budget: Mapping[str, Any] = field(default_factory=dict)
    """Of a plan fitted to a budget: its ``unit`` and ``batch``, and the mean cost a sample that was ``asked``,
    ``planned`` (on the samples that it was fitted on) and ``realised`` on these; else empty."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.table.names[column] for column in self.columns)

    @property
    def column_of(self) -> Tensor:
        """(N,) int64: the table's column that answered each sample."""
        return torch.tensor(self.columns)[self.exit_index]

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples that left at each index."""
        return tuple(torch.bincount(self.exit_index, minlength=len(self.columns)).tolist())

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the samples that left at each index."""
        return tuple(count / max(len(self.table), 1) for count in self.counts)

    @property
    def predictions(self) -> Tensor | None:
        """Classification: the class answered (N,)."""
        return None if self.table.logits is None else self._taken(self.table.logits).argmax(dim=-1)

    @property
    def agrees(self) -> Tensor:
        """Whether, or for a dense network on what share of its pixels, the answer is the backbone's: (N,) float64."""
        if self.table.logits is not None:
            return (self._taken(self.table.logits).argmax(-1) == self.table.logits[:, -1].argmax(-1)).double()
        assert self.table.agreement_confusion is not None
        matrices = self._taken(self.table.agreement_confusion).double()
        return matrices.diagonal(dim1=1, dim2=2).sum(dim=1) / matrices.sum(dim=(1, 2))

    @property
    def correct(self) -> Tensor | None:
        """Classification with labels: whether the answer is right (N,) bool."""
        if self.table.labels is None or self.predictions is None:
            return None
        return self.predictions == self.table.labels

    @property
    def confusion(self) -> Tensor | None:
        """Dense with labels: the confusion matrix of the mixture of exits (K, K) int64."""
        return None if self.table.confusion is None else self._taken(self.table.confusion).sum(dim=0)

    @property
    def agreement_confusion(self) -> Tensor | None:
        """Dense: the same against the backbone's own answers."""
        matrices = self.table.agreement_confusion
        return None if matrices is None else self._taken(matrices).sum(dim=0)

    @property
    def quality(self) -> float | None:
        """Accuracy or mIoU against the labels, a fraction; None without labels."""
        if self.table.task == "dense":
            return None if self.confusion is None else float(mean_iou(self.confusion))
        return None if self.correct is None else float(self.correct.double().mean())

    @property
    def backbone_quality(self) -> float | None:
        """The same of the backbone, had every sample gone to the end."""
        if self.table.confusion is not None:
            return float(mean_iou(self.table.confusion[:, -1].sum(dim=0)))
        if self.table.labels is None or self.table.logits is None:
            return None
        return float((self.table.logits[:, -1].argmax(-1) == self.table.labels).double().mean())

    @property
    def drop(self) -> float | None:
        """Backbone's quality less the plan's (Eq. 2 of the label-free paper, all exits); negative: the exits help."""
        if self.quality is None or self.backbone_quality is None:
            return None
        return self.backbone_quality - self.quality

    @property
    def disagreement(self) -> float:
        """Share of answers that are not the backbone's, or 1 - mIoU against it: the bound of Eq. 3."""
        if self.agreement_confusion is not None:
            return 1 - float(mean_iou(self.agreement_confusion))
        return 1 - float(self.agrees.mean())

    @property
    def macs(self) -> Tensor:
        """(N,) float64, heads counted."""
        return torch.from_numpy(self.table.costs.path(self.columns, "macs"))[self.exit_index]

    @property
    def backbone_macs(self) -> float:
        """Of a sample that goes through the untouched network: no head on the way."""
        return float(self.table.costs.macs[-1])

    @property
    def latency_ms(self) -> Tensor | None:
        """(N,) float64 a sample, at ``latency_batch``; None where none was measured."""
        if self.latency_batch is None:
            return None
        path = self.table.costs.path(self.columns, "latency_ms", batch=self.latency_batch)
        return torch.from_numpy(path)[self.exit_index]

    @property
    def backbone_latency_ms(self) -> float | None:
        """The untouched network's, a sample, under the same timer."""
        if self.latency_batch is None:
            return None
        return self.table.costs.at(batch=self.latency_batch).dense_p50_ms / self.latency_batch

    def cost(self, unit: Unit, *, batch: int = 1, decision_ms: Sequence[float] = ()) -> Tensor:
        """(N,) float64 a sample; of latency_ms with what a policy adds at each exit that a sample passes."""
        path = self.table.costs.path(self.columns, unit, batch=batch)
        if unit == "latency_ms" and len(decision_ms):
            path = path + np.cumsum([*decision_ms, 0.0])
        return torch.from_numpy(path)[self.exit_index]

    def bytes_of(self, unit: Literal["param_bytes", "peak_bytes"]) -> int:
        """What the plan's network holds: ``budgeted`` without what lies deeper than its exit (MESS, Table 1)."""
        return int(self.table.costs.price(self.columns, unit, setting=self.setting))

    @property
    def speaks(self) -> tuple[dict[str, object], ...]:
        """Of each column in order of depth, were it asked for every sample: quality and what it takes to get there."""
        taken = self.table.confusion
        macs = self.table.costs.path(self.columns, "macs")
        late = None if self.latency_batch is None else self.table.costs.path(
            self.columns, "latency_ms", batch=self.latency_batch)
        out: list[dict[str, object]] = []
        for k, column in enumerate(self.columns):
            quality: float | None = None
            if taken is not None:
                quality = float(mean_iou(taken[:, column].sum(dim=0)))
            elif self.table.logits is not None and self.table.labels is not None:
                quality = float((self.table.logits[:, column].argmax(-1) == self.table.labels).double().mean())
            out.append({"name": self.names[k], "quality": quality, "macs": float(macs[k]),
                        "latency_ms": None if late is None else float(late[k])})
        return tuple(out)

    def figures(self) -> dict[str, object]:
        """What a plan keeps as ``predicted``: JSON values."""
        latency = self.latency_ms
        return {
            "samples": len(self.table), "exits": list(self.names), "shares": list(self.shares),
            "macs": float(self.macs.mean()), "backbone_macs": self.backbone_macs,
            "latency_ms": None if latency is None else float(latency.mean()),
            "backbone_latency_ms": self.backbone_latency_ms, "latency_batch": self.latency_batch,
            "quality": self.quality, "backbone_quality": self.backbone_quality, "drop": self.drop,
            "disagreement": self.disagreement, "setting": self.setting,
            "param_bytes": self.bytes_of("param_bytes"), "peak_bytes": self.bytes_of("peak_bytes"),
            **({"each": list(self.speaks)} if self.setting == "anytime" else {}),
        }

    def _taken(self, tensor: Tensor) -> Tensor:
        return tensor[torch.arange(len(self.table)), self.column_of]


def columns_of(table: ExitTable, exits: Sequence[str]) -> tuple[int, ...]:
    """The columns of a plan's exits and the last; PlanError where one is missing or out of order."""
    missing = [name for name in exits if name not in table.names[:-1]]
    if missing:
        raise PlanError(expected=f"exits among {', '.join(table.names[:-1])}", got=", ".join(missing),
                        where="replay()", todo="replay the plan on a table of the network it was made for.")
    columns = (*(table.index(name) for name in exits), len(table.columns) - 1)
    if list(columns) != sorted(set(columns)):
        raise PlanError(expected="exits in order of depth, each once", got=", ".join(exits), where="replay()")
    return columns


def replay(table: ExitTable, plan: Plan, *, batch: int = 1) -> Replay:
    """Let the plan's policy decide on every sample, exit by exit, as the runtime does, with the same arithmetic.

    Notes say when the plan was fitted on this very split, and when its budget is exceeded here.
    ``batch`` picks the measured latency; where that batch was not measured, ``latency_ms`` is None.
    """
    if plan.task != table.task:
        raise PlanError(expected=f"a plan for the task {table.task!r}", got=repr(plan.task), where="replay()")
    columns = columns_of(table, plan.exits)
    notes = []
    ours, theirs = table.fingerprints, plan.fingerprints
    if theirs and theirs.get("model") != ours["model"]:
        raise PlanError(expected=f"a plan for the network {ours['model']}", got=f"one for {theirs.get('model')}",
                        where="replay()", todo="search a plan on this network's own table.")
    if theirs.get("split") == ours["split"]:
        notes.append(f"The plan was fitted on this very split ({table.split}): its figures here are too good.")
    exit_index = torch.full((len(table),), len(plan.exits))
    alive = torch.arange(len(table))
    for k in range(len(plan.exits)):
        if not len(alive):
            break
        leaves = torch.cat([
            checked(plan.policy.decide(k, table.evidence(columns[: k + 1], rows)).cpu(), len(rows), k)
            for rows in torch.split(alive, _CHUNK)
        ])
        exit_index[alive[leaves]] = k
        alive = alive[~leaves]
    measured = any(one.batch == batch for one in table.costs.latency)
    done = Replay(table=table, exit_index=exit_index, columns=columns, latency_batch=batch if measured else None,
                  notes=tuple(notes), setting=plan.setting)
    return _held(done, plan)


def _held(done: Replay, plan: Plan) -> Replay:
    """Held against the plan's budget, where it has one."""
    asked, unit, batch = plan.asked.get("budget"), plan.asked.get("unit"), plan.asked.get("batch", 1)
    if not isinstance(asked, int | float) or unit not in ("macs", "latency_ms") or not len(done.table):
        return done
    if unit == "latency_ms" and all(one.batch != batch for one in done.table.costs.latency):
        note = f"This table has no times at batch {batch}: the budget of {asked:g} {unit} cannot be held against it."
        return replace(done, notes=(*done.notes, note))
    paid = done.cost(unit, batch=batch, decision_ms=plan.predicted.get("decision_ms", ()))
    planned, realised = plan.predicted.get("cost"), float(paid.mean())
    budget = {"unit": unit, "batch": batch, "asked": float(asked), "planned": planned, "realised": realised}
    if realised <= asked * (1 + 1e-9):
        return replace(done, budget=budget)
    error = float(paid.std()) / len(paid) ** 0.5 if len(paid) > 1 else float("nan")
    note = (f"The budget is exceeded here: {realised:.6g} {unit} a sample, {realised / asked - 1:.2%} over the "
            f"{asked:.6g} asked (standard error {error / asked:.2%}"
            + ("" if planned is None else f"; planned {planned:.6g}") + ").")
    return replace(done, notes=(*done.notes, note), budget=budget)

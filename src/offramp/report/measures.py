"""What a report says, as numbers, before anything is drawn. N samples, E exits, K classes, R resamples.

Quality is accuracy or mIoU against the labels where the table has them, else agreement with the backbone; a fraction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.choose.categories import categories as exit_categories
from offramp.choose.categories import curve as exit_curve
from offramp.functional.metrics import iou, mean_iou
from offramp.policies.thresholds import Thresholds
from offramp.table import ExitTable
from offramp.types import Plan

__all__ = [
    "Categories", "HitRate", "Quality", "Reliability", "categories", "hit_rates", "is_end", "quality_of", "reliability",
    "scores_of", "widths_of",
]

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Quality:
    """What adds up over samples, and how a sum becomes a quality."""

    name: str
    """``accuracy``, ``mIoU``, ``agreement`` or ``mIoU against the network``."""
    payload: Floats
    """(N, E, D): D = 1 for accuracy, K * K for mIoU."""

    def of(self, sums: Floats, count: Floats | float) -> Floats:
        """Quality of payloads that add up to (..., D) over ``count`` samples."""
        if self.payload.shape[2] == 1:
            with np.errstate(invalid="ignore", divide="ignore"):
                share: Floats = sums[..., 0] / count
            return share
        classes = round(self.payload.shape[2] ** 0.5)
        value: Floats = mean_iou(torch.from_numpy(sums).reshape(*sums.shape[:-1], classes, classes)).numpy()
        return value

    def mean(self, column: NDArray[np.int64]) -> float:
        """Of all samples, sample n answered by ``column[n]``."""
        return float(self.of(self.payload[np.arange(len(column)), column].sum(axis=0), len(column)))

    def classes(self, column: NDArray[np.int64]) -> tuple[float, ...]:
        """IoU of each class, of samples answered so; empty for accuracy."""
        if self.payload.shape[2] == 1:
            return ()
        count = round(self.payload.shape[2] ** 0.5)
        summed = torch.from_numpy(self.payload[np.arange(len(column)), column].sum(axis=0))
        return tuple(iou(summed.reshape(count, count)).tolist())

    def interval(self, column: NDArray[np.int64], minus: int | None = None, *, repeats: int = 400,
                 seed: int = 0) -> tuple[float, float]:
        """Percentile bootstrap at 95 % over samples; ``minus`` is a column to subtract, on the same resamples."""
        rows = len(column)
        weights = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=repeats).astype(float)
        drawn = self.of(weights @ self.payload[np.arange(rows), column], rows)
        if minus is not None:
            drawn = drawn - self.of(weights @ self.payload[:, minus], rows)
        low, high = np.nanquantile(drawn, [0.025, 0.975])
        return float(low), float(high)


def quality_of(table: ExitTable) -> Quality:
    """Against the labels where there are some, else against the backbone's own answers."""
    if table.task == "dense":
        matrices = table.confusion if table.confusion is not None else table.agreement_confusion
        assert matrices is not None
        name = "mIoU" if table.confusion is not None else "mIoU against the network"
        return Quality(name, matrices.flatten(2).double().numpy())
    assert table.logits is not None
    said = table.logits.argmax(-1)
    truth = said[:, -1] if table.labels is None else table.labels
    name = "agreement" if table.labels is None else "accuracy"
    return Quality(name, (said == truth[:, None]).double().numpy()[..., None])


def widths_of(table: ExitTable) -> tuple[float, ...]:
    """The widths that its columns have, the narrowest first."""
    return tuple(sorted({column.width for column in table.columns}))


def is_end(name: str) -> bool:
    """Whether a column is the end of the network, at whichever width.

    >>> is_end("final"), is_end("final@0.5"), is_end("layer1@0.5")
    (True, True, False)
    """
    return name.partition("@")[0] == "final"


def scores_of(table: ExitTable, plan: Plan) -> Floats:
    """The score that each of the plan's exits gives each sample: (N, exits); top probability for foreign policies."""
    columns = [table.index(name) for name in plan.exits]
    policy = plan.policy if isinstance(plan.policy, Thresholds) else Thresholds(thresholds=(None,) * len(columns))
    if not columns:
        return np.zeros((len(table), 0))
    return np.stack([
        policy.score(k, table.evidence(columns[: k + 1])).double().numpy() for k in range(len(columns))
    ], axis=1)


@dataclass(frozen=True, eq=False)
class HitRate:
    """What a threshold does at one exit, were it the only one. T thresholds, falling."""

    name: str
    thresholds: Floats
    hit: Floats
    """Share of all samples whose score reaches the threshold."""
    quality: Floats
    """Of the exit, among those; NaN where none reach it."""
    backbone: Floats
    """Of the backbone, among the same samples."""
    chosen: float | None
    """The plan's threshold."""


def hit_rates(table: ExitTable, plan: Plan, *, steps: int = 61) -> tuple[HitRate, ...]:
    """One for each of the plan's exits."""
    scores, found, policy = scores_of(table, plan), [], plan.policy
    for k, name in enumerate(plan.exits):
        own: dict[str, Any] = {}
        if isinstance(policy, Thresholds):
            own = {"confidence": policy.confidence}
            if policy.temperatures:
                own["temperature"] = policy.temperatures[k]
            if policy.pixel_thresholds:
                own["pixel_threshold"] = policy.pixel_thresholds[k]
        grid = np.linspace(scores[:, k].min(), scores[:, k].max(), steps).tolist()
        one = exit_curve(table, name, thresholds=grid, **own)
        labelled = one.accuracy is not None and one.backbone_accuracy is not None
        found.append(HitRate(
            name, one.threshold, one.hit_rate, one.accuracy if labelled else one.agreement,  # type: ignore[arg-type]
            one.backbone_accuracy if labelled else np.ones_like(one.agreement),  # type: ignore[arg-type]
            policy.thresholds[k] if isinstance(policy, Thresholds) else None,
        ))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Reliability:
    """Whether an exit is as right as it is sure. B bins of equally many samples."""

    name: str
    confidence: Floats
    """(B,) mean in each bin."""
    accuracy: Floats
    """(B,)"""
    ece: float
    temperature: float = 1.0
    after: "Reliability | None" = None
    """With its temperature; None where none was fitted."""


def reliability(
    table: ExitTable, temperatures: Sequence[float] | None = None, *, bins: int = 12
) -> tuple[Reliability, ...]:
    """Of every column. Classification: each sample's top probability. Dense: each image's mean pixel confidence against
    its share of right pixels (within an image single pixels are not kept).

    ``temperatures``: one a column, or one an early exit (the backbone's is then 1).
    """
    found = []
    for e, name in enumerate(table.names):
        if table.task == "dense":
            matrices = table.confusion if table.confusion is not None else table.agreement_confusion
            assert matrices is not None
            mine = matrices[:, e].double()
            right = (mine.diagonal(dim1=1, dim2=2).sum(1) / mine.sum((1, 2)).clamp(min=1)).numpy()
            sure = Thresholds(thresholds=(None,)).score(0, table.evidence([e])).numpy()
            found.append(_reliability(name, sure, right, bins))
            continue
        assert table.logits is not None
        logits = table.logits[:, e].double()
        truth = table.logits[:, -1].argmax(-1) if table.labels is None else table.labels
        right = (logits.argmax(-1) == truth).double().numpy()
        before = _reliability(name, logits.softmax(-1).amax(-1).numpy(), right, bins)
        temperature = temperatures[e] if temperatures is not None and e < len(temperatures) else 1.0
        if temperature != 1.0:
            sure = (logits / temperature).softmax(-1).amax(-1).numpy()
            after = _reliability(name, sure, right, bins, temperature)
            before = Reliability(name, before.confidence, before.accuracy, before.ece, after=after)
        found.append(before)
    return tuple(found)


def _reliability(name: str, sure: Any, right: Any, bins: int, temperature: float = 1.0) -> Reliability:
    order = np.argsort(sure, kind="stable")
    groups = [part for part in np.array_split(order, bins) if len(part)]
    confidence = np.array([sure[part].mean() for part in groups])
    accuracy = np.array([right[part].mean() for part in groups])
    weight = np.array([len(part) for part in groups]) / len(order)
    return Reliability(name, confidence, accuracy, float((weight * np.abs(confidence - accuracy)).sum()), temperature)


@dataclass(frozen=True)
class Categories:
    """Of the samples that left at one exit: what leaving there did to them (the label-free paper's Table 1)."""

    name: str
    left: int
    both_right: int
    helped: int
    """The exit is right where the network is wrong; dense: more pixels are right than in the network's answer."""
    hurt: int
    same_wrong: int
    """Both wrong with the same class; dense: none, since images with as many right pixels (to a tenth of a point) are
    in ``both_right``."""
    other_wrong: int
    """Both wrong, with two classes."""


def categories(table: ExitTable, plan: Plan, exit_index: NDArray[np.int64]) -> tuple[Categories, ...]:
    """One for each of the plan's exits; empty without labels."""
    if not table.has_labels:
        return ()
    if table.task == "classify":
        shares = [
            (one.exit, (one.hit_rate, one.both, one.exit_helps, one.exit_hurts, one.same_error, one.different_error))
            for one in exit_categories(table, plan)[:-1]
        ]
        return tuple(Categories(name, *(round(share * len(table)) for share in each)) for name, each in shares)
    assert table.confusion is not None
    found = []
    for k, name in enumerate(plan.exits):
        rows, e = np.nonzero(exit_index == k)[0], table.index(name)
        mine, last = (
            (one.diagonal(dim1=1, dim2=2).sum(1).double() / one.sum((1, 2)).clamp(min=1)).numpy()
            for one in (table.confusion[rows, e], table.confusion[rows, -1])
        )
        helped, hurt = int((mine > last + 1e-3).sum()), int((mine < last - 1e-3).sum())
        found.append(Categories(name, len(rows), len(rows) - helped - hurt, helped, hurt, 0, 0))
    return tuple(found)

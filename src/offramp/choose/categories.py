"""Which exits help and which hurt: the label-free paper's Table 1, Eqs. 2-4, and its curves. N samples, E exits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.choose.replay import Replay, replay
from offramp.errors import PlanError
from offramp.functional.metrics import mean_iou
from offramp.policies.thresholds import Thresholds
from offramp.table import ExitTable
from offramp.types import Plan

__all__ = ["Categories", "Curve", "categories", "curve", "score"]


@dataclass(frozen=True, kw_only=True)
class Categories:
    """The samples that one exit lets go, by who is right. B the backbone, C the exit; shares of *all* samples.

    Table 1 prints the exit that alone is right under the name of the case where both are wrong, and Eq. 2 writes the
    name of a shared error where its text means the helpful case; the five fields below are what the text means.
    """

    exit: str
    both: float
    """BC: both are right."""
    exit_hurts: float
    """B not-C: the backbone is right, the exit wrong."""
    exit_helps: float
    """Not-B C: the backbone is wrong, the exit right."""
    same_error: float
    """Both are wrong in the same way."""
    different_error: float
    """Both are wrong, in different ways."""

    @property
    def hit_rate(self) -> float:
        """HR: the share of all samples that leave here."""
        return self.both + self.exit_hurts + self.exit_helps + self.same_error + self.different_error

    @property
    def effect(self) -> float:
        """Eq. 2: the change of accuracy that this exit causes; positive: it helps."""
        return self.exit_helps - self.exit_hurts

    @property
    def agreement(self) -> float:
        """CA: the share of the leavers that get the backbone's answer; NaN without leavers."""
        return (self.both + self.same_error) / self.hit_rate if self.hit_rate else float("nan")

    @property
    def bound(self) -> float:
        """Eq. 3: HR (1 - CA), what the exit can cost at worst."""
        return self.exit_hurts + self.exit_helps + self.different_error


def categories(table: ExitTable, plan: Plan) -> tuple[Categories, ...]:
    """Table 1 for each exit of a plan, among the samples that really leave there, the backbone's row last."""
    if table.labels is None or table.logits is None:
        raise PlanError(expected="a classification table with labels", got=f"task {table.task!r}, labels: no",
                        where="categories()", todo="without labels, curve() gives hit rate and agreement.")
    done = replay(table, plan)
    said, told, truth = done.predictions, table.logits[:, -1].argmax(dim=1), table.labels
    assert said is not None
    rows = []
    for index, name in enumerate(done.names):
        here = done.exit_index == index
        exit_right, backbone_right, same = said == truth, told == truth, said == told

        def share(mask: Tensor, here: Tensor = here) -> float:
            return int((mask & here).sum()) / max(len(table), 1)

        rows.append(Categories(
            exit=name, both=share(exit_right & backbone_right), exit_hurts=share(backbone_right & ~exit_right),
            exit_helps=share(exit_right & ~backbone_right), same_error=share(~exit_right & ~backbone_right & same),
            different_error=share(~exit_right & ~backbone_right & ~same),
        ))
    return tuple(rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """One exit alone before the backbone, at each threshold (T,), falling; for a report's figures."""

    exit: str
    threshold: NDArray[np.float64]
    hit_rate: NDArray[np.float64]
    agreement: NDArray[np.float64]
    """CA: of the leavers with the backbone; for dense the mIoU between them. NaN without leavers."""
    accuracy: NDArray[np.float64] | None
    """Of the leavers against labels (dense: mIoU); None without labels."""
    backbone_accuracy: NDArray[np.float64] | None
    """The backbone's on the same samples."""


def curve(table: ExitTable, exit: str, *, confidence: str = "top", temperature: float = 1.0,
          pixel_threshold: float | None = None, thresholds: Sequence[float] | None = None) -> Curve:
    """Hit rate, agreement and accuracy of one exit against its threshold; at 101 thresholds where none are given."""
    e = table.index(exit)
    dense = table.task == "dense"
    policy = Thresholds(confidence=confidence, thresholds=(None,), temperatures=() if dense else (temperature,),
                        pixel_thresholds=(pixel_threshold,) if dense else ())
    scores = policy.score(0, table.evidence([e])).double()
    grid = torch.tensor(sorted(thresholds, reverse=True) if thresholds is not None
                        else np.linspace(1, 0, 101).tolist(), dtype=torch.float64)
    if table.logits is not None:
        said, told = table.logits[:, e].argmax(dim=1), table.logits[:, -1].argmax(dim=1)
        agrees = (said == told).double()
        quality = None if table.labels is None else ((said == table.labels).double(), (told == table.labels).double())
    else:
        assert table.agreement_confusion is not None
        agrees = table.agreement_confusion[:, e].double()
        quality = None if table.confusion is None else (table.confusion[:, e].double(), table.confusion[:, -1].double())

    def over(values: Tensor) -> NDArray[np.float64]:
        found = []
        for threshold in grid:
            kept = values[scores >= threshold]
            found.append(float(kept.mean() if values.ndim == 1 else mean_iou(kept.sum(dim=0))))
        return np.array(found)

    hits = (scores[None] >= grid[:, None]).double().mean(dim=1).numpy()
    return Curve(exit=exit, threshold=grid.numpy(), hit_rate=hits, agreement=over(agrees),
                 accuracy=None if quality is None else over(quality[0]),
                 backbone_accuracy=None if quality is None else over(quality[1]))


def score(table: ExitTable, plan: Plan | Replay) -> float:
    """K(S) of Eq. 4 in MACs over all samples: what the hits save, less what the misses' heads cost.

    Where C_2 is the backbone's rest behind an exit and C_1 its head, N * backbone_macs - K(S) is the exact cost.
    """
    done = plan if isinstance(plan, Replay) else replay(table, plan)
    costs, reached, total = table.costs, len(table), 0.0
    for count, column in zip(done.counts[:-1], done.columns[:-1], strict=True):
        head, rest = costs.head_macs[column], costs.macs[-1] - costs.macs[column]
        total += count * (rest - head) - (reached - count) * head
        reached -= count
    return total

"""Temperature of each exit, against labels or, without them, the network's own predictions. E exits."""

from dataclasses import dataclass
from typing import Literal

from offramp.errors import DataError, PlanError
from offramp.functional import calibration
from offramp.table import ExitTable

__all__ = ["Calibration", "calibrate"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What temperature scaling does to each column; every tuple has one value a column, the last the backbone's own."""

    against: str
    """"labels", or "backbone" where its predictions stand for the truth: then the last column's are 0 by definition,
    and its temperature is 1."""
    split: str
    temperatures: tuple[float, ...]
    ece_before: tuple[float, ...]
    ece_after: tuple[float, ...]
    brier_before: tuple[float, ...]
    brier_after: tuple[float, ...]
    nll_before: tuple[float, ...]
    nll_after: tuple[float, ...]

    @property
    def early(self) -> tuple[float, ...]:
        """The temperatures that ``search(table, temperatures=...)`` takes: all but the backbone's."""
        return self.temperatures[:-1]


def calibrate(table: ExitTable, *, against: Literal["auto", "labels", "backbone"] = "auto") -> Calibration:
    """Fit one temperature a column by likelihood (the label-free paper, 3.3; Guo et al., arXiv:1706.04599).

    Classification only: a dense table keeps histograms of pixel confidence, which no temperature can be applied to
    afterwards; there the search's pixel thresholds, one an exit, do its work.
    """
    if table.logits is None:
        raise PlanError(expected="a table of logits (task 'classify')", got="task 'dense'", where="calibrate()",
                        todo="search without it: a pixel threshold is tuned for each exit.")
    if not len(table):
        raise DataError(expected="at least one sample", got="an empty table", where="calibrate()")
    if against == "auto":
        against = "labels" if table.has_labels else "backbone"
    if against == "labels" and table.labels is None:
        raise PlanError(expected="a table with labels", got="one without", where="calibrate()",
                        todo="calibrate against='backbone'.")
    target = table.labels if against == "labels" else table.logits[:, -1].argmax(dim=1)
    assert target is not None
    figures: dict[str, list[float]] = {"temperatures": []}
    last = len(table.columns) - 1
    for e in range(last + 1):
        logits = table.logits[:, e]
        held = e == last and against == "backbone"
        temperature = 1.0 if held else calibration.fit_temperature(logits, target)
        figures["temperatures"].append(temperature)
        for name in ("ece", "brier", "nll"):
            measure = getattr(calibration, name)
            for when, scores in (("before", logits), ("after", logits / temperature)):
                value = 0.0 if held else float(measure(scores, target))
                figures.setdefault(f"{name}_{when}", []).append(value)
    return Calibration(against=against, split=table.split,
                       **{name: tuple(values) for name, values in figures.items()})


"""Where the wrong pixels of a dense table lie: by their distance to the nearest semantic border. D distances.

Fig. 3 of SlimSeg (doi:10.1145/3503161.3548191), for each column and for what a wider network mends of a narrower one.
"""

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from offramp.report.draw import draw_distances, legend, style_of_line
from offramp.report.measures import is_end
from offramp.report.svg import percent
from offramp.table import ExitTable
from offramp.types import Plan

if TYPE_CHECKING:
    from offramp.report.page import Report

__all__ = ["NEAR", "Distances", "distances", "ends_of", "mended", "wrong_pixels"]

NEAR = 5
"""Pixels that the paper calls the border's neighbourhood in its Fig. 3."""
_MOST = 12  # lines that can be told apart


@dataclass(frozen=True, eq=False)
class Distances:
    """Wrong pixels of one column, or of the plan's mixture of columns: (D,) each, shares of all labelled pixels."""

    name: str
    errors: NDArray[np.float64]
    """Bin d: those further than d and at most d + 1 pixels from the nearest border; the last: all beyond."""
    pixels: NDArray[np.float64]
    """All labelled pixels there, wrong or right."""

    @property
    def rate(self) -> NDArray[np.float64]:
        """How many of the pixels there are wrong; NaN where there are none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.errors / self.pixels

    def within(self, near: int, beyond: int = 0) -> float:
        """Share of the errors at most ``near`` pixels from a border, and further than ``beyond``; NaN without any."""
        total = float(self.errors.sum())
        return float(self.errors[beyond:near].sum()) / total if total else float("nan")


def ends_of(table: ExitTable) -> tuple[int, ...]:
    """The columns where each width ends, the narrowest first; the last column alone where there is one width."""
    return tuple(e for e, one in enumerate(table.columns) if is_end(one.name))


def distances(table: ExitTable, plan: Plan, column_of: torch.Tensor) -> tuple[Distances, ...]:
    """Of the plan's exits and the ends of all widths, in the table's order, then of the plan itself as ``this plan``.

    Empty where the table was recorded without labels, or without ``boundary_errors``.
    """
    if table.boundary_errors is None or table.boundary_pixels is None:
        return ()
    pixels = table.boundary_pixels.sum(0).double().numpy()
    total = max(float(pixels.sum()), 1.0)
    chosen = sorted({*map(table.index, plan.exits), *ends_of(table)})
    found = [Distances(table.names[e], table.boundary_errors[:, e].sum(0).double().numpy() / total, pixels / total)
             for e in chosen]
    if plan.exits:
        mixed = table.boundary_errors[torch.arange(len(table)), column_of].sum(0).double().numpy()
        found.append(Distances("this plan", mixed / total, pixels / total))
    return tuple(found)


def mended(narrow: Distances, wide: Distances) -> Distances:
    """Errors of the one less those of the other, at each distance; below zero where the wider one adds some."""
    return Distances(f"{narrow.name} → {wide.name}", narrow.errors - wide.errors, narrow.pixels)


def wrong_pixels(report: "Report") -> str:
    """Charts of both, and a table of how much of it is near a border."""
    shown, ends = report.distances[:_MOST], {report.test.names[e] for e in ends_of(report.test)}
    own = [one for one in report.distances if one.name != "this plan"]
    steps = [one for one in own if one.name in ends] if len(ends) > 1 else own
    gains = [mended(one, after) for one, after in zip(steps, steps[1:], strict=False)]
    styles = [style_of_line(k, one.name) for k, one in enumerate(shown)]
    charts = [
        draw_distances("Wrong pixels, of all labelled ones", [(one.errors, one.name) for one in shown], styles,
                       width=720 if gains else 420),
        draw_distances("How often wrong at that distance", [(one.rate, one.name) for one in shown], styles),
    ]
    if gains:
        # a step wears the colour of the column that it starts from
        worn = {one.name: style for one, style in zip(shown, styles, strict=True)}
        charts.append(draw_distances(
            "What the next one mends, of all labelled ones", [(one.errors, one.name) for one in gains],
            [worn.get(one.name, "grey") for one, _ in zip(steps, gains, strict=False)]))
    names = [(one.name, f"var(--{style.split()[0]})") for one, style in zip(shown, styles, strict=True)]
    rows = "".join(_row(one, one.name) for one in report.distances)
    rows += "".join(_row(one, f"mended, {one.name}") for one in gains)
    head = "".join(f'<th class="n">{words}</th>' for words in (
        "pixels", f"within {NEAR} px", f"{NEAR} to 30 px", "beyond 30 px"))
    first = charts.pop(0) if gains else ""
    return (f'{first}<div class="duo">{"".join(charts)}</div>{legend(names)}<div class="scroll"><table>'
            f"<tr><th>wrong pixels</th>{head}</tr>{rows}</table></div>")


def _row(one: Distances, words: str) -> str:
    last = len(one.errors) - 1
    cells = [percent(float(one.errors.sum()), 2), *(percent(one.within(*span)) for span in (
        (NEAR,), (last, NEAR), (last + 1, last)))]
    style = ' class="mine"' if words == "this plan" else ""
    return f"<tr{style}><td>{escape(words)}</td>" + "".join(
        f'<td class="n">{cell}</td>' for cell in cells) + "</tr>"

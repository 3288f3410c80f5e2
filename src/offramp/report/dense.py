"""What only dense reports show: classes by cost goal, who was answered where, and each exit's masks. K classes."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from offramp.functional.distances import count_by_distance, distance_bins
from offramp.report.borders import NEAR
from offramp.report.curve import Curve, Point
from offramp.report.draw import legend
from offramp.report.measures import is_end
from offramp.report.pictures import (
    DenseExample,
    Palette,
    colours,
    confidence_png,
    difference_png,
    image_png,
    label_png,
    picture,
)
from offramp.report.pictures import legend as class_legend
from offramp.report.svg import macs, percent

if TYPE_CHECKING:
    from offramp.report.page import Report

__all__ = ["class_table", "differences", "gallery", "goals", "masks"]

_GOALS = (1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)


def goals(curve: Curve) -> list[tuple[str, Point]]:
    """(words, point): the untouched network, the best plan at each cost goal that one meets, and this plan.

    A goal is so many times less latency than the untouched network's (MESS, arXiv:2106.03527, Fig. 10), or so many
    times fewer MACs where the table has no latency.
    """
    unit, words = ("latency_ms", "× faster") if curve.clocked else ("macs", "× fewer")
    cost = attrgetter(unit)
    whole = cost(curve.backbone)
    found = [("untouched", curve.backbone)]
    for goal in _GOALS:
        within = [one for one in (*curve.plans, curve.chosen) if cost(one) * goal <= whole * (1 + 1e-9)]
        if within:
            best = max(within, key=lambda one: (one.quality, -cost(one)))
            if best is not found[-1][1]:
                found.append((f"{goal:g}{words}", best))
            else:  # the same plan meets the harder goal too
                found[-1] = (f"{goal:g}{words}", best)
    return [*found, ("this plan", curve.chosen)]


def class_table(report: "Report") -> str:
    """IoU of each class at each cost goal, coloured by what it loses or gains against the untouched network."""
    columns = goals(report.curve)
    if report.plan.setting == "anytime":  # what may come by when is what its exits say
        columns = [columns[0], *((one.name, one) for one in report.curve.cut if one.name in report.plan.exits)]
    names = report.test.class_names or tuple(map(str, range(report.test.num_classes)))
    whole = report.curve.backbone

    def cell(value: float, against: float) -> str:
        if not math.isfinite(value):
            return '<td class="n">–</td>'
        moved = value - against if math.isfinite(against) else 0.0
        tint = "red" if moved < 0 else "green"
        share = min(60, round(300 * abs(moved)))
        return (f'<td class="n" style="background:color-mix(in srgb,var(--{tint}) {share}%,transparent)" '
                f'title="{100 * moved:+.1f} points">{100 * value:.1f}</td>')

    def spent(one: Point) -> str:
        return f"{one.latency_ms:.3g} ms" if report.curve.clocked else macs(one.macs)

    head = "".join(f'<th class="n">{escape(words)}<br><small>{spent(one)}</small></th>' for words, one in columns)
    rows = "".join(f"<tr><td>{escape(name)}</td>" + "".join(cell(one.classes[k], whole.classes[k])
                                                            for _, one in columns) + "</tr>"
                   for k, name in enumerate(names))
    mean = "".join(cell(one.quality, whole.quality) for _, one in columns)
    return (f'<div class="scroll"><table class="heat"><tr><th></th>{head}</tr>{rows}'
            f'<tr class="mine"><td>mean</td>{mean}</tr></table></div>')


def gallery(report: "Report", dataset: Any, each: int = 8) -> str:
    """Images by the exit that answered them, each exit's own in order of the split."""
    left, parts = report.realised.exit_index, []
    for k, name in enumerate(report.realised.names):
        rows = (left == k).nonzero().flatten().tolist()
        shown = rows[:: max(1, len(rows) // each)][:each]
        if shown:
            parts.append(f"<h3>{escape(name)} · {len(rows)} of {len(left)}</h3>" + '<div class="strip">' + "".join(
                f'<figure><img alt="" src="{image_png(picture(dataset, i), 128)}">'
                f"<figcaption>#{i} · {escape(name)}</figcaption></figure>" for i in shown) + "</div>")
    return "".join(parts)


def masks(report: "Report", examples: Sequence[DenseExample], palette: Palette = ()) -> str:
    """Each exit's labels, and its confidence without and with Eqs. 8-9 of MESS."""
    painted, names = colours(report.test.num_classes, palette), [*report.plan.exits, "final"]
    parts = [legend(class_legend(report.test.class_names, painted))]
    for one in examples:
        rows = [[f'<figure><img alt="" src="{image_png(one.image)}">'
                 f"<figcaption>{escape(one.name)}</figcaption></figure>"],
                [f'<figure><img alt="" src="{label_png(one.label, painted)}"><figcaption>labels</figcaption></figure>'
                 if one.label is not None else "<figure></figure>"]]
        kinds = [("sure", one.confidences)]
        if one.smoothed is not None:
            kinds.append(("edges smoothed", one.smoothed))
            rows.append(["<figure></figure>"])
        for e, name in enumerate(names):
            style = ' class="left"' if e == one.left_at else ""
            note = "answered here" if e == one.left_at else "not computed" if e > one.left_at else "passed on"
            rows[0].append(f'<figure{style}><img alt="" src="{label_png(one.predictions[e], painted)}">'
                           f"<figcaption>{escape(name)}<br>{note}</figcaption></figure>")
            for row, (words, sure) in zip(rows[1:], kinds, strict=True):
                row.append(f'<figure{style}><img alt="" src="{confidence_png(sure[e])}">'
                           f"<figcaption>{words} {percent(float(sure[e].float().mean()))}</figcaption></figure>")
        columns = f"repeat({len(names) + 1}, minmax(7rem, 1fr))"
        flat = "".join(figure for row in rows for figure in row)
        parts.append(f'<div class="maps" style="grid-template-columns:{columns}">{flat}</div>')
    return "".join(parts)


def differences(report: "Report", examples: Sequence[DenseExample], palette: Palette = ()) -> str:
    """Where each narrower width says another class than the full one: SlimSeg's Fig. 2. Empty where there is one width.

    Coloured by the labels where there are some, and then of labelled pixels alone; else by what the full width says.
    """
    painted, parts = colours(report.test.num_classes, palette), []
    for one in examples:
        ends = _ends(report, one)
        if len(ends) < 2:
            continue
        whole = ends[1.0]
        told = whole if one.label is None else one.label
        figures = [(image_png(one.image, 320), one.name), (label_png(whole, painted, 320), "width 1")]
        if one.label is not None:
            figures.insert(1, (label_png(one.label, painted, 320), "labels"))
        for width in sorted(ends, reverse=True)[1:]:
            apart, every = (ends[width] != whole).cpu(), whole.numel()
            near = None
            if one.label is not None:
                bins = distance_bins(one.label[None].cpu(), report.test.num_classes)
                every, near = int(count_by_distance(bins).sum()), count_by_distance(bins, apart[None])[0]
            count = int(apart.sum() if near is None else near.sum())
            words = f"width {width:g}: {percent(count / max(every, 1))} of pixels differ"
            if near is not None and count:
                words += f", {percent(float(near[:NEAR].sum()) / count, 0)} of them within {NEAR} px of a border"
            figures.append((difference_png(apart, told, painted), words))
        parts.append(f'<div class="maps" style="grid-template-columns:repeat({len(figures)}, minmax(9rem, 1fr))">'
                     + "".join(f'<figure><img alt="" src="{source}"><figcaption>{escape(words)}</figcaption></figure>'
                               for source, words in figures) + "</div>")
    return legend(class_legend(report.test.class_names, painted)) + "".join(parts) if parts else ""


def _ends(report: "Report", one: DenseExample) -> Mapping[float, Tensor]:
    """As given, or as far as the plan's own exits are such ends."""
    columns = [report.test.columns[c] for c in report.realised.columns]
    return one.ends or {column.width: one.predictions[e] for e, column in enumerate(columns)
                        if is_end(column.name)}

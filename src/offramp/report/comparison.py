"""A comparison of policies as a picture: quality against cost, between the limits, beside the controls."""

import math
from html import escape

from offramp.choose.compare import Comparison, Row
from offramp.report.draw import legend, page_of
from offramp.report.svg import Chart, macs, percent

__all__ = ["draw_comparison", "render_comparison"]

_HUES = ("#1f5fbf", "#c8591b", "#2b8a5a", "#6d4fb3", "#c0362c", "#0f8b9d", "#b0892c", "#c2478f", "#5f7d1e", "#7a5c46")
"""One a method, readable on light and dark; from the eleventh on they come again, dashed."""
_PLAIN = """
text { font-family: ui-sans-serif, system-ui, sans-serif; font-size: 12px; fill: #5f6670 }
.grid { stroke: #d8d5ce; stroke-width: 1 } .faint { opacity: .6 } .axis { stroke: #5f6670 }
.line { fill: none; stroke-width: 2.2 } .band { stroke: none; opacity: .13 } .line.dashed { stroke-dasharray: 5 4 }
.line.grey { stroke: #9aa0a8; stroke-width: 1.6 } .band.grey { fill: #9aa0a8 } .dot.ink { fill: #5f6670 }
.dot.hollow { fill: none; stroke: #5f6670 } .rule { stroke: #9aa0a8; stroke-dasharray: 4 4 }
"""
_LEGEND_ROW, _LEGEND_WIDE = 20, 236


def draw_comparison(comparison: Comparison) -> str:
    """An SVG that stands alone: each method's quality at the cost realised, with its bootstrap interval.

    Grey lines are the limits: above, the oracle; below, a die. Hollow dots are single exits for every sample, the full
    dot is the untouched network. A vertical dash marks each budget.
    """
    chart, items = _chart(comparison)
    rows = math.ceil(len(items) / 3)
    height = chart.height + 14 + _LEGEND_ROW * rows
    words = "".join(
        f'<rect x="{60 + _LEGEND_WIDE * (i % 3)}" y="{chart.height + 6 + _LEGEND_ROW * (i // 3)}" width="12" '
        f'height="12" rx="2" fill="{colour}"/><text x="{78 + _LEGEND_WIDE * (i % 3)}" '
        f'y="{chart.height + 16 + _LEGEND_ROW * (i // 3)}">{escape(name)}</text>'
        for i, (name, colour) in enumerate(items))
    inner = str(chart).replace("<svg ", f'<svg width="{chart.width}" height="{chart.height}" ', 1)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {chart.width} {height}" role="img">'
            f"<style>{_PLAIN}{_colours(comparison)}</style>{inner}{words}</svg>")


def render_comparison(comparison: Comparison, *, title: str = "Policies side by side") -> str:
    """One page that fetches nothing: the plot, every row, and what a reader must be warned of."""
    chart, items = _chart(comparison)
    warnings = "".join(f'<div class="warning">{escape(one)}</div>' for one in comparison.notes)
    notes = [f"{row.method}, budget {_cost(comparison, row.budget)}: {note}"
             for row in comparison.rows for note in row.notes]
    told = "".join(f"<li>{escape(one)}</li>" for one in dict.fromkeys(notes))
    head = ("method", "budget", "planned", "realised", comparison.quality, "95 % interval",
            f"less {comparison.reference}", "of the room", "decision")
    body = "".join("<tr>" + "".join(f'<td class="{"n" if k else ""}">{cell}</td>' for k, cell in enumerate(cells))
                   + "</tr>" for cells in (_cells(comparison, row) for row in comparison.rows))
    return page_of(title, (
        f"<p class=\"lede\">Fitted on <b>{escape(comparison.fit_split)}</b>, judged on "
        f"<b>{escape(comparison.split)}</b>, {comparison.samples} samples. Bands and intervals: bootstrap over "
        "samples at 95 %, the same resamples for every method. Grey: above, the oracle, which knows the labels; below, "
        "a die. Hollow: one exit for every sample. Dashed: the budgets.</p>\n"
        f'{warnings}<div class="card">{chart}{legend(items)}</div>\n<div class="scroll"><table><tr>'
        + "".join(f'<th class="{"n" if k else ""}">{escape(one)}</th>' for k, one in enumerate(head))
        + f'</tr>{body}</table></div>\n<ul class="say">{told}</ul>'), style=_colours(comparison))


def _chart(comparison: Comparison) -> tuple[Chart, list[tuple[str, str]]]:
    rows = [row for row in comparison.rows if math.isfinite(row.quality)]
    inner = [row for row in rows if row.kind != "static"] or rows
    values = [value for row in inner for value in (row.quality, *row.interval) if math.isfinite(value)]
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    costs = [*budgets, *(row.realised for row in inner)]
    low, high, least, most = min(values), max(values), min(costs), max(costs)
    pad, room = max((high - low) * 0.06, 0.002), (most - least) * 0.05 or most * 0.05
    digits = 0 if high - low > 0.05 else 1
    chart = Chart(
        (max(0.0, least - room), most + room), (max(0.0, low - pad), min(1.0, high + pad)), height=420,
        x_label="MACs a sample, heads counted" if comparison.unit == "macs" else
        f"ms a sample at batch {comparison.batch}, heads and policy counted",
        y_label=comparison.quality, x_format=macs if comparison.unit == "macs" else "{:.3g}".format,
        y_format=lambda v: percent(v, digits), title=f"{comparison.quality} against cost")
    for budget in budgets:
        chart.rule(x=budget)
    items: list[tuple[str, str]] = []
    for name in dict.fromkeys(row.method for row in rows if row.kind == "limit"):
        found = [row for row in rows if row.method == name]
        chart.line([row.realised for row in found], [row.quality for row in found], "grey")
        items.append((name, "#9aa0a8"))
    for i, name in enumerate(_methods(comparison)):
        found = sorted((row for row in rows if row.method == name), key=lambda row: row.realised)
        if not found:
            continue
        style, xs = f"m{i % len(_HUES)}", [row.realised for row in found]
        chart.band(xs, [row.interval[0] for row in found], [row.interval[1] for row in found], style)
        chart.line(xs, [row.quality for row in found], style + (" dashed" if i >= len(_HUES) else ""))
        for row in found:
            chart.dot(row.realised, row.quality, style, _hint(comparison, row), 3.5)
        items.append((name, _HUES[i % len(_HUES)]))
    for row in rows:
        inside = least - room <= row.realised <= most + room and low - pad <= row.quality <= high + pad
        if row.budget is None and inside:
            chart.dot(row.realised, row.quality, "ink" if row.kind == "untouched" else "hollow",
                      _hint(comparison, row), 5.5 if row.kind == "untouched" else 4.5)
    return chart, items


def _methods(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(row.method for row in comparison.rows if row.kind == "policy"))


def _colours(comparison: Comparison) -> str:
    used = range(min(len(_methods(comparison)), len(_HUES)))
    return "".join(f".line.m{i}{{stroke:{_HUES[i]}}}.dot.m{i},.band.m{i}{{fill:{_HUES[i]}}}" for i in used)


def _hint(comparison: Comparison, row: Row) -> str:
    over = " (over its budget)" if row.exceeds else ""
    return f"{row.method}: {percent(row.quality, 2)} at {_cost(comparison, row.realised)}{over}"


def _cost(comparison: Comparison, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{macs(value)} MACs" if comparison.unit == "macs" else f"{value:.4g} ms"


def _cells(comparison: Comparison, row: Row) -> tuple[str, ...]:
    def between(pair: tuple[float, float]) -> str:
        return f"{100 * pair[0]:.2f} – {100 * pair[1]:.2f}" if math.isfinite(pair[0]) else ""

    apart = f"{100 * row.difference:+.2f} ({between(row.difference_interval)})" if math.isfinite(row.difference) else ""
    time = "" if row.decision_ms is None else f"{1000 * row.decision_ms:.3g} µs"
    time += "" if row.decision_share is None else f" ({percent(row.decision_share, 2)})"
    return (escape(row.method), _cost(comparison, row.budget), _cost(comparison, row.planned),
            _cost(comparison, row.realised) + (" <b>over</b>" if row.exceeds else ""), percent(row.quality, 2),
            between(row.interval), apart, "" if row.room is None else percent(row.room, 0), time)

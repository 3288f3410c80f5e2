"""From numbers to charts: one function a figure, each returns HTML."""

import math
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

from offramp.choose.replay import Replay
from offramp.report.curve import Curve
from offramp.report.measures import Categories, HitRate, Reliability, is_end
from offramp.report.svg import Chart, bars, macs, percent, ticks

__all__ = [
    "draw_categories", "draw_curve", "draw_distances", "draw_hit_rate", "draw_reliability", "draw_shares", "legend",
    "page_of", "style_of_line",
]

_HUES = ("blue", "green", "violet", "red", "grey")


def page_of(title: str, body: str, *, style: str = "") -> str:
    """A whole page of one file: nothing is fetched, and it follows light and dark."""
    sheet = (resources.files("offramp.report") / "style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{sheet}{style}</style></head><body>\n<h1>{escape(title)}</h1>\n{body}"
        "</body></html>\n"
    )


def legend(items: Sequence[tuple[str, str]]) -> str:
    """(words, CSS colour) pairs."""
    return '<div class="legend">' + "".join(
        f'<span><i style="background:{colour}"></i>{escape(words)}</span>' for words, colour in items) + "</div>"


def draw_curve(curve: Curve) -> str:
    """Quality against macs, with the untouched network, this plan, and the static networks."""
    everything = [*curve.plans, curve.chosen, curve.backbone, *curve.cut, *curve.static]
    right = max(one.macs for one in everything) * 1.06
    shown = [one for one in everything if one is curve.backbone or one not in curve.cut] + list(curve.cut)
    values = [v for one in shown for v in (one.quality, one.low, one.high) if math.isfinite(v)]
    low, high = min(values), max(values)
    pad = max((high - low) * 0.08, 0.002)
    digits = 0 if high - low > 0.05 else 1
    chart = Chart(
        (0, right), (max(0.0, low - pad), min(1.0, high + pad)), x_label="MACs a sample, heads counted",
        y_label=curve.quality, x_format=macs, y_format=lambda v: percent(v, digits), height=400,
        title=f"{curve.quality} against cost",
    )
    chart.rule(y=curve.backbone.quality)
    widths = sorted({one.width for one in (*curve.cut, curve.backbone)})
    for width in widths:
        static = [one for one in (*curve.cut, curve.backbone) if one.width == width]
        static = sorted(static + ([] if len(widths) > 1 else [*curve.static]), key=lambda one: one.macs)
        chart.line([one.macs for one in static], [one.quality for one in static], "grey dashed")
    ends = [one for one in (*curve.cut, curve.backbone) if one is curve.backbone or is_end(one.name)]
    if len(ends) > 1:
        chart.line([one.macs for one in ends], [one.quality for one in ends], "grey")
    plans = curve.plans
    xs = [one.macs for one in plans]
    chart.band(xs, [one.low for one in plans], [one.high for one in plans], "blue")
    chart.line(xs, [one.quality for one in plans], "blue")
    for one in plans:
        chart.dot(one.macs, one.quality, "blue",
                  f"tolerance {one.name} points: {percent(one.quality, 2)} at {macs(one.macs)} MACs", 3)
    for one in curve.cut:
        words = f"static, width {one.width:g}, whole" if is_end(one.name) else f"static, cut at {one.name}"
        words = f"with masks, up to {one.name}" if curve.masked else words
        chart.dot(one.macs, one.quality, "hollow", f"{words}: {percent(one.quality, 2)}", 4.5)
        if is_end(one.name):
            chart.text(one.macs, one.quality, f"width {one.width:g}", dx=9, dy=13, style="note soft")
    for one in curve.static:
        chart.dot(one.macs, one.quality, "green", f"{one.name}: {percent(one.quality, 2)} at {macs(one.macs)} MACs", 5)
        chart.text(one.macs, one.quality, one.name, dx=9, dy=4, style="note soft")
    back, mine = curve.backbone, curve.chosen
    chart.dot(back.macs, back.quality, "ink", f"{back.name}: {percent(back.quality, 2)}", 5.5)
    chart.text(back.macs, back.quality, back.name, dx=-2, dy=-12, anchor="end")
    chart.dot(mine.macs, mine.quality, "ringed", f"this plan: {percent(mine.quality, 2)} at {macs(mine.macs)} MACs", 7)
    close = abs(mine.macs - back.macs) < 0.25 * right  # two names, and the axis' own, keep out of each other's way
    dx, dy, anchor = (14, 16, "start") if mine.macs < 0.15 * right else (-12, 20 if close else -8, "end")
    chart.text(mine.macs, mine.quality, "this plan", dx=dx, dy=dy, anchor=anchor)
    items = [("plans at rising tolerance, with 95 % bootstrap interval", "var(--blue)"), ("this plan", "var(--orange)"),
             ("untouched network", "var(--ink)"),
             ("with masks, up to one exit" if curve.masked else
              "static: the network cut at one exit" if len(widths) == 1 else
              "static: one width, whole or cut at one exit", "var(--grey)")]
    if curve.static:
        items.append(("static: other networks", "var(--green)"))
    return str(chart) + legend(items)


def style_of(k: int, exits: int) -> str:
    """Colour class of exit k of ``exits``, the backbone being the last."""
    return "final" if k == exits else f"e{min(5, round(k * min(4, max(exits - 1, 1)) / max(exits - 1, 1)))}"


def draw_shares(runs: Sequence[tuple[str, Replay]]) -> str:
    """Who leaves where, one bar a split."""
    names = runs[0][1].names
    last = len(names) - 1
    rows = [(title, [(share, style_of(k, last), f"{name}: {percent(share)}, {count} samples")
                     for k, (name, share, count) in enumerate(zip(names, one.shares, one.counts, strict=True))])
            for title, one in runs]
    items = [(name if k < last else "to the end", f"var(--{style_of(k, last)})") for k, name in enumerate(names)]
    return bars(rows) + legend(items)


def style_of_line(k: int, name: str) -> str:
    """Colour class of the k-th of several lines: the backbone and the plan always wear their own."""
    if name in ("final", "this plan"):
        return {"final": "ink", "this plan": "orange"}[name]
    return _HUES[k % len(_HUES)] + (" dashed" if k >= len(_HUES) else "")


def draw_distances(title: str, lines: Sequence[tuple[Any, str]], styles: Sequence[str], *, width: int = 420) -> str:
    """Shares against the distance to the nearest border, a step a pixel; the last step, all beyond, is not drawn."""
    drawn = [([float(one) for one in shares[:-1]], name) for shares, name in lines]
    values = [value for shares, _ in drawn for value in shares if math.isfinite(value)] or [0.0]
    low, high = min(0.0, *values), max(0.0, *values) or 0.01
    span = (low - 0.05 * (high - low) if low < 0 else 0.0, 1.05 * high)
    marks = [100 * value for value in ticks(*span)]
    digits = next((k for k in range(4) if all(abs(round(one, k) - one) < 1e-6 for one in marks)), 4)
    chart = Chart((1, len(drawn[0][0])), span, width=width, height=260, x_ticks=6, title=title,
                  x_label="pixels from the nearest border", y_format=lambda v: percent(v, digits))
    if low < 0:
        chart.rule(y=0)
    for (shares, name), style in zip(drawn, styles, strict=True):
        steps = [float(k + 1) for k in range(len(shares))]
        chart.line(steps, shares, style)
        for x, y in zip(steps, shares, strict=True):
            if math.isfinite(y):
                chart.dot(x, y, style.split()[0], f"{name}, {x - 1:g} to {x:g} px: {percent(y, digits + 1)}", 2)
    return f'<div class="card"><h3>{escape(title)}</h3>{chart}</div>'


def draw_reliability(one: Reliability, dense: bool) -> str:
    """Accuracy against confidence, before and after the temperature."""
    values = [*one.confidence, *one.accuracy, *(one.after.confidence if one.after else ())]
    low = max(0.0, math.floor((min(values) - 0.02) * 20) / 20)
    chart = Chart((low, 1.0), (low, 1.0), width=300, height=250, x_ticks=4, y_ticks=4, title=one.name,
                  x_label="mean confidence of an image" if dense else "confidence",
                  y_label="right pixels" if dense else "accuracy",
                  x_format=lambda v: percent(v, 0), y_format=lambda v: percent(v, 0))
    chart.line([low, 1], [low, 1], "grey dashed")
    chart.line(one.confidence.tolist(), one.accuracy.tolist(), "orange")
    for x, y in zip(one.confidence, one.accuracy, strict=True):
        chart.dot(x, y, "orange", f"sure {percent(x)}, right {percent(y)}", 3)
    words = f"ECE {percent(one.ece, 2)}"
    if one.after is not None:
        chart.line(one.after.confidence.tolist(), one.after.accuracy.tolist(), "blue")
        for x, y in zip(one.after.confidence, one.after.accuracy, strict=True):
            chart.dot(x, y, "blue", f"sure {percent(x)}, right {percent(y)}", 3)
        words += f" → {percent(one.after.ece, 2)} at temperature {one.after.temperature:.2f}"
    return f'<div class="card"><h3>{escape(one.name)}</h3>{chart}<p class="say">{words}</p></div>'


def draw_hit_rate(one: HitRate, quality: str) -> str:
    """Share that leaves and how right it is, against the threshold."""
    chart = Chart((min(one.thresholds), max(one.thresholds)), (0.0, 1.0), width=300, height=250, x_ticks=4, y_ticks=5,
                  x_label="threshold", y_label=f"share · {quality}", title=one.name,
                  y_format=lambda v: percent(v, 0))
    if one.chosen is not None:
        chart.rule(x=min(max(one.chosen, min(one.thresholds)), max(one.thresholds)), style="orange")
    chart.line(one.thresholds.tolist(), one.backbone.tolist(), "grey")
    chart.line(one.thresholds.tolist(), one.quality.tolist(), "blue")
    chart.line(one.thresholds.tolist(), one.hit.tolist(), "orange")
    words = "disabled in this plan" if one.chosen is None else f"threshold {one.chosen:.4g}"
    return f'<div class="card"><h3>{escape(one.name)}</h3>{chart}<p class="say">{words}</p></div>'


def draw_categories(rows: Sequence[Categories], dense: bool) -> str:
    """Of the samples that left at each exit: helped, hurt, and neither."""
    lines = []
    for one in rows:
        total = max(one.left, 1)
        pieces = [(one.both_right, "right", "as good" if dense else "both right"), (one.helped, "help", "helped"),
                  (one.hurt, "hurt", "hurt"), (one.same_wrong, "wrong", "both wrong, same class"),
                  (one.other_wrong, "other", "both wrong, two classes")]
        lines.append((f"{one.name} ({one.left})", [(n / total, style, f"{words}: {n}") for n, style, words in pieces]))
    items = [("as good as the network", "var(--final)"), ("better: leaving helped", "var(--green)"),
             ("worse: leaving hurt", "var(--red)")] if dense else [
        ("exit and network right", "var(--final)"), ("only the exit right: leaving helped", "var(--green)"),
        ("only the network right: leaving hurt", "var(--red)"), ("both wrong, same class", "var(--grey)"),
        ("both wrong, two classes", "var(--violet)")]
    return bars(lines) + legend(items)

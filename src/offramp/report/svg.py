"""Small charts as inline SVG that take their colours from the page, so that they follow light and dark."""

import math
from collections.abc import Callable, Sequence
from html import escape

__all__ = ["Chart", "bars", "macs", "percent", "ticks"]


def percent(value: float, digits: int = 1) -> str:
    """A fraction as a percentage.

    >>> percent(0.1234), percent(float("nan"))
    ('12.3 %', '–')
    """
    return "–" if not math.isfinite(value) else f"{100 * value:.{digits}f} %"


def macs(value: float) -> str:
    """Multiply-accumulates in units of 1e3, 1e6 or 1e9, three digits.

    >>> macs(125_700_000), macs(4.1e9), macs(950)
    ('126 M', '4.1 G', '950')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover a range.

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    base: float = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 2.5, 5, 10) if base * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Chart:
    """Axes over a range, and what is drawn on them, in order."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], *, width: int = 720, height: int = 380, x_label: str = "",
        y_label: str = "", x_format: Callable[[float], str] = "{:g}".format,
        y_format: Callable[[float], str] = "{:g}".format, x_ticks: int = 6, y_ticks: int = 5, title: str = "",
    ) -> None:
        self.x, self.y, self.width, self.height = x, y, width, height
        self.left, self.right, self.top, self.bottom = 60, 22, 14, 46
        self.parts: list[str] = [f"<title>{escape(title)}</title>"] if title else []
        for value in ticks(*y, y_ticks):
            at = self.py(value)
            end = width - self.right
            self.parts.append(f'<line class="grid" x1="{self.left}" x2="{end}" y1="{at:.1f}" y2="{at:.1f}"/>'
                              f'<text class="tick" x="{self.left - 8}" y="{at + 4:.1f}" text-anchor="end">'
                              f"{escape(y_format(value))}</text>")
        base = height - self.bottom
        for value in ticks(*x, x_ticks):
            at = self.px(value)
            self.parts.append(f'<line class="grid faint" x1="{at:.1f}" x2="{at:.1f}" y1="{self.top}" y2="{base}"/>'
                              f'<text class="tick" x="{at:.1f}" y="{base + 18}" text-anchor="middle">'
                              f"{escape(x_format(value))}</text>")
        self.parts.append(f'<line class="axis" x1="{self.left}" x2="{width - self.right}" y1="{base}" y2="{base}"/>')
        middle = (self.left + width - self.right) / 2
        self.parts.append(f'<text class="label" x="{middle:.0f}" y="{height - 6}" text-anchor="middle">'
                          f"{escape(x_label)}</text>")
        if y_label:
            half = (self.top + base) / 2
            self.parts.append(f'<text class="label" transform="translate(14 {half:.0f}) rotate(-90)" '
                              f'text-anchor="middle">{escape(y_label)}</text>')

    def px(self, value: float) -> float:
        low, high = self.x
        return self.left + (value - low) / ((high - low) or 1) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        low, high = self.y
        return self.height - self.bottom - (value - low) / ((high - low) or 1) * (self.height - self.top - self.bottom)

    def line(self, xs: Sequence[float], ys: Sequence[float], style: str) -> None:
        """A polyline, broken where a value is not finite."""
        pieces: list[list[str]] = [[]]
        for x, y in zip(xs, ys, strict=True):
            if math.isfinite(x) and math.isfinite(y):
                pieces[-1].append(f"{self.px(x):.1f},{self.py(y):.1f}")
            elif pieces[-1]:
                pieces.append([])
        self.parts += [f'<polyline class="line {style}" points="{" ".join(one)}"/>' for one in pieces if one]

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], style: str) -> None:
        points = [f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in zip(xs, high, strict=True)]
        points += [f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in zip(reversed(xs), reversed(low), strict=True)]
        self.parts.append(f'<polygon class="band {style}" points="{" ".join(points)}"/>')

    def dot(self, x: float, y: float, style: str, hint: str = "", radius: float = 4) -> None:
        self.parts.append(f'<circle class="dot {style}" cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="{radius}">'
                          f"<title>{escape(hint)}</title></circle>")

    def text(self, x: float, y: float, words: str, *, dx: float = 0, dy: float = 0, anchor: str = "start",
             style: str = "note") -> None:
        self.parts.append(f'<text class="{style}" x="{self.px(x) + dx:.1f}" y="{self.py(y) + dy:.1f}" '
                          f'text-anchor="{anchor}">{escape(words)}</text>')

    def rule(self, *, x: float | None = None, y: float | None = None, style: str = "") -> None:
        """A dashed line across the chart."""
        if x is not None:
            at, base = self.px(x), self.height - self.bottom
            self.parts.append(f'<line class="rule {style}" x1="{at:.1f}" x2="{at:.1f}" y1="{self.top}" y2="{base}"/>')
        if y is not None:
            at, end = self.py(y), self.width - self.right
            self.parts.append(f'<line class="rule {style}" x1="{self.left}" x2="{end}" y1="{at:.1f}" y2="{at:.1f}"/>')

    def __str__(self) -> str:
        return (f'<svg viewBox="0 0 {self.width} {self.height}" role="img" preserveAspectRatio="xMidYMid meet">'
                f'{"".join(self.parts)}</svg>')


def bars(
    rows: Sequence[tuple[str, Sequence[tuple[float, str, str]]]], *, width: int = 720, name_width: int = 190
) -> str:
    """Stacked horizontal bars: each row has a name and (share, style, hint) pieces; shares are of the full width."""
    parts, height, full = [], 30, width - name_width - 12
    for i, (name, pieces) in enumerate(rows):
        y, end = i * height, name_width - 12
        parts.append(f'<text class="barname" x="{end}" y="{y + 19}" text-anchor="end">{escape(name)}</text>')
        x = float(name_width)
        for share, style, hint in pieces:
            wide = max(share, 0.0) * full
            parts.append(f'<rect class="bar {style}" x="{x:.1f}" y="{y + 4}" width="{wide:.1f}" height="22">'
                         f"<title>{escape(hint)}</title></rect>")
            if wide > 44:
                parts.append(f'<text class="inbar {style}" x="{x + wide / 2:.1f}" y="{y + 19.5}" text-anchor="middle">'
                             f"{escape(percent(share))}</text>")
            x += wide
    return f'<svg viewBox="0 0 {width} {len(rows) * height + 2}" role="img">{"".join(parts)}</svg>'

"""The picture of a comparison: whole by itself, every row in its place, nothing fetched."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import offramp
from choose.schedulers import Geometric
from offramp.choose.compare import Comparison, compare
from offramp.policies.thresholds import Thresholds
from offramp.report.comparison import draw_comparison, render_comparison
from offramp.types import Plan
from report.tables import classify, dense

SVG = "{http://www.w3.org/2000/svg}"


def found(make: object = classify, names: int = 2, **more: object) -> Comparison:
    table = make(n=120, split="test")  # type: ignore[operator]
    return compare(table, {f"<m{i}>": Geometric() for i in range(names)}, ["0.1x", "0.6x", "0.8x"], timed=False,
                   **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [classify, dense])
def test_every_point_stands_where_it_belongs(make: object) -> None:
    one = found(make)
    root = ElementTree.fromstring(draw_comparison(one))
    assert root.tag == SVG + "svg" and root.find(SVG + "style") is not None
    dots = [dot for dot in root.iter(SVG + "circle") if dot.get("class") == "dot m0"]
    rows = [row for row in one.of("<m0>") if row.quality == row.quality]
    assert len(dots) == len(rows) == 2, "0.1x has no plan and so no point"
    (x0, y0), (x1, y1) = ((float(dot.get("cx") or 0), float(dot.get("cy") or 0)) for dot in dots)
    (ink,) = (dot for dot in root.iter(SVG + "circle") if dot.get("class") == "dot ink")
    # three points on both axes: equal ratios of distances mean a true scale
    untouched = one.rows[0]
    drawn = [(x0, y0), (x1, y1), (float(ink.get("cx") or 0), float(ink.get("cy") or 0))]
    meant = [(row.realised, row.quality) for row in (*rows, untouched)]
    for axis, near in ((0, 0.02), (1, 0.05)):
        (a, b, c), (u, v, w) = ([point[axis] for point in points] for points in (drawn, meant))
        assert (c - a) / (b - a) == pytest.approx((w - u) / (v - u), rel=near)
    assert {text.text for text in root.iter(SVG + "text")} >= {"<m0>", "<m1>", "oracle", "no information"}


def test_the_page_is_whole_and_says_what_was_over_budget() -> None:
    one = found()
    page = render_comparison(one)
    assert page.startswith("<!doctype html>") and not re.findall(r"(?:src|href)=|@import|url\(", page)
    assert page.count("<tr>") == len(one.rows) + 1 and "&lt;m0&gt;" in page and "<m0>" not in page
    assert "one half of the samples" in page and "cost of the first exit" in page
    never = Plan(exits=(), policy=Thresholds(thresholds=()), task="classify")
    over = compare(classify(n=120), {"never": lambda budget: never}, ["0.5x"], fit=classify(n=120, seed=1))
    assert "<b>over</b>" in render_comparison(over) and "over its budget" in draw_comparison(over)


def test_more_methods_than_colours_and_none_at_all() -> None:
    many = ElementTree.fromstring(draw_comparison(found(names=12, limits=False)))
    lines = [str(line.get("class")) for line in many.iter(SVG + "polyline")]
    assert len(lines) == 12 and lines.count("line m0") == 1 and lines.count("line m0 dashed") == 1
    ElementTree.fromstring(draw_comparison(found(names=0)))


def test_the_comparison_draws_itself(tmp_path: Path) -> None:
    one = offramp.compare(classify(n=60), {"m": Geometric()}, ["0.6x"], timed=False)
    assert one.svg() == draw_comparison(one) and one.html() == render_comparison(one)

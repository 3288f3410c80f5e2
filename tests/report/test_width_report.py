"""Reports of networks of several widths: errors by their distance to borders, differences, what a step costs."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from offramp.errors import OfframpError
from offramp.policies.thresholds import Thresholds
from offramp.report import DenseExample, Report, gather, render
from offramp.report.borders import mended
from offramp.report.curve import Curve, Point
from offramp.report.dense import differences
from offramp.report.draw import draw_curve, draw_distances
from offramp.report.svg import macs, percent
from offramp.types import Plan
from report import tables
from report.test_page import Balanced

EXITS = ("layer1.2@0.5", "final@0.5", "layer1.2")
CLASSES = 4


def reported(make: Any = tables.dense, exits: tuple[str, ...] = EXITS, setting: Any = "input_dependent",
             **more: Any) -> Report:
    fitted, test = (tables.wide(make, split=s, seed=k, **more) for s, k in (("calibration", 1), ("test", 2)))
    plan = Plan(exits=exits, policy=Thresholds(thresholds=(0.8,) * len(exits)), task=test.task, setting=setting,
                fingerprints=fitted.fingerprints, split="calibration")
    return gather(fitted_on=fitted, test=test, plan=plan, tolerances=(0.05,))


def example(labels: torch.Tensor | None = None, **more: Any) -> DenseExample:
    said = torch.randint(0, CLASSES, (4, 8, 12))
    return DenseExample(name="<one>", image=torch.zeros(3, 8, 12, dtype=torch.uint8), label=labels, predictions=said,
                        confidences=torch.rand(said.shape), left_at=0, **more)


@pytest.mark.parametrize("make", [tables.dense, tables.classify])
@pytest.mark.parametrize(("exits", "setting"), [
    (EXITS, "input_dependent"), (EXITS, "anytime"), (("final@0.5",), "budgeted"), (("layer1.2",), "input_dependent")])
def test_every_setting_makes_a_whole_page(make: Any, exits: tuple[str, ...], setting: str) -> None:
    report = reported(make, exits, setting)
    page = render(report, dense=[replace(example(), ends=dict.fromkeys((0.5, 1.0), torch.ones(8, 12).long()))]
                  if make is tables.dense else [])
    parser = Balanced()
    parser.feed(page)
    assert parser.stack == []
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)
        assert "nan" not in re.sub(r"<title>.*?</title>", "", svg)
    assert "0.5, 1; the untouched network is the full one" in page and "Grey are static networks" in page
    assert ("From width to width" in page) == (len(exits) == 3)
    for words in ("How far from a border", "Width against width"):
        assert (words in page) == (make is tables.dense), words


def test_one_width_reads_as_before() -> None:
    fitted, test = tables.dense(40, split="calibration", seed=1), tables.dense(40, seed=2)
    plan = Plan(exits=("layer1.2",), policy=Thresholds(thresholds=(0.8,)), task="dense")
    page = render(gather(fitted_on=fitted, test=test, plan=plan, tolerances=(0.05,)), dense=[
        replace(example(), predictions=torch.zeros(2, 8, 12).long(), confidences=torch.zeros(2, 8, 12))])
    assert "The dashed grey line joins static networks" in page and "cut at one exit<" in page
    told = re.sub(r"<[^>]*>", "", re.sub(r"<style>.*?</style>", "", page, flags=re.S))
    assert "width" not in told and "How far from a border" not in told


def test_errors_by_distance_by_brute_force() -> None:
    report = reported()
    test, column = report.test, report.realised.column_of.tolist()
    assert test.boundary_errors is not None and test.boundary_pixels is not None and test.confusion is not None
    assert [one.name for one in report.distances] == [*EXITS, "final", "this plan"]
    labelled = sum(test.boundary_pixels.flatten().tolist())
    for one in report.distances:
        for d in range(31):
            rows = [test.boundary_errors[n, column[n] if one.name == "this plan" else test.index(one.name), d].item()
                    for n in range(40)]
            assert one.errors[d] == pytest.approx(sum(rows) / labelled)
            assert one.rate[d] == pytest.approx(sum(rows) / sum(test.boundary_pixels[:, d].tolist()))
        assert one.within(5) == pytest.approx(sum(one.errors[:5]) / sum(one.errors))
        assert one.within(5) + one.within(30, 5) + one.within(31, 30) == pytest.approx(1)
    narrow, wide = (next(one for one in report.distances if one.name == name) for name in ("final@0.5", "final"))
    wrong = test.confusion.sum((0, 2, 3)) - test.confusion.diagonal(dim1=2, dim2=3).sum((0, 2))
    gained = float(wrong[1] - wrong[3]) / labelled
    assert mended(narrow, wide).errors.sum() == pytest.approx(gained) and gained > 0
    page = render(report)
    cells = re.search(r"<td>mended, final@0.5 → final</td>(.*?)</tr>", page)
    assert cells and percent(gained, 2) in cells[1] and percent(mended(narrow, wide).within(5)) in cells[1]


def test_without_errors_there_is_nothing_to_mend() -> None:
    right = replace(tables.wide(tables.dense, seed=2), boundary_errors=torch.zeros(40, 4, 31))
    report = gather(fitted_on=tables.wide(tables.dense, split="calibration", seed=1), test=right,
                    plan=Plan(exits=(), policy=Thresholds(thresholds=()), task="dense"), tolerances=(0.05,))
    assert [one.name for one in report.distances] == ["final@0.5", "final"] and np.isnan(report.distances[0].within(5))
    assert "<td>final</td>" in render(report) and reported(labels=False).distances == ()


def test_lines_stand_where_their_shares_are() -> None:
    shares = [0.01, float("nan"), 0.005, -0.0025, 9.0]
    root = ElementTree.fromstring(re.findall(r"<svg.*</svg>", draw_distances("t", [(shares, "a")], ["blue"]))[0])
    dots = [(float(one.get("cx") or 0), float(one.get("cy") or 0)) for one in root.iter("circle")]
    assert len(dots) == 3, "nothing for what is unknown, nor for all that is beyond"
    assert (dots[1][0] - dots[0][0]) / (dots[2][0] - dots[1][0]) == pytest.approx(2, rel=1e-2)
    assert (dots[1][1] - dots[0][1]) / (dots[2][1] - dots[1][1]) == pytest.approx(0.01 / 0.015, rel=1e-2)
    words = [one.text for one in root.iter("text")]
    assert {"0.0 %", "0.5 %", "1.0 %"} <= set(words), "as many digits as steps need"


def test_a_wider_network_starts_again() -> None:
    report = reported()
    cost, page = report.test.costs, render(report)
    (m0, m1, m2, m3), (h0, _, h2, _) = cost.macs, cost.head_macs
    ways = [m0 + h0, m1 + h0, m1 + h0 + m2 + h2, m1 + h0 + m3 + h2]
    alone = [m0 + h0, m1, m2 + h2, m3]
    rows = re.findall(r"<tr>(.*?)</tr>", page.split("From width to width")[1].split("</table>")[0], re.S)[1:]
    assert len(rows) == 4
    for k, row in enumerate(rows):
        cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
        assert cells == [(*EXITS, "final")[k], "0.5" if k < 2 else "1", percent(report.realised.shares[k]),
                         macs(alone[k]), macs(ways[k]), macs(ways[k] - alone[k])]


def test_the_curve_has_a_line_for_each_width_and_one_of_their_ends() -> None:
    report = reported()
    assert [one.width for one in report.curve.cut] == [0.5, 0.5, 1.0]
    root = ElementTree.fromstring(re.findall(r"<svg.*</svg>", draw_curve(report.curve))[0])
    lines = [(one.get("class"), (one.get("points") or "").split()) for one in root.iter("polyline")]
    dashed = [points for style, points in lines if style == "line grey dashed"]
    (ends,) = (points for style, points in lines if style == "line grey")
    assert [len(points) for points in dashed] == [2, 2] and [points[-1] for points in dashed] == ends
    hollow = [f"{one.get('cx')},{one.get('cy')}" for one in root.iter("circle") if one.get("class") == "dot hollow"]
    assert hollow == [dashed[0][0], dashed[0][1], dashed[1][0]]
    words = [one.text for one in root.iter("text")]
    titles = [one.text or "" for one in root.iter("title")]
    assert "width 0.5" in words and any("static, width 0.5, whole" in one for one in titles)


def shown(html: str) -> list[tuple[Any, str]]:
    found = re.findall(r'base64,([^"]+)"><figcaption>(.*?)</figcaption>', html)
    return [(np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))), words) for one, words in found]


def test_differences_are_black_where_widths_agree() -> None:
    report, draw = reported(), torch.Generator().manual_seed(0)
    labels, whole, narrow = (torch.randint(0, CLASSES, (8, 12), generator=draw) for _ in range(3))
    labels[:, :4] = 255
    palette = ((1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12))
    one = example(labels, ends={0.5: narrow, 1.0: whole})
    *_, (full, name), (apart, words) = shown(differences(report, [one], palette))
    assert name == "width 1" and full.tolist() == [[list(palette[k]) for k in row] for row in whole.tolist()]
    count = 0
    for y in range(8):
        for x in range(12):
            differ = narrow[y, x] != whole[y, x] and labels[y, x] != 255
            count += int(differ)
            assert apart[y, x].tolist() == (list(palette[labels[y, x]]) if differ else [0, 0, 0])
    assert words == f"width 0.5: {percent(count / 64)} of pixels differ, 100 % of them within 5 px of a border"
    *_, (apart, words) = shown(differences(report, [replace(one, label=None)], palette))
    differ = (narrow != whole).numpy()
    assert words == f"width 0.5: {percent(differ.mean())} of pixels differ"
    assert (apart.sum(2) > 0).tolist() == differ.tolist()
    assert apart[differ].tolist() == [list(palette[k]) for k in whole.numpy()[differ]]


def test_ends_are_the_plans_own_where_no_others_are_given() -> None:
    report, one = reported(), example()
    (whole, _), (apart, words) = shown(differences(report, [one], ((9, 9, 9),) * 4))[1:]
    differ = (one.predictions[1] != one.predictions[3]).numpy()
    assert words.startswith("width 0.5") and ((apart.sum(2) > 0) == differ).all() and differ.any()
    assert differences(reported(exits=("layer1.2@0.5",)), [one]) == ""
    for ends in ({0.5: one.predictions[0]}, {0.5: one.predictions[0], 1.0: torch.zeros(3, 3)}):
        with pytest.raises(OfframpError, match="width 1.0"):
            replace(one, ends=ends)


@pytest.mark.parametrize("cost", [1e6, 12e6, 30e6, 100e6, 150e6, 190e6, 198e6, 220e6])
def test_names_on_the_curve_keep_out_of_each_others_way(cost: float) -> None:
    curve = Curve(quality="mIoU", plans=(), cut=(), chosen=Point(name="", macs=cost, quality=0.386),
                  backbone=Point(name="untouched network", macs=198e6, quality=0.386))
    (svg,), found = re.findall(r"<svg.*</svg>", draw_curve(curve)), {}
    for one in ElementTree.fromstring(svg).iter("text"):
        if one.text in ("this plan", "untouched network"):
            x, wide = float(one.get("x") or 0), 7.0 * len(one.text)
            found[one.text] = (x - wide if one.get("text-anchor") == "end" else x, float(one.get("y") or 0))
    (x, y), (u, v) = found["this plan"], found["untouched network"]
    assert x > 60, "not over the axis"
    assert abs(y - v) > 12 or x + 63 < u or x > u + 119

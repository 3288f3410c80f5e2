"""Dense reports: classes by cost goal, each image's exit, masks with edges smoothed, and what the plan is."""

import base64
import io
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from offramp.choose.search import search
from offramp.policies.thresholds import Thresholds
from offramp.report import DenseExample, gather, render
from offramp.report.curve import Curve, Point
from offramp.report.dense import goals, masks
from offramp.types import Plan
from report import tables

FITTED, TEST = tables.dense(40, split="calibration", seed=1), tables.dense(40, seed=2)


def page(setting: str, **changes: Any) -> tuple[Any, str]:
    exits = ("layer1.2",) if setting == "budgeted" else ("layer1.2", "layer3.0")
    plan = Plan(exits=exits, policy=Thresholds(thresholds=(0.0 if setting == "budgeted" else 0.8,) * len(exits)),
                task="dense", setting=setting, fingerprints=FITTED.fingerprints, split="calibration",
                asked={"setting": setting, "tolerance": "exact", "max_exits": 1},
                certificate={"configurations": 123456, "proven": True, "gap": 0.0})
    report = gather(fitted_on=FITTED, test=TEST, plan=replace(plan, **changes), tolerances=(0.05,))
    said = torch.randint(0, 4, (len(exits) + 1, 8, 12))
    image, sure, smooth = torch.zeros(3, 8, 12, dtype=torch.uint8), *(torch.full(said.shape, v) for v in (0.25, 0.75))
    example = DenseExample(name="first", image=image, label=said[0], predictions=said, confidences=sure,
                           smoothed=smooth, left_at=0)
    return report, render(report, dataset=[torch.zeros(3, 8, 8, dtype=torch.uint8)] * len(TEST), dense=[example])


@pytest.mark.parametrize("setting", ["budgeted", "anytime", "input_dependent"])
def test_every_setting_makes_a_page_that_says_what_it_is(setting: str) -> None:
    _, html = page(setting)
    for words in ("Class by class, goal by goal", "Exit by exit", "edges smoothed 75.0 %", "sure 25.0 %",
                  "configurations 123,456", "proven True"):
        assert words in html, words
    assert ("Which exit each image took" in html) == (setting == "input_dependent")
    assert f"<code>{setting.replace('_', '-')}</code>" in html
    assert ("Ever better answers" in html) == (setting == "anytime")
    assert ("Threshold by threshold" in html) == (setting == "input_dependent")


def test_iou_of_each_class_by_brute_force() -> None:
    report, html = page("input_dependent")
    column = report.realised.column_of
    for point, chosen in ((report.curve.chosen, column), (report.curve.backbone, torch.full_like(column, 3))):
        matrix = TEST.confusion[torch.arange(40), chosen].sum(0).tolist()
        wanted = []
        for k in range(4):
            right = matrix[k][k]
            union = sum(matrix[k]) + sum(row[k] for row in matrix) - right
            wanted.append(right / union)
        assert point.classes == pytest.approx(wanted)
        assert point.quality == pytest.approx(sum(wanted) / 4)
    assert f">{100 * report.curve.chosen.classes[0]:.1f}</td>" in html


def test_anytime_shows_what_each_exit_says_of_each_class() -> None:
    report, html = page("anytime")
    heat = re.search(r'<table class="heat">.*?</table>', html, re.S)
    assert heat and all(f"{name}<br>" in heat[0] for name in report.plan.exits) and "this plan" not in heat[0]
    each = {one["name"]: one for one in report.realised.speaks}
    assert f'{100 * each["layer1.2"]["quality"]:.2f} %' in html


def test_a_goal_takes_the_best_plan_that_meets_it() -> None:
    def point(name: str, macs: float, quality: float) -> Point:
        return Point(name=name, macs=macs, quality=quality)

    curve = Curve(quality="mIoU", plans=(point("c", 24, 0.5), point("b", 45, 0.6), point("a", 48, 0.7)),
                  chosen=point("mine", 90, 0.9), backbone=point("whole", 100, 0.8), cut=())
    assert [(words, one.name) for words, one in goals(curve)] == [
        ("untouched", "whole"), ("2× fewer", "a"), ("4× fewer", "c"), ("this plan", "mine")]


def test_goals_are_of_latency_where_it_is_known() -> None:
    def point(name: str, macs: float, quality: float, ms: float | None) -> Point:
        return Point(name=name, macs=macs, quality=quality, latency_ms=ms)

    curve = Curve(quality="mIoU", plans=(point("slow", 24, 0.7, 9.0), point("quick", 90, 0.6, 5.0)),
                  chosen=point("mine", 95, 0.65, 8.0), backbone=point("whole", 100, 0.8, 10.0), cut=())
    assert [(words, one.name) for words, one in goals(curve)] == [
        ("untouched", "whole"), ("1.25× faster", "mine"), ("2× faster", "quick"), ("this plan", "mine")]
    unclocked = replace(curve, chosen=point("mine", 95, 0.65, None))
    assert [one.name for _, one in goals(unclocked)] == ["whole", "slow", "mine"]


def test_latencies_of_the_curve_are_the_tables() -> None:
    report, html = page("input_dependent")
    late = TEST.costs.path([0, 2, 3], "latency_ms")
    assert report.curve.chosen.latency_ms == pytest.approx(float(late[report.realised.exit_index.numpy()].mean()))
    assert report.curve.backbone.latency_ms == 4.0 and "so many times faster" in html
    assert [one.latency_ms for one in report.curve.cut] == pytest.approx([1.05, 2.05, 3.05])
    assert f"this plan<br><small>{report.curve.chosen.latency_ms:.3g} ms<" in html


def test_masks_wear_the_datas_colours() -> None:
    report, _ = page("input_dependent")
    said = torch.arange(4)[None, None].expand(3, 2, 4)
    example = DenseExample(name="one", image=torch.zeros(3, 2, 4, dtype=torch.uint8), label=said[0], predictions=said,
                           confidences=torch.rand(said.shape), left_at=0)
    html = masks(report, [example], ((1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12)))
    assert "#010203" in html and "#0a0b0c" in html
    (pixels,) = {one for one in re.findall(r'base64,([^"]+)"><figcaption>labels', html)}
    with Image.open(io.BytesIO(base64.b64decode(pixels))) as picture:
        assert picture.getpixel((2, 1)) == (7, 8, 9)


def test_the_gallery_puts_each_image_under_its_exit() -> None:
    report, html = page("input_dependent")
    part = html.split("Which exit each image took")[1].split("</section>")[0]
    for k, name in enumerate(report.realised.names):
        rows = (report.realised.exit_index == k).nonzero().flatten().tolist()
        found = [int(i) for i in re.findall(rf"<figcaption>#(\d+) · {re.escape(name)}<", part)]
        assert set(found) <= set(rows) and len(found) == min(8, len(rows))


def test_an_exhaustive_plan_gets_a_curve_of_its_own_kind() -> None:
    plan = search(FITTED, max_drop=0.05, setting="budgeted")
    report = gather(fitted_on=FITTED, test=TEST, plan=plan, tolerances=(0.0, 0.05, 0.5))
    prices = {float(TEST.costs.path([e])[0]) for e in range(4)}
    assert {one.macs for one in report.curve.plans} <= prices and len(report.curve.plans) >= 2

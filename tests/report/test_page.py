"""The page: one file, nothing fetched, all parts there, and a warning where figures are too good."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import torch

from offramp.choose.search import search
from offramp.errors import OfframpError
from offramp.report import DenseExample, Point, gather, render, write
from offramp.report.pictures import colours, confidence_png, image_png, label_png
from offramp.report.svg import Chart, bars, ticks
from report import tables

BENCH = {
    "rows": [{"network": name, "batch": 1, "p50_ms": ms, "p95_ms": ms * 1.2, "throughput_per_s": 1000 / ms}
             for name, ms in (("untouched", 4.0), ("adaptive", 2.0), ("static: cut at layer2.1", 2.1))],
    "setting": {"device": "cpu", "threads": 1}, "note": "",
}
TOLERANCES = (0.0, 0.01, 0.05)


@pytest.fixture(scope="module")
def classify_page() -> str:
    fitted, test = tables.classify(split="calibration", seed=1), tables.classify(seed=2)
    report = gather(fitted_on=fitted, test=test, plan=search(fitted, max_drop=0.01), bench=BENCH, tolerances=TOLERANCES,
                    static=[Point(name="small <net>", macs=5e7, quality=0.7)],
                    about={"model": "package.net:make", "command": "offramp report run --static 'a<b>'"})
    return render(report, dataset=[torch.randint(0, 255, (3, 8, 8), dtype=torch.uint8)] * len(test), title="a page")


@pytest.fixture(scope="module")
def dense_page() -> str:
    fitted, test = tables.dense(40, split="calibration", seed=1), tables.dense(40, seed=2)
    plan = search(fitted, max_drop=0.03, steps=20)
    report = gather(fitted_on=fitted, test=test, plan=plan, tolerances=(0.03,))
    said = torch.randint(0, 4, (len(plan.exits) + 1, 8, 12))
    return render(report, dense=[DenseExample(
        name="first", image=torch.zeros(3, 8, 12, dtype=torch.uint8), label=said[0], predictions=said,
        confidences=torch.rand(said.shape), left_at=0)])


class Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        if tag not in ("meta", "img", "br"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        pass

    def handle_endtag(self, tag) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()


@pytest.mark.parametrize("page", ["classify_page", "dense_page"])
def test_page_is_whole_and_fetches_nothing(page: str, request: pytest.FixtureRequest) -> None:
    html = request.getfixturevalue(page)
    parser = Balanced()
    parser.feed(html)
    assert parser.stack == []
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html) + re.findall(r"url\(([^)]*)\)", html)
    assert all(one.startswith("data:image/png;base64,") for one in addresses)
    assert "<script" not in html and "@import" not in html
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        ElementTree.fromstring(svg)  # well-formed, or this raises
        assert "nan" not in re.sub(r"<title>.*?</title>", "", svg)


def test_classification_says_all_it_should(classify_page: str) -> None:
    for words in ("Accuracy against cost", "Who leaves where", "Planned and realised", "On the clock", "untouched",
                  "Threshold by threshold", "ECE", "Where leaving helped", "Left first", "Stayed to the end",
                  "calibration:1", "test:2", "fingerprint of the network", "95 % interval"):
        assert words in classify_page, words
    assert "2.00×" in classify_page, "the clock beside the untouched network"


def test_what_a_user_typed_is_escaped(classify_page: str) -> None:
    assert "a&lt;b&gt;" in classify_page and "small &lt;net&gt;" in classify_page
    assert "a<b>" not in classify_page and "small <net>" not in classify_page


def test_dense_shows_maps(dense_page: str) -> None:
    assert "Exit by exit" in dense_page and "answered here" in dense_page and "not computed" in dense_page
    assert 'class="left"' in dense_page


def test_fitted_on_the_split_reported_on_is_said() -> None:
    table = tables.classify(split="calibration", seed=1)
    report = gather(fitted_on=table, test=table, plan=search(table, max_drop=0.01), tolerances=(0.01,))
    assert any("fitted on this very split" in one for one in report.warnings)
    assert 'class="warning"' in render(report)
    honest = gather(fitted_on=table, test=tables.classify(seed=2), plan=report.plan, tolerances=(0.01,))
    assert 'class="warning"' not in render(honest)


def test_a_plan_without_exits_and_a_table_without_labels_still_make_a_page() -> None:
    fitted, test = (tables.classify(split=s, seed=k, labels=False) for s, k in (("calibration", 1), ("test", 2)))
    plan = search(fitted, max_drop=0.0, max_exits=0)
    assert plan.exits == ()
    found = gather(fitted_on=fitted, test=test, plan=plan, tolerances=(0.0,))
    html = render(found, dataset=[torch.rand(3, 8, 8)] * 300)
    assert "agreement" in html and "no labels" in html


def test_write_is_whole_or_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write(tmp_path / "deep" / "report.html", "<!doctype html>one")
    with pytest.raises(OfframpError):
        write(page, "not a page")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OfframpError, match="half-written"):
        write(page, "<!doctype html>two")
    assert page.read_text() == "<!doctype html>one"
    assert [one.name for one in page.parent.iterdir()] == ["report.html"]


def test_pictures_keep_what_they_show() -> None:
    import base64
    import io

    import numpy as np
    from PIL import Image

    def pixels(uri: str):
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))

    labels = torch.tensor([[0, 1], [2, 255]])
    assert (pixels(label_png(labels, colours(3)))[0, 0] == colours(3)[0]).all()
    assert (pixels(label_png(labels, colours(3)))[1, 1] == 128).all(), "void is grey"
    image = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    assert (pixels(image_png(image)) == image.permute(1, 2, 0).numpy()).all()
    dark, light = pixels(confidence_png(torch.tensor([[0.0, 1.0]])))[0]
    assert dark.sum() < light.sum()
    assert len({tuple(one) for one in colours(30).tolist()}) == 30


def test_charts_break_lines_where_a_value_is_missing() -> None:
    chart = Chart((0, 1), (0, 1))
    chart.line([0, 0.5, 1], [0.1, float("nan"), 0.2], "blue")
    assert str(chart).count("<polyline") == 2
    assert ticks(3.0, 3.0) == [3.0]
    assert 'width="532.0"' in bars([("all", [(1.0, "e0", "")])], width=720, name_width=176)

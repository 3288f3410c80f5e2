"""Walks drawn: colours that everyone can tell, exits at their times, files of a bounded size, a page in a browser."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from offramp._extras import MissingExtra
from offramp.errors import OfframpError
from offramp.report import Walk, gif, mp4, png, render_walks, write
from offramp.report.canvas import Canvas, fit, width_of, wrapped
from offramp.report.moving import frames, gif_bytes, slow_down
from offramp.report.pictures import colours, confidence_pixels
from offramp.report.stills import MASK, draw_sheet, mask_legend, mask_pixels, told
from report.test_walk import walk

# Machado, Oliveira and Fernandes 2009, table 1, severity 1: how linear RGB looks without one kind of cone
BLIND = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "none": np.eye(3).tolist(), "grey": [[0.2126, 0.7152, 0.0722]] * 3,
}


@pytest.mark.parametrize("eyes", BLIND)
def test_the_four_colours_are_apart_for_all_eyes(eyes: str) -> None:
    rgb = np.array([*MASK.values()]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ np.array(BLIND[eyes]).T
    seen = np.clip(linear, 0, 1)
    seen = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = rgb2lab(seen[None])[0]
    for one, other in itertools.combinations(range(4), 2):
        assert deltaE_ciede2000(lab[one], lab[other]) > 15, (eyes, [*MASK][one], [*MASK][other])


def test_confidence_grows_lighter_evenly() -> None:
    lightness = rgb2lab(confidence_pixels(torch.linspace(0, 1, 33)[None]))[0, :, 0]
    steps = np.diff(lightness)
    assert steps.min() > 0.75 * steps.mean() and steps.max() < 1.4 * steps.mean(), steps
    assert (confidence_pixels(torch.tensor([[float("nan")]])) == confidence_pixels(torch.zeros(1, 1))).all()


def test_a_masks_pixels_have_the_colours_of_what_they_are() -> None:
    pixels = mask_pixels(walk(), 0)
    names = {colour: name for name, colour in MASK.items()} | {(128, 128, 128): "void"}
    found = [[names[tuple(pixel)] for pixel in row] for row in pixels.tolist()]
    assert found == [["active, right", "settled, right", "settled, wrong", "void"],
                     ["active, wrong", "active, right", "active, wrong", "settled, right"]]
    assert [words for words, _ in mask_legend(walk(), 0)] == ["28.6 %", "14.3 %", "28.6 %", "28.6 %"]
    bare = walk(label=None)
    shown = set(map(tuple, mask_pixels(bare, 1).reshape(-1, 3).tolist()))
    assert shown == {MASK["settled, right"], MASK["active, right"]}
    assert [words for words, _ in mask_legend(bare, 1)] == ["settled 75.0 %", "active 25.0 %"]


def test_what_is_told_of_an_exit() -> None:
    assert told(walk(), 1) == ["2.5 ms, 25 MACs", "mIoU 55.6 %", "right 71.4 %", "ran at 50.0 %", "goes on at 25.0 %"]
    assert told(walk(masked=False, label=None), 2) == ["4 ms, 40 MACs"]


def test_exits_come_at_their_times_to_ten_milliseconds() -> None:
    elapsed, slow = [1.234, 7.77, 9.0, 31.4159], 100.0
    made = frames(elapsed, slow)
    assert all(one.duration_ms % 10 == 0 and one.duration_ms >= 20 for one in made)
    starts = np.cumsum([0, *(one.duration_ms for one in made)])
    for k, ms in enumerate(elapsed):
        first = next(i for i, one in enumerate(made) if one.spoken == k + 1)
        assert abs(starts[first] - ms * slow) <= 5 and made[first].at_ms == ms
    assert all(abs(start - one.at_ms * slow) <= 5 for start, one in zip(starts, made, strict=False)), "on time"
    assert max(one.duration_ms for one in made[:-1]) < 120, "it moves"


def test_a_pace_that_no_eye_follows_is_refused() -> None:
    for elapsed, slow in (([1.0, 1.1], 100.0), ([1.0, 1000.0], 1000.0), ([0.1], 1.0)):
        with pytest.raises(OfframpError, match="choose another factor"):
            frames(elapsed, slow)
    for elapsed in ([11.3, 24.9, 97.0], [0.02, 0.021], [4000.0, 60_000.0]):
        assert frames(elapsed, slow_down(elapsed))
    with pytest.raises(OfframpError, match="rise"):
        slow_down([1.0, 1.0])


def big(**changes: object) -> Walk:
    """Large enough that the pictures are not all frame."""
    small = walk(**changes)  # type: ignore[arg-type]

    def grown(one: torch.Tensor | None) -> torch.Tensor | None:
        return None if one is None else one.repeat_interleave(16, -1).repeat_interleave(16, -2)

    steps = tuple(replace(one, predictions=grown(one.predictions), confidence=grown(one.confidence),
                          active=grown(one.active)) for one in small.steps)
    noise = torch.randint(0, 255, (3, 32, 64), generator=torch.Generator().manual_seed(0)).byte()
    return replace(small, steps=steps, label=grown(small.label), image=noise)


def test_a_gif_shows_each_exit_when_it_spoke_in_its_own_colours(tmp_path: Path) -> None:
    one = big()
    file = gif(one, tmp_path / "walk.gif", slow=100)
    wanted = frames([step.elapsed_ms for step in one.steps], 100)
    painted = colours(3)
    with Image.open(file) as made:
        assert made.info["loop"] == 0
        shown = {}
        for i in range(made.n_frames):
            made.seek(i)
            assert made.info["duration"] == wanted[i].duration_ms
            shown[wanted[i].spoken] = np.asarray(made.convert("RGB"))
        assert made.n_frames == len(wanted)
    says = {k: view[112:322, 456:876] for k, view in shown.items()}  # the second of four panels, 420 x 210
    assert (says[0] == [240, 239, 235]).all(), "nothing is said yet"
    for k, step in enumerate(one.steps):
        middle = says[k + 1][105 // 2::105, 105 // 2::105]
        assert (middle == painted[step.predictions[8::16, 8::16].long().numpy()]).all()
        mask = shown[k + 1][356:566, 456:876][105 // 2::105, 105 // 2::105]
        assert (mask == mask_pixels(one, k)[8::16, 8::16]).all()


def test_a_gif_keeps_to_its_size() -> None:
    whole = gif_bytes(big())
    small = gif_bytes(big(), most_bytes=len(whole) // 2)
    assert len(small) <= len(whole) // 2 and len(whole) < 3_000_000


def test_without_times_there_is_no_moving_picture_but_a_still_one(tmp_path: Path) -> None:
    bare = replace(walk(), steps=tuple(replace(step, elapsed_ms=None) for step in walk().steps))
    with pytest.raises(OfframpError, match="timed="):
        gif(bare, tmp_path / "walk.gif")
    assert Image.open(png(bare, tmp_path / "walk.png")).size == draw_sheet(bare).size
    assert "image/gif" not in render_walks([bare]) and "image/gif" in render_walks([walk()])


def test_a_video_lasts_as_long_as_the_gif(tmp_path: Path) -> None:
    try:
        file = mp4(big(), tmp_path / "walk.mp4")
    except MissingExtra as error:
        assert "offramp[video]" in str(error)
        pytest.skip("no imageio_ffmpeg here")
    import imageio_ffmpeg

    count, seconds = imageio_ffmpeg.count_frames_and_secs(str(file))
    elapsed = [step.elapsed_ms for step in big().steps]
    total = sum(one.duration_ms for one in frames(elapsed, slow_down(elapsed)))
    assert seconds == pytest.approx(total / 1000, abs=0.05) and count == pytest.approx(total / 20, abs=1)


@pytest.mark.parametrize("changes", [{}, {"masked": False}, {"masked": False, "label": None}, {"label": None}], ids=str)
@pytest.mark.parametrize("tall", [False, True])
def test_nothing_is_drawn_over_anything_else_or_beyond_the_edge(changes: dict[str, object], tall: bool,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    one = big(**changes, name="a long name " * 30)
    if tall:
        one = replace(one, image=one.image.mT, label=None if one.label is None else one.label.T, steps=tuple(
            replace(step, predictions=step.predictions.T, confidence=step.confidence.T,
                    active=None if step.active is None else step.active.T) for step in one.steps))
    drawn: dict[int, list[tuple[float, float, float, float]]] = {}
    text, panel = Canvas.text, Canvas.panel

    def put(canvas: Canvas, x: float, y: float, width: float, height: float) -> None:
        assert x >= 0 and y >= 0 and x + width <= canvas.image.width and y + height <= canvas.image.height
        boxes = drawn.setdefault(id(canvas), [])
        for left, top, right, bottom in boxes:
            assert x >= right or x + width <= left or y >= bottom or y + height <= top, (x, y, width, height)
        boxes.append((x, y, x + width, y + height))

    def text_(canvas: Canvas, at, words, size=13, *args, **named):  # type: ignore[no-untyped-def]
        wide = text(canvas, at, words, size, *args, **named)
        most = named.get("most")
        put(canvas, at[0], at[1], wide if most is None else min(wide, most), size)
        return wide

    def panel_(canvas: Canvas, at, pixels, size, **named):  # type: ignore[no-untyped-def]
        put(canvas, *at, *size)
        panel(canvas, at, pixels, size, **named)

    kept: list[Canvas] = []  # an id stays one canvas's while it lives
    first = Canvas.__init__
    monkeypatch.setattr(Canvas, "__init__", lambda self, *args: (kept.append(self), first(self, *args))[1])
    monkeypatch.setattr(Canvas, "text", text_)
    monkeypatch.setattr(Canvas, "panel", panel_)
    draw_sheet(one)
    gif_bytes(one)
    assert len(drawn) > 10


def test_words_and_panels_keep_to_their_room() -> None:
    assert fit((100, 50), (40, 40)) == (40, 20) and fit((1, 4000), (40, 40)) == (1, 40)
    rows = wrapped([("word", (0, 0, 0))] * 9, 200)
    assert len(rows) > 1 and all(x + 19 + width_of("word", 13) <= 200 for row in rows for x, _, _ in row)
    canvas = Canvas((300, 20))
    assert canvas.text((0, 0), "a name that is much too long", most=60) <= 60
    assert canvas.text((0, 0), "Straße–×é 日本") > 0


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    program = next((found for one in ("chromium", "google-chrome", "chrome") if (found := shutil.which(one))), None)
    page = write(tmp_path / "walks.html", render_walks([big(name="<b>first"), big(masked=False, name="second")]))
    asked: list[str] = []
    with sync_api.sync_playwright() as play:
        try:
            browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except sync_api.Error:
            pytest.skip("no browser here")
        for width in (1100, 420):
            view = browser.new_page(viewport={"width": width, "height": 900})
            view.on("request", lambda request: asked.append(request.url))
            view.goto(page.as_uri())
            assert view.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            assert view.locator("h3").all_inner_texts() == ["<b>first", "second"]
            assert view.locator(".maps").nth(0).locator("figure img").count() == 2 + 3 * 3
            assert view.locator(".maps").nth(1).locator("figure img").count() == 2 + 2 * 3
        browser.close()
    assert all(url.startswith(("file:", "data:")) for url in asked), "nothing is fetched"

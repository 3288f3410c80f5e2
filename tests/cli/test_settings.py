"""The run, bench and report verbs on a dense network, in each of the three settings."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.nn import functional as F

from cli.test_cli import call, one_thread, refused  # noqa: F401
from offramp.choose.plan import load_plan, save_plan
from offramp.cli.folder import Run
from offramp.cli.predict import _write_pictures, images_of
from offramp.data.camvid import CAMVID_PALETTE
from offramp.models import load_model
from offramp.policies.thresholds import Thresholds
from offramp.report.pictures import colours

SETTINGS = ("budgeted", "anytime", "input_dependent")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    safetensors.torch.save_file(load_model("offramp:scenes_dense").state_dict(), folder / "net.safetensors")
    call("adapt", f"offramp:scenes_dense?weights={folder / 'net.safetensors'}", "--data", "scenes?n=8&size=32x48",
         "--out", folder / "run", "--exits", 2, "--epochs", 1, "--batch-size", 4, "--json")
    return folder / "run"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name, size in (("a.png", (48, 32)), ("b.jpg", (80, 60)), ("deep/a.png", (31, 47))):
        pixels = np.random.default_rng(len(name)).integers(0, 255, (3, 4, 3), np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / name)
    return folder


def set_plan(run: Path, setting: str) -> tuple[str, ...]:
    exits = tuple(json.loads((run / "run.json").read_text())["exits"])
    exits = exits[:1] if setting == "budgeted" else exits
    policy = Thresholds(thresholds=(0.0,) * len(exits))
    save_plan(replace(load_plan(run / "plan.json"), exits=exits, policy=policy, setting=setting), run / "plan.json")
    return exits


@pytest.mark.parametrize("setting", SETTINGS)
def test_labels_are_what_the_network_says_at_each_images_own_size(setting: str, run: Path, photos: Path,
                                                                  tmp_path: Path) -> None:
    exits = set_plan(run, setting)
    out = tmp_path / "masks"
    done = json.loads(call("run", photos, "--model", run, "--out", out, "--json").stdout)
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert [row["file"] for row in rows] == ["a.png", "b.jpg", "deep/a.png"]
    answered = "final" if setting == "anytime" else exits[0]
    assert {row["exit"] for row in rows} == {answered} and done["exits"][answered] == 3
    opened = Run.open(run)
    net, data = opened.net, images_of([photos], opened)
    for i, row in enumerate(rows):
        with Image.open(photos / row["file"]) as photo:
            pixels, size = np.array(photo.convert("RGB")), photo.size
        with Image.open(out / row["labels"]) as labels, Image.open(out / row["overlay"]) as overlay:
            said = np.asarray(labels)
            assert labels.mode == "P" and labels.size == overlay.size == size
            assert tuple(labels.getpalette()[:33]) == tuple(v for colour in CAMVID_PALETTE for v in colour)
            painted = np.asarray(labels.convert("RGB")).astype(float)
            assert np.abs(np.asarray(overlay).astype(float) - (painted + pixels) / 2).mean() < 8, "half of each"
        with torch.no_grad():
            logits = net(data[i][None])[-1 if setting == "anytime" else 0]
        wanted = F.interpolate(logits, size=size[::-1], mode="bilinear")[0].argmax(0)
        assert (said == wanted.numpy()).mean() > 0.999
        assert float(row["confidence"]) == pytest.approx(float(logits.softmax(1).amax(1).mean()), abs=1e-4)
    assert {one.name for one in out.iterdir()} == {"a.png", "b.png", "deep__a.png", "overlays", "predictions.csv"}


def test_a_deadline_takes_the_best_answer_by_then(run: Path, photos: Path, tmp_path: Path) -> None:
    exits = set_plan(run, "anytime")
    said = call("run", photos, "--model", run, "--out", tmp_path / "a.json", "--deadline-ms", 0, "--no-overlays")
    assert "; 1 of 1 deadlines missed" in " ".join(said.output.split())
    found = json.loads((tmp_path / "a.json").read_text())["predictions"]
    assert {one["exit"] for one in found} == {exits[0]} and all(one["ms"] > 0 and one["late"] for one in found)
    assert not (tmp_path / "overlays").exists()
    call("run", photos, "--model", run, "--out", tmp_path / "b.json", "--deadline-ms", 60000, "--batch-size", 1)
    found = json.loads((tmp_path / "b.json").read_text())["predictions"]
    assert {one["exit"] for one in found} == {"final"} and not any(one["late"] for one in found)


def test_an_image_that_breaks_on_the_way_is_named_and_the_others_are_answered(run: Path, photos: Path,
                                                                               tmp_path: Path) -> None:
    set_plan(run, "budgeted")
    whole = (photos / "a.png").read_bytes()
    (photos / "a.png").write_bytes(whole[: len(whole) * 3 // 4])
    said = refused("run", photos, "--model", run, "--out", tmp_path / "o")
    assert "a.png" in said and "deep" not in said and "others are answered" in said
    rows = list(csv.DictReader((tmp_path / "o" / "predictions.csv").open()))
    assert [row["file"] for row in rows] == ["b.jpg", "deep/a.png"]
    assert not (tmp_path / "o" / "a.png").exists()


def test_labels_never_replace_images_or_each_other(run: Path, photos: Path, tmp_path: Path) -> None:
    set_plan(run, "budgeted")
    before = (photos / "a.png").read_bytes()
    assert "replace the images" in refused("run", photos, "--model", run, "--out", photos)
    assert (photos / "a.png").read_bytes() == before
    (photos / "a.png").rename(photos / "b.png")
    call("run", photos, "--model", run, "--out", tmp_path / "o", "--no-overlays")
    assert {one.name for one in (tmp_path / "o").iterdir()} == {"b-png.png", "b-jpg.png", "deep__a.png",
                                                                "predictions.csv"}


def test_labels_of_a_huge_image_are_enlarged_themselves(run: Path, photos: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    set_plan(run, "budgeted")
    monkeypatch.setattr("offramp.cli.predict._LARGEST", 0)
    call("run", photos / "a.png", photos / "b.jpg", "--model", run, "--out", tmp_path / "o")
    with Image.open(next((tmp_path / "o").glob("*b.png"))) as labels:
        assert labels.size == (80, 60)
    x = Run.open(run).source.prepare(torch.from_numpy(np.array(Image.open(photos / "a.png"))).permute(2, 0, 1), None)[0]
    with torch.no_grad():
        wanted = Run.open(run).net(x[None])[0].argmax(1)[0]
    with Image.open(next((tmp_path / "o").glob("*a.png"))) as labels:
        assert (np.asarray(labels) == wanted.numpy()).all()


def test_labels_of_many_classes_are_numbers_of_16_bits_and_overlays_wear_their_colours(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (6, 5), (100, 100, 100)).save(photo)
    wanted = torch.arange(30).view(5, 6) * 10
    logits = F.one_hot(wanted, 300).permute(2, 0, 1).float()
    painted = colours(300)
    _write_pictures(logits, photo, tmp_path, "many", painted, True)
    with Image.open(tmp_path / "many.png") as labels, Image.open(tmp_path / "overlays" / "many.jpg") as overlay:
        assert (np.asarray(labels) == wanted.numpy()).all()
        mixed = painted[wanted.numpy()].astype(float).mean((0, 1)) / 2 + 50
        assert np.abs(np.asarray(overlay).astype(float).mean((0, 1)) - mixed).max() < 4


@pytest.mark.parametrize("setting", SETTINGS)
def test_bench_times_what_the_setting_asks_for(setting: str, run: Path) -> None:
    exits = set_plan(run, setting)
    page = json.loads(call("bench", run, "--batches", "1", "--repeats", 3, "--budget", 1, "--json").stdout)
    names = [row["network"] for row in page["rows"]]
    table = Run.open(run).table("test")
    columns = [table.index(name) for name in (*exits, "final")]
    mine = "adaptive" if setting == "input_dependent" else setting
    assert names[:2] == ["untouched", mine]
    assert [n for n in names if n.startswith("anytime: first")] == (
        [f"anytime: first {name}" for name in exits] if setting == "anytime" else [])
    assert any(n.startswith("static") for n in names) == (setting != "budgeted") == ("static" in page["macs"])
    assert {n.split(":")[0] for n in names} == set(page["macs"]), "what was timed has its MACs, and nothing else"
    wanted = table.costs.path(columns)
    assert page["macs"][mine] == {"budgeted": wanted[0], "anytime": wanted[-1], "input_dependent": wanted[0]}[setting]


def test_the_report_of_a_dense_run_shows_masks_and_smoothed_confidence(run: Path, tmp_path: Path) -> None:
    set_plan(run, "anytime")
    html = Path(call("report", run, "--out", tmp_path / "r.html").stdout.strip()).read_text()
    for words in ("edges smoothed", "Class by class", "Ever better answers", *(
            f"#{bytes(colour).hex()}" for colour in CAMVID_PALETTE)):
        assert words in html, words

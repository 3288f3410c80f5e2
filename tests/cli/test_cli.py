"""The command line from end to end on tiny scenes, and one clear sentence with exit code 2 for each bad input."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from typer.testing import CliRunner

from offramp.choose.plan import load_plan, save_plan
from offramp.cli import app
from offramp.models import load_model
from offramp.policies.thresholds import Thresholds
from offramp.table import ExitTable
from offramp.types import Plan

DATA = "scenes?n=8&size=32x48&task=classify"
FLAGS = {
    "sites": {"--data", "--shape", "--within", "--widths", "--keep"},
    "train": {"--data", "--out", "--exits", "--heads", "--recipe", "--epochs", "--lr", "--seed", "--train-split",
              "--within", "--widths", "--keep", "--boundary", "--mask", "--threshold", "--mask-from", "--device",
              "--precision", "--again"},
    "record": {"--split", "--batches", "--batch-size", "--confidences", "--device", "--again"},
    "search": {"--max-drop", "--minimise", "--tolerance", "--confidence", "--max-exits", "--against",
               "--latency-batch", "--setting", "--min-miou", "--max-macs", "--max-latency-ms", "--max-bytes",
               "--time-limit", "--front", "--by", "--budget", "--guarantee"},
    "adapt": {"--data", "--out", "--max-drop", "--exits", "--heads", "--recipe", "--epochs", "--lr", "--seed",
              "--train-split", "--within", "--widths", "--keep", "--boundary", "--mask", "--threshold", "--mask-from",
              "--minimise", "--tolerance",
              "--confidence", "--max-exits", "--against", "--latency-batch", "--batches", "--batch-size",
              "--confidences", "--device", "--precision", "--again"},
    "compare": {"--by", "--budgets", "--unit", "--latency-batch"},
    "run": {"--model", "--out", "--batch-size", "--engine", "--device", "--deadline-ms", "--overlays", "--walks"},
    "bench": {"--batches", "--repeats", "--engine", "--dtype", "--budget", "--device"},
    "report": {"--out", "--split", "--static"},
    "narrow": {"--width", "--out"},
    "demo": {"--out", "--seed", "--quick", "--again"},
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def call(*args: object, code: int = 0):
    done = CliRunner().invoke(app, [str(one) for one in args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


def refused(*args: object) -> str:
    """The one sentence on stderr; nothing on stdout and no traceback."""
    done = call(*args, code=2)
    assert done.stdout == "" and "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    safetensors.torch.save_file(load_model("offramp:scenes_classify").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def run(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    done = call("adapt", f"offramp:scenes_classify?weights={weights}", "--data", DATA, "--out", out, "--exits", 2,
                "--epochs", 1, "--batch-size", 4, "--json")
    said = json.loads(done.stdout)
    assert said["run"] == str(out) and said["predicted"]["samples"] == 4
    return out


def always_first(run: Path) -> Plan:
    plan, first = load_plan(run / "plan.json"), json.loads((run / "run.json").read_text())["exits"][0]
    return Plan(exits=(first,), policy=Thresholds(thresholds=(0.0,)), task="classify", predicted=plan.predicted,
                asked=plan.asked, fingerprints=plan.fingerprints, split=plan.split)


def test_flags_are_held() -> None:
    import typer.main

    group = typer.main.get_command(app)
    found = {name: {flag for p in command.params for flag in p.opts if flag.startswith("--")} - {"--json", "--debug"}
             for name, command in group.commands.items()}
    assert found == FLAGS, "a flag is a promise: change this only with the changelog"
    assert all({"--json", "--debug"} <= {f for p in c.params for f in p.opts} for c in group.commands.values())


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_help_teaches_by_an_example(name: str) -> None:
    assert f"offramp {name}" in call(name, "--help").stdout


def test_sites_for_a_person_and_for_a_machine() -> None:
    assert "layer1.0" in call("sites", "offramp:cifar_resnet20", "--shape", "3x32x32").stdout
    found = json.loads(call("sites", "offramp:cifar_resnet20", "--shape", "3x32x32", "--json").stdout)["sites"]
    assert {"name", "macs_before", "shrinkable"} <= set(found[0])


def test_policies_side_by_side(run: Path) -> None:
    said = json.loads(call("compare", run, "--by", "threshold,stopping", "--budgets", "1.2x,2x", "--json").stdout)
    test = ExitTable.load(run / "tables" / "test.json")
    own = (test.logits[:, -1].argmax(-1) == test.labels).double().mean().item()
    found = {row["method"]: row for row in said["rows"] if row["budget"] is None}
    assert found["untouched network"]["quality"] == pytest.approx(own)
    assert {row["method"] for row in said["rows"]} >= {"threshold", "stopping", "oracle"}
    assert "<svg" in (run / "comparison.html").read_text() and said["page"].endswith("comparison.html")
    assert "'nonsense'" in refused("compare", run, "--by", "nonsense")
    assert "--budgets" in refused("compare", run, "--budgets", "much")
    assert "--unit" in refused("compare", run, "--unit", "joules")


def test_the_whole_road(run: Path, tmp_path: Path) -> None:
    assert {"run.json", "heads.safetensors", "plan.json", "tables", "train"} <= {one.name for one in run.iterdir()}
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["format"] == "offramp.run" and manifest["version"] == 1 and len(manifest["exits"]) == 2
    heads = (run / "heads.safetensors").stat().st_mtime_ns, (run / "tables/test.json").stat().st_mtime_ns

    save_plan(always_first(run), run / "plan.json")
    bench = json.loads(call("bench", run, "--batches", "1,4", "--repeats", 3, "--budget", 1, "--json").stdout)
    assert [row["batch"] for row in bench["rows"]] == [1, 1, 1, 4, 4, 4]
    assert {row["network"].split(":")[0] for row in bench["rows"]} == {"untouched", "adaptive", "static"}
    page = call("report", run, "--out", tmp_path / "r.html").stdout.strip()
    html = Path(page).read_text()
    assert html.startswith("<!doctype html>") and "On the clock" in html and "offramp adapt" not in page
    assert json.loads((run / "bench.json").read_text())["rows"] == bench["rows"]

    again = call("record", run, "--json")
    assert json.loads(again.stdout)["tables"] == {"calibration": 4, "test": 4}
    assert heads == ((run / "heads.safetensors").stat().st_mtime_ns, (run / "tables/test.json").stat().st_mtime_ns), \
        "what is there already is not made again"


def test_train_goes_on_or_says_why_not(run: Path, weights: Path) -> None:
    model = f"offramp:scenes_classify?weights={weights}"
    before = (run / "heads.safetensors").read_bytes()
    call("train", model, "--data", DATA, "--out", run, "--exits", 2, "--epochs", 1)
    assert (run / "heads.safetensors").read_bytes() == before
    said = refused("train", model, "--data", DATA, "--out", run, "--exits", 2, "--epochs", 2)
    assert "--recipe" in said and "--again" in said
    assert (run / "heads.safetensors").read_bytes() == before


def photos_in(folder: Path) -> Path:
    """Three of them, 0.png to 2.png."""
    folder.mkdir()
    for k in range(3):
        pixels = np.random.default_rng(k).integers(0, 255, (32, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


def test_run_predicts_images_as_the_table_says(run: Path, tmp_path: Path) -> None:
    save_plan(always_first(run), run / "plan.json")
    images = photos_in(tmp_path / "images")
    call("run", images, "--model", run, "--out", tmp_path / "answers")
    rows = list(csv.DictReader((tmp_path / "answers" / "predictions.csv").open()))
    assert [row["file"] for row in rows] == ["0.png", "1.png", "2.png"]
    exit_name = json.loads((run / "run.json").read_text())["exits"][0]
    assert {row["exit"] for row in rows} == {exit_name}
    done = json.loads(call("run", images, "--model", run, "--out", tmp_path / "a.json", "--json").stdout)
    assert done["exits"][exit_name] == 3
    found = json.loads((tmp_path / "a.json").read_text())["predictions"]
    assert [str(one["class"]) for one in found] == [row["class"] for row in rows]


@pytest.mark.parametrize(("args", "words"), [
    (("sites", "offramp:cifar_resnet57"), ["cifar_resnet57", "cifar_resnet56"]),
    (("sites", "torchvision:resnet5"), ["resnet5", "resnet50"]),
    (("sites", "offramp:cifar_resnet20", "--shape", "3x"), ["--shape", "3x"]),
    (("sites", "offramp:cifar_resnet20", "--shape", "1x32x32"), ["(2, 1, 32, 32)", "What to do"]),
    (("sites", "offramp:cifar_resnet20", "--data", "imagefolder:nowhere"), ["nowhere"]),
    (("search", "nowhere"), ["nowhere", "offramp train"]),
    (("search", "nowhere"), ["nowhere"]),
    (("search", "nowhere", "--minimise", "flops"), ["'flops'", "peak_bytes"]),
    (("train", "offramp:cifar_resnet20", "--data", "scenes?n=2", "--out", "x", "--recipe", "label_fre"),
     ["label_fre", "label_free"]),
])
def test_bad_input_is_one_clear_sentence(args: tuple[str, ...], words: list[str], tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(*args)
    assert all(word in said for word in words), said
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_bad_images_are_named(run: Path, tmp_path: Path) -> None:
    assert "no such path" in refused("run", tmp_path / "none", "--model", run, "--out", tmp_path / "o")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "images" in refused("run", empty, "--model", run, "--out", tmp_path / "o")
    (empty / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    (empty / "zero.jpg").write_bytes(b"")
    said = refused("run", empty, "--model", run, "--out", tmp_path / "o")
    assert "broken.png" in said and "zero.jpg" in said
    assert not (tmp_path / "o").exists()


def test_nan_in_logits(run: Path, weights: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(weights)
    tensors["classifier.bias"][0] = float("nan")
    safetensors.torch.save_file(tensors, tmp_path / "nan.safetensors")
    said = refused("adapt", f"offramp:scenes_classify?weights={tmp_path / 'nan.safetensors'}", "--data", DATA, "--out",
                   tmp_path / "r", "--exits", 1, "--epochs", 1)
    assert "NaN" in said


def test_other_weights_than_the_run_was_made_with(run: Path, tmp_path: Path) -> None:
    import shutil

    other = shutil.copytree(run, tmp_path / "other")
    page = json.loads((other / "run.json").read_text())
    page["model"] = "offramp:scenes_classify"
    (other / "run.json").write_text(json.dumps(page))
    torch.manual_seed(1)
    assert "other weights" in refused("record", other, "--again")


def test_a_damaged_or_future_run_json(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    assert "run.json" in refused("search", tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format": "offramp.run", "version": 99}))
    assert "upgrade offramp" in refused("search", tmp_path)


def test_a_full_disk_leaves_nothing_half_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run / "plan.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "full disk" in refused("search", run, "--max-drop", 0.5)
    assert (run / "plan.json").read_bytes() == before
    assert not [one for one in run.iterdir() if one.name.startswith(".")]


def test_debug_and_json_faults(tmp_path: Path) -> None:
    done = call("search", tmp_path, "--json", code=2)
    assert "run.json" in json.loads(done.stdout)["error"]
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()):
        assert call("search", tmp_path, "--debug", code=2).stdout == ""


def test_demo_makes_a_report(tmp_path: Path) -> None:
    done = json.loads(call("demo", "--quick", "--out", tmp_path / "demo", "--json").stdout)
    assert Path(done["report"]).read_text().startswith("<!doctype html>")
    assert {one.name for one in tmp_path.iterdir()} == {"demo"}

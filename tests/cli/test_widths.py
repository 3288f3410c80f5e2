"""Networks of several widths through the command line on tiny scenes."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import offramp
from cli.test_cli import call, one_thread, photos_in, refused  # noqa: F401
from offramp.choose.plan import load_plan, save_plan
from offramp.cli import widths as of_widths
from offramp.cli.bench import CutAt
from offramp.cli.folder import Run, example
from offramp.cli.judge import dense_examples, report_run
from offramp.cli.predict import images_of
from offramp.models import load_model
from offramp.nn.slim import Slimmable
from offramp.policies.thresholds import Thresholds

DATA = "scenes?n=8&size=32x48&task=classify"
HOW = ("--data", DATA, "--widths", "0.5,1", "--epochs", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    safetensors.torch.save_file(load_model("offramp:scenes_classify").state_dict(), path)
    return f"offramp:scenes_classify?weights={path}"


@pytest.fixture(scope="module")
def run(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    done = call("adapt", model, *HOW, "--out", out, "--exits", 1, "--max-drop", 0.9, "--keep", "stage1.0",
                "--batch-size", 4, "--json")
    assert json.loads(done.stdout)["predicted"]["samples"] == 4
    return out


def opened(run: Path) -> tuple[Run, Slimmable]:
    found = Run.open(run)
    assert isinstance(found.net, Slimmable)
    return found, found.net


def test_a_run_of_widths_is_rebuilt_from_its_folder(run: Path) -> None:
    found, net = opened(run)
    assert found.manifest.widths == [0.5, 1.0] and found.manifest.keep == ["stage1.0"] and found.manifest.whole
    table = found.table("test")
    assert table.names == ("stage2.1@0.5", "final@0.5", "stage2.1", "final") and table.logits is not None
    x = torch.stack([found.source.split("test")[i][0] for i in range(len(table))])
    with torch.no_grad():
        said = [*net.narrow(0.5)(x), *net.narrow(1.0)(x)]
    for e, logits in enumerate(said):
        torch.testing.assert_close(table.logits[:, e], logits, rtol=1e-4, atol=1e-5)
    narrow = net.narrow(0.5).backbone
    assert narrow.stage1[0].conv2.out_channels == 24 and narrow.stage2[0].conv2.out_channels == 32
    assert table.costs.widths == (0.5, 0.5, 1.0, 1.0)


def test_widths_learn_as_fit_teaches_them_and_then_exits_at_each(run: Path, model: str) -> None:
    found, net = opened(run)
    plain = offramp.slim_(load_model(model), (0.5, 1.0), example_inputs=example([3, 32, 48]),
                          where=lambda path, module: not path.startswith("stage1.0"))
    offramp.fit(plain, found.source.split("train"), offramp.recipes.slim(epochs=1), progress=False)
    mine = found.exits.backbone.state_dict()
    for name, tensor in plain.backbone.state_dict().items():
        assert torch.equal(mine[name], tensor), name
    alone = safetensors.torch.load_file(run / "backbone.safetensors")
    whole = net.narrow(1.0).backbone.state_dict()
    assert set(alone) == set(whole) and all(torch.equal(alone[name], whole[name]) for name in alone)
    untrained = found.attach()
    assert isinstance(untrained, Slimmable)
    norm = next(name for name in found.exits.heads.state_dict() if name.endswith("at_0:5.running_mean"))
    assert not torch.equal(found.exits.heads.state_dict()[norm],
                           untrained.backbone.get_submodule("heads").state_dict()[norm])


def test_a_stop_between_widths_and_exits_is_gone_on_from(run: Path, model: str, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(**_: object) -> None:
        raise KeyboardInterrupt

    command = ("train", model, *HOW, "--out", tmp_path / "r", "--exits", 1, "--keep", "stage1.0")
    with monkeypatch.context() as patch:
        patch.setattr(of_widths.recipes, "label_free", stop)
        assert "goes on" in call(*command, code=130).stderr
    assert "trained exits" in refused("record", tmp_path / "r")
    widths = (tmp_path / "r/train/checkpoint.safetensors").stat().st_mtime_ns
    call(*command)
    assert (tmp_path / "r/train/checkpoint.safetensors").stat().st_mtime_ns == widths, "they are trained already"
    assert (tmp_path / "r/network.safetensors").read_bytes() == (run / "network.safetensors").read_bytes()
    assert "--widths" in refused(*command[:4], "--widths", "0.25,1", *command[6:])


def with_plan(run: Path, *exits: str, setting: str = "budgeted") -> None:
    policy = Thresholds(thresholds=(0.0,) * len(exits))
    save_plan(replace(load_plan(run / "plan.json"), exits=exits, policy=policy, setting=setting), run / "plan.json")


def test_budgeted_search_chooses_a_width_and_what_runs_is_that_narrow_network(run: Path, tmp_path: Path) -> None:
    said = json.loads(call("search", run, "--setting", "budgeted", "--max-drop", 0.99, "--against", "backbone",
                           "--json").stdout)
    costs = opened(run)[0].table("calibration").costs
    assert said["exits"] == ["stage2.1@0.5"] and said["predicted"]["macs"] == costs.path([0])[0]
    front = json.loads(call("search", run, "--setting", "budgeted", "--front", "--json").stdout)["front"]
    assert len(front) >= 1 and all(len(one["exits"]) <= 1 for one in front)

    with_plan(run, "final@0.5")
    photos = photos_in(tmp_path / "photos")
    call("run", photos, "--model", run, "--out", tmp_path / "answers")
    rows = list(csv.DictReader((tmp_path / "answers" / "predictions.csv").open()))
    found, net = opened(run)
    data = images_of([photos], found)
    with torch.no_grad():
        told = net.narrow(0.5)(torch.stack([data[i] for i in range(3)]))[-1]
    assert {row["exit"] for row in rows} == {"final@0.5"}
    assert [int(row["class"]) for row in rows] == told.argmax(1).tolist()
    assert [float(row["confidence"]) for row in rows] == pytest.approx(told.softmax(1).amax(1).tolist(), abs=1e-5)


@pytest.mark.parametrize("exits", [("stage2.1@0.5", "final@0.5"), ("final@0.5", "stage2.1")], ids=str)
def test_bench_and_report_of_plans_across_widths(run: Path, exits: tuple[str, ...], tmp_path: Path) -> None:
    with_plan(run, *exits, setting="input_dependent")
    page = json.loads(call("bench", run, "--batches", "1", "--repeats", 3, "--budget", 1, "--json").stdout)
    table = opened(run)[0].table("test")
    assert page["macs"]["untouched"] == table.costs.macs[-1]
    assert page["macs"]["adaptive"] == table.costs.path([table.index(exits[0])])[0]
    assert [row["network"].split(":")[0] for row in page["rows"]] == ["untouched", "adaptive", "static"]
    html = Path(call("report", run, "--out", tmp_path / "r.html").stdout.strip()).read_text()
    assert all(name in html for name in exits)
    net, x = opened(run)[1], torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        for e, name in enumerate(table.names[:-1]):
            assert torch.allclose(CutAt(net, name).eval()(x), net.narrow(table.costs.widths[e])(x)[e % 2], atol=1e-5)


def test_dense_without_exits_with_boundaries(tmp_path: Path) -> None:
    torch.manual_seed(0)
    safetensors.torch.save_file(load_model("offramp:scenes_dense").state_dict(), tmp_path / "net.safetensors")
    done = call("adapt", f"offramp:scenes_dense?weights={tmp_path / 'net.safetensors'}", "--data",
                "scenes?n=4&size=32x48", "--out", tmp_path / "run", "--exits", 0, "--widths", "0.25,1", "--recipe",
                "slim", "--boundary", "stage1", "--epochs", 1, "--confidences", "top", "--max-drop", 0.9)
    assert "2 widths on 4 images of train, with labels" in " ".join(done.stderr.split())
    found, net = opened(tmp_path / "run")
    assert found.table("test").names == ("final@0.25", "final") and not (tmp_path / "run/train/exits").exists()
    assert found.manifest.recipe["data"]["slim"]["boundary"] == "stage1"
    with_plan(tmp_path / "run", "final@0.25", setting="input_dependent")
    page, report = report_run(found, quiet=True, examples=1)
    assert "edges smoothed" in page.read_text() and "final@0.25" in page.read_text()
    split = found.source.split("test")
    (shown,) = dense_examples(found, report, split, 1)
    with torch.no_grad():
        x = split[int(shown.name[1:])][0][None]
        sure = torch.cat([net.narrow(0.25)(x)[-1], net.narrow(1.0)(x)[-1]]).softmax(1).amax(1)
        ends = {width: net.narrow(width)(x)[-1].argmax(1)[0] for width in net.widths}
    assert set(shown.ends) == set(ends) and all(torch.equal(shown.ends[width], ends[width]) for width in ends)
    assert torch.allclose(shown.confidences, sure, atol=1e-5) and not torch.allclose(sure[0], sure[1], atol=1e-4)
    assert "boundary" in refused("train", "offramp:scenes_dense", "--data", "scenes?n=4&size=32x48", "--out",
                                 tmp_path / "x", "--exits", 0, "--widths", "0.5,1", "--epochs", 1, "--boundary", "stge")


def test_the_channel_plan_before_it_is_applied() -> None:
    command = ("sites", "offramp:cifar_resnet20", "--shape", "3x32x32", "--widths", "0.5,1", "--keep", "layer1")
    words = call(*command).stdout
    assert words.splitlines()[0].split()[:4] == ["space", "channels", "0.5", "1"] and "where() keeps layer1" in words
    spaces = json.loads(call(*command, "--json").stdout)["channels"]
    kept: dict[str, int] = {}
    for one in spaces:
        for path in one["layers"]:  # what a shortcut pads with zeros has channels of several spaces
            kept[path] = kept.get(path, 0) + one["kept"]["0.5"]
    assert kept["layer2.0.conv1"] == 16 and kept["layer1.0.conv1"] == 16 and len(kept) > 15
    net = offramp.slim_(load_model("offramp:cifar_resnet20"), (0.5, 1.0), example_inputs=torch.zeros(2, 3, 32, 32),
                        where=lambda path, module: not path.startswith("layer1"))
    for name, layer in net.narrow(0.5).named_modules():
        if name in kept:
            assert kept[name] == getattr(layer, "out_channels", getattr(layer, "out_features", None)), name


def test_one_width_as_a_file_that_loads_without_offramp(run: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "narrow.safetensors"
    done = json.loads(call("narrow", run, "--width", 0.5, "--out", out, "--json").stdout)
    _, net = opened(run)
    made, x = net.narrow(0.5).backbone, torch.randn(3, 3, 32, 48)
    theirs = load_model(model).eval()
    words = call("narrow", run, "--width", 0.5, "--out", out).stdout
    assert done["loading"] in words and "offramp" not in done["loading"].replace(model, "").replace(str(out), "")
    exec(done["loading"], {"model": theirs})  # the shown thing runs
    with torch.no_grad():
        assert torch.equal(theirs(x), made(x))
    assert str(theirs) == str(made)
    assert done["parameters"] == sum(p.numel() for p in theirs.parameters())
    assert out.stat().st_size < 0.45 * (run / "backbone.safetensors").stat().st_size


@pytest.mark.parametrize(("args", "words"), [
    (("--widths", "0.5"), ["--widths", "'0.5'", "0.25,0.5,0.75,1"]),
    (("--widths", "half,1"), ["--widths", "'half,1'"]),
    (("--widths", "0.5,1"), ["--epochs"]),
    (("--widths", "0.5,1", "--recipe", "joint"), ["--recipe slim", "--widths"]),
    (("--widths", "0.5,1", "--epochs", 1, "--heads", "shortcut"), ["--heads small"]),
    (("--widths", "0.5,1", "--epochs", 1, "--keep", "stge1"), ["--keep", "'stge1'", "stage1"]),
    (("--recipe", "slim", "--epochs", 1), ["--widths"]),
    (("--keep", "stage1"), ["--keep", "--widths"]),
    (("--exits", 0), ["--exits", "--widths"]),
    (("--recipe", "joint", "--boundary", "stage1"), ["--boundary", "--recipe slim"]),
])
def test_what_does_not_go_together_is_one_sentence(args: tuple[object, ...], words: list[str], tmp_path: Path) -> None:
    said = refused("train", "offramp:scenes_classify", "--data", DATA, "--out", tmp_path / "x", *args)
    assert all(word in said for word in words), said
    assert not (tmp_path / "x").exists()


def test_other_runs_have_no_widths(run: Path, tmp_path: Path) -> None:
    assert "[0.5, 1.0]" in refused("narrow", run, "--width", 0.3, "--out", tmp_path / "n.safetensors")
    call("train", "offramp:scenes_classify?num_classes=8", "--data", DATA, "--out", tmp_path / "plain", "--exits", 1,
         "--recipe", "joint", "--epochs", 1, code=0)
    page = json.loads((tmp_path / "plain/run.json").read_text())
    page["model"] = f"offramp:scenes_classify?weights={tmp_path / 'plain/backbone.safetensors'}"
    page["backbone"] = ""
    (tmp_path / "plain/run.json").write_text(json.dumps(page))
    assert "--widths 0.25" in refused("narrow", tmp_path / "plain", "--width", 0.5, "--out", tmp_path / "n.safetensors")
    assert not (tmp_path / "n.safetensors").exists()
    for name in ("widths", "keep"):  # a run folder from before
        del page[name]
    (tmp_path / "plain/run.json").write_text(json.dumps(page))
    call("record", tmp_path / "plain", "--split", "test", "--json")

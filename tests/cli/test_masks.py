"""Masked networks through the command line on tiny scenes."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.nn import functional as F

from cli.test_cli import call, one_thread, photos_in, refused  # noqa: F401
from offramp.choose.plan import load_plan, save_plan
from offramp.cli.folder import Run, inside
from offramp.cli.masks import own_ends, to_its_end
from offramp.cli.predict import images_of
from offramp.models import load_model
from offramp.nn.masked import Masked
from offramp.nn.redesigned import RedesignedSpec
from offramp.policies.thresholds import Thresholds

DATA = "scenes?n=8&size=32x48"
HOW = ("offramp:scenes_dense", "--data", DATA, "--exits", 2, "--heads", "redesigned:4", "--mask", "top")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("masks") / "run"
    torch.manual_seed(0)
    said = call("train", *HOW, "--threshold", 0.15, "--epochs", 1, "--out", out).output
    assert "masks by top from 0.15" in said
    found = Run.open(out)
    with torch.no_grad():  # one epoch makes nobody sure: half of the pixels are to be settled all the same
        sure = inside(found.net)(found.source.split("test")[0][0][None])[0].softmax(1).amax(1)
    found.manifest.mask["threshold"] = float(sure.median())
    found.save()
    assert json.loads(call("record", out, "--batch-size", 4, "--json").stdout)["tables"] == {
        "calibration": 4, "test": 4}
    return out


def opened(run: Path) -> tuple[Run, Masked]:
    found = Run.open(run)
    assert isinstance(found.net, Masked)
    return found, found.net


def test_a_run_is_rebuilt_from_its_folder_and_recorded_beside_the_untouched_network(run: Path) -> None:
    found, net = opened(run)
    assert set(found.manifest.mask) == {"confidence", "threshold"} and found.manifest.mask.items() <= net.rule.items()
    assert [head.spec for head in net.net.heads.values()] == [
        RedesignedSpec(down=2, channels=4), RedesignedSpec(down=1, channels=4)]
    table = found.table("test")
    assert table.names == (*found.manifest.exits, "masked end", "final") and table.confusion is not None
    split = found.source.split("test")
    images, labels = (torch.stack(parts) for parts in zip(*(split[i] for i in range(len(split))), strict=True))
    with torch.no_grad():
        answers, macs = net.counted(images)
        said = [*answers.logits, net.net(images)[-1]]
    assert 0.05 < float(answers.masks[0].float().mean()) < 0.95
    for e, logits in enumerate(said):
        right = (logits.argmax(1) == labels).flatten(1).sum(1)
        assert table.confusion[:, e].diagonal(dim1=1, dim2=2).sum(1).tolist() == right.tolist()
    assert table.costs.macs[:3] == tuple(macs.double().mean(0).round().long().tolist())


def test_a_plan_that_does_without_masks_runs_and_one_of_other_masks_does_not(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    call("search", other, "--max-drop", 0)
    found, _ = opened(other)
    plan = replace(load_plan(other / "plan.json"), exits=(), policy=Thresholds(thresholds=()))
    assert plan.fingerprints["model"]
    save_plan(plan, other / "plan.json")  # as the search has it where no mask keeps what is asked
    photos = photos_in(tmp_path / "photos")
    call("run", photos, "--model", other, "--out", tmp_path / "seen")
    found.manifest.mask["threshold"] = 0.9
    found.save()
    assert "other weights or masks" in refused("run", photos, "--model", other, "--out", tmp_path / "more")


def test_lambdas_are_kept_and_read_back(run: Path, tmp_path: Path) -> None:
    kept = safetensors.torch.load_file(run / "network.safetensors")
    names = [name for name in kept if name.startswith("lams.")]
    assert len(names) == len(opened(run)[1].lams)
    other = shutil.copytree(run, tmp_path / "other")
    safetensors.torch.save_file({**kept, **{name: torch.tensor(k / 8) for k, name in enumerate(names)}},
                                other / "network.safetensors")
    lams = opened(other)[1].lams
    assert [float(lams[name.removeprefix("lams.")].detach()) for name in names] == [k / 8 for k in range(len(names))]


def test_a_search_chooses_where_it_ends_and_nothing_else(run: Path) -> None:
    said = json.loads(call("search", run, "--max-drop", 0.99, "--json").stdout)
    table = opened(run)[0].table("calibration")
    assert said["predicted"]["setting"] == "budgeted" and said["exits"] == [opened(run)[0].manifest.exits[0]]
    assert said["predicted"]["macs"] == table.costs.macs[0] and said["predicted"]["backbone_macs"] == \
        table.costs.macs[-1]
    for setting in ("input_dependent", "anytime"):
        assert "budgeted" in (words := refused("search", run, "--setting", setting)) and "--deadline-ms" in words
    assert "budgeted" in refused("search", run, "--by", "stopping", "--budget", "0.6x")
    assert "budgeted" in refused("compare", run)
    (run / "plan.json").unlink()


@pytest.mark.parametrize("end", [None, "first", "untouched"])
def test_labels_are_what_the_simulation_says_up_to_the_plans_exit(end: str | None, run: Path, tmp_path: Path) -> None:
    found, net = opened(run)
    first = found.manifest.exits[0]
    if end is not None:
        plan = to_its_end()
        save_plan(replace(plan, exits=(first,) if end == "first" else (),
                          policy=replace(plan.policy, thresholds=(0.0,) if end == "first" else ())), run / "plan.json")  # type: ignore[type-var]
    photos = photos_in(tmp_path / "photos")
    done = json.loads(call("run", photos, "--model", run, "--out", tmp_path / "o", "--json").stdout)
    (run / "plan.json").unlink(missing_ok=True)
    rows = list(csv.DictReader((tmp_path / "o" / "predictions.csv").open()))
    name = {None: "masked end", "first": first, "untouched": "final"}[end]
    assert done["exits"][name] == 3 and {row["exit"] for row in rows} == {name}
    data = images_of([photos], found)
    for i, row in enumerate(rows):
        with torch.no_grad():
            logits = {None: net(data[i][None])[-1], "first": net(data[i][None])[0],
                      "untouched": net.net(data[i][None])[-1]}[end]
        with Image.open(tmp_path / "o" / row["labels"]) as labels:
            wanted = F.interpolate(logits, size=(32, 48), mode="bilinear")[0].argmax(0).numpy()
            assert (np.asarray(labels) == wanted).mean() > 0.999
        assert float(row["confidence"]) == pytest.approx(float(logits.softmax(1).amax(1).mean()), abs=1e-4)


def test_a_deadline_takes_the_best_answer_by_then(run: Path, tmp_path: Path) -> None:
    photos, first = photos_in(tmp_path / "photos"), opened(run)[0].manifest.exits[0]
    said = call("run", photos, "--model", run, "--out", tmp_path / "a.json", "--deadline-ms", 0, "--no-overlays")
    assert "1 of 1 deadlines missed" in " ".join(said.output.split())
    found = json.loads((tmp_path / "a.json").read_text())["predictions"]
    assert {one["exit"] for one in found} == {first} and all(one["late"] for one in found)
    call("run", photos, "--model", run, "--out", tmp_path / "b.json", "--deadline-ms", 60000, "--walks", 1)
    found = json.loads((tmp_path / "b.json").read_text())["predictions"]
    assert {one["exit"] for one in found} == {"masked end"} and not any(one["late"] for one in found)
    page = (tmp_path / "walks.html").read_text()
    assert page.count("data:image/gif") == 1 and (tmp_path / "walks" / "0.gif").is_file()


def test_bench_and_report_without_a_plan(run: Path, tmp_path: Path) -> None:
    page = json.loads(call("bench", run, "--batches", "1", "--repeats", 3, "--budget", 1, "--json").stdout)
    found = opened(run)[0]
    table, exits = found.table("test"), found.manifest.exits
    assert [row["network"] for row in page["rows"]] == ["untouched", "masked", *(f"masked: first {e}" for e in exits)]
    assert page["macs"] == {"untouched": table.costs.macs[-1], "masked": table.costs.macs[2]}
    assert "--dtype" in refused("bench", run, "--dtype", "bf16")
    html = Path(call("report", run, "--out", tmp_path / "r.html").stdout.strip()).read_text()
    (run / "bench.json").unlink()
    assert "With masks, exit by exit" in html and html.count("data:image/gif") == 2 and "confidence=top" in html
    assert "static: the network cut at one exit" not in html
    section = html.split("With masks, exit by exit")[1].split("</section>")[0]
    assert section.count("<tr>") == 5 and "masked end" in section and "untouched network" in section


def test_masks_go_on_a_network_whose_exits_another_recipe_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    safetensors.torch.save_file(load_model("offramp:scenes_dense").state_dict(), tmp_path / "net.safetensors")
    model = f"offramp:scenes_dense?weights={tmp_path / 'net.safetensors'}"
    call("adapt", model, "--data", DATA, "--exits", 1, "--mask", "top", "--threshold", 0.12, "--recipe", "label_free",
         "--epochs", 1, "--max-drop", 0.9, "--confidences", "top", "--out", tmp_path / "run")
    found, net = opened(tmp_path / "run")
    assert (tmp_path / "run" / "heads.safetensors").is_file() and found.plan().setting == "budgeted"
    theirs = load_model(model).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in inside(net).backbone.state_dict().items())
    assert {float(lam.detach()) for lam in net.lams.values()} == {3.0}


def test_a_run_begun_with_other_masks_is_not_gone_on_with(run: Path) -> None:
    assert "--mask" in refused("train", *HOW, "--threshold", 0.3, "--epochs", 1, "--out", run)
    assert "--mask" in refused("train", *HOW[:-2], "--recipe", "anytime", "--epochs", 1, "--out", run)


@pytest.mark.parametrize(("args", "words"), [
    (("--mask", "sure"), ["--mask", "'sure'", "margin"]), (("--mask", "margin"), ["--threshold"]),
    (("--mask", "top"), ["--epochs"]), (("--threshold", 0.5), ["--threshold", "--mask top"]),
    (("--mask-from", 3), ["--mask-from", "--mask top"]),
    (("--mask", "top", "--recipe", "joint", "--mask-from", 3), ["--mask-from", "anytime"]),
    (("--mask", "top", "--epochs", 1, "--widths", "0.5,1", "--recipe", "slim"), ["--mask or --widths"]),
    (("--mask", "top", "--epochs", 1, "--heads", "mess"), ["one head at each site"]),
    (("--mask", "top", "--epochs", 1, "--heads", "redesigned:wide"), ["'redesigned:wide'", "redesigned:128"]),
    (("--mask", "top", "--epochs", 1, "--heads", "redesignd"), ["'redesignd'", "did you mean"]),
    (("--mask", "top", "--epochs", 1, "--exits", "ends"), ["names its own ends", "offramp sites"]),
    (("--mask", "top", "--epochs", 1, "--data", "figures?n=4"), ["heatmaps", "offramp.mask_"]),
])
def test_what_does_not_go_together_is_one_sentence(args: tuple[object, ...], words: list[str], tmp_path: Path) -> None:
    said = refused("train", "offramp:scenes_dense", "--data", DATA, "--out", tmp_path / "x", *args)
    assert all(word in said for word in words), said
    assert not (tmp_path / "x").exists()


def test_the_networks_own_ends() -> None:
    model = "offramp:hrnet_w18_small?num_classes=11"
    assert own_ends(load_model(model), model) == ["layer1.1", "stage2.0", "stage3.2"]

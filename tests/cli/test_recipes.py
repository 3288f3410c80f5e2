"""Recipes that read labels, and which confidences are kept, through the command line on tiny dense scenes."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cli.test_cli import call, one_thread, refused  # noqa: F401
from offramp.cli.folder import Run
from offramp.cli.work import RECIPES
from offramp.models import load_model
from offramp.train import recipes

DATA = "scenes?n=4&size=32x48"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MESS's first stage."""
    folder = tmp_path_factory.mktemp("mess")
    torch.manual_seed(0)
    safetensors.torch.save_file(load_model("offramp:scenes_dense").state_dict(), folder / "net.safetensors")
    said = json.loads(call("adapt", f"offramp:scenes_dense?weights={folder / 'net.safetensors'}", "--data", DATA,
                           "--out", folder / "run", "--exits", 2, "--recipe", "exit_aware", "--epochs", 1,
                           "--confidences", "top", "--json").stdout)
    assert "certificate" in said and said["predicted"]["samples"] > 0
    return folder


def test_the_first_stage_trains_all_and_the_second_goes_on_from_its_network(first: Path) -> None:
    stage = Run.open(first / "run")
    assert stage.manifest.whole and stage.manifest.recipe["data"]["dropout"] == "round_robin"
    weights = first / "run" / "backbone.safetensors"
    started = safetensors.torch.load_file(first / "net.safetensors")
    trained = safetensors.torch.load_file(weights)
    assert set(started) == set(trained) and any(not torch.equal(started[k], trained[k]) for k in started)
    said = call("train", f"offramp:scenes_dense?weights={weights}", "--data", DATA, "--out", first / "second",
                "--exits", 2, "--recipe", "mess", "--epochs", 1).stderr
    assert "with labels" in said and "of train" in said
    second, x = Run.open(first / "second"), torch.randn(2, 3, 32, 48)
    assert second.manifest.recipe["data"]["loss"] == "pfd" and not second.manifest.whole
    with torch.no_grad():
        torch.testing.assert_close(second.net(x)[-1], stage.net(x)[-1])


def test_every_recipe_is_on_the_command_line_and_says_what_it_needs(first: Path) -> None:
    assert set(RECIPES) == set(recipes.__all__) - {"flip", "flip_shift", "scale_crop_flip"}
    words = call("train", "--help").stdout
    assert all(name in words for name in RECIPES)
    out = first / "x"
    assert "--epochs" in refused("train", "offramp:scenes_dense", "--data", DATA, "--out", out, "--recipe", "kd")
    assert not out.exists()


def test_eenets_recipe_weighs_as_many_exits_as_there_are(first: Path) -> None:
    call("train", f"offramp:scenes_dense?weights={first / 'net.safetensors'}", "--data", DATA, "--out",
         first / "eenet", "--exits", 2, "--recipe", "eenet", "--epochs", 1)
    made = Run.open(first / "eenet")
    assert made.manifest.recipe["data"]["weights"] == pytest.approx([1 / 12, 2 / 12, 3 / 12])
    assert made.manifest.trained and made.manifest.whole and len(made.manifest.exits) == 2


def test_confidences_are_those_asked_for(first: Path) -> None:
    run, page = first / "run", first / "run" / "tables" / "test.json"
    assert set(Run.open(run).table("test").histograms) == {"top"}
    call("record", run, "--split", "test", "--confidences", "top,top_edges")
    assert set(Run.open(run).table("test").histograms) == {"top", "top_edges"}, "what a table lacks is recorded"
    made = page.stat().st_mtime_ns
    call("record", run, "--split", "test", "--confidences", "top_edges")
    assert page.stat().st_mtime_ns == made, "and what it has is not"
    assert "top_edge'" in refused("record", run, "--confidences", "top_edge")

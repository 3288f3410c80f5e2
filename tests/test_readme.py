"""What the README shows runs: the same lines, on tiny scenes in the place of a user's photos."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from typer.testing import CliRunner

from offramp.cli import app
from offramp.models import load_model

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", README, re.S)
    assert len(found) == 1, f"one {language} block"
    return str(found[0])


def small(text: str, weights: Path) -> str:
    swaps = {
        "torchvision:resnet18?weights=net.pth&num_classes=8": f"offramp:scenes_classify?weights={weights}",
        "imagefolder:photos?size=224x224": "scenes?n=8&size=32x48&task=classify",
        "label_free()": "label_free(epochs=1)",
        "torchvision:resnet18 --shape 3x224x224": "offramp:scenes_classify --shape 3x32x48",
        "--out run\n": "--out run --epochs 1\n", "--batches 1,32": "--batches 1",
        "bench run": "bench run --batches 1 --repeats 3 --budget 1",
    }
    for old, new in swaps.items():
        text = text.replace(old, new)
    assert "resnet18" not in text and "imagefolder" not in text
    return text


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(load_model("offramp:scenes_classify").state_dict(), path)
    return path


def test_python_block(place: Path) -> None:
    names: dict[str, object] = {}
    exec(compile(small(block("python"), place), "README.md", "exec"), names)
    answer = names["answer"]
    assert isinstance(answer, torch.Tensor) and answer.shape == (2, 8)


def test_shell_block(place: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "photos" / "a.png")
    lines = [line for line in small(block("sh"), place).splitlines() if line]
    assert len(lines) == 7
    for line in lines:
        program, *args = shlex.split(line)
        assert program == "offramp"
        done = CliRunner().invoke(app, args)
        assert done.exit_code == 0, (line, done.output, done.exception)
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "answers.csv").read_text().startswith("file,exit,confidence,class")


def test_links_and_make_targets_exist() -> None:
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (root / target).exists(), target
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile


def test_recipes_named_are_there_and_no_others() -> None:
    from offramp.train import recipes
    from offramp.train.recipe import Recipe

    cells = re.findall(r"^\|[^|]*\| (`\w+`[^|]*)\|", README, re.M)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    kinds = {name for name in recipes.__all__ if recipes.__dict__[name].__annotations__.get("return") is Recipe}
    assert named == kinds

"""The space of 64 heads through the command line: hung, kept in run.json and restored."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import offramp
from offramp.cli import app
from offramp.cli.folder import Run
from offramp.models import load_model
from offramp.nn.mess import MessSpec

DATA = "scenes?n=2&size=32x48"


def call(*args: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(one) for one in args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    safetensors.torch.save_file(load_model("offramp:scenes_dense").state_dict(), path)
    return path


def test_the_space_is_hung_kept_and_restored(weights: Path, tmp_path: Path) -> None:
    out, found = tmp_path / "run", offramp.sites(load_model("offramp:scenes_dense").eval(), torch.zeros(2, 3, 32, 48))
    late = [site for site in found if site.is_block and site.macs_after > 3e6][-1]  # where the widest cannot pay
    said = call("train", f"offramp:scenes_dense?weights={weights}", "--data", DATA, "--out", out, "--exits", late.name,
                "--heads", "mess", "--epochs", 1)
    assert "M parameters" in said and "heads left out" in said
    manifest = json.loads((out / "run.json").read_text())
    (kept,) = manifest["heads"].values()
    assert 1 < len(kept) < 64 and all(MessSpec.from_json(spec).name == name for name, spec in kept.items())
    net = Run.open(out).net
    assert max(net.head(c.name).macs() for c in net.columns[:-1]) < late.macs_after
    assert [c.head for c in net.columns[:-1]] == list(kept)
    tensors = safetensors.torch.load_file(out / "heads.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in net.heads.state_dict().items())


def test_a_network_that_classifies_is_told_in_one_sentence(tmp_path: Path) -> None:
    said = call("train", "offramp:scenes_classify", "--data", "scenes?n=4&size=32x48&task=classify", "--out",
                tmp_path / "run", "--exits", 1, "--heads", "mess", code=2)
    assert "labels pixels" in said and "Traceback" not in said

"""Deployed masked networks as files: what comes back says the same, and whatever does not fit is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import offramp
from offramp.errors import FileFormatError
from offramp.nn.masked import Masked
from offramp.sparse import Sparse, deploy
from offramp.table.files import write_tensors
from sparse.nets import Mixed, mixed

torch.set_num_threads(1)


def network(**rule: Any) -> tuple[Masked, Tensor]:
    torch.manual_seed(0)
    net, x = mixed(batch=2, end="dict")
    with torch.no_grad():
        half = float(net(x)[0].softmax(1).amax(1).median())
    masked = offramp.mask_(net, **{"threshold": half, **rule}).eval()
    with torch.no_grad():
        for k, lam in enumerate(masked.lams.values()):
            lam.fill_(0.5 + k / 4)
    return masked, x


def identical(ours: Sparse, theirs: Sparse, x: Tensor) -> None:
    mine, answers = ours.answers(x), theirs.answers(x)
    assert 0 < float(answers.masks[0].float().mean()) < 1, "some places go on, and some do not"
    assert all(map(torch.equal, mine.masks, answers.masks)) and all(map(torch.equal, mine.logits, answers.logits))


@pytest.mark.parametrize("rule", [{}, {"threshold": None, "share": 0.5, "grid": 2, "learn_lam": False},
                                  {"threshold": None, "confidence": "random", "share": 0.3, "seed": 3}], ids=str)
def test_what_comes_back_says_the_same_bit_for_bit(rule: dict[str, Any], tmp_path: Path) -> None:
    masked, x = network(**rule)
    fast = deploy(masked, dense_above=0.9)
    page = offramp.save_deployed(fast, tmp_path)
    torch.manual_seed(1)
    back = offramp.load_deployed(lambda: Mixed("dict"), tmp_path)
    assert isinstance(back, Sparse) and back.masked.rule == masked.rule and back.dense_above == 0.9
    identical(back, fast, x)
    assert list(back(x)) == ["out"] and torch.equal(back(x)["out"], fast(x)["out"])
    torch.testing.assert_close(back(x)["out"], masked(x)[-1].detach(), rtol=1e-4, atol=1e-4)
    assert json.loads(page.read_text())["version"] == 3
    offramp.save_deployed(back, tmp_path / "again")
    identical(offramp.load_deployed(Mixed("dict"), tmp_path / "again"), fast, x)  # type: ignore[arg-type]


def test_a_network_in_bfloat16_comes_back_as_one(tmp_path: Path) -> None:
    masked, x = network()
    fast = deploy(masked, dtype=torch.bfloat16)
    page = offramp.save_deployed(fast, tmp_path)
    back = offramp.load_deployed(lambda: Mixed("dict"), tmp_path)
    assert isinstance(back, Sparse) and back.dtype == torch.bfloat16
    identical(back, fast, x)
    described = json.loads(page.read_text())
    del described["form"]["dtype"]  # as files were before there was a choice
    with pytest.raises(FileFormatError, match="bfloat16"):
        page.write_text(json.dumps(described))
        offramp.load_deployed(lambda: Mixed("dict"), tmp_path)


def test_each_lambda_is_the_one_that_was_learnt(tmp_path: Path) -> None:
    masked, _ = network()
    offramp.save_deployed(masked.deploy(), tmp_path)  # type: ignore[arg-type]
    (file,) = tmp_path.glob("*.safetensors")
    kept = safetensors.torch.load_file(file)
    assert {name: float(kept[f"lams.{name}"]) for name in masked.lams} == {
        name: float(lam.detach()) for name, lam in masked.lams.items()}
    assert not any(name.endswith("running_mean") and name.startswith("backbone.stem") for name in kept), "folded"


def changed(folder: Path, **what: Any) -> None:
    page = json.loads((folder / "deployed.json").read_text())
    (folder / "deployed.json").write_text(json.dumps({**page, **what}))


@pytest.mark.parametrize(("what", "words"), [
    ({"masks": {"confidence": "top", "threshold": 0.5, "sharpness": 3}}, "sharpness"),
    ({"masks": 3}, "mask"), ({"form": {}}, "dense_above"), ({"version": 4}, "upgrade"), ({"fingerprint": "0"}, "other"),
], ids=str)
def test_a_page_that_does_not_fit_is_refused(what: dict[str, Any], words: str, tmp_path: Path) -> None:
    offramp.save_deployed(deploy(network()[0]), tmp_path)
    changed(tmp_path, **what)
    with pytest.raises(FileFormatError, match=words):
        offramp.load_deployed(lambda: Mixed("dict"), tmp_path)


def test_weights_that_lack_or_are_of_another_network(tmp_path: Path) -> None:
    fast = deploy(network()[0])
    page = json.loads(offramp.save_deployed(fast, tmp_path).read_text())
    (file,) = tmp_path.glob("*.safetensors")
    kept = safetensors.torch.load_file(file)
    lam = next(name for name in kept if name.startswith("lams."))
    for name in ("tensors", "sha256"):
        page.pop(name, None)
    write_tensors(tmp_path / "deployed.json", page, {name: t for name, t in kept.items() if name != lam})
    with pytest.raises(FileFormatError, match=f"no {lam}"):
        offramp.load_deployed(lambda: Mixed("dict"), tmp_path)

"""Deployed networks as files: they come back bit for bit, hold what is used and nothing more, and run no code."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import offramp
from offramp.errors import FileFormatError, OfframpError
from runtime.nets import EXITS, ByLogit, DenseGuest, Guest, classifier, images, plan, segmenter, stir_

POLICY = offramp.Thresholds(thresholds=(0.24, 0.24))


def a_plan(setting: str, **more: Any) -> Any:
    exits = EXITS[:1] if setting == "budgeted" else EXITS
    return plan(offramp.Thresholds(thresholds=POLICY.thresholds[: len(exits)]), exits, setting=setting, **more)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return safetensors.torch.load_file(file)


def refused(folder: Path, match: str, make: Any = Guest, **more: Any) -> None:
    with pytest.raises(OfframpError, match=match):
        offramp.load_deployed(make, folder, **more)


@pytest.mark.parametrize("setting", ["budgeted", "anytime", "input_dependent"])
@pytest.mark.parametrize("how", [{}, {"fold": True}, {"dtype": "bf16"}, {"channels_last": True}])
def test_what_comes_back_says_the_same_bit_for_bit(setting: str, how: dict[str, Any], tmp_path: Path) -> None:
    net, x = classifier("dict"), images(9)
    fast = net.deploy(a_plan(setting), **how)
    offramp.save_deployed(fast, tmp_path)
    back = offramp.load_deployed(lambda: Guest("dict"), tmp_path)
    assert back.plan == fast.plan and back.build == fast.build
    ours, theirs = back(x), fast(x)
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert back.last_exits.tolist() == fast.last_exits.tolist()
    assert all(torch.equal(a.output["out"], b.output["out"])
               for a, b in zip(back.anytime(x), fast.anytime(x), strict=True))


def test_a_budgeted_file_lacks_exactly_the_bytes_of_what_lies_deeper(tmp_path: Path) -> None:
    net = classifier()
    for setting in ("budgeted", "anytime"):
        offramp.save_deployed(net.deploy(a_plan(setting)), tmp_path / setting)
    sizes = {setting: sum(t.nbytes for t in weights_in(tmp_path / setting).values()) for setting in
             ("budgeted", "anytime")}
    deeper = (net.backbone.two, net.backbone.three, net.backbone.last, net.head("two"))
    assert sizes["anytime"] - sizes["budgeted"] == sum(t.nbytes for part in deeper for t in part.state_dict().values())
    kept = (net.backbone.one, net.head("one"))
    assert sizes["budgeted"] == sum(t.nbytes for part in kept for t in part.state_dict().values())
    assert set(weights_in(tmp_path / "budgeted")) == {
        *(f"backbone.one.{name}" for name in net.backbone.one.state_dict()),
        *(f"heads.one.{name}" for name in net.head("one").state_dict())}
    (file,) = (tmp_path / "budgeted").glob("*.safetensors")
    assert file.stat().st_size < sizes["budgeted"] + 4096, "the header and no more"


def test_dense_shortcut_heads_and_candidates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small, wide = offramp.HeadSpec(), offramp.HeadSpec(convs=((4, 3, 1),))
    net = offramp.attach(DenseGuest(), torch.randn(2, 3, 16, 16), exits=EXITS,
                         heads={"one": {"small": small, "wide": wide}, "two": {"": offramp.ShortcutSpec()}})
    stir_(net)
    x = images(3, 16)
    for exits in (("one/wide",), ("one/small", "two")):
        setting = "budgeted" if len(exits) == 1 else "anytime"
        policy = offramp.Thresholds(thresholds=(0.3,) * len(exits))
        fast = net.deploy(plan(policy, exits, task="dense", setting=setting))
        offramp.save_deployed(fast, tmp_path)
        back = offramp.load_deployed(DenseGuest, tmp_path)
        for ours, theirs in zip(back.anytime(x), fast.anytime(x), strict=True):
            assert torch.equal(ours.output["out"], theirs.output["out"])
    assert len(list(tmp_path.iterdir())) == 2, "an older file of weights is gone"


def test_the_users_model_and_random_state_are_left_alone(tmp_path: Path) -> None:
    offramp.save_deployed(classifier().deploy(a_plan("budgeted")), tmp_path)
    mine = Guest()
    before = {name: t.clone() for name, t in mine.state_dict().items()}
    state = torch.get_rng_state()
    offramp.load_deployed(mine, tmp_path)
    assert torch.equal(torch.get_rng_state(), state) and mine.training
    assert all(torch.equal(t, before[name]) for name, t in mine.state_dict().items())


def test_a_head_without_a_spec_is_asked_for(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(x.mean((2, 3)))

    net = offramp.attach(Guest(), images(2), exits=["one"], heads={"one": Own()})
    fast = net.deploy(a_plan("budgeted"))
    offramp.save_deployed(fast, tmp_path)
    refused(tmp_path, "heads=")
    back = offramp.load_deployed(Guest, tmp_path, heads={"one": Own()})
    assert torch.equal(back(images(3)), fast(images(3)))


def test_a_policy_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    class Plain(ByLogit):
        def to_json(self) -> dict[str, Any]:
            return {"remainders": self.remainders}

        @classmethod
        def from_json(cls, data: Any) -> "Plain":
            return cls(*data["remainders"])

    fast = classifier().deploy(plan(Plain(0, 1)))
    offramp.save_deployed(fast, tmp_path)
    refused(tmp_path, "known=")
    back = offramp.load_deployed(Guest, tmp_path, known=(Plain,))
    assert torch.equal(back(images(9)), fast(images(9)))


def test_a_plan_without_exits(tmp_path: Path) -> None:
    net = classifier()
    offramp.save_deployed(net.deploy(plan(offramp.Thresholds(thresholds=()), ())), tmp_path)
    assert torch.equal(offramp.load_deployed(Guest, tmp_path)(images(3)), net.backbone.eval()(images(3)))


def test_token_inputs_by_name(tmp_path: Path) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 8)
            self.one, self.two = nn.Linear(8, 32), nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
            self.last = nn.Linear(32, 3)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            x = self.words(input_ids) * attention_mask[..., None]
            return self.last(self.two(self.one(x)).mean(1))

    example = {"input_ids": torch.randint(0, 50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    net = offramp.attach(Text(), example, exits=["one"], heads=offramp.HeadSpec())
    fast = net.deploy(a_plan("budgeted"))
    offramp.save_deployed(fast, tmp_path)
    assert torch.equal(offramp.load_deployed(Text, tmp_path)(**example), fast(**example))


def test_what_does_not_belong_together_is_refused_and_named(tmp_path: Path) -> None:
    offramp.save_deployed(classifier().deploy(a_plan("budgeted")), tmp_path / "a")
    page, tensors = tmp_path / "a" / "deployed.json", weights_in(tmp_path / "a")
    record = json.loads(page.read_text())

    class Wider(Guest):
        def __init__(self) -> None:
            super().__init__()
            self.one[0] = nn.Conv2d(3, 8, 5, padding=2, bias=False)

    class Deeper(Guest):
        def __init__(self) -> None:
            super().__init__()
            self.three.append(nn.ReLU())

    refused(tmp_path / "a", r"backbone.one.0.weight .*\(8, 3, 3, 3\), here .*\(8, 3, 5, 5\)", Wider)
    refused(tmp_path / "a", "other modules around the same weights", Deeper)

    from offramp.table.files import write_tensors

    def rewritten(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        fewer = {k: t for k, t in {**tensors, **changes.pop("tensors", {})}.items() if t is not None}
        write_tensors(folder / "deployed.json", {**record, **changes}, fewer)
        return folder

    refused(rewritten("lacks", tensors={"backbone.one.0.weight": None}), "no backbone.one.0.weight")
    refused(rewritten("more", tensors={"backbone.two.0.weight": torch.zeros(3)}), "backbone.two.0.weight, which this")
    refused(rewritten("future", version=99), "upgrade")
    refused(rewritten("plan", plan={**record["plan"], "version": 99}), "upgrade")
    refused(rewritten("headless", heads={}), "heads=")
    refused(rewritten("torn", form={}), "whole deployed.json")
    (file,) = (tmp_path / "a").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    refused(tmp_path / "a", "another hash")
    refused(tmp_path / "nowhere", "nothing at")


def test_a_fingerprint_that_differs_is_seen(tmp_path: Path) -> None:
    fast = classifier().deploy(a_plan("budgeted"))
    offramp.save_deployed(fast, tmp_path)
    page = tmp_path / "deployed.json"
    record = json.loads(page.read_text())
    record["fingerprint"] = "0" * 16
    page.write_text(json.dumps(record))
    with pytest.raises(FileFormatError, match="architecture"):
        offramp.load_deployed(Guest, tmp_path)


def test_a_full_disk_leaves_the_old_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = segmenter(), images(2, 16)
    offramp.save_deployed(net.deploy(a_plan("budgeted", task="dense")), tmp_path)
    wanted = offramp.load_deployed(DenseGuest, tmp_path)(x)["out"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OfframpError, match="half-written"):
            offramp.save_deployed(net.deploy(a_plan("anytime", task="dense")), tmp_path)
    assert torch.equal(offramp.load_deployed(DenseGuest, tmp_path)(x)["out"], wanted)

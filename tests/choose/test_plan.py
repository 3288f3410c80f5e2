import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from choose.synthetic import classify, dense
from offramp.choose.plan import load_plan, save_plan
from offramp.choose.replay import replay
from offramp.choose.search import search
from offramp.errors import FileFormatError, OfframpError
from offramp.policies.thresholds import Thresholds
from offramp.types import Evidence, Plan


@pytest.mark.parametrize("table", [classify(80, 2), dense(20, 2)], ids=["classify", "dense"])
def test_saved_is_loaded_and_decides_the_same(table: Any, tmp_path: Path) -> None:
    plan = search(table, max_drop=0.05)
    save_plan(plan, tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded.policy == plan.policy and loaded.exits == plan.exits and loaded.fingerprints == plan.fingerprints
    assert loaded.predicted == plan.predicted and loaded.asked == plan.asked and loaded.notes == plan.notes
    assert torch.equal(replay(table, loaded).exit_index, replay(table, plan).exit_index)
    text = (tmp_path / "plan.json").read_text()
    save_plan(loaded, tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == text


@dataclass(frozen=True)
class Lottery:
    """A stranger's policy: a dataclass of JSON values."""

    share: float

    def decide(self, exit_index: int, evidence: Evidence) -> torch.Tensor:
        return torch.rand(len(evidence)) < self.share


class Named:
    """A stranger's policy with its own way to JSON."""

    version = 3

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def decide(self, exit_index: int, evidence: Evidence) -> torch.Tensor:
        return torch.zeros(len(evidence), dtype=torch.bool)

    def to_json(self) -> dict[str, Any]:
        return {"said": " ".join(self.words)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Named":
        return cls(data["said"].split())


def test_a_strangers_policy_is_read_only_when_passed_in(tmp_path: Path) -> None:
    path = save_plan(Plan(exits=("a",), policy=Lottery(0.25), task="classify"), tmp_path / "p.json")
    assert load_plan(path, known=(Lottery,)).policy == Lottery(0.25)
    with pytest.raises(FileFormatError, match="known="):
        load_plan(path)
    path = save_plan(Plan(exits=("a",), policy=Named(["x", "y"]), task="classify"), tmp_path / "p.json")
    named = load_plan(path, known=(Named,)).policy
    assert isinstance(named, Named) and named.words == ["x", "y"]


def test_a_policy_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    class Loose:
        def decide(self, exit_index: int, evidence: Evidence) -> torch.Tensor:
            raise NotImplementedError

    with pytest.raises(OfframpError, match="to_json"):
        save_plan(Plan(exits=("a",), policy=Loose(), task="classify"), tmp_path / "p.json")
    with pytest.raises(OfframpError, match="JSON"):
        save_plan(Plan(exits=("a",), policy=Lottery(0.5), task="classify", asked={"x": torch.ones(1)}), tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_figures_becomes_null(tmp_path: Path) -> None:
    plan = Plan(exits=(), policy=Thresholds(thresholds=()), task="classify", predicted={"drop": float("nan")})
    assert load_plan(save_plan(plan, tmp_path / "p.json")).predicted == {"drop": None}


@pytest.mark.parametrize(("change", "told"), [
    (lambda page: page.update(version=3), "later one"),
    (lambda page: page.update(format="offramp.table"), "format"),
    (lambda page: page.update(extra=1), "extra"),
    (lambda page: page.pop("task"), "task"),
    (lambda page: page.update(exits="block0"), "exits"),
    (lambda page: page["policy"].update(type="os.system"), "known="),
    (lambda page: page["policy"].update(type="__import__"), "known="),
    (lambda page: page["policy"].update(version=9), "version 1 or older"),
    (lambda page: page["policy"].update(code="import os"), "code"),
    (lambda page: page["policy"]["data"].update(thresholds=[0.1] * 9, temperatures=[]), "9 thresholds for"),
    (lambda page: page["policy"]["data"].update(confidence="sure"), "sure"),
    (lambda page: page["policy"]["data"].update(cunning=1), "cunning"),
    (lambda page: page["policy"]["data"].update(thresholds="abc"), "whole Thresholds"),
])
def test_a_damaged_plan_is_refused(change: Any, told: str, tmp_path: Path) -> None:
    path = save_plan(search(classify(80, 2), max_drop=0.05), tmp_path / "plan.json")
    page = json.loads(path.read_text())
    change(page)
    path.write_text(json.dumps(page))
    with pytest.raises(FileFormatError, match=told):
        load_plan(path)

"""Policies fitted to a budget, and promises, through the command line on a run folder of tiny scenes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from choose.synthetic import classify
from cli.test_cli import call, one_thread, refused, run, weights  # noqa: F401
from offramp.choose.plan import load_plan
from offramp.choose.replay import replay
from offramp.cli.budgets import SCHEDULERS, _budget
from offramp.cli.folder import Run
from offramp.errors import OfframpError
from offramp.table import ExitTable


@pytest.fixture
def wide(run: Path, tmp_path: Path) -> Path:  # noqa: F811
    """The run with many samples in its tables: answers made by program, costs and names its own."""
    out = shutil.copytree(run, tmp_path / "run")
    (out / "plan.json").unlink()
    for seed, split in enumerate(("calibration", "test")):
        own, made = Run.open(out).table(split), classify(1200, 2, 8, seed=seed, skill=(2.0, 4.0))
        assert own.logits is not None
        table = replace(own, logits=made.logits, labels=made.labels,
                        fingerprints={**own.fingerprints, "split": f"made{seed}"})
        table.save(out / "tables" / f"{split}.json")
    return out


def told(*args: object) -> dict:
    return json.loads(call("search", *args, "--json").stdout)


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"mamlstop", "gati"}))
def test_a_policy_by_its_name_keeps_the_budget(wide: Path, name: str) -> None:
    said = told(wide, "--by", name, "--budget", "0.9x")
    table, plan = ExitTable.load(wide / "tables/calibration.json"), load_plan(wide / "plan.json")
    paid = float(replay(table, plan).macs.mean())
    assert said["predicted"]["cost"] == pytest.approx(paid) and paid <= 0.9 * float(table.costs.macs[-1])
    assert plan.exits == tuple(said["exits"]) and plan.asked["unit"] == "macs"
    right = (replay(table, plan).predictions == table.labels).double().mean()
    assert said["predicted"]["loss"] == pytest.approx(float((table.logits[:, -1].argmax(1) == table.labels)
                                                            .double().mean() - right))


def test_budgets_in_every_unit(wide: Path) -> None:
    whole = ExitTable.load(wide / "tables/calibration.json").costs
    ms = whole.at(batch=1).dense_p50_ms
    assert told(wide, "--budget", "0.9x")["predicted"]["cost"] <= 0.9 * whole.macs[-1]
    plan = load_plan(wide / "plan.json")
    assert plan.asked["scheduler"].startswith("Stopping"), "which is what nothing said means"
    told(wide, "--by", "threshold", "--budget", f"{0.95 * whole.macs[-1]}")
    assert load_plan(wide / "plan.json").asked["budget"] == pytest.approx(0.95 * whole.macs[-1])
    for given in (("--budget", f"{1.5 * ms}ms"), ("--budget", "1.5x", "--minimise", "latency_ms")):
        told(wide, "--by", "threshold", *given)
        asked = load_plan(wide / "plan.json").asked
        assert asked["unit"] == "latency_ms" and asked["budget"] == pytest.approx(1.5 * ms)


def test_a_promise(wide: Path) -> None:
    said = told(wide, "--max-drop", 0.05, "--guarantee", 0.9)
    assert said["certificate"]["confidence"] == 0.9 and said["certificate"]["max_drop"] == 0.05
    assert said["certificate"]["samples"] == 600, "one half fits, the other certifies"
    both = told(wide, "--max-drop", 0.2, "--budget", "1x", "--guarantee", 0.8, "--by", "threshold")["certificate"]
    assert both["max_drop"] == 0.2 and both["upper_cost"] <= both["max_cost"]
    cost = told(wide, "--budget", "1x", "--guarantee", 0.8, "--by", "threshold")["certificate"]
    assert "max_cost" in cost and "max_drop" not in cost
    assert told(wide, "--guarantee", 0.5, "--by", "threshold")["certificate"]["max_drop"] == 0.01
    words = call("search", wide, "--max-drop", 0.05, "--guarantee", 0.9).stdout
    assert "With confidence 0.9 accuracy against the labels falls by at most 0.05" in words
    assert "samples" in refused("search", wide, "--max-drop", 0, "--guarantee", 0.999)


def test_what_a_fitted_plan_is_good_for(wide: Path, tmp_path: Path) -> None:
    words = call("search", wide, "--by", "threshold", "--budget", "0.9x").stdout
    assert "fewer MACs" in words and "a sample of the" in words and "proven" not in words
    page = call("report", wide, "--out", tmp_path / "r.html").stdout.strip()
    assert Path(page).read_text().startswith("<!doctype html>")
    bench = json.loads(call("bench", wide, "--batches", "1", "--repeats", 3, "--budget", 1, "--json").stdout)
    assert len(bench["rows"]) == 3


@pytest.mark.parametrize(("args", "words"), [
    (("--by", "nonsense", "--budget", "0.6x"), ["--by", "'nonsense'", "stopping"]),
    (("--by", "stopping"), ["--budget", "--guarantee"]),
    (("--budget", "0.6x", "--max-drop", 0.01), ["--budget with --max-drop", "--guarantee"]),
    (("--budget", "much"), ["--budget", "'much'", "25ms"]),
    (("--budget", "-2x"), ["--budget", "'-2x'"]),
    (("--budget", "0.6x", "--front"), ["--front"]),
    (("--budget", "0.6x", "--confidence", "margin", "--max-exits", 0), ["--confidence, --max-exits"]),
    (("--budget", "0.6x", "--minimise", "peak_bytes"), ["--minimise"]),
    (("--budget", "0.6x", "--setting", "anytime"), ["--setting"]),
    (("--budget", "1e-9"), ["the first exit"]),
    (("--guarantee", 1.5), ["confidence 1.5"]),
])
def test_what_does_not_go_together_is_one_sentence(run: Path, args: tuple[object, ...],  # noqa: F811
                                                   words: list[str]) -> None:
    before = (run / "plan.json").read_bytes()
    said = refused("search", run, *args)
    assert all(word in said for word in words), said
    assert (run / "plan.json").read_bytes() == before


def test_budgets_are_read() -> None:
    assert _budget("0.6x", "macs") == ("0.6x", "macs") and _budget("25ms", "macs") == (25.0, "latency_ms")
    assert _budget("3.5e8", "macs") == (3.5e8, "macs") and _budget("3", "latency_ms") == (3.0, "latency_ms")
    for wrong in ("x", "ms", "nan", "inf", "0x", "0.6xms"):
        with pytest.raises(OfframpError, match="--budget"):
            _budget(wrong, "macs")

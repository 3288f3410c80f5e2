"""Where a masked network goes on, asked at few places; and from which share of these on a stage runs densely."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import offramp
from offramp.cost.latency import Timing
from offramp.functional.confidence import top
from offramp.sparse import _walk, crossover
from offramp.sparse.crossover import Crossover, crossing, drawn, find, keep, kept
from sparse.nets import mixed


@pytest.mark.parametrize("rule", [{"threshold": 0.4}, {"confidence": "entropy", "threshold": 0.1},
                                  {"confidence": "value", "threshold": 0.5}, {"threshold": 0.4, "grid": 3},
                                  {"share": 0.3}])
def test_masks_are_looked_for_where_they_were_before(rule: Any) -> None:
    net, _ = mixed()
    masked = offramp.mask_(net, **rule)
    coarse = torch.randn(2, 4, 9, 14)
    coarse[0, 1, 2, 3] = torch.nan
    for before in (torch.rand(2, 1, 5, 7) < 0.5, torch.zeros(2, 1, 9, 14, dtype=torch.bool)):
        there = torch.nn.functional.interpolate(before.float(), (9, 14), mode="nearest").bool()
        for x in (coarse, coarse.contiguous(memory_format=torch.channels_last)):
            found = _walk.onward(masked, x, 1, before)
            assert torch.equal(found, masked.goes_on(coarse, 1) & there)
            assert bool(found.any()) == bool(before.any())


@pytest.mark.parametrize("last", [False, True])
def test_a_confidence_that_is_the_threshold_settles_a_place(last: bool) -> None:
    net, _ = mixed()
    masked = offramp.mask_(net, threshold=0.4)
    coarse = torch.randn(1, 4, 40, 50)
    scores = top(coarse).flatten()
    coarse = coarse.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    for at in range(0, 2000, 40):
        masked.threshold = float(scores[at])
        found = _walk.onward(masked, coarse, 0, None)
        assert not found.flatten()[at] and torch.equal(found, masked.goes_on(coarse, 0))


def test_a_crossing_lies_where_the_lines_cross() -> None:
    assert crossing((0.2, 0.6, 1.0), (1.0, 2.0, 6.0), 4.0) == pytest.approx(0.8)
    assert crossing((0.2, 1.0), (1.0, 2.0), 2.0) == 1.0  # never slower
    assert crossing((0.2, 1.0), (3.0, 4.0), 2.0) == 0.0  # always
    assert crossing((0.1, 0.2, 0.3, 1.0), (1.0, 2.5, 1.5, 4.0), 2.0) == pytest.approx(0.44)  # the last time


@pytest.mark.parametrize("quiet", [True, False])
def test_crossovers_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    def clock(calls: Any, *, budget_s: float, **_: Any) -> dict[str, Timing]:
        assert budget_s == 2  # of each stage
        return {name: Timing.of([call()] * 3, quiet=quiet) for name, call in calls.items()}

    monkeypatch.setattr(crossover, "measure", clock)
    stages: Any = [(lambda: 5.0, lambda mask: 10 * float(mask.float().mean()), (16, 16)),
                   (lambda: 5.0, lambda mask: 0.1 * mask.shape[0], (8, 16))]
    found = find(stages, budget_s=4, densities=(0.25, 0.75, 1.0))
    assert found.above == (0.5, 1.0) and found.dense_ms == (5.0, 5.0) and found.quiet == quiet
    assert found.sparse_ms == ((2.5, 7.5, 10.0), (pytest.approx(0.8),) * 3)
    assert "0.25, 0.75, 1" in str(found) and ("busy" in str(found)) != quiet


def test_masks_of_all_densities_are_drawn() -> None:
    for density in (0.0, 0.05, 0.5, 1.0):
        mask = drawn((20, 33), density)
        assert int(mask.sum()) == round(density * 660) and torch.equal(mask, drawn((20, 33), density))


FOUND = Crossover(above=(0.5, 1.0), dense_ms=(2.0, 3.0), sparse_ms=((1.0,) * 6, (2.0,) * 6))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "offramp"


def test_what_was_measured_is_kept_whole_or_measured_again(cache: Path) -> None:
    assert kept("a") is None
    keep("a", FOUND, {"engine": "eager"})
    assert kept("a") == FOUND and kept("b") is None
    (path,) = cache.iterdir()  # and no half-written file
    page = json.loads(path.read_text())
    for spoilt in ("", "{", "[]", json.dumps({**page, "version": 2}), json.dumps({**page, "above": [0.5]}),
                   json.dumps({**page, "above": [0.5, 3]}), json.dumps({**page, "dense_ms": "x"})):
        path.write_text(spoilt)
        assert kept("a") is None
    path.unlink()
    cache.rmdir()
    cache.write_text("no folder")
    with pytest.warns(UserWarning, match="not kept"):
        keep("a", FOUND, {})


@torch.no_grad()
def test_measured_at_deployment_obeyed_by_stage_and_never_by_a_call(cache: Path, monkeypatch: pytest.MonkeyPatch
                                                                   ) -> None:
    net, x = mixed()
    masked = offramp.mask_(net, share=0.4)
    asked: list[int] = []

    def clock(stages: Any, *, budget_s: float) -> Crossover:
        for dense, sparse, size in stages:
            dense()
            sparse(drawn(size, 0.5))
        asked.append(len(stages))
        return Crossover(above=(1.0, 0.0, 0.0), dense_ms=(1.0,) * 3, sparse_ms=((1.0,) * 6,) * 3)

    monkeypatch.setattr("offramp.sparse.network.find", clock)
    fast: Any = masked.deploy(dense_above="measured")
    assert asked == [3] and len(list(cache.iterdir())) == 1
    again: Any = masked.deploy(dense_above="measured")
    assert asked == [3] and again._crossovers.keys() != {} and again.measure(x).above == (1.0, 0.0, 0.0)
    fast.measure(x, again=True)
    assert asked == [3, 3]
    dense = []
    stage = fast._dense
    monkeypatch.setattr(fast, "_dense", lambda k, *rest: dense.append(k) or stage(k, *rest))
    fast(x)
    assert dense == []  # sparse once is sparse to the end
    fast._crossovers = {size: Crossover(above=(0.5, 1.0, 0.0), dense_ms=(), sparse_ms=()) for size in fast._crossovers}
    fast(x)
    assert dense == [1]
    fast(torch.rand(1, 3, 31, 22))
    assert dense == [1] and asked == [3, 3]  # a size that was never measured
    fast.dense_above = 0.0
    fast(x)
    assert dense == [1, 1, 2, 3]


def test_a_key_is_of_the_program_and_how_it_runs() -> None:
    net, x = mixed()
    programs = []
    fast: Any = offramp.mask_(net, share=0.4).deploy()
    for one in (x, x, torch.rand(1, 3, 31, 22)):
        fast(one)
        programs.append([lowered.program for lowered, _ in fast._shelf._held.values()][-1])
    keys = [crossover.key_of(program, engine="eager") for program in programs]
    assert keys[0] == keys[1] != keys[2] and crossover.key_of(programs[0], engine="compile") != keys[0]

"""The search of head shapes."""

from pathlib import Path

import pytest
import torch

from offramp.errors import DataError, OfframpError
from offramp.nn.heads import HeadSpec, build, head_macs
from offramp.nn.shortcut import ShortcutSpec
from offramp.train import HeadSearch, search_heads
from offramp.train.shapes import HeadTrial, leaving
from train.fakes import Teased, assert_equal, make, unlabelled, weights

torch.set_num_threads(1)


def test_search_measures_pays_and_chooses(tmp_path: Path) -> None:
    net = make()
    before = weights(net)
    found = search_heads(net, Teased("tuple", 200), trials=12, epochs=4, run_dir=tmp_path)
    assert_equal(before, weights(net))
    assert list(found.specs) == ["one", "two"]
    for site in net.sites:
        trials = found.trials[site.name]
        assert len({trial.spec for trial in trials}) == len(trials) >= 4
        for trial in trials:
            if isinstance(trial.spec, HeadSpec):
                assert trial.macs == head_macs(build(trial.spec, site.live, 4, "classify"), site.live)
            assert trial.saved_macs == pytest.approx(trial.leaving * site.macs_after - trial.macs)
            assert 0 <= trial.leaving <= 1 and 0 <= trial.agreement <= 1
        assert all(trial.macs <= 0.5 * site.macs_after for trial in trials[2:]), "the first two are the defaults"
        assert isinstance(trials[0].spec, HeadSpec) and isinstance(trials[1].spec, ShortcutSpec)
        assert found.best(site.name).saved_macs == max(trial.saved_macs for trial in trials)
    assert found.best("two").agreement > 0.5, "four classes: chance is about a quarter"
    assert "two" in str(found) and "head M MACs" in str(found)
    again = search_heads(make(), unlabelled(200), trials=12, epochs=4, run_dir=tmp_path)
    assert again == found, "the seed alone decides"
    net = make(found.specs)  # type: ignore[arg-type]
    for site in found.specs:
        assert head_macs(net.heads[site], next(s.live for s in net.sites if s.name == site)) == found.best(site).macs


def test_search_of_dense_heads() -> None:
    found = search_heads(make(dense=True), unlabelled(16), trials=3, epochs=1)
    assert len(found.trials) == 2


def test_front_keeps_what_nothing_beats() -> None:
    def trial(macs: int, agreement: float) -> HeadTrial:
        return HeadTrial(spec=HeadSpec(linears=(macs,)), macs=macs, agreement=agreement, leaving=0.0, saved_macs=0.0)

    trials = [trial(5, 0.9), trial(1, 0.5), trial(4, 0.7), trial(6, 0.8), trial(3, 0.7)]
    found = HeadSearch(trials={"a": tuple(trials)}, tolerance=0.0)
    assert [(t.macs, t.agreement) for t in found.front("a")] == [(1, 0.5), (3, 0.7), (5, 0.9)]


def test_leaving_against_brute_force() -> None:
    torch.manual_seed(0)
    for tolerance in (0.0, 0.02, 0.1, 1.0):
        sure, wrong = torch.rand(60), (torch.rand(60) < 0.2).double()
        order = sure.argsort(descending=True).tolist()
        best = max(n for n in range(61) if sum(float(wrong[i]) for i in order[:n]) <= tolerance * 60 + 1e-9)
        assert leaving(sure, wrong, tolerance) == pytest.approx(best / 60)


def test_unusable_arguments() -> None:
    with pytest.raises(OfframpError, match="trials.*held_out"):
        search_heads(make(), unlabelled(), trials=0, held_out=1.0)
    with pytest.raises(DataError, match="Subset"):
        search_heads(make(), unlabelled(), cache_bytes=100)
    with pytest.raises(DataError, match="hold out"):
        search_heads(make(), unlabelled(1))

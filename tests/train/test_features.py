"""The cache of features: what it holds, when it is refused, and that nothing half-written stays."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader

from offramp.errors import DataError
from offramp.train import features, fit, recipes
from offramp.train.batches import source_of
from offramp.train.features import Refused, collect
from train.fakes import PLAIN, images, make, unlabelled, weights

torch.set_num_threads(1)
RECIPE = recipes.label_free(epochs=1, batch_size=20)
CPU = torch.device("cpu")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def gather(
    net: Any, folder: Path, recipe: Any = RECIPE, data: Any = None, limit_bytes: int = 2**30
) -> features.Features:
    source = source_of(unlabelled() if data is None else data, batch_size=20, labels=False, seed=0)
    return collect(net, source, recipe, folder=folder, limit_bytes=limit_bytes, device=CPU)


def test_it_holds_what_the_network_computes(tmp_path: Path) -> None:
    net = make()
    seen: dict[str, Any] = {}
    hooks = [getattr(net.backbone, n).register_forward_hook(lambda m, a, out, n=n: seen.__setitem__(n, out))
             for n in ("one", "two")]
    answer = net.backbone(images())
    for hook in hooks:
        hook.remove()
    held = gather(net, tmp_path / "f")
    assert held.count == 96 and held.views == 1
    assert torch.allclose(held.teacher, answer, atol=1e-5)
    for site, name in enumerate(("one", "two")):
        (tensor,) = held.tensors[site]
        assert tensor.dtype == torch.float16 and torch.allclose(tensor.float(), seen[name], rtol=2e-3, atol=1e-3)
    batch = next(iter(held.windows(0, 2, 1)))[0]
    assert batch.args[0][0].dtype == torch.float32 and len(batch) == 20
    assert {path.suffix for path in (tmp_path / "f").iterdir()} == {".npy", ".json"}


def test_every_sample_comes_once_an_epoch_in_another_order(tmp_path: Path) -> None:
    held = gather(make(), tmp_path / "f")
    orders = []
    for epoch in (0, 1, 0):
        batches = [batch for window in held.windows(epoch, 2, 0) for batch in window]
        orders.append(torch.cat([batch.teacher for batch in batches if batch.teacher is not None]))
        assert torch.equal(orders[-1].sort(0).values, held.teacher.sort(0).values)
    assert torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[1])


def test_views_are_the_plain_one_and_augmented_ones_with_their_own_teacher(tmp_path: Path) -> None:
    net = make()
    held = gather(net, tmp_path / "f", replace(RECIPE, views=3, augment=recipes.flip_shift))
    assert held.views == 3 and len(held.teacher) == 288
    assert torch.allclose(held.teacher[:96], net.backbone(images()), atol=1e-5)
    assert not torch.allclose(held.teacher[96:192], held.teacher[192:], atol=1e-2)
    # Each view's teacher is the backbone's answer to that view: the rest of the network applied to its features.
    rest = net.backbone.last(net.backbone.three(held.tensors[1][0].float()).mean((2, 3)))
    assert torch.allclose(rest, held.teacher, atol=0.05)
    mixed = [batch.teacher for window in held.windows(0, 1, 0) for batch in window]
    assert sum(len(teacher) for teacher in mixed if teacher is not None) == 96
    plain = {tuple(row) for row in held.teacher[:96].tolist()}
    share = sum(tuple(row) in plain for teacher in mixed if teacher is not None for row in teacher.tolist()) / 96
    assert 0.15 < share < 0.55, "about a third of them are the plain view"


def test_it_is_reused_by_the_same_network_and_data_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, calls = make(), []
    write = features._write
    monkeypatch.setattr(features, "_write", lambda *args: calls.append(1) or write(*args))
    first = gather(net, tmp_path / "f")
    again = gather(net, tmp_path / "f")
    assert calls == [1] and torch.equal(first.teacher, again.teacher)
    with torch.no_grad():
        net.backbone.last.bias.add_(1)
    gather(net, tmp_path / "f")
    assert calls == [1, 1]
    gather(net, tmp_path / "f", data=[part + 1 for part in images().split(20)])
    assert calls == [1, 1, 1]
    (tmp_path / "f.part").mkdir()
    (tmp_path / "f" / "meta.json").unlink()
    gather(net, tmp_path / "f")
    assert not (tmp_path / "f.part").exists() and calls == [1, 1, 1, 1]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(DataError, match="free disk"):
        fit(make(), unlabelled(), RECIPE)
    with pytest.raises(DataError, match="free disk"):
        fit(make(), unlabelled(), RECIPE, run_dir=tmp_path / "run")
    assert [path.name for path in tmp_path.rglob("*") if "torchinductor" not in str(path)] == ["run"]


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.json, "dumps", full)
    with pytest.raises(DataError, match="No space left"):
        gather(make(), tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("why", ["bound", "shapes", "fp16", "augment"])
def test_refused_and_then_trained_without(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    net, data, recipe, limit_bytes = make(PLAIN), unlabelled(), RECIPE, 2**30
    if why == "bound":
        limit_bytes = 10_000
    if why == "shapes":
        data = [images(20), images(20).repeat(1, 1, 2, 2)]
    if why == "fp16":
        data = [images(20) * 1e6]
    if why == "augment":
        recipe = replace(RECIPE, augment=recipes.flip)
    with pytest.raises(Refused):
        gather(net, tmp_path / "f", recipe, data, limit_bytes)
    before = weights(net.heads)
    history = fit(net, data, recipe, cache_bytes=limit_bytes)
    assert "not cached" in history.notes[0]
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(net.heads).items())
    assert list(tmp_path.glob("offramp-*")) == []


def test_a_shuffling_loader_is_cached_with_its_own_answers(tmp_path: Path) -> None:
    net = make()
    held = gather(net, tmp_path / "f", data=DataLoader(unlabelled(90), batch_size=16, shuffle=True))
    rest = net.backbone.last(net.backbone.three(held.tensors[1][0].float()).mean((2, 3)))
    assert held.count == 90 and torch.allclose(rest, held.teacher, atol=0.05)

"""A run that is killed at any moment ends, once resumed, with the numbers of an unbroken one."""

import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from offramp.errors import DataError, FileFormatError
from offramp.train import checkpoint, fit, recipes
from train.fakes import PLAIN, Noisy, assert_equal, labelled, make, run_script, unlabelled, weights

torch.set_num_threads(1)


class Killed(Exception):
    pass


def case(name: str) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Network, data, recipe and options: each leans on another source of chance."""
    label_free = recipes.label_free(epochs=3, batch_size=16, lr=0.01, ema=0.9)
    joint = recipes.joint(epochs=3, batch_size=16)
    pair, small = recipes.scale_crop_flip(), {"epochs": 3, "batch_size": 16}
    return {
        "cached views": (make(), unlabelled(), replace(label_free, views=2, augment=recipes.flip_shift), {}),
        "live augmented": (make(), unlabelled(), replace(label_free, augment=recipes.flip_shift), {}),
        "cached loader": (make(), DataLoader(labelled(), batch_size=16, shuffle=True), label_free, {}),
        "exit dropout": (make(dense=True), labelled(dense=True), recipes.exit_aware(augment_pair=pair, **small),
                         {"validate": labelled(8, dense=True)}),
        "pfd cached": (make(dense=True), labelled(dense=True), recipes.mess(loss_stride=2, **small), {"accumulate": 2}),
        "pfd views": (make(dense=True), labelled(dense=True), recipes.mess(views=2, augment_pair=pair, **small), {}),
        "pfd live": (make(dense=True), labelled(dense=True), recipes.mess(augment_pair=pair, **small),
                     {"precision": "bf16"}),
        "joint noisy": (make(), Noisy(), joint, {"accumulate": 2}),
        "joint shuffled": (make(PLAIN), DataLoader(Noisy(), batch_size=16, shuffle=True), joint, {}),
        "joint own generator": (make(), DataLoader(Noisy(), batch_size=16, shuffle=True,
                                                   generator=torch.Generator().manual_seed(3)), joint, {}),
    }[name]


CASES = ["cached views", "live augmented", "cached loader", "exit dropout", "pfd cached", "pfd views", "pfd live",
         "joint noisy", "joint shuffled", "joint own generator"]


def numbers(history: Any) -> list[dict[str, Any]]:
    return [{**asdict(epoch), "seconds": 0} for epoch in history.epochs]


@pytest.mark.parametrize("name", CASES)
def test_broken_off_and_resumed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, data, recipe, how = case(name)
    whole = fit(net, data, recipe, **how, run_dir=tmp_path / "whole", checkpoint_every=2)
    other, data, _, _ = case(name)
    left = iter(range(4))
    save = checkpoint.save

    def save_then_die(*args: Any) -> None:
        save(*args)
        if next(left) == 3:
            raise Killed

    monkeypatch.setattr(checkpoint, "save", save_then_die)
    with pytest.raises(Killed):
        fit(other, data, recipe, **how, run_dir=tmp_path / "run", checkpoint_every=2)
    monkeypatch.setattr(checkpoint, "save", save)
    with torch.no_grad():
        for parameter in other.heads.parameters():
            parameter.zero_()  # a new process knows nothing of the old one's weights
    torch.manual_seed(77)
    resumed, data, _, _ = case(name)
    resumed.heads.load_state_dict(other.heads.state_dict())
    history = fit(resumed, data, recipe, **how, run_dir=tmp_path / "run", checkpoint_every=2)
    assert "resumed at step" in history.notes[-1]
    assert_equal(weights(net), weights(resumed))
    assert numbers(whole) == numbers(history)
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(log) == 1 + recipe.epochs, "no epoch is logged twice"


SCRIPT = """
import os, signal, sys
import torch
from pathlib import Path
from train.fakes import make, unlabelled
from offramp.train import fit, recipes, checkpoint
import offramp.train.loop as loop
torch.set_num_threads(1)
moment, run = {moment!r}, Path({run!r})
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
if moment == "features":
    import offramp.train.features as features
    create = features._create
    def half(*args):
        create(*args)
        kill()
    features._create = half
if moment == "step":
    step, count = loop._Run._step, iter(range(100))
    def one(self, window):
        if next(count) == 9:
            kill()
        return step(self, window)
    loop._Run._step = one
if moment == "write":
    replace, count = os.replace, iter(range(100))
    def held(a, b):
        if str(b).endswith(".safetensors") and next(count) == 2:
            kill()
        replace(a, b)
    os.replace = held
fit(make(), unlabelled(), recipes.label_free(epochs=3, batch_size=16, lr=0.01), run_dir=run, checkpoint_every=2)
"""


@pytest.mark.parametrize("moment", ["features", "step", "write"])
def test_killed_outright_and_resumed(moment: str, tmp_path: Path) -> None:
    recipe = recipes.label_free(epochs=3, batch_size=16, lr=0.01)
    run = tmp_path / "run"
    assert run_script(SCRIPT.format(moment=moment, run=str(run)), tmp_path / "script.py") == -signal.SIGKILL
    assert (run / "checkpoint.safetensors").exists() == (moment != "features")
    whole, resumed = make(), make()
    first = fit(whole, unlabelled(), recipe)
    history = fit(resumed, unlabelled(), recipe, run_dir=run, checkpoint_every=2)
    assert ("resumed" in history.notes[-1]) == (moment != "features")
    assert_equal(weights(whole), weights(resumed))
    assert numbers(first) == numbers(history)
    assert not list(run.glob("*.part"))


def test_a_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.label_free(epochs=2, batch_size=16)
    first = fit(make(), unlabelled(), recipe, run_dir=tmp_path)
    import offramp.train.loop as loop

    monkeypatch.setattr(loop, "cached", lambda *args: pytest.fail("features were computed again"))
    assert fit(make(), unlabelled(), recipe, run_dir=tmp_path) == first


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    recipe = recipes.label_free(epochs=1, batch_size=16)
    fit(make(), unlabelled(), recipe, run_dir=tmp_path)
    with pytest.raises(FileFormatError, match="recipe.*resume=False"):
        fit(make(), unlabelled(), replace(recipe, temperature=2.0), run_dir=tmp_path)
    with pytest.raises(FileFormatError, match="samples"):
        fit(make(), unlabelled(64), recipe, run_dir=tmp_path)
    fit(make(), unlabelled(64), recipe, run_dir=tmp_path, resume=False)


@pytest.mark.parametrize("damage", ["cut", "garbage", "other kind", "future"])
def test_a_damaged_checkpoint_is_refused(damage: str, tmp_path: Path) -> None:
    recipe = recipes.label_free(epochs=1, batch_size=16)
    fit(make(), unlabelled(), recipe, run_dir=tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    whole = file.read_bytes()
    if damage == "other kind":
        from safetensors.torch import save_file
        save_file({"a": torch.zeros(1)}, file, metadata={"type": "weights", "version": "1"})
    else:
        file.write_bytes({"cut": whole[:-10], "garbage": b"x" * 100,
                          "future": whole.replace(b'"version":"1"', b'"version":"9"', 1)}[damage])
    with pytest.raises(FileFormatError, match="checkpoint"):
        fit(make(), unlabelled(), recipe, run_dir=tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {"a": torch.ones(3)}, {"step": 1})

    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DataError, match="No space left"):
        checkpoint.save(path, {"a": torch.zeros(3)}, {"step": 2})
    tensors, state = checkpoint.load(path)
    assert state == {"step": 1} and torch.equal(tensors["a"], torch.ones(3)) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_optimisers_state_goes_through_the_file(kind: str, tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        return net, (torch.optim.AdamW(net.parameters()) if kind == "adamw"
                     else torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))

    def step(net: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        net(torch.ones(1, 3)).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    net, optimiser = made()
    step(net, optimiser)
    checkpoint.save(tmp_path / "c.safetensors", checkpoint.optimiser_tensors(optimiser), {})
    other, fresh = made()
    step(other, torch.optim.SGD(other.parameters(), lr=0.0))
    other.load_state_dict(net.state_dict())
    checkpoint.restore_optimiser(fresh, checkpoint.load(tmp_path / "c.safetensors")[0])
    step(net, optimiser)
    step(other, fresh)
    assert torch.equal(net.weight, other.weight)  # type: ignore[arg-type]

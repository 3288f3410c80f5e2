"""Training of masked networks: steps by hand, when masks begin, heatmaps, going on after a break, what is measured."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import jaccard_score
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import offramp
from nn.test_masked import HEADS, Guest, X
from offramp.data.scenes import Scenes
from offramp.errors import DataError, OfframpError
from offramp.functional.losses import squared_error
from offramp.nn.masked import Masked
from offramp.train import checkpoint, fit, recipes, restore
from offramp.train.recipe import AnytimeStep, Recipe
from train.fakes import assert_equal, weights

torch.set_num_threads(1)
SMALL: dict[str, Any] = {"epochs": 2, "lr": 0.05, "batch_size": 6, "weight_decay": 0.01}


def plain(classes: int = 4, seed: int = 0, **guest: Any) -> offramp.MultiExit:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = offramp.attach(Guest(**guest), X, exits=["stem", "body"], heads=HEADS, keep_costly=True)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and module.out_channels == classes:
                module.weight.mul_(8)  # some pixels are easy
    return net


def make(seed: int = 0, **rule: Any) -> Masked:
    return offramp.mask_(plain(seed=seed), **(rule or {"share": 0.4}), lam=0.8)


def batches(count: int = 3, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    """A loader of batches of 6, in this order: blocks of classes with some void, colours that tell the class."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        labels = torch.randint(0, 4, (6, 3, 5), generator=draw).repeat_interleave(8, 1).repeat_interleave(4, 2)
        images = F.one_hot(labels, 4)[..., :3].permute(0, 3, 1, 2) + 0.5 * torch.randn(6, 3, 24, 20, generator=draw)
        labels[0, :4, :4] = 255
        made.append((images, labels))
    return made


def poses(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Heatmaps with a joint that is not told, and one that no one shows."""
    made = [(x, torch.rand(6, 4, 24, 20, generator=torch.Generator().manual_seed(9)) ** 8) for x, _ in batches(count)]
    for _, goal in made:
        goal[0, 1], goal[:, 2] = torch.nan, torch.nan
    return made


def by_hand(masked: Masked, data: list[tuple[Tensor, Tensor]], recipe: Recipe, loss: Any, momentum: float = 0.9
            ) -> None:
    """Torch's own SGD on the sum of losses of what the masked network says, or the unmasked one before its epoch."""
    masked.train()
    deep = [p for p in masked.parameters() if p.ndim > 1]
    flat = [p for p in masked.parameters() if p.ndim < 2]
    assert len([p for p in flat if p.ndim == 0]) == 6, "lambdas"
    optimiser = torch.optim.SGD([{"params": deep, "weight_decay": recipe.weight_decay}, {"params": flat}], lr=1.0,
                                momentum=momentum, nesterov=True)
    steps = len(data) * recipe.epochs
    assert recipe.anytime is not None
    for number in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * (1 - number / steps) ** 0.9
        optimiser.zero_grad()
        x, y = data[number % len(data)]
        masks_on = number >= recipe.anytime.mask_from * len(data)
        said = masked(x) if masks_on else masked.net(x)
        sum(weight * loss(one, y) for weight, one in zip(recipe.weights or (1, 1, 1), said, strict=True)).backward()
        optimiser.step()
    masked.eval()


@pytest.mark.parametrize("how", [
    {}, {"mask_from": 1}, {"loss_stride": 2}, {"weights": (0.5, 0.0, 2.0)}, {"channel_weights": (1.0, 0.5, 3.0, 0.0)},
    {"momentum": 0.5},
], ids=str)
def test_six_steps_by_hand(how: dict[str, Any]) -> None:
    masked, witness = make(), make()
    recipe = recipes.anytime(**{**SMALL, **how})
    classes = torch.tensor(how["channel_weights"]) if "channel_weights" in how else None
    before = weights(masked)
    history = fit(masked, batches(), recipe, channels_last=False)

    def loss(said: Tensor, y: Tensor) -> Tensor:
        if "loss_stride" in how:
            said, y = F.interpolate(said, (12, 10), mode="bilinear"), y[:, 1::2, 1::2]
        return F.cross_entropy(said, y, classes, ignore_index=255)

    by_hand(witness, batches(), recipe, loss, how.get("momentum", 0.9))
    for name, tensor in weights(witness).items():
        torch.testing.assert_close(masked.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    learnt = [name for name, tensor in weights(masked).items() if not torch.equal(tensor, before[name])]
    assert sum(name.startswith("lams.") for name in learnt) == 4, "all but of layers that say logits, which are carried"
    names = ("stem", "body", "final")
    assert history.columns == tuple(n for n, w in zip(names, how.get("weights", (1, 1, 1)), strict=True) if w)


def test_masks_begin_at_their_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    masked, seen = make(), []
    run = Masked._run
    monkeypatch.setattr(Masked, "_run", lambda self, *args: seen.append(self.training) or run(self, *args))
    fit(masked, batches(2), recipes.anytime(epochs=3, mask_from=2), channels_last=False)
    assert seen == [True, True]
    fit(masked, batches(2), recipes.anytime(epochs=1, mask_from=5), channels_last=False)
    assert len(seen) == 2
    masked.enabled = False
    fit(masked, batches(2), recipes.anytime(epochs=1), channels_last=False)
    assert len(seen) == 2, "who turned masks off trains without"


def test_without_masks_it_is_the_joint_recipe() -> None:
    one, other = plain(), plain()
    recipe = recipes.anytime(**SMALL, weights=(0.3, 1.0, 2.0))
    fit(one, batches(), recipe)
    fit(other, batches(), replace(recipe, anytime=None))
    for name, tensor in weights(other).items():
        torch.testing.assert_close(one.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_network_of_its_end_alone() -> None:
    net = offramp.attach(Guest(), X, exits=0)
    history = fit(net, batches(), recipes.anytime(**SMALL), validate=batches(1))
    assert history.columns == ("final",) and history.last.loss["final"] < history.epochs[0].loss["final"]
    assert set(history.last.validation) == {"loss", "agreement", "accuracy", "miou"}


def joints_by_hand(said: Tensor, goal: Tensor, joints: tuple[float, ...] = (1, 1, 1, 1)) -> Tensor:
    total, count = torch.zeros(()), 0.0
    for n, k in ((n, k) for n in range(6) for k in range(4)):
        if not goal[n, k].isnan().any():
            total, count = total + joints[k] * (said[n, k] - goal[n, k]).square().sum(), count + joints[k] * 24 * 20
    return total / count


@pytest.mark.parametrize("joints", [None, (1.0, 0.25, 1.0, 2.0)])
def test_heatmaps(joints: Any) -> None:
    masked, witness = make(confidence="value", share=0.4), make(confidence="value", share=0.4)
    recipe = recipes.anytime(**SMALL, says="heatmaps", channel_weights=joints, mask_from=1)
    history = fit(masked, poses(), recipe, channels_last=False, validate=poses(1))
    by_hand(witness, poses(), recipe, lambda said, goal: joints_by_hand(said, goal, joints or (1, 1, 1, 1)))
    for name, tensor in weights(witness).items():
        torch.testing.assert_close(masked.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        x, goal = poses(1)[0]
        said = witness.eval()(x)
    assert history.last.loss["final"] < history.epochs[0].loss["final"]
    assert set(history.last.validation) == {"loss", "macs", "density"} and not history.last.accuracy
    for k, name in enumerate(("stem", "body", "final")):
        wanted = joints_by_hand(said[k], goal, joints or (1, 1, 1, 1)).item()
        assert history.last.validation["loss"][name] == pytest.approx(wanted, rel=1e-3)
    with pytest.raises(DataError, match=r"float heatmaps \(6, 4, 24, 20\)"):
        fit(masked, batches(), recipe)
    with pytest.raises(DataError, match="labels"):
        fit(masked, poses(), recipes.anytime(epochs=1))


def test_where_no_heatmap_counts_nothing_is_lost() -> None:
    said = torch.randn(2, 3, 4, 5, requires_grad=True)
    loss = squared_error(said, torch.full((2, 3, 4, 5), torch.nan))
    loss.backward()
    assert loss.item() == 0 and said.grad is not None and not said.grad.any()
    with pytest.raises(OfframpError, match="one shape"):
        squared_error(said, said[:, :1])


class Killed(Exception):
    pass


@pytest.mark.parametrize("how", [{}, {"precision": "bf16"}, {"accumulate": 2}], ids=str)
def test_broken_off_and_resumed(how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.anytime(**{**SMALL, "epochs": 4}, mask_from=1,
                             augment_pair=recipes.scale_crop_flip(crop=(16, 12)))
    options: dict[str, Any] = {"checkpoint_every": 2, "validate": batches(1), **how}
    whole = make()
    first = fit(whole, batches(), recipe, run_dir=tmp_path / "whole", **options)
    left, save = iter(range(4)), checkpoint.save

    def save_then_die(*args: Any) -> None:
        save(*args)
        if next(left) == 2:
            raise Killed

    monkeypatch.setattr(checkpoint, "save", save_then_die)
    with pytest.raises(Killed):
        fit(make(), batches(), recipe, run_dir=tmp_path / "run", **options)
    monkeypatch.setattr(checkpoint, "save", save)
    resumed = make(seed=3)
    with pytest.raises(OfframpError, match="backbone differ"):
        fit(make(share=0.5), batches(), recipe, run_dir=tmp_path / "run", **options)
    second = fit(resumed, batches(), recipe, run_dir=tmp_path / "run", **options)
    assert any("resumed at step" in note for note in second.notes)
    assert_equal(weights(resumed), weights(whole))
    assert [{**asdict(e), "seconds": 0} for e in first.epochs] == [{**asdict(e), "seconds": 0} for e in second.epochs]
    kept = make(seed=7)
    restore(kept, tmp_path / "run")
    assert_equal(weights(kept), weights(whole))


def test_what_is_measured() -> None:
    masked, data = make(share=0.6), batches(2)
    history = fit(masked, data, recipes.anytime(**SMALL), validate=data, channels_last=False)
    found, names = history.last.validation, ("stem", "body", "final")
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    answers = masked.eval().answers(x)
    macs = masked.macs(x).double().mean(0)
    shares = [1.0, *(mask.double().mean().item() for mask in answers.masks)]
    for k, name in enumerate(names):
        said, valid = answers.logits[k].argmax(1), y != 255
        assert found["accuracy"][name] == pytest.approx(
            sum((said[n:n + 6] == y[n:n + 6])[valid[n:n + 6]].double().mean().item() for n in (0, 6)) / 2, abs=1e-6)
        assert found["miou"][name] == pytest.approx(
            jaccard_score(y[valid], said[valid], average="macro", labels=range(4)), abs=1e-6)
        assert found["macs"][name] == pytest.approx(macs[k].item())
        assert found["density"][name] == pytest.approx(shares[k])
    assert shares[2] < shares[1] == pytest.approx(0.4, abs=0.01) and found["loss"]["final"] == 0
    masked.enabled = False
    history = fit(masked, data, recipes.anytime(**SMALL), validate=data)
    assert set(history.last.validation["density"].values()) == {1.0}


def test_counted_is_answers_and_macs() -> None:
    masked = make().eval()
    for enabled in (True, False):
        masked.enabled = enabled
        answers, macs = masked.counted(X)
        with torch.no_grad():
            assert all(map(torch.equal, answers.logits, masked(X))) and torch.equal(macs, masked.macs(X))
        assert len(answers.masks) == 2 * enabled and not answers.logits[0].requires_grad


def test_every_exit_learns_scenes() -> None:
    masked = make(threshold=0.998)
    data = Scenes(24, size=(24, 20))
    labels = torch.stack([y for _, y in data])  # type: ignore[attr-defined]
    data = TensorDataset(torch.stack([x for x, _ in Scenes(24, size=(24, 20))]), labels.clamp(max=3))
    history = fit(masked, data, recipes.anytime(epochs=8, lr=0.05, batch_size=4))
    first, last = history.epochs[0], history.last
    for name in ("stem", "body", "final"):
        assert last.loss[name] < 0.8 * first.loss[name] and last.accuracy[name] > first.accuracy[name] + 0.05


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OfframpError, match=r"recipes.anytime\(\) for a masked network"):
        fit(make(), batches(), recipes.joint())
    with pytest.raises(OfframpError, match="labels pixels"):
        fit(Guest(), batches(), recipes.anytime(epochs=1))
    with pytest.raises(OfframpError, match="3 weights"):
        fit(make(), batches(), recipes.anytime(epochs=1, weights=(1.0, 1.0)))
    with pytest.raises(OfframpError, match="4 channel_weights, not 2"):
        fit(make(), batches(), recipes.anytime(epochs=1, channel_weights=(1.0, 1.0)))
    with pytest.raises(OfframpError, match="engine 'eager'"):
        fit(make(), batches(), recipes.anytime(epochs=1), engine="compile")
    with pytest.raises(OfframpError, match="says classes or heatmaps.*mask_from.*channel_weights"):
        AnytimeStep(says="poses", mask_from=-1, channel_weights=(0.0,))  # type: ignore[arg-type]
    with pytest.raises(OfframpError, match="loss_stride 1"):
        recipes.anytime(epochs=1, says="heatmaps", loss_stride=2)
    with pytest.raises(OfframpError, match="beside anytime"):
        Recipe(loss="labels", epochs=1, anytime=AnytimeStep())


def test_a_recipe_as_json() -> None:
    import json

    said = recipes.anytime(epochs=1, channel_weights=[1, 2], mask_from=3).to_json()
    assert json.loads(json.dumps(said)) == said
    assert said["data"]["anytime"] == {"says": "classes", "mask_from": 3, "channel_weights": [1, 2]}
    assert "anytime" not in recipes.joint().to_json()["data"], "checkpoints that are older go on"

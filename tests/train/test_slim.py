"""Training of widths: Algorithm 1 by hand, teachers, the sandwich, going on after a break, and what is left behind."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import jaccard_score
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from offramp.data.scenes import Scenes
from offramp.errors import DataError, OfframpError, WidthError
from offramp.nn.slim import slim_
from offramp.train import Recipe, checkpoint, fit, recipes, restore
from offramp.train.recipe import SlimStep
from train.fakes import assert_equal, images, weights
from train.fakes import make as make_exits
from train.slim_fakes import WIDTHS, ByHand, batches, make, plain

torch.set_num_threads(1)
FULL: dict[str, Any] = {"epochs": 1, "boundary": "0", "radius": 1, "tau": 0.5}


@pytest.mark.parametrize("how", [
    {"epochs": 1},
    {"epochs": 1, "ohem": False},
    {"epochs": 1, "distill": None},
    {"epochs": 1, "weights": (0.0, 1.0), "radius": 2},
    {**FULL, "weights": (10.0, 0.0)},
    *({**FULL, "distill": rule} for rule in ("prev", "largest", "mean", "larger", None)),
    {**FULL, "tau": 0.999},
], ids=str)
def test_three_steps_are_algorithm_1_by_hand(how: dict[str, Any]) -> None:
    net, recipe, data = make(), recipes.slim(**how, lr=0.05), batches(3)
    expected = ByHand(net, recipe, data[0][0][:1]).train(data)
    before = weights(net)
    fit(net, data, recipe, channels_last=False)
    for name, tensor in net.state_dict().items():
        assert torch.allclose(tensor, expected[name], rtol=1e-4, atol=1e-5), name
        assert "weight" not in name or not torch.allclose(tensor, before[name], rtol=1e-3, atol=1e-4), name


def test_no_gradient_of_a_narrow_width_reaches_what_only_the_wide_one_has() -> None:
    def first_step(rule: Any) -> dict[str, Tensor]:
        net = make()
        fit(net, batches(1), recipes.slim(epochs=1, distill=rule))
        return weights(net)

    learnt, alone = first_step("prev"), make((1.0,))
    fit(alone, batches(1), recipes.slim(epochs=1))
    for name, tensor in weights(alone).items():
        if name == "backbone.2.bias":
            continue  # of all widths
        mine = learnt[name]
        if tensor.ndim == 4:  # what lies beyond the channels of the next width
            mine, tensor = (t[16:] if t.shape[0] > 4 else t[:, 16:] for t in (mine, tensor))
        assert torch.allclose(mine, tensor, atol=1e-7), name


def test_mean_and_larger_are_one_rule() -> None:
    one, other = make(), make()
    fit(one, batches(), recipes.slim(**{**FULL, "distill": "mean"}))
    fit(other, batches(), recipes.slim(**{**FULL, "distill": "larger"}))
    assert_equal(weights(one), weights(other))


def test_a_plain_network_is_one_of_a_single_width() -> None:
    dense, slimmable, narrow = plain(), make((1.0,)), make().narrow(0.5)
    fit(dense, batches(), recipes.slim(**FULL))
    fit(slimmable, batches(), recipes.slim(**FULL))
    assert_equal(weights(dense), {name.removeprefix("backbone."): t for name, t in weights(slimmable).items()})
    before = weights(narrow)
    history = fit(narrow, batches(), recipes.slim(**FULL), validate=batches(1))
    assert history.columns == ("1",) and set(history.last.validation["miou"]) == {"1"}
    assert not any(torch.equal(before[name], t) for name, t in weights(narrow).items() if name.endswith("weight"))


def visits(net: nn.Module) -> list[float]:
    """The width of each call in train mode."""
    seen: list[float] = []
    net.backbone[0].conv.register_forward_hook(lambda *_: seen.append(net.width) if net.backbone.training else None)  # type: ignore
    return seen


def test_all_widths_are_visited_from_wide_to_narrow() -> None:
    net = make()
    seen = visits(net)
    fit(net, batches(2), recipes.slim(epochs=1), channels_last=False)
    assert seen == [1.0, 0.5, 0.25] * 2


def test_the_sandwich_visits_both_ends_and_some_between() -> None:
    net = make((0.25, 0.5, 0.75, 1.0))
    seen = visits(net)
    history = fit(net, batches(8), recipes.slim(epochs=2, sandwich=1, distill="largest"), channels_last=False)
    triples = list(zip(seen[::3], seen[1::3], seen[2::3], strict=True))[:16]
    assert {(a, c) for a, _, c in triples} == {(1.0, 0.25)} and {b for _, b, _ in triples} == {0.5, 0.75}
    assert history.last.loss.keys() == {"1", "0.75", "0.5", "0.25"} and "4 widths on 48 samples" in history.notes[-1]
    one, two = make(), make((0.25, 0.5, 1.0))
    seen = visits(one)
    fit(one, batches(2), recipes.slim(epochs=1, sandwich=0), channels_last=False)
    assert seen[:4] == [1.0, 0.25, 1.0, 0.25]
    fit(two, batches(2), recipes.slim(epochs=1, sandwich=9), channels_last=False)
    assert torch.isfinite(torch.cat([t.flatten().float() for t in two.state_dict().values()])).all()


def test_after_the_sandwich_norms_have_the_statistics_of_the_data() -> None:
    net, data = make(), batches(3)
    fit(net, data, recipes.slim(epochs=1, sandwich=0))
    for width, kept in ((1.0, 32), (0.5, 16), (0.25, 8)):
        said = [torch.conv2d(x, net.backbone[0].conv.weight[:kept], None, 1, 1) for x, _ in data]  # type: ignore[index]
        bn = net.backbone[0].bn  # type: ignore[index]
        norm = bn if width == 1.0 else bn.get_submodule(f"at_{width}".replace(".", ":"))
        assert torch.allclose(norm.running_mean, torch.stack([t.mean((0, 2, 3)) for t in said]).mean(0), atol=1e-5)


class Killed(Exception):
    pass


@pytest.mark.parametrize("how", [
    {**FULL, "epochs": 2, "augment_pair": recipes.scale_crop_flip()},
    {"epochs": 2, "sandwich": 1, "weights": (0.0, 1.0), "loss_stride": 2},
], ids=["boundary", "sandwich"])
def test_broken_off_and_resumed(how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(net: nn.Module, folder: str, **more: Any) -> Any:
        return fit(net, batches(), recipes.slim(**how), run_dir=tmp_path / folder, checkpoint_every=2,
                   validate=batches(1, seed=9), **more)

    widths = (0.25, 0.5, 0.75, 1.0)
    net, other, resumed = make(widths), make(widths), make(widths)
    whole = run(net, "whole")
    save, left = checkpoint.save, iter(range(3))

    def save_then_die(*args: Any) -> None:
        save(*args)
        if next(left) == 2:
            raise Killed

    monkeypatch.setattr(checkpoint, "save", save_then_die)
    with pytest.raises(Killed):
        run(other, "run")
    monkeypatch.setattr(checkpoint, "save", save)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    torch.manual_seed(77)
    history = run(resumed, "run")
    assert any("resumed at step 6" in note for note in history.notes)
    assert_equal(weights(net), weights(resumed))
    assert [{**asdict(e), "seconds": 0} for e in whole.epochs] == [{**asdict(e), "seconds": 0} for e in history.epochs]
    again = make(widths, seed=1)
    assert restore(again, tmp_path / "run").epochs == history.epochs
    assert_equal(weights(net), weights(again))
    assert run(make(widths), "run").epochs == history.epochs, "a finished run is not trained again"


def test_the_head_leaves_no_trace(tmp_path: Path) -> None:
    net = make()
    names, keys = [name for name, _ in net.named_modules()], list(net.state_dict())
    fit(net, batches(), recipes.slim(**FULL), run_dir=tmp_path)
    assert names == [name for name, _ in net.named_modules()] and keys == list(net.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    tensors, _ = checkpoint.load(tmp_path / "checkpoint.safetensors")
    learnt = [name for name in tensors if name.startswith("extra.")]
    assert "extra.backbone.0.weight" in learnt and "extra.backbone.1.at_0:25.bias" in learnt
    x = batches(1)[0][0]
    net.eval()
    for width in WIDTHS:
        with torch.no_grad(), net.at(width=width):
            assert torch.allclose(net(x), net.narrow(width)(x), atol=1e-5)


def test_validation_is_counted_on_every_width() -> None:
    net, ((x, y),) = make(), batches(1, seed=8)
    said = fit(net, batches(), recipes.slim(epochs=1), validate=[(x[:4], y[:4]), (x[4:], y[4:])]).last.validation
    net.eval()
    with torch.no_grad():
        answers = {width: net(x).argmax(1) for width in WIDTHS if not setattr(net, "width", width)}
    known = y != 255
    for width, name in ((0.25, "0.25"), (0.5, "0.5"), (1.0, "1")):
        right = [(answers[width] == y)[part][known[part]].double().mean() for part in (slice(0, 4), slice(4, 6))]
        assert said["accuracy"][name] == pytest.approx(float(right[0] * 4 + right[1] * 2) / 6)
        assert said["agreement"][name] == pytest.approx((answers[width] == answers[1.0]).double().mean().item())
        assert said["miou"][name] == pytest.approx(jaccard_score(y[known], answers[width][known], average="macro"))
    assert said["loss"]["1"] == 0 < said["loss"]["0.25"]


def test_classifiers_have_widths_too() -> None:
    net = slim_(nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                              nn.Flatten(), nn.Linear(32, 4)), WIDTHS, example_inputs=torch.zeros(2, 3, 8, 8))
    x = images(64)
    data = TensorDataset(x, (x[:, 0].mean((1, 2)) > 0).long() + 2 * (x[:, 1].mean((1, 2)) > 0))
    history = fit(net, data, recipes.slim(epochs=30, lr=0.1, batch_size=32, ohem=False), validate=data)
    assert min(history.last.accuracy.values()) > 0.6
    assert set(history.last.validation) == {"loss", "agreement", "accuracy"}
    with pytest.raises(DataError, match=r"labels \(N, H, W\)"):
        fit(net, data, recipes.slim(epochs=1, weights=(0.0, 1.0)))


@pytest.mark.parametrize("rule", ["prev", None])
def test_every_width_learns_scenes(rule: Any) -> None:
    recipe = recipes.slim(epochs=6, boundary="0", radius=1, lr=0.05, batch_size=4, distill=rule)
    history = fit(make(classes=11), Scenes(24, size=(24, 32)), recipe)
    first, last = history.epochs[0], history.last
    for name in ("1", "0.5", "0.25"):
        assert last.accuracy[name] > first.accuracy[name] + 0.1
        assert (rule and name != "1") or last.loss[name] < 0.9 * first.loss[name]  # a teacher gets surer, and harder


def test_half_precision_trains_the_passes() -> None:
    net, whole = make(), make()
    fit(net, batches(), recipes.slim(**FULL), precision="bf16")
    fit(whole, batches(), recipes.slim(**FULL))
    for name, tensor in weights(net).items():
        assert tensor.dtype == weights(whole)[name].dtype and torch.isfinite(tensor.float()).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OfframpError, match="one with exits"):
        fit(make_exits(), batches(), recipes.slim(epochs=1))
    with pytest.raises(OfframpError, match="slim_ gives it widths"):
        fit(plain(), batches(), recipes.joint(epochs=1))
    with pytest.raises(OfframpError, match="engine 'eager'"):
        fit(make(), batches(), recipes.slim(epochs=1), engine="compile")
    with pytest.raises(WidthError, match="did you mean"):
        fit(make(), batches(), recipes.slim(epochs=1, boundary="0.con"))
    with pytest.raises(OfframpError) as caught:
        SlimStep(teacher="next", boundary="a", tau=1.0, radius=0, sandwich=-1)  # type: ignore[arg-type]
    for word in ("teacher", "boundary_weight > 0", "tau", "radius", "sandwich"):
        assert word in str(caught.value)
    with pytest.raises(OfframpError, match="boundary_weight"):
        recipes.slim(epochs=1, weights=(10.0, 1.0))
    for wrong in ({"freeze": True}, {"dropout": "all", "freeze": False}, {"weights": (1.0,), "freeze": False}):
        with pytest.raises(OfframpError, match="beside slim"):
            Recipe(loss="labels", epochs=1, slim=SlimStep(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(OfframpError, match="no ema"):
        Recipe(loss="labels", epochs=1, freeze=False, ema=0.9, slim=SlimStep(sandwich=2))


def test_recipes_for_exits_say_nothing_of_widths() -> None:
    import json

    said = recipes.slim(**FULL, sandwich=2).to_json()
    assert json.loads(json.dumps(said)) == said and SlimStep(**said["data"]["slim"]) == recipes.slim(
        **FULL, sandwich=2).slim
    assert "slim" not in recipes.joint().to_json()["data"], "checkpoints that are older go on"

"""fit: what it learns from, what it leaves alone, what it says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from offramp.errors import DataError, FileFormatError, OfframpError
from offramp.nn.heads import HeadSpec
from offramp.train import fit, recipes, restore
from train.fakes import CONV, PLAIN, Teased, Tiny, assert_equal, images, labelled, make, unlabelled, weights

torch.set_num_threads(1)
SHORT = recipes.label_free(epochs=2, batch_size=32, lr=0.01)


@pytest.mark.parametrize("how", [
    {}, {"cache_bytes": 0}, {"precision": "bf16"}, {"cache_bytes": 0, "precision": "bf16"},
], ids=["cached", "live", "cached bf16", "live bf16"])
def test_frozen_means_frozen(how: dict[str, Any]) -> None:
    net = make()
    net.train()
    net.backbone.one.train(False)
    modes = [module.training for module in net.modules()]
    before, heads, rng = weights(net.backbone), weights(net.heads), torch.random.get_rng_state()
    history = fit(net, labelled(), SHORT, **how, validate=lambda net: {
        "gradients": any(p.requires_grad for p in net.backbone.parameters())})
    assert history.last.validation == {"gradients": False}, "the trunk's activations need not be kept"
    assert_equal(before, weights(net.backbone))
    assert any(not torch.equal(heads[name], tensor) for name, tensor in weights(net.heads).items())
    assert modes == [module.training for module in net.modules()]
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(rng, torch.random.get_rng_state())


@pytest.mark.parametrize("form", ["tuple", "dict", "loader", "dict loader"])
def test_no_label_is_ever_read(form: str) -> None:
    with pytest.raises(AssertionError, match="a label was read"):
        len(Teased("tuple")[0][1])
    data: Any = Teased(form)
    if "loader" in form:
        x, y = images(), Teased("tuple")[0][1]
        data = [{"x": part, "labels": y} if form == "dict loader" else (part, y) for part in x.split(32)]
    net, plain = make(), make()
    fit(net, data, SHORT)
    same: Any = list(images().split(32)) if "loader" in form else unlabelled()
    fit(plain, same, SHORT)
    assert_equal(weights(net), weights(plain))


def test_exits_come_to_agree_with_the_backbone() -> None:
    net = make()
    history = fit(net, unlabelled(), recipes.label_free(epochs=60, batch_size=32, lr=0.02), validate=unlabelled())
    assert history.last.agreement["two"] > 0.9 and history.epochs[0].loss["two"] > 3 * history.last.loss["two"]
    said = [logits.argmax(1) for logits in net.eval()(images())]
    for column, logits in zip(("one", "two"), said, strict=False):
        assert history.last.validation["agreement"][column] == pytest.approx(
            float((logits == said[-1]).double().mean()), abs=0.011)


def test_the_compiled_pass_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, wrap = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **how: compiled.append(how) or wrap(fn, **how))
    net, plain = make(PLAIN), make(PLAIN)
    fit(net, unlabelled(80), SHORT, engine="compile")  # batches of 32, 32 and 16
    fit(plain, unlabelled(80), SHORT)
    assert compiled == [{"dynamic": False}]
    for name, tensor in weights(net).items():
        torch.testing.assert_close(tensor, weights(plain)[name], atol=1e-4, rtol=1e-4)
    with pytest.raises(OfframpError, match="engine 'eager' or 'compile', not 'turbo'"):
        fit(net, unlabelled(), SHORT, engine="turbo")  # type: ignore[arg-type]


def test_all_heads_in_one_pass_are_what_each_alone_would_be() -> None:
    both, alone = make(PLAIN), make(PLAIN, exits=("two",))
    alone.heads.load_state_dict({n: t for n, t in both.heads.state_dict().items() if n.startswith("two")})
    alone.backbone.load_state_dict(both.backbone.state_dict())
    fit(both, unlabelled(), SHORT)
    fit(alone, unlabelled(), SHORT)
    for name, tensor in alone.heads.state_dict().items():
        assert torch.allclose(tensor, both.heads.state_dict()[name], atol=1e-6)


def test_cached_training_is_live_training_to_fp16() -> None:
    cached, live = make(HeadSpec(convs=((8, 3, 2),))), make(HeadSpec(convs=((8, 3, 2),)))
    recipe = replace(SHORT, optimiser="sgd", lr=0.02)  # AdamW would blow rounding up to whole steps
    first = fit(cached, unlabelled(), recipe)
    second = fit(live, unlabelled(), recipe, cache_bytes=0)
    assert "cached" in first.notes[0] and "not cached" in second.notes[0]
    for name, tensor in weights(cached).items():
        assert torch.allclose(tensor.float(), weights(live)[name].float(), rtol=0.01, atol=0.01), name


@pytest.mark.parametrize("recipe", [SHORT, recipes.joint(epochs=2, batch_size=32)], ids=["label_free", "joint"])
def test_accumulated_batches_are_one_batch(recipe: Any) -> None:
    whole, parts = make(PLAIN), make(PLAIN)
    for net in (whole, parts):
        net.backbone.one.bn = net.backbone.two.bn = net.backbone.three.bn = torch.nn.Identity()
    whole, parts = (_again(net) for net in (whole, parts))
    fit(whole, labelled(80), recipe)
    fit(parts, labelled(80), replace(recipe, batch_size=8), accumulate=4)
    for name, tensor in weights(whole).items():
        assert torch.allclose(tensor, weights(parts)[name], atol=1e-5), name


def _again(net: Any) -> Any:
    """Attached anew, since the guest was changed after tracing."""
    from offramp.nn.attach import attach

    torch.manual_seed(0)
    return attach(net.backbone, images(2), exits=["one", "two"], heads=PLAIN)


def test_joint_trains_everything_and_learns_the_labels() -> None:
    net = make()
    before = weights(net.backbone)
    history = fit(net, labelled(64), recipes.joint(epochs=30, batch_size=16, lr=0.05, weights=(0.3, 0.6, 1.0)))
    assert history.columns == ("one", "two", "final")
    assert history.last.accuracy["final"] > 0.8 > history.epochs[0].accuracy["final"]
    assert not torch.equal(before["one.conv.weight"], net.backbone.one.conv.weight)
    assert not torch.equal(before["one.bn.running_mean"], net.backbone.one.bn.running_mean)


@pytest.mark.parametrize("kind", ["joint", "label_free"])
def test_dense(kind: str) -> None:
    net = make(dense=True)
    data = labelled(32, dense=True)
    data.tensors[1][:, 0] = 255
    data.tensors[1][5] = 255
    recipe = getattr(recipes, kind)(epochs=2, batch_size=8)
    checks = labelled(8, dense=True)
    checks.tensors[1][:, 0] = 255
    history = fit(net, data, recipe, validate=checks)
    assert all(0 <= value <= 1 for value in history.last.agreement.values())
    assert set(history.last.accuracy) == ({"one", "two", "final"} if kind == "joint" else set())
    for column, said in zip(history.columns if kind == "joint" else (), net.eval()(images(8)), strict=False):
        right = (said.argmax(1) == checks.tensors[1])[:, 1:].double().mean()
        assert history.last.validation["accuracy"][column] == pytest.approx(float(right))


def test_clipping_and_the_mean_of_weights() -> None:
    nets = {}
    for name, change in {"plain": {}, "again": {}, "mean": {"ema": 0.9}, "clipped": {"clip": 0.01}}.items():
        nets[name] = make()
        fit(nets[name], unlabelled(), replace(SHORT, **change))
    weight = {name: net.heads["one"].last[-1].weight for name, net in nets.items()}
    assert torch.equal(weight["plain"], weight["again"])
    assert not torch.equal(weight["plain"], weight["mean"]) and not torch.equal(weight["plain"], weight["clipped"])


def test_what_is_not_a_number_stops_with_the_step_and_spares_the_weights() -> None:
    net = make()
    with pytest.raises(OfframpError, match=r"step [1-9].*lower lr"):
        fit(net, labelled(), recipes.joint(epochs=20, batch_size=16, lr=1e18))
    x = images()
    x[3, 0, 0, 0] = float("nan")
    net = make()
    before = weights(net)
    with pytest.raises(DataError, match="NaN"):
        fit(net, TensorDataset(x), SHORT)
    with pytest.raises(OfframpError, match="one, two"):
        fit(net, TensorDataset(x[:32]), SHORT, cache_bytes=0)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_log_and_history_say_the_same(tmp_path: Path) -> None:
    history = fit(make(), unlabelled(), SHORT, run_dir=tmp_path, validate=lambda net: {"mine": len(net.columns)})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "epoch", "epoch"]
    assert lines[-1]["agreement"] == history.last.agreement and lines[-1]["validation"] == {"mine": 3}
    assert "two" in str(history)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "log.jsonl"]


def test_restore_gives_back_the_heads(tmp_path: Path) -> None:
    net, other = make(), make(seed=0)
    history = fit(net, unlabelled(), SHORT, run_dir=tmp_path)
    assert restore(other, tmp_path) == history
    assert_equal(weights(net), weights(other))
    with pytest.raises(FileFormatError, match="heads"):
        restore(make(PLAIN), tmp_path)
    with pytest.raises(DataError):
        restore(other, tmp_path / "none")


@pytest.mark.parametrize(("data", "why"), [
    ([], "empty"), (TensorDataset(torch.zeros(0, 3, 8, 8)), "empty"), (3, "int"), (iter([1]), "iterator"),
], ids=["no batch", "no row", "number", "iterator"])
def test_unusable_data(data: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        fit(make(), data, SHORT)


def test_joint_without_labels_says_what_to_do() -> None:
    with pytest.raises(DataError, match="label_free"):
        fit(make(), unlabelled(), recipes.joint(epochs=1))


def test_a_loader_of_ones_share_is_refused() -> None:
    sampler: Any = DistributedSampler(unlabelled(), num_replicas=2, rank=0)
    with pytest.raises(DataError, match="DistributedSampler"):
        fit(make(), DataLoader(unlabelled(), batch_size=8, sampler=sampler), SHORT)


def test_faults_of_the_call_come_together() -> None:
    with pytest.raises(OfframpError) as caught:
        fit(make(), unlabelled(), recipes.label_free(weights=[1.0]), accumulate=0, cache_bytes=-1,
            precision="int8")  # type: ignore[arg-type]
    for word in ("2 weights", "accumulate", "cache_bytes", "precision"):
        assert word in str(caught.value)


def test_a_head_that_takes_no_gradient_is_left() -> None:
    net = make(CONV)
    net.heads["one"].requires_grad_(False)
    before = net.heads["one"].last[-1].weight.clone()
    fit(net, unlabelled(), SHORT)
    assert torch.equal(before, net.heads["one"].last[-1].weight)
    assert not net.heads["one"].last[-1].weight.requires_grad
    net.heads.requires_grad_(False)
    with pytest.raises(OfframpError, match="something to train"):
        fit(net, unlabelled(), SHORT)


def test_the_guest_is_the_callers_own() -> None:
    assert isinstance(make().backbone, Tiny)

"""One step: who is computed, who learns, on which grid, and what is said of it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import jaccard_score
from torch import nn
from torch.nn import functional as F

from offramp.functional.losses import positive_filtering
from offramp.nn.attach import attach
from offramp.nn.heads import HeadSpec
from offramp.train import fit, recipes
from offramp.train.batches import Batch
from offramp.train.step import Exits, Pass
from train.fakes import PLAIN, Tiny, assert_equal, images, labelled, make, weights

torch.set_num_threads(1)
FLAT = HeadSpec(convs=((8, 3, 2),))
WIDE: Any = {site: {f"h{k}": FLAT for k in range(3)} for site in ("one", "two")}


def calls(net: Any) -> dict[str, int]:
    """How often each head was asked in train mode."""
    seen = dict.fromkeys(net.heads, 0)

    def count(name: str) -> Any:
        def hook(module: nn.Module, *_: Any) -> None:
            seen[name] += module.training
        return hook

    for name, head in net.heads.items():
        head.register_forward_hook(count(name))
    return seen


def test_exit_dropout_computes_and_changes_one_early_exit_a_step() -> None:
    net = make(dense=True)
    before, seen = weights(net), calls(net)
    history = fit(net, labelled(24, dense=True), recipes.exit_aware(epochs=1))
    assert seen == {"one": 2, "two": 1}, "three steps"
    assert set(history.last.loss) == {"one", "two", "final"}
    net = make(dense=True)
    history = fit(net, labelled(8, dense=True), recipes.exit_aware(epochs=1))
    changed = {name for name, tensor in weights(net).items() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith("heads.two") for name in changed)
    assert {"heads.one.last.1.weight", "backbone.three.conv.weight", "backbone.last.weight"} <= changed
    assert set(history.last.loss) == {"one", "final"}


def test_what_weighs_nothing_is_not_computed() -> None:
    net, other = make(), make()
    before, seen = weights(net), calls(net)
    history = fit(net, labelled(24), recipes.final_only(epochs=1), validate=labelled(8))
    assert seen == {"one": 0, "two": 0}
    assert history.columns == ("final",) and set(history.last.validation["accuracy"]) == {"final"}
    assert all(torch.equal(before[n], t) for n, t in weights(net).items() if n.startswith("heads"))
    fit(other, labelled(24), replace(recipes.joint(epochs=1, lr=0.02, weight_decay=1e-4, warmup=0.0, batch_size=8),
                                     weights=(0.0, 0.0, 1.0)))
    assert_equal(weights(net), weights(other))


@pytest.mark.parametrize("how", [{}, {"cache_bytes": 0}, {"precision": "bf16"}], ids=["cached", "live", "bf16"])
@pytest.mark.parametrize("kind", ["frozen", "kd", "self_distill", "mess"])
def test_the_second_stage_spares_the_network(kind: str, how: dict[str, Any]) -> None:
    net = make(dense=True)
    before, heads = weights(net.backbone), weights(net.heads)
    history = fit(net, labelled(16, dense=True), getattr(recipes, kind)(epochs=2), **how)
    assert history.columns == ("one", "two")
    assert_equal(before, weights(net.backbone))
    assert any(not torch.equal(heads[name], tensor) for name, tensor in weights(net.heads).items())


def test_labels_are_cached_with_the_features() -> None:
    nets, said = [], []
    for how in ({}, {"cache_bytes": 0}):
        nets.append(make(FLAT, dense=True))
        data = labelled(16, dense=True)
        data.tensors[1][:, :2] = 255
        history = fit(nets[-1], data, recipes.mess(epochs=3, loss_stride=2, lr=0.1), **how)
        assert ("not cached" in history.notes[0]) == bool(how)
        said.append(history.last)
    for name in ("loss", "accuracy"):
        assert getattr(said[0], name) == pytest.approx(getattr(said[1], name), rel=0.01)
    for name, tensor in weights(nets[0]).items():
        assert torch.allclose(tensor.float(), weights(nets[1])[name].float(), atol=0.01), name


def prepared(net: Any, recipe: Any, steps: int = 1) -> tuple[Pass, Pass]:
    """One head after another, and all in one graph."""
    net.train()
    net.backbone.eval().requires_grad_(False)
    exits, accelerator = Exits(net, heads_alone=False, stride=recipe.loss_stride), Accelerator(cpu=True)
    apart, whole = (Pass(net, recipe, exits, exits, accelerator, steps) for _ in range(2))
    assert apart.one_by_one
    whole.one_by_one = False
    return apart, whole


def gradients(net: nn.Module) -> dict[str, Any]:
    found = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    return found


def test_eenet_weighs_by_depth_and_distils_in_the_last_quarter() -> None:
    net = make(PLAIN)
    data = labelled(8)
    batch = Batch(args=(data.tensors[0],), labels=data.tensors[1])
    recipe = recipes.eenet(3, epochs=1, freeze=True)
    assert recipe.weights == (1 / 12, 2 / 12) and recipes.eenet(3).weights == (1 / 12, 2 / 12, 3 / 12)
    apart, whole = prepared(net, recipe, steps=4)
    with torch.no_grad():
        teacher = net.backbone(data.tensors[0])
    for step, distill in ((2, 0.0), (3, 0.01)):
        heads = Exits(net, heads_alone=False)
        frontiers, _ = heads.frontiers(batch)
        loss = torch.zeros(())
        for e, weight in enumerate(recipe.weights):
            logits = heads.head(e, frontiers[heads.sites[e]])
            said, taught = (logits / 3).softmax(1), (teacher / 3).softmax(1)
            loss = loss + weight * F.cross_entropy(logits, data.tensors[1]) \
                + distill * 9 * (taught * (taught / said).log()).sum(1).mean()
        loss.backward()
        wanted = gradients(net)
        for one in (apart, whole):
            one(batch, step, 8, 1.0)
            for name, grad in gradients(net).items():
                assert (grad is None) == (wanted[name] is None) == name.startswith("backbone")
                assert grad is None or torch.allclose(grad, wanted[name], atol=1e-6), (step, name)
    with pytest.raises(ValueError, match="distill=0 beside the kd loss"):
        replace(recipe, loss="kd")


def test_head_by_head_is_all_at_once() -> None:
    net = make(FLAT, dense=True)
    apart, whole = prepared(net, recipes.mess(epochs=1, weights=(0.3, 2.0)))
    batch = Batch(args=(images(4),), labels=labelled(4, dense=True).tensors[1])
    one = apart(batch, 0, 4, 0.5), gradients(net)
    all_ = whole(batch, 0, 4, 0.5), gradients(net)
    assert torch.allclose(one[0], all_[0])
    for name, grad in one[1].items():
        assert (grad is None) == name.startswith("backbone")
        assert grad is None or torch.allclose(grad, all_[1][name], atol=1e-7), name
    equal, _ = prepared(net, recipes.mess(epochs=1))
    equal(batch, 0, 4, 1.0)
    for name, parameter in net.heads.named_parameters():
        weight = 0.5 * (0.3 if name.startswith("one") else 2.0)
        assert torch.allclose(parameter.grad * weight, one[1][f"heads.{name}"], atol=1e-6), name


def test_one_head_at_a_time_holds_a_graph() -> None:
    net = make(WIDE, dense=True)
    apart, _ = prepared(net, recipes.mess(epochs=1))
    alive, most = [0], [0]

    class Held(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            alive[0] -= 1
            return grad

    for head in net.heads.values():
        head.register_forward_hook(lambda module, args, out: Held.apply(out))
    apart(Batch(args=(images(2),), labels=labelled(2, dense=True).tensors[1]), 0, 2, 1.0)
    assert (alive, most) == ([0], [1])


def test_losses_on_a_coarser_grid() -> None:
    net = make(FLAT, dense=True)
    asked: list[str] = []
    for head in net.heads.values():
        head.register_forward_hook(lambda *_: asked.append("full size"))
    data, stride = labelled(4, dense=True), 4
    apart, _ = prepared(net, recipes.mess(epochs=1, loss_stride=stride))
    sums = apart(Batch(args=(images(4),), labels=data.tensors[1]), 0, 4, 1.0)
    assert not asked, "heads that can stop before the last resizing do"
    with torch.no_grad():
        said = net(images(4))
        teacher = F.interpolate(said[-1], (2, 2), mode="bilinear")
        for k in range(2):  # maps of 4x4 and 2x2, brought to 2x2
            head = net.heads[("one", "two")[k]]
            site = net.step(0, net.begin(images(4)))[0]
            site = site if k == 0 else net.step(1, site)[0]
            coarse = F.interpolate(head.coarse(*site.tensors), (2, 2), mode="bilinear")
            loss = positive_filtering(coarse, data.tensors[1][:, 2::4, 2::4], teacher)
            assert sums[k, 0] == pytest.approx(4 * loss.item(), rel=1e-4)


def test_a_head_without_coarse_logits_is_resized() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 4, 1)

        def forward(self, *frontier: Any) -> Any:
            return self.conv(frontier[-1])

    net = attach(Tiny(dense=True).eval(), images(2), exits=["one"], heads=lambda *_: Own())
    history = fit(net, labelled(8, dense=True), recipes.mess(epochs=1, loss_stride=2))
    assert history.last.loss["one"] > 0


def test_of_many_exits_some_are_looked_at_in_a_step() -> None:
    net = make({"one": {f"h{k}": PLAIN for k in range(20)}}, exits=("one",))  # type: ignore[arg-type]
    history = fit(net, labelled(16), recipes.mess(epochs=1))
    assert len(history.last.loss) == 20 and 10 <= len(history.last.accuracy) < 20, "two steps, a third in each"
    assert "-" in str(history).splitlines()[-1] or "-" in str(history).splitlines()[-2]
    history = fit(net, labelled(32), recipes.mess(epochs=1))
    assert len(history.last.accuracy) == 20


def test_validation_tells_the_miou_of_each_exit() -> None:
    net, data = make(dense=True), labelled(12, dense=True)
    data.tensors[1][data.tensors[1] == 3] = 2  # a class that does not occur, unless it is said
    data.tensors[1][:, 0] = 255
    for recipe, columns in ((recipes.mess(epochs=1), ("one", "two", "final")),
                            (recipes.exit_aware(epochs=1), ("one", "two", "final"))):
        history = fit(net, labelled(16, dense=True), recipe, validate=data)
        found = history.last.validation["miou"]
        assert tuple(found) == columns
        with torch.no_grad():
            said = net.eval()(data.tensors[0])
        for column, logits in zip(columns, said, strict=True):
            wanted = data.tensors[1] != 255
            truth, answers = data.tensors[1][wanted].numpy(), logits.argmax(1)[wanted].numpy()
            occur = sorted({*truth.tolist(), *answers.tolist()})
            assert found[column] == pytest.approx(jaccard_score(truth, answers, labels=occur, average="macro"))
        assert "mIoU" in history.last.brief and "val. miou" in str(history)
    assert "miou" not in fit(make(), labelled(16), recipes.joint(epochs=1), validate=labelled(8)).last.validation


class Viewing(Tiny):
    """Reshapes with ``view``, which channels last does not allow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.one(x))
        return self.last(self.three(x.view(len(x), -1).view(x.shape)).mean((2, 3)))


def test_channels_last_is_for_training_alone() -> None:
    nets = {wanted: make(FLAT) for wanted in (True, False, None)}
    inside = {}

    def look(net: Any) -> dict[str, Any]:
        return {"last": net.backbone.two.conv.weight.is_contiguous(memory_format=torch.channels_last)}

    for wanted, net in nets.items():
        history = fit(net, labelled(32), recipes.joint(epochs=1, batch_size=16), channels_last=wanted, validate=look)
        inside[wanted] = history.last.validation["last"]
        assert all(p.is_contiguous() for p in net.parameters())
    assert inside == {True: True, False: False, None: True}
    for name, tensor in weights(nets[True]).items():
        assert torch.allclose(tensor.float(), weights(nets[False])[name].float(), atol=1e-4), name
    torch.manual_seed(0)
    net = attach(Viewing().eval(), images(2), exits=["one"], heads=FLAT)
    history = fit(net, labelled(32), recipes.joint(epochs=1, batch_size=16))
    assert "channels first" in history.notes[0] and "view" in history.notes[0]

"""Exits of a frozen network at all its widths: a step by hand, one network an exit, going on, and what stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import offramp
from offramp.errors import OfframpError
from offramp.nn.multiexit import MultiExit
from offramp.nn.slim import Slimmable
from offramp.train import fit, recipes, restore
from runtime.nets import stir_

torch.set_num_threads(1)
WIDTHS = (0.25, 0.5, 1.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.last = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.one(x)).mean((2, 3)))  # type: ignore[no-any-return]


def plain() -> MultiExit:
    torch.manual_seed(0)
    net = offramp.attach(Net(), torch.randn(2, 3, 8, 8), exits=["one"], heads=offramp.HeadSpec(convs=((16, 3, 1),)))
    stir_(net)
    return net


def make(widths: tuple[float, ...] = WIDTHS) -> tuple[Slimmable, MultiExit]:
    exits = plain()
    net = offramp.slim_(exits, widths, example_inputs=torch.randn(2, 3, 8, 8))
    return net, exits


def batches(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 8, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_steps_are_those_by_hand() -> None:
    net, exits = make()
    other, by_hand = make()
    recipe = recipes.label_free(epochs=1, temperature=2.0, weight_decay=0.1)
    history = fit(net, batches(), recipe, channels_last=False, progress=False)

    head = by_hand.head("one").train()
    deep = [p for p in head.parameters() if p.ndim > 1]
    flat = [p for p in head.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW([{"params": deep, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}])
    losses = []
    for step, x in enumerate(batches()):
        for group in adam.param_groups:
            group["lr"] = recipe.lr_at(step, 3)
        losses.append([])
        for width in WIDTHS:
            with torch.no_grad():
                narrow = other.narrow(width).eval()
                told, features = narrow.backbone(x), narrow.backbone.one(x)
            with other.at(width):
                said = head(features)
            loss = 4 * F.kl_div((said / 2).log_softmax(1), (told / 2).softmax(1), reduction="batchmean")
            losses[-1].append(loss.item())
            loss.backward()
        adam.step()
        adam.zero_grad()
    before, expected = state(make()[1].heads), state(by_hand.heads)
    for name, tensor in exits.heads.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
        assert name.endswith("num_batches_tracked") or not torch.allclose(tensor, before[name], atol=1e-4), name
    assert history.columns == ("one@0.25", "one@0.5", "one")
    assert list(history.last.loss.values()) == pytest.approx(torch.tensor(losses).mean(0).tolist(), rel=1e-4)
    untouched = state(make()[1].backbone)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in exits.backbone.state_dict().items())
    assert net.width == 1.0 and net.training


def test_a_network_of_one_width_is_one_with_exits() -> None:
    net, slim = make((1.0,))
    other = plain()
    for one in (net, other):
        fit(one, batches(), recipes.label_free(epochs=2), cache_bytes=0, progress=False)
    assert all(torch.equal(tensor, other.heads.state_dict()[name]) for name, tensor in slim.heads.state_dict().items())


def test_measured_at_each_width() -> None:
    net, _ = make()
    held = batches(1)
    said = fit(net, batches(), recipes.label_free(epochs=1), validate=held, progress=False).last.validation
    with torch.no_grad():
        for width in WIDTHS:
            early, end = net.narrow(width).eval()(held[0])
            name = "one" if width == 1 else f"one@{width:g}"
            assert said["agreement"][name] == pytest.approx(float((early.argmax(1) == end.argmax(1)).double().mean()))
            apart = F.kl_div(early.log_softmax(1), end.softmax(1), reduction="batchmean")
            assert said["loss"][name] == pytest.approx(float(apart), rel=1e-3)


def test_found_again_and_restored(tmp_path: Path) -> None:
    net, exits = make()
    how: dict[str, Any] = {"run_dir": tmp_path, "progress": False}
    fit(net, batches(), recipes.label_free(epochs=1), **how)
    again, others = make()
    fit(again, batches(), recipes.label_free(epochs=1), **how)
    third, restored = make()
    restore(third, tmp_path)
    for name, tensor in exits.heads.state_dict().items():
        assert torch.equal(tensor, others.heads.state_dict()[name])
        assert torch.equal(tensor, restored.heads.state_dict()[name])


def test_what_it_is_not_for() -> None:
    net, _ = make()
    labelled = [(x, torch.zeros(8, dtype=torch.int64)) for x in batches(1)]
    with pytest.raises(OfframpError, match="leaves the network as it is"):
        fit(net, labelled, recipes.joint(epochs=1))
    with pytest.raises(OfframpError, match="without exits"):
        fit(net, labelled, recipes.slim(epochs=1))
    with pytest.raises(OfframpError, match="eager"):
        fit(net, batches(1), recipes.label_free(epochs=1), engine="compile")

"""The bridge to pictures: a walk says what the network says, with its costs and masks, and times are measured."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import offramp
from offramp import Plan, RedesignedSpec, Thresholds, mask_
from offramp.cost.macs import count
from offramp.errors import OfframpError
from offramp.report import Walk, load_walk, save_walk
from offramp.walks import times_of, walk


class Guest(nn.Module):
    """Logits of four classes at 1/2, resized."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.three, self.last = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(self.three(self.two(self.one(x).relu()).relu()).relu())
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear")


X = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(3))


def network() -> offramp.MultiExit:
    torch.manual_seed(0)
    heads = {name: RedesignedSpec(down=1, channels=4) for name in ("one", "two")}
    return offramp.attach(Guest(), torch.rand(2, 3, 16, 24), exits=["one", "two"], heads=heads, keep_costly=True).eval()


def agrees(found: Walk, logits: list[torch.Tensor], **kept: Any) -> None:
    assert [step.name for step in found.steps] == ["one", "two", "final"] and found.num_classes == 4
    for step, said in zip(found.steps, logits, strict=True):
        assert torch.equal(step.predictions.long(), said[0].argmax(0))
        assert torch.allclose(step.confidence, said[0].softmax(0).amax(0))


def test_a_network_without_masks_says_what_it_says_and_is_timed() -> None:
    net = network().train()
    label = torch.randint(0, 6, (16, 24))
    found = walk(net, X, label=label, name="x", class_names=list("abcd"))
    assert net.training, "left as it was"
    with torch.no_grad():
        agrees(found, net.eval()(X))
    assert found.timed and not found.masked and found.class_names == tuple("abcd")
    assert found.steps[-1].macs == count(net, X).total, "all heads and the end"
    assert torch.equal(found.label, label.where(label < 4, -1).short())  # type: ignore[arg-type]
    assert found.image.dtype == torch.uint8 and found.image.shape == (3, 16, 24)


def test_a_masked_networks_masks_and_what_sparse_execution_costs(tmp_path: Any) -> None:
    masked = mask_(network(), share=0.5)
    with torch.no_grad():
        answers = masked.answers(X)
    found = walk(masked, X, timed=[1.0, 2.0, 3.5])
    agrees(found, answers.logits)
    assert found.masked and [step.elapsed_ms for step in found.steps] == [1.0, 2.0, 3.5]
    assert [step.macs for step in found.steps] == masked.macs(X)[0].tolist()
    for step, mask in zip(found.steps, answers.masks, strict=False):
        size = mask.shape[2]
        assert torch.equal(step.active, mask[0, 0].repeat_interleave(16 // size, 0).repeat_interleave(16 // size, 1))
    assert found.steps[-1].active is None and not walk(masked, X).timed, "a simulation's clock says nothing"
    again = load_walk(save_walk(found, tmp_path / "walk.json"))
    assert again.shares(0) is None and [step.macs for step in again.steps] == [step.macs for step in found.steps]


def test_a_deployed_network_goes_exit_by_exit_and_is_timed() -> None:
    net = network()
    plan = Plan(exits=("one", "two"), policy=Thresholds(thresholds=(1.0, 1.0)), task="dense", setting="anytime")
    found = walk(offramp.deploy(net, plan), X)
    with torch.no_grad():
        said = net(X)
    for step, logits in zip(found.steps, said, strict=True):
        assert (step.predictions == logits[0].argmax(0)).float().mean() > 0.99
    assert found.timed and found.steps[-1].macs == count(net, X).total
    # only the head of the plan is there: the other costs nothing, and says nothing
    alone = walk(offramp.deploy(net, Plan(exits=("two",), policy=Thresholds(thresholds=(1.0,)), task="dense",
                                          setting="anytime")), X)
    assert [step.name for step in alone.steps] == ["two", "final"]
    assert alone.steps[-1].macs < found.steps[-1].macs  # type: ignore[operator]


@pytest.mark.parametrize("criterion", ["entropy", "margin", "value", "random"])
def test_confidence_is_that_of_the_masks(criterion: Any) -> None:
    masked = mask_(network(), confidence=criterion, share=0.5)
    found = walk(masked, X, timed=[1.0, 2.0, 3.0])
    assert found.measure == ("top" if criterion == "random" else criterion)
    if criterion == "entropy":
        logits = masked(X)[1].detach()[0]
        wanted = 1 - torch.distributions.Categorical(logits=logits.permute(1, 2, 0)).entropy() / torch.tensor(4.0).log()
        assert torch.allclose(found.steps[1].confidence, wanted, atol=1e-5)
    if criterion == "value":
        logits = masked(X)[1].detach()[0]
        for y, x in ((0, 0), (7, 11), (15, 23)):
            k = int(logits[:, y, x].argmax())
            spoken = logits[k, y, x] > 0 and logits[k, y, x] >= logits[k].max() / 2
            assert int(found.steps[1].predictions[y, x]) == (k if spoken else -1)


def test_times_are_medians_from_the_call_on() -> None:
    calls = []

    def answers(x: torch.Tensor) -> Iterator[int]:
        calls.append(x)
        time.sleep(0.05 if len(calls) == 1 else 0.004)
        yield 1
        time.sleep(0.01)
        yield 2

    first, second = times_of(answers, X)
    assert 4 <= first < 12 and 10 <= second - first < 20 and len(calls) == 8, "the first call warms up"
    calls.clear()
    times_of(answers, X, budget_s=0)
    assert len(calls) == 4


@pytest.mark.parametrize("net, more, words", [
    (network(), {"inputs": X.expand(2, -1, -1, -1)}, "one image"), (network(), {"timed": [1.0]}, "3 exits"),
    (offramp.attach(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), X,
                    exits=["0"], keep_costly=True), {}, "one for classify"),
    (offramp.attach(Guest(), torch.rand(2, 3, 16, 24), exits=["one"], keep_costly=True, heads={
        "one": {"a": RedesignedSpec(down=1, channels=4), "b": RedesignedSpec(down=0, channels=4)}}), {}, "one/b"),
], ids=["two images", "one time", "no pixels", "two heads"])
def test_what_cannot_be_shown_is_refused(net: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises(OfframpError, match=words):
        walk(net, more.pop("inputs", X), **more)

"""The test of tests: exits taken live are the policy replayed on the table, sample by sample."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import offramp
from offramp.data import cifar10, scenes
from offramp.models import cifar_resnet20, load_weights_, scenes_classify, scenes_dense
from offramp.types import Plan

DATA = Path(os.environ.get("OFFRAMP_DATA", Path(__file__).parents[2] / "shared" / "data"))
HOW: list[dict[str, Any]] = [{"shrink": True}, {"shrink": False}, {"shrink": "auto"}]


def hold(net: offramp.MultiExit, calibration: Any, test: Any, *, max_drop: float, **search: Any) -> None:
    """Search on one split, replay and run live on the other, with batches that the table never saw."""
    fitted = offramp.record(net, calibration, latency=False, split="calibration")
    table = offramp.record(net, test, latency=False, split="test", batch_size=16)
    searched = offramp.search(fitted, max_drop=max_drop, **search)
    for plan in (searched, spread(fitted, searched.policy), spread(fitted, searched.policy, shares=True)):
        replayed = offramp.replay(table, plan)
        assert plan is searched or min(replayed.counts) > 0, f"rows at every exit, not {replayed.counts}"
        taken = table.logits if table.task == "classify" else table.probs
        assert taken is not None
        wanted = taken[torch.arange(len(table)), replayed.column_of]
        for how in HOW:
            fast, exits, said = net.deploy(plan, **how), [], []
            for batch in DataLoader(test, batch_size=23):
                out = fast(batch[0] if isinstance(batch, list) else batch)
                exits.append(fast.last_exits)
                said.append(out if table.task == "classify" else out.softmax(1).mean((2, 3)))
            live = torch.cat(exits)
            differ = (live != replayed.exit_index).nonzero().flatten().tolist()
            assert not differ, f"{how}: samples {differ[:5]} of {len(live)} left elsewhere than on the table"
            assert torch.allclose(torch.cat(said), wanted, atol=1e-4, rtol=1e-4), "the answers are those of the table"


def spread(table: offramp.ExitTable, policy: offramp.Thresholds, *, shares: bool = False) -> Plan:
    """A plan by which about equal shares leave at every exit, whatever that does to accuracy.

    ``shares``: dense images are judged by their share of sure pixels, which are about half of all.
    """
    exits = len(table.columns) - 1
    pixels: tuple[float, ...] = ()
    if table.task == "dense" and shares:
        counts = table.histograms[policy.confidence].double()
        above = counts.flip(2).cumsum(2).flip(2)[:, :, ::16].mean(0) / counts[0, 0].sum()
        pixels = tuple(int((above[e] - 0.5).abs().argmin()) / 64 for e in range(exits))
    base = offramp.Thresholds(confidence=policy.confidence, thresholds=(0.0,) * exits, pixel_thresholds=pixels)
    alive, thresholds = torch.arange(len(table)), []
    for e in range(exits):
        scores = base.score(e, table.evidence(range(e + 1), alive)).double().sort().values
        cut, reach = len(scores) - len(scores) // (exits + 1 - e), max(1, len(scores) // 8) if shares else 0
        near = range(max(1, cut - reach), min(len(scores) - 1, cut + reach) + 1)
        cut = max(near, key=lambda i: float(scores[i] - scores[i - 1]))  # shares tie, and a last bit would part them
        thresholds.append(float((scores[cut - 1] + scores[cut]) / 2))
        alive = alive[base.score(e, table.evidence(range(e + 1), alive)).double() < thresholds[-1]]
    return Plan(exits=table.names[:-1], task=table.task,
                policy=offramp.Thresholds(confidence=policy.confidence, thresholds=tuple(thresholds),
                                          pixel_thresholds=pixels))


def stirred(model: nn.Module) -> nn.Module:
    """Residual branches that start at zero would leave the features of a random network all alike."""
    draw = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.copy_(torch.rand(module.weight.shape, generator=draw) + 0.5)
            module.running_var.copy_(torch.rand(module.weight.shape, generator=draw) + 0.5)
    return model


def example(data: Any) -> Tensor:
    return torch.stack([item[0] if isinstance(item, tuple) else item for item in (data[0], data[1])])


@pytest.mark.parametrize(("task", "confidence"), [
    ("classify", "top"), ("classify", "entropy"), ("dense", "top"), ("dense", "entropy"), ("dense", "top_edges"),
    ("dense", "entropy_edges"),
])
def test_on_scenes(task: Any, confidence: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    source = scenes(120, size=(32, 48), task=task)
    guest = stirred((scenes_classify if task == "classify" else scenes_dense)(source.num_classes))
    net = offramp.attach(guest, example(source["calibration"]), exits=3)
    with torch.no_grad():  # fresh heads are sure of nothing, and all scores would tie
        for head in net.heads.values():
            [m for m in head.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1].weight.mul_(
                200 if task == "classify" else 2000)
    hold(net, source["calibration"], source["test"], max_drop=0.5, confidence=confidence, against="backbone")


def test_on_cifar10_with_trained_exits() -> None:
    if not (DATA / "cifar10").is_dir():
        pytest.skip(f"CIFAR-10 AND ITS CHECKPOINTS ARE NOT AT {DATA}: LIVE == REPLAY WAS NOT TESTED ON REAL DATA")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    source = cifar10(DATA / "cifar10")
    guest = cifar_resnet20()
    load_weights_(guest, str(DATA / "checkpoints" / "cifar10_resnet20.safetensors"))
    net = offramp.attach(guest, example(source["calibration"]), exits=3, heads=offramp.HeadSpec())
    unlabelled = Subset(source.split("unlabelled"), range(256))
    offramp.fit(net, unlabelled, offramp.recipes.label_free(epochs=3, batch_size=64, lr=0.01))
    calibration = Subset(source.split("calibration"), range(300))
    test = Subset(source.split("test"), range(300))
    hold(net, calibration, test, max_drop=0.02)
    hold(net, calibration, test, max_drop=0.02, against="backbone", tolerance="halving")

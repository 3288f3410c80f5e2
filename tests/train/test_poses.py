"""Heatmaps through training and what follows: learnt where asked for, refused where a softmax would be taken."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import offramp
from offramp.data import Poses, figures, load_data, pose_change, scenes
from offramp.errors import DataError
from offramp.functional.poses import decode

SIZE = 64


class Small(nn.Module):
    """A quarter of the input's size, then two blocks; (N, 3, H, W) -> heatmaps (N, 16, H / 4, W / 4)."""

    def __init__(self) -> None:
        super().__init__()

        def unit(a: int, b: int, stride: int, size: int = 3) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(a, b, size, stride, size // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU())

        self.stem = nn.Sequential(unit(3, 16, 2), unit(16, 24, 2))
        self.one, self.two = unit(24, 24, 1, 5), unit(24, 24, 1, 5)
        self.three = unit(24, 24, 1, 5)
        self.last = nn.Conv2d(24, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.three(self.two(self.one(self.stem(x)))))  # type: ignore[no-any-return]


def split(name: str = "train", n: int = 12, **how: Any) -> Poses:
    found = load_data(f"figures?n={n}&size={SIZE}&difficulty=0-0.2", name, **how)
    assert isinstance(found, Poses)
    return found


def exits() -> offramp.MultiExit:
    torch.manual_seed(0)
    return offramp.attach(Small(), torch.zeros(2, 3, SIZE, SIZE), exits=["one", "two"], heads=offramp.RedesignedSpec(
        down=0, channels=0))


def scores(net: nn.Module, on: Poses) -> list[float]:
    """PCKh of each exit."""
    net.eval()
    with torch.no_grad():
        said = net(torch.stack([on[i][0] for i in range(len(on))]))
    return [on.pckh(decode(maps)[0]).mean for maps in said]


def test_a_masked_network_learns_figures() -> None:
    """By value at ADP-C's threshold, masks on from an epoch; what is learnt is measured by each exit's PCKh."""
    masked = offramp.mask_(exits(), confidence="value")
    on = split(n=6)
    before = scores(masked, on)
    assert masked.threshold == 0.002
    how = replace(offramp.recipes.anytime(epochs=40, says="heatmaps", mask_from=10, batch_size=6, lr=0.003),
                  optimiser="adamw", schedule="cosine")
    history = offramp.fit(masked, on, how, progress=False)
    assert history.epochs[-1].loss["final"] < 0.1 * history.epochs[0].loss["final"]
    assert min(scores(masked, on)) > max(before) + 0.03


def test_augmented_crops_resume_and_repeat() -> None:
    one, other = exits(), exits()
    how = offramp.recipes.anytime(epochs=1, says="heatmaps", batch_size=6, lr=0.01)
    for net in (one, other):
        offramp.fit(net, split(augment=pose_change()), how, progress=False)
    plain = exits()
    offramp.fit(plain, split(), how, progress=False)
    key = "backbone.last.weight"
    assert torch.equal(one.state_dict()[key], other.state_dict()[key])
    assert not torch.equal(one.state_dict()[key], plain.state_dict()[key])


def of_kinds(on: Any) -> list[Any]:
    return [on, Subset(on, [0, 1]), ConcatDataset([on, on]), DataLoader(on, batch_size=2),
            DataLoader(Subset(on, [0, 1]), batch_size=2)]


def test_no_softmax_is_taken_over_heatmaps() -> None:
    net, recipes = exits(), offramp.recipes
    for data in of_kinds(split(n=2)):
        for how in (recipes.label_free(epochs=1), recipes.joint(epochs=1), recipes.anytime(epochs=1),
                    recipes.mess(epochs=1)):
            with pytest.raises(DataError, match="expected data with classes, but got data with heatmaps"):
                offramp.fit(net, data, how, progress=False)
        with pytest.raises(DataError, match="with heatmaps.*split.pckh"):
            offramp.record(net, data, latency=False)
    with pytest.raises(DataError, match="heatmaps"):
        offramp.record(net, figures(2)["unlabelled"], latency=False)
    with pytest.raises(DataError, match="heatmaps"):
        offramp.fit(net, scenes(2, size=(SIZE, SIZE))["unlabelled"], recipes.label_free(epochs=1), progress=False,
                    validate=split(n=2))


def test_heatmaps_of_a_strangers_data_are_no_classes() -> None:
    net, on = exits(), split(n=2)
    rows = TensorDataset(torch.stack([on[i][0] for i in range(2)]), torch.stack([on[i][1] for i in range(2)]))
    for how in (offramp.recipes.joint(epochs=1), offramp.recipes.frozen(epochs=1)):
        with pytest.raises(DataError, match="classes, whole numbers"):
            offramp.fit(net, rows, how, progress=False)
    with pytest.raises(DataError, match=r"labels \(2, 16, 16\)"):
        offramp.record(net, rows, latency=False)


def test_classes_are_no_heatmaps() -> None:
    how = offramp.recipes.anytime(epochs=1, says="heatmaps")
    with pytest.raises(DataError, match="expected data with heatmaps, but got data with classes"):
        offramp.fit(exits(), scenes(2, size=(SIZE, SIZE))["train"], how, progress=False)

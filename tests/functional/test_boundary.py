"""Boundaries of label maps against scipy's distance transform of each class."""

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from offramp.data.scenes import Scenes
from offramp.errors import OfframpError
from offramp.functional.boundary import boundary_labels


def witness(labels: Tensor, ignore: int = 255) -> Tensor:
    """Distance to the nearest pixel of another class, one class after the other."""
    found = np.full(labels.shape, np.nan)
    for n, image in enumerate(labels.numpy()):
        for label in set(image.flatten().tolist()) - {ignore}:
            mine, other = image == label, (image != label) & (image != ignore)
            found[n][mine] = distance_transform_edt(~other)[mine] if other.any() else np.inf
    return torch.from_numpy(found).float()


def maps() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    coarse = torch.randint(0, 5, (2, 4, 5), generator=draw)
    blocks = coarse.repeat_interleave(9, 1).repeat_interleave(7, 2)
    blocks[0, 5:20, 10:22] = 255
    return {
        "scenes": torch.stack([Scenes(2, size=(40, 56))[n][1] for n in range(2)]),
        "blocks with void": blocks,
        "noise": torch.randint(0, 3, (2, 17, 13), generator=draw).to(torch.uint8),
        "one class": torch.full((1, 9, 9), 4),
        "nothing but void": torch.full((1, 5, 4), 255),
        "one row": torch.tensor([[[0, 0, 0, 0, 1, 1, 255, 2]]]),
        "one pixel": torch.zeros(1, 1, 1, dtype=torch.int64),
    }


@pytest.mark.parametrize("name", maps())
@pytest.mark.parametrize("radius", [1, 2, 3, 5])
def test_labels_are_those_within_the_radius(name: str, radius: int) -> None:
    labels = maps()[name]
    before, apart = labels.clone(), witness(labels)
    found = boundary_labels(labels, radius)
    assert found.shape == labels.shape and found.dtype == torch.uint8 and torch.equal(labels, before)
    assert torch.equal(found == 255, labels == 255)
    assert torch.equal(found == 1, apart <= radius)


def test_another_ignore_label_and_a_radius_between() -> None:
    labels = torch.where(maps()["blocks with void"] == 255, 11, maps()["blocks with void"])
    found = boundary_labels(labels, 2.5, ignore=11)
    assert torch.equal(found == 1, witness(labels, ignore=11) <= 2.5) and torch.equal(found == 11, labels == 11)


@pytest.mark.parametrize("labels", [torch.zeros(4, 4, dtype=torch.int64), torch.zeros(1, 4, 4)])
def test_other_things_than_label_maps_are_refused(labels: Tensor) -> None:
    with pytest.raises(OfframpError, match=r"integer labels \(N, H, W\)"):
        boundary_labels(labels)
    with pytest.raises(OfframpError, match="radius >= 1"):
        boundary_labels(torch.zeros(1, 4, 4, dtype=torch.int64), 0)

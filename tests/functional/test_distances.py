"""Distances in bins, all classes at once, against scipy's transform of each class and against brute force."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from functional.test_boundary import maps, witness
from offramp.errors import OfframpError
from offramp.functional.boundary import boundary_labels
from offramp.functional.distances import DISTANCE_BINS, count_by_distance, distance_bins


def wide() -> Tensor:
    """Larger than the reach both ways, with void between classes and an island."""
    labels = torch.zeros(2, 70, 80, dtype=torch.int64)
    labels[0, :20, 40:44], labels[0, 60:, :10], labels[0, 35, 60] = 255, 3, 7
    labels[1, 30:, 37:], labels[1, 10:55, 33:37], labels[1, 64:, :50] = 2, 255, 255
    return labels


@pytest.mark.parametrize("name", [*maps(), "wide"])
def test_bins_are_scipys_distances(name: str) -> None:
    labels = wide() if name == "wide" else maps()[name]
    before, apart = labels.clone(), witness(labels).numpy()
    expected = np.where(np.isnan(apart), DISTANCE_BINS, np.minimum(np.ceil(apart) - 1, DISTANCE_BINS - 1))
    found = distance_bins(labels, 11)
    assert found.dtype == torch.uint8 and torch.equal(labels, before)
    assert np.array_equal(found.numpy(), expected)
    assert torch.equal(found < 3, boundary_labels(labels, 3) == 1)


def test_bins_and_counts_by_brute_force() -> None:
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (3, 6, 7), generator=draw).repeat_interleave(3, 2)[..., 2:]
    labels[torch.rand(labels.shape, generator=draw) < 0.3] = -100  # ignored, as 255 and K are
    labels[0, 0, 0], labels[0, 0, 1] = 255, 3
    chosen = torch.rand(labels.shape, generator=draw) < 0.5
    every, some = (torch.zeros(3, DISTANCE_BINS, dtype=torch.int32) for _ in range(2))
    for n, image in enumerate(labels.tolist()):
        spots = [(y, x, label) for y, row in enumerate(image) for x, label in enumerate(row) if 0 <= label < 3]
        for y, x, label in spots:
            near = min((math.hypot(y - v, x - u) for v, u, other in spots if other != label), default=math.inf)
            at = min(math.ceil(near) - 1, 30) if near < math.inf else 30
            every[n, at] += 1
            some[n, at] += bool(chosen[n, y, x])
    bins = distance_bins(labels, 3)
    assert torch.equal(count_by_distance(bins), every) and torch.equal(count_by_distance(bins, chosen), some)
    assert every.sum() == ((labels >= 0) & (labels < 3)).sum() and 0 < some.sum() < every.sum()


def test_no_images_and_what_is_no_label_map() -> None:
    assert count_by_distance(distance_bins(torch.zeros(0, 4, 5, dtype=torch.int64), 3)).shape == (0, DISTANCE_BINS)
    for labels, classes in ((torch.zeros(4, 4, dtype=torch.int64), 3), (torch.zeros(1, 4, 4), 3),
                            (torch.zeros(1, 4, 4, dtype=torch.int64), 40000)):
        with pytest.raises(OfframpError, match="integer labels"):
            distance_bins(labels, classes)

"""Semantic edges against scikit-image, smoothed confidence against a median taken pixel by pixel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation
from skimage.morphology import dilation
from skimage.segmentation import find_boundaries
from torch import Tensor

from offramp.errors import OfframpError
from offramp.functional import edges
from offramp.functional.edges import reaches, semantic_edges, smooth_edges


def patches(rows: int, high: int, wide: int, seed: int = 0) -> Tensor:
    """Labels (rows, high, wide) in patches of 5 x 4 pixels."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 3, (rows, high // 5 + 1, wide // 4 + 1)).repeat(5, 1).repeat(4, 2)
    return torch.from_numpy(coarse[:, :high, :wide].astype(np.uint8))


def median(confidence: Tensor, where: Tensor, stride: int) -> Tensor:
    """Eq. 9 as it reads, with numpy's sort: the upper median of each clipped window."""
    said = confidence.clone()
    for n, y, x in where.nonzero().tolist():
        window = confidence[n, max(0, y - 2 * stride) : y + 2 * stride + 1, max(0, x - 2 * stride) : x + 2 * stride + 1]
        said[n, y, x] = float(np.sort(window.numpy().ravel())[window.numel() // 2])
    return said


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 8])
def test_edges_are_those_of_scikit_image(stride: int) -> None:
    labels = patches(3, 31, 26, stride)
    found = semantic_edges(labels, stride).numpy()
    for one, mine in zip(labels.numpy(), found, strict=True):
        border = find_boundaries(one, connectivity=1, mode="thick")
        assert (mine == dilation(border.astype(np.uint8), np.ones((stride, stride), np.uint8)).astype(bool)).all()
        assert (mine == binary_dilation(border, np.ones((stride, stride)))).all()
    assert 0.1 < found.mean() < 1 or stride == 8


def test_an_image_of_one_class_has_no_edges_and_keeps_its_confidence() -> None:
    confidence = torch.rand(2, 9, 7)
    none = semantic_edges(torch.ones(2, 9, 7, dtype=torch.long), 4)
    assert not none.any() and torch.equal(smooth_edges(confidence, none, 4), confidence)
    assert semantic_edges(torch.zeros(0, 5, 5), 2).shape == (0, 5, 5)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**16), st.booleans())
def test_smoothed_confidence_is_the_median(stride: int, high: int, wide: int, seed: int, coarse: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    confidence = torch.rand(2, high, wide, generator=draw)
    if coarse:  # ties, and values on the very levels
        confidence = (confidence * 16).round() / 16
    where = semantic_edges(patches(2, high, wide, seed), stride)
    said, wanted = smooth_edges(confidence, where, stride), median(confidence, where, stride)
    assert torch.equal(said[~where], confidence[~where])
    assert (said - wanted).abs().max() <= 1 / 128
    for level in (0, 1, 17, 32, 48, 63):
        assert torch.equal(said >= level / 64, wanted >= level / 64), level
        assert torch.equal(reaches(confidence, where, stride, level), wanted >= level / 64), level


def test_work_done_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    confidence, where = torch.rand(5, 40, 30), semantic_edges(patches(5, 40, 30), 3)
    whole = smooth_edges(confidence, where, 3)
    for room in (40 * 30 * 2, 1):  # two images, the least
        monkeypatch.setattr(edges, "_ROOM", room)
        assert torch.equal(smooth_edges(confidence, where, 3), whole)


def test_counts_that_wrap_are_still_right() -> None:
    """An image so large that a level's own count overruns its field, many times over."""
    labels = torch.zeros(1, 300, 300, dtype=torch.uint8)
    labels[:, 290:, 290:] = 1
    confidence, where = torch.rand(1, 300, 300), semantic_edges(labels, 2)
    said, wanted = smooth_edges(confidence, where, 2), median(confidence, where, 2)
    assert where.sum() > 20 and torch.equal((said * 64).floor(), (wanted * 64).floor())


def test_a_wide_stride_sees_the_whole_image() -> None:
    confidence, where = torch.rand(1, 20, 20), semantic_edges(patches(1, 20, 20), 64)
    assert where.all()
    assert torch.equal((smooth_edges(confidence, where, 64) * 64).floor().unique(),
                       (confidence.flatten().sort().values[200] * 64).floor()[None])


def test_refuses_what_is_not_labels() -> None:
    for labels, stride in ((torch.zeros(4, 4), 1), (torch.zeros(1, 4, 4), 0)):
        with pytest.raises(OfframpError, match="stride >= 1"):
            semantic_edges(labels, stride)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: EDGES WERE NOT TESTED ON ONE")
def test_cuda_says_the_same() -> None:
    labels, confidence = patches(3, 60, 50), torch.rand(3, 60, 50)
    where = semantic_edges(labels.cuda(), 4)
    assert torch.equal(where.cpu(), semantic_edges(labels, 4))
    assert torch.equal(smooth_edges(confidence.cuda(), where, 4).cpu(), smooth_edges(confidence, where.cpu(), 4))
    assert torch.equal(reaches(confidence.cuda(), where, 4, 40).cpu(), reaches(confidence, where.cpu(), 4, 40))

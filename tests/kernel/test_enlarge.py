"""A whole map resized by the kernel, against torch's own arithmetic in float64."""

import pytest
import torch
from torch.nn import functional as F

from offramp import OfframpError, _kernel

pytestmark = pytest.mark.skipif(not _kernel.available(), reason="no compiled kernel")


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("count", "channels", "size", "goal"), [
    (1, 19, (16, 24), (64, 96)), (2, 3, (5, 7), (11, 9)), (1, 16, (1, 1), (4, 6)), (1, 35, (9, 8), (3, 5)),
    (3, 1, (4, 4), (4, 4)), (1, 2, (6, 10), (1, 1)),
])
@torch.no_grad()
def test_it_is_bilinear(count: int, channels: int, size: tuple[int, int], goal: tuple[int, int], align_corners: bool
                        ) -> None:
    x = torch.randn(count, channels, *size).to(memory_format=torch.channels_last)
    found = _kernel.enlarge(x, goal, align_corners=align_corners)
    assert found.shape == (count, channels, *goal) and found.is_contiguous(memory_format=torch.channels_last)
    # torch places its points in float32; so does the kernel, and float64 itself would read elsewhere by 1e-6 of a place
    theirs = F.interpolate(x, goal, mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-6)
    exact = F.interpolate(x.double(), goal, mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_on_one_thread_and_on_two() -> None:
    x = torch.randn(1, 5, 30, 40).to(memory_format=torch.channels_last)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(_kernel.enlarge(x, (121, 77)))
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_what_it_refuses() -> None:
    x = torch.randn(1, 5, 6, 8)
    for one in (x, x.double().to(memory_format=torch.channels_last), x[0],
                x.to(memory_format=torch.channels_last).requires_grad_()):
        assert not _kernel.enlarges(one)
        with pytest.raises(OfframpError, match="channels_last"):
            _kernel.enlarge(one, (8, 8))
    with pytest.raises(OfframpError, match=r"and a size.*\(0, 4\)"):
        _kernel.enlarge(x.to(memory_format=torch.channels_last), (0, 4))

"""Where the kernel finds logits unsure, against the confidence that masks are read off."""

import pytest
import torch

from offramp import OfframpError, _kernel
from offramp.functional.confidence import top
from offramp.functional.masking import active

pytestmark = pytest.mark.skipif(not _kernel.available(), reason="no compiled kernel")


@pytest.mark.parametrize("classes", [2, 11, 16, 19, 35, 150])
@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0, 60.0])
@torch.no_grad()
def test_it_is_the_confidence_but_where_it_says_that_it_may_not_be(classes: int, spread: float, two_threads: None
                                                                   ) -> None:
    logits = (spread * torch.randn(2, classes, 33, 41) - 300).to(memory_format=torch.channels_last)
    within = torch.rand(2, 1, 33, 41) < 0.5
    score = top(logits)[:, None]
    for threshold in (1 / classes, 0.5, 0.9, 0.998, float(score.median())):
        found, near = _kernel.unsure(logits, threshold)
        known = active(logits, "top", threshold)
        assert torch.equal(found[~near], known[~near]) and not (found & near).any()
        assert (score[near] - threshold).abs().le(1.1e-5).all() and near[(score - threshold).abs() < 5e-6].all()
        some, close = _kernel.unsure(logits, threshold, within)
        assert torch.equal(some, found & within) and torch.equal(close, near & within)


def test_what_is_not_a_number_is_near() -> None:
    logits = torch.randn(1, 19, 4, 5).to(memory_format=torch.channels_last)
    logits[0, 3, 1, 1] = logits[0, 17, 2, 2] = torch.nan
    logits[0, :, 3, 3] = torch.inf
    _, near = _kernel.unsure(logits, 0.9)
    assert near.nonzero().tolist() == [[0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3]]
    logits[0, :, 0, 0] = -torch.inf
    logits[0, 18, 0, 0] = 5.0
    found, near = _kernel.unsure(logits, 0.9)
    assert not found[0, 0, 0, 0] and not near[0, 0, 0, 0], "one class alone is possible"


def test_other_logits_are_refused() -> None:
    with pytest.raises(OfframpError, match="channels_last"):
        _kernel.unsure(torch.randn(1, 19, 4, 5), 0.9)

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax
from scipy.stats import entropy as scipy_entropy

from offramp.errors import OfframpError
from offramp.functional.confidence import BY_NAME, entropy, margin, top

LOGITS = arrays(np.float32, (5, 4), elements=st.floats(-60, 60, width=32))


@settings(deadline=None, max_examples=30)
@given(LOGITS)
def test_against_numpy_and_scipy(given_logits: np.ndarray) -> None:
    probs = softmax(given_logits.astype(np.float64), axis=1)
    rising = np.sort(probs, axis=1)
    logits = torch.from_numpy(given_logits)
    np.testing.assert_allclose(top(logits), rising[:, -1], atol=1e-6)
    np.testing.assert_allclose(margin(logits), rising[:, -1] - rising[:, -2], atol=1e-6)
    np.testing.assert_allclose(entropy(logits), 1 - scipy_entropy(probs, axis=1) / np.log(4), atol=2e-6)


@settings(deadline=None, max_examples=30)
@given(LOGITS, st.floats(-50, 50))
def test_within_0_and_1_and_blind_to_a_shift(given_logits: np.ndarray, shift: float) -> None:
    logits = torch.from_numpy(given_logits)
    for confidence in BY_NAME.values():
        score = confidence(logits)
        assert ((score >= 0) & (score <= 1)).all()
        torch.testing.assert_close(confidence(logits + shift), score, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", BY_NAME)
def test_pixels_are_scored_like_rows(name: str) -> None:
    logits = torch.randn(2, 5, 3, 4)
    rows = logits.permute(0, 2, 3, 1).reshape(-1, 5)
    assert BY_NAME[name](logits).shape == (2, 3, 4)
    torch.testing.assert_close(BY_NAME[name](logits).flatten(), BY_NAME[name](rows))


@pytest.mark.parametrize("name", BY_NAME)
def test_extremes(name: str) -> None:
    confidence = BY_NAME[name]
    assert confidence(torch.tensor([[1e4, 0.0, -1e4]])).item() == 1.0
    assert confidence(torch.full((1, 3), -torch.inf).index_fill(1, torch.tensor([1]), 2.0)).item() == 1.0
    assert confidence(torch.zeros(1, 3)).item() == pytest.approx(1 / 3 if name == "top" else 0.0, abs=1e-6)
    assert confidence(torch.tensor([[torch.nan, 0.0]])).isnan().all()
    assert confidence(torch.zeros(0, 3)).shape == (0,)


def test_rounding_never_leaves_0_and_1() -> None:
    for classes in range(2, 200):
        assert 0 <= entropy(torch.zeros(1, classes)).item() < 1e-6


@pytest.mark.parametrize("name", BY_NAME)
def test_half_precision_is_scored_in_float32(name: str) -> None:
    logits = torch.randn(8, 10).bfloat16()
    assert BY_NAME[name](logits).dtype == torch.float32
    torch.testing.assert_close(BY_NAME[name](logits), BY_NAME[name](logits.float()), atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 3, 4), (2, 1, 4, 4)])
def test_refuses_what_is_not_logits(shape: tuple[int, ...]) -> None:
    with pytest.raises(OfframpError, match="logits"):
        top(torch.zeros(shape))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", BY_NAME)
def test_cuda_says_the_same(name: str) -> None:
    logits = torch.randn(64, 10)
    torch.testing.assert_close(BY_NAME[name](logits.cuda()).cpu(), BY_NAME[name](logits))

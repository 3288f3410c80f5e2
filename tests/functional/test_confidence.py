import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax
from scipy.stats import entropy as scipy_entropy

from offramp.errors import OfframpError
from offramp.functional import confidence
from offramp.functional.confidence import BY_NAME, entropy, margin, read, top

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
    for score in BY_NAME.values():
        found = score(logits)
        assert ((found >= 0) & (found <= 1)).all()
        torch.testing.assert_close(score(logits + shift), found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", BY_NAME)
def test_pixels_are_scored_like_rows(name: str) -> None:
    logits = torch.randn(2, 5, 3, 4)
    rows = logits.permute(0, 2, 3, 1).reshape(-1, 5)
    assert BY_NAME[name](logits).shape == (2, 3, 4)
    torch.testing.assert_close(BY_NAME[name](logits).flatten(), BY_NAME[name](rows))


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_pixel_is_scored_alike_to_the_last_bit(name: str, layout: torch.memory_format,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is asked, whoever else is in the batch, however it lies in memory or is cut into groups."""
    logits = torch.randn(6, 7, 9, 11) * 4
    whole = read(logits, tuple(BY_NAME), labels=True, probs=True)
    laid = logits.contiguous(memory_format=layout)
    assert torch.equal(BY_NAME[name](laid), whole.scores[name])
    assert torch.equal(BY_NAME[name](laid[2:3]), whole.scores[name][2:3])
    monkeypatch.setattr(confidence, "_ROOM", 2 * 7 * 9 * 11)
    parts = read(laid, (name,), labels=True, probs=True)
    assert torch.equal(parts.scores[name], whole.scores[name]) and torch.equal(parts.labels, whole.labels)
    torch.testing.assert_close(parts.probs, whole.probs)


@settings(deadline=None, max_examples=30)
@given(arrays(np.float32, (3, 4, 2, 5), elements=st.sampled_from([-3.0, 0.0, 1.0, 2.5, -np.inf, 40.0])))
def test_planes_are_read_as_numpy_would(given_logits: np.ndarray) -> None:
    given_logits[:, 0] = np.maximum(given_logits[:, 0], -3)  # softmax of nothing but -inf is NaN
    said = read(torch.from_numpy(given_logits), tuple(BY_NAME), labels=True, probs=True)
    probs = softmax(given_logits.astype(np.float64), axis=1)
    rising = np.sort(probs, axis=1)
    assert (said.labels.numpy() == given_logits.argmax(1)).all(), "the first of equals"
    np.testing.assert_allclose(said.scores["top"], rising[:, -1], atol=1e-6)
    np.testing.assert_allclose(said.scores["margin"], rising[:, -1] - rising[:, -2], atol=1e-6)
    np.testing.assert_allclose(said.scores["entropy"], 1 - scipy_entropy(probs, axis=1) / np.log(4), atol=2e-6)
    np.testing.assert_allclose(said.probs, probs.mean((2, 3)), atol=1e-6)


def test_the_pass_of_a_gpu_or_a_compiler_says_the_same() -> None:
    logits = torch.randn(2, 6, 7, 5) * 4
    planes = read(logits, tuple(BY_NAME), labels=True, probs=True)
    whole = confidence._whole(logits, BY_NAME, labels=True, probs=True)
    assert torch.equal(planes.labels, whole.labels)
    torch.testing.assert_close(planes.probs, whole.probs)
    for name in BY_NAME:
        torch.testing.assert_close(planes.scores[name], whole.scores[name], atol=1e-6, rtol=1e-5)


def test_labels_of_many_classes() -> None:
    logits = torch.zeros(1, 300, 2, 2)
    logits[0, 299, 1], logits[0, 255, 0] = 1.0, 1.0
    assert read(logits, (), labels=True).labels.tolist() == [[[255, 255], [299, 299]]]
    assert read(logits[:, :256], (), labels=True).labels.dtype == torch.uint8


@pytest.mark.parametrize("name", BY_NAME)
def test_extremes(name: str) -> None:
    score = BY_NAME[name]
    assert score(torch.tensor([[1e4, 0.0, -1e4]])).item() == 1.0
    assert score(torch.full((1, 3), -torch.inf).index_fill(1, torch.tensor([1]), 2.0)).item() == 1.0
    assert score(torch.zeros(1, 3)).item() == pytest.approx(1 / 3 if name == "top" else 0.0, abs=1e-6)
    assert score(torch.tensor([[torch.nan, 0.0]])).isnan().all()
    assert score(torch.zeros(0, 3)).shape == (0,)


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

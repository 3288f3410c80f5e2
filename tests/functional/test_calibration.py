import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import brier_score_loss, log_loss

from offramp.errors import DataError, OfframpError
from offramp.functional.calibration import brier, ece, fit_temperature, nll, reliability


def made(samples: int = 500, classes: int = 4, temperature: float = 2.5,
         seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels drawn from the softmax, then logits made too large: the true temperature is known."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(samples, classes)) * 1.5
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([draw.choice(classes, p=row) for row in probs])
    return torch.from_numpy(logits * temperature).float(), torch.from_numpy(labels)


def test_against_scikit_learn() -> None:
    logits, labels = made()
    probs = logits.double().softmax(1).numpy()
    assert nll(logits, labels) == pytest.approx(log_loss(labels, probs), rel=1e-9)
    # scikit-learn calls the same sum over classes "brier_score_loss" for more than two classes, unscaled
    assert brier(logits, labels) == pytest.approx(brier_score_loss(labels, probs, scale_by_half=False), rel=1e-9)


def test_ece_against_a_loop() -> None:
    logits, labels = made()
    probs = logits.double().softmax(1).numpy()
    confidence, said = probs.max(1), probs.argmax(1)
    expected = 0.0
    for m in range(15):
        here = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if here.any():
            expected += here.mean() * abs((said == labels.numpy())[here].mean() - confidence[here].mean())
    assert ece(logits, labels) == pytest.approx(expected, rel=1e-9)


def test_reliability_counts_everyone_once() -> None:
    confidence = torch.tensor([0.0, 0.1, 0.10001, 1.0], dtype=torch.float64)
    count, said, right = reliability(confidence, torch.tensor([True, True, False, True]), 10)
    assert count.tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert right[:2].tolist() == [1.0, 0.0]
    assert right[2].isnan() and said[-1] == 1.0


def test_temperature_is_the_likeliest_and_the_true_one() -> None:
    logits, labels = made(samples=4000)
    found = fit_temperature(logits, labels)
    best = minimize_scalar(lambda t: nll(logits / t, labels), bounds=(0.05, 20), method="bounded",
                           options={"xatol": 1e-8})
    assert found == pytest.approx(best.x, rel=1e-4)
    assert found == pytest.approx(2.5, rel=0.1)
    assert ece(logits / found, labels) < ece(logits, labels)


def test_temperature_stays_within_bounds() -> None:
    sure = torch.eye(3) * 4
    assert fit_temperature(sure, torch.arange(3)) == 0.05
    assert fit_temperature(sure, torch.tensor([1, 2, 0])) == 20.0


def test_refuses_bad_input() -> None:
    logits, labels = made(8)
    with pytest.raises(OfframpError, match="N, K"):
        ece(logits, labels[:3])
    with pytest.raises(DataError, match="sample 2"):
        brier(logits.index_fill(0, torch.tensor([2]), torch.nan), labels)
    with pytest.raises(DataError, match="labels in"):
        nll(logits, labels - 9)

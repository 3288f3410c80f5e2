import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score

from offramp.errors import OfframpError
from offramp.functional.metrics import accuracy, agreement, bootstrap_interval, confusion, iou, mean_iou
from offramp.functional.pareto import front, quality_at


def test_against_scikit_learn() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (3, 8, 8), generator=draw)
    said = torch.randint(0, 5, (3, 8, 8), generator=draw)
    labels[:, :2] = 255
    labels[0, 3], labels[2, 4] = -1, 5
    matrices = confusion(said, labels, 5)
    for n in range(3):
        kept = (labels[n] >= 0) & (labels[n] < 5)
        expected = confusion_matrix(labels[n][kept], said[n][kept], labels=range(5))
        assert (matrices[n].numpy() == expected).all()
    kept = (labels >= 0) & (labels < 5)
    np.testing.assert_allclose(iou(matrices.sum(0)), jaccard_score(labels[kept], said[kept], average=None))
    assert float(mean_iou(matrices.sum(0))) == pytest.approx(jaccard_score(labels[kept], said[kept], average="macro"))
    assert accuracy(said[kept], labels[kept]) == pytest.approx(accuracy_score(labels[kept], said[kept]))


def test_labels_as_small_as_pictures_hold_them() -> None:
    labels, said = (torch.randint(0, 21, (2, 9, 9), generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    labels[0, 0] = 255
    wanted = confusion_matrix(labels[0][1:].flatten(), said[0][1:].flatten(), labels=range(21))
    assert (confusion(said.byte(), labels.byte(), 21)[0].numpy() == wanted).all()


def test_a_class_that_never_occurs_does_not_count() -> None:
    matrix = torch.tensor([[2, 0, 0], [2, 4, 0], [0, 0, 0]])
    assert iou(matrix)[2].isnan()
    assert float(mean_iou(matrix)) == pytest.approx((2 / 4 + 4 / 6) / 2)


def test_empty_batch_and_wrong_shapes() -> None:
    assert confusion(torch.zeros(0, 4, 4).long(), torch.zeros(0, 4, 4).long(), 3).shape == (0, 3, 3)
    with pytest.raises(OfframpError, match="one shape"):
        confusion(torch.zeros(1, 4).long(), torch.zeros(1, 5).long(), 3)


def test_agreement_over_pixels() -> None:
    one, other = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert agreement(one, other) == pytest.approx((one.argmax(1) == other.argmax(1)).float().mean().item())


def test_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    samples = torch.from_numpy(np.random.default_rng(0).normal(3.0, 2.0, 900))
    low, high = bootstrap_interval(samples, repeats=4000)
    half = 1.96 * float(samples.std()) / 30
    assert low == pytest.approx(float(samples.mean()) - half, abs=0.012)
    assert high == pytest.approx(float(samples.mean()) + half, abs=0.012)


def test_bootstrap_interval_of_miou() -> None:
    matrices = torch.randint(1, 30, (50, 3, 3), generator=torch.Generator().manual_seed(0))
    whole = float(mean_iou(matrices.sum(0)))
    low, high = bootstrap_interval(matrices, lambda drawn: mean_iou(drawn.sum(0)), repeats=200)
    assert low < whole < high
    assert bootstrap_interval(matrices, lambda drawn: mean_iou(drawn.sum(0)), repeats=200) == (low, high)
    with pytest.raises(OfframpError, match="at least one"):
        bootstrap_interval(matrices[:0])


def test_front_against_every_pair() -> None:
    draw = np.random.default_rng(0)
    cost, quality = draw.integers(0, 12, 60).astype(float), draw.integers(0, 12, 60).astype(float)
    found = front(cost, quality)
    beaten = [
        any((cost[j] <= cost[i] and quality[j] >= quality[i]) and (cost[j], quality[j]) != (cost[i], quality[i])
            for j in range(60))
        for i in range(60)
    ]
    assert {(cost[i], quality[i]) for i in found} == {(cost[i], quality[i]) for i in range(60) if not beaten[i]}
    assert len(found) == len({(cost[i], quality[i]) for i in found})
    assert (np.diff(cost[found]) > 0).all() and (np.diff(quality[found]) > 0).all()
    assert front([], []).tolist() == []


def test_the_operating_point_lies_below_the_budget() -> None:
    assert quality_at([1.0, 2.0, 3.0], [0.5, 0.9, 0.8], 2.9) == 0.9
    assert np.isnan(quality_at([1.0], [0.5], 0.9))

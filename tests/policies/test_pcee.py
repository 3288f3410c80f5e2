"""PCEE keeps every scheduler's contract; bins against numpy, pooling against scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from choose.synthetic import classify
from offramp.errors import OfframpError
from offramp.policies.lesson import Scheduler, lesson
from offramp.policies.pcee import Pcee, Reliability
from offramp.testing import SchedulerContract
from offramp.types import Evidence


class TestPcee(SchedulerContract):
    unspent = 0.6  # a bin leaves whole, and several are always right

    def scheduler(self) -> Scheduler:
        return Pcee(bins=20, least=4)


class TestRising(SchedulerContract):
    unspent = 0.4

    def scheduler(self) -> Scheduler:
        return Pcee(bins=20, least=4, rising=True)


class TestDense(SchedulerContract):
    task, samples, unspent = "dense", 40, 0.4

    def scheduler(self) -> Scheduler:
        return Pcee(confidence="entropy", bins=10, least=2)


def test_bins_of_equal_mass_hold_the_accuracy_of_their_samples() -> None:
    taught = lesson(classify(300, 2, seed=3))
    policy = Pcee(bins=6).fit(taught)(float(taught.cost.mean()))
    assert isinstance(policy, Reliability)
    for e in range(2):
        sure = taught.signals[e].top.numpy()
        order = np.argsort(sure)
        right = taught.right[:, e].numpy()[order].reshape(6, 50)
        np.testing.assert_allclose(policy.accuracies[e], right.mean(1))
        np.testing.assert_array_equal(np.searchsorted(sure[order], policy.edges[e]), np.arange(50, 300, 50))
        held = policy.score(e, taught.evidence(e)).numpy()
        np.testing.assert_allclose(held[order], np.repeat(right.mean(1), 50))


def test_rising_is_isotonic_regression() -> None:
    taught = lesson(classify(200, 1, seed=5, skill=(0.3, 3.0)))
    policy = Pcee(bins=200, least=1, rising=True).fit(taught)(float(taught.cost[-1]))
    assert isinstance(policy, Reliability)
    sure, right = taught.signals[0].top.numpy(), taught.right[:, 0].numpy()
    wanted = IsotonicRegression().fit(sure, right).predict(sure)
    np.testing.assert_allclose(policy.score(0, taught.evidence(0)), wanted)
    assert len(policy.accuracies[0]) > 2 and (np.diff(policy.accuracies[0]) > 0).all()


def test_the_bar_is_of_accuracy_not_of_confidence() -> None:
    # the first exit is sure and wrong in half, the second unsure and right
    truth = torch.arange(40) % 2
    first = torch.where(torch.arange(40) % 4 < 2, truth, 1 - truth)
    logits = torch.stack([8.0 * torch.nn.functional.one_hot(first), 0.5 * torch.nn.functional.one_hot(truth),
                          9.0 * torch.nn.functional.one_hot(truth)], 1)
    taught = lesson(replace(classify(40, 2, 2), logits=logits, labels=truth))
    policy = Pcee().fit(taught)(float(taught.cost[1]))
    found = [bool(policy.decide(e, taught.evidence(e, torch.tensor([0])))) for e in range(2)]
    assert found == [False, True]


def test_equal_confidences_share_a_bin() -> None:
    logits = torch.zeros(30, 2, 3)
    logits[20:, 0, 0] = 2
    taught = lesson(replace(classify(30, 1, 3), logits=logits, labels=torch.arange(30) % 2))
    policy = Pcee(bins=10, least=1).fit(taught)(float(taught.cost[1]))
    assert isinstance(policy, Reliability)
    assert (len(policy.edges[0]), policy.accuracies[0]) == (1, (0.5, 0.5))


def test_a_confidence_on_an_edge_belongs_above() -> None:
    policy = Reliability(edges=((0.5,),), accuracies=((0.1, 0.9),), thresholds=(0.5,))
    logits = torch.tensor([[[0.0, 0.0]], [[0.0, -0.1]]])
    assert policy.score(0, Evidence(logits=logits)).tolist() == [0.9, 0.9]
    three = Evidence(logits=torch.zeros(1, 1, 3))
    assert policy.score(0, three).tolist() == [0.1]


def test_faults_are_told() -> None:
    with pytest.raises(OfframpError, match="2 bins and 2 edges"):
        Reliability(edges=((0.2, 0.5),), accuracies=((0.1, 0.9),), thresholds=(0.5,))
    with pytest.raises(OfframpError, match="1 exits of edges for 2 thresholds"):
        Reliability(edges=((),), accuracies=((0.1,), (0.2,)), thresholds=(0.5, None))
    with pytest.raises(OfframpError, match="bins and least"):
        Pcee(bins=0)

import numpy as np
import pytest
import torch

from choose.synthetic import classify, dense, pixels
from offramp.errors import DataError, OfframpError
from offramp.functional.confidence import top
from offramp.policies.scored import checked
from offramp.policies.thresholds import Thresholds
from offramp.types import Evidence, Policy


def test_leaves_at_or_above_the_threshold() -> None:
    policy = Thresholds(thresholds=(0.5,), temperatures=(1.0,))
    evidence = Evidence(logits=torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[-0.1, 0.1]]]))
    assert policy.decide(0, evidence).tolist() == [True, True, True]
    assert Thresholds(thresholds=(0.51,)).decide(0, evidence).tolist() == [False, True, True]
    assert isinstance(policy, Policy)


def test_disabled_is_not_a_threshold_of_one() -> None:
    saturated = Evidence(logits=torch.tensor([[[100.0, 0.0]]]))
    assert Thresholds(thresholds=(1.0,)).decide(0, saturated).tolist() == [True]
    assert Thresholds(thresholds=(None,)).decide(0, saturated).tolist() == [False]


def test_only_the_asking_exit_is_scored_at_its_own_temperature() -> None:
    logits = torch.randn(6, 3, 4)
    policy = Thresholds(thresholds=(0.1, 0.2, 0.6), temperatures=(9.0, 9.0, 2.0))
    assert torch.equal(policy.score(2, Evidence(logits=logits)), top(logits[:, 2] / 2))


def test_dense_scores_are_shares_of_pixels_or_their_mean() -> None:
    table, (logits, _) = dense(8, 2), pixels(8, 2)
    scores = top(logits[:, 1])
    share = Thresholds(thresholds=(0.5, 0.5), pixel_thresholds=(0.75, 0.75))
    torch.testing.assert_close(share.score(1, table.evidence([0, 1])), (scores >= 0.75).flatten(1).double().mean(1))
    mean = Thresholds(thresholds=(0.5, 0.5))
    np.testing.assert_allclose(mean.score(1, table.evidence([0, 1])), scores.flatten(1).mean(1), atol=1 / 2000)


@pytest.mark.parametrize("thresholds", [(0.5,), (None,)])
def test_nan_is_refused_even_where_disabled(thresholds: tuple[float | None, ...]) -> None:
    with pytest.raises(DataError, match="row 1 of 2"):
        Thresholds(thresholds=thresholds).decide(0, Evidence(logits=torch.tensor([[[0.0, 1.0]], [[torch.nan, 1.0]]])))


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(OfframpError) as caught:
        Thresholds(confidence="sure", thresholds=(float("nan"), 0.5), temperatures=(0.0,), pixel_thresholds=(0.3, None))
    for part in ("'sure'", "1 temperatures for 2", "threshold nan", "temperature 0.0", "pixel threshold 0.3"):
        assert part in str(caught.value)


def test_confidence_across_edges_is_cut_at_multiples_of_a_64th() -> None:
    assert Thresholds(confidence="top_edges", thresholds=(0.5,), pixel_thresholds=(0.765625,)).reads == ("top_edges",)
    with pytest.raises(OfframpError, match="1/64"):
        Thresholds(confidence="top_edges", thresholds=(0.5,), pixel_thresholds=(0.75 + 1 / 1024,))
    policy = Thresholds(confidence="entropy_edges", thresholds=(0.5, 0.5))
    with pytest.raises(OfframpError, match="images of labels"):
        policy.decide(0, Evidence(logits=torch.zeros(2, 1, 3)))
    with pytest.raises(OfframpError, match=r"confidences=\('entropy_edges',\)"):
        policy.decide(0, dense(4, 2).evidence([0]))


def test_an_answer_of_another_shape_is_refused() -> None:
    for answer in (torch.ones(2, 1, dtype=torch.bool), torch.ones(2), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(OfframpError, match=r"bool \(2,\)"):
            checked(answer, 2, 0)


def test_empty_batch_and_batch_of_one() -> None:
    policy = Thresholds(thresholds=(0.5,))
    logits = classify(5, 1).logits
    assert logits is not None
    assert policy.decide(0, Evidence(logits=logits[:0, :1])).shape == (0,)
    whole = policy.decide(0, Evidence(logits=logits[:, :1]))
    assert [bool(policy.decide(0, Evidence(logits=logits[n:n + 1, :1]))) for n in range(5)] == whole.tolist()

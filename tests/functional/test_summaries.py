import numpy as np
import pytest
import torch

from offramp.errors import DataError, OfframpError
from offramp.functional import confidence
from offramp.functional.summaries import agreement, evidence_of, histogram, mean_of_histogram, share_above, summarise


def test_histogram_against_numpy() -> None:
    scores = torch.rand(3, 20, 20)
    scores[0, 0, :4] = torch.tensor([0.0, 1.0, 0.5, 1023 / 1024])
    for n, counts in enumerate(histogram(scores)):
        expected, _ = np.histogram(scores[n].double().numpy(), bins=1024, range=(0.0, 1.0))
        assert (counts.numpy() == expected).all()


def test_share_above_an_edge_is_exact() -> None:
    scores = torch.rand(4, 300)
    scores[0, :3] = torch.tensor([0.75, 0.75 - 2**-24, 1.0])
    for edge in (0.0, 0.5, 0.75, 1023 / 1024):
        torch.testing.assert_close(share_above(histogram(scores), edge), (scores >= edge).double().mean(1),
                                   atol=0, rtol=0)
    for off in (0.3, 1.0, -0.5):
        with pytest.raises(OfframpError, match="bin edge"):
            share_above(histogram(scores), off)


def test_mean_is_within_half_a_bin() -> None:
    scores = torch.rand(4, 1000)
    assert (mean_of_histogram(histogram(scores)) - scores.double().mean(1)).abs().max() <= 1 / 2048 + 1e-12


def test_summary_says_what_the_pixels_say() -> None:
    logits = torch.randn(3, 4, 5, 6)
    said = summarise(logits)
    assert torch.equal(said.labels, logits.argmax(1))
    torch.testing.assert_close(said.probs, logits.softmax(1).mean((2, 3)))
    assert set(said.histograms) == {"top", "margin", "entropy"}
    assert torch.equal(said.histograms["margin"], histogram(confidence.margin(logits)))
    assert all((counts.sum(1) == 30).all() for counts in said.histograms.values())
    assert set(summarise(logits, confidences=("top",)).histograms) == {"top"}


def test_rows_do_not_see_each_other() -> None:
    logits = torch.randn(5, 4, 6, 6)
    whole, rows = summarise(logits), torch.tensor([3, 0])
    part, chosen = summarise(logits[rows]), whole.select(rows)
    assert torch.equal(part.labels, chosen.labels)
    assert torch.equal(part.histograms["top"], chosen.histograms["top"])
    torch.testing.assert_close(part.probs, chosen.probs)


def test_evidence_of_the_exits_so_far() -> None:
    first, second = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    evidence = evidence_of([summarise(first), summarise(second)])
    assert len(evidence) == 2
    assert evidence.probs is not None and evidence.probs.shape == (2, 2, 3)
    assert evidence.histograms["top"].shape == (2, 2, 1024)
    assert evidence.agreement is not None and (evidence.agreement[:, 1] == 1).all()
    same = (first.argmax(1) == second.argmax(1)).flatten(1).float().mean(1)
    torch.testing.assert_close(evidence.agreement[:, 0], same)
    torch.testing.assert_close(agreement(first.argmax(1), second.argmax(1)), same)


def test_nan_is_refused_by_row() -> None:
    logits = torch.randn(3, 4, 5, 5)
    logits[1, 2, 3, 3] = torch.nan
    with pytest.raises(DataError, match="row 1"):
        summarise(logits)
    with pytest.raises(OfframpError, match="pixel logits"):
        summarise(torch.zeros(3, 4))

import numpy as np
import pytest
import torch

from offramp.errors import DataError, OfframpError
from offramp.functional import confidence
from offramp.functional.edges import semantic_edges, smooth_edges
from offramp.functional.summaries import (
    agreement,
    bin_scores,
    count_above,
    evidence_of,
    histogram,
    mean_of_histogram,
    share_above,
    summarise,
)
from offramp.types import CONFIDENCES, EDGED


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


def smooth_logits(rows: int = 3, classes: int = 5, size: tuple[int, int] = (30, 44)) -> torch.Tensor:
    """Pixel logits with regions, as a network's are."""
    draw = torch.Generator().manual_seed(rows)
    coarse = torch.randn(rows, classes, size[0] // 8 + 1, size[1] // 8 + 1, generator=draw)
    return torch.nn.functional.interpolate(coarse * 3, size, mode="bilinear")


@pytest.mark.parametrize("name", EDGED)
def test_edge_histograms_hold_the_smoothed_map(name: str) -> None:
    logits = smooth_logits()
    said = summarise(logits, confidences=(name, "margin"), stride=4)
    plain = confidence.BY_NAME[name.removesuffix("_edges")](logits)
    edges = semantic_edges(logits.argmax(1), 4)
    smoothed = smooth_edges(plain, edges, 4)
    assert 0.1 < edges.double().mean() < 0.9 and (smoothed - plain).abs().max() > 0.05
    counts = said.histograms[name]
    assert list(said.histograms) == [name, "margin"] and torch.equal(counts, histogram(smoothed))
    for level in range(64):
        wanted = (smoothed >= level / 64).flatten(1).double().mean(1)
        assert torch.equal(share_above(counts, level / 64), wanted)
    assert (mean_of_histogram(counts) - smoothed.double().mean((1, 2))).abs().max() <= 1 / 2048
    assert not torch.equal(counts, summarise(logits, confidences=(name,), stride=1).histograms[name]), "strides count"


@pytest.mark.parametrize("name", [*CONFIDENCES, *EDGED])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_share_is_the_histograms_to_the_last_bit(name: str, layout: torch.memory_format) -> None:
    logits = smooth_logits().contiguous(memory_format=layout)
    counts, base = summarise(logits, confidences=(*EDGED, *CONFIDENCES), stride=3).histograms[name], name.split("_")[0]
    for level in (0, 16, 40, 60):
        alone = confidence.read(logits[1:], (base,), labels=name in EDGED)
        few = bin_scores(alone.scores[base], alone.labels, stride=3, pixel_threshold=level / 64)
        assert torch.equal(share_above(few, level / 64), share_above(counts[1:], level / 64))
        assert torch.equal(few.sum(1), counts[1:].sum(1))
    assert share_above(count_above(torch.zeros(2, 3, 3, dtype=torch.bool), 0.5), 0.5).tolist() == [0, 0]


def test_unknown_confidences_are_refused() -> None:
    with pytest.raises(OfframpError, match="margin_edges"):
        summarise(smooth_logits(), confidences=("margin_edges",))


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

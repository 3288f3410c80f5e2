"""Masks and what is interpolated under them, against loops, scipy and gradients by difference."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from offramp.errors import OfframpError
from offramp.functional.confidence import entropy
from offramp.functional.masking import Reach, active, band, interpolate


def by_loops(raw: Tensor, mask: Tensor, lam: float, reach: str) -> Tensor:
    """The equation, place by place, in Python's own floats."""
    count, channels, height, width = raw.shape
    out = torch.zeros(raw.shape, dtype=torch.float64)
    for n in range(count):
        for y in range(height):
            for x in range(width):
                if mask[n, 0, y, x]:
                    out[n, :, y, x] = raw[n, :, y, x].double()
                    continue
                near = [(v, u) for v in range(max(0, y - 3), min(height, y + 4))
                        for u in range(max(0, x - 3), min(width, x + 4)) if mask[n, 0, v, u]]
                if reach == "halo" and not any(max(abs(v - y), abs(u - x)) == 1 for v, u in near):
                    continue
                weights = [math.exp(-lam**2 * ((v - y) ** 2 + (u - x) ** 2)) for v, u in near]
                for (v, u), weight in zip(near, weights, strict=True):
                    out[n, :, y, x] += weight / sum(weights) * raw[n, :, v, u].double()
    return out


MASKS = {
    "all": torch.ones(2, 1, 9, 11, dtype=torch.bool),
    "none": torch.zeros(2, 1, 9, 11, dtype=torch.bool),
    "corner": torch.zeros(2, 1, 9, 11, dtype=torch.bool).index_fill(2, torch.tensor([0]), True).logical_and(
        torch.arange(11) == 0),
    "half": torch.rand(2, 1, 9, 11, generator=torch.Generator().manual_seed(1)) < 0.5,
    "few": torch.rand(2, 1, 9, 11, generator=torch.Generator().manual_seed(2)) < 0.04,
    "thin": torch.rand(1, 1, 2, 1, generator=torch.Generator().manual_seed(3)) < 2,
}


@pytest.mark.parametrize("lam", [0.0, 0.7, 3.0, 5.0])
@pytest.mark.parametrize("reach", ["everywhere", "halo"])
@pytest.mark.parametrize("name", MASKS)
def test_it_is_the_equation(name: str, reach: Reach, lam: float) -> None:
    mask = MASKS[name]
    raw = torch.randn(mask.shape[0], 3, *mask.shape[2:])
    expected = by_loops(raw, mask, lam, reach)
    torch.testing.assert_close(interpolate(raw, mask, lam, reach=reach).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(interpolate(raw.double(), mask, lam, reach=reach), expected)


def test_it_is_a_normalised_convolution() -> None:
    mask, raw = MASKS["half"], torch.randn(2, 1, 9, 11, dtype=torch.float64)
    step = np.arange(-3, 4)
    kernel = np.exp(-0.8**2 * (step[:, None] ** 2 + step[None] ** 2))
    kernel[3, 3] = 0
    for n in range(2):
        on = mask[n, 0].numpy().astype(float)
        over = ndimage.correlate(raw[n, 0].numpy() * on, kernel, mode="constant")
        under = ndimage.correlate(on, kernel, mode="constant")
        said = interpolate(raw, mask, 0.8)[n, 0].numpy()
        np.testing.assert_allclose(said, np.where(on > 0, raw[n, 0].numpy(), over / under), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lam", [3.0, 12.0])
def test_places_three_steps_away_are_means_still(lam: float) -> None:
    # exp(-9 * 18) is 0 in float32: weights that are not taken relative to the nearest one's give 0 / 0
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 0, 0] = True
    assert torch.equal(interpolate(torch.full((1, 2, 4, 4), 7.0), mask, lam), torch.full((1, 2, 4, 4), 7.0))
    assert interpolate(torch.full((1, 2, 4, 4), 7.0), mask, lam, reach="halo").count_nonzero() == 2 * 4


def test_a_constant_stays_a_constant_however_few_are_active() -> None:
    # divided by the sum of all weights, as public code does, it would fade where neighbours are inactive
    said = interpolate(torch.full((2, 3, 9, 11), 5.0), MASKS["half"], 0.5)
    torch.testing.assert_close(said, torch.full_like(said, 5.0))


def test_what_inactive_places_hold_is_never_read() -> None:
    raw = torch.randn(2, 3, 9, 11)
    dirty = torch.where(MASKS["few"], raw, torch.tensor(float("nan")))
    assert torch.equal(interpolate(dirty, MASKS["few"], 3.0), interpolate(raw, MASKS["few"], 3.0))


@pytest.mark.parametrize("reach", ["everywhere", "halo"])
def test_gradients_reach_the_map_and_lambda(reach: Reach) -> None:
    mask = MASKS["few"][:, :, :6, :7] | (torch.arange(7) == 5)
    raw = torch.randn(2, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    lam = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, l: interpolate(r, mask, l, reach=reach), (raw, lam))
    interpolate(raw, mask, lam, reach=reach).square().sum().backward()
    assert raw.grad is not None and (raw.grad[~mask.expand_as(raw)] == 0).all()
    assert lam.grad is not None and lam.grad != 0


def test_with_all_active_nothing_changes_and_layouts_are_kept() -> None:
    raw = torch.randn(2, 3, 9, 11).contiguous(memory_format=torch.channels_last)
    assert torch.equal(interpolate(raw, MASKS["all"], 3.0), raw)
    said = interpolate(raw, MASKS["half"], 3.0)
    assert said.is_contiguous(memory_format=torch.channels_last)
    assert interpolate(raw.contiguous(), MASKS["half"], 3.0).is_contiguous()
    assert interpolate(raw.bfloat16(), MASKS["half"], 3.0).dtype == torch.bfloat16
    assert interpolate(raw[:0], MASKS["all"][:0], 3.0).shape == (0, 3, 9, 11)


def test_a_known_band_serves_every_map_of_its_mask() -> None:
    found = band(MASKS["half"], "halo")
    for channels in (1, 5):
        raw = torch.randn(2, channels, 9, 11)
        assert torch.equal(interpolate(raw, MASKS["half"], 2.0, reach="halo", band_=found),
                           interpolate(raw, MASKS["half"], 2.0, reach="halo"))


def test_active_is_what_falls_short_of_the_threshold() -> None:
    logits = torch.randn(2, 4, 5, 6) * 3
    probs = logits.double().softmax(1).amax(1, keepdim=True)
    assert torch.equal(active(logits, "top", 0.7), probs < 0.7)
    assert torch.equal(active(logits, "entropy", 0.6), entropy(logits)[:, None] < 0.6)
    assert torch.equal(active(logits, "value", 2.0), logits.amax(1, keepdim=True) >= 2.0)
    assert active(logits, "top", 1.0 + 1e-9).all() and not active(logits, "top", 0.0).any()
    assert torch.equal(active(logits.requires_grad_(), "margin", -1.0), torch.zeros(2, 1, 5, 6, dtype=torch.bool))


def test_a_value_at_its_threshold_is_active_and_a_certainty_of_one_is_not() -> None:
    assert active(torch.full((1, 3, 1, 1), 2.0), "value", 2.0).all()
    assert not active(torch.tensor([200.0, 0.0]).view(1, 2, 1, 1), "top", 1.0).any()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_share_settles_the_surest_of_each_sample(share: float) -> None:
    logits = torch.randn(3, 4, 5, 8)
    scores, mask = logits.double().softmax(1).amax(1).flatten(1), active(logits, "top", share=share).flatten(1)
    assert (~mask).sum(1).tolist() == [round(share * 40)] * 3
    for n in range(3):
        if 0 < share < 1:
            assert scores[n][~mask[n]].min() >= scores[n][mask[n]].max()
    heat = active(logits, "value", share=0.5).flatten(1)
    assert all(logits.amax(1).flatten(1)[n][~heat[n]].max() <= logits.amax(1).flatten(1)[n][heat[n]].min()
               for n in range(3))


def test_random_follows_its_seed_alone() -> None:
    def draw(seed: int, scale: float = 1.0) -> Tensor:
        return active(torch.randn(2, 4, 9, 9) * scale, "random", share=0.3,
                      generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(5), draw(5, 100.0)) and not torch.equal(draw(5), draw(6))
    assert (~draw(5)).flatten(1).sum(1).tolist() == [24, 24] and not torch.equal(draw(5)[0], draw(5)[1])


def test_a_grid_stays_active() -> None:
    mask = active(torch.full((1, 2, 5, 7), 1.0), "top", 0.0, grid=3)
    assert mask[0, 0].nonzero().tolist() == [[y, x] for y in (0, 3) for x in (0, 3, 6)]


def test_what_is_not_a_number_is_never_settled() -> None:
    logits = torch.zeros(1, 2, 1, 3)
    logits[..., 1] = float("nan")
    for mask in (active(logits, "top", 0.1), active(logits, "value", 9.0), active(logits, "top", share=1.0)):
        assert mask.flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("call, words", [
    (lambda: active(torch.zeros(2, 3), "top", 0.5), "dense logits"),
    (lambda: active(torch.zeros(1, 3, 2, 2), "sure", 0.5), "a criterion of"),  # type: ignore[arg-type]
    (lambda: active(torch.zeros(1, 3, 2, 2), "top"), "one of them"),
    (lambda: active(torch.zeros(1, 3, 2, 2), "top", 0.5, share=0.5), "one of them"),
    (lambda: active(torch.zeros(1, 3, 2, 2), "random", 0.5), "expected a share"),
    (lambda: active(torch.zeros(1, 3, 2, 2), "top", share=1.5), r"a share in \[0, 1\]"),
    (lambda: band(torch.zeros(1, 1, 2, 2)), "a bool mask"),
    (lambda: band(torch.ones(1, 1, 2, 2, dtype=torch.bool), "far"), "a reach of"),  # type: ignore[arg-type]
    (lambda: interpolate(torch.zeros(2, 3, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool), 3.0), "and its mask"),
])
def test_faults_are_told(call, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OfframpError, match=words):
        call()

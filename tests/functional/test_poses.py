"""Heatmaps of poses: drawn, read, and measured; every number beside a plain loop over numpy, or a closed form."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from offramp.errors import OfframpError
from offramp.functional.poses import carried, decode, head_sizes, heatmaps, inverse, mirrored_back, pckh

PAIRS = ((0, 2),)


def drawn_by_hand(x: float, y: float, height: int, width: int, sigma: float) -> np.ndarray | None:
    """The authors' way: a patch of 6 sigma + 1 places, pasted where it overlaps the map."""
    reach = int(3 * sigma)
    mx, my = math.floor(x + 0.5), math.floor(y + 0.5)
    if mx + reach < 0 or my + reach < 0 or mx - reach >= width or my - reach >= height:
        return None
    made = np.zeros((height, width))
    for v in range(height):
        for u in range(width):
            if abs(u - mx) <= reach and abs(v - my) <= reach:
                made[v, u] = math.exp(-((u - mx) ** 2 + (v - my) ** 2) / (2 * sigma**2))
    return made


@pytest.mark.parametrize("sigma", [2.0, 1.5, 1.0])
def test_gaussians_are_those_drawn_by_hand(sigma: float) -> None:
    points = torch.tensor([[[4.4, 3.6], [0.0, 0.0], [18.0, 5.0], [-3.4, 8.0], [40.0, 5.0], [5.0, -9.0]],
                           [[7.5, 3.5], [2.0, 2.0], [11.0, 8.0], [-0.6, 1.0], [5.0, 5.0], [12.49, 9.0]]])
    known = torch.ones(2, 6, dtype=torch.bool)
    known[1, 4] = False
    maps = heatmaps(points, known, (9, 12), sigma=sigma)
    assert maps.shape == (2, 6, 9, 12) and maps.dtype == torch.float32
    for n in range(2):
        for k in range(6):
            true = drawn_by_hand(*points[n, k].tolist(), 9, 12, sigma) if known[n, k] else None
            if true is None:
                assert maps[n, k].isnan().all()
            else:
                np.testing.assert_allclose(maps[n, k].numpy(), true, atol=1e-6)
    assert maps[0, 0, 4, 4] == 1 and maps[0, 4].isnan().all() and maps[1, 4].isnan().all()


def test_what_is_drawn_is_read_back() -> None:
    generator = torch.Generator().manual_seed(3)
    points = torch.rand(5, 7, 2, generator=generator) * torch.tensor([19.0, 11.0]) + 2
    said, values = decode(heatmaps(points, torch.ones(5, 7, dtype=torch.bool), (16, 24)))
    assert torch.equal(said, (points + 0.5).floor()) and torch.equal(values, torch.ones(5, 7))


def test_a_quarter_of_a_place_towards_the_higher_neighbour() -> None:
    maps = torch.rand(4, 6, 7, 5, generator=torch.Generator().manual_seed(0)) - 0.5
    maps[0, 0] = 0  # all equal: the first place, whose neighbours lie on one side alone
    maps[0, 1, :, :] = 0
    maps[0, 1, 3, 2] = 1  # equal neighbours: where it is
    maps[0, 2] = -1.0
    maps[0, 2, 6, 4] = -0.5  # a corner, nothing above zero
    said, values = decode(maps)
    for n in range(4):
        for k in range(6):
            one = maps[n, k].numpy()
            y, x = np.unravel_index(one.argmax(), one.shape)
            px, py = float(x), float(y)
            if 0 < x < 4:
                px += 0.25 * np.sign(one[y, x + 1] - one[y, x - 1])
            if 0 < y < 6:
                py += 0.25 * np.sign(one[y + 1, x] - one[y - 1, x])
            assert said[n, k].tolist() == [px, py] and values[n, k] == one.max()
    assert said[0, 1].tolist() == [2, 3] and said[0, 2].tolist() == [4, 6]


def test_a_mirrored_picture_says_the_same() -> None:
    """A network that sees exactly: its maps stand for pixels 4 u, of the picture and of its mirror image alike."""
    joints = torch.rand(400, 3, 2, generator=torch.Generator().manual_seed(2)) * 40 + 12
    known = torch.ones(400, 3, dtype=torch.bool)
    seen = torch.stack([63 - joints[..., 0], joints[..., 1]], -1)[:, [2, 1, 0]]
    direct = decode(heatmaps(joints / 4, known, (16, 16)))[0]
    back = decode(mirrored_back(heatmaps(seen / 4, known, (16, 16)), PAIRS))[0]
    off = (back - direct).mean((0, 1))
    assert off[0] == pytest.approx(0.25, abs=0.05) and off[1] == 0  # not moved it would be -0.75
    one = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 3, 1, 8) + torch.tensor([0.0, 10, 20]).view(1, 3, 1, 1)
    assert mirrored_back(one, PAIRS)[0, 0, 0].tolist() == [27, 27, 26, 25, 24, 23, 22, 21]
    assert mirrored_back(one, PAIRS)[0, 1, 0].tolist() == [17, 17, 16, 15, 14, 13, 12, 11]


def test_affine_maps_and_back() -> None:
    generator = torch.Generator().manual_seed(1)
    affines = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    points = torch.randn(4, 5, 2, generator=generator, dtype=torch.float64)
    there = carried(points, affines)
    for n in range(4):
        for k in range(5):
            want = affines[n].numpy() @ np.append(points[n, k].numpy(), 1)
            np.testing.assert_allclose(there[n, k].numpy(), want, rtol=1e-12)
    torch.testing.assert_close(carried(there, inverse(affines)), points)


def by_the_authors(points: np.ndarray, truth: np.ndarray, missing: np.ndarray, boxes: np.ndarray) -> tuple[float, list]:
    """PCKh@0.5 as HRNet's authors evaluate MPII, joint by joint and person by person; per cent."""
    people, joints = missing.shape
    hits, counts = np.zeros(joints), np.zeros(joints)
    for n in range(people):
        head = 0.6 * math.dist(boxes[n, 0], boxes[n, 1])
        for k in range(joints):
            if not missing[n, k]:
                counts[k] += 1
                hits[k] += math.dist(points[n, k], truth[n, k]) / head <= 0.5
    with np.errstate(invalid="ignore"):
        each = 100 * hits / counts
    kept = np.array([k for k in range(joints) if k not in (6, 7)])
    weights = counts[kept] / counts[kept].sum()
    return float(np.nansum(each[kept] * weights)), each.tolist()


def random_people(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    truth = torch.rand(n, 16, 2, generator=generator, dtype=torch.float64) * 500
    said = truth + torch.randn(n, 16, 2, generator=generator, dtype=torch.float64) * 15
    known = torch.rand(n, 16, generator=generator) < 0.8
    low = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 100
    return said, truth, known, torch.cat([low, low + 20 + torch.rand(n, 2, generator=generator) * 40], 1)


@pytest.mark.parametrize("people", [1, 40])
def test_pckh_is_that_of_the_authors(people: int) -> None:
    said, truth, known, boxes = random_people(people)
    mean, each = by_the_authors(said.numpy(), truth.numpy(), ~known.numpy(), boxes.view(-1, 2, 2).numpy())
    found = pckh(said, truth, known, head_sizes(boxes), left_out=(6, 7))
    assert 100 * found.mean == pytest.approx(mean, abs=1e-9) and 10 < mean < 90
    np.testing.assert_allclose(100 * found.joints.numpy(), each, atol=1e-9)
    assert found.counts.tolist() == known.sum(0).tolist()
    everything = pckh(said, truth, known, head_sizes(boxes))
    assert everything.mean == pytest.approx((found.joints * found.counts).nansum().item() / int(known.sum()))


def test_pckh_in_closed_form() -> None:
    """Everything off by half a head is found, by a little more is not; what is unknown counts nowhere."""
    truth = torch.zeros(3, 16, 2)
    known = torch.ones(3, 16, dtype=torch.bool)
    known[:, 0], known[0, 1] = False, False
    heads = torch.tensor([10.0, 20.0, 40.0])
    off = torch.tensor([3.0, 4.0])[None, None] * heads[:, None, None] / 10  # half a head long
    assert pckh(truth + off, truth, known, heads).mean == 1
    assert pckh(truth + off * 1.001, truth, known, heads).mean == 0
    assert pckh(truth + off * 1.001, truth, known, heads, threshold=0.51).mean == 1
    said = truth + torch.tensor([0.0, 10.0])  # a head, half a head and a quarter of one
    found = pckh(said, truth, known, heads)
    assert found.joints[1:].tolist() == [1.0] + [pytest.approx(2 / 3)] * 14 and math.isnan(found.joints[0])
    assert found.mean == pytest.approx((2 + 2 * 14) / (2 + 3 * 14)) and found.counts.tolist() == [0, 2] + [3] * 14
    assert math.isnan(pckh(truth, truth, known & False, heads).mean)
    nan = truth.masked_fill(~known[..., None], math.nan)
    assert pckh(said, nan, known, heads).mean == found.mean


def test_what_cannot_be_measured_is_refused() -> None:
    truth, known, heads = torch.zeros(2, 4, 2), torch.ones(2, 4, dtype=torch.bool), torch.ones(2)
    with pytest.raises(OfframpError, match="points and truth"):
        pckh(truth[:1], truth, known, heads)
    for wrong in (0.0, math.nan):
        with pytest.raises(OfframpError, match="heads larger than 0"):
            pckh(truth, truth, known, torch.tensor([1.0, wrong]))
    with pytest.raises(OfframpError, match="heatmaps"):
        decode(torch.zeros(2, 4, 5))
    with pytest.raises(OfframpError, match="sigma > 0"):
        heatmaps(truth, known, (4, 4), sigma=0)
    with pytest.raises(OfframpError, match=r"known \(N, K\)"):
        heatmaps(truth, known[0], (4, 4))

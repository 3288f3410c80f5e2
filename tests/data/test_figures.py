"""Stick figures: the same bytes everywhere, joints where they are drawn, and a network can tell right from left."""

import hashlib
import pickle

import numpy as np
import pytest
import torch

from offramp.data import JOINT_PAIRS, JOINTS, Figures, Poses, figures, load_data
from offramp.data._canvas import Dice
from offramp.data._figure import UNIT, body, paint
from offramp.errors import DataError
from offramp.functional.poses import decode

GOLDEN = {
    (0, 0, 0, (96, 96)): "37d4759233e3b6e6",
    (7, 3, 12, (50, 88)): "41831ceabf66ba82",
    (2**40, 1, 99999, (256, 256)): "c9e69bb68886f85a",
}


@pytest.mark.parametrize("what", GOLDEN, ids=str)
def test_same_bytes_everywhere(what: tuple[int, int, int, tuple[int, int]]) -> None:
    seed, stream, index, size = what
    one = body(Dice(seed, 2 * stream, index), size, 0, 1000)
    page = paint(Dice(seed, 2 * stream + 1, index), one, size)
    digest = hashlib.sha256(page.tobytes() + repr((one.joints, one.head, one.radius)).encode()).hexdigest()[:16]
    assert digest == GOLDEN[what], "the drawing changed: raise VERSION in figures.py, and put the new digest here"


def test_splits_share_nothing_and_order_does_not_matter() -> None:
    source = load_data("figures?n=6&size=64")
    assert [len(source[s]) for s in source.splits] == [6, 6, 3, 3] and source.class_names == JOINTS
    pictures = [split.picture(i).tobytes() for split in map(source.split, source.splits) for i in range(3)]
    assert len(set(pictures)) == 12
    longer = figures(9)["test"]
    assert isinstance(longer, Figures) and longer.size == (96, 96)
    one, other = load_data("figures?n=6", "test"), load_data("figures?n=8", "test")
    for i in (2, 0, 1):
        assert torch.equal(one[i][0], other[i][0]) and torch.equal(one[i][1], other[i][1])
    assert one.fingerprint != other.fingerprint != load_data("figures?n=8&seed=1", "test").fingerprint
    assert not source["unlabelled"].labels and source["unlabelled"][0].shape == (3, 64, 64)


def test_a_crop_is_the_picture_itself() -> None:
    split = load_data("figures?n=2&size=64x80&mean=0,0,0&std=1,1,1", "train")
    assert isinstance(split, Poses)
    want = torch.from_numpy(np.array(split.picture(1))).permute(2, 0, 1) / 255
    assert torch.equal(split[1][0], want) and want.shape == (3, 64, 80) and split[1][1].shape == (16, 16, 20)


def test_joints_are_where_they_are_drawn() -> None:
    """On easy figures a joint's pixel is of the limb, not of the background around the figure."""
    for i in range(20):
        one = body(Dice(5, 0, i), (96, 96), 0, 0)
        page = paint(Dice(5, 1, i), one, (96, 96)).astype(int)
        ankle, wrist = one.joints[0], one.joints[10]
        for x, y in (ankle, wrist):
            limb = page[round(y / UNIT), round(x / UNIT)]
            beside = [page[round(y / UNIT), 2], page[round(y / UNIT), 93]]
            assert min(np.abs(limb - b).max() for b in beside) > 6, (i, limb, beside)
        facing = one.joints[12][0] < one.joints[13][0]
        assert one.facing and facing  # its right shoulder on the picture's left


def test_harder_figures_bend_further_and_turn_their_backs() -> None:
    easy, hard = ([body(Dice(1, 0, i), (96, 96), level, level) for i in range(300)] for level in (0, 1000))
    assert all(one.facing for one in easy) and 40 < sum(not one.facing for one in hard) < 110

    def lean(one: object) -> float:
        pelvis, thorax = one.joints[6], one.joints[7]  # type: ignore[attr-defined]
        return abs(np.arctan2(thorax[0] - pelvis[0], pelvis[1] - thorax[1]))

    assert np.mean([lean(one) for one in hard]) > 2 * np.mean([lean(one) for one in easy])


def test_what_is_drawn_scores_one() -> None:
    """Heatmaps themselves, decoded: every joint that has a place is found; mirrored names are not."""
    split = load_data("figures?n=40&size=96", "train")
    assert isinstance(split, Figures)
    points = decode(torch.stack([split[i][1] for i in range(40)]).nan_to_num())[0]
    assert split.pckh(points).mean == 1
    order = list(range(16))
    for one, other in JOINT_PAIRS:
        order[one], order[other] = other, one
    assert split.pckh(points[:, order]).mean < 0.5
    assert split.pckh(torch.full_like(points, 12.0)).mean < 0.2
    known = split.truth.counted
    assert 0.97 < known.double().mean() <= 1 and torch.equal(split.pckh(points).counts, known.sum(0))


def test_a_joint_outside_the_picture_has_no_place() -> None:
    split = load_data("figures?n=300&size=48x96&difficulty=1", "train")
    assert isinstance(split, Figures)
    out = [(i, k) for i, p in enumerate(split.people) for k in range(16) if not p.known[k]]
    assert out
    for i, k in out:
        x, y = split.people[i].joints[k]
        assert not (0 <= x <= 95 and 0 <= y <= 47) and split[i][1][k].isnan().all()


def test_copies_for_workers_are_light() -> None:
    split = figures(4)["train"]
    assert isinstance(split, Figures)
    split[0]
    assert split._kept and not pickle.loads(pickle.dumps(split))._kept


@pytest.mark.parametrize("options", ["n=0", "seed=-1", "difficulty=0.9-0.1", "size=30", "sigma=0"])
def test_settings_that_cannot_be_drawn(options: str) -> None:
    with pytest.raises(DataError):
        load_data(f"figures?{options}", "train")


def test_no_path() -> None:
    with pytest.raises(DataError, match="figures without a path"):
        load_data("figures:somewhere")
    with pytest.raises(DataError, match="did you mean figures"):
        load_data("figure")

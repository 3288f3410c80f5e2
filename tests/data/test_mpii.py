"""MPII as HRNet's authors lay it out: counting from 1, crops, halves by picture, and heads from either file."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import map_coordinates

from offramp.data import JOINT_PAIRS, JOINTS, Poses, load_data, pose_change
from offramp.data.poses import crop_of
from offramp.errors import DataError
from offramp.functional.poses import decode

REAL = Path(__file__).parents[3] / "shared" / "data" / "pose" / "mpii"
SIZE = 64


def person(image: str, at: tuple[float, float], scale: float, unseen: tuple[int, ...] = ()) -> dict[str, Any]:
    """Joints on a ring around ``at``, counted from 1, some without a place."""
    ring = [(at[0] + 20 * math.cos(k), at[1] + 20 * math.sin(k)) for k in range(16)]
    joints = [(-1.0, -1.0) if k in unseen else (round(x), round(y)) for k, (x, y) in enumerate(ring)]
    return {"image": image, "joints": joints, "joints_vis": [int(k not in unseen) for k in range(16)],
            "center": list(at), "scale": scale}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three people of train in two pictures, ten of valid in seven; each known joint is a white spot of 3x3."""
    (tmp_path / "images").mkdir()
    (tmp_path / "annot").mkdir()
    people = {
        "train": [person("a.jpg", (61, 41), 0.4), person("a.jpg", (101, 81), 0.3),
                  person("b.jpg", (71, 61), 0.4, (9,))],
        "valid": [person(f"v{i % 7}.jpg", (61 + i, 51), 0.3 + i / 50, (0, i)) for i in range(10)],
    }
    pages: dict[str, np.ndarray] = {}
    for listed in people.values():
        for one in listed:
            page = pages.setdefault(one["image"], np.zeros((120, 160, 3), np.uint8))
            for (x, y), known in zip(one["joints"], one["joints_vis"], strict=True):
                if known:
                    page[int(y) - 2 : int(y) + 1, int(x) - 2 : int(x) + 1] = 255
    for name, page in pages.items():
        Image.fromarray(page).save(tmp_path / "images" / name, format="PNG")
    for part, listed in people.items():
        (tmp_path / "annot" / f"{part}.json").write_text(json.dumps(listed))
    return tmp_path


def split(tree: Path, name: str, options: str = "", **how: Any) -> Poses:
    found = load_data(f"mpii:{tree}?size={SIZE}&mean=0,0,0&std=1,1,1{options}", name, **how)
    assert isinstance(found, Poses)
    return found


def heads(tree: Path, count: int = 10, **more: Any) -> np.ndarray:
    """A gt_valid.mat as the authors have it, boxes of i + 3 by i + 4 pixels."""
    boxes = np.zeros((2, 2, count))
    boxes[0], boxes[1, 0], boxes[1, 1] = 5, 8 + np.arange(count), 9 + np.arange(count)
    savemat(tree / "annot" / "gt_valid.mat", {"headboxes_src": boxes, **more})
    return boxes


def test_splits_are_disjoint_by_picture(tree: Path) -> None:
    source = load_data(f"mpii:{tree}")
    assert source.class_names == JOINTS and len(JOINTS) == 16 and source.task == "dense"
    assert [len(source[s]) for s in ("train", "unlabelled", "valid")] == [3, 3, 10]
    pictures = [{name.split("#")[0] for name in source[s].names} for s in ("calibration", "test")]
    assert not pictures[0] & pictures[1] and len(pictures[0] | pictures[1]) == 7
    assert sorted(source["calibration"].names + source["test"].names) == sorted(source["valid"].names)
    assert set(load_data(f"mpii:{tree}?seed=1", "test").names) != set(source["test"].names)
    image, maps = source["train"][0]
    assert image.shape == (3, 256, 256) and maps.shape == (16, 64, 64) and maps.dtype == torch.float32
    assert not source["unlabelled"].labels and source["unlabelled"][0].shape == (3, 256, 256)
    assert source["train"].says == "heatmaps" and source["unlabelled"].names == source["train"].names
    assert len(source["calibration+test"]) == 10 and source["calibration+test"].says == "heatmaps"


def test_a_crop_is_the_authors(tree: Path) -> None:
    """Their formula: the middle of the crop is the centre, moved down by 15 scale, and 250 scale are its width.

    SciPy, asked for every pixel's place in the picture, is the witness of what is seen there.
    """
    train = split(tree, "train")
    for index, (x, y, scale) in enumerate([(61, 41, 0.4), (101, 81, 0.3), (71, 61, 0.4)]):
        image, maps = train[index]
        by = SIZE / (1.25 * 200 * scale)
        middle = (x - 1, y + 15 * scale - 1)
        rows, columns = np.mgrid[:SIZE, :SIZE]
        places = (rows - SIZE / 2) / by + middle[1], (columns - SIZE / 2) / by + middle[0]
        seen = map_coordinates(np.array(train.picture(index))[..., 0].astype(float), places, order=1, cval=0)
        inside = (places[0] >= 0) & (places[0] <= 119) & (places[1] >= 0) & (places[1] <= 159)
        assert np.abs(image[0].numpy() * 255 - seen)[inside].max() <= 1.5 and seen.max() > 200 and inside.mean() > 0.8
        entry = json.loads((tree / "annot" / "train.json").read_text())[index]
        said, _ = decode(maps[None].nan_to_num())
        for k, (u, v) in enumerate(entry["joints"]):
            if not entry["joints_vis"][k]:
                assert maps[k].isnan().all()
                continue
            at = ((u - 1 - middle[0]) * by + SIZE / 2, (v - 1 - middle[1]) * by + SIZE / 2)
            if all(8 <= p <= SIZE - 8 for p in at):
                assert said[0, k].tolist() == [math.floor(p / 4 + 0.5) for p in at]
                assert image[0, round(at[1]), round(at[0])] > 0.5, "the joint's white spot has gone elsewhere"


def test_points_come_back_to_the_picture(tree: Path) -> None:
    heads(tree)
    valid = split(tree, "valid")
    maps = torch.stack([valid[i][1] for i in range(10)])
    found = valid.in_picture(decode(maps.nan_to_num())[0])
    for i, entry in enumerate(json.loads((tree / "annot" / "valid.json").read_text())):
        coarse = 1.25 * 200 * entry["scale"] / SIZE * 4  # pixels of the picture per place
        for k in range(16):
            if not maps[i, k].isnan().any():
                off = (found[i, k] - (torch.tensor(entry["joints"][k]) - 1)).abs().max()
                assert off <= 0.5 * coarse + 1e-6


def test_pckh_by_the_authors_file(tree: Path) -> None:
    """Truth is the file's, counted from 1; a head is 0.6 times its box's diagonal; half a head off is found."""
    entries = json.loads((tree / "annot" / "valid.json").read_text())
    truth = np.array([e["joints"] for e in entries], float)
    missing = np.zeros((16, 10))
    missing[3, 4] = 1
    boxes = heads(tree, pos_gt_src=truth.transpose(1, 2, 0) + 2, jnt_missing=missing)
    valid = split(tree, "valid")
    sizes = 0.6 * np.hypot(*(boxes[1] - boxes[0]))
    size = torch.from_numpy(sizes)
    assert torch.allclose(valid.truth.heads, size)
    crops = [crop_of(p.centre, p.side, valid.size) for p in valid.people]
    for share, found in ((0.49, 1.0), (0.51, 0.0)):
        places = []
        for i, (crop, head) in enumerate(zip(crops, sizes, strict=True)):
            aim = truth[i] + 2 - 1 + np.array([share * head, 0.0])
            places.append((aim @ crop[:, :2].T + crop[:, 2]) / 4)
        score = valid.pckh(torch.from_numpy(np.stack(places)))
        assert score.mean == found and score.counts.tolist() == [10, 10, 10, 9] + [10] * 12
    halves = [split(tree, name) for name in ("calibration", "test")]
    rows = [[int(name.split("#")[1]) for name in half.names] for half in halves]
    assert all(torch.equal(half.truth.heads, valid.truth.heads[mine]) for half, mine in zip(halves, rows, strict=True))


def test_heads_from_json_and_none(tree: Path) -> None:
    points = torch.zeros(10, 16, 2)
    with pytest.raises(DataError, match="head boxes"):
        split(tree, "valid").pckh(points)
    file = tree / "annot" / "gt_valid.json"
    file.write_text(json.dumps([[5, 5, 8 + i, 9 + i] for i in range(10)]))
    from_json = split(tree, "valid").truth
    assert from_json.counted.sum() == 10 * 14 + 1  # two of each have no place, of the first one the same twice
    heads(tree)
    assert torch.equal(from_json.heads, split(tree, "valid").truth.heads)
    assert split(tree, "train").truth is None
    with pytest.raises(DataError, match=r"points \(10, K, 2\)"):
        split(tree, "valid").pckh(points[:4])


def test_what_is_wrong_is_said(tree: Path) -> None:
    annot = tree / "annot"
    heads(tree, 9)
    with pytest.raises(DataError, match="each of 10 people.*boxes \\(9, 2, 2\\)"):
        split(tree, "valid")
    (annot / "gt_valid.mat").write_bytes(b"no matrix at all")
    with pytest.raises(DataError, match="gt_valid.mat"):
        split(tree, "valid")
    (annot / "gt_valid.mat").unlink()
    for content in ("[[1, 2, 3]]", '["a"]', "{}", "["):
        (annot / "gt_valid.json").write_text(content)
        with pytest.raises(DataError, match="gt_valid.json"):
            split(tree, "valid")
    (annot / "gt_valid.json").write_text(json.dumps([[5, 5, 5, 5]] * 10))
    with pytest.raises(DataError, match="larger than a point"):
        split(tree, "valid")
    good = json.loads((annot / "train.json").read_text())
    for change, said in ((lambda e: e.pop("scale"), "number 1 \\(no 'scale'"),
                         (lambda e: e.update(joints=[[1, 2]]), "joints \\(1, 2\\)"),
                         (lambda e: e.update(scale=0), "scale 0"), (lambda e: e.update(image="x.jpg"), "x.jpg"),
                         (lambda e: e.update(center=None), "number 1")):
        bad = json.loads(json.dumps(good))
        change(bad[1])
        (annot / "train.json").write_text(json.dumps(bad))
        with pytest.raises(DataError, match=said):
            split(tree, "train")
    (annot / "train.json").write_text("[]")
    with pytest.raises(DataError, match="expected people"):
        split(tree, "train")
    (annot / "train.json").rename(annot / "training.json")
    with pytest.raises(DataError, match="did you mean training.json"):
        split(tree, "train")
    (annot / "training.json").write_text(json.dumps(good))
    (annot / "training.json").rename(annot / "train.json")
    (tree / "images" / "a.jpg").write_bytes(b"cut short")
    with pytest.raises(DataError, match="a.jpg"):
        split(tree, "train")[0]
    for options, said in (("size=62x64", "multiples of 4"), ("sigma=0", "sigma above 0")):
        with pytest.raises(DataError, match=said):
            load_data(f"mpii:{tree}?{options}", "train")
    with pytest.raises(DataError, match="pose_change"):
        split(tree, "train", augment=lambda image: image)
    (tree / "images").rename(tree / "pictures")
    with pytest.raises(DataError, match="no images in"):
        load_data(f"mpii:{tree}")


def test_picture_and_heatmaps_move_together(tree: Path) -> None:
    """However a crop is changed, each joint's white spot lies under the peak of its own heatmap."""
    torch.manual_seed(0)
    plain = split(tree, "train", "&size=128", augment=None)
    train = split(tree, "train", "&size=128", augment=pose_change(scale=0.2, rotation=40))
    assert train.fingerprint == plain.fingerprint
    looked = 0
    seen = set()
    for _ in range(12):
        image, maps = train[2]
        said, high = decode(maps[None].nan_to_num())
        seen.add(tuple(said.flatten().tolist()))
        assert maps[9].isnan().all() and torch.isfinite(image).all()
        for k in range(16):
            x, y = (4 * said[0, k]).long().tolist()
            if high[0, k] == 1 and 8 <= min(x, y) and max(x, y) < 120:
                looked += 1
                assert image[0, y - 2 : y + 3, x - 2 : x + 3].max() > 0.5
    assert looked > 80 and len(seen) == 12


def test_a_mirrored_crop_swaps_right_and_left(tree: Path) -> None:
    plain, mirror = split(tree, "train"), split(tree, "train", augment=pose_change(scale=0, rotation=0, flip=1))
    (image, maps), (other, swapped) = plain[0], mirror[0]
    # the middle is at W / 2: what was at x is at W - x, so that the first column comes from outside
    torch.testing.assert_close(other[:, :, 1:], image.flip(-1)[:, :, :-1], atol=1 / 255, rtol=0)
    order = list(range(16))
    for one, two in JOINT_PAIRS:
        order[one], order[two] = two, one
    assert order[JOINTS.index("right knee")] == JOINTS.index("left knee")
    assert all(JOINTS[k].split()[-1] == JOINTS[j].split()[-1] for k, j in enumerate(order))
    said, back = decode(maps[None])[0][0], decode(swapped[None])[0][0][order]
    assert ((16 - said[:, 0] - back[:, 0]).abs() <= 1).all() and torch.equal(said[:, 1], back[:, 1])


@pytest.mark.skipif(not REAL.is_dir(), reason="no real MPII excerpt beside the checkout: shared/data/pose/mpii")
def test_real_files(tmp_path: Path) -> None:
    """Five people of MPII: whoever stands upright does so in the crop, head first, and within it."""
    (tmp_path / "images").symlink_to(REAL)
    (tmp_path / "annot").mkdir()
    listed = json.loads((REAL / "test_mpii.json").read_text())
    for part in ("train", "valid"):
        (tmp_path / "annot" / f"{part}.json").write_text(json.dumps(listed))
    valid = load_data(f"mpii:{tmp_path}", "valid")
    assert isinstance(valid, Poses) and len(valid) == 5
    for i, entry in enumerate(listed):
        image, maps = valid[i]
        assert image.shape == (3, 256, 256) and image.std() > 0.3
        known = torch.tensor(entry["joints_vis"], dtype=torch.bool)
        taught = ~maps.isnan().any(2).any(1)
        assert torch.equal(known, taught), "every joint with a place is within the crop"
        points = decode(maps.nan_to_num()[None])[0][0]
        names = {name: points[k, 1] for k, name in enumerate(JOINTS)}
        assert names["head top"] < names["upper neck"] < names["pelvis"] < names["right knee"]
        back = valid.in_picture(decode(torch.stack([valid[j][1] for j in range(5)]).nan_to_num())[0])[i]
        off = (back - (torch.tensor(entry["joints"]) - 1)).abs().amax(1)
        assert off[known].max() <= 0.5 * 250 * entry["scale"] / 64 + 1e-6

import hashlib
import time

import numpy as np
import pytest
import torch

from offramp.data import IGNORE, SCENE_CLASSES, SCENE_KINDS, Scenes, flip_crop, scenes_splits
from offramp.data._street import PERSON, SIGN, TREE, draw
from offramp.errors import DataError

GOLDEN = {
    (0, 0, 0, (96, 128)): "f133120f0a91e412",
    (7, 3, 12, (50, 203)): "bbaa0051f75dbb3b",
    (2**40, 1, 99999, (33, 16)): "ddded66c70e604d7",
}


@pytest.mark.parametrize("what", GOLDEN, ids=str)
def test_same_bytes_everywhere(what: tuple[int, int, int, tuple[int, int]]) -> None:
    scene = draw(*what, 0, 1000)
    digest = hashlib.sha256(scene.rgb.tobytes() + scene.label.tobytes() + bytes([scene.kind])).hexdigest()
    assert digest[:16] == GOLDEN[what], "the drawing changed: raise VERSION in scenes.py, and put the new digest here"


def test_order_of_asking_does_not_matter() -> None:
    one, other = Scenes(5, (32, 48), seed=4), Scenes(9, (32, 48), seed=4)
    for i in (4, 0, 3, 1, 2):
        assert torch.equal(one[i][0], other[i][0]) and torch.equal(one[i][1], other[i][1])


def test_every_class_appears_and_nothing_else() -> None:
    count = np.zeros(256, dtype=np.int64)
    for i in range(60):
        count += np.bincount(draw(1, 0, i, (96, 128), 0, 1000).label.ravel(), minlength=256)
    share = count / count.sum()
    assert set(np.nonzero(count)[0].tolist()) == {*range(len(SCENE_CLASSES)), IGNORE} and len(SCENE_CLASSES) == 11
    assert share[:11].min() > 0.002, dict(zip(SCENE_CLASSES, share.round(4), strict=False))
    assert 0.2 < share[SCENE_CLASSES.index("road")] < 0.5 and share[IGNORE] < 0.05


def test_classification_names_what_is_in_the_same_picture() -> None:
    dense = Scenes(64, (96, 128), seed=2, difficulty=(0.0, 0.2))
    kinds = Scenes(64, (96, 128), seed=2, difficulty=(0.0, 0.2), task="classify")
    seen = set()
    for i in range(64):
        (picture, label), (same, kind) = dense[i], kinds[i]
        assert torch.equal(picture, same)
        name = SCENE_KINDS[int(kind)]
        seen.add(name)
        pixels = int((label == SCENE_CLASSES.index("pole" if name == "lamp" else name)).sum()) if name != "empty" else 0
        assert pixels > (25 if name in ("sign", "lamp") else 100) or name == "empty", (i, name, pixels)
    assert seen == set(SCENE_KINDS) and kinds.num_classes == 8


def test_difficulty_varies_by_image_and_costs_contrast() -> None:
    hard = Scenes(100, (32, 48)).difficulties()
    assert hard.min() < 0.1 and hard.max() > 0.9 and 0.4 < hard.mean() < 0.6

    def noise_over_contrast(low: float, high: float) -> float:
        pictures = [Scenes(12, (48, 64), difficulty=(low, high)).scene(i).rgb.astype(np.float64) for i in range(12)]
        return float(np.mean([np.abs(np.diff(p[:10], axis=1)).mean() / p.std() for p in pictures]))

    easy, middle, worst = noise_over_contrast(0, 0), noise_over_contrast(0.5, 0.5), noise_over_contrast(1, 1)
    assert easy < middle < worst and worst > 2 * easy, (easy, middle, worst)


def test_splits_share_no_picture() -> None:
    splits = scenes_splits(6, size=(32, 32))
    assert [*splits] == ["train", "unlabelled", "calibration", "test"]
    assert [len(s) for s in splits.values()] == [6, 6, 3, 3]
    pictures = [s.read(i)[0].numpy().tobytes() for s in splits.values() for i in range(len(s))]
    assert len(set(pictures)) == 18
    assert len({s.fingerprint for s in splits.values()}) == 4
    assert isinstance(splits["unlabelled"][0], torch.Tensor) and not splits["unlabelled"].labels
    assert scenes_splits(6, size=(32, 32), seed=1)["train"].read(0)[0].numpy().tobytes() not in pictures


def test_without_labels_the_same_pictures() -> None:
    bare, full = Scenes(3, (32, 32), labels=False), Scenes(3, (32, 32))
    assert torch.equal(bare[1], full[1][0]) and bare.fingerprint == full.fingerprint
    assert Scenes(3, (32, 32), difficulty=(0, 0.5)).fingerprint != full.fingerprint


@pytest.mark.parametrize("size", [(16, 16), (17, 91), (300, 20), (240, 320)])
def test_any_size(size: tuple[int, int]) -> None:
    for i in range(6):
        scene = draw(0, 0, i, size, 0, 1000)
        assert scene.rgb.shape == (*size, 3) and scene.label.shape == size and scene.rgb.std() > 1


def test_augmentation_keeps_the_pair_and_touches_training_alone() -> None:
    splits = scenes_splits(4, size=(32, 48), augment=flip_crop((32, 48), padding=8))
    torch.manual_seed(0)
    image, label = splits["train"][0]
    assert image.shape == (3, 32, 48) and label.shape == (32, 48) and label.dtype == torch.int64
    assert any(not torch.equal(splits["train"][0][0], image) for _ in range(5))
    assert torch.equal(splits["test"][0][0], splits["test"][0][0])


def test_fast_enough() -> None:
    best = 0.0
    for _ in range(3):
        start = time.process_time()
        for i in range(40):
            draw(0, 0, i, (96, 128), 0, 1000)
        best = max(best, 40 / (time.process_time() - start))
    assert best >= 150, f"{best:.0f} scenes of 96x128 a second on one core"


def test_bad_settings_are_all_named() -> None:
    with pytest.raises(DataError) as error:
        Scenes(0, (8, 128), difficulty=(0.9, 0.1))
    assert all(part in str(error.value) for part in ("n=0", "size=(8, 128)", "difficulty=(0.9, 0.1)"))


def test_main_objects_grow_smaller_with_difficulty() -> None:
    def pixels(low: int, high: int) -> float:
        found = [draw(5, 0, i, (96, 128), low, high) for i in range(80)]
        return float(np.mean([(s.label == cls).sum() for s in found for cls in (PERSON, SIGN, TREE)]))

    assert pixels(0, 100) > pixels(900, 1000)

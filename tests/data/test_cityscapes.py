from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from offramp.data import CITYSCAPES_PALETTE, CITYSCAPES_TRAIN_ID, IGNORE, load_data
from offramp.errors import DataError

# cityscapesScripts, helpers/labels.py: (name, id, trainId, colour) of every label that has a train id
OFFICIAL = [
    ("road", 7, 0, (128, 64, 128)), ("sidewalk", 8, 1, (244, 35, 232)), ("building", 11, 2, (70, 70, 70)),
    ("wall", 12, 3, (102, 102, 156)), ("fence", 13, 4, (190, 153, 153)), ("pole", 17, 5, (153, 153, 153)),
    ("traffic light", 19, 6, (250, 170, 30)), ("traffic sign", 20, 7, (220, 220, 0)),
    ("vegetation", 21, 8, (107, 142, 35)), ("terrain", 22, 9, (152, 251, 152)), ("sky", 23, 10, (70, 130, 180)),
    ("person", 24, 11, (220, 20, 60)), ("rider", 25, 12, (255, 0, 0)), ("car", 26, 13, (0, 0, 142)),
    ("truck", 27, 14, (0, 0, 70)), ("bus", 28, 15, (0, 60, 100)), ("train", 31, 16, (0, 80, 100)),
    ("motorcycle", 32, 17, (0, 0, 230)), ("bicycle", 33, 18, (119, 11, 32)),
]
CITIES = {"train": ("aachen", "bochum"), "val": ("frankfurt", "lindau"), "test": ("berlin",)}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three frames of 8x40 a city; column x of a label is id x modulo 34."""
    rng = np.random.default_rng(0)
    for split, cities in CITIES.items():
        for city in cities:
            for base in ("leftImg8bit", "gtFine"):
                (tmp_path / base / split / city).mkdir(parents=True)
            for frame in range(3):
                name = f"{city}_000000_{frame:06}"
                image = rng.integers(0, 256, (8, 40, 3), dtype=np.uint8)
                Image.fromarray(image).save(tmp_path / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
                if split != "test":
                    folder = tmp_path / "gtFine" / split / city
                    Image.fromarray(ids()).save(folder / f"{name}_gtFine_labelIds.png")
                    Image.new("RGBA", (40, 8)).save(folder / f"{name}_gtFine_color.png")
                    Image.new("I;16", (40, 8)).save(folder / f"{name}_gtFine_instanceIds.png")
    return tmp_path


def ids() -> np.ndarray:
    return np.tile(np.arange(40, dtype=np.uint8) % 34, (8, 1))


def test_classes_as_the_benchmark_has_them(tree: Path) -> None:
    source = load_data(f"cityscapes:{tree}")
    assert [(source.class_names[k], source.palette[k]) for k in range(19)] == [(o[0], o[3]) for o in OFFICIAL]
    assert {i: k for i, k in CITYSCAPES_TRAIN_ID.items() if k != IGNORE} == {o[1]: o[2] for o in OFFICIAL}
    assert source.num_classes == 19 and source["test"].palette == CITYSCAPES_PALETTE
    assert source.split("calibration+test").palette == CITYSCAPES_PALETTE


def test_ids_become_classes(tree: Path) -> None:
    image, label = load_data(f"cityscapes:{tree}", "train")[0]
    train_id = {o[1]: o[2] for o in OFFICIAL}
    assert image.shape == (3, 8, 40)
    assert label[3].tolist() == [train_id.get(x % 34, IGNORE) for x in range(40)]


def test_splits_are_disjoint_and_drawn_by_the_seed(tree: Path) -> None:
    source = load_data(f"cityscapes:{tree}")
    assert source.splits == ("train", "unlabelled", "calibration", "test", "submission")
    assert [len(source[s]) for s in source.splits] == [6, 6, 3, 3, 3]
    calibration, test = (set(source[s].names) for s in ("calibration", "test"))
    assert not calibration & test and all(n.startswith("leftImg8bit/val/") for n in calibration | test)
    assert set(source["unlabelled"].names) == set(source["train"].names) and not source["submission"].labels
    others = [set(load_data(f"cityscapes:{tree}?seed={s}", "test").names) for s in (0, 1, 2)]
    assert others[0] == test and len({frozenset(o) for o in others}) > 1


def test_train_ids_win_where_they_are_whole(tree: Path) -> None:
    files = sorted((tree / "gtFine" / "train").glob("*/*_labelIds.png"))
    for i, file in enumerate(files):
        if i == 3:  # an interrupted conversion: the ids still serve
            assert load_data(f"cityscapes:{tree}", "train")[0][1].unique().numel() == 20
        Image.new("L", (40, 8), 18).save(file.with_name(file.name.replace("labelIds", "labelTrainIds")))
    assert load_data(f"cityscapes:{tree}", "train")[5][1].unique().tolist() == [18]
    for file in files:
        file.unlink()
    assert load_data(f"cityscapes:{tree}", "train")[0][1].unique().tolist() == [18]


def test_no_folder_is_read_before_a_split_is_asked_for(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("listed")
    monkeypatch.setattr(Path, "glob", refuse)
    source = load_data(f"cityscapes:{tree}")
    with pytest.raises(AssertionError, match="listed"):
        source["train"]


def test_resizing_keeps_classes(tree: Path) -> None:
    image, label = load_data(f"cityscapes:{tree}?size=16x80", "train")[0]
    assert image.shape == (3, 16, 80) and label[0, 14:18].tolist() == [0, 0, 1, 1]


def test_unlabelled_and_submission_need_no_labels(tree: Path) -> None:
    (tree / "gtFine").rename(tree / "gtFin")
    source = load_data(f"cityscapes:{tree}")
    assert source["unlabelled"][0].shape == source["submission"][0].shape == (3, 8, 40)
    assert source.split("test", labels=False)[0].shape == (3, 8, 40)
    with pytest.raises(DataError, match="no gtFine in .*did you mean gtFin"):
        source["train"]


def test_lonely_files_are_named(tree: Path) -> None:
    (tree / "gtFine/train/aachen/aachen_000000_000001_gtFine_labelIds.png").rename(
        tree / "gtFine/train/aachen/aachen_000000_00001_gtFine_labelIds.png")
    with pytest.raises(DataError) as error:
        load_data(f"cityscapes:{tree}", "train")
    said = str(error.value)
    assert ("aachen_000000_000001_leftImg8bit.png (no label gtFine/train/"
            "aachen/aachen_000000_000001_gtFine_labelIds.png; did you mean aachen/aachen_000000_00001?") in said
    assert "no image leftImg8bit/train/aachen/aachen_000000_00001_leftImg8bit.png" in said


def test_wrong_values_and_wrong_pictures(tree: Path) -> None:
    file = tree / "gtFine/train/aachen/aachen_000000_000000_gtFine_labelIds.png"
    Image.new("L", (40, 8), 34).save(file)
    with pytest.raises(DataError, match=r"label values 0 to 33, or 255 for void.*000000_gtFine_labelIds.png with 34"):
        load_data(f"cityscapes:{tree}", "train")[0]
    Image.new("I;16", (40, 8), 24071).save(file)  # an instance picture under the wrong name
    with pytest.raises(DataError, match="with 24071"):
        load_data(f"cityscapes:{tree}", "train")[0]
    file.write_bytes(b"no picture")
    with pytest.raises(DataError, match="000000_gtFine_labelIds.png .*not an image"):
        load_data(f"cityscapes:{tree}", "train")


def test_missing_folders_say_what_is_near(tree: Path) -> None:
    with pytest.raises(DataError, match="no leftImg8bit in .*did you mean leftImg8bits"):
        (tree / "leftImg8bit").rename(tree / "leftImg8bits")
        load_data(f"cityscapes:{tree}")
    (tree / "leftImg8bits").rename(tree / "leftImg8bit")
    for file in (tree / "leftImg8bit/train").glob("*/*"):
        file.unlink()
    with pytest.raises(DataError, match="none in .*train"):
        load_data(f"cityscapes:{tree}", "unlabelled")

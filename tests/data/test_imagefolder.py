from pathlib import Path

import pytest
import torch
from PIL import Image

from offramp.data import load_data
from offramp.errors import DataError


def test_classes_are_subfolders_and_splits_are_disjoint(class_tree: Path) -> None:
    source = load_data(f"imagefolder:{class_tree}?size=16x24")
    assert source.class_names == ("cat", "dog") and source.splits == ("train", "unlabelled", "calibration", "test")
    names = [source[s].names for s in ("train", "calibration", "test")]
    assert [len(n) for n in names] == [12, 4, 4] and len(set().union(*map(set, names))) == 20
    for split in ("train", "calibration", "test"):
        for (image, label), name in zip(source[split], source[split].names, strict=False):
            assert image.shape == (3, 16, 24)
            assert int(label) == (0 if name.startswith("cat") else 1) == int(image[2].mean() > image[0].mean())
    assert isinstance(source["unlabelled"][0], torch.Tensor)


def test_deal_depends_on_names_alone(class_tree: Path) -> None:
    first = load_data(f"imagefolder:{class_tree}", "test")
    assert first.names == load_data(f"imagefolder:{class_tree}", "test").names
    assert first[0][0].shape == (3, 224, 224)  # the size when none is asked for


def test_flat_folder_has_no_labels(class_tree: Path) -> None:
    source = load_data(f"imagefolder:{class_tree / 'cat'}")
    assert source.splits == ("unlabelled", "calibration", "test") and source.class_names == ()
    assert [len(source[s]) for s in source.splits] == [6, 2, 2]
    assert isinstance(source["test"][0], torch.Tensor) and not source["test"].labels


def test_named_split_folders(class_tree: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (class_tree / split / name).mkdir(parents=True)
    for i in range(10):
        for name in ("cat", "dog"):
            (class_tree / name / f"{i}.png").rename(class_tree / ("train" if i < 6 else "val") / name / f"{i}.png")
    for name in ("cat", "dog"):
        (class_tree / name).rmdir()
    source = load_data(f"imagefolder:{class_tree}")
    assert source.class_names == ("cat", "dog")
    assert [len(source[s]) for s in source.splits] == [12, 12, 4, 4]
    assert not set(source["calibration"].names) & set(source["test"].names)
    assert all(n.startswith("val/") for n in source["calibration"].names)


def test_unreadable_image_is_named(class_tree: Path) -> None:
    (class_tree / "dog" / "3.png").write_bytes(b"")
    source = load_data(f"imagefolder:{class_tree}")
    owner = next(s for s in ("train", "calibration", "test") if any(
        "dog/3.png" in n for n in _names_unchecked(class_tree, s)))
    with pytest.raises(DataError, match=r"dog/3\.png \(not an image, or damaged\)"):
        source[owner]


def _names_unchecked(root: Path, split: str) -> list[str]:
    from offramp.data.base import by_hash
    from offramp.data.files import image_files
    from offramp.data.imagefolder import SHARES

    names = [f.relative_to(root).as_posix() for f in image_files(root, deep=True)]
    return [names[i] for i in by_hash(names, SHARES)[split]]


def test_stray_and_missing(class_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for i in range(20):
        Image.new("RGB", (9, 9)).save(class_tree / f"stray_{i}.png")
    with pytest.raises(DataError, match="stray_"):
        load_data(f"imagefolder:{class_tree}", "train")
    with pytest.raises(DataError, match="no image in"):
        load_data(f"imagefolder:{tmp_path_factory.mktemp('empty')}")

import json
from pathlib import Path

import pytest
import torch

from offramp.data import IMAGENET_MEAN, IMAGENET_STD, Cifar10Split, load_data
from offramp.errors import DataError


def test_pixels_and_labels_are_those_of_the_records(cifar_tree: Path) -> None:
    train = load_data(f"cifar10:{cifar_tree}", "train")
    assert isinstance(train, Cifar10Split) and len(train) == 12 and train.num_classes == 10
    image, label = train[7]
    assert int(label) == 7 and image.shape == (3, 32, 32) and image.dtype == torch.float32
    pixel = (7 + 2 + 5 + 9) / 255  # channel 2, row 5, column 9
    assert float(image[2, 5, 9]) == pytest.approx((pixel - IMAGENET_MEAN[2]) / IMAGENET_STD[2], abs=1e-6)


def test_splits_are_disjoint_and_cover_the_test_file(cifar_tree: Path) -> None:
    source = load_data(f"cifar10:{cifar_tree / 'cifar-10-batches-bin'}")
    assert source.splits == ("train", "unlabelled", "calibration", "test")
    calibration, test, train = (set(source[s].names) for s in ("calibration", "test", "train"))
    assert len(calibration) == 6 and len(test) == 14 and len(calibration | test) == 20
    assert not train & (calibration | test)
    assert source.unlabelled_is_train and set(source["unlabelled"].names) == train
    prints = {s: source[s].fingerprint for s in source.splits}
    assert prints["unlabelled"] == prints["train"] and len(set(prints.values())) == 3
    assert prints == {s: load_data(f"cifar10:{cifar_tree}")[s].fingerprint for s in source.splits}


def test_fingerprint_sees_contents(cifar_tree: Path) -> None:
    before = load_data(f"cifar10:{cifar_tree}", "train").fingerprint
    file = cifar_tree / "cifar-10-batches-bin" / "data_batch_2.bin"
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.write_bytes(bytes(content))
    assert load_data(f"cifar10:{cifar_tree}", "train").fingerprint != before
    assert load_data(f"cifar10:{cifar_tree}?mean=0.5,0.5,0.5", "test").fingerprint != load_data(
        f"cifar10:{cifar_tree}", "test").fingerprint


def test_splits_file_rules(cifar_tree: Path) -> None:
    (cifar_tree / "splits.json").write_text(json.dumps(
        {"about": "text", "unlabelled": [1, 3], "calibration": [0, 2], "test": [4, 19]}))
    source = load_data(f"cifar10:{cifar_tree}")
    assert [len(source[s]) for s in source.splits] == [12, 2, 2, 2]
    assert source["test"].names == ["test_batch.bin#4", "test_batch.bin#19"] and not source.unlabelled_is_train
    assert [int(label) for _, label in source["test"]] == [4, 9]
    assert isinstance(source["unlabelled"][0], torch.Tensor) and not source["unlabelled"].labels
    joined = source.split("train+unlabelled")
    assert len(joined) == 14 and isinstance(joined[0], torch.Tensor)
    assert torch.equal(joined[13], source["unlabelled"][1])


@pytest.mark.parametrize("content, message", [
    ({"calibration": [0, 1], "test": [1]}, "record 1 in 'calibration' and 'test'"),
    ({"calibration": [0], "test": [20]}, "record numbers from 0 to 19"),
    ({"calibration": ["x"]}, "splits.json"),
])
def test_bad_splits_file_is_refused(cifar_tree: Path, content: object, message: str) -> None:
    (cifar_tree / "splits.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        load_data(f"cifar10:{cifar_tree}")


def test_cut_short_file_is_named(cifar_tree: Path) -> None:
    file = cifar_tree / "cifar-10-batches-bin" / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"whole records of 3073 bytes, but got 18437 bytes in .*data_batch_2\.bin"):
        load_data(f"cifar10:{cifar_tree}", "train")


def test_label_out_of_range_is_named_but_not_read_without_labels(cifar_tree: Path) -> None:
    file = cifar_tree / "cifar-10-batches-bin" / "data_batch_1.bin"
    content = bytearray(file.read_bytes())
    content[2 * 3073] = 77
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"data_batch_1\.bin#2 \(77\)"):
        load_data(f"cifar10:{cifar_tree}", "train")
    assert load_data(f"cifar10:{cifar_tree}", "train", labels=False).targets is None  # type: ignore[attr-defined]


def test_missing_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such path"):
        load_data(f"cifar10:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="none of them in"):
        load_data(f"cifar10:{tmp_path}")
    (tmp_path / "data_batch_1").write_bytes(b"")
    with pytest.raises(DataError, match="this is the Python version"):
        load_data(f"cifar10:{tmp_path}")


def test_real_files(real_data: Path) -> None:
    source = load_data(f"cifar10:{real_data / 'cifar10'}")
    assert {s: len(source[s]) for s in source.splits} == {
        "train": 20000, "unlabelled": 4000, "calibration": 1500, "test": 1500}
    assert not set(source["calibration"].names) & set(source["test"].names)

import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from offramp.data import Source, load_data
from offramp.errors import DataError, OfframpError

MODULE = '''
import torch
from torch.utils.data import TensorDataset
def by_split(split, n=4):
    rows = {"train": 0, "calibration": 1, "test": 2}[split]
    return TensorDataset(torch.full((n, 2), float(rows)), torch.arange(n))
by_split.splits = ("train", "calibration", "test")
def by_dict():
    return {"test": TensorDataset(torch.zeros(3, 1, 4, 4), torch.zeros(3, 4, 4, dtype=torch.int64))}
def wrong():
    return 5
'''


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_streets_of_data.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return "my_streets_of_data"


@pytest.mark.parametrize("spec, near", [
    ("camvd:/x", "did you mean camvid"), ("scnes?n=3", "did you mean scenes"), ("cifar:/x", "did you mean cifar10"),
    ("zzzz", "known: camvid"), ("scenes?siz=3", "did you mean size"), ("imagefolder", "add the path"),
    ("scenes?size=big", "HEIGHTxWIDTH"), ("scenes?difficulty=hard", "LOW-HIGH"), ("scenes?n=0", "n=0"),
    ("scenes?task=sleep", "dense or classify"), ("scenes?n=many", "right kind"),
    ("scenes?mean=a,b,c", "three numbers"),
    ("scenes?mean=0.5,0.5,0.5&std=0,1,1", "above 0"),
])
def test_bad_specs_say_what_is_near(spec: str, near: str) -> None:
    with pytest.raises(DataError) as error:
        load_data(spec)
    assert near in str(error.value)


def test_unknown_split_lists_the_splits() -> None:
    with pytest.raises(DataError, match="train, unlabelled, calibration, test.*did you mean calibration"):
        load_data("scenes?n=4", "calibrate")


def test_scenes_options_arrive() -> None:
    source = load_data("scenes?size=32x48&n=6&task=classify&seed=3&difficulty=0.2-0.4&mean=0,0,0&std=1,1,1")
    assert [len(source[s]) for s in source.splits] == [6, 6, 3, 3] and source.num_classes == 8
    image, label = source["train"][0]
    assert image.shape == (3, 32, 48) and 0 <= float(image.min()) and float(image.max()) <= 1 and label.ndim == 0
    hard = source["train"].difficulties()  # type: ignore[attr-defined]
    assert 0.2 <= float(hard.min()) and float(hard.max()) <= 0.4
    assert load_data("scenes?n=4", "test", size="32x32")[0][0].shape == (3, 32, 32)


def test_users_function_by_split(my_module: str) -> None:
    source = load_data(f"{my_module}:by_split?n=5")
    assert source.splits == ("train", "calibration", "test")
    rows, labels = next(iter(DataLoader(source["calibration"], batch_size=5)))
    assert torch.equal(rows, torch.ones(5, 2)) and torch.equal(labels, torch.arange(5))
    assert torch.equal(source.split("train", labels=False)[1], torch.zeros(2))
    assert source["train"].fingerprint != source["test"].fingerprint
    assert source["train"].fingerprint == source.split("train", labels=False).fingerprint
    with pytest.raises(DataError, match="options among n.*got m"):
        load_data(f"{my_module}:by_split?m=5")


def test_users_dict_and_wrong_kind(my_module: str) -> None:
    source = load_data(f"{my_module}:by_dict")
    assert source.splits == ("test",) and source.task == "dense" and isinstance(source, Source)
    with pytest.raises(DataError, match="__len__"):
        load_data(f"{my_module}:wrong")
    with pytest.raises(OfframpError, match="did you mean by_split"):
        load_data(f"{my_module}:by_splt")
    with pytest.raises(OfframpError, match="importable module 'no_such_room'"):
        load_data("no_such_room:x")


def test_no_overlap_when_joining() -> None:
    with pytest.raises(DataError, match="4 images twice"):
        load_data("scenes?n=4", "train+train")


def test_splits_travel_to_workers() -> None:
    split = load_data("scenes?n=4&size=32x32", "train")
    copy = pickle.loads(pickle.dumps(split))
    assert copy.fingerprint == split.fingerprint and torch.equal(copy[2][0], split[2][0])


def test_index_out_of_range_ends_iteration() -> None:
    split = load_data("scenes?n=3&size=32x32", "train")
    assert len(list(split)) == 3 and torch.equal(split[-1][0], split[2][0])

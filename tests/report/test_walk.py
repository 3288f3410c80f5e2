"""What exits said of one image: shares counted by hand, a file that comes back as it was, and others refused."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from sklearn.metrics import jaccard_score
from torch import Tensor

from offramp.errors import FileFormatError, OfframpError
from offramp.report import Said, Walk, load_walk, save_walk
from offramp.table.files import write_tensors


def said(rows: list[list[int]], name: str, active: list[list[int]] | None = None, ms: float | None = None) -> Said:
    predictions = torch.tensor(rows, dtype=torch.int16)
    return Said(name=name, predictions=predictions, confidence=torch.full(predictions.shape, 0.5), elapsed_ms=ms,
                active=None if active is None else torch.tensor(active, dtype=torch.bool), macs=None if ms is None else
                int(ms * 10))


LABEL = torch.tensor([[0, 1, 2, -1], [0, 1, 2, 2]], dtype=torch.int16)


def walk(masked: bool = True, **changes: object) -> Walk:
    first = [[1, 0, 0, 0], [1, 1, 1, 0]] if masked else None
    second = [[1, 0, 0, 0], [0, 0, 1, 0]] if masked else None
    steps = (said([[0, 1, 1, 0], [1, 1, 0, 2]], "one", first, 1.0), 
             said([[0, 1, 1, 0], [0, 1, 0, 2]], "two", second, 2.5),
             said([[0, 1, 1, 0], [0, 1, 2, 2]], "final", None, 4.0))
    made = Walk(name="x", image=torch.zeros(3, 4, 8, dtype=torch.uint8), steps=steps, num_classes=3, label=LABEL)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_shares_of_the_labelled_pixels_counted_by_hand() -> None:
    one = walk()
    got = [tuple(getattr(one.shares(k), field.name) for field in fields(one.shares(k))) for k in range(3)]  # type: ignore[arg-type]
    # seven pixels have a label; at the end what was active before is what the last exit answered
    assert got == [pytest.approx([n / 7 for n in row]) for row in ((2, 1, 2, 2), (4, 1, 1, 1), (4, 1, 2, 0))]
    assert [float(one.computed(k).float().mean()) for k in range(3)] == [1.0, 0.5, 0.25]
    assert one.masked and not walk(masked=False).masked
    assert walk(masked=False).shares(0).active_right == pytest.approx(4 / 7)  # type: ignore[union-attr]


def test_iou_of_an_image_as_scikit_learn_has_it() -> None:
    one, known = walk(), LABEL >= 0
    for k in range(3):
        wanted = jaccard_score(LABEL[known], one.steps[k].predictions[known], average="macro")
        assert one.mean_iou(k) == pytest.approx(wanted)
    silent = replace(one, steps=(said([[0, 1, -1, 0], [0, 1, -1, -1]], "one"),))
    assert silent.mean_iou(0) == pytest.approx(2 / 3), "silence is wrong, and no class of its own"
    bare = walk(label=None)
    assert math.isnan(bare.mean_iou(0)) and bare.shares(0) is None and bare.right(0) is None
    assert walk(label=torch.full_like(LABEL, -1)).shares(0) is None


def same(a: Walk, b: Walk) -> None:
    for field in fields(Walk):
        mine, theirs = getattr(a, field.name), getattr(b, field.name)
        if field.name == "steps":
            assert len(mine) == len(theirs)
            for one, other in zip(mine, theirs, strict=True):
                for inner in fields(Said):
                    left, right = getattr(one, inner.name), getattr(other, inner.name)
                    assert torch.equal(left, right) if isinstance(left, Tensor) else left == right
        else:
            assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs


@pytest.mark.parametrize("one", [walk(), walk(masked=False), walk(label=None, class_names=("a", "b", "c"))],
                         ids=["masked", "not masked", "no labels"])
def test_a_file_comes_back_as_it_was(one: Walk, tmp_path: Path) -> None:
    same(load_walk(save_walk(one, tmp_path / "walk.json")), one)


@pytest.mark.parametrize("changes, words", [
    ({"num_classes": 2}, "says class 2 of 2"), ({"num_classes": 0}, "0 classes"), ({"steps": ()}, "0 exits"),
    ({"steps": (said([[0]], "x"),) * 65}, "65 exits"), ({"label": LABEL[:1]}, "label"),
    ({"label": LABEL.long()}, "int64"),
    ({"class_names": ("a",)}, "1 names for 3"), ({"name": "x" * 401}, "400 letters"),
    ({"image": torch.zeros(1, 2, 2, dtype=torch.uint8)}, "image"),
    ({"image": torch.zeros(3, 0, 2, dtype=torch.uint8)}, "image"),
    ({"steps": (said([[0] * 4] * 2, "a", ms=2.0), said([[0] * 4] * 2, "b", ms=1.0))}, "must rise"),
    ({"steps": (said([[0] * 4] * 2, "a", ms=2.0), said([[0] * 4] * 2, "b"))}, "at none"),
    ({"steps": (replace(said([[0] * 4] * 2, "a"), confidence=torch.full((2, 4), math.nan)),)}, "not in [0, 1]"),
    ({"steps": (said([[0] * 4] * 2, "a"), said([[0] * 3] * 2, "b"))}, "predictions of 'b'"),
])
def test_what_does_not_fit_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(OfframpError) as caught:
        walk(**changes)
    assert words in str(caught.value)


def hostile(page: Path, **changes: object) -> None:
    record = json.loads(page.read_text())
    record.update(changes)
    page.write_text(json.dumps(record))


@pytest.mark.parametrize("changes", [
    {"steps": [{"name": "one", "elapsed_ms": float("nan"), "macs": 1}]}, {"steps": 3}, {"steps": []},
    {"steps": [{"name": "one", "elapsed_ms": 1.0, "macs": 10**400}] * 3}, {"num_classes": "many"},
    {"num_classes": 10**9},
    {"steps": [{"name": ["a"], "elapsed_ms": 1.0, "macs": 1}] * 3}, {"class_names": 5}, {"version": 2}, {"format": "x"},
    {"tensors": {"file": "../walk.safetensors", "sha256": ""}}, {"tensors": {"file": "/etc/passwd", "sha256": ""}},
    {"name": 5}, {"measure": None},
], ids=lambda changes: next(iter(changes)))
def test_a_hostile_page_is_refused(changes: dict[str, object], tmp_path: Path) -> None:
    page = save_walk(walk(), tmp_path / "walk.json")
    hostile(page, **changes)
    with pytest.raises(FileFormatError):
        load_walk(page)


def test_sizes_are_looked_at_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = save_walk(walk(), tmp_path / "walk.json")
    monkeypatch.setattr("offramp.report.walk._TENSOR_BYTES", 64)
    with pytest.raises(FileFormatError, match="at most 64 bytes"):
        load_walk(page)
    page.write_text("[" * 100_000)
    with pytest.raises(FileFormatError):
        load_walk(page)
    page.write_text(" " * (5 << 20))
    with pytest.raises(FileFormatError, match="at most"):
        load_walk(page)


def test_other_tensors_than_its_own_are_refused(tmp_path: Path) -> None:
    page = save_walk(walk(), tmp_path / "walk.json")
    record = json.loads(page.read_text())
    tensors = safetensors.torch.load_file(tmp_path / record.pop("tensors")["file"])
    write_tensors(page, record, {**tensors, "9.predictions": torch.zeros(1)})
    with pytest.raises(FileFormatError, match="9.predictions"):
        load_walk(page)
    write_tensors(page, record, {name: one for name, one in tensors.items() if name != "1.confidence"})
    with pytest.raises(FileFormatError):
        load_walk(page)
    write_tensors(page, record, {**tensors, "image": torch.zeros(3, 1 << 15, 1, dtype=torch.uint8)})
    with pytest.raises(FileFormatError, match="image"):
        load_walk(page)

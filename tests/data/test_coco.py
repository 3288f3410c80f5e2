import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as witness

from offramp.data import COCO_CATEGORIES, IGNORE, VOC_PALETTE, load_data
from offramp.data.coco import mask_of
from offramp.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # the witness's, on new numpy

# COCO's own names; VOC calls six of them otherwise
NAMES = {1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 9: "boat",
         16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep", 21: "cow", 44: "bottle", 62: "chair", 63: "couch",
         64: "potted plant", 67: "dining table", 72: "tv"}
VOC_CALLS = {"airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "potted plant": "pottedplant",
             "dining table": "diningtable", "tv": "tvmonitor"}
SIZE = (40, 50)


def drawn(outline: Any, size: tuple[int, int]) -> np.ndarray:
    """What pycocotools draws."""
    if isinstance(outline, dict) and isinstance(outline["counts"], str):
        return witness.decode(outline).astype(bool)
    code = witness.frPyObjects(outline, *size)
    return witness.decode(witness.merge(code) if isinstance(code, list) else code).astype(bool)


def box(x: int, y: int, w: int, h: int) -> list[float]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Six images in each part, in exactly the public layout; image 3 shows a giraffe only, image 4 nothing at all."""
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        (tmp_path / f"{part}2017").mkdir()
        images = [{"id": 100 + i, "file_name": f"{i:012}.jpg", "height": SIZE[0], "width": SIZE[1], "license": 1}
                  for i in range(6)]
        for one in images:
            Image.new("RGB", SIZE[::-1], (90, 80, 70)).save(tmp_path / f"{part}2017" / one["file_name"])
        crowd = {"size": list(SIZE), "counts": [40 * 30, 40 * 5, 40 * 15]}
        notes = [note(0, 1, [box(0, 0, 40, 40)]), note(0, 5, [box(30, 10, 15, 20)]), note(1, 1, crowd, crowd=1),
                 note(2, 72, [[1.5, 2.25, 44.1, 3, 30, 38.75]]), note(3, 25, [box(0, 0, 50, 40)]),
                 note(5, 20, [box(2, 2, 4, 4), box(10, 10, 5, 5)]), note(5, 8, [box(0, 0, 50, 40)])]
        told = {"images": images, "annotations": [{"id": i, **n} for i, n in enumerate(notes)], "info": {},
                "categories": [{"id": k, "name": n} for k, n in NAMES.items()]}
        (tmp_path / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(told))
    return tmp_path


def note(image: int, category: int, outline: Any, crowd: int = 0) -> dict[str, Any]:
    return {"image_id": 100 + image, "category_id": category, "segmentation": outline, "iscrowd": crowd,
            "area": float(drawn(outline, SIZE).sum()), "bbox": [0, 0, 1, 1]}


def mend(tree: Path, change: Any, part: str = "train") -> None:
    file = tree / "annotations" / f"instances_{part}2017.json"
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))


def test_categories_in_the_order_of_voc(tree: Path) -> None:
    source = load_data(f"coco:{tree}")
    assert source.class_names[1:] == tuple(VOC_CALLS.get(NAMES[c], NAMES[c]) for c in COCO_CATEGORIES[1:])
    assert source.palette == VOC_PALETTE and source.num_classes == 21


def test_labels_and_overlap(tree: Path) -> None:
    train = load_data(f"coco:{tree}?min_area=0", "train")
    label = train[0][1]
    assert [int(label[20, x]) for x in (5, 35, 42, 48)] == [15, IGNORE, 1, 0]
    crowd = train[1][1]
    assert crowd[0].tolist() == [0] * 30 + [15] * 5 + [0] * 15 and (crowd == crowd[0]).all()
    assert torch_equal(train[2][1], drawn([[1.5, 2.25, 44.1, 3, 30, 38.75]], SIZE) * 20)
    assert torch_equal(train[3][1], drawn([box(2, 2, 4, 4), box(10, 10, 5, 5)], SIZE) * 17)  # the truck is background


def torch_equal(label: Any, wanted: np.ndarray) -> bool:
    return np.array_equal(label.numpy(), wanted)


def test_train_drops_background_and_val_keeps_it(tree: Path) -> None:
    source = load_data(f"coco:{tree}?min_area=0")
    assert [Path(n).stem[-1] for n in source["train"].names] == ["0", "1", "2", "5"]
    assert [len(source[s]) for s in ("unlabelled", "calibration", "test")] == [6, 3, 3]
    halves = [set(source[s].names) for s in ("calibration", "test")]
    assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == 6
    assert source["train"].fingerprint == source.split("train", labels=False).fingerprint
    assert len(load_data(f"coco:{tree}?min_area=300", "train")) == 2  # the crowd is 200 pixels, the two sheep 41
    assert len(load_data(f"coco:{tree}", "train")) == 1
    with pytest.raises(DataError, match="100000 pixels of VOC's classes.*min_area=0"):
        load_data(f"coco:{tree}?min_area=100000", "train")


def test_pictures_alone_need_no_annotations(tree: Path) -> None:
    for file in (tree / "annotations").iterdir():
        file.rename(file.with_name(file.name.replace("instances", "captions")))
    source = load_data(f"coco:{tree}")
    assert len(source["unlabelled"]) == 6 and len(source.split("test", labels=False)) == 3
    with pytest.raises(DataError, match="instances_val2017.json, but got captions_train2017.json, captions_val2017"):
        source["test"]


def test_resizing(tree: Path) -> None:
    image, label = load_data(f"coco:{tree}?size=80x100", "train")[0]
    assert image.shape == (3, 80, 100) and label[40, [10, 70, 84, 96]].tolist() == [15, IGNORE, 1, 0]


def test_what_does_not_fit_is_named(tree: Path) -> None:
    (tree / "train2017" / "000000000004.jpg").rename(tree / "train2017" / "00000000004.jpg")
    with pytest.raises(DataError) as error:
        load_data(f"coco:{tree}", "train")
    assert "00000000004.jpg (no entry for 00000000004.jpg in instances_train2017.json; did you" in str(error.value)
    assert "no image train2017/000000000004.jpg" in str(error.value)
    mend(tree, lambda told: told["annotations"][0].update(image_id=7), "val")
    with pytest.raises(DataError, match="1 without one, such as annotation 0"):
        load_data(f"coco:{tree}", "test")
    (tree / "annotations" / "instances_val2017.json").write_text('{"annotations": []}')
    with pytest.raises(DataError, match="instances_val2017.json .KeyError"):
        load_data(f"coco:{tree}", "test")
    with pytest.raises(DataError, match="no train2017 in"):
        load_data(f"coco:{tree / 'annotations'}")


@pytest.mark.parametrize("outline, what", [
    ([[1, 2, 3]], "000000000000.jpg with a polygon"), ({"size": [40, 50], "counts": [3, 4]}, "runs of 7 pixels"),
    ({"size": [50, 40], "counts": [2000]}, r"size \[50, 40\]"), ({"size": [40, 50]}, "000000000000.jpg with 'counts'"),
    ({"size": [40, 50], "counts": "~~~"}, "runs of"),
])
def test_bad_outlines_name_their_image(tree: Path, outline: Any, what: str) -> None:
    mend(tree, lambda told: told["annotations"][0].update(segmentation=outline))
    with pytest.raises(DataError, match=what):
        load_data(f"coco:{tree}?min_area=0", "train")[0]


def test_annotated_size_must_be_the_pictures(tree: Path) -> None:
    mend(tree, lambda told: told["images"][0].update(height=41))
    with pytest.raises(DataError, match=r"\(41, 50\) in 000000000000.jpg"):
        load_data(f"coco:{tree}?min_area=0", "train")[0]


coordinate = st.floats(-8, 60, allow_nan=False).map(lambda v: round(v, 2))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(coordinate, min_size=6, max_size=24).map(lambda p: p[: len(p) // 2 * 2]), min_size=1,
                max_size=3), st.integers(1, 40), st.integers(1, 50))
def test_polygons_as_pycocotools_draws_them(polygons: list[list[float]], height: int, width: int) -> None:
    assert np.array_equal(mask_of(polygons, height, width), drawn(polygons, (height, width)))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.02, 0.98), st.integers(0, 10**6))
def test_run_lengths_as_pycocotools_packs_them(height: int, width: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    wide = rng.random((height, width)) < share
    mask = np.sort(wide, 0) if seed % 2 else wide  # long runs too, whose differences are negative
    packed = witness.encode(np.asfortranarray(mask, np.uint8))
    text = {"size": packed["size"], "counts": packed["counts"].decode()}
    assert np.array_equal(mask_of(text, height, width), mask) and np.array_equal(mask_of(packed, height, width), mask)
    flat = np.flatnonzero(np.diff(np.concatenate([[False], mask.T.ravel()])))
    counts = np.diff([0, *flat, mask.size]).tolist()
    assert np.array_equal(mask_of({"size": [height, width], "counts": counts}, height, width), mask)

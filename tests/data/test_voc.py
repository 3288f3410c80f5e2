from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from offramp.data import IGNORE, VOC_PALETTE, load_data
from offramp.errors import DataError

TRAIN, VAL = [f"2007_{i:06}" for i in range(3)], [f"2008_{i:06}" for i in range(10)]
SBD = {"train": ["2007_000001", "2009_000001", "2008_000004"], "val": ["2009_000002", "2008_000005"]}


def palette_png(file: Path, value: int, size: tuple[int, int] = (9, 6)) -> None:
    """A label as VOC has it: an indexed PNG, a border of 255 around one object of class ``value``."""
    label = np.zeros((size[1], size[0]), np.uint8)
    label[1:5, 1:6] = IGNORE
    label[2:4, 2:5] = value
    picture = Image.fromarray(label, "P")
    picture.putpalette([c for k in range(256) for c in (VOC_PALETTE[k] if k < 21 else (224, 224, 192))])
    picture.save(file)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "ImageSets/Main", "Annotations"):
        (root / folder).mkdir(parents=True)
    for name in {*TRAIN, *VAL, *SBD["train"], *SBD["val"]}:
        Image.new("RGB", (9, 6), (200, 100, 50)).save(root / "JPEGImages" / f"{name}.jpg")
    for i, name in enumerate(TRAIN + VAL):
        palette_png(root / "SegmentationClass" / f"{name}.png", i + 1)
    for split, names in (("train", TRAIN), ("val", VAL), ("trainval", TRAIN + VAL)):
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(f"{n}\n" for n in names))
    return tmp_path


@pytest.fixture
def sbd(tree: Path) -> Path:
    folder = tree / "benchmark_RELEASE" / "dataset"
    (folder / "cls").mkdir(parents=True)
    for split, names in SBD.items():
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            savemat(folder / "cls" / f"{name}.mat", {"GTcls": {
                "Boundaries": np.zeros((20, 1)), "Segmentation": np.full((6, 9), 20, np.uint8),
                "CategoriesPresent": np.array([[20.0]])}})
    return folder


def test_classes_colours_and_the_border(tree: Path) -> None:
    source = load_data(f"voc:{tree}?mean=0,0,0&std=1,1,1")
    train = source["train"]
    image, label = train[1]
    assert train.names[1] == "JPEGImages/2007_000001.jpg" and image.shape == (3, 6, 9)
    assert label[2].tolist() == [0, IGNORE, 2, 2, 2, IGNORE, 0, 0, 0]
    # the development kit's colours, as its own pictures show them
    known = {"background": (0, 0, 0), "aeroplane": (128, 0, 0), "bird": (128, 128, 0), "boat": (0, 0, 128),
             "cat": (64, 0, 0), "person": (192, 128, 128), "train": (128, 192, 0), "tvmonitor": (0, 64, 128)}
    assert {n: c for n, c in zip(source.class_names, source.palette, strict=True) if n in known} == known
    assert len(set(source.palette)) == len(source.class_names) == 21


def test_any_of_the_three_folders_and_halves_of_val(tree: Path) -> None:
    sources = [load_data(f"voc:{tree / sub}") for sub in ("", "VOCdevkit", "VOCdevkit/VOC2012")]
    assert len({s["test"].fingerprint for s in sources}) == 1
    source = sources[0]
    assert [len(source[s]) for s in ("train", "unlabelled", "calibration", "test")] == [3, 3, 5, 5]
    halves = [set(source[s].names) for s in ("calibration", "test")]
    assert not halves[0] & halves[1] and halves[0] | halves[1] == {f"JPEGImages/{n}.jpg" for n in VAL}
    assert set(load_data(f"voc:{tree}?seed=5", "test").names) != halves[1]
    unlabelled = source["unlabelled"]
    assert not unlabelled.labels and unlabelled.names == source["train"].names


def test_sbd_adds_what_val_does_not_hold(tree: Path, sbd: Path) -> None:
    split = load_data(f"voc:{tree}?train=trainaug", "train")
    assert [Path(n).stem for n in split.names] == [*TRAIN, "2009_000001", "2009_000002"]
    assert sorted(split[1][1].unique().tolist()) == [0, 2, IGNORE]  # VOC's own label is the finer one
    assert split[3][1].unique().tolist() == [20] and split[3][1].shape == (6, 9)
    assert len(load_data(f"voc:{tree}", "trainaug")) == 5 and len(load_data(f"voc:{tree}", "train")) == 3
    assert load_data(f"voc:{tree}?size=12x18&train=trainaug", "train")[4][1].shape == (12, 18)
    moved = sbd.parent.rename(tree / "elsewhere")
    assert len(load_data(f"voc:{tree}?train=trainaug&sbd={moved}", "unlabelled")) == 5
    with pytest.raises(DataError, match="SegmentationClassAug in .*or SBD's.*got neither"):
        load_data(f"voc:{tree}?train=trainaug", "train")


def test_damaged_mat_is_named(tree: Path, sbd: Path) -> None:
    for content in (b"", b"MATLAB 5.0 MAT-file" + bytes(200)):
        (sbd / "cls" / "2009_000002.mat").write_bytes(content)
        with pytest.raises(DataError, match="GTcls.Segmentation.*2009_000002.mat"):
            load_data(f"voc:{tree}", "trainaug")[4]
    (sbd / "cls" / "2009_000001.mat").unlink()
    with pytest.raises(DataError, match=r"2009_000001.jpg \(no label cls/2009_000001.mat\)"):
        load_data(f"voc:{tree}", "trainaug")


@pytest.mark.parametrize("listed", ["", "trainaug", "train_aug"])
def test_ready_made_augmented_folder(tree: Path, listed: str) -> None:
    root = tree / "VOCdevkit" / "VOC2012"
    (root / "SegmentationClassAug").mkdir()
    names = [*TRAIN, "2009_000001", "2009_000002"]
    for name in [*names, *VAL]:
        Image.new("L", (9, 6), 7).save(root / "SegmentationClassAug" / f"{name}.png")
    if listed:
        lines = [n if listed == "trainaug" else f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png" for n in names]
        (root / "ImageSets/Segmentation" / f"{listed}.txt").write_text("\n".join(lines))
    split = load_data(f"voc:{tree}?train=trainaug", "train")
    assert [Path(n).stem for n in split.names] == names and split[0][1].unique().tolist() == [7]
    if listed:
        file = root / "ImageSets/Segmentation" / f"{listed}.txt"
        file.write_text(file.read_text() + f"\n{VAL[3]}\n")
        with pytest.raises(DataError, match=f"without images of val, but got 1, such as {VAL[3]}"):
            load_data(f"voc:{tree}", "trainaug")


def test_what_is_missing_is_named(tree: Path) -> None:
    root = tree / "VOCdevkit" / "VOC2012"
    (root / "SegmentationClass" / f"{TRAIN[0]}.png").unlink()
    with pytest.raises(DataError, match=rf"{TRAIN[0]}.jpg \(no label SegmentationClass/{TRAIN[0]}.png\)"):
        load_data(f"voc:{tree}", "train")
    assert len(load_data(f"voc:{tree}", "train", labels=False)) == 3
    (root / "JPEGImages" / f"{TRAIN[1]}.jpg").unlink()
    with pytest.raises(DataError, match=rf"ImageSets/Segmentation \(no image JPEGImages/{TRAIN[1]}.jpg\)"):
        load_data(f"voc:{tree}", "unlabelled")
    (root / "ImageSets/Segmentation/val.txt").rename(root / "ImageSets/Segmentation/vall.txt")
    with pytest.raises(DataError, match=r"the list .*val.txt.*did you mean .*vall.txt"):
        load_data(f"voc:{tree}", "test")
    with pytest.raises(DataError, match="train=trainval.*calibration and test are made of val"):
        load_data(f"voc:{tree}?train=trainval")
    with pytest.raises(DataError, match="no JPEGImages in"):
        load_data(f"voc:{root / 'ImageSets'}")


def test_wrong_values_and_sizes(tree: Path) -> None:
    root = tree / "VOCdevkit" / "VOC2012"
    palette_png(root / "SegmentationClass" / f"{TRAIN[0]}.png", 21)
    with pytest.raises(DataError, match=rf"label values 0 to 20, or 255 for void.*{TRAIN[0]}.png with 21"):
        load_data(f"voc:{tree}", "train")[0]
    Image.new("RGB", (11, 6)).save(root / "JPEGImages" / f"{TRAIN[2]}.jpg")
    palette_png(root / "SegmentationClass" / f"{TRAIN[2]}.png", 3, (11, 6))
    with pytest.raises(DataError, match=r"6x9 .* and 6x11 .*add \?size=HxW"):
        load_data(f"voc:{tree}", "train")
    assert load_data(f"voc:{tree}?size=6x9", "train")[2][1].shape == (6, 9)

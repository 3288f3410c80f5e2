from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from offramp.data import CAMVID_PALETTE, IGNORE, IMAGENET_MEAN, IMAGENET_STD, FileSplit, flip_crop, load_data
from offramp.errors import DataError


def test_images_and_labels_as_in_the_files(camvid_tree: Path) -> None:
    train = load_data(f"camvid:{camvid_tree}", "train")
    image, label = train[2]
    raw = np.asarray(Image.open(camvid_tree / "train" / "frame_002.png")).astype(np.float64) / 255
    back = image.permute(1, 2, 0).double().numpy() * IMAGENET_STD + IMAGENET_MEAN
    assert np.allclose(back, raw, atol=1e-6)
    assert label.dtype == torch.int64 and label.shape == (12, 16)
    assert label[0].tolist() == [*range(11), IGNORE, 0, 1, 2, 3]
    assert train.num_classes == 11 and train.class_names[9] == "pedestrian"


def test_val_is_shared_in_blocks_when_there_is_no_test(camvid_tree: Path) -> None:
    source = load_data(f"camvid:{camvid_tree}")
    calibration, test = (set(source[s].names) for s in ("calibration", "test"))
    assert not calibration & test and len(calibration | test) == 30
    assert calibration == {f"val/frame_{i:03}.png" for i in (*range(10), *range(20, 30))}


def test_own_test_folder_is_the_test_split(camvid_tree: Path) -> None:
    for old, new in (("train", "test"), ("trainannot", "testannot")):
        (camvid_tree / new).mkdir()
        for file in (camvid_tree / old).iterdir():
            (camvid_tree / new / file.name).write_bytes(file.read_bytes())
    source = load_data(f"camvid:{camvid_tree}")
    assert len(source["test"]) == 4 and len(source["calibration"]) == 30


def test_unlabelled_opens_no_label_file(camvid_tree: Path) -> None:
    for folder in ("trainannot", "valannot"):
        for file in (camvid_tree / folder).iterdir():
            file.unlink()
        (camvid_tree / folder).rmdir()
    assert load_data(f"camvid:{camvid_tree}", "unlabelled")[0].shape == (3, 12, 16)
    assert load_data(f"camvid:{camvid_tree}", "calibration", labels=False)[0].shape == (3, 12, 16)
    with pytest.raises(DataError, match="trainannot, but got no such folder"):
        load_data(f"camvid:{camvid_tree}", "train")


def test_unpaired_files_are_all_named(camvid_tree: Path) -> None:
    (camvid_tree / "trainannot" / "frame_001.png").unlink()
    (camvid_tree / "train" / "frame_003.png").unlink()
    with pytest.raises(DataError) as error:
        load_data(f"camvid:{camvid_tree}", "train")
    assert "frame_001.png (no label trainannot/" in str(error.value)
    assert "frame_003.png (no image train/" in str(error.value)


def test_unreadable_images_are_named_up_to_ten(camvid_tree: Path) -> None:
    for i in (*range(10), 20, 21):
        (camvid_tree / "val" / f"frame_{i:03}.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="frame_000.png .*not an image.* and 2 more") as error:
        load_data(f"camvid:{camvid_tree}", "calibration")
    assert str(error.value).count(".png (") == 10


def test_cut_short_image_is_named_when_read_and_by_check(camvid_tree: Path) -> None:
    file = camvid_tree / "train" / "frame_001.png"
    file.write_bytes(file.read_bytes()[:200])  # the header is whole, the pixels are not
    train = load_data(f"camvid:{camvid_tree}", "train")
    assert isinstance(train, FileSplit)
    with pytest.raises(DataError, match=r"frame_001\.png"):
        train[1]
    with pytest.raises(DataError, match=r"frame_001\.png"):
        train.check()


def test_label_out_of_range_names_file_and_values(camvid_tree: Path) -> None:
    label = np.full((12, 16), 3, dtype=np.uint8)
    label[4, 4] = 42
    Image.fromarray(label).save(camvid_tree / "trainannot" / "frame_000.png")
    with pytest.raises(DataError, match=r"label values 0 to 10.*frame_000\.png with 42"):
        load_data(f"camvid:{camvid_tree}", "train")[0]
    Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(camvid_tree / "trainannot" / "frame_000.png")
    with pytest.raises(DataError, match="3 channels"):
        load_data(f"camvid:{camvid_tree}", "train")[0]


def test_wrong_sizes(camvid_tree: Path) -> None:
    Image.new("L", (8, 8)).save(camvid_tree / "trainannot" / "frame_000.png")
    with pytest.raises(DataError, match=r"frame_000\.png \(8x8, its image 12x16\)"):
        load_data(f"camvid:{camvid_tree}", "train")
    Image.new("RGB", (9, 7)).save(camvid_tree / "val" / "frame_005.png")
    with pytest.raises(DataError, match=r"12x16 .* and 7x9 .*add \?size=HxW"):
        load_data(f"camvid:{camvid_tree}", "calibration", labels=False)
    assert load_data(f"camvid:{camvid_tree}?size=24x32", "calibration", labels=False)[5].shape == (3, 24, 32)


def test_resizing_keeps_label_values(camvid_tree: Path) -> None:
    image, label = load_data(f"camvid:{camvid_tree}?size=24x32", "train")[0]
    assert image.shape == (3, 24, 32) and label.shape == (24, 32)
    assert label[0].tolist() == [v for v in [*range(11), IGNORE, 0, 1, 2, 3] for _ in range(2)]


def test_augmentation_moves_image_and_label_together(camvid_tree: Path) -> None:
    for i in range(4):  # images that show their own label
        label = np.random.default_rng(i).integers(0, 11, (12, 16), dtype=np.uint8)
        Image.fromarray(label).save(camvid_tree / "trainannot" / f"frame_{i:03}.png")
        Image.fromarray(np.repeat(label[:, :, None] + 1, 3, 2)).save(camvid_tree / "train" / f"frame_{i:03}.png")
    torch.manual_seed(0)
    source = load_data(f"camvid:{camvid_tree}?mean=0,0,0&std=1,1,1")
    moved = source.split("train", augment=flip_crop((12, 16), padding=4))
    plain, changed = source["train"], 0
    for i in range(4):
        image, label = moved[i]
        shown = (image[0] * 255).round().long() - 1
        assert torch.equal(torch.where(shown < 0, IGNORE, shown), label)
        changed += not torch.equal(label, plain[i][1])
    assert changed == 4


def test_colours_of_the_original_pictures(camvid_tree: Path) -> None:
    # label_colors.txt of the set's makers; they call three of the classes otherwise
    original = {"Sky": (128, 128, 128), "Building": (128, 0, 0), "Column_Pole": (192, 192, 128),
                "Road": (128, 64, 128), "Sidewalk": (0, 0, 192), "Tree": (128, 128, 0), "SignSymbol": (192, 128, 128),
                "Fence": (64, 64, 128), "Car": (64, 0, 128), "Pedestrian": (64, 64, 0), "Bicyclist": (0, 128, 192)}
    ours = {"Column_Pole": "pole", "Sidewalk": "pavement", "SignSymbol": "sign"}
    for given in (load_data(f"camvid:{camvid_tree}"), load_data(f"camvid:{camvid_tree}", "train+calibration")):
        assert dict(zip(given.class_names, given.palette, strict=True)) == {
            ours.get(name, name.lower()): colour for name, colour in original.items()}
    assert load_data("scenes?n=4", "test").palette == load_data("scenes?n=4").palette == CAMVID_PALETTE
    assert load_data("scenes?n=4&task=classify", "test").palette == ()


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of these folders"):
        load_data(f"camvid:{tmp_path}")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="images in each folder, but got none in .*train"):
        load_data(f"camvid:{tmp_path}")


def test_real_files(real_data: Path) -> None:
    source = load_data(f"camvid:{real_data / 'camvid'}")
    assert [len(source[s]) for s in source.splits] == [367, 367, 51, 50]
    image, label = source["test"][0]
    assert image.shape == (3, 360, 480) and set(label.unique().tolist()) <= {*range(11), IGNORE}
    counts = sum(torch.bincount(source["train"][i][1].flatten(), minlength=256).float() for i in range(0, 367, 20))
    assert (counts[:11] > 0).all() and counts[11:255].sum() == 0  # every class, and nothing but void beside them
    assert float(counts[255] / counts.sum()) == pytest.approx(0.04, abs=0.02)
    assert float(counts[3] / counts.sum()) == pytest.approx(0.317, abs=0.06)  # the road's share of all of train

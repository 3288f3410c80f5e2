"""Images and labels move together, each image of a batch by its own draw."""

from dataclasses import replace

import pytest
import torch

from offramp.errors import DataError, OfframpError
from offramp.train import fit, recipes
from train.fakes import labelled, make

torch.set_num_threads(1)


def ramps(count: int = 6, high: int = 40, wide: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Each pixel's image says its row and column; its label says both too."""
    rows, columns = torch.arange(float(high))[:, None].expand(high, wide), torch.arange(float(wide)).expand(high, wide)
    images = torch.stack([rows, columns]).expand(count, 2, high, wide) + 1
    return images, (rows * 100 + columns).long().expand(count, high, wide)


def test_without_rescaling_it_is_a_window_bit_for_bit() -> None:
    images, labels = ramps()
    out, maps = recipes.scale_crop_flip(scale=(1.0, 1.0), flip=0.0)(images, labels)
    assert out.shape == (6, 2, 36, 54) and maps.shape == (6, 36, 54) and maps.dtype == labels.dtype
    corners = set()
    for picture, label in zip(out, maps, strict=True):
        top, left = divmod(int(label[0, 0]), 100)
        assert torch.equal(picture, images[0, :, top : top + 36, left : left + 54])
        assert torch.equal(label, labels[0, top : top + 36, left : left + 54])
        corners.add((top, left))
    assert len(corners) > 3, "each image has its own draw"


def test_labels_stay_on_their_pixels() -> None:
    images, labels = ramps(40)
    mirrored, shrunk = 0, 0
    for flip in (0.0, 1.0, 0.5):
        out, maps = recipes.scale_crop_flip(flip=flip, ignore=9999)(images, labels)
        for picture, label in zip(out, maps, strict=True):
            inside = label != 9999
            assert inside.any() and (picture[:, ~inside] == 0).all()
            row, column = label.div(100, rounding_mode="floor"), label % 100
            apart = (picture - 1 - torch.stack([row, column])).abs()[:, inside]
            assert apart.max() <= 1.01, "half a pixel of the coarser grid, and half of the nearest one"
            assert apart.mean() < 0.6
            line = column[inside.any(1).nonzero()[0, 0]][inside[inside.any(1).nonzero()[0, 0]]]
            turned = bool(line[0] > line[-1])
            assert flip == 0.5 or turned == bool(flip)
            mirrored += turned and flip == 0.5
            shrunk += not bool(inside.all())
    assert 8 < mirrored < 32
    assert 15 < shrunk < 55, "a share of (0.9 - 0.5) / 1.5 is smaller than the window"


def test_the_global_generator_decides() -> None:
    images, labels = ramps()
    change = recipes.scale_crop_flip(crop=(32, 48))
    torch.manual_seed(5)
    first = change(images, labels)
    second = change(images, labels)
    torch.manual_seed(5)
    again = change(images, labels.to(torch.uint8))
    assert first[0].shape[2:] == (32, 48)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1].to(torch.uint8), again[1])
    assert not torch.equal(first[0], second[0])


def test_what_cannot_move_together_is_refused() -> None:
    with pytest.raises(DataError, match=r"\(N, H, W\)"):
        recipes.scale_crop_flip()(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())
    with pytest.raises(OfframpError, match="scale"):
        recipes.scale_crop_flip(scale=(2.0, 0.5))
    with pytest.raises(OfframpError, match="augment_pair with a loss that reads labels"):
        replace(recipes.label_free(), augment_pair=recipes.scale_crop_flip())
    with pytest.raises(OfframpError, match="not both"):
        replace(recipes.joint(augment=recipes.flip), augment_pair=recipes.scale_crop_flip())
    data = [{"x": x, "labels": y} for x, y in [labelled(4, dense=True)[:]]]
    with pytest.raises(DataError, match="inputs by place"):
        fit(make(dense=True), data, recipes.joint(epochs=1, augment_pair=recipes.scale_crop_flip()))


def test_a_recipe_tells_two_augmentations_apart() -> None:
    one, two = (recipes.joint(augment_pair=recipes.scale_crop_flip(crop=c)).to_json() for c in (0.9, 0.8))
    assert one != two and "0.9" in one["data"]["augment_pair"]

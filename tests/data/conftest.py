"""Tiny trees in exactly the public layouts."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def cifar_tree(tmp_path: Path) -> Path:
    """Two training batches of 6 records, a test batch of 20; pixel (c, y, x) of record r is (r + c + y + x) % 256."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    c, y, x = np.meshgrid(np.arange(3), np.arange(32), np.arange(32), indexing="ij")
    for name, count, first in (("data_batch_1", 6, 0), ("data_batch_2", 6, 6), ("test_batch", 20, 100)):
        content = b""
        for r in range(first, first + count):
            content += bytes([r % 10]) + ((r + c + y + x) % 256).astype(np.uint8).tobytes()
        (folder / f"{name}.bin").write_bytes(content)
    return tmp_path


@pytest.fixture
def camvid_tree(tmp_path: Path) -> Path:
    """Four train and thirty val frames of 12x16; the label of a pixel is its column modulo 12, so 11 (void) occurs."""
    rng = np.random.default_rng(0)
    for folder, count in (("train", 4), ("val", 30)):
        (tmp_path / folder).mkdir()
        (tmp_path / f"{folder}annot").mkdir()
        for i in range(count):
            picture = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / folder / f"frame_{i:03}.png")
            label = np.tile(np.arange(16, dtype=np.uint8) % 12, (12, 1))
            Image.fromarray(label).save(tmp_path / f"{folder}annot" / f"frame_{i:03}.png")
    return tmp_path


@pytest.fixture
def class_tree(tmp_path: Path) -> Path:
    """Ten images of each of two classes, of several sizes; cats are red, dogs are blue."""
    for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (40 + i, 30 + i), colour).save(tmp_path / name / f"{i}.png")
    return tmp_path

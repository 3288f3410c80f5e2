"""What every test shares: seeds, and one thread, so that small tensors cost little and sums have one order."""

import random

import numpy as np
import pytest
import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

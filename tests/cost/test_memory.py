"""Bytes alive at once, held against sums done by hand."""

import torch
from torch import nn

from offramp.cost.memory import param_bytes, peak_bytes


def test_what_is_freed_no_longer_counts() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        for _ in range(10):
            x = x + 1  # the one before is dropped
        return x

    assert peak_bytes(run, torch.zeros(1000)) == 3 * 4000, "the input, the last one and the next"


def test_what_is_kept_counts_and_views_do_not() -> None:
    def run(x: torch.Tensor) -> list[torch.Tensor]:
        kept = [x * i for i in range(5)]
        return [one.view(10, 100)[3:] for one in kept]

    assert peak_bytes(run, torch.zeros(1000)) == 6 * 4000


def test_parameters_are_apart_and_shared_ones_count_once() -> None:
    linear = nn.Linear(10, 10)
    assert param_bytes(linear) == 440 == param_bytes(linear, linear)
    assert param_bytes(nn.BatchNorm1d(4)) == 4 * 4 * 4 + 8, "buffers too"
    with torch.inference_mode():
        assert peak_bytes(linear, torch.zeros(2, 10)) == 160

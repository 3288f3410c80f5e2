"""Tiny networks with exits, for training tests."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Tiny(nn.Module):
    """Three blocks on 8x8 images, four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = Block(3, 8), Block(8, 16, 2), Block(16, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.three(self.two(self.one(x))).mean((2, 3)))

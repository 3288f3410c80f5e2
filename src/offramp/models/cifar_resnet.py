"""The CIFAR ResNets of He et al. 2016 (arXiv:1512.03385, section 4.2), which no library ships with these keys.

Axes: N samples, C channels, H W space, K classes.
"""

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from offramp.errors import OfframpError

__all__ = ["CifarResNet", "cifar_resnet20", "cifar_resnet32", "cifar_resnet44", "cifar_resnet56", "cifar_resnet110"]


@final
class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A: every second pixel, new channels zero)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.pad = stride, (c_out - c_in) // 2

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x_NCHW)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.pad:
            x_NCHW = F.pad(x_NCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x_NCHW)


@final
class CifarResNet(nn.Module):
    """Depth 6n + 2: three stages of n basic blocks with 16, 32 and 64 channels; (N, 3, 32, 32) -> logits (N, K).

    Keys are those of Yerlan Idelbayev's pytorch_resnet_cifar10, so that its checkpoints load strictly.
    """

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise OfframpError(expected="a depth of 6n + 2 (20, 32, 44, 56, 110 ...)", got=str(depth),
                               where="CifarResNet", todo="choose one of these depths")
        n = depth // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, n, stride=1)
        self.layer2 = _stage(16, 32, n, stride=2)
        self.layer3 = _stage(32, 64, n, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def _stage(c_in: int, c_out: int, n: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(c_in, c_out, stride), *(BasicBlock(c_out, c_out, 1) for _ in range(n - 1)))


def cifar_resnet20(num_classes: int = 10) -> CifarResNet:
    return CifarResNet(20, num_classes)


def cifar_resnet32(num_classes: int = 10) -> CifarResNet:
    return CifarResNet(32, num_classes)


def cifar_resnet44(num_classes: int = 10) -> CifarResNet:
    return CifarResNet(44, num_classes)


def cifar_resnet56(num_classes: int = 10) -> CifarResNet:
    return CifarResNet(56, num_classes)


def cifar_resnet110(num_classes: int = 10) -> CifarResNet:
    return CifarResNet(110, num_classes)

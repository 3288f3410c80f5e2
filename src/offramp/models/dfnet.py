"""DFNet V1 and V2, found by partial order pruning (Li et al. 2019, arXiv:1903.03777), as trunks for dense networks.

Axes: N samples, C channels, H W space.
"""

from typing import Any, final

from torch import Tensor, nn

from offramp.errors import OfframpError

__all__ = ["DFNet"]

# Stage: channels, residual blocks, stride of the first. Names are those of the public PyTorch ports, whose keys so fit.
_STAGES: dict[int, dict[str, tuple[int, int, int]]] = {
    1: {"stage2": (64, 3, 2), "stage3": (128, 3, 2), "stage4": (256, 3, 2), "stage5": (512, 1, 1)},
    2: {"stage2_1": (64, 2, 2), "stage2_2": (128, 1, 1), "stage3_1": (128, 10, 2), "stage3_2": (256, 1, 1),
        "stage4_1": (256, 4, 2), "stage4_2": (512, 2, 1)},
}
_GIVEN = {1: ("stage3", "stage4", "stage5"), 2: ("stage2_2", "stage3_2", "stage4_2")}


@final
class DFNet(nn.Module):
    """Basic residual blocks after two strided convolutions; (N, 3, H, W) -> three maps, coarsest last.

    V1 gives 1/16, 1/32 and 1/32 of the input's size, V2 gives 1/8, 1/16 and 1/32, with 128, 256 and 512 channels: what
    SFNet's code decodes. ``stage1`` gives 1/4. Layers as in the authors' ``df1.prototxt`` and ``df2.prototxt``; with
    their ImageNet classifier 0.75 and 1.77 G MACs at 224x224.
    """

    channels = (128, 256, 512)
    low_level = "stage1"
    """The module whose output is at 1/4."""

    def __init__(self, version: int) -> None:
        super().__init__()
        if version not in _STAGES:
            raise OfframpError(expected="DFNet version 1 or 2", got=repr(version), where="DFNet", todo="choose one")
        # here: its import takes a second, and most who load a network load another
        from torchvision.models.resnet import BasicBlock

        self.stage1 = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
        c_in = 64
        for name, (c_out, blocks, stride) in _STAGES[version].items():
            self.add_module(name, _stage(BasicBlock, c_in, c_out, blocks, stride))
            c_in = c_out
        self.stages, self.given = tuple(_STAGES[version]), _GIVEN[version]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_NCHW: Tensor) -> list[Tensor]:
        x, maps = self.stage1(x_NCHW), []
        for name in self.stages:
            x = self.get_submodule(name)(x)
            if name in self.given:
                maps.append(x)
        return maps


def _stage(block: Any, c_in: int, c_out: int, blocks: int, stride: int) -> nn.Sequential:
    # every stage changes size or channels, so that its first shortcut is a convolution
    shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), nn.BatchNorm2d(c_out))
    return nn.Sequential(block(c_in, c_out, stride, shortcut), *(block(c_out, c_out) for _ in range(blocks - 1)))

"""Sparse execution against the dense simulation of the same network: one says what is computed, the other computes it.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import offramp
from offramp import RedesignedSpec, mask_, redesigned
from offramp.models import hrnet_w18_small
from offramp.nn.masked import Masked
from offramp.sparse import Sparse, deploy


def lively(net: offramp.MultiExit, sharp: float = 3.0) -> offramp.MultiExit:
    """Norms that move what they norm, so that before one differs from after it; logits sure here and unsure there."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.bias.data.normal_(0, 0.3)
        if isinstance(module, nn.Conv2d) and module.out_channels == 4:
            module.weight.data.mul_(sharp)
    return net.eval()


def hrnet(size: tuple[int, int], heads: str, batch: int = 1) -> tuple[offramp.MultiExit, Tensor]:
    guest, x = hrnet_w18_small(num_classes=4).eval(), torch.rand(batch, 3, *size)
    specs = redesigned(guest.ends, 8) if heads == "redesigned" else {
        end: RedesignedSpec(down=0) for end in guest.ends}
    return lively(offramp.attach(guest, x, exits=guest.ends, heads=specs, keep_costly=True)), x


def agree(masked: Masked, fast: Sparse, x: Tensor) -> list[Tensor]:
    """The masks, after all has been compared."""
    theirs, ours = masked.answers(x), fast.answers(x)
    for mask, mine in zip(theirs.masks, ours.masks, strict=True):
        assert torch.equal(mask, mine)
    for logits, mine in zip(theirs.logits, ours.logits, strict=True):
        assert logits.shape == mine.shape
        torch.testing.assert_close(mine, logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))
    assert torch.equal(fast(x), ours.logits[-1])
    again = fast.answers(x)
    assert all(map(torch.equal, again.logits, ours.logits)) and all(map(torch.equal, again.masks, ours.masks))
    return theirs.masks


@pytest.mark.parametrize("heads", ["redesigned", "plain"])
@pytest.mark.parametrize("size", [(64, 96), (65, 97), (90, 61)])
@torch.no_grad()
def test_an_hrnet_of_any_size(size: tuple[int, int], heads: str) -> None:
    net, x = hrnet(size, heads)
    masks = agree(masked := mask_(net, share=0.5), deploy(masked), x)
    assert 0 < masks[0].float().mean() < 1


@pytest.mark.parametrize("rule", [
    {"share": 0.0}, {"share": 0.9}, {"share": 1.0}, {"confidence": "random", "share": 0.6},
    {"share": 0.6, "grid": 4, "lam": 0.7}, {"threshold": 0.5},
])
@torch.no_grad()
def test_masks_of_every_density_and_rule(rule: Any) -> None:
    net, x = hrnet((65, 97), "redesigned", batch=2)
    agree(masked := mask_(net, **rule), deploy(masked), x)

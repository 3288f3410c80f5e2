"""The part up to the first exit on the compiled kernel, against the same layers one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import segmentation

import offramp
from offramp import RedesignedSpec, _kernel, mask_
from offramp.graph import State
from offramp.sparse import Sparse
from sparse.nets import hrnet, lively, mixed

pytestmark = pytest.mark.skipif(not _kernel.available(), reason="no compiled kernel")


def both(fast: Sparse, x: torch.Tensor) -> tuple[Any, Any]:
    """(State, logits, what resizes them): on the kernel, and layer by layer."""
    front, fast._front = fast._front, None
    layers = fast._first((x,), {})
    fast._front = front
    assert front is not None
    with torch.inference_mode():
        found = front(fast._begins.begin(x))
    assert found is not None, "the kernel refused it"
    return found, layers


@pytest.mark.parametrize(("make", "exits"), [
    (lambda: segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=4), ["backbone.layer2.0"]),
    (lambda: smp.Unet("resnet18", encoder_weights=None, classes=4), ["encoder.layer2.1"]),
    (lambda: smp.Unet("mobilenet_v2", encoder_weights=None, classes=4, decoder_channels=(16, 8, 8, 8, 8)),
     ["decoder.blocks.1"]),
], ids=["stem and max pool", "several maps go on", "relu6"])
@torch.no_grad()
def test_it_is_the_same_layers(make: Callable[[], nn.Module], exits: list[str], request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 96)
    net = offramp.attach(make().eval(), x, exits=exits, heads=lambda about: RedesignedSpec(down=0), task="dense",
                         keep_costly=True)
    fast = mask_(lively(net), share=0.5).deploy()
    if "relu6" in request.node.callspec.id:
        with torch.inference_mode():
            assert fast._front is not None and fast._front(fast._begins.begin(x)) is None
        assert fast._first((x,), {})[1].isfinite().all()
        return
    (state, coarse, resize), (theirs, logits, _) = both(fast, x)
    assert len(state.tensors) == len(theirs.tensors) and state.rows == 2
    assert (state.program, state.values, state.why_not) == (theirs.program, theirs.values, theirs.why_not)
    for mine, other in zip((coarse, *state.tensors), (logits, *theirs.tensors), strict=True):
        assert mine.shape == other.shape and mine.is_contiguous(memory_format=torch.channels_last)
        assert (mine - other).abs().max() <= 2e-6 * other.abs().max()
    assert torch.equal(resize(logits), F.interpolate(logits, (64, 96), mode="bilinear", align_corners=False))


@torch.no_grad()
def test_sizes_and_types() -> None:
    """Each size is a program of its own; in bfloat16 what goes on is bfloat16 and logits are wider."""
    torch.manual_seed(0)
    net, x = hrnet((64, 96), "redesigned")
    masked = mask_(net, share=0.5)
    fast = masked.deploy()
    for one in (x, F.interpolate(x, (65, 97)), x.expand(3, -1, -1, -1).contiguous()):
        (state, coarse, _), (_, logits, _) = both(fast, one)
        assert (coarse - logits).abs().max() <= 2e-6 * logits.abs().max()
        assert state.rows == len(one)
        assert coarse.stride() == torch.empty(coarse.shape).to(memory_format=torch.channels_last).stride()
    narrow = masked.deploy(dtype=torch.bfloat16)
    (state, coarse, _), (_, logits, _) = both(narrow, x)
    assert {t.dtype for t in state.tensors} == {torch.bfloat16} and logits.dtype == torch.float32
    assert 1e-4 < (coarse.float() - logits).std() / logits.std() < 0.02
    assert narrow._first((x,), {})[1].dtype == torch.float32


@torch.no_grad()
def test_what_goes_on_lies_in_a_runner_that_nobody_else_has_meanwhile() -> None:
    net, x = hrnet((64, 96), "redesigned")
    fast = mask_(net, share=0.5).deploy()
    front = fast._front
    assert front is not None

    @torch.inference_mode()
    def run(x: torch.Tensor) -> State:
        assert front is not None
        found = front(fast._begins.begin(x))
        assert found is not None
        return found[0]

    state = run(x[:1])
    known = [t.clone() for t in state.tensors]
    (_, idle), = front._shelf._held.values()
    assert idle == []
    for _ in range(3):
        run(-x[:1])
        assert len(idle) == 1
    assert all(map(torch.equal, state.tensors, known))
    other, = idle
    del state
    assert len(idle) == 2 and idle[1] is not other
    several = run(torch.cat([x[:1], -x[:1]]))
    assert all(torch.equal(t[:1], k) for t, k in zip(several.tensors, known, strict=True))


@torch.no_grad()
def test_who_has_it() -> None:
    net, _ = mixed()
    masked = mask_(net, share=0.5)
    has = {how: masked.deploy(**dict([how]))._front is not None  # type: ignore[arg-type]
           for how in [("runner", "auto"), ("runner", "kernel"), ("runner", "plain"), ("engine", "compile")]}
    assert list(has.values()) == [True, True, False, False]

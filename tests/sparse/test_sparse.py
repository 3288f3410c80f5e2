"""Sparse execution against the dense simulation of the same network: one says what is computed, the other computes it.
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.segmentation.fcn import FCN, FCNHead

import offramp
from offramp import RedesignedSpec, _kernel, mask_
from offramp.cost.macs import MacCounter
from offramp.errors import OfframpError
from offramp.nn.masked import Masked
from offramp.runtime import Cancel
from offramp.sparse import Plain, deploy
from sparse.nets import agree, close, hrnet, mixed

RUNNERS: list[Any] = ["plain", pytest.param("kernel", marks=pytest.mark.skipif(
    not _kernel.available(), reason="no compiled kernel"))]


@pytest.fixture(scope="module")
def trunk() -> tuple[Masked, Tensor]:
    torch.manual_seed(0)
    net, x = hrnet((65, 97), "redesigned")
    return mask_(net, confidence="random", share=0.4), x


@torch.no_grad()
def test_an_hrnet_at_any_size(trunk: tuple[Masked, Tensor]) -> None:
    masked, x = trunk
    plain, kernel = deploy(masked, runner="plain"), deploy(masked)
    for one in (x, F.interpolate(x, (64, 96))):
        masks = agree(masked, plain, one)
        assert 0 < masks[1].float().mean() < masks[0].float().mean() < 1
        agree(masked, kernel, one)
    lowered, _ = next(iter(plain._shelf._held.values()))
    convs = [op for part in lowered.program.segments for op in part.ops if isinstance(op, _kernel.ops.Conv)]
    assert len(convs) == len(masked.lams), "one operation each, with its norm, addition and activation"


@pytest.mark.parametrize("runner", ["auto", *RUNNERS])
@torch.no_grad()
def test_in_bfloat16(runner: Any) -> None:
    """Under the masks of the network in float32, so that only rounding differs; logits are float32."""
    net, x = mixed(end="dict")
    masked = mask_(net, confidence="random", share=0.4)
    fast = deploy(masked, dtype=torch.bfloat16, runner=runner)
    theirs, ours = masked.answers(x), fast.answers(x)
    assert all(map(torch.equal, ours.masks, theirs.masks))
    for mine, logits in zip(ours.logits, theirs.logits, strict=True):
        assert mine.dtype == torch.float32
        assert 1e-4 < (mine - logits).std() / logits.std() < 0.02
    (lowered, runners), = fast._shelf._held.values()
    assert _kernel.ops.Conv in map(type, lowered.program.segments[0].ops)
    if runner != "plain" and _kernel.available():
        assert [one.dtype for one in runners if isinstance(one, _kernel.Kernel)] == [torch.bfloat16]
    assert fast(x)["out"].dtype == torch.float32 and deploy(masked, dtype=torch.float32).dtype == torch.float32


@torch.no_grad()
def test_an_hrnet_with_plain_heads() -> None:
    net, x = hrnet((90, 61), "plain")
    masked = mask_(net, share=0.5)
    agree(masked, deploy(masked), x)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("size", [(24, 20), (25, 19)])
@pytest.mark.parametrize("end", ["conv", "dict", "sum"])
@torch.no_grad()
def test_one_of_each_operation(end: str, size: tuple[int, int], runner: Any) -> None:
    net, x = mixed(size, batch=2, end=end)
    masked = mask_(net, share=0.4, lam=0.8)
    fast = deploy(masked, runner=runner)
    agree(masked, fast, x)
    said, untouched = fast(x), net.backbone(x)
    assert type(said) is type(untouched)
    close(net.logits(said), masked(x)[-1])


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("rule", [
    {"share": 0.0}, {"share": 0.95}, {"share": 1.0}, {"confidence": "random", "share": 0.4}, {"threshold": 0.7},
    {"share": 0.6, "grid": 4}, {"confidence": "value", "share": 0.5}, {"confidence": "entropy", "threshold": 0.2},
])
@torch.no_grad()
def test_masks_of_every_rule_and_density(rule: Any, runner: Any) -> None:
    net, x = mixed((25, 19), batch=2)
    masked = mask_(net, **rule)
    density = agree(masked, deploy(masked, runner=runner), x)[0].float().mean()
    if "share" in rule and "grid" not in rule:
        assert abs(density + rule["share"] - 1) < 0.01


@pytest.mark.parametrize("runner", RUNNERS)
@torch.no_grad()
def test_a_dilated_resnet_of_torchvision(runner: Any) -> None:
    resnet = ResNet(Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, True])
    guest = FCN(IntermediateLayerGetter(resnet, {"layer4": "out"}), FCNHead(2048, 4)).eval()
    x = torch.rand(1, 3, 65, 49)
    exits = ["backbone.layer2.0", "backbone.layer3.0"]
    net = offramp.attach(guest, x, exits=exits, heads={one: RedesignedSpec(down=0) for one in exits}, keep_costly=True)
    masked = mask_(net.eval(), share=0.5)
    fast = masked.deploy(runner=runner)
    agree(masked, fast, x)
    assert list(fast(x)) == ["out"] and fast(x)["out"].shape == (1, 4, 65, 49)


@torch.no_grad()
def test_nothing_outside_a_region_is_read(trunk: tuple[Masked, Tensor]) -> None:
    net, small = mixed((25, 19))
    for masked, x in ((mask_(net, confidence="random", share=0.6), small), trunk):
        def poisoned(program: Any) -> Plain:
            made = Plain(program)
            for buffer in made._maps:
                buffer[:-1] = torch.nan
            return made

        fast = deploy(masked)
        fast._make = poisoned
        agree(masked, fast, x)


@torch.no_grad()
def test_its_convolutions_are_those_that_the_simulation_counts(trunk: tuple[Masked, Tensor]) -> None:
    net, small = mixed((25, 19))
    for masked, x in ((mask_(net, confidence="random", share=0.6), small), trunk):
        said, macs = masked.answers(x), masked.macs(x)[0]
        fast = deploy(masked, runner="plain")
        fast(x)
        (lowered, runners), = fast._shelf._held.values()
        runner, program = runners[0], lowered.program
        for k, part in enumerate(program.segments):
            runner.settle(said.masks[k][0, 0])
            mine = halo = dense = 0
            for op in part.ops:
                if not isinstance(op, _kernel.ops.Conv):
                    continue
                level = program.levels[program.maps[op.out.map].level]
                mask = F.interpolate(said.masks[k].float(), (level.height, level.width), mode="nearest")[0, 0].bool()
                mine += op.weight.numel() * int(mask.sum())
                dense += op.weight.numel() * mask.numel()
                windows = F.pad(mask, (3,) * 4).unfold(0, 7, 1).unfold(1, 7, 1)
                beside = ~mask & windows[..., 2:5, 2:5].flatten(2).any(2)
                # the network's own logits are carried over, where heads' are interpolated and carried over after
                if op.out.map != lowered.logits[-1]:
                    halo += op.out.count * int(windows[beside].sum())
            counted = sum(cost * program.levels[level].height * program.levels[level].width * runner.density(level)
                          for level, cost in lowered.costs[k].items())
            assert mine == pytest.approx(counted) and mine < dense
            with MacCounter() as counter:
                _dense_stage(masked.net, k + 1, x)
            assert macs[k + 1] - macs[k] == mine + halo + counter.total - dense


def _dense_stage(net: offramp.MultiExit, k: int, x: Tensor) -> None:
    from offramp.cost.macs import not_counted

    with not_counted():
        state: Any = net.begin(x)
        for j in range(k):
            state = net.stages[j](state)
    net.step(k, state)


@pytest.mark.parametrize("runner", RUNNERS)
@torch.no_grad()
def test_dense_images_keep_what_was_settled_and_go_over_to_masks(runner: Any) -> None:
    net, x = mixed((25, 19), batch=2)
    masked = mask_(net, confidence="random", share=0.4)  # active: 0.6, 0.36, 0.22
    plain = net(x)
    # what the simulation says where the stage after the first exit runs as if nothing were masked
    frame, state = masked._frame(), net.begin(x)
    with masked._link.at(frame):
        state = net.stages[0](state)
        coarse = net.head("stem").coarse(*state.tensors)
        mask = masked.goes_on(coarse, 0)
        state = net.stages[1](state)
        coarse = torch.where(mask, net.head("body").coarse(*state.tensors), coarse)
        mask = masked.goes_on(coarse, 1) & mask
        frame.settle(mask, coarse)
        state = net.stages[2](state)
        coarse = frame.carry(net.head("point").coarse(*state.tensors))
        mask = masked.goes_on(coarse, 2) & mask
        frame.settle(mask, coarse)
        frame.last = True
        wanted = net.logits(net.stages[3](state))
    close(deploy(masked, runner=runner, dense_above=0.5)(x), wanted)
    said = deploy(masked, runner=runner, dense_above=0.0).answers(x)
    assert torch.equal(said.masks[0], masked.answers(x).masks[0])
    masked.share = 0.0
    for one, other in zip(deploy(masked, runner=runner, dense_above=0.0).answers(x).logits, plain, strict=True):
        close(one, other)


@torch.no_grad()
def test_rows_sizes_and_threads_do_not_meet() -> None:
    net, x = mixed((24, 20), batch=3)
    masked = mask_(net, share=0.4)
    fast = deploy(masked)
    said, flipped = fast(x), fast(x.flip(0))
    close(flipped, said.flip(0))
    for n in range(3):
        close(fast(x[n : n + 1]), said[n : n + 1])
    inputs = [torch.rand(1, 3, 20 + n, 24) for n in range(6)]
    alone = [masked(one)[-1] for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        for one, ours in zip(alone, pool.map(torch.no_grad()(fast.forward), inputs), strict=True):
            close(ours, one)
    assert len(fast._shelf._held) <= 4 and all(len(idle) <= 2 for _, idle in fast._shelf._held.values())
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(one, said) for one in pool.map(torch.no_grad()(fast.forward), [x] * 8))


@torch.no_grad()
def test_the_network_it_comes_from_is_left() -> None:
    net, x = mixed()
    masked = mask_(net, share=0.4)
    before, twin = masked(x), copy.deepcopy(masked)
    fast = deploy(masked)
    said = fast(x)
    assert all(map(torch.equal, masked(x), before))
    for parameter in masked.parameters():
        parameter.data.zero_()
    assert torch.equal(fast(x), said) and torch.equal(fast.train()(x), said) and not fast.training
    close(fast(x), twin(x)[-1])


class Asked:
    """A stop that says True from the nth time on."""

    def __init__(self, after: int) -> None:
        self.left, self.due_ns = after, None
        self.flag = torch.zeros(1, dtype=torch.int32)

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("runner", RUNNERS)
@torch.no_grad()
def test_it_answers_step_by_step_until_it_is_stopped(runner: Any) -> None:
    net, x = mixed((25, 19), batch=2)
    masked = mask_(net, share=0.4)
    fast, said, macs = deploy(masked, runner=runner), masked.answers(x), masked.macs(x).sum(0)
    turns: list[Any] = list(fast.stepwise(((x,), {}), Asked(99)))
    assert [type(one).__name__ for one in turns] == ["Ahead", "Step"] * 4
    assert all(ahead.may_stop for ahead in turns[2::2]) and len({ahead.kind for ahead in turns[::2]}) == 4
    assert 0 < turns[2].macs < macs[1] - macs[0]
    for k, step in enumerate(turns[1::2]):
        assert step.exit_index == k and step.exits.tolist() == [k, k]
        close(step.output, said.logits[k])
    answers = list(fast.anytime(x))
    assert [one.exit_index for one in answers] == [0, 1, 2, 3] and 0 < answers[-1].confidence < 1
    assert fast.predict(x, deadline_ms=0).exit_index == 0
    cancel = Cancel()
    cancel.set()
    assert fast.predict(x, stop=cancel).exit_index == 0
    stop = Asked(99)
    taken = []
    for one in fast.steps(x, stop=stop):
        taken.append(one.exit)
        stop.flag.fill_(len(taken) == 2)  # set within: what is under way is given up
    assert taken == [0, 1]
    close(fast(x), said.logits[-1])  # and leaves nothing behind


def refused(masked: Masked, x: Tensor, match: str) -> None:
    with pytest.raises(OfframpError, match=match):
        deploy(masked)(x)


@torch.no_grad()
def test_what_cannot_run_so_is_refused_by_name() -> None:
    net, x = mixed()
    refused(mask_(net, share=0.4, reach="halo"), x, "reach 'halo'")
    masked = mask_(mixed()[0], share=0.4)
    masked.enabled = False
    refused(masked, x, "switched off")
    refused(net, x, "MultiExit")  # type: ignore[arg-type]

    class Odd(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.stem, self.odd, self.last = nn.Conv2d(3, 6, 3, 2, 1), layer, nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return F.interpolate(self.last(y + self.odd(y)), size=x.shape[-2:])

    for layer, match in (
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1)), "AdaptiveAvgPool2d.*the whole picture"),
        (nn.Sequential(nn.GELU()), r"GELU\(approximate='none'\) \(guest_odd_0, in "),
        (nn.ConvTranspose2d(6, 6, 3, 1, 1), "ConvTranspose2d"),
        (nn.Conv2d(6, 6, 3, 1, 1, padding_mode="reflect"), "padding 'reflect'"),
        (nn.GroupNorm(2, 6), "GroupNorm"),
    ):
        net = offramp.attach(Odd(layer), x, exits=["stem"], heads={"stem": RedesignedSpec(down=0)}, keep_costly=True)
        refused(mask_(net.eval(), share=0.4), x, match)


@torch.no_grad()
def test_exits_whose_masks_are_not_nested_are_refused() -> None:
    odd = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Upsample(size=(9, 7)))
    heads = {"stem": RedesignedSpec(down=0), "body": odd}
    net, x = mixed(heads=heads)
    refused(mask_(net, share=0.4), x, "not nested")

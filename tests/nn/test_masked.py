"""The dense simulation of masks: against the same written out by hand, the plain network, and counts by hooks."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import offramp
from offramp import RedesignedSpec, mask_, redesigned
from offramp.cost.macs import count
from offramp.errors import OfframpError
from offramp.functional.masking import interpolate
from offramp.models import hrnet_w18_small
from offramp.nn.masked import Masked


def unit(width: int, wide: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, wide, 3, stride, 1), nn.BatchNorm2d(wide), nn.ReLU())


class Guest(nn.Module):
    """Logits at 1/2; two branches where ``fuse``."""

    def __init__(self, fuse: bool = True, end: Any = None, pool: bool = False) -> None:
        super().__init__()
        self.stem, self.body = unit(3, 6, 2), unit(6, 6)
        self.down, self.deep = unit(6, 8, 2), unit(6, 6)
        self.last, self.end = nn.Conv2d(14 if fuse else 6, 4, 1), end or nn.Identity()
        self.fuse, self.context = fuse, nn.Conv2d(6, 6, 1) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        x = self.body(self.stem(x)) * 1
        y = self.deep(x) + x
        if self.context is not None:
            y = y + self.context(F.adaptive_avg_pool2d(y, 1))
        if self.fuse:
            coarse = F.interpolate(self.down(x), size=y.shape[-2:], mode="bilinear", align_corners=False)
            y = torch.cat([y, coarse], 1)
        return F.interpolate(self.end(self.last(y)), size=size, mode="bilinear", align_corners=False)


X = torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(7))
HEADS = {"stem": RedesignedSpec(down=1, channels=5), "body": RedesignedSpec(down=0, channels=5)}


def network(heads: Any = HEADS, **guest: Any) -> offramp.MultiExit:
    net = offramp.attach(Guest(**guest), X, exits=["stem", "body"], heads=heads, keep_costly=True)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.bias.data.normal_(0, 0.3)  # so that what is masked before a norm differs from after it
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(6 if module.out_channels == 4 else 2)  # sure here, unsure there
    return net.eval()


@torch.no_grad()
def middle(net: offramp.MultiExit, settled: float = 0.4) -> float:
    """A threshold at which the first exit settles so much of the example."""
    frontier = net.stages[0](net.begin(X)).tensors
    said = getattr(net.head("stem"), "coarse", net.head("stem"))(*frontier)
    return said.softmax(1).amax(1).quantile(1 - settled).item()


def made(settled: float = 0.4, **guest: Any) -> Masked:
    net = network(**guest)
    return mask_(net, threshold=middle(net, settled))


def by_hand(masked: Masked, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The guest above under masks, written out: convolution, mean, norm, ReLU."""
    net, guest = masked.net, masked.net.backbone
    first, second = net.head("stem"), net.head("body")

    def at(mask: Tensor, size: Any) -> Tensor:
        return F.interpolate(mask.float(), tuple(size), mode="nearest") > 0

    def under(mask: Tensor, layers: Any, x: Tensor) -> Tensor:
        raw = F.conv2d(x, layers[0].weight, layers[0].bias, layers[0].stride, layers[0].padding)
        name = next(n for n, m in net.named_modules() if m is layers[0]).replace(".", ":")
        x = interpolate(raw, at(mask, raw.shape[-2:]), masked.lams[name])
        for layer in layers[1:]:
            x = layer(x)
        return x

    def up(x: Tensor) -> Tensor:
        return F.interpolate(x, X.shape[-2:], mode="bilinear", align_corners=False)

    def unsure(coarse: Tensor) -> Tensor:
        return coarse.softmax(1).amax(1, keepdim=True) < masked.threshold

    x = guest.stem(x)
    one = first.coarse(x)
    mask = unsure(one)
    x = under(mask, guest.body, x)
    two = torch.where(mask, under(mask, [second.last], under(mask, second.flat, x)), one)
    after = unsure(two)
    y = under(after, guest.deep, x) + x
    y = torch.cat([y, F.interpolate(under(after, guest.down, x), y.shape[-2:], mode="bilinear")], 1)
    three = torch.where(after, F.conv2d(y, guest.last.weight, guest.last.bias), two)
    return [up(one), up(two), up(three)], [mask, after]


def test_it_is_what_the_equations_say() -> None:
    masked = made()
    with torch.no_grad():
        for lam in masked.lams.values():
            lam.uniform_(0.5, 2)
        said, (logits, masks) = masked.answers(X), by_hand(masked, X)
    assert masked.carries_inside and not masked.notes and len(masked.lams) == 6
    shares = [mask.float().mean().item() for mask in masks]
    assert 0.95 > shares[0] > shares[1] > 0.05, "a test of masks needs masks"
    assert all(torch.equal(a, b) for a, b in zip(said.masks, masks, strict=True))
    for ours, theirs in zip(said.logits, logits, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_off_or_all_active_is_the_plain_network_to_the_bit() -> None:
    net = network()
    with torch.no_grad():
        plain = net(X)
        masked = mask_(net, threshold=middle(net))
        assert all(map(torch.equal, masked.net(X), plain)) and not all(map(torch.equal, masked(X), plain))
        masked.enabled = False
        assert all(map(torch.equal, masked(X), plain)) and masked.answers(X).masks == []
        masked.enabled, masked.threshold = True, 1.1
        assert all(map(torch.equal, masked(X), plain))
        masked.threshold = 0.3
        assert masked.unmask_() is net and all(map(torch.equal, net(X), plain))
        assert {type(m) for m in net.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
        assert mask_(net).threshold == 0.998  # ADP-C's
    assert mask_(network(), confidence="value").threshold == 0.002


@torch.no_grad()
def test_masks_follow_the_input_and_each_row_its_own() -> None:
    masked = made()
    first = masked.answers(X)
    wide = masked.answers(torch.rand(2, 3, 30, 34))
    again = masked.answers(X)
    assert wide.masks[0].shape == (2, 1, 15, 17) and wide.logits[-1].shape == (2, 4, 30, 34)
    assert all(map(torch.equal, first.logits, again.logits)) and all(map(torch.equal, first.masks, again.masks))
    assert not torch.equal(first.masks[0][0], first.masks[0][1])
    for n in range(3):
        alone = masked.answers(X[n:n + 1])
        assert all(torch.equal(a[0], b[n]) for a, b in zip(alone.masks, first.masks, strict=True))
        for a, b in zip(alone.logits, first.logits, strict=True):
            torch.testing.assert_close(a[0], b[n])


@torch.no_grad()
@pytest.mark.parametrize("rule", [{"confidence": "top"}, {"confidence": "entropy", "share": 0.4},
                                  {"confidence": "random", "share": 0.4}, {"confidence": "value", "share": 0.4}])
def test_masks_are_nested(rule: Any) -> None:
    net = network()
    masked = mask_(net, threshold=None if "share" in rule else middle(net), **rule)
    first, second = masked.answers(X).masks
    assert not (second & ~first).any() and 0 < second.sum() < first.sum() < first.numel()
    assert torch.equal(masked.answers(X).masks[1], second)


@torch.no_grad()
def test_two_networks_and_two_threads_do_not_meet() -> None:
    a, b = made(), made(0.2)
    alone, others = a(X), b(X)
    seen: list[list[Tensor]] = []
    handle = a.net.backbone.deep[0].register_forward_pre_hook(lambda *_: seen.append(b(X)))
    assert all(map(torch.equal, a(X), alone)) and all(map(torch.equal, seen[0], others))
    handle.remove()
    flipped, main, entered, done, jobs = a(X.flip(0)), threading.get_ident(), threading.Event(), threading.Event(), []
    with ThreadPoolExecutor(1) as pool:
        def meanwhile(*_: Any) -> None:
            """Between two layers of the one call, the other comes as far, and waits there until the first is over."""
            if threading.get_ident() == main:
                jobs.append(pool.submit(torch.no_grad()(a.forward), X.flip(0)))
                assert entered.wait(20)
            else:
                entered.set()
                assert done.wait(20)

        a.net.backbone.deep[0].register_forward_pre_hook(meanwhile)
        said = a(X)
        done.set()
        assert all(map(torch.equal, said, alone)) and all(map(torch.equal, jobs[0].result(), flipped))


@torch.no_grad()
def test_copies_and_files() -> None:
    net = network()
    keys = list(net.state_dict())
    masked = mask_(net, threshold=middle(net))
    state = masked.state_dict()
    assert list(net.state_dict()) == keys
    assert [k for k in state if k.startswith("net.")] == [f"net.{k}" for k in keys]
    assert sorted(set(state) - {f"net.{k}" for k in keys}) == sorted(f"lams.{k}" for k in masked.lams)
    said, twin = masked(X), copy.deepcopy(masked)
    assert all(map(torch.equal, twin(X), said))
    for lam in twin.lams.values():
        lam.fill_(0.1)
    assert not torch.equal(twin(X)[-1], said[-1]) and all(map(torch.equal, masked(X), said))
    twin.load_state_dict(state)
    assert all(map(torch.equal, twin(X), said))


@pytest.mark.parametrize("learn", [True, False])
def test_in_training_gradients_reach_weights_and_lambdas(learn: bool) -> None:
    masked = mask_(network(), share=0.4, lam=0.8, learn_lam=learn).train()
    assert masked.net.backbone.body[1].training
    sum(logits.square().mean() for logits in masked(X)).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in masked.net.parameters())
    carried = {"backbone:last"}  # its inactive places are carried over, not interpolated
    for key, lam in masked.lams.items():
        assert lam.item() == pytest.approx(0.8) and (lam.grad is not None) == (learn and key not in carried)


@torch.no_grad()
def test_the_halo_is_enough_where_3x3_convolutions_read_alone() -> None:
    said = {}
    for reach in ("everywhere", "halo"):
        torch.manual_seed(0)
        masked = mask_(network(fuse=False, heads={"stem": RedesignedSpec(down=1, channels=5),
                                                  "body": RedesignedSpec(down=0)}), share=0.8, reach=reach)
        said[reach] = masked(X)
    for a, b in zip(said["everywhere"], said["halo"], strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_macs_are_those_of_active_places_and_of_the_halo() -> None:
    masked = made()
    said, macs = masked.answers(X), masked.macs(X)
    dense = count(masked.net, X).total // 3
    rest = {"body": said.masks[0], "heads:body": said.masks[0], "deep": said.masks[1], "down": said.masks[1],
            "last": said.masks[1]}
    for n in range(3):
        total = dense
        for key in masked.lams:
            mask = next(mask for part, mask in rest.items() if part in key)[n, 0]
            conv = masked.net.get_submodule(key.replace(":", "."))
            mask = mask[::2, ::2] if "down" in key else mask
            each = conv.weight.numel()
            total -= each * int((~mask).sum())
            if key != "backbone:last":
                near = F.pad(mask, (3,) * 4).unfold(0, 7, 1).unfold(1, 7, 1)
                total += conv.out_channels * int(near[~mask & near[..., 2:5, 2:5].flatten(2).any(2)].sum())
        assert macs[n, -1] == total < dense
    assert macs.shape == (3, 3) and (macs.diff(dim=1) > 0).all()
    masked.threshold = 1.1
    assert masked.macs(X)[:, -1].tolist() == [dense] * 3
    masked.enabled = False
    assert masked.macs(X)[:, -1].tolist() == [dense] * 3 and torch.equal(masked.macs(X)[:, 0], macs[:, 0])


@torch.no_grad()
def test_a_pooled_context_is_no_map() -> None:
    masked = made(pool=True)
    seen: list[Tensor] = []
    masked.net.backbone.context.register_forward_hook(lambda layer, args, out: seen.append(
        out - F.conv2d(args[0], layer.weight, layer.bias)))
    masked.threshold = 0.0
    masked(X)
    assert len(seen) == 1 and seen[0].shape[-2:] == (1, 1) and not seen[0].any()


@torch.no_grad()
def test_logits_that_no_convolution_gives_are_carried_at_the_outputs_size() -> None:
    own = {"stem": nn.Sequential(nn.Conv2d(6, 4, 1), nn.Upsample(scale_factor=2)), "body": RedesignedSpec(down=0)}
    masked = mask_(network(end=nn.Tanh(), heads=own), share=0.4)
    assert not masked.carries_inside
    said = masked.answers(X)
    assert said.masks[0].shape[-2:] == (24, 20) and said.masks[1].shape[-2:] == (12, 10)
    settled = ~F.interpolate(said.masks[1].float(), (24, 20), mode="nearest").bool().expand_as(said.logits[2])
    assert torch.equal(said.logits[2][settled], said.logits[1][settled]) and settled.any() and not settled.all()


@torch.no_grad()
def test_an_hrnet_is_masked_whole() -> None:
    guest = hrnet_w18_small(num_classes=4).eval()
    x = torch.rand(2, 3, 65, 97)
    net = offramp.attach(guest, x, exits=guest.ends, heads=redesigned(guest.ends, 8)).eval()
    plain = net(x)
    masked = mask_(net, share=0.5)
    said = masked.answers(x)
    assert masked.carries_inside and [mask.shape for mask in said.masks] == [(2, 1, 17, 25)] * 3
    after = [m for n, m in guest.named_modules() if n.startswith(("transition", "stage", "last_layer"))]
    heads = [m for end in guest.ends[1:] for m in net.head(end).modules()]
    assert len(masked.lams) == sum(isinstance(m, nn.Conv2d) for m in (*after, *heads))
    assert torch.equal(said.logits[0], plain[0]) and all(map(torch.equal, net(x), plain))
    macs = masked.macs(x)
    masked.threshold, masked.share = 1.1, None
    assert all(map(torch.equal, masked(x), plain))
    assert (macs[:, 0] == masked.macs(x)[:, 0]).all() and (macs[:, 1:] < masked.macs(x)[:, 1:]).all()


def test_what_cannot_be_masked_is_refused_and_left() -> None:
    class ByHand(Guest):
        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(F.conv2d(self.body(self.stem(x)), self.deep[0].weight)[:, :4], size=x.shape[-2:])

    net = offramp.attach(ByHand(), X, exits=["stem", "body"], heads=HEADS, keep_costly=True)
    with pytest.raises(OfframpError, match="modules of torch.nn"):
        mask_(net)
    assert {type(m) for m in net.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    net = network()
    with pytest.raises(OfframpError, match="labels pixels"):
        mask_(net.backbone)  # type: ignore[arg-type]
    with pytest.raises(OfframpError, match="a threshold or a share"):
        mask_(net, confidence="entropy")
    with pytest.raises(OfframpError, match="a confidence of"):
        mask_(net, confidence="sure")  # type: ignore[arg-type]
    mask_(net)
    with pytest.raises(OfframpError, match="masked or slimmable already"):
        mask_(net)
    several = network(heads=lambda site: {"a": RedesignedSpec(down=0), "b": RedesignedSpec(down=1)})
    with pytest.raises(OfframpError, match="one head at each site"):
        mask_(several)

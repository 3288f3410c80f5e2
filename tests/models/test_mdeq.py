"""MDEQ: ADP-C's counts, the fixed point and its gradient, rows on their own, and its iterates as exits."""

from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import offramp
from offramp.cost.macs import count
from offramp.errors import OfframpError
from offramp.models import MDEQ, load_model, mdeq_small
from offramp.models.mdeq import anderson


def small(steps: int = 10, **how: int) -> MDEQ:
    return MDEQ(5, channels=(8, 16, 16), expansion=2, groups=4, steps=steps, **how).eval()


def calm(net: MDEQ) -> MDEQ:
    """In float64, and with a cell that brings any two states nearer to each other."""
    for _, _, norm in net.cell.ends:
        nn.init.constant_(norm.weight, 0.1)
        nn.init.normal_(norm.bias)
    return net.double()


def start(net: MDEQ, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What is injected, and maps of zeros."""
    injected = net.stem(x)
    height, width = injected.shape[-2:]
    sizes = [(-(-height // 2**i), -(-width // 2**i)) for i in range(len(net.channels))]
    return injected, [injected.new_zeros(len(x), c, *size) for c, size in zip(net.channels, sizes, strict=True)]


def test_counts() -> None:
    # ADP-C, Table 1: 521.6, 717.9, 914.2, 1110.5 at iterates 4, 6, 8 and 10, convolutions alone, in units of 2^30
    with torch.device("meta"):
        net, x = mdeq_small(num_classes=19).eval(), torch.zeros(1, 3, 1024, 2048)
        whole, cell = count(lambda: list(net.iterates(x, (1,)))), count(net.cell, start(net, x)[1], net.stem(x))
    around = whole.by_op["convolution"] - cell.by_op["convolution"]
    said = [(around + 2 * (k + 1) * cell.by_op["convolution"]) / 2**30 for k in (4, 6, 8, 10)]
    assert [round(one, 1) for one in said] == [521.6, 717.9, 914.2, 1110.5]
    assert round(around / 1e9, 1) == 33.2 and round(cell.total / 1e9, 1) == 52.7


@pytest.mark.parametrize("k", [1, 4, 9])
def test_an_iterate_costs_stem_cells_mixing_and_head(k: int) -> None:
    net, x = small(), torch.rand(2, 3, 50, 67)
    with torch.inference_mode():
        injected, maps = start(net, x)
        stem, cell = count(net.stem, x).total, count(net.cell, maps, injected).total
        places = maps[0].shape[-2] * maps[0].shape[-1]
        head = count(net.head, torch.zeros(2, sum(net.channels), *maps[0].shape[-2:])).total
        head += 4 * 2 * (sum(net.channels[1:]) * places + 5 * 50 * 67)  # bilinear, to 1/4 and to the picture
        numbers = sum(m.numel() for m in maps)
        mixing = sum((n - 1) * (n + 1) * numbers for n in (min(i, 5) for i in range(1, k)))
        assert count(lambda: list(net.iterates(x, (k,)))).total == stem + k * cell + mixing + head
        assert count(small(k), x).total == stem + k * cell + mixing + head


def test_anderson_solves_linear_rows_each_on_its_own() -> None:
    a, b = torch.randn(3, 4, 4, dtype=torch.float64) * 0.4, torch.randn(3, 4, dtype=torch.float64)
    def f(z: Tensor, rows: slice = slice(None)) -> Tensor:
        return (a[rows] @ z[:, :, None])[:, :, 0] + b[rows]
    wanted = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - a, b)
    zero = torch.zeros(3, 4, dtype=torch.float64)
    found = next(islice(anderson(f, zero, memory=6, ridge=1e-12), 7, None))[1]  # exact after one more than dimensions
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for row in range(3):
        one = slice(row, row + 1)
        alone = next(islice(anderson(lambda z, one=one: f(z, one), zero[one]), 7, None))[1]
        torch.testing.assert_close(alone, next(islice(anderson(f, zero), 7, None))[1][one], rtol=1e-9, atol=1e-9)


def test_the_equilibrium_is_one() -> None:
    net, x = calm(small()), torch.rand(2, 3, 48, 64, dtype=torch.float64)
    maps, taken = net.equilibrium(x, tolerance=1e-10)
    with torch.inference_mode():
        injected, zero = start(net, x)
        for after, before in zip(net.cell(maps, injected), maps, strict=True):
            torch.testing.assert_close(after, before, rtol=0, atol=1e-8)
        for _ in range(60):  # without any solver
            zero = net.cell(zero, injected)
    elsewhere, _ = net.equilibrium(x, start=[torch.randn_like(m) for m in maps], tolerance=1e-10)
    for one, other, plain in zip(maps, elsewhere, zero, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
        torch.testing.assert_close(one, plain, rtol=0, atol=1e-8)
    assert maps[0].abs().max() > 0.5 and int(taken.max()) < 30
    with torch.inference_mode():
        last = list(net.iterates(x, (1, 30)))
        torch.testing.assert_close(F.interpolate(net.head(torch.cat([maps[0], *(
            F.interpolate(m, maps[0].shape[-2:], mode="bilinear") for m in maps[1:])], 1)), (48, 64), mode="bilinear"),
            last[1], rtol=0, atol=1e-8)
        assert (last[0] - last[1]).abs().max() > 1e-4


def test_rows_that_do_not_settle_are_an_error() -> None:
    with pytest.raises(OfframpError, match="2 of 2 that still move"):
        small().equilibrium(torch.rand(2, 3, 32, 32), tolerance=1e-7, most=3)


@pytest.mark.parametrize("steps, exact", [(30, True), (0, False)])
def test_the_implicit_gradient_is_that_of_a_long_unroll(steps: int, exact: bool) -> None:
    net, x = calm(small(30, gradient_steps=steps)), torch.rand(2, 3, 32, 48, dtype=torch.float64)
    weights = torch.randn(2, 5, 32, 48, dtype=torch.float64)
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    said = net(x)
    (said * weights).sum().backward()
    found = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    injected, maps = start(net, x)
    for _ in range(40):
        maps = net.cell(maps, injected)
    joined = torch.cat([maps[0], *(F.interpolate(m, maps[0].shape[-2:], mode="bilinear") for m in maps[1:])], 1)
    unrolled = F.interpolate(net.head(joined), (32, 48), mode="bilinear")
    torch.testing.assert_close(said, unrolled, rtol=0, atol=1e-8)
    (unrolled * weights).sum().backward()
    off = 0.0
    for name, p in net.named_parameters():
        one = found[name]
        assert one is not None and p.grad is not None
        off = max(off, float((one - p.grad).norm() / p.grad.norm()))
    assert off < 1e-6 if exact else off > 1e-3, off


def test_training_says_what_evaluation_says() -> None:
    net, x = small(6), torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        wanted = net(x)
    net.train().stem.eval()
    net.head.eval()
    said = net(x)
    assert said.requires_grad
    torch.testing.assert_close(said, wanted)


def test_rows_are_on_their_own() -> None:
    net, x = calm(small()), torch.rand(3, 3, 48, 64, dtype=torch.float64)
    x[1] *= 20  # another picture altogether
    with torch.inference_mode():
        said = net(x)
        for row in range(3):
            torch.testing.assert_close(net(x[row:row + 1]), said[row:row + 1], rtol=1e-9, atol=1e-9)
    maps, taken = net.equilibrium(x, tolerance=1e-6)
    for row in range(3):
        alone, once = net.equilibrium(x[row:row + 1], tolerance=1e-6)
        assert int(once) == int(taken[row])
        for one, many in zip(alone, maps, strict=True):
            torch.testing.assert_close(one, many[row:row + 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_odd_sizes(training: bool) -> None:
    net, x = small(3, gradient_steps=2).train(training), torch.rand(2, 3, 67, 99)
    said = net(x)
    assert said.shape == (2, 5, 67, 99)
    if training:
        said.square().mean().backward()
        assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


class Toy(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Above and below a line at a random height; which side a pixel is on no small window tells."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(i)
        line = int(torch.randint(16, 48, (), generator=rng))
        image = torch.rand(3, 64, 64, generator=rng)
        image[:, line - 2:line + 2] += 2
        return image, (torch.arange(64) >= line).long()[:, None].expand(64, 64).clone()


def test_training_by_the_house_makes_later_iterates_better() -> None:
    torch.manual_seed(0)
    net = MDEQ(2, channels=(8, 8, 16, 16), expansion=1, groups=4, steps=6)
    recipe = offramp.recipes.slim(epochs=6, ohem=False, distill=None, lr=0.05, batch_size=8)
    offramp.fit(net, Toy(), recipe, progress=False)
    images, labels = (torch.stack(part) for part in zip(*(Toy()[i] for i in range(64)), strict=True))
    with torch.inference_mode():
        losses = [float(F.cross_entropy(logits, labels)) for logits in net.eval().iterates(images, (1, 2, 6))]
    assert losses[2] < 0.1 and losses[2] < losses[1] < losses[0], losses


def test_iterates_are_exits() -> None:
    net, x = small(8), torch.rand(3, 3, 48, 64)
    with_exits = offramp.attach(net, x, exits=net.exits(1, 3, 7), heads=net.decoder)
    with torch.inference_mode():
        wanted = list(net.iterates(x, (1, 3, 7, 8)))
        assert all(torch.equal(a, b) for a, b in zip(with_exits(x), wanted, strict=True))
        assert torch.equal(wanted[-1], net(x))
    assert all(site.shrinkable for site in with_exits.sites)
    labels = torch.randint(0, 5, (3, 48, 64))
    table = offramp.record(with_exits, [(x, labels)], latency=False)
    assert [c.stride for c in table.columns] == [4, 4, 4, 4]
    spent = [body + head for body, head in zip(table.costs.macs, table.costs.head_macs, strict=True)]
    assert spent == [count(lambda k=k: list(net.iterates(x[:1], (k,)))).total for k in (1, 3, 7, 8)]
    plan = offramp.search(table, max_drop=0.99)
    assert plan.exits, "leaving at the first iterate costs nothing where nobody has learnt anything"
    with torch.inference_mode():
        assert with_exits.deploy(plan)(x).shape == (3, 5, 48, 64)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert set(before) == set(small(8).state_dict()), "attach left it as it was"


def test_what_it_refuses() -> None:
    with pytest.raises(OfframpError, match="channels that 4 groups divide"):
        MDEQ(5, channels=(8, 18), groups=4)
    with pytest.raises(OfframpError, match="steps >= 1, not 0"):
        MDEQ(5, steps=0)
    with pytest.raises(OfframpError, match="1 to 9, before the last"):
        small().exits(4, 10)
    with pytest.raises(OfframpError, match="rising numbers"):
        list(small().iterates(torch.rand(1, 3, 32, 32), (4, 4)))


def test_it_is_found_by_name_and_its_weights_are_a_file(tmp_path: Path) -> None:
    net = load_model("offramp:mdeq_small?num_classes=11&steps=3")
    assert isinstance(net, MDEQ) and not net.training and net.steps == 3
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    again = load_model("offramp:mdeq_small?num_classes=11&steps=3", weights=str(tmp_path / "net.safetensors"))
    with torch.inference_mode():
        x = torch.rand(1, 3, 32, 48)
        assert torch.equal(net(x), again(x)) and net(x).shape == (1, 11, 32, 48)


@pytest.mark.parametrize("recipe, why", [
    (offramp.recipes.label_free(epochs=1), "no parameter that takes gradients"),
    (offramp.recipes.joint(epochs=1), "a site where tensors determine the rest"),
])
def test_its_exits_are_not_trained(recipe: offramp.Recipe, why: str) -> None:
    net = small(3)
    with_exits = offramp.attach(net, torch.rand(2, 3, 64, 64), exits=net.exits(1), heads=net.decoder)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(OfframpError, match=why):
        offramp.fit(with_exits, Toy(), recipe, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

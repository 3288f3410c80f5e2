"""ADP-C's dense heads: its counts, the layers it names, and how they hang on an HRNet."""

import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import offramp
from offramp import HeadSpec, RedesignedSpec, redesigned
from offramp.cost.macs import MacCounter, count
from offramp.errors import HeadError
from offramp.models import hrnet_w18_small, load_model
from offramp.models.hrnet import HRNetPose
from offramp.nn.heads import head_macs
from offramp.nn.redesigned import RedesignedHead, build_redesigned
from offramp.nn.shortcut import spec_from_json
from offramp.types import LiveTensor


def live(*shape: int) -> LiveTensor:
    return LiveTensor(name="x", shape=shape, dtype="float32")


@cache
def stages(name: str, size: tuple[int, int]) -> tuple[nn.Module, list[list[Tensor]], list[int], Tensor]:
    """On the meta device: the network, its maps where stages end, convolutions' MACs up to there and in all."""
    with torch.device("meta"):
        net, x = load_model(f"offramp:{name}"), torch.zeros(1, 3, *size)
    counter, maps, macs = MacCounter(), [], []

    def note(_module: nn.Module, _args: object, output: Tensor | list[Tensor]) -> None:
        maps.append(output if isinstance(output, list) else [output])
        macs.append(counter.macs().by_op["convolution"])

    handles = [net.get_submodule(end).register_forward_hook(note) for end in net.ends]  # type: ignore[union-attr]
    with torch.no_grad(), counter:
        out = net(x)
    for handle in handles:
        handle.remove()
    return net, maps, [*macs, counter.macs().by_op["convolution"]], out


def as_the_paper_counts(name: str, size: tuple[int, int], kind: str, channels: int) -> tuple[list[int], int, int]:
    """MACs of convolutions up to each exit, heads on the way included; parameters; MACs of resizing in the heads."""
    net, maps, totals, out = stages(name, size)
    ends: tuple[str, ...] = net.ends  # type: ignore[assignment]
    specs = {"RH": redesigned(ends, channels), "plain": {end: RedesignedSpec(down=0) for end in ends},
             "1x1": {end: RedesignedSpec(down=0, channels=0, finest=True) for end in ends}}[kind]
    heads = resized = 0
    params = sum(p.numel() for p in net.parameters())
    for i, end in enumerate(ends):
        with torch.device("meta"):
            head = build_redesigned(specs[end], [live(*m.shape) for m in maps[i]], out.shape[1],
                                    (out.shape[2], out.shape[3])).eval()
        macs = count(head, *maps[i])
        # what the paper's counter leaves out, by name; norms, activations, pooling and biases count in neither
        resized += macs.by_op.get("upsample_bilinear2d", 0)
        heads += macs.total - macs.by_op.get("upsample_bilinear2d", 0)
        totals = [total + (macs.by_op["convolution"] if i <= k else 0) for k, total in enumerate(totals)]
        params += sum(p.numel() for p in head.parameters())
    assert heads == totals[-1] - stages(name, size)[2][-1]
    return totals, params, resized


CITY = (1024, 2048)


@pytest.mark.parametrize("name, kind, channels, by_2_30, by_1e9, million_params", [
    ("hrnet_w48", "plain", 128, [48.44, 113.46, 388.88, 722.20], [52.0, 121.8, 417.6, 775.5], 66.07),
    ("hrnet_w48", "RH", 128, [41.92, 105.56, 368.03, 701.35], [45.0, 113.3, 395.2, 753.1], 66.06),
    ("hrnet_w18_small", "plain", 64, [31.44, 42.56, 59.53, 82.88], [33.8, 45.7, 63.9, 89.0], 4.03),
    ("hrnet_w18_small", "RH", 64, [23.69, 34.74, 49.87, 73.23], [25.4, 37.3, 53.6, 78.6], 4.00),
])
def test_macs_at_each_exit_are_the_papers(
    name: str, kind: str, channels: int, by_2_30: list[float], by_1e9: list[float], million_params: float
) -> None:
    macs, params, resized = as_the_paper_counts(name, CITY, kind, channels)
    assert [round(m / 2**30, 2) for m in macs] == by_2_30
    assert [round(m / 1e9, 1) for m in macs] == by_1e9
    assert round(params / 1e6, 2) == million_params
    assert 0 < resized < 0.02 * macs[-1]


@pytest.mark.parametrize("kind, last, mean", [("1x1", 9.51, 4.73), ("RH", 9.55, 4.76)])
def test_macs_for_poses_are_the_papers(kind: str, last: float, mean: float) -> None:
    macs, _, _ = as_the_paper_counts("hrnet_w32_pose", (256, 256), kind, 64)
    assert (round(macs[-1] / 2**30, 2), round(sum(macs) / 4 / 2**30, 2)) == (last, mean)


MAPS = (live(1, 6, 16, 24), live(1, 12, 8, 12), live(1, 20, 4, 6))


def made(spec: RedesignedSpec, frontier: tuple[LiveTensor, ...] = MAPS, out: tuple[int, int] = (64, 96)
         ) -> RedesignedHead:
    head = build_redesigned(spec, frontier, 5, out)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return head.eval()


def tensors(frontier: tuple[LiveTensor, ...] = MAPS, n: int = 3) -> list[Tensor]:
    return [torch.randn(n, *one.shape[1:]) for one in frontier]


SPECS = [RedesignedSpec(down=0), RedesignedSpec(down=0, channels=0), RedesignedSpec(down=0, channels=7, finest=True),
         RedesignedSpec(down=1, channels=8), RedesignedSpec(down=2), RedesignedSpec(down=3, channels=4, finest=True)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_layers_are_those_of_the_paper(spec: RedesignedSpec) -> None:
    head, xs = made(spec), tensors()
    layers = iter([m for m in head.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)])

    def unit(x: Tensor) -> Tensor:
        conv, norm = next(layers), next(layers)
        assert isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1) and conv.bias is not None
        return norm(conv(x)).clamp(min=0)  # type: ignore[no-any-return]

    with torch.no_grad():
        y = xs[0] if spec.finest else torch.cat([F.interpolate(x, (16, 24), mode="bilinear") for x in xs], 1)
        if spec.down == 0 and spec.channels != 0:
            y = unit(y)
        for _ in range(spec.down):
            y = unit(F.avg_pool2d(y, 2))
        for _ in range(spec.down - 1):
            y = unit(F.interpolate(y, scale_factor=2, mode="bilinear"))
        y = next(layers)(F.interpolate(y, scale_factor=2, mode="bilinear") if spec.down else y)
        assert next(layers, None) is None
        torch.testing.assert_close(head.coarse(*xs), y)
        torch.testing.assert_close(head(*xs), F.interpolate(y, (64, 96), mode="bilinear"))
        torch.testing.assert_close(head(*[x[1:2] for x in xs]), head(*xs)[1:2])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_costs_what_its_layers_cost(spec: RedesignedSpec) -> None:
    places, width = 16 * 24, 6 if spec.finest else 38
    wide = width if spec.channels is None else spec.channels or width
    resized = 0 if spec.finest else 4 * 32 * places
    convolutions = places * wide * 5 + (places * width * wide if spec.down == 0 and spec.channels != 0 else 0)
    for d in range(1, spec.down + 1):
        convolutions += places // 4**d * (width if d == 1 else wide) * wide
    for d in range(spec.down):
        convolutions += places // 4**d * wide * wide if d else 0
        resized += 4 * wide * places // 4**d
    assert head_macs(made(spec), MAPS) == convolutions + resized + 4 * 5 * 64 * 96


@pytest.mark.parametrize("size", [(17, 25), (5, 3), (1, 1)])
@pytest.mark.parametrize("down", [0, 1, 3])
def test_any_size(size: tuple[int, int], down: int) -> None:
    frontier = (live(1, 6, *size), live(1, 4, -(-size[0] // 2), -(-size[1] // 2)))
    out = (4 * size[0] - 1, 4 * size[1] - 2)
    head, xs = made(RedesignedSpec(down=down, channels=8), frontier, out), tensors(frontier)
    assert head.coarse(*xs).shape == (3, 5, *size) and head(*xs).shape == (3, 5, *out)
    still = [torch.full_like(x, 0.5) for x in xs]
    with torch.no_grad():  # a map without edges stays one: no padding is averaged in, none interpolated
        said = head(*still)
    torch.testing.assert_close(said, said[..., :1, :1].expand_as(said))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_reach_every_parameter(spec: RedesignedSpec) -> None:
    head = made(spec).train()
    head(*tensors()).square().sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_specs_survive_json_and_refuse_what_they_do_not_know() -> None:
    for spec in SPECS:
        assert spec_from_json(json.loads(json.dumps(spec.to_json()))) == spec
    record = RedesignedSpec().to_json()
    for wrong in ({**record, "version": 2}, {**record, "type": "HeadSpec"}, {**record, "data": {"colour": 1}}):
        with pytest.raises(HeadError):
            RedesignedSpec.from_json(wrong)
    with pytest.raises(HeadError) as caught:
        RedesignedSpec(down=-1, channels=-1, layout="rows")  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in ("down >= 0", "channels", "layout"))
    with pytest.raises(HeadError, match="channels >= 1"):
        RedesignedSpec(down=1, channels=0)


def test_what_it_cannot_read_is_refused() -> None:
    with pytest.raises(HeadError, match="labels pixels"):
        build_redesigned(RedesignedSpec(), MAPS, 5, None)
    with pytest.raises(HeadError, match="maps"):
        build_redesigned(RedesignedSpec(), [live(1, 12)], 5, (8, 8))


def test_earlier_exits_go_down_further() -> None:
    heads = redesigned(["a", "b", "c"], 64)
    assert {name: (spec.down, spec.channels) for name, spec in heads.items()} == {"a": (3, 64), "b": (2, 64),
                                                                                  "c": (1, 64)}


def test_on_an_hrnet() -> None:
    guest = hrnet_w18_small(num_classes=4).eval()
    x = torch.rand(3, 3, 66, 97)
    with torch.inference_mode():
        alone = guest(x)
    net = offramp.attach(guest, x[:2], exits=guest.ends, heads=redesigned(guest.ends, 8)).eval()
    assert [column.stride for column in net.columns] == [4, 4, 4, 4]
    with torch.inference_mode():
        *early, final = net(x)
        assert all(logits.shape == (3, 4, 66, 97) for logits in early) and torch.equal(final, alone)
        state, kept = net.begin(x), torch.tensor([0, 2])
        for k in range(4):
            state, said = net.step(k, state)
            torch.testing.assert_close(said, (*early, final)[k] if k == 0 else (*early, final)[k][kept])
            if k == 0:
                state = state.select(kept)
    kinds = [net.head(end).spec for end in guest.ends]
    assert kinds == list(redesigned(guest.ends, 8).values())


def test_on_a_network_for_poses() -> None:
    guest = HRNetPose("hrnet_w18_small_v2", 6).eval()
    x = torch.rand(2, 3, 64, 64)
    for heads in (RedesignedSpec(down=0, channels=0, finest=True), redesigned(guest.ends, 8)):
        net = offramp.attach(guest, x, exits=guest.ends, heads=heads).eval()
        assert [column.stride for column in net.columns] == [1, 1, 1, 1]
        with torch.inference_mode():
            *early, final = net(x)
            assert all(maps.shape == (2, 6, 16, 16) for maps in early) and torch.equal(final, guest(x))


def test_every_site_needs_its_head() -> None:
    guest = hrnet_w18_small(num_classes=4).eval()
    with pytest.raises(HeadError, match=r"heads for the site stage3\.2"):
        offramp.attach(guest, torch.rand(2, 3, 64, 64), exits=guest.ends, heads=redesigned(guest.ends[:2], 8))
    mixed = offramp.attach(guest, torch.rand(2, 3, 64, 64), exits=guest.ends[:1],
                           heads=lambda site: {"rh": RedesignedSpec(down=2, channels=8), "conv": HeadSpec()})
    assert [column.name for column in mixed.columns] == ["layer1.1/rh", "layer1.1/conv", "final"]

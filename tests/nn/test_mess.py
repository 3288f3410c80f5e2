"""MESS's space: what its 64 heads are, that they are torchvision's where they should be, what they cost and refuse."""

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import segmentation
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

import offramp
from offramp.cost import macs
from offramp.errors import HeadError
from offramp.graph import sites
from offramp.nn.heads import HeadSpec, build
from offramp.nn.mess import Inverted, MessHead, MessSpec, blocks_before, build_mess, mess_space
from offramp.nn.overview import overview
from offramp.nn.shortcut import spec_from_json
from offramp.types import LiveTensor


def live(*shape: int) -> LiveTensor:
    return LiveTensor(name="x", shape=shape, dtype="float32")


FRONTIERS = {
    "map": ((live(1, 16, 10, 14),), (40, 56)),
    "hrnet": ((live(1, 4, 32, 32), live(1, 8, 16, 16), live(1, 16, 8, 8)), (128, 128)),
    "segformer": ((live(1, 64, 12),), (64, 64)),
}


def rows(kind: str, n: int = 3) -> list[Tensor]:
    return [torch.randn(n, *one.shape[1:]) for one in FRONTIERS[kind][0]]


def made(name: str, kind: str = "map", inverted: Inverted | None = None) -> MessHead:
    return build_mess(mess_space()[name], FRONTIERS[kind][0], 5, FRONTIERS[kind][1], inverted)


class Shallow(nn.Module):
    """Stages of some width at a quarter, then classes at the input's size."""

    def __init__(self, *blocks: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 4, 1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Conv2d(width, 256, 3, 1, 1), nn.ReLU(), nn.Conv2d(256, 256, 3, 1, 1),
                                  nn.Conv2d(256, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        size = int(height), int(width)
        return F.interpolate(self.head(self.blocks(self.stem(x))), size, mode="bilinear")


def mobile() -> nn.Module:
    return Shallow(*(InvertedResidual(16, 16, 1, ratio) for ratio in (6, 3))).eval()


X = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(1))


def test_the_space_is_the_papers_and_its_names_say_what_is_in_it() -> None:
    space = mess_space()
    assert len(space) == len(set(space.values())) == 64
    assert all(spec.name == name for name, spec in space.items())
    assert space["crm4-b2-rdi-dlb"] == MessSpec(reduction=4, blocks=2, rapid_dilation=True, head="dlb")


def test_specs_survive_json_and_refuse_what_they_do_not_know() -> None:
    for spec in mess_space().values():
        assert spec_from_json(json.loads(json.dumps(spec.to_json()))) == spec
    record = MessSpec().to_json()
    for wrong in ({**record, "version": 2}, {**record, "type": "HeadSpec"}, {**record, "data": {"colour": 1}}):
        with pytest.raises(HeadError):
            MessSpec.from_json(wrong)
    with pytest.raises(HeadError) as caught:
        MessSpec(reduction=3, blocks=4, head="psp", block="dense")  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in ("reduction", "blocks", "head", "block "))


@pytest.mark.parametrize(("name", "theirs"), [("crm1-b0-plain-fcn", FCNHead), ("crm1-b0-plain-dlb", DeepLabHead)])
def test_the_plain_heads_are_torchvisions(name: str, theirs: type[nn.Module]) -> None:
    head = build_mess(mess_space()[name], (live(1, 256, 40, 41),), 7, (160, 164)).eval()
    other = theirs(256, 7).eval()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    head.last.load_state_dict(dict(zip(head.last.state_dict(), other.state_dict().values(), strict=True)))
    x = torch.randn(2, 256, 40, 41)
    with torch.no_grad():
        assert torch.allclose(head.coarse(x), other(x), atol=1e-5, rtol=1e-4)
        whole = F.interpolate(other(x), (160, 164), mode="bilinear", align_corners=False)
        assert torch.allclose(head(x), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", FRONTIERS)
@pytest.mark.parametrize("inverted", [None, Inverted()], ids=["residual", "inverted"])
def test_every_head_answers_row_by_row_at_the_outputs_size_and_costs_what_is_counted(
    kind: str, inverted: Inverted | None
) -> None:
    x = rows(kind)
    seen = set()
    for name in mess_space():
        head = made(name, kind, inverted).eval()
        with torch.no_grad():
            said = head(*x)
            assert said.shape == (3, 5, *FRONTIERS[kind][1])
            assert torch.allclose(said[1:2], head(*[t[1:2] for t in x]), atol=1e-5), name
            assert torch.allclose(said, head.reading.upsample(head.coarse(*x), head.reading.size)), name
        assert head.macs() == macs.count(head, *[t[:1] for t in x]).total, name
        dilations = tuple(m.dilation for m in head.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
        seen.add((head.spec.reduction, head.spec.head, dilations))
    assert len(seen) == 64, "no two heads are the same"


def test_rapid_dilation_doubles_from_block_to_block() -> None:
    def rates(name: str) -> list[int]:
        head = made(name)
        return [m.dilation[0] for m in head.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]

    assert rates("crm2-b3-rdi-fcn") == [2, 2, 4, 4, 8, 8, 1] and rates("crm2-b3-plain-fcn") == [1] * 7
    assert rates("crm2-b0-rdi-fcn") == [2] and rates("crm2-b0-rdi-dlb") == [12, 24, 36, 2]


@pytest.mark.parametrize("size", [(9, 40), (40, 9), (9, 10), (15, 20), (40, 41)])
def test_taps_that_see_only_padding_are_left_out_and_nothing_changes(size: tuple[int, int]) -> None:
    head = made("crm1-b0-plain-dlb")
    conv = next(m for m in head.modules() if isinstance(m, nn.Conv2d) and m.dilation == (12, 12))
    x = torch.randn(2, 16, *size)
    ours, theirs = conv(x), F.conv2d(x, conv.weight, padding=12, dilation=12)
    assert torch.allclose(ours, theirs, atol=1e-5)
    ours.square().sum().backward()
    grad = conv.weight.grad.clone()
    conv.weight.grad = None
    theirs.square().sum().backward()
    assert torch.allclose(grad, conv.weight.grad, atol=1e-3, rtol=1e-4)
    counted = macs.count(conv, x[:1]).total
    assert counted == 16 * 16 * size[0] * size[1] * (3 if size[0] > 12 else 1) * (3 if size[1] > 12 else 1)


def test_a_batch_of_one_trains_the_pyramid() -> None:
    head = made("crm4-b1-rdi-dlb").train()
    head(*rows("map", 1)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())
    norm = head.get_submodule("last.0.convs.4.1")
    assert norm.num_batches_tracked == 0, "one value has no variance to learn from"
    head(*rows("map", 2))
    assert norm.num_batches_tracked == 1


def test_blocks_follow_the_network() -> None:
    import timm

    def last(model: nn.Module) -> Inverted | None:
        found = sites(model.eval(), X)
        return blocks_before(found.traced, found[len(found) // 2])

    assert last(segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)) == Inverted(
        2.3, nn.Hardswish)
    assert last(timm.create_model("mobilenetv2_100", num_classes=5)) == Inverted(6.0, nn.ReLU6)
    assert last(timm.create_model("resnet18", num_classes=5)) is None
    assert last(timm.create_model("mobilenetv1_100", num_classes=5)) is None, "separable is not inverted"
    found = sites(mobile(), X)
    said = {site.name: blocks_before(found.traced, site) for site in found}
    assert said["stem"] == said["blocks.0"] == Inverted(6.0, nn.ReLU6) and said["blocks.1"] == Inverted(3.0, nn.ReLU6)


def test_an_over_provisioned_network_hangs_trains_and_prints() -> None:
    net = offramp.attach(mobile(), X, exits=["blocks.0", "blocks.1"], heads=offramp.mess_space())
    assert len(net.columns) == 129 and net.columns[0].name == "blocks.0/crm1-b0-plain-fcn" and net.notes == ()
    assert {net.head(c.name).spec.block for c in net.columns[:-1]} == {"inverted"}
    wide = net.head("blocks.0/crm1-b1-plain-fcn").blocks[0].wide[0]
    assert wide.out_channels == 96 and net.head("blocks.1/crm1-b1-plain-fcn").blocks[0].wide[0].out_channels == 48
    net.freeze_backbone_().train()
    said = net(X)
    assert {tuple(one.shape) for one in said} == {(2, 5, 48, 64)}
    sum(one.square().mean() for one in said[:-1]).backward()
    assert all(p.grad is not None for p in net.heads.parameters()) and net.backbone.stem.weight.grad is None
    lines = overview(net).splitlines()
    total = sum(p.numel() for p in net.heads.parameters())
    assert [line.split()[0] for line in lines] == ["site", "blocks.0", "blocks.1", "all", "the"]
    assert lines[3].split() == ["all", "128", "heads", "128", f"{total / 1e6:.3f}"]
    costs = [net.head(c.name).macs() / 1e6 for c in net.columns[:64]]
    assert f"{min(costs):.3f} - {max(costs):.3f}" in lines[1]


def test_heads_that_cannot_pay_are_left_out_with_a_note_or_kept_when_asked() -> None:
    model = mobile()
    model.head = nn.Sequential(nn.Conv2d(16, 24, 3, 1, 1), nn.Conv2d(24, 5, 1))
    net = offramp.attach(model, X, exits=["blocks.1"], heads=mess_space())
    after = net.sites[0].macs_after
    whole = offramp.attach(model, X, exits=["blocks.1"], heads=mess_space(), keep_costly=True)
    costly = {c.head for c in whole.columns[:-1] if whole.head(c.name).macs() >= after}
    assert len(whole.columns) == 65 and whole.notes == () and 0 < len(costly) < 64
    assert {c.head for c in net.columns[:-1]} == set(mess_space()) - costly
    (note,) = net.notes
    assert f"{len(costly)} of 64 heads left out" in note and all(name in note for name in costly)
    assert note in overview(net)
    with pytest.raises(HeadError, match="M MACs"):  # alone, it is refused
        offramp.attach(model, X, exits=["blocks.1"], heads=MessSpec(blocks=3, head="dlb"))
    model.head = nn.Conv2d(16, 5, 1)
    wide = {f"wide{b}": MessSpec(blocks=b, head="dlb") for b in (1, 2, 3)}  # type: ignore[arg-type]
    with pytest.raises(HeadError, match="the cheapest of 3"):
        offramp.attach(model, X, exits=["blocks.1"], heads=wide)


def test_networks_that_classify_are_refused() -> None:
    import timm

    with pytest.raises(HeadError, match="labels pixels"):
        offramp.attach(timm.create_model("resnet18", num_classes=5).eval(), X, exits=2, heads=mess_space())


def test_coarse_logits_of_other_heads_are_theirs_before_resizing() -> None:
    frontier, out = FRONTIERS["hrnet"]
    head, x = build(HeadSpec(convs=((8, 3, 2),)), frontier, 5, "dense", out).eval(), rows("hrnet")
    coarse = head.coarse(*x)
    assert coarse.shape == (3, 5, 16, 16)
    assert torch.equal(head(*x), F.interpolate(coarse, out, mode="bilinear", align_corners=False))


def test_costs_stand_where_the_papers_do() -> None:
    """Table 2's networks at 520 x 520, and the lightest exit of the kind that Table 7's anytime row has."""
    x = torch.zeros(1, 3, 520, 520, device="meta")
    counted = {}
    for name in ("fcn_resnet50", "deeplabv3_resnet50"):
        with torch.device("meta"):
            model = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=21).eval()
        counted[name] = macs.count(model, x).total / 1e9
    assert counted["fcn_resnet50"] == pytest.approx(142.73, abs=0.03)
    assert counted["deeplabv3_resnet50"] == pytest.approx(168.73, abs=0.03)
    at_layer3 = build_mess(mess_space()["crm8-b0-plain-fcn"], (live(1, 1024, 65, 65),), 21, (520, 520))
    # 1024 -> 128 -> 32 -> 21 at 65 x 65, and the upsampling, which the paper does not seem to count.
    by_hand = 65 * 65 * (1024 * 128 + 9 * 128 * 32 + 32 * 21)
    assert at_layer3.macs() == by_hand + 4 * 21 * 520 * 520
    assert by_hand / 1e9 / 1.030 == pytest.approx(0.69, abs=0.01)

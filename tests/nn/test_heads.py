"""Heads: what they read, what they give, what they cost, and what they refuse."""

import json

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.segmentation.fcn import FCNHead

from offramp.errors import HeadError
from offramp.nn.heads import HeadSpec, build, check_pays, default_spec, fcn_spec, head_macs, residual_spec
from offramp.types import LiveTensor

RICH = HeadSpec(
    convs=((12, 3, 2), (8, 1, 1)), separable=True, blocks=((8, 1), (16, 2)), gate=True, pool=2, linears=(9,)
)


def live(*shape: int, dtype: str = "float32", name: str = "x") -> LiveTensor:
    return LiveTensor(name=name, shape=shape, dtype=dtype)


def rows(frontier: tuple[LiveTensor, ...], n: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(n, *one.shape[1:]) if one.dtype == "float32" else torch.ones(n, *one.shape[1:]).long()
            for one in frontier]


FRONTIERS = {
    "map": (live(1, 6, 16, 16),),
    "hrnet": (live(1, 4, 32, 32), live(1, 8, 16, 16), live(1, 16, 8, 8)),
    "swin": (live(1, 14, 14, 20),),
    "vit": (live(1, 17, 12),),
    "segformer": (live(1, 64, 12),),
    "bert": (live(1, 11, 12), live(1, 1, 1, 11)),
    "vector": (live(1, 12),),
    "mixed": (live(1, 6, 8, 8), live(1, 5)),
    "with sizes": (live(1, 6, 8, 8), live(2, 7, dtype="int64")),
}


def test_spec_survives_json() -> None:
    assert HeadSpec.from_json(json.loads(json.dumps(RICH.to_json()))) == RICH


@pytest.mark.parametrize("record", [
    {"type": "Spec", "version": 1, "data": {}}, {"type": "HeadSpec", "version": 2, "data": {}},
    {"type": "HeadSpec", "version": 1, "data": {"colour": 3}},
])
def test_spec_refuses_other_json(record: dict[str, object]) -> None:
    with pytest.raises(HeadError):
        HeadSpec.from_json(record)


def test_spec_names_every_fault_at_once() -> None:
    with pytest.raises(HeadError) as caught:
        HeadSpec(convs=((8, 2, 1),), blocks=((0, 1),), pool=0, dropout=1.0, layout="rows")  # type: ignore[arg-type]
    for word in ("convs", "blocks", "pool", "dropout", "layout"):
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", FRONTIERS)
def test_classify_gives_a_row_of_logits_for_each_row(kind: str) -> None:
    frontier = FRONTIERS[kind]
    for spec in {HeadSpec(), HeadSpec(linears=(7,)), default_spec(frontier, 5, "classify")}:
        head = build(spec, frontier, 5, "classify").eval()
        said = head(*rows(frontier))
        assert said.shape == (3, 5)
        one = head(*[x[1:2] for x in rows(frontier)])
        assert torch.allclose(said[1:2], one, atol=1e-5), "rows must not look at each other"


@pytest.mark.parametrize("kind", ["map", "hrnet", "segformer", "swin"])
@pytest.mark.parametrize("spec", [RICH, HeadSpec(convs=((8, 3, 1),))], ids=["rich", "conv"])
def test_convolutions_on_maps_and_grids(kind: str, spec: HeadSpec) -> None:
    frontier = FRONTIERS[kind]
    assert build(spec, frontier, 5, "classify")(*rows(frontier)).shape == (3, 5)


@pytest.mark.parametrize(("kind", "out"), [("map", (64, 64)), ("hrnet", (128, 128)), ("segformer", (64, 64)),
                                           ("vit", (64, 64))])
def test_dense_gives_the_networks_own_size(kind: str, out: tuple[int, int]) -> None:
    frontier = FRONTIERS[kind]
    for spec in (default_spec(frontier, 5, "dense", out), fcn_spec(frontier), HeadSpec()):
        head = build(spec, frontier, 5, "dense", out).eval()
        said = head(*rows(frontier))
        assert said.shape == (3, 5, *out)
        assert torch.allclose(said[1:2], head(*[x[1:2] for x in rows(frontier)]), atol=1e-5)


def test_dense_follows_another_input_size() -> None:
    head = build(HeadSpec(), (live(1, 6, 16, 16),), 5, "dense", (64, 64))
    assert head(torch.zeros(1, 6, 12, 20)).shape == (1, 5, 48, 80)


def test_dense_joins_at_a_quarter_and_classify_at_the_coarsest() -> None:
    seen: list[torch.Size] = []
    for task, out in (("dense", (128, 128)), ("dense", (64, 64)), ("classify", None)):
        head = build(HeadSpec(convs=((4, 1, 1),)), FRONTIERS["hrnet"], 5, task, out)  # type: ignore[arg-type]
        head.body.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1:]))
        head(*rows(FRONTIERS["hrnet"]))
    assert seen == [torch.Size([28, 32, 32]), torch.Size([28, 16, 16]), torch.Size([28, 8, 8])]


def test_channels_last_maps_are_the_same_maps() -> None:
    x = torch.randn(2, 6, 16, 16)
    first = build(RICH, (live(1, 6, 16, 16),), 5, "classify").eval()
    last = build(RICH, (live(1, 16, 16, 6),), 5, "classify").eval()
    last.load_state_dict(first.state_dict())
    assert torch.allclose(first(x), last(x.permute(0, 2, 3, 1).contiguous()), atol=1e-6)


def test_channels_last_is_told_by_the_outputs_aspect() -> None:
    # 32 channels at 32 x 64, an image of 1 : 2; by equal sizes alone it would be taken for channels last.
    right = build(HeadSpec(), (live(1, 32, 32, 64),), 5, "dense", (128, 256))
    assert right.last[1].in_channels == 32
    wrong = build(HeadSpec(layout="channels_last"), (live(1, 32, 32, 64),), 5, "dense", (128, 256))
    assert wrong.last[1].in_channels == 64


def test_class_token_is_read_apart() -> None:
    head = build(HeadSpec(), (live(1, 17, 12),), 5, "classify")
    assert head.last[-1].in_features == 24
    tokens = torch.randn(1, 17, 12)
    shuffled = tokens[:, [0, *reversed(range(1, 17))]]
    assert torch.allclose(head(tokens), head(shuffled), atol=1e-6)
    assert not torch.allclose(head(tokens), head(tokens[:, [1, 0, *range(2, 17)]]), atol=1e-4)
    assert head(torch.randn(1, 26, 12)).shape == (1, 5), "another number of tokens"


def test_masks_and_integers_are_not_read() -> None:
    head = build(HeadSpec(), FRONTIERS["bert"], 5, "classify")
    tokens, mask = rows(FRONTIERS["bert"])
    assert torch.equal(head(tokens, mask), head(tokens, mask * float("nan")))


def test_fcn_head_is_torchvisions() -> None:
    ours, theirs = build(fcn_spec((live(1, 16, 8, 8),)), (live(1, 16, 8, 8),), 5, "dense", (8, 8)), FCNHead(16, 5)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("kind", ["map", "hrnet", "vit"])
def test_macs_agree_with_torchs_counter(kind: str) -> None:
    frontier = FRONTIERS[kind]
    head = build(HeadSpec(linears=(7,)) if kind == "vit" else RICH, frontier, 5, "classify").eval()
    with FlopCounterMode(display=False) as counter:
        head(*rows(frontier, 1))
    assert head_macs(head, frontier) == counter.get_total_flops() // 2
    assert next(head.parameters()).device.type == "cpu", "the head itself is left alone"


def test_macs_of_upsampling_are_counted() -> None:
    head = build(HeadSpec(), (live(1, 6, 16, 16),), 5, "dense", (64, 64))
    assert head_macs(head, (live(1, 6, 16, 16),)) == 16 * 16 * 6 * 5 + 4 * 5 * 64 * 64


def test_a_head_that_cannot_pay_is_refused_with_the_figures() -> None:
    check_pays(1_999_999, 2_000_000, "exit layer1")
    with pytest.raises(HeadError, match=r"exit layer1: .* 2\.000 M MACs .* got 2\.500 M MACs"):
        check_pays(2_500_000, 2_000_000, "exit layer1")


def test_default_spec_keeps_within_its_share() -> None:
    frontier = (live(1, 64, 32, 32),)
    specs = [default_spec(frontier, 10, "classify", macs_after=after) for after in (10**9, 10**7, 10**6)]
    costs = [head_macs(build(spec, frontier, 10, "classify"), frontier) for spec in specs]
    assert costs[0] > costs[1] > costs[2]
    assert costs[0] <= 10**8 and costs[1] <= 10**6


def test_residual_spec_halves_down_to_four() -> None:
    assert residual_spec((live(1, 16, 16, 16),), width=24, depth=3).blocks == ((24, 2), (24, 2), (24, 1))


@pytest.mark.parametrize(("frontier", "task", "spec", "out"), [
    ((live(1, 3, 4, 4, 4),), "classify", HeadSpec(), None),
    ((live(1, 3, dtype="int64"),), "classify", HeadSpec(), None),
    ((live(1, 12),), "classify", HeadSpec(convs=((8, 3, 1),)), None),
    ((live(1, 11, 12),), "classify", HeadSpec(convs=((8, 3, 1),)), None),
    ((live(1, 12),), "dense", HeadSpec(), (8, 8)),
    ((live(1, 6, 8, 8),), "dense", HeadSpec(), None),
])
def test_frontiers_that_do_not_fit_are_refused(
    frontier: tuple[LiveTensor, ...], task: str, spec: HeadSpec, out: tuple[int, int] | None
) -> None:
    with pytest.raises(HeadError):
        build(spec, frontier, 5, task, out)  # type: ignore[arg-type]

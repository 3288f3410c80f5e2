"""attach, stepping, and what an early exit's answer looks like."""

import copy

import pytest
import torch
from torch import nn

import offramp
from offramp.errors import CutError, HeadError, PlanError
from offramp.nn.heads import HeadSpec
from offramp.nn.output import read_logits, with_logits
from offramp.nn.shortcut import ShortcutSpec


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(c_out)
        self.same = c_in == c_out and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x)).relu()
        return x + y if self.same else y


class Net(nn.Module):
    def __init__(self, answer: str = "tensor") -> None:
        super().__init__()
        self.one = nn.Sequential(Block(3, 8), Block(8, 8), Block(8, 8))
        self.two = nn.Sequential(Block(8, 16, 2), Block(16, 16), Block(16, 16), Block(16, 16))
        self.last = nn.Linear(16, 5)
        self.answer = answer

    def forward(self, x: torch.Tensor) -> object:
        y = self.last(self.two(self.one(x)).mean((2, 3)))
        return {"tensor": y, "dict": {"out": y, "aux": y * 2}, "tuple": (y, y + 1)}[self.answer]


@pytest.fixture
def model() -> Net:
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.eval()


X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_every_column_answers_and_the_last_is_the_backbones_bit_for_bit(model: Net) -> None:
    net = offramp.attach(model, X, exits=3).eval()
    said = net(X)
    assert [tuple(t.shape) for t in said] == [(4, 5)] * 4
    assert torch.equal(said[-1], model(X))
    assert [c.name for c in net.columns] == [*(s.name for s in net.sites), "final"]


def test_the_guest_is_shared_and_left_as_found(model: Net) -> None:
    model.two.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    net = offramp.attach(model, X, exits=2)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {k.removeprefix("backbone.") for k in net.state_dict() if k.startswith("backbone.")} == set(before)
    assert net.backbone.last.weight is model.last.weight


def test_step_by_step_is_forward(model: Net) -> None:
    net = offramp.attach(model, X, exits=2, heads=lambda about: {"a": HeadSpec(), "b": HeadSpec(linears=(7,))}).eval()
    whole = net(X)
    state, said = net.begin(X), []
    for k in range(len(net.sites) + 1):
        state, logits = net.step(k, state)
        said += list(logits) if isinstance(logits, tuple) else [logits]
    assert state is None and len(said) == 5
    assert all(torch.equal(a, b) for a, b in zip(said, whole, strict=True))
    assert [list(net.columns_at(k)) for k in range(2)] == [[0, 1], [2, 3]]
    assert net.columns[1].name.endswith("/b")


def test_rows_dropped_between_steps_give_the_same_rows(model: Net) -> None:
    net = offramp.attach(model, X, exits=1).eval()
    state, _ = net.step(0, net.begin(X))
    kept = torch.tensor([True, False, False, True])
    _, output = net.step(1, state.select(kept))
    assert torch.allclose(output, model(X)[kept], atol=1e-5)


def test_a_copy_has_weights_of_its_own(model: Net) -> None:
    net = offramp.attach(model, X, exits=1).eval()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.backbone.last.weight.zero_()
        twin.backbone.last.bias.zero_()
    assert twin(X)[-1].abs().sum() == 0
    assert net(X)[-1].abs().sum() > 0


def test_freezing_holds_the_backbone_in_eval_mode(model: Net) -> None:
    net = offramp.attach(model, X, exits=1).freeze_backbone_().train()
    assert net.heads.training and not net.backbone.training
    assert not any(p.requires_grad for p in net.backbone.parameters())
    net.unfreeze_backbone_().train()
    assert net.backbone.training


def test_a_shortcut_that_keeps_everything_is_the_network(model: Net) -> None:
    spec = ShortcutSpec(keep=("one.2", "two.1", "two.2", "two.3"))
    with pytest.raises(HeadError, match="could save|saves"):  # it costs what it could save
        offramp.attach(model, X, exits=["one.1"], heads=spec)
    net = offramp.attach(model, X, exits=["one.1"], heads=ShortcutSpec(keep=("one.2", "two.1", "two.2"))).eval()
    twin = copy.deepcopy(model)
    twin.two[3] = nn.Identity()
    assert torch.equal(net(X)[0], twin(X))


def test_a_shortcut_chooses_the_last_of_each_run_within_its_share(model: Net) -> None:
    def kept(share: float) -> tuple[str, ...]:
        return offramp.attach(model, X, exits=["one.0"], heads=ShortcutSpec(share=share)).head("one.0").spec.keep

    assert kept(0.01) == ()
    assert kept(0.4)[-1] == "two.3"
    assert set(kept(0.4)) <= set(kept(0.8))
    assert "one.2" in kept(0.95) or "two.2" in kept(0.95)


def test_shortcut_weights_are_copies_and_learn(model: Net) -> None:
    net = offramp.attach(model, X, exits=["one.1"], heads=ShortcutSpec(keep=("two.3",))).freeze_backbone_().train()
    before = model.last.weight.clone()
    loss = net(X)[0].square().sum()
    loss.backward()
    grads = [p.grad for p in net.heads.parameters()]
    assert grads and all(g is not None for g in grads)
    with torch.no_grad():
        for p in net.heads.parameters():
            p.add_(1)
    assert torch.equal(model.last.weight, before)
    assert all(p.grad is None for p in model.parameters())


def test_a_shortcut_names_the_blocks_that_can_go(model: Net) -> None:
    with pytest.raises(HeadError, match=r"two\.1.*two\.3.*but got two\.0"):
        offramp.attach(model, X, exits=["one.2"], heads=ShortcutSpec(keep=("two.0",)))


def test_shortcut_specs_go_through_json() -> None:
    spec = ShortcutSpec(keep=("a.1",), share=0.3)
    assert ShortcutSpec.from_json(spec.to_json()) == spec
    with pytest.raises(HeadError, match="version 9"):
        ShortcutSpec.from_json({"type": "ShortcutSpec", "version": 9, "data": {}})


def test_errors_name_the_place_and_the_way_out(model: Net) -> None:
    with pytest.raises(CutError, match="did you mean"):
        offramp.attach(model, X, exits=["one.9"])
    with pytest.raises(HeadError, match="M MACs"):
        offramp.attach(model, X, exits=["two.3"], heads=HeadSpec(convs=((512, 5, 1),)))
    with pytest.raises(HeadError, match=r"exit two\.1.*error"):
        offramp.attach(model, X, exits=["two.1"], heads=nn.Linear(3, 5))
    with pytest.raises(PlanError, match="one of the exits"):
        offramp.attach(model, X, exits=1).head("nowhere")


@pytest.mark.parametrize("answer", ["dict", "tuple"])
def test_outputs_with_a_structure(answer: str) -> None:
    model = Net(answer).eval()
    net = offramp.attach(model, X, exits=1).eval()
    output = model(X)
    assert torch.equal(net(X)[-1], read_logits(output))
    early = with_logits(output, net(X)[0])
    assert type(early) is type(output)
    assert torch.equal(read_logits(early), net(X)[0])
    if answer == "dict":
        assert list(early) == ["out", "aux"]


def test_outputs_without_plain_logits_are_refused() -> None:
    with pytest.raises(HeadError, match="pass logits="):
        read_logits([torch.zeros(2, 3, 8, 8), torch.zeros(2, 6, 4, 4)])
    with pytest.raises(HeadError, match="logits' shape"):
        with_logits({"out": torch.zeros(2, 3), "features": torch.zeros(2, 9)}, torch.zeros(2, 3))


def test_a_submodule_alone_is_cut_within_a_larger_model() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Net()

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.body(x / 2)]

    outer = Outer().eval()
    net = offramp.attach(outer, X, exits=1, within="body").eval()
    assert net.backbone is outer.body
    assert torch.equal(net(X / 2)[-1], outer(X)[0])


def test_a_detector_is_cut_at_its_backbone() -> None:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

    detector = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=64
    ).eval()
    images = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with pytest.raises(HeadError, match="pass logits="):
        offramp.attach(detector, images, within="backbone.body", exits=2)
    net = offramp.attach(
        detector, images, within="backbone.body", exits=2, heads=HeadSpec(), num_classes=2, task="classify"
    ).eval()
    maps = torch.rand(2, 3, 64, 64)
    *said, features = net(maps)
    assert [tuple(t.shape) for t in said] == [(2, 2), (2, 2)]
    untouched = detector.backbone.body(maps)
    assert list(features) == list(untouched)
    assert all(torch.equal(features[name], untouched[name]) for name in untouched)
    with pytest.raises(HeadError, match="holds logits"):
        net.logits(features)

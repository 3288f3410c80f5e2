"""deploy: the untouched network's answers in form and order, each row from the exit where it left."""

import shutil
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offramp
from offramp.errors import DataError, HeadError, OfframpError, PlanError
from offramp.functional.summaries import summarise
from offramp.runtime._evidence import gather_for
from offramp.runtime._legs import Leg
from offramp.types import Evidence
from runtime.nets import EXITS, NEVER, Always, ByLogit, Guest, classifier, images, plan, segmenter

SOME = ByLogit(0, 1)


def leaves(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x.values()) if isinstance(x, dict) else list(x)


def expected(net: offramp.MultiExit, policy: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Brute force: every exit of every row, then the policy, one row at a time."""
    net.eval()
    with torch.no_grad():
        said = torch.stack(net(x), dim=1)
    where = []
    for row in said:
        index = 0
        while index < len(EXITS) and not policy.decide(index, Evidence(logits=row[None, : index + 1])):
            index += 1
        where.append(index)
    exits = torch.tensor(where)
    return said[torch.arange(len(x)), exits], exits


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
@pytest.mark.parametrize("shrink", [True, False, "auto"])
def test_no_early_exit_is_the_untouched_network_bit_for_bit(form: str, shrink: Any) -> None:
    net, x = classifier(form), images(7)
    fast = net.deploy(plan(NEVER), shrink=shrink)
    with torch.no_grad():
        wanted = net.backbone.eval()(x)
    got = fast(x)
    assert type(got) is type(wanted)
    assert all(torch.equal(a, b) for a, b in zip(leaves(got), leaves(wanted), strict=True))
    assert fast.last_exits.tolist() == [2] * 7


@pytest.mark.parametrize("shrink", [True, False, "auto"])
@pytest.mark.parametrize("rows", [1, 2, 23])
def test_each_row_is_answered_by_its_exit_in_the_order_of_the_call(shrink: Any, rows: int) -> None:
    net, x = classifier(), images(rows)
    wanted, exits = expected(net, SOME, x)
    fast = net.deploy(plan(SOME), shrink=shrink)
    got = fast(x)
    assert fast.last_exits.tolist() == exits.tolist()
    assert rows < 20 or set(exits.tolist()) == {0, 1, 2}, "a test in which nothing happens"
    assert torch.allclose(got, wanted, atol=1e-6)


def test_an_early_answer_has_the_keys_of_the_output() -> None:
    net, x = classifier("dict"), images(23)
    out = net.deploy(plan(SOME))(x)
    assert list(out) == ["out", "aux"] and out["out"].shape == out["aux"].shape == (23, 5)
    early = net.deploy(plan(Always()))(x)
    assert torch.equal(early["out"], early["aux"]), "an exit has one answer"


def test_shrinking_drops_the_rows_and_what_nobody_needs_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = classifier(), images(23)
    _, exits = expected(net, SOME, x)
    seen: list[int] = []
    advance = Leg._advance

    def spy(leg: Leg, state: Any, *stop: Any) -> Any:
        seen.append(state.rows)
        return advance(leg, state, *stop)

    monkeypatch.setattr(Leg, "_advance", spy)
    left = [23, 23 - int((exits == 0).sum()), int((exits == 2).sum())]
    net.deploy(plan(SOME), shrink=True)(x)
    assert seen == left
    seen.clear()
    net.deploy(plan(SOME), shrink=False)(x)
    assert seen == [23, 23, 23]
    seen.clear()
    net.deploy(plan(Always()))(x)
    assert seen == [23]


def test_auto_shrinks_only_where_the_clock_says_that_it_pays() -> None:
    net, x = classifier(), images(23)
    fast = net.deploy(plan(SOME))
    known = fast.calibrate(x)
    assert known[0] is None and all(one is not None and one.row_ms >= 0 for one in known[1:])
    dear = type(known[1])(start_ms=1.0, row_ms=0.0, copy_ms=1.0)
    assert not dear.pays(32, 1), "a stage that takes as long for one row as for all"
    assert type(known[1])(start_ms=0.0, row_ms=1.0, copy_ms=0.01).pays(32, 31)


class Choosy(Guest):
    """Takes another way for wide inputs, and another one under autocast."""

    def forward(self, x: Tensor) -> Any:
        if x.shape[-1] > 12:
            x = x[..., ::2] * 3
        return super().forward(-x if torch.is_autocast_enabled("cpu") else x)


def test_layers_are_found_in_one_step_and_programs_by_the_kind_of_input() -> None:
    torch.manual_seed(0)
    net = offramp.attach(Choosy(), images(2), exits=EXITS, heads=offramp.HeadSpec()).eval()
    fast = net.deploy(plan(NEVER))
    for leg in fast.legs:
        run: Any = leg.stage._for(leg.stage.traced.program).run
        targets = [str(node.target) for node in run.graph.nodes if node.op == "call_module"]
        assert targets and not any("." in target for target in targets)
    assert fast.begin(images(2)).program is fast.begin(images(2) + 1).program
    wide = torch.cat([images(2), images(2) - 1], -1)
    for x in (images(2), images(5), wide, images(2), wide):
        assert torch.equal(fast(x), net.backbone(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(images(2)), net.backbone(images(2)))
    assert torch.equal(fast(images(2)), net.backbone(images(2)))
    net, fast = net.double(), fast.to(torch.float64)
    assert torch.equal(fast(images(3).double()), net.backbone(images(3).double()))


def test_the_stream_gives_every_row_once_and_leaves_the_callers_mode_alone() -> None:
    net, x = classifier(), images(23)
    fast = net.deploy(plan(SOME))
    whole, rows, before = fast(x), [], -1
    for answer in fast.stream(x):
        assert not torch.is_inference_mode_enabled()
        assert answer.exit_index > before and torch.equal(answer.output, whole[answer.rows])
        before = answer.exit_index
        rows += answer.rows.tolist()
    assert sorted(rows) == list(range(23)) and rows != list(range(23))
    heard: list[Any] = []
    assert torch.equal(fast.each(heard.append, x), whole)
    assert [a.exit_index for a in heard] == [0, 1, 2]


def test_an_empty_call_and_a_single_row() -> None:
    net = classifier("dict")
    fast = net.deploy(plan(SOME))
    assert fast(images(0))["out"].shape == (0, 5) and fast.last_exits.shape == (0,)
    assert fast(images(1))["out"].shape == (1, 5) and len(fast.last_exits) == 1


def test_threads_do_not_disturb_each_other() -> None:
    net = classifier()
    fast = net.deploy(plan(SOME))
    wanted = {rows: expected(net, SOME, images(rows)) for rows in (5, 9, 14, 23)}
    faults: list[str] = []

    def work(rows: int) -> None:
        for _ in range(10):
            out = fast(images(rows))
            said, where = wanted[rows]
            if fast.last_exits.tolist() != where.tolist() or not torch.allclose(out, said, atol=1e-6):
                faults.append(f"{rows} rows")

    threads = [threading.Thread(target=work, args=(rows,)) for rows in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    fresh: list[Any] = []
    lonely = threading.Thread(target=lambda: fresh.append(pytest.raises(OfframpError, lambda: fast.last_exits)))
    lonely.start()
    lonely.join()
    assert fresh


@pytest.mark.parametrize("how", [{}, {"dtype": "bf16"}, {"channels_last": True}, {"fold": True}])
def test_the_guest_is_left_as_found(how: dict[str, Any]) -> None:
    net, x = classifier(), images(9)
    net.train()
    net.backbone.two.eval()
    modes = [module.training for module in net.modules()]
    weights = {name: (t.clone(), t.stride(), t.data_ptr()) for name, t in net.state_dict().items()}
    fast = net.deploy(plan(SOME), **how)
    first = fast(x)
    assert modes == [module.training for module in net.modules()]
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, weights[name][0]) and (tensor.stride(), tensor.data_ptr()) == weights[name][1:], name
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    net.train()
    fast.train()
    assert torch.equal(fast(x), first), "a deployed network stays in eval mode, whatever its origin does"
    shared = {t.data_ptr() for t in net.parameters()} & {t.data_ptr() for t in fast.parameters()}
    assert bool(shared) == (not how), "weights are shared where nothing about them changes"


@pytest.mark.parametrize(("how", "near"), [
    ({"dtype": "bf16"}, 0.1), ({"channels_last": True}, 1e-5), ({"fold": True}, 1e-5),
])
def test_other_forms_say_the_same_to_rounding(how: dict[str, Any], near: float) -> None:
    net, x = classifier(), images(9)
    with torch.no_grad():
        wanted = net.backbone.eval()(x)
    got = net.deploy(plan(NEVER), **how)(x)
    assert got.dtype == wanted.dtype and torch.allclose(got, wanted, atol=near)
    assert not torch.equal(got, wanted) or "channels_last" in how


def test_folding_takes_every_norm_that_alone_reads_a_convolution() -> None:
    fast = classifier().deploy(plan(NEVER), fold=True)
    assert not [m for m in fast.body[0].modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_a_network_that_answers_with_features_too_is_refused() -> None:
    with pytest.raises(HeadError, match="logits' shape"):
        classifier("features").deploy(plan(SOME))


@pytest.mark.parametrize(("change", "match"), [
    ({"exits": ("one", "nowhere")}, "nowhere"), ({"exits": ("two", "one")}, "order of depth"),
    ({"task": "dense"}, "dense"), ({"fingerprints": {"model": "0123"}}, "0123"),
])
def test_a_plan_of_another_network_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        classifier().deploy(plan(SOME, **change))


def test_a_policy_that_would_mix_rows_is_refused() -> None:
    class Broad:
        def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
            return torch.ones(len(evidence), 1, dtype=torch.bool)

    with pytest.raises(PlanError, match=r"bool \(4,\)"):
        classifier().deploy(plan(Broad()))(images(4))

    class Sure:
        def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
            return torch.ones(len(evidence))

    with pytest.raises(PlanError, match=r"float32 \(4,\)"):
        classifier().deploy(plan(Sure()))(images(4))
    with pytest.raises(OfframpError, match="engine"):
        classifier().deploy(plan(SOME), engine="tensorrt")
    with pytest.raises(OfframpError, match="dtype"):
        classifier().deploy(plan(SOME), dtype="int8")


# ---- dense ----------------------------------------------------------------------------------------------------------


class Reads:
    """Thresholds that say what they read, or keep quiet about it."""

    def __init__(self, policy: offramp.Thresholds, say: bool) -> None:
        self.policy = policy
        self.reads = (policy.confidence,) if say else None

    def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
        assert (evidence.agreement is None) == (self.reads is not None)
        return self.policy.decide(exit_index, evidence)


@pytest.mark.parametrize("say", [True, False])
@pytest.mark.parametrize("how", [{"shrink": True}, {"shrink": False}, {"channels_last": True}])
def test_dense_rows_leave_alike_whether_or_not_the_policy_says_what_it_reads(say: bool, how: dict[str, Any]) -> None:
    net, x = segmenter(), images(11, 16)
    table = offramp.record(net, [x], latency=False)
    scores = offramp.Thresholds(thresholds=(0.0, 0.0)).score(0, table.evidence((0,)))
    middle = scores.sort().values
    policy = offramp.Thresholds(thresholds=(float((middle[5] + middle[6]) / 2), float(middle.mean())))
    fast = net.deploy(plan(Reads(policy, say), task="dense"), **how)
    out = fast(x)["out"]
    replayed = offramp.replay(table, plan(policy, task="dense")).exit_index
    assert fast.last_exits.tolist() == replayed.tolist() and (replayed == 0).sum() == 5
    with torch.no_grad():
        said = torch.stack(net.eval()(x), dim=1)
    assert torch.allclose(out, said[torch.arange(11), replayed], atol=1e-5)


def test_nan_is_named_and_not_binned() -> None:
    net, x = segmenter(), images(4, 16)
    x[2, 0, 3, 3] = float("nan")
    policy = Reads(offramp.Thresholds(thresholds=(0.5, 0.5)), True)
    with pytest.raises(DataError, match="row 2"):
        net.deploy(plan(policy, task="dense"))(x)


@pytest.mark.parametrize("name", ["top", "margin", "entropy_edges"])
@pytest.mark.parametrize("pixel", [0.25, None])
def test_what_a_compiler_fuses_is_scored_as_logits_are(name: str, pixel: float | None) -> None:
    logits = nn.functional.interpolate(torch.randn(3, 4, 5, 5) * 2, (40, 40), mode="bilinear")
    policy = offramp.Thresholds(confidence=name, thresholds=(0.5, 0.5), pixel_thresholds=(0.75, pixel))
    gather = gather_for("dense", policy, [1, 3])
    assert gather.score is not None and gather.read_score is not None
    found = gather.read_score(gather.score(logits), 1)
    assert torch.equal(found, gather.read(logits, 1)) and not torch.equal(found, gather.read(logits, 0))
    if pixel is None:
        whole = summarise(logits, confidences=(name,), stride=3).histograms[name]
        assert torch.equal(found, whole)


# ---- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_legs_say_the_same_at_every_batch_size_with_two_graphs_each() -> None:
    net = classifier()
    eager = net.deploy(plan(SOME))
    fast = net.deploy(plan(SOME), engine="compile")
    torch._dynamo.utils.counters.clear()
    for rows in (23, 9, 1, 14, 6):
        x = images(rows)
        assert torch.allclose(fast(x), eager(x), atol=1e-5)
        assert fast.last_exits.tolist() == eager.last_exits.tolist()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 3 <= graphs <= 6, f"{graphs} graphs for three legs: recompiled by batch size"

"""record: what stands in the table is what the network says, sample by sample."""

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import offramp
from functional.test_boundary import witness
from nn.test_masked import X as PICTURES
from nn.test_masked import made as masked_network
from offramp.errors import DataError, OfframpError
from offramp.functional.confidence import top
from offramp.functional.edges import semantic_edges, smooth_edges
from offramp.functional.summaries import histogram
from runtime.nets import classifier, images, segmenter

LABELS = torch.arange(10) % 5


def batches(x: Tensor, size: int, labels: Tensor | None = None) -> list[Any]:
    return [x[i : i + size] if labels is None else (x[i : i + size], labels[i : i + size])
            for i in range(0, len(x), size)]


def test_logits_and_labels_are_kept_whatever_the_batches() -> None:
    net, x = classifier(), images(10)
    table = offramp.record(net, batches(x, 4, LABELS), latency=False)
    with torch.no_grad():
        wanted = torch.stack(net.eval()(x), dim=1)
    assert torch.allclose(table.logits, wanted, atol=1e-6) and torch.equal(table.labels, LABELS)
    assert table.names == ("one", "two", "final") and table.split == "calibration"
    other = offramp.record(net, batches(x, 7), latency=False, split="test")
    assert other.labels is None and not other.has_labels
    assert {k: v for k, v in other.fingerprints.items() if k != "split"} == {
        k: v for k, v in table.fingerprints.items() if k != "split"}
    same = offramp.record(net, batches(x, 3), latency=False)
    assert same.fingerprints == table.fingerprints, "the size of a batch is not part of the data"
    less = offramp.record(net, batches(x[:9], 4), latency=False)
    assert less.fingerprints["split"] != table.fingerprints["split"]


def test_a_sample_of_two_inputs_has_one_fingerprint_whatever_the_batches() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 30), nn.Linear(30, 4))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x + y)))

    x, y = torch.randn(10, 6), torch.randn(10, 6)
    net = offramp.attach(Two(), (x[:2], y[:2]), exits=["one"], heads=nn.Linear(8, 4), num_classes=4, task="classify")

    def marks(size: int) -> Any:
        rows = [slice(i, i + size) for i in range(0, 10, size)]
        return offramp.record(net, [{"x": x[r], "y": y[r]} for r in rows], latency=False).fingerprints

    assert marks(3) == marks(10)


@pytest.mark.parametrize("form", ["dataset", "loader", "dict"])
def test_any_source_of_batches(form: str) -> None:
    net, x = classifier(), images(10)
    data = TensorDataset(x, LABELS)
    source: Any = {"dataset": data, "loader": DataLoader(data, batch_size=4),
                   "dict": [{"x": x[:6], "labels": LABELS[:6]}, {"x": x[6:], "labels": LABELS[6:]}]}[form]
    table = offramp.record(net, source, latency=False)
    assert len(table) == 10 and torch.equal(table.labels, LABELS)


def test_the_network_comes_back_as_found_and_one_weight_changes_its_fingerprint() -> None:
    net, x = classifier(), images(10)
    net.train()
    net.backbone.two.eval()
    modes, state = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    first = offramp.record(net, [x], latency=False)
    assert modes == [m.training for m in net.modules()]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    with torch.no_grad():
        net.backbone.last.bias[3] += 1e-3
    assert offramp.record(net, [x], latency=False).fingerprints["model"] != first.fingerprints["model"]


def test_dense_matrices_against_brute_force() -> None:
    net, x = segmenter(), images(5, 16)
    labels = (images(5, 16)[:, 0] > 0).long()
    labels[:, :3] = 255
    table = offramp.record(net, batches(x, 2, labels), latency=False, class_names=list("abcd"))
    with torch.no_grad():
        said = torch.stack(net.eval()(x), dim=1)
    predicted = said.argmax(2)
    for n in range(5):
        for e in range(3):
            matrix, against = torch.zeros(4, 4), torch.zeros(4, 4)
            for truth, guess, final in zip(labels[n].flatten(), predicted[n, e].flatten(), predicted[n, 2].flatten(),
                                           strict=True):
                against[final, guess] += 1
                if truth != 255:
                    matrix[truth, guess] += 1
            assert torch.equal(table.confusion[n, e].float(), matrix)
            assert torch.equal(table.agreement_confusion[n, e].float(), against)
            assert table.agreement[n, e, 0] == (predicted[n, e] == predicted[n, 0]).double().mean().float()
            bins = (top(said[n, e][None]) * 1024).long().clamp(max=1023).flatten()
            assert (table.histograms["top"][n, e] - torch.bincount(bins, minlength=1024)).abs().sum() <= 2
    assert torch.allclose(table.probs, said.softmax(2).mean((3, 4)), atol=1e-6) and table.class_names == tuple("abcd")
    assert offramp.record(net, [x], latency=False).confusion is None


def test_wrong_pixels_by_their_distance_to_the_border() -> None:
    net, x = segmenter(), images(5, 16)
    labels = (images(5, 16)[:, 0] > 0.5).long()
    labels[:, :3] = 255
    table = offramp.record(net, batches(x, 2, labels), latency=False)
    with torch.no_grad():
        said = torch.stack(net.eval()(x), dim=1).argmax(2)
    apart = witness(labels)
    for d in range(31):
        there = ((apart > d) & (apart <= d + 1)) if d < 30 else apart > 30
        assert torch.equal(table.boundary_pixels[:, d], there.sum((1, 2)).int())
        wrong = (said != labels[:, None]) & there[:, None]
        assert torch.equal(table.boundary_errors[:, :, d], wrong.sum((2, 3)).int())
    wrong = table.confusion.sum((2, 3)) - table.confusion.diagonal(dim1=2, dim2=3).sum(2)
    assert torch.equal(table.boundary_errors.sum(2), wrong) and wrong.min() > 0
    assert torch.equal(table.boundary_pixels.sum(1)[:, None].expand(5, 3), table.confusion.sum((2, 3)))
    for bare in (offramp.record(net, [x], latency=False),
                 offramp.record(net, batches(x, 2, labels), latency=False, boundary_errors=False)):
        assert bare.boundary_errors is None and bare.boundary_pixels is None


def test_histograms_of_edges_are_as_thick_as_the_exits_stride() -> None:
    net, x = segmenter(), images(5, 16)
    assert [column.stride for column in net.columns] == [2, 2, 2], "each head reads maps of half the output's size"
    table = offramp.record(net, batches(x, 2), latency=False)
    assert list(table.histograms) == ["top", "margin", "entropy", "top_edges", "entropy_edges"]
    with torch.no_grad():
        said = net.eval()(x)
    for e, logits in enumerate(said):
        smoothed = smooth_edges(top(logits), semantic_edges(logits.argmax(1), 2), 2)
        assert (table.histograms["top_edges"][:, e] - histogram(smoothed)).abs().sum() <= 4


def test_only_what_is_asked_for_is_kept() -> None:
    net, x = segmenter(), images(5, 16)
    whole = offramp.record(net, batches(x, 2), latency=False)
    some = offramp.record(net, batches(x, 2), latency=False, confidences=("entropy_edges",), agreement=False)
    assert list(some.histograms) == ["entropy_edges"] and some.agreement is None
    assert torch.equal(some.histograms["entropy_edges"], whole.histograms["entropy_edges"])
    assert torch.equal(some.agreement_confusion, whole.agreement_confusion)
    assert some.evidence([0, 1]).agreement is None
    leave = offramp.Thresholds(confidence="entropy_edges", thresholds=(0.5, 0.5), pixel_thresholds=(0.5, 0.75))
    plan = offramp.Plan(exits=("one", "two"), policy=leave, task="dense")
    assert torch.equal(offramp.replay(some, plan).exit_index, offramp.replay(whole, plan).exit_index)
    exits = offramp.replay(some, plan).exit_index
    torch.testing.assert_close(offramp.replay(some, plan).agrees,
                               whole.agreement[torch.arange(5), exits, -1].double())
    with pytest.raises(OfframpError, match=r"confidences=\('top',\)"):
        offramp.search(some, max_drop=0.1, against="backbone")
    with pytest.raises(OfframpError, match="'sure'|sure"):
        offramp.record(net, [x], latency=False, confidences=("sure",))


def test_one_heads_pixels_are_held_at_a_time() -> None:
    """Logits as large as the image for hundreds of heads would not fit; each is summarised and forgotten."""
    net, x = segmenter(), images(3, 16)
    held: list[Any] = []
    most = 0

    def watch(_: nn.Module, __: Any, said: Tensor) -> None:
        nonlocal most
        held.append(weakref.ref(said))
        most = max(most, sum(one() is not None for one in held))

    hooks = [head.register_forward_hook(watch) for head in net.heads.values()]
    offramp.record(net, [x], latency=False)
    for hook in hooks:
        hook.remove()
    assert len(held) >= 2 and most == 1


def test_costs_are_counted_as_another_counter_counts_them() -> None:
    net, x = classifier(), images(6)
    costs = offramp.record(net, [x], latency={"batches": (1, 4), "repeats": 3, "budget_s": 1}).costs
    x = x[:1]
    with torch.no_grad():
        net.eval()
        for k, part in enumerate((lambda: net.backbone.one(x), lambda: net.backbone.two(net.backbone.one(x)),
                                  lambda: net.backbone(x))):
            with FlopCounterMode(display=False) as counter:
                part()
            assert costs.macs[k] == counter.get_total_flops() // 2
    assert costs.head_macs == (8 * 5, 16 * 5, 0)
    assert costs.param_bytes[0] < costs.param_bytes[1] < costs.param_bytes[2]
    assert costs.head_param_bytes == (4 * (8 * 2 + 8 * 5 + 5), 4 * (16 * 2 + 16 * 5 + 5), 0)
    assert 0 < costs.peak_bytes[0] <= costs.peak_bytes[1] <= costs.peak_bytes[2]
    assert [one.batch for one in costs.latency] == [1, 4]
    for one in costs.latency:
        assert 0 < one.backbone_p50_ms[0] < one.backbone_p50_ms[1] < one.backbone_p50_ms[2]
        assert all(a <= b for a, b in zip(one.backbone_p50_ms, one.backbone_p95_ms, strict=True))
        assert one.head_p50_ms[0] > 0 == one.head_p50_ms[-1] and one.dense_p50_ms > 0
    assert len(costs.path([0, 1, 2], "latency_ms", batch=4)) == 3


def test_nan_names_the_sample_and_the_exit() -> None:
    net, x = classifier(), images(10)
    x[7, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match=r"sample 7, exit 'one'"):
        offramp.record(net, batches(x, 4), latency=False)
    net, x = classifier(), images(10)
    with torch.no_grad():
        net.head("two").last[-1].bias.fill_(float("inf"))
    with pytest.raises(DataError, match=r"sample 0, exit 'two'"):
        offramp.record(net, [x], latency=False)
    with torch.no_grad():  # finite, though their sum is not
        net.head("two").last[-1].bias.fill_(3e38)
    assert offramp.record(net, [x], latency=False).logits.isfinite().all()


@pytest.mark.parametrize(("source", "match"), [
    ([], "at least one sample"), ([images(0)], "at least one sample"), (images(3), "a loader"), (7, "a loader"),
    ([()], "empty tuple"), ([(images(4), LABELS[:4]), images(4)], "every batch or in none"),
    ([(images(4), LABELS[:3])], r"labels \(4,\)"),
])
def test_data_that_cannot_be_recorded(source: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        offramp.record(classifier(), source, latency=False)


def test_dense_labels_of_another_size_are_refused() -> None:
    with pytest.raises(DataError, match="nearest"):
        offramp.record(segmenter(), [(images(2, 16), torch.zeros(2, 8, 8, dtype=torch.long))], latency=False)


def test_a_masked_network_is_recorded_with_its_masks_on() -> None:
    masked = masked_network().train()
    truth = torch.randint(0, 4, (3, 24, 20))
    table = offramp.record(masked, batches(PICTURES, 2, truth), split="test")
    assert masked.training and table.names == ("stem", "body", "final") and table.meta["masks"] == masked.extra_repr()
    with torch.no_grad():
        said, plain, macs = masked.eval()(PICTURES), masked.net(PICTURES), masked.macs(PICTURES)
    assert table.confusion is not None
    for k, logits in enumerate(said):
        right = (logits.argmax(1) == truth).flatten(1).sum(1)
        assert torch.equal(table.confusion[:, k].diagonal(dim1=1, dim2=2).sum(1).long(), right)
    assert not torch.equal(said[2].argmax(1), plain[2].argmax(1))
    means = [round(sum(column) / 3) for column in macs.T.tolist()]
    assert table.costs.path(range(3)).tolist() == pytest.approx(means, abs=0.5) and table.costs.latency == ()
    assert table.costs.path([2]).tolist() == table.costs.path(range(3)).tolist()[2:], "masks come from all heads before"
    masked.threshold = 0.9
    other = offramp.record(masked, batches(PICTURES, 2, truth), split="test")
    assert other.fingerprints["model"] != table.fingerprints["model"]
    masked.enabled = False
    dense = offramp.record(masked, batches(PICTURES, 2, truth), latency=False)
    alone = offramp.record(masked.unmask_(), batches(PICTURES, 2, truth), latency=False)
    assert dense.costs.path(range(3)).tolist() == alone.costs.path(range(3)).tolist()
    assert torch.equal(dense.confusion, alone.confusion)  # type: ignore[arg-type]


def test_a_masked_network_beside_the_untouched_one() -> None:
    masked, truth = masked_network(), torch.randint(0, 4, (3, 24, 20))
    alone = offramp.record(masked, batches(PICTURES, 2, truth))
    table = offramp.record(masked, batches(PICTURES, 2, truth), untouched=True)
    plain = offramp.record(copy.deepcopy(masked).unmask_(), batches(PICTURES, 2, truth), latency=False)
    assert table.names == ("stem", "body", "masked end", "final")
    assert table.confusion is not None and alone.confusion is not None and plain.confusion is not None
    assert torch.equal(table.confusion[:, :3], alone.confusion)
    assert torch.equal(table.confusion[:, 3], plain.confusion[:, 2])
    assert table.costs.macs == (*alone.costs.macs, plain.costs.macs[-1]) and not any(table.costs.head_macs)
    assert table.costs.param_bytes[2:] == (plain.costs.param_bytes[-1],) * 2
    assert table.agreement_confusion is not None and table.fingerprints["model"] == alone.fingerprints["model"]
    with torch.no_grad():
        theirs, ours = (said.argmax(1) for said in (masked.net(PICTURES)[-1], masked.eval()(PICTURES)[-1]))
    same = table.agreement_confusion[:, 2].diagonal(dim1=1, dim2=2).sum(1)
    assert same.tolist() == (theirs == ours).flatten(1).sum(1).tolist() != [480] * 3
    budgeted = offramp.search(table, setting="budgeted", max_drop=0.999)
    assert budgeted.exits == ("stem",) and budgeted.predicted["backbone_macs"] == plain.costs.macs[-1]

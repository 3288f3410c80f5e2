"""Layer Cascade: against a loop over pixels, costs at both ends against the table's, and in between by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import offramp
from offramp.errors import DataError, OfframpError, PlanError
from offramp.functional.metrics import mean_iou
from offramp.layer_cascade import field_share, layer_cascade
from runtime.nets import classifier, images, segmenter

EXITS = ["one", "two"]


def labelled(rows: int = 5) -> TensorDataset:
    labels = torch.randint(0, 4, (rows, 16, 16), generator=torch.Generator().manual_seed(1))
    labels[:, 0] = 255
    return TensorDataset(images(rows, 16), labels)


@pytest.mark.parametrize("confidence", ["top", "margin", "entropy"])
def test_every_pixel_by_itself(confidence: str) -> None:
    net, data = segmenter().train(), labelled()
    lists: list[Any] = [0.3, (0.5, 0.4), (0.2, 2.0), 0.7]
    found = layer_cascade(net, data, exits=EXITS, thresholds=lists, confidence=confidence, batch_size=2)
    assert net.training and found.images == 5 and found.exits == ("one", "two") and not found.unknown
    with torch.no_grad():
        said = [one.double().softmax(1).numpy() for one in net.eval()(data.tensors[0])]
    for asked, point in zip(lists, found.points, strict=True):
        limits = np.broadcast_to(asked, 2)
        matrix, left = np.zeros((4, 4)), [0, 0, 0]
        for n, i, j in np.ndindex(5, 16, 16):
            for k, probs in enumerate(said):
                p = np.sort(probs[n, :, i, j])[::-1]
                sure = {"top": p[0], "margin": p[0] - p[1], "entropy": 1 + (p * np.log(p)).sum() / np.log(4)}
                if k == 2 or sure[confidence] >= limits[k]:
                    break
            left[k] += 1
            if (truth := int(data.tensors[1][n, i, j])) != 255:
                matrix[truth, said[k][n, :, i, j].argmax()] += 1
        hit = matrix.diagonal()
        assert point.miou == pytest.approx((hit / (matrix.sum(0) + matrix.sum(1) - hit)).mean(), abs=1e-9)
        assert point.shares == pytest.approx(np.array(left) / sum(left)) and min(left[:2]) >= 0
        assert point.thresholds == tuple(limits)
    assert len({point.shares for point in found.points}) == len(lists)


@pytest.mark.parametrize("exits", [["one"], ["two"], EXITS])
def test_both_ends_cost_what_the_table_says(exits: list[str]) -> None:
    net, data = segmenter(), labelled()
    table = offramp.record(net, data, latency=False)
    found = layer_cascade(net, data, exits=exits, thresholds=[1.5, 0.0])
    none, all_first = found.points
    columns = [table.names.index(name) for name in exits]
    assert none.macs == table.costs.macs[-1] + sum(table.costs.head_macs[c] for c in columns)
    assert all_first.macs == table.costs.macs[columns[0]] + table.costs.head_macs[columns[0]]
    assert none.shares[-1] == all_first.shares[0] == 1 and found.backbone_macs == table.costs.macs[-1]
    assert table.confusion is not None
    for point, column in ((none, -1), (all_first, columns[0])):
        assert point.miou == pytest.approx(float(mean_iou(table.confusion[:, column].sum(0))))


class Guest(nn.Module):
    """The first convolution copies the image's first channel; what follows does anything."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 6, 3, padding=2, dilation=2)
        self.last = nn.Conv2d(6, 2, 1)
        nn.init.zeros_(self.one.weight)
        self.one.weight.data[:, 0, 1, 1] = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.one(x)))


@pytest.mark.parametrize("doubtful, reads", [([(5, 5)], 9), ([(0, 0)], 4), ([(5, 5), (5, 7)], 12), ([], 0)])
def test_cost_of_a_few_doubtful_pixels_by_hand(doubtful: list[tuple[int, int]], reads: int) -> None:
    head = nn.Conv2d(4, 2, 1, bias=False)
    head.weight.data.copy_(torch.tensor([[5.0], [0.0]]).view(2, 1, 1, 1).expand(2, 4, 1, 1))
    x = torch.ones(1, 3, 12, 11)
    for i, j in doubtful:
        x[0, 0, i, j] = 0
    net = offramp.attach(Guest(), x.expand(2, -1, -1, -1), exits=["one"], heads=head)
    data = [(x, torch.zeros(1, 12, 11, dtype=torch.int64))]
    point, = layer_cascade(net, data, exits=["one"], thresholds=[0.9]).points
    first = 12 * 11 * (3 * 4 * 9 + 4 * 2)  # the first layer and its head, everywhere
    assert point.macs == pytest.approx(first + len(doubtful) * (4 * 6 * 9 + 6 * 2), abs=1e-6)
    assert point.shares[1] == pytest.approx(len(doubtful) / 132)
    if len(doubtful) == 1:
        assert field_share(net, "one", x, doubtful[0]) == pytest.approx(reads / 132)
    if doubtful:
        assert field_share(net, "one", x) == pytest.approx(9 / 132)


def test_a_pixels_field_is_what_moves_it() -> None:
    net = segmenter()
    for weight in net.backbone.parameters():
        nn.init.uniform_(weight, 0.1, 1)
    for name, buffer in net.backbone.named_buffers():
        if "num" not in name:
            nn.init.ones_(buffer)
    net = net.double().eval()
    x, moves, push = torch.rand(1, 3, 16, 16).double() + 2, 0, torch.zeros(1, 8, 8, 8).double()
    handle = net.backbone.one.register_forward_hook(lambda _m, _i, out: out + push)
    with torch.no_grad():
        still = net.backbone(x)["out"][0, :, 3, 12]
        for i, j in np.ndindex(8, 8):
            push.zero_()[:, :, i, j] = 100
            moves += bool(((net.backbone(x)["out"][0, :, 3, 12] - still).abs() > 1e-9).any())
    handle.remove()
    share = field_share(net, "one", x, (3, 12))
    assert 0 < moves < 64 and share == pytest.approx(moves / 64)
    assert field_share(net, "two", x, (3, 12)) < share


def test_images_of_several_sizes_and_the_cheapest_point() -> None:
    net = segmenter()
    data = [(images(2, size), torch.zeros(2, size, size, dtype=torch.int64)) for size in (16, 24)]
    both = layer_cascade(net, data, exits=["one"], thresholds=[0.0, 0.4, 1.1])
    alone = [layer_cascade(net, [one], exits=["one"], thresholds=[0.0, 0.4, 1.1]) for one in data]
    for k, point in enumerate(both.points):
        assert point.macs == pytest.approx(sum(one.points[k].macs for one in alone) / 2)
    assert both.backbone_macs == alone[1].backbone_macs > alone[0].backbone_macs
    assert both.cheapest(max_drop=1.0) == both.points[0] and both.cheapest(max_drop=-1.0) is None
    assert both.points[0].macs < both.points[1].macs < both.points[2].macs


@pytest.mark.parametrize("how, what", [
    ({"exits": ["three"]}, "three"), ({"exits": ["two", "one"]}, "by depth"), ({"exits": []}, "by depth"),
    ({"exits": ["final"]}, "final"), ({"thresholds": []}, "each a number or 2"),
    ({"thresholds": [(0.5,)]}, "2 numbers"), ({"thresholds": [float("nan")]}, "nan"),
    ({"confidence": "top_edges"}, "top, margin, entropy"),
])
def test_what_cannot_be_asked(how: dict[str, Any], what: str) -> None:
    with pytest.raises(PlanError, match=what):
        layer_cascade(segmenter(), labelled(1), **{"exits": EXITS, "thresholds": [0.5], **how})


def test_what_cannot_be_measured() -> None:
    x = images(2, 16)
    for loader, what in ((TensorDataset(x), "labels"), ([x], "labels"), ([], "got none"),
                         ([(x, torch.zeros(2, 8, 8).long())], r"image 0: expected labels \(16, 16\), as large as")):
        with pytest.raises(DataError, match=what):
            layer_cascade(segmenter(), loader, exits=EXITS, thresholds=[0.5])
    with pytest.raises(OfframpError, match="a dense network"):
        layer_cascade(classifier(), [], exits=EXITS, thresholds=[0.5])
    with pytest.raises(PlanError, match="one of the sites .'one', 'two'"):
        field_share(segmenter(), "three", x)

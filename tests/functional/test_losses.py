"""Losses of widths against public formulas, closed forms and other libraries; those of exits are in tests/train."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.errors import OfframpError
from offramp.functional.losses import (
    binary_cross_entropy,
    cross_entropy,
    kl_to_teacher,
    ohem_cross_entropy,
    soft_cross_entropy,
)


def maps(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    logits, labels = scale * torch.randn(2, 5, 12, 16), torch.randint(0, 5, (2, 12, 16))
    labels[0, :4] = 255
    return logits.requires_grad_(), labels


def by_sorting(logits: Tensor, labels: Tensor, threshold: float, least: int) -> float:
    """Each labelled pixel's loss in a list, hardest first; those above the threshold, or the first ``least``."""
    losses = []
    for n, y, x in (labels != 255).nonzero().tolist():
        column = logits[n, :, y, x].tolist()
        losses.append(math.log(sum(math.exp(z) for z in column)) - column[labels[n, y, x]])
    losses.sort(reverse=True)
    hard = [loss for loss in losses if math.exp(-loss) < threshold]
    taken = hard if len(hard) >= least else losses[:least]
    return sum(taken) / len(taken)


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_ohem_takes_the_hard_ones(scale: float) -> None:
    logits, labels = maps(scale)
    assert ohem_cross_entropy(logits, labels).item() == pytest.approx(by_sorting(logits, labels, 0.7, 20), rel=1e-5)


def test_ohem_takes_a_share_where_all_is_easy() -> None:
    logits, labels = maps()
    known = torch.where(labels == 255, 0, labels)
    easy = logits + 12 * F.one_hot(known, 5).permute(0, 3, 1, 2)
    assert (F.cross_entropy(easy, known, reduction="none").exp() < 1 / 0.7).all()
    assert ohem_cross_entropy(easy, labels).item() == pytest.approx(by_sorting(easy, labels, 0.7, 20), rel=1e-4)
    assert ohem_cross_entropy(easy, labels, least=1.0).item() == pytest.approx(cross_entropy(easy, labels).item())


def test_soft_cross_entropy_is_torchs_and_kl_plus_entropy() -> None:
    logits, _ = maps()
    teacher = torch.randn(2, 5, 12, 16, requires_grad=True)
    soft = teacher.softmax(1)
    loss = soft_cross_entropy(logits, soft)
    assert torch.allclose(loss, F.cross_entropy(logits, soft))
    entropy = -(soft * soft.log()).sum(1).mean()
    assert torch.allclose(loss, kl_to_teacher(logits, teacher) + entropy)
    (ours,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(kl_to_teacher(logits, teacher), logits)
    assert torch.allclose(ours, theirs, atol=1e-8)
    loss.backward()
    assert teacher.grad is None


def test_soft_cross_entropy_of_certain_teachers_is_that_of_labels() -> None:
    logits, labels = maps()
    where = labels != 255
    certain = F.one_hot(torch.where(where, labels, 0), 5).permute(0, 3, 1, 2).float()
    assert torch.allclose(soft_cross_entropy(logits, certain, where), cross_entropy(logits, labels))


def test_binary_cross_entropy_is_torchs() -> None:
    logits, teacher = torch.randn(3, 4, 5, requires_grad=True), torch.rand(3, 4, 5, requires_grad=True)
    where = torch.rand(3, 4, 5) < 0.5
    loss = binary_cross_entropy(logits, teacher, where)
    assert torch.allclose(loss, F.binary_cross_entropy(logits[where].sigmoid(), teacher[where]))
    assert torch.allclose(binary_cross_entropy(logits, teacher), F.binary_cross_entropy(logits.sigmoid(), teacher))
    loss.backward()
    assert teacher.grad is None


def test_nothing_to_count_is_zero_with_gradient() -> None:
    logits, labels = maps()
    nowhere = torch.zeros_like(labels, dtype=torch.bool)
    total = (soft_cross_entropy(logits, logits.softmax(1), nowhere) + ohem_cross_entropy(logits, labels * 0 + 255)
             + binary_cross_entropy(logits[:, 0], logits[:, 0].sigmoid(), nowhere))
    total.backward()
    assert total.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_shapes_that_would_broadcast_are_refused() -> None:
    for loss in (soft_cross_entropy, binary_cross_entropy):
        with pytest.raises(OfframpError, match="one shape"):
            loss(torch.zeros(4, 3), torch.zeros(1, 3))

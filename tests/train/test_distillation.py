"""The losses of labels and teacher together, against slow loops over pixels."""

import math

import pytest
import torch
from torch import Tensor

from offramp.errors import OfframpError
from offramp.functional.losses import Lesson, cross_entropy, distillation, kl_to_teacher, positive_filtering
from offramp.train import Recipe, recipes


def by_pixel(logits: Tensor, labels: Tensor, teacher: Tensor, alpha: float, t: float, filtered: bool) -> float:
    total, counted = 0.0, 0
    for n in range(len(labels)):
        for row in range(labels.shape[1]):
            for column in range(labels.shape[2]):
                label = int(labels[n, row, column])
                if label == 255:
                    continue
                counted += 1
                z, goal = logits[n, :, row, column].tolist(), teacher[n, :, row, column].tolist()
                if not filtered or goal.index(max(goal)) == label:
                    total -= alpha * math.log(math.exp(z[label]) / sum(map(math.exp, z)))
                q = [math.exp(v / t) / sum(math.exp(w / t) for w in z) for v in z]
                p = [math.exp(v / t) / sum(math.exp(w / t) for w in goal) for v in goal]
                total += (1 - alpha) * t * t * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / max(counted, 1)


def maps() -> tuple[Tensor, Tensor, Tensor]:
    logits, teacher, labels = torch.randn(2, 3, 4, 5), 3 * torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    labels[0, 1], labels[1, :, 2] = 255, 255
    return logits.requires_grad_(), teacher.requires_grad_(), labels


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("loss", [distillation, positive_filtering])
def test_it_is_the_loop_over_pixels(loss: object, alpha: float, temperature: float) -> None:
    logits, teacher, labels = maps()
    got = loss(logits, labels, teacher, alpha, temperature)  # type: ignore[operator]
    assert got.item() == pytest.approx(
        by_pixel(logits, labels, teacher, alpha, temperature, loss is positive_filtering), rel=1e-5)
    got.backward()
    assert teacher.grad is None
    assert logits.grad is not None and not logits.grad[0, :, 1].any(), "what is not labelled teaches nothing"
    if loss is positive_filtering and alpha == 1:
        taught = logits.grad.abs().sum(1) > 0
        assert torch.equal(taught, teacher.argmax(1) == labels)


def test_its_ends_are_the_losses_it_is_made_of() -> None:
    logits, teacher, labels = maps()
    assert torch.allclose(distillation(logits, labels, teacher, alpha=1.0), cross_entropy(logits, labels))
    whole = labels.clamp(max=2)
    for t in (1.0, 3.0):
        assert torch.allclose(distillation(logits, whole, teacher, 0.0, t), kl_to_teacher(logits, teacher, t))
    right = teacher.argmax(1)
    assert torch.allclose(positive_filtering(logits, right, teacher), distillation(logits, right, teacher))
    assert torch.allclose(positive_filtering(logits, labels + 1000 * (labels == 255), teacher, ignore=1255),
                          positive_filtering(logits, labels, teacher))


def test_rows_without_maps() -> None:
    logits, teacher, labels = maps()
    flat = [t.permute(0, 2, 3, 1).reshape(-1, 3) for t in (logits, teacher)]
    assert torch.allclose(positive_filtering(flat[0], labels.flatten(), flat[1]),
                          positive_filtering(logits, labels, teacher))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_nothing_labelled_is_zero_with_a_gradient(temperature: float) -> None:
    logits, teacher, labels = maps()
    for loss in (distillation, positive_filtering):
        said = loss(logits, torch.full_like(labels, 255), teacher, 0.5, temperature)
        assert said.item() == 0
        said.backward()
        assert logits.grad is not None and not logits.grad.any()


def test_shapes_that_would_broadcast_are_refused() -> None:
    logits, teacher, labels = maps()
    with pytest.raises(OfframpError, match="labels"):
        distillation(logits, labels[:1], teacher)
    with pytest.raises(OfframpError, match="teacher's shape"):
        Lesson(labels, teacher, 0.5, filtered=True)(logits[:1])


def test_who_learns_in_a_step() -> None:
    def turns(recipe: Recipe, early: int, steps: int) -> list[tuple[int, ...]]:
        return [recipe.turn(step, early) for step in range(steps)]

    assert turns(recipes.exit_aware(epochs=1), 3, 7) == [(0,), (1,), (2,), (0,), (1,), (2,), (0,)]
    # Eq. 2 with N = 4, j = 1, 2, ...: exit i where j mod i = 0.
    printed = [tuple(i - 1 for i in range(1, 4) if j % i == 0) for j in range(1, 13)]
    assert turns(recipes.exit_aware(epochs=1, dropout="printed"), 3, 12) == printed
    assert turns(recipes.joint(), 2, 2) == [(0, 1)] * 2
    assert turns(recipes.final_only(epochs=1), 2, 2) == [()] * 2
    assert turns(recipes.exit_aware(epochs=1), 0, 2) == [()] * 2, "a network without early exits"


def test_stages_are_those_of_the_paper() -> None:
    first, second = recipes.exit_aware(epochs=2), recipes.mess(epochs=2)
    for recipe in (first, second):
        assert (recipe.optimiser, recipe.lr, recipe.momentum, recipe.weight_decay) == ("sgd", 0.02, 0.9, 1e-4)
        assert [recipe.lr_at(s, 100) for s in (0, 50)] == pytest.approx([0.02, 0.02 * 0.5**0.9])
    assert not first.freeze and second.freeze and second.alpha == 0.5
    with pytest.raises(OfframpError) as caught:
        Recipe(loss="pfd", epochs=1, freeze=False, alpha=2.0, dropout="some", loss_stride=0)  # type: ignore[arg-type]
    for word in ("freeze=True", "alpha", "dropout", "loss_stride"):
        assert word in str(caught.value)

"""Recipes check themselves, and their schedules end where they should."""

import math

import pytest
import torch

from offramp.errors import OfframpError
from offramp.functional.losses import cross_entropy, kl_to_teacher
from offramp.train import Recipe, recipes


def test_all_faults_in_one_error() -> None:
    with pytest.raises(OfframpError) as caught:
        Recipe(loss="none", epochs=0, lr=-1.0, views=3, weights=(0.0, 0.0), clip=0.0, freeze=False)  # type: ignore[arg-type]
    for word in ("loss", "epochs", "lr", "augment", "weights", "clip", "freeze"):
        assert word in str(caught.value)


@pytest.mark.parametrize("schedule", ["cosine", "poly", "constant"])
def test_schedule_rises_then_falls(schedule: str) -> None:
    recipe = Recipe(loss="labels", epochs=1, lr=0.5, schedule=schedule, warmup=0.1)  # type: ignore[arg-type]
    rates = [recipe.lr_at(step, 100) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[9] == 0.5 == max(rates)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == 0.5 if schedule == "constant" else rates[-1] < 0.02


def test_json_names_the_augmentation() -> None:
    data = recipes.label_free(views=2, augment=recipes.flip_shift, weights=[1, 2]).to_json()["data"]
    assert data["augment"] == "offramp.train.recipes:flip_shift" and data["weights"] == [1, 2]


def test_kl_is_the_closed_form_and_its_gradient_stays_off_the_teacher() -> None:
    logits, teacher = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    p, q = (teacher / 2).softmax(1), (logits / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum() / 5
    loss = kl_to_teacher(logits, teacher, 2.0)
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)
    loss.backward()
    assert teacher.grad is None
    assert logits.grad is not None and torch.allclose(logits.grad, 2 * (q - p) / 5, atol=1e-6)


def test_kl_of_pixels_is_the_mean_over_them() -> None:
    logits, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    flat = kl_to_teacher(logits.permute(0, 2, 3, 1).reshape(-1, 3), teacher.permute(0, 2, 3, 1).reshape(-1, 3), 3.0)
    assert torch.allclose(kl_to_teacher(logits, teacher, 3.0), flat)


def test_kl_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(OfframpError):
        kl_to_teacher(torch.zeros(4, 3), torch.zeros(1, 3))


def test_cross_entropy_ignores_and_survives_nothing_to_count() -> None:
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    labels[0, :2] = 255
    assert torch.allclose(cross_entropy(logits, labels),
                          torch.nn.functional.cross_entropy(logits, labels, ignore_index=255))
    assert cross_entropy(logits, torch.full_like(labels, 255)).item() == 0


def test_flip_shift_moves_whole_images() -> None:
    torch.manual_seed(0)
    x = torch.arange(1.0, 65.0).view(1, 1, 8, 8).repeat(40, 2, 1, 1)
    y = recipes.flip_shift(x)
    assert y.shape == x.shape
    seen = set()
    for image in y:
        assert torch.equal(image[0], image[1]), "channels move together"
        rows = image[0][1:-1, 1:-1]
        step = rows[:, 1:] - rows[:, :-1]
        assert step.unique().numel() == 1 and abs(step[0, 0]) == 1 and (rows[1:] - rows[:-1] == 8).all()
        seen.add(float(rows[0, 0]))
    assert len(seen) > 10

"""How right answers are. N samples, K classes, H W space; labels outside [0, K) are ignored (255, -1, -100 alike)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from offramp.errors import OfframpError

__all__ = ["accuracy", "agreement", "bootstrap_interval", "confusion", "iou", "mean_iou"]


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of the counted positions that are right; NaN where none is counted.

    >>> accuracy(torch.tensor([1, 2, 0]), torch.tensor([1, 0, -1]))
    0.5
    """
    counted = labels >= 0
    return (predictions == labels)[counted].double().mean().item()


def agreement(logits: Tensor, other: Tensor) -> float:
    """Share of positions where two sets of logits (N, K, ...) name the same class."""
    return (logits.argmax(dim=1) == other.argmax(dim=1)).double().mean().item()


def confusion(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix of each sample: two (N, ...) integer tensors -> (N, K, K) int32, rows label, columns prediction.

    >>> confusion(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 255]]), 2).tolist()
    [[[1, 1], [0, 0]]]
    """
    if predictions.shape != labels.shape:
        raise OfframpError(
            expected="predictions and labels of one shape", where="confusion()",
            got=f"{tuple(predictions.shape)} and {tuple(labels.shape)}",
        )
    rows, area = labels.shape[0], num_classes * num_classes
    if rows == 0:
        return torch.zeros(0, num_classes, num_classes, dtype=torch.int32, device=labels.device)
    truth = labels.reshape(rows, -1).to(torch.int32)
    # what is ignored falls into one cell after the others: counting it is cheaper than picking it out
    cell = torch.where((truth >= 0) & (truth < num_classes), truth * num_classes, area)
    cell = cell.add_(predictions.reshape(rows, -1)).clamp_(max=area)
    cell += torch.arange(rows, dtype=torch.int32, device=cell.device)[:, None] * (area + 1)
    counts = torch.bincount(cell.flatten(), minlength=rows * (area + 1)).view(rows, area + 1)
    return counts[:, :area].reshape(rows, num_classes, num_classes).to(torch.int32)


def iou(matrix: Tensor) -> Tensor:
    """Intersection over union of each class: (..., K, K) -> (..., K) float64; NaN for a class that never occurs."""
    matrix = matrix.double()
    hit = matrix.diagonal(dim1=-2, dim2=-1)
    return hit / (matrix.sum(dim=-1) + matrix.sum(dim=-2) - hit)


def mean_iou(matrix: Tensor) -> Tensor:
    """mIoU, a fraction, over the classes that occur: (..., K, K) -> (...) float64.

    >>> mean_iou(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])).item()  # (3/4 + 4/5) / 2
    0.775
    """
    return iou(matrix).nanmean(dim=-1)


def bootstrap_interval(
    samples: Tensor, statistic: Callable[[Tensor], Tensor] | None = None, *, level: float = 0.95, repeats: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic when samples (N, ...) are drawn anew; the mean where none is given.

    ``statistic`` maps a resample (N, ...) to a scalar. Efron's plain percentile bootstrap: no bias correction.
    """
    if len(samples) == 0:
        raise OfframpError(expected="at least one sample", got="none", where="bootstrap_interval()")
    draw = np.random.default_rng(seed)
    values = samples.double()
    if statistic is None:
        flat = values.cpu().numpy()
        found = np.array([flat[draw.integers(0, len(flat), len(flat))].mean() for _ in range(repeats)])
    else:
        rows = (torch.from_numpy(draw.integers(0, len(values), len(values))) for _ in range(repeats))
        found = np.array([float(statistic(values[index])) for index in rows])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

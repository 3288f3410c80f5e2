"""Whether confidence means what it says, and the one number that repairs it. N samples, K classes, M bins."""

import math

import torch
from torch import Tensor

from offramp.errors import DataError, OfframpError

__all__ = ["brier", "ece", "fit_temperature", "nll", "reliability"]


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, mean confidence and accuracy of ``bins`` equal bins of (0, 1], for a reliability diagram.

    confidence (N,) in [0, 1] and correct (N,) bool -> three (M,) float64; the means of an empty bin are NaN. A
    confidence on an edge belongs to the bin below it, and 0 to the first, as in Guo et al. (arXiv:1706.04599).
    """
    index = ((confidence.double() * bins).ceil().long() - 1).clamp(0, bins - 1)
    count = torch.bincount(index, minlength=bins).double()
    said = torch.bincount(index, confidence.double(), minlength=bins) / count
    right = torch.bincount(index, correct.double(), minlength=bins) / count
    return count, said, right


def ece(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    r"""Expected calibration error of the top class: logits (N, K), labels (N,) -> fraction.

    .. math:: \sum_m \frac{|B_m|}{N} \left| \mathrm{acc}(B_m) - \mathrm{conf}(B_m) \right|

    Guo et al. (arXiv:1706.04599), 15 equal bins.

    >>> ece(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0]))  # says 1/2, is always right
    0.5
    """
    _check(logits, labels)
    confidence, said = logits.double().softmax(dim=1).max(dim=1)
    count, conf, acc = reliability(confidence, said == labels, bins)
    return float(((acc - conf).abs() * count).nansum() / len(labels))


def brier(logits: Tensor, labels: Tensor) -> float:
    """Mean squared distance of the probabilities from the truth, summed over classes, in [0, 2]: (N, K), (N,) -> float.

    >>> brier(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    0.5
    """
    _check(logits, labels)
    probs = logits.double().softmax(dim=1)
    probs[torch.arange(len(labels), device=labels.device), labels] -= 1
    return float(probs.square().sum(dim=1).mean())


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood, natural logarithm: (N, K), (N,) -> float.

    >>> round(nll(torch.tensor([[0.0, 0.0]]), torch.tensor([1])), 6) == round(math.log(2), 6)
    True
    """
    _check(logits, labels)
    return float(torch.nn.functional.cross_entropy(logits.double(), labels))


def fit_temperature(logits: Tensor, labels: Tensor, *, low: float = 0.05, high: float = 20.0) -> float:
    """The T > 0 for which logits / T are likeliest: (N, K), (N,) -> float (Guo et al., arXiv:1706.04599, 4.2).

    The likelihood is convex in 1/T, so its slope there is bisected: no learning rate, and the same answer on any
    machine. T is held within [low, high]; logits that are never wrong would ask for T -> 0.
    """
    _check(logits, labels)
    scores = logits.double()
    right = scores[torch.arange(len(labels), device=labels.device), labels]

    def slope(inverse: float) -> float:
        # d nll / d(1/T): what the softmax expects of the logit, less the true class's own
        expected = ((scores * inverse).softmax(dim=1) * scores).sum(dim=1)
        return float((expected - right).mean())

    least, most = 1 / high, 1 / low
    if slope(least) >= 0:
        return high
    if slope(most) <= 0:
        return low
    for _ in range(40):
        middle = math.sqrt(least * most)
        if slope(middle) > 0:
            most = middle
        else:
            least = middle
    return 1 / math.sqrt(least * most)


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise OfframpError(
            expected="logits (N, K) and labels (N,) with N >= 1", where="calibration",
            got=f"{tuple(logits.shape)} and {tuple(labels.shape)}",
        )
    if bool(logits.isnan().any()):
        raise DataError(expected="logits without NaN", where="calibration",
                        got=f"NaN in sample {int(logits.isnan().any(dim=1).nonzero()[0])}")
    if bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        raise DataError(expected=f"labels in [0, {logits.shape[1]})", where="calibration",
                        got=f"{sorted(set(labels.tolist()) - set(range(logits.shape[1])))[:5]}")

"""Losses of exits and of widths. N samples, K classes; trailing axes (H W) are averaged over like samples."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.errors import OfframpError

__all__ = ["Lesson", "binary_cross_entropy", "cross_entropy", "distillation", "kl_to_teacher", "ohem_cross_entropy",
           "positive_filtering", "soft_cross_entropy", "squared_error"]


def kl_to_teacher(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r"""How far an exit is from the network's own answer: logits (N, K, ...) and teacher (N, K, ...) -> scalar.

    .. math:: T^2 \, \frac{1}{N} \sum_n \sum_k p_{nk} \log \frac{p_{nk}}{q_{nk}}, \quad p = \sigma(t/T), q = \sigma(z/T)

    KL(backbone || exit) as in the label-free paper (its section 3.2.2), with Hinton's temperature (arXiv:1503.02531):
    the factor T^2 keeps the gradient's size when T changes. No gradient reaches the teacher.

    >>> import torch
    >>> kl_to_teacher(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 0.0]]), 4.0).item()
    0.0
    """
    if logits.shape != teacher.shape:
        raise OfframpError(
            expected="logits and teacher of one shape", got=f"{tuple(logits.shape)} and {tuple(teacher.shape)}",
            where="kl_to_teacher()", todo="give both (N, K) or both (N, K, H, W)",
        )
    student = (logits.float() / temperature).log_softmax(1)
    goal = (teacher.detach().float() / temperature).log_softmax(1)
    apart = F.kl_div(student, goal, reduction="none", log_target=True).sum(1)
    return temperature**2 * apart.mean()


def cross_entropy(logits: Tensor, labels: Tensor, ignore: int = 255, weights: Tensor | None = None) -> Tensor:
    """Mean over labelled positions: logits (N, K, ...), labels (N, ...); zero, with gradient, where none is labelled.

    weights: (K,), what a position of each class counts in the mean; all alike unless given.

    >>> import torch
    >>> round(cross_entropy(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 255]]])).item(), 4)
    0.6931
    """
    total = F.cross_entropy(logits.float(), labels.long(), weights, ignore_index=ignore, reduction="sum")
    known = labels != ignore
    if weights is None:
        return total / known.sum().clamp(min=1)
    return total / weights[labels[known].long()].sum().clamp(min=torch.finfo(weights.dtype).tiny)


def squared_error(maps: Tensor, goal: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean square of what heatmaps are off: maps and goal (N, K, H, W) -> scalar.

    Where the goal is NaN nothing counts; where it is nowhere else the mean is zero, with gradient. weights: (K,), what
    a position of each map counts in the mean. HRNet's code for poses, which ADP-C follows, takes half of this, and
    joints that do not count are zeros in its mean.

    >>> import torch
    >>> squared_error(torch.zeros(1, 1, 1, 3), torch.tensor([[[[2.0, 0.0, math.nan]]]])).item()
    2.0
    """
    if maps.shape != goal.shape:
        raise OfframpError(expected="heatmaps and goal of one shape", where="squared_error()",
                           got=f"{tuple(maps.shape)} and {tuple(goal.shape)}",
                           todo="draw the goal at the size of the network's own output")
    known = ~goal.isnan()
    counts = known.float()
    if weights is not None:
        counts = counts * weights[:, None, None]
    # the goal is replaced before the difference is taken: NaN would survive a product with 0, in the gradient too
    squares = (maps.float() - torch.where(known, goal, 0)).square()
    return (counts * squares).sum() / counts.sum().clamp(min=torch.finfo(counts.dtype).tiny)


def ohem_cross_entropy(
    logits: Tensor, labels: Tensor, threshold: float = 0.7, least: float = 1 / 16, ignore: int = 255
) -> Tensor:
    """Mean over hard positions alone: logits (N, K, ...), labels (N, ...) -> scalar; zero where none is labelled.

    Hard is where the label's probability is below ``threshold``; if that are fewer than the share ``least`` of the
    labelled positions of the batch, that share with the highest losses. Online hard example mining as public
    segmentation code has it (BiSeNet's takes 0.7 and 1/16); SlimSeg names it without its numbers.

    >>> import torch
    >>> sure_and_unsure = torch.tensor([[9.0, 0.0], [0.0, 0.0]])
    >>> round(ohem_cross_entropy(sure_and_unsure, torch.tensor([0, 0])).item(), 4)
    0.6931
    """
    loss = F.cross_entropy(logits.float(), labels.long(), ignore_index=ignore, reduction="none")[labels != ignore]
    hard = loss[loss > -math.log(threshold)]
    fewest = math.ceil(least * len(loss))
    if len(hard) < fewest:
        hard = loss.topk(fewest).values
    return hard.sum() / max(1, len(hard))


def soft_cross_entropy(logits: Tensor, teacher: Tensor, where: Tensor | None = None) -> Tensor:
    r"""Cross-entropy against probabilities: logits and teacher (N, K, ...), where (N, ...) bool -> scalar.

    .. math:: -\frac{1}{P} \sum_{p \in \text{where}} \sum_k q_{pk} \log \sigma(z_p)_k

    over the P positions of ``where``, all unless given; zero, with gradient, if there are none. SlimSeg's L_KD
    (Eq. 1), US-Net's inplace distillation (arXiv:1903.05134). No gradient reaches the teacher. It is KL plus the
    teacher's entropy, hence of the same gradient, and linear in the teacher: the mean of it over several teachers is
    it against their mean.

    >>> import torch
    >>> round(soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.3, 0.7]])).item(), 4)
    0.6931
    """
    if logits.shape != teacher.shape:
        raise OfframpError(expected="logits and teacher of one shape", where="soft_cross_entropy()",
                           got=f"{tuple(logits.shape)} and {tuple(teacher.shape)}")
    return _mean_over(-(teacher.detach() * logits.float().log_softmax(1)).sum(1), where)


def binary_cross_entropy(logits: Tensor, teacher: Tensor, where: Tensor | None = None) -> Tensor:
    """Of yes or no: logits and probabilities (or labels 0, 1) of one shape, where bool -> scalar, the mean over where.

    SlimSeg's L_b (Eq. 2), which balances nothing. No gradient reaches the teacher; zero, with gradient, where none
    counts.

    >>> import torch
    >>> round(binary_cross_entropy(torch.zeros(2), torch.tensor([0, 1])).item(), 4)
    0.6931
    """
    if logits.shape != teacher.shape:
        raise OfframpError(expected="logits and teacher of one shape", where="binary_cross_entropy()",
                           got=f"{tuple(logits.shape)} and {tuple(teacher.shape)}")
    goal = teacher.detach().float()
    return _mean_over(F.binary_cross_entropy_with_logits(logits.float(), goal, reduction="none"), where)


def _mean_over(values: Tensor, where: Tensor | None) -> Tensor:
    if where is None:
        return values.mean()
    return torch.where(where, values, 0).sum() / where.sum().clamp(min=1)


def distillation(
    logits: Tensor, labels: Tensor, teacher: Tensor, alpha: float = 0.5, temperature: float = 1.0, ignore: int = 255
) -> Tensor:
    r"""Labels and the network's own answer: logits and teacher (N, K, ...), labels (N, ...) -> scalar.

    .. math:: \frac{1}{P} \sum_p \alpha \, \mathrm{CE}(z_p, y_p)
              + (1 - \alpha) \, T^2 \, \mathrm{KL}(t_p / T \,\|\, z_p / T)

    over the P labelled positions; ignored ones count for neither term. Hinton et al. (arXiv:1503.02531), with KL for
    their soft cross-entropy: the same gradient, but zero where the exit says what the teacher says.

    >>> import torch
    >>> same, label = torch.tensor([[9.0, 0.0], [5.0, 0.0]]), torch.tensor([0, 255])
    >>> distillation(same, label, same, alpha=0.0).item()
    0.0
    """
    return Lesson(labels, teacher, alpha, temperature, ignore, filtered=False)(logits)


def positive_filtering(
    logits: Tensor, labels: Tensor, teacher: Tensor, alpha: float = 0.5, temperature: float = 1.0, ignore: int = 255
) -> Tensor:
    r"""Labels where the network itself is right, its own answer everywhere: MESS, Eq. 3.

    .. math:: \frac{1}{P} \sum_p \alpha \, [\arg\max t_p = y_p] \, \mathrm{CE}(z_p, y_p)
              + (1 - \alpha) \, \mathrm{KL}(t_p \,\|\, z_p)

    logits and teacher (N, K, ...), labels (N, ...) -> scalar, over the P labelled positions, filtered ones among them:
    where the network is often wrong, labels weigh less in all. Eq. 3 leaves open the direction of KL (ours is
    Hinton's), the mean (ours is over labelled positions in both terms, so that padding and void teach nothing) and
    the temperature (ours multiplies KL by T^2).

    >>> import torch
    >>> wrong = torch.tensor([[0.0, 9.0]])
    >>> positive_filtering(torch.zeros(1, 2), torch.tensor([0]), wrong, alpha=1.0).item()
    0.0
    """
    return Lesson(labels, teacher, alpha, temperature, ignore, filtered=True)(logits)


class Lesson:
    """Either of these losses for many exits: ``Lesson(...)(logits)``; what does not depend on the exit is done once.

    At T = 1 labels and teacher are one cross-entropy against a mixture, which costs an exit one softmax.
    """

    def __init__(
        self, labels: Tensor, teacher: Tensor, alpha: float, temperature: float = 1.0, ignore: int = 255, *,
        filtered: bool,
    ) -> None:
        if labels.shape != teacher.shape[:1] + teacher.shape[2:]:
            raise OfframpError(expected="teacher (N, K, ...) and labels (N, ...)", where="distillation",
                               got=f"{tuple(teacher.shape)} and {tuple(labels.shape)}")
        valid, teacher = labels != ignore, teacher.detach().float()
        told = valid & (teacher.argmax(1) == labels) if filtered else valid
        self.temperature, self.count = temperature, valid.sum().clamp(min=1)
        self.alpha, self.labels = alpha, torch.where(told, labels.long(), ignore)
        self.ignore = ignore
        goal = (teacher / temperature).log_softmax(1)
        self.soft = goal.exp() * ((1 - alpha) * temperature**2 / self.count * valid).unsqueeze(1)
        self.offset = (self.soft * goal).sum()
        if temperature == 1:
            place = torch.where(told, labels.long(), 0).unsqueeze(1)
            self.soft.scatter_add_(1, place, (alpha / self.count * told).unsqueeze(1))

    def __call__(self, logits: Tensor) -> Tensor:
        if logits.shape != self.soft.shape:
            raise OfframpError(expected=f"logits of the teacher's shape {tuple(self.soft.shape)}",
                               got=str(tuple(logits.shape)), where="distillation")
        apart = self.offset - (self.soft * (logits.float() / self.temperature).log_softmax(1)).sum()
        if self.temperature == 1:
            return apart
        hard = F.cross_entropy(logits.float(), self.labels, ignore_index=self.ignore, reduction="sum")
        return apart + self.alpha * hard / self.count

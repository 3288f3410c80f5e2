"""Losses of exits. N samples, K classes; trailing axes (H W) are averaged over like samples."""

import torch.nn.functional as F
from torch import Tensor

from offramp.errors import OfframpError

__all__ = ["cross_entropy", "kl_to_teacher"]


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


def cross_entropy(logits: Tensor, labels: Tensor, ignore: int = 255) -> Tensor:
    """Mean over labelled positions: logits (N, K, ...), labels (N, ...); zero, with gradient, where none is labelled.

    >>> import torch
    >>> round(cross_entropy(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 255]]])).item(), 4)
    0.6931
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=ignore, reduction="sum")
    return total / (labels != ignore).sum().clamp(min=1)

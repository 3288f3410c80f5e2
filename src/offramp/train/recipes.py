"""Recipes are functions that return a ``Recipe``; new ones call old ones (``dataclasses.replace``)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.train.augment import scale_crop_flip
from offramp.train.recipe import AnytimeStep, Augment, AugmentPair, Recipe, SlimStep

__all__ = ["anytime", "eenet", "exit_aware", "final_only", "flip", "flip_shift", "frozen", "joint", "kd", "label_free",
           "mess", "scale_crop_flip", "self_distill", "slim"]


def label_free(
    *, epochs: int = 30, temperature: float = 1.0, lr: float = 2e-3, views: int = 1, augment: Augment | None = None,
    batch_size: int = 128, weights: Sequence[float] | None = None, weight_decay: float = 0.01, ema: float | None = None,
    seed: int = 0,
) -> Recipe:
    """Heads learn what the frozen network itself says; no label is ever read (label-free paper, section 3.2).

    It trains one exit after another; since the trunk is frozen and heads share nothing, we train all in one pass, which
    gives the same gradients. Views and the temperature are ours: the paper trains on plain images at T = 1.
    """
    return Recipe(
        loss="teacher", epochs=epochs, temperature=temperature, lr=lr, views=views, augment=augment,
        batch_size=batch_size, weights=None if weights is None else tuple(weights), weight_decay=weight_decay, ema=ema,
        seed=seed,
    )


def joint(
    *, weights: Sequence[float] | None = None, epochs: int = 30, lr: float = 0.01, batch_size: int = 128,
    weight_decay: float = 5e-4, schedule: str = "poly", warmup: float = 0.05, clip: float | None = None,
    augment: Augment | None = None, augment_pair: AugmentPair | None = None, loss_stride: int = 1, seed: int = 0,
) -> Recipe:
    """The network and its exits learn from labels: a weighted sum of the exits' cross-entropies, the final included.

    BranchyNet (arXiv:1709.01686), MSDNet (arXiv:1703.09844) and ADP-C train so; equal weights unless given. MESS's
    end-to-end baseline (its Table 5) is ``joint(lr=0.02, weight_decay=1e-4, warmup=0)``.
    """
    return Recipe(
        loss="labels", freeze=False, epochs=epochs, lr=lr, batch_size=batch_size, optimiser="sgd",
        weight_decay=weight_decay, schedule=schedule, warmup=warmup, clip=clip,  # type: ignore[arg-type]
        augment=augment, augment_pair=augment_pair, loss_stride=loss_stride,
        weights=None if weights is None else tuple(weights), seed=seed,
    )


def eenet(
    exits: int, *, epochs: int = 30, lr: float = 0.01, distill: float = 0.01, temperature: float = 3.0,
    freeze: bool = False, **how: Any,
) -> Recipe:
    """EENet's training (section 3.1): deeper exits weigh more, and in the last quarter they teach the earlier ones.

    Of K = ``exits`` exits, the final one included, exit j weighs j / (K (K + 1)); from 3/4 of all steps on, each early
    one also has ``distill`` T^2 KL(final || exit). ``freeze`` trains the heads alone, on the network as it is. ``how``
    is that of :func:`joint`. The text names neither the weights nor T; ours are those of its public code. It trains
    from nothing by Adam; ours starts from a trained network and takes SGD, as :func:`joint` does.
    """
    weights = tuple(j / (exits * (exits + 1)) for j in range(1, exits + 1 - freeze))
    made = joint(epochs=epochs, lr=lr, weights=weights, **how)
    return replace(made, distill=distill, temperature=temperature, freeze=freeze)


def exit_aware(
    *, epochs: int, lr: float = 0.02, dropout: Literal["round_robin", "printed"] = "round_robin", batch_size: int = 8,
    weight_decay: float = 1e-4, clip: float | None = None, augment_pair: AugmentPair | None = None,
    loss_stride: int = 1, seed: int = 0,
) -> Recipe:
    """MESS's first stage (section 4.3): end to end from labels, each step through the final exit and one early one.

    ``round_robin``, its text's reading, takes the early exits one after another; ``printed`` is Eq. 2's (j mod i = 0),
    which trains the first exit in every step. SGD, momentum 0.9, poly 0.9 as in A.2; our momentum is Nesterov's, and
    biases and norms do not decay. Attach plain FCN heads; the second stage then takes another net around the same
    network, whose weights ``attach`` shares::

        fit(attach(model, x, exits=5, heads=fcn), train, exit_aware(epochs=60), run_dir="first")
        fit(net := attach(model, x, exits=5, heads=mess_space()), train, mess(epochs=20), run_dir="second")
    """
    return replace(joint(
        epochs=epochs, lr=lr, batch_size=batch_size, weight_decay=weight_decay, warmup=0.0, clip=clip,
        augment_pair=augment_pair, loss_stride=loss_stride, seed=seed,
    ), dropout=dropout)


def frozen(
    *, epochs: int, lr: float = 0.02, batch_size: int = 8, weight_decay: float = 1e-4, views: int = 1,
    augment_pair: AugmentPair | None = None, weights: Sequence[float] | None = None, loss_stride: int = 1,
    seed: int = 0,
) -> Recipe:
    """Heads alone learn from labels, the network and its final exit stay: SDN (arXiv:1810.07052), MESS's baseline."""
    return Recipe(
        loss="labels", epochs=epochs, lr=lr, batch_size=batch_size, optimiser="sgd", weight_decay=weight_decay,
        schedule="poly", warmup=0.0, views=views, augment_pair=augment_pair, loss_stride=loss_stride,
        weights=None if weights is None else tuple(weights), seed=seed,
    )


def kd(*, alpha: float = 0.5, temperature: float = 2.0, **how: Any) -> Recipe:
    """Heads alone learn from labels and, softened, from the frozen network: Hinton et al. (arXiv:1503.02531).

    MESS's baseline; its alpha is 0.5 (A.2), its temperature is not given. ``how`` is that of :func:`frozen`.
    """
    return replace(frozen(**how), loss="kd", alpha=alpha, temperature=temperature)


def self_distill(*, alpha: float = 0.5, **how: Any) -> Recipe:
    """Heads alone learn from labels and from the frozen final exit as it is, T = 1.

    Self-distillation of exits (arXiv:1905.08094) trains end to end and adds an L2 hint between features, which heads
    of other shapes than the network's own do not have: what remains is its (1 - a) CE + a KL, as MESS describes it.
    """
    return replace(frozen(**how), loss="kd", alpha=alpha)


def mess(*, alpha: float = 0.5, **how: Any) -> Recipe:
    """MESS's second stage (section 4.3): heads alone, Positive Filtering Distillation (Eq. 3).

    Labels count where the frozen network is right, its own answer everywhere. ``how`` is that of :func:`frozen`.
    """
    return replace(frozen(**how), loss="pfd", alpha=alpha)


def final_only(**how: Any) -> Recipe:
    """The network alone, from labels; early exits are neither trained nor computed. ``how``: see :func:`exit_aware`."""
    return replace(exit_aware(**how), dropout="all")


def slim(
    *, epochs: int, boundary: str | None = None, weights: tuple[float, float] | None = None,
    distill: Literal["prev", "largest", "mean", "larger"] | None = "prev", tau: float = 0.7, radius: float = 3,
    ohem: bool = True, sandwich: int | None = None, lr: float = 0.01, batch_size: int = 8, momentum: float = 0.9,
    weight_decay: float = 5e-4, clip: float | None = None, augment_pair: AugmentPair | None = None,
    loss_stride: int = 1, seed: int = 0,
) -> Recipe:
    """All widths of a :func:`offramp.slim_` network in one step, the widest from labels, each other from a wider one.

    SlimSeg, Eqs. 1-5 and 4.2. ``boundary`` names the module of the low-level features (of a ResNet ``layer1``);
    ``weights`` are those of L_b and L_g, (10, 1) where a boundary is named and (0, 0) where none is. Table 3 is the
    four of (0, 0), ``boundary=..., weights=(10, 0)``, (0, 1) and (10, 1), with and without ``distill=None``; Table 4
    is ``distill``, where ``mean`` and ``larger`` are the same gradient, soft cross-entropy being linear in the teacher.
    A plain network is trained as a slimmable one of one width: ``fit(net.narrow(0.5), data, slim(...))`` is the
    paper's independent one.

    The paper leaves open what hard examples are (ours: ``functional.losses.ohem_cross_entropy``, for L_seg from
    labels), and whether pixels without a label are taught (ours are not). Our momentum is Nesterov's, and biases and
    norms do not decay. ``sandwich`` is US-Net's rule (arXiv:1903.05134) over the network's own widths.
    """
    if weights is None:
        weights = (10.0, 1.0) if boundary else (0.0, 0.0)
    step = SlimStep(teacher=distill, boundary=boundary, boundary_weight=weights[0], guided_weight=weights[1], tau=tau,
                    radius=radius, ohem=ohem, sandwich=sandwich)
    made = joint(epochs=epochs, lr=lr, batch_size=batch_size, weight_decay=weight_decay, warmup=0.0, clip=clip,
                 augment_pair=augment_pair, loss_stride=loss_stride, seed=seed)
    return replace(made, momentum=momentum, slim=step)


def anytime(
    *, epochs: int, weights: Sequence[float] | None = None, says: Literal["classes", "heatmaps"] = "classes",
    channel_weights: Sequence[float] | None = None, mask_from: int = 0, lr: float = 0.01, batch_size: int = 12,
    momentum: float = 0.9, weight_decay: float = 5e-4, clip: float | None = None,
    augment_pair: AugmentPair | None = None, loss_stride: int = 1, seed: int = 0,
) -> Recipe:
    """A dense network and all its exits learn from labels, end to end, with masks on where it has any.

    ADP-C (arXiv:2104.00749), 3.2 and its appendix: the sum of the exits' losses, each weighing 1 unless ``weights``
    says otherwise, SGD from 0.01 by poly 0.9. ``offramp.mask_(net)`` trains what its dense simulation says, so that
    gradients of what is settled reach the exit that said it, and of what is interpolated the lambdas, which learn with
    their convolutions; a plain network with exits trains without masks. ``channel_weights`` are those of classes.
    For poses ``says="heatmaps"``: labels are float heatmaps of the output's size, NaN where they do not count, and the
    loss is the mean squared error; the paper's are Adam's (``dataclasses.replace(..., optimiser="adamw")``), masks on
    from epoch 10 (``mask_from``), since all values are near zero before.

    Our momentum is Nesterov's, and biases, norms and lambdas do not decay; the paper says nothing of either.
    """
    made = joint(epochs=epochs, weights=weights, lr=lr, batch_size=batch_size, weight_decay=weight_decay, warmup=0.0,
                 clip=clip, augment_pair=augment_pair, loss_stride=loss_stride, seed=seed)
    step = AnytimeStep(says=says, mask_from=mask_from,
                       channel_weights=None if channel_weights is None else tuple(channel_weights))
    return replace(made, momentum=momentum, anytime=step)


def flip(images: Tensor) -> Tensor:
    """Mirror half of a batch (N, C, H, W) from left to right."""
    return torch.where((torch.rand(len(images)) < 0.5).to(images.device)[:, None, None, None], images.flip(-1), images)


def flip_shift(images: Tensor) -> Tensor:
    """Mirror half of a batch and shift each image by up to an eighth of its size, over a border of zeros."""
    height, width = images.shape[-2:]
    up, left = max(1, height // 8), max(1, width // 8)
    padded = F.pad(flip(images), (left, left, up, up))
    rows = torch.randint(0, 2 * up + 1, (len(images), 1)) + torch.arange(height)
    columns = torch.randint(0, 2 * left + 1, (len(images), 1)) + torch.arange(width)
    rows, columns = rows.to(images.device), columns.to(images.device)
    each = torch.arange(len(images), device=images.device)
    shifted = padded.permute(0, 2, 3, 1)[each[:, None, None], rows[:, :, None], columns[:, None, :]]
    return shifted.permute(0, 3, 1, 2).contiguous()

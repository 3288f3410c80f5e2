"""Training of a network at all its widths: SlimSeg's Algorithm 1, one backward pass for each, one step for all.

Axes: N samples, K classes, E widths, the widest first.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import DataError, OfframpError
from offramp.functional.boundary import boundary_labels
from offramp.functional.losses import (
    binary_cross_entropy,
    cross_entropy,
    kl_to_teacher,
    ohem_cross_entropy,
    soft_cross_entropy,
)
from offramp.functional.metrics import confusion, mean_iou
from offramp.nn.boundary import boundary_head, running_at, tapped, widths_of
from offramp.nn.multiexit import MultiExit
from offramp.nn.output import read_logits
from offramp.nn.slim import Slimmable
from offramp.train.batches import Batch, Source, seed_all
from offramp.train.features import grid, labels_on, logits_on
from offramp.train.recipe import Recipe, SlimStep
from offramp.train.step import means, said_of

__all__ = ["WidthPass", "WidthSubject", "Widths", "alone", "width_loss"]

RECALIBRATED = 1024
"""Samples that norms are estimated on, at most."""


class Widths(nn.Module):
    """Logits at a width and, while a head hangs there, a boundary logit of every pixel."""

    def __init__(self, net: nn.Module, head: nn.Module | None, low: str | None) -> None:
        super().__init__()
        self.net, self.head, self.low = net, head, low

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], width: float) -> tuple[Tensor, Tensor | None]:
        if self.head is None or self.low is None:
            with running_at(width, self.net):
                return read_logits(self.net(*args, **kwargs)), None
        with running_at(width, self.net, self.head), tapped(self.net, self.low) as seen:
            logits = read_logits(self.net(*args, **kwargs))
            return logits, self.head(seen[-1])


class _Goal:
    """What every width of a batch is held against, on the grid where losses are computed."""

    def __init__(self, labels: Tensor, stride: int = 1, step: SlimStep | None = None) -> None:
        self.grid = grid(labels[:, None], stride)
        self.labels = labels_on(self.grid, labels)
        self.valid = self.labels != 255
        self.own = self.labels
        """What the widest says, once it has."""
        if step is not None and (step.boundary_weight or step.guided_weight):
            if labels.ndim != 3:
                raise DataError(expected="labels (N, H, W) for boundaries", got=str(tuple(labels.shape)), where="fit()",
                                todo="train with weights=(0, 0), which needs none")
            self.edges = labels_on(self.grid, boundary_labels(labels, step.radius))


class _Teacher:
    """Probabilities that the next width learns, of what wider ones said: of classes, and of a boundary."""

    def __init__(self, rule: str | None) -> None:
        self.rule, self.count = rule, 0
        self.classes: Tensor | None = None
        self.edges: Tensor | None = None

    def hear(self, logits: Tensor, edges: Tensor | None) -> None:
        if self.rule is None or (self.rule == "largest" and self.count):
            return
        self.count += 1
        # Soft cross-entropy is linear in the teacher: the mean of the losses is the loss against the mean.
        share = 1 / self.count if self.rule in ("mean", "larger") else 1.0
        soft = logits.detach().softmax(1)
        self.classes = soft if self.classes is None or share == 1 else self.classes.lerp(soft, share)
        if edges is not None:
            sure = edges.detach().sigmoid()
            self.edges = sure if self.edges is None or share == 1 else self.edges.lerp(sure, share)


def width_loss(logits: Tensor, edges: Tensor | None, goal: _Goal, teacher: _Teacher, step: SlimStep) -> Tensor:
    r"""L_seg + lambda_1 L_b + lambda_2 L_g of one width (SlimSeg, Eqs. 1-5), means over the pixels that count.

    logits (N, K, ...), edges (N, ...) or None. For L_seg and L_b these are the pixels with a label, for L_g those of
    them where the width's own head gives more than tau, or, without a head, the labels' boundary; none gives 0.
    """
    if teacher.classes is not None:
        loss = soft_cross_entropy(logits, teacher.classes, goal.valid)
    else:
        loss = (ohem_cross_entropy if step.ohem else cross_entropy)(logits, goal.labels)
    if edges is not None:
        told = goal.edges if teacher.edges is None else teacher.edges
        loss = loss + step.boundary_weight * binary_cross_entropy(edges, told, goal.valid)
    if step.guided_weight:
        near = goal.edges == 1 if edges is None else edges.detach().sigmoid() > step.tau
        near = near & goal.valid
        if teacher.classes is not None:
            guided = soft_cross_entropy(logits, teacher.classes, near)
        else:
            guided = cross_entropy(logits, torch.where(near, goal.labels, 255))
        loss = loss + step.guided_weight * guided
    return loss


class WidthPass:
    """Forward and backward of every width whose turn it is, one graph at a time."""

    def __init__(self, recipe: Recipe, widths: tuple[float, ...], model: nn.Module, accelerator: Any) -> None:
        assert recipe.slim is not None, "a recipe for widths"
        self.recipe, self.step, self.widths = recipe, recipe.slim, widths
        self.model, self.accelerator = model, accelerator

    def turn(self) -> list[int]:
        """Which widths a step trains; those between are drawn from torch's global generator."""
        count = len(self.widths)
        if self.step.sandwich is None or self.step.sandwich >= count - 2:
            return list(range(count))
        between = 1 + torch.randperm(count - 2)[: self.step.sandwich]
        return [0, *sorted(between.tolist()), count - 1]

    def __call__(self, batch: Batch, number: int, rows: int, scale: float) -> Tensor:
        """Leave gradients of ``scale`` times the sum of losses; (E, 6) sums of what was said over so many rows."""
        assert batch.labels is not None, "recipes for widths read labels"
        goal, teacher = _Goal(batch.labels, self.recipe.loss_stride, self.step), _Teacher(self.step.teacher)
        sums = torch.zeros(len(self.widths), 6, dtype=torch.float64, device=batch.labels.device)
        for k in self.turn():
            logits, edges = self.model(batch.args, batch.kwargs, self.widths[k])
            logits = logits_on(goal.grid, logits)
            edges = None if edges is None else logits_on(goal.grid, edges)[:, 0]
            loss = width_loss(logits, edges, goal, teacher, self.step)
            if k == 0:
                goal.own = logits.detach().argmax(1)
            sums[k] = said_of(logits, loss, goal, rows, look=True)
            teacher.hear(logits, edges)
            self.accelerator.backward(loss * scale)
        return sums


def alone(accelerator: Any) -> None:
    """OfframpError in one of several processes."""
    if accelerator.num_processes > 1:
        raise OfframpError(expected="one process", got=f"{accelerator.num_processes}", where="fit() of widths",
                           todo="train on one device; gradients of one width after another are not gathered")


class WidthSubject:
    """A network's widths as ``fit`` trains them; see :class:`offramp.train.subject.Subject`."""

    def __init__(self, net: nn.Module, recipe: Recipe) -> None:
        self.net, self.recipe, self.owner = net, recipe, net
        self.widths = widths_of(net)
        self.columns = [f"{width:g}" for width in self.widths]
        self.partial, self.fingerprint = True, ""
        self.faults: list[str] = []
        self.extra: nn.Module | None = None
        step = recipe.slim
        if step is None:
            raise OfframpError(expected="a network with exits, or recipes.slim()", got=f"{type(net).__name__}, which "
                               "has none, and a recipe for exits", where="fit()",
                               todo="offramp.attach hangs exits on a network, offramp.slim_ gives it widths")
        if isinstance(net, Slimmable) and isinstance(net.backbone, MultiExit):
            raise OfframpError(expected="a slimmable network without exits", got="one with them", where="fit()",
                               todo="train the widths of the plain network: slim_ and fit come before attach")
        self.step = step

    def set_modes(self) -> None:
        self.net.train()

    def example(self, source: Source) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        device = next(self.net.parameters()).device
        first = next(iter(source.sweep())).rows(slice(0, 1)).map(lambda tensor: tensor.to(device))
        return first.args, first.kwargs

    def module(self, source: Source) -> nn.Module:
        if self.step.boundary is not None:
            args, kwargs = self.example(source)
            seed_all(self.recipe.seed, 3)
            device = next(self.net.parameters()).device
            self.extra = boundary_head(self.net, self.step.boundary, *args, **kwargs).to(device).train()
        return Widths(self.net, self.extra, self.step.boundary)

    def passes(self, module: nn.Module, model: nn.Module, accelerator: Any, steps: int) -> WidthPass:
        alone(accelerator)
        return WidthPass(self.recipe, self.widths, model, accelerator)

    def finish(self, source: Source, device: torch.device) -> str:
        """Before the last epoch's record: after US-Net's rule norms are estimated anew, at every width."""
        if self.step.sandwich is None or not isinstance(self.net, Slimmable):
            return ""
        seen = 0

        def batches() -> Iterator[Any]:
            nonlocal seen
            for (batch,) in source.windows(self.recipe.epochs, 1, 0):  # as another epoch would shuffle them
                if seen >= RECALIBRATED:
                    return
                seen += len(batch)
                batch = batch.map(lambda tensor: tensor.to(device))
                yield batch.args or batch.kwargs

        self.net.recalibrate_(batches(), self.net.widths)
        return f"norms: estimated anew at {len(self.widths)} widths on {seen} samples"

    def measure(self, source: Source, device: torch.device) -> dict[str, dict[str, float]]:
        """KL to the widest, agreement with it, accuracy and, for maps, mIoU of every width."""
        sums = torch.zeros(len(self.widths), 6, dtype=torch.float64, device=device)
        matrices: dict[int, Tensor] = {}
        said = Widths(self.net, None, None)
        with torch.no_grad():
            for batch in source.sweep():
                batch = batch.map(lambda tensor: tensor.to(device))
                assert batch.labels is not None, "recipes for widths read labels"
                goal = _Goal(batch.labels)
                widest: Tensor | None = None
                for k, width in enumerate(self.widths):
                    logits = logits_on(goal.grid, said(batch.args, batch.kwargs, width)[0])
                    widest = logits if widest is None else widest
                    goal.own = widest.argmax(1)
                    sums[k] += said_of(logits, kl_to_teacher(logits, widest), goal, len(batch), look=True)
                    if logits.ndim == 4:
                        found = confusion(logits.argmax(1), goal.labels, logits.shape[1]).sum(0).long()
                        matrices[k] = matrices.get(k, 0) + found
        made = means(sums.cpu(), self.columns)
        if matrices and any(matrix.any() for matrix in matrices.values()):
            made["miou"] = {self.columns[k]: float(mean_iou(matrix.cpu())) for k, matrix in matrices.items()}
        return made

"""Training of all exits of a dense network at once, with masks on or off: ADP-C (arXiv:2104.00749), 3.2 and 3.4.

Axes: N samples, K classes or heatmaps, E trained columns.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from offramp.errors import DataError, OfframpError
from offramp.functional.losses import cross_entropy, kl_to_teacher, squared_error
from offramp.functional.metrics import confusion, mean_iou
from offramp.nn.masked import Masked
from offramp.nn.multiexit import MultiExit
from offramp.train.batches import Batch, Source
from offramp.train.features import grid, labels_on, logits_on
from offramp.train.recipe import AnytimeStep, Recipe
from offramp.train.step import means, said_of

__all__ = ["AnytimePass", "AnytimeSubject", "Progression"]


class Progression(nn.Module):
    """Logits of every exit of one pass, masked where that is asked for and the network can be."""

    def __init__(self, net: Masked | MultiExit) -> None:
        super().__init__()
        self.net = net

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], masked: bool) -> list[Tensor]:
        net = self.net if masked or not isinstance(self.net, Masked) else self.net.net
        return net(*args, **kwargs)  # type: ignore[no-any-return]


class _Goal:
    """What all exits of a batch are held against, on the grid where losses are computed."""

    def __init__(self, step: AnytimeStep, labels: Tensor | None, logits: list[Tensor], stride: int = 1) -> None:
        assert labels is not None, "recipes of anytime networks read labels"
        self.step, final = step, logits[-1]
        self.weights = None if step.channel_weights is None else final.new_tensor(step.channel_weights).float()
        self.labels, self.logits = labels, logits
        if step.says == "heatmaps":
            if labels.shape != final.shape or not labels.is_floating_point():
                raise DataError(expected=f"float heatmaps {tuple(final.shape)}, as the network's own", where="fit()",
                                got=f"{labels.dtype} {tuple(labels.shape)}",
                                todo="draw them at the size of the network's output, NaN where they do not count")
            return
        if labels.ndim != 3:
            raise DataError(expected="labels (N, H, W) of pixels", got=str(tuple(labels.shape)), where="fit()")
        size = grid(labels[:, None], stride)
        self.labels, self.logits = labels_on(size, labels), [logits_on(size, one) for one in logits]
        self.own = self.logits[-1].detach().argmax(1)

    def loss(self, logits: Tensor) -> Tensor:
        if self.step.says == "heatmaps":
            return squared_error(logits, self.labels, self.weights)
        return cross_entropy(logits, self.labels, weights=self.weights)


class AnytimePass:
    """Forward and backward of all exits, one graph, since later answers carry earlier ones over."""

    def __init__(self, subject: "AnytimeSubject", model: nn.Module, accelerator: Any, steps: int) -> None:
        recipe = subject.recipe
        self.step, self.stride, self.subject = subject.step, recipe.loss_stride, subject
        self.model, self.accelerator = model, accelerator
        self.mask_from = self.step.mask_from * (steps // recipe.epochs)

    def __call__(self, batch: Batch, number: int, rows: int, scale: float) -> Tensor:
        """Leave gradients of ``scale`` times the loss; (E, 6) sums of what was said over so many rows."""
        said = self.model(batch.args, batch.kwargs, number >= self.mask_from)
        goal = _Goal(self.step, batch.labels, said, self.stride)
        sums, total = [], torch.zeros((), device=said[-1].device)
        for column, weight in self.subject.weights.items():
            loss = goal.loss(goal.logits[column])
            sums.append(said_of(goal.logits[column], loss, goal, rows, look=self.step.says == "classes"))
            total = total + weight * loss
        self.accelerator.backward(total * scale)
        return torch.stack(sums)


@final
class AnytimeSubject:
    """A dense network with exits, masked or not, as ``fit`` trains it; see :class:`offramp.train.subject.Subject`."""

    def __init__(self, net: nn.Module, recipe: Recipe) -> None:
        exits = net.net if isinstance(net, Masked) else net
        if recipe.anytime is None:
            raise OfframpError(expected="recipes.anytime() for a masked network", got="another recipe", where="fit()",
                               todo="or train masked.unmask_(), and mask it again")
        if not isinstance(net, Masked | MultiExit) or not isinstance(exits, MultiExit) or exits.task != "dense":
            raise OfframpError(expected="a network with exits that labels pixels (task 'dense'), masked or not",
                               got=type(net).__name__, where="fit() by recipes.anytime()",
                               todo="offramp.attach gives one, offramp.mask_ masks it")
        self.net, self.exits, self.recipe, self.step = net, exits, recipe, recipe.anytime
        self.owner: nn.Module = net
        self.extra: nn.Module | None = None
        self.partial = True  # masks leave lambdas out, and weights of 0 leave heads out
        names, channels = [column.name for column in exits.columns], self.step.channel_weights
        fits = len(recipe.weights or names) == len(names)
        self.faults = [] if fits else [f"{len(names)} weights, not {recipe.weights}"]
        if channels is not None and len(channels) != exits.num_classes:
            self.faults.append(f"{exits.num_classes} channel_weights, not {len(channels)}")
        weighed = zip(names, recipe.weights or (1.0,) * len(names), strict=False)
        self.weights = {column: weight for column, (_, weight) in enumerate(weighed) if weight}
        self.columns = [names[column] for column in self.weights]
        self.fingerprint = str(net.rule) if isinstance(net, Masked) else ""

    def set_modes(self) -> None:
        self.net.train()

    def example(self, source: Source) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        return self.exits.traced.example()

    def module(self, source: Source) -> Progression:
        return Progression(self.net)

    def passes(self, module: nn.Module, model: nn.Module, accelerator: Any, steps: int) -> AnytimePass:
        return AnytimePass(self, model, accelerator, steps)

    def finish(self, source: Source, device: torch.device) -> str:
        return ""

    def measure(self, source: Source, device: torch.device) -> dict[str, dict[str, float]]:
        """Of every exit, masks on: KL to the last one, agreement with it, accuracy and mIoU; of heatmaps the loss.

        Of a masked network also ``density``, the mean share of places where each exit and the stage before it are
        computed, and ``macs``, the mean of ``masked.macs``.
        """
        names, pixels = [column.name for column in self.exits.columns], self.step.says == "classes"
        classes, count, rows = self.exits.num_classes, len(names), 0
        sums = torch.zeros(count, 6, dtype=torch.float64, device=device)
        matrices = torch.zeros(count, classes, classes, dtype=torch.int64, device=device)
        spent = torch.zeros(2, count, dtype=torch.float64)
        with torch.no_grad():
            for batch in source.sweep():
                batch = batch.map(lambda tensor: tensor.to(device))
                rows += len(batch)
                if isinstance(self.net, Masked):
                    answers, macs = self.net.counted(*batch.args, **batch.kwargs)
                    logits, shares = answers.logits, [float(mask.double().mean()) for mask in answers.masks]
                    density = macs.new_tensor([1.0, *(shares or [1.0] * (count - 1))], dtype=torch.float64)
                    spent += len(batch) * torch.stack([macs.double().mean(0), density])
                else:
                    logits = self.net(*batch.args, **batch.kwargs)
                goal = _Goal(self.step, batch.labels, logits)
                for k, said in enumerate(goal.logits):
                    loss = kl_to_teacher(said, goal.logits[-1]) if pixels else goal.loss(said)
                    sums[k] += said_of(said, loss, goal, len(batch), look=pixels)
                    if pixels:
                        matrices[k] += confusion(said.argmax(1), goal.labels, classes).sum(0)
        found = {name: values for name, values in means(sums.cpu(), names).items() if values}
        if matrices.any():
            found["miou"] = dict(zip(names, mean_iou(matrices.cpu()).tolist(), strict=True))
        if isinstance(self.net, Masked):
            found["macs"], found["density"] = (dict(zip(names, (row / rows).tolist(), strict=True)) for row in spent)
        return found

"""One batch: through the network or the heads alone, the losses, their gradients, and what the exits said.

Axes: N samples, E trained columns, K classes.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from offramp.functional.losses import Lesson, cross_entropy, kl_to_teacher
from offramp.functional.metrics import confusion, mean_iou
from offramp.train.batches import Batch, Source
from offramp.train.features import frontiers, grid, labels_on, logits_on
from offramp.train.recipe import Recipe

if TYPE_CHECKING:
    from offramp.nn.multiexit import MultiExit

__all__ = ["Exits", "Goal", "Pass", "means", "measure", "said_of", "trained"]

LOOKED_AT = 8
"""Columns whose answers are compared with labels and teacher in a step, in turn: of hundreds, that would cost as much
as their training."""


def trained(net: "MultiExit", recipe: Recipe) -> list[int]:
    """Which columns a recipe ever trains: all that weigh more than 0, the final one unless it is frozen."""
    count = len(net.columns) - recipe.freeze
    weights = recipe.weights or (1.0,) * count
    return [c for c in range(count - 1 if recipe.dropout == "all" else 0, count) if weights[c]]


class Exits(nn.Module):
    """Logits of some early columns: of the whole network, with its own behind them, or of the heads on frontiers."""

    def __init__(self, net: "MultiExit", *, heads_alone: bool, stride: int = 1) -> None:
        super().__init__()
        self.owner = net.heads if heads_alone else net
        self._net, self.heads_alone, self.stride = [net], heads_alone, stride  # in a list, lest it be a submodule
        order = {site.name: k for k, site in enumerate(net.sites)}
        self.sites = [order[column.site] for column in net.columns[:-1]]

    def head(self, column: int, frontier: Sequence[Tensor]) -> Tensor:
        """What one head says; dense logits at the map's own size where losses are coarser than the output anyway."""
        net = self._net[0]
        head = net.head(net.columns[column].name)
        coarse = self.stride > 1 and net.task == "dense" and hasattr(head, "coarse")
        return head.coarse(*frontier) if coarse else head(*frontier)  # type: ignore[no-any-return,operator]

    def frontiers(self, batch: Batch) -> tuple[Sequence[tuple[Tensor, ...]], Tensor]:
        """Tensors at every site and the network's own logits, without gradients."""
        if batch.teacher is not None:
            return batch.args, batch.teacher
        with torch.no_grad():
            return frontiers(self._net[0], batch)

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], columns: tuple[int, ...]) -> list[Tensor]:
        if self.heads_alone:
            return [self.head(column, args[self.sites[column]]) for column in columns]
        net, said = self._net[0], []
        state = net.begin(*args, **kwargs)
        for k, stage in enumerate(net.stages[:-1]):
            state = stage(state)
            said += [self.head(column, state.tensors) for column in net.columns_at(k) if column in columns]
        return [*said, net.logits(net.stages[-1](state))]


class Goal(Protocol):
    """What an answer is compared with."""

    @property
    def labels(self) -> Tensor | None: ...
    @property
    def own(self) -> Tensor:
        """The classes that the network itself names."""
        ...


class _Goal:
    """What all exits of a batch are held against, on the grid where losses are computed."""

    def __init__(self, recipe: Recipe, teacher: Tensor, labels: Tensor | None, stride: int) -> None:
        self.recipe, self.grid = recipe, grid(teacher, stride)
        self.teacher = self.resized(teacher.detach())
        self.labels = None if labels is None else labels_on(self.grid, labels)
        self.own = self.teacher.argmax(1)

    @cached_property
    def lesson(self) -> Lesson:
        assert self.labels is not None, "the recipe reads labels"
        recipe = self.recipe
        return Lesson(self.labels, self.teacher, recipe.alpha, recipe.temperature, filtered=recipe.loss == "pfd")

    def resized(self, logits: Tensor) -> Tensor:
        return logits_on(self.grid, logits)

    def loss(self, logits: Tensor) -> Tensor:
        """The recipe's, of logits on the grid."""
        if self.labels is None:
            return kl_to_teacher(logits, self.teacher, self.recipe.temperature)
        return cross_entropy(logits, self.labels) if self.recipe.loss == "labels" else self.lesson(logits)


class Pass:
    """Forward and backward of the columns whose turn it is."""

    def __init__(self, net: "MultiExit", recipe: Recipe, exits: Exits, model: nn.Module, accelerator: Any,
                 steps: int) -> None:
        self.steps = steps
        self.recipe, self.exits, self.model, self.accelerator = recipe, exits, model, accelerator
        self.columns = trained(net, recipe)
        weights = recipe.weights or (1.0,) * len(net.columns)
        self.weights = {c: weights[c] for c in self.columns}
        self.final = len(net.columns) - 1
        # Heads of a frozen network share nothing: one after another, each graph is freed before the next is built.
        # Compiled, or in several processes, one graph of all is faster, or needed to gather the gradients.
        self.one_by_one = recipe.freeze and accelerator.num_processes == 1 and model is exits

    def __call__(self, batch: Batch, step: int, rows: int, scale: float) -> Tensor:
        """Leave gradients of ``scale`` times the loss; (E, 6) sums of what was said over so many rows."""
        stride = 1 if batch.teacher is not None else self.recipe.loss_stride  # features come on their grid
        early = [c for c in self.columns if c != self.final]
        turn = tuple(early[i] for i in self.recipe.turn(step, len(early)))
        place = {c: k for k, c in enumerate(self.columns)}
        sums: dict[int, Tensor] = {}
        every = max(1, -(-len(turn) // LOOKED_AT))
        distill = self.recipe.distill_at(step, self.steps)

        def weigh(column: int, logits: Tensor, goal: _Goal) -> Tensor:
            logits = goal.resized(logits)
            loss = goal.loss(logits)
            sums[place[column]] = said_of(logits, loss, goal, rows, look=(step + column) % every == 0)
            loss = loss * self.weights[column]
            if distill and column != self.final:
                loss = loss + distill * kl_to_teacher(logits, goal.teacher, self.recipe.temperature)
            return loss * scale

        if self.one_by_one:
            with self.accelerator.autocast():
                frontiers, teacher = self.exits.frontiers(batch)
            goal = _Goal(self.recipe, teacher, batch.labels, stride)
            for column in turn:
                with self.accelerator.autocast():
                    logits = self.exits.head(column, frontiers[self.exits.sites[column]])
                loss = weigh(column, logits, goal)
                if loss.requires_grad:  # a head may be left as it is
                    self.accelerator.backward(loss)
        else:
            said = self.model(batch.args, batch.kwargs, turn)
            goal = _Goal(self.recipe, said[-1] if batch.teacher is None else batch.teacher, batch.labels, stride)
            wanted = [*turn, self.final] if self.final in self.weights else turn
            losses = [weigh(c, logits, goal) for c, logits in zip(wanted, said, strict=False)]
            self.accelerator.backward(torch.stack(losses).sum())
        whole = next(iter(sums.values())).new_zeros(len(self.columns), 6)
        whole[list(sums)] = torch.stack(list(sums.values()))
        return whole


def said_of(logits: Tensor, loss: Tensor, goal: Goal, rows: int, look: bool) -> Tensor:
    """(6,): loss, agreement and accuracy of one column, each times the samples it was measured on, and these."""
    with torch.no_grad():
        made = torch.zeros(6, dtype=torch.float64, device=loss.device)
        made[0], made[1] = loss.detach() * rows, rows
        if look:
            answers = logits.argmax(1)
            made[2], made[3] = (answers == goal.own).double().mean() * rows, rows
            if goal.labels is not None:
                valid = goal.labels != 255
                known = valid.any() * rows
                made[4] = ((answers == goal.labels) & valid).sum() / valid.sum().clamp(min=1) * known
                made[5] = known
        return made


def means(sums: Tensor, columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """Sums (E, 6) as means by name, of those columns that were looked at."""
    made: dict[str, dict[str, float]] = {}
    for name, part in zip(("loss", "agreement", "accuracy"), sums.split(2, dim=1), strict=True):
        made[name] = {column: total / count for column, (total, count) in zip(columns, part.tolist(), strict=True)
                      if count}
    return made


def measure(net: "MultiExit", recipe: Recipe, source: Source, device: torch.device) -> dict[str, dict[str, float]]:
    """KL to the network, agreement, and against labels accuracy (dense: mIoU too) of all trained columns.

    Where labels are read, the final column is measured even if it is frozen.
    """
    columns = trained(net, recipe)
    if recipe.reads_labels and columns[-1] != len(net.columns) - 1:
        columns.append(len(net.columns) - 1)
    names = [net.columns[c].name for c in columns]
    exits = Exits(net, heads_alone=False)
    sums = torch.zeros(len(columns), 6, dtype=torch.float64, device=device)
    matrices = torch.zeros(len(columns), net.num_classes, net.num_classes, dtype=torch.int64, device=device)
    dense = net.task == "dense" and recipe.reads_labels
    with torch.no_grad():
        for batch in source.sweep():
            batch = batch.map(lambda t: t.to(device))
            frontiers, teacher = exits.frontiers(batch)
            fine, coarse = _Goal(recipe, teacher, batch.labels, 1), _Goal(recipe, teacher, None, recipe.loss_stride)
            for k, c in enumerate(columns):
                said = teacher if c == len(exits.sites) else exits.head(c, frontiers[exits.sites[c]])
                said = fine.resized(said)
                loss = kl_to_teacher(coarse.resized(said), coarse.teacher)
                sums[k] += said_of(said, loss, fine, len(batch), look=True)
                if dense and fine.labels is not None:
                    matrices[k] += confusion(said.argmax(1), fine.labels, net.num_classes).sum(0)
    found = means(sums.cpu(), names)
    if dense:
        found["miou"] = dict(zip(names, mean_iou(matrices.cpu()).tolist(), strict=True)) if matrices.any() else {}
    return found

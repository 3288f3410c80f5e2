"""What a run trains: the exits of a network, masked or not, or its widths. The loop is the same."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from offramp.errors import OfframpError
from offramp.nn.masked import Masked
from offramp.nn.multiexit import MultiExit, columns_at
from offramp.nn.slim import Slimmable
from offramp.train.anytime import AnytimeSubject
from offramp.train.batches import Batch, Source
from offramp.train.features import Features, module_fingerprint
from offramp.train.recipe import Recipe
from offramp.train.setup import set_modes
from offramp.train.step import Exits, Pass, measure, trained
from offramp.train.widths import WidthSubject, alone

__all__ = ["ExitSubject", "Subject", "WidthExits", "subject_of"]


class Subject(Protocol):
    """A network with what a recipe does to it."""

    @property
    def net(self) -> nn.Module:
        """As the caller gave it."""
        ...

    owner: nn.Module
    """Whose parameters learn, and are kept in the checkpoint."""
    extra: nn.Module | None
    """What learns along and is gone at the end; there once ``module`` was asked for."""
    columns: list[str]
    """What is logged apart."""
    partial: bool
    """Whether a step may leave out parameters that learn."""
    faults: list[str]
    """What of the recipe does not fit the network."""
    fingerprint: str
    """Of what must be the same for a run to go on; empty where all of it is in the checkpoint."""

    def set_modes(self) -> None:
        """Train and eval modes, and which parameters take gradients."""
        ...

    def example(self, source: Source) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Inputs of the network, by place and by name."""
        ...

    def module(self, source: Source) -> nn.Module:
        """What a pass calls, to be compiled and distributed."""
        ...

    def passes(self, module: nn.Module, model: nn.Module, accelerator: Any, steps: int
               ) -> Callable[[Batch, int, int, float], Tensor]:
        """Forward and backward of one batch; ``model`` is what became of ``module``."""
        ...

    def finish(self, source: Source, device: torch.device) -> str:
        """What is done after the last step; a note of it, or nothing."""
        ...

    def measure(self, source: Source, device: torch.device) -> dict[str, dict[str, float]]:
        """By measure and column, on the whole source."""
        ...


def subject_of(net: nn.Module, recipe: Recipe) -> Subject:
    """The exits of a network that has some, else its widths; OfframpError where the recipe is for the other."""
    if recipe.anytime is not None or isinstance(net, Masked):
        return AnytimeSubject(net, recipe)
    if isinstance(net, Slimmable) and isinstance(net.backbone, MultiExit) and recipe.slim is None:
        return WidthExits(net, net.backbone, recipe)
    if not isinstance(net, MultiExit):
        return WidthSubject(net, recipe)
    if recipe.slim is not None:
        raise OfframpError(expected="a network of several widths, or a plain one", got="one with exits", where="fit()",
                           todo="train its widths first: fit(offramp.slim_(model, ...), data, recipes.slim())")
    return ExitSubject(net, recipe)


@final
class ExitSubject:
    """A network's exits, and the network itself unless the recipe leaves it as it is."""

    def __init__(self, net: MultiExit, recipe: Recipe) -> None:
        self.net, self.recipe = net, recipe
        self.owner: nn.Module = net.heads if recipe.freeze else net
        self.extra: nn.Module | None = None
        count = len(net.columns) - recipe.freeze
        fits = recipe.weights is None or len(recipe.weights) == count
        self.faults = [] if fits else [f"{count} weights, not {recipe.weights}"]
        chosen = trained(net, recipe) if fits else []
        self.columns = [net.columns[c].name for c in chosen]
        self.partial = not recipe.freeze or recipe.dropout is not None or len(chosen) < count
        self.fingerprint = module_fingerprint(net.backbone) if recipe.freeze else ""

    def set_modes(self) -> None:
        set_modes(self.net, self.recipe)

    def example(self, source: Source) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        return self.net.traced.example()

    def module(self, source: Source) -> Exits:
        return Exits(self.net, heads_alone=isinstance(source, Features), stride=self.recipe.loss_stride)

    def passes(self, module: nn.Module, model: nn.Module, accelerator: Any, steps: int) -> Pass:
        assert isinstance(module, Exits)
        return Pass(self.net, self.recipe, module, model, accelerator, steps)

    def finish(self, source: Source, device: torch.device) -> str:
        return ""

    def measure(self, source: Source, device: torch.device) -> dict[str, dict[str, float]]:
        return measure(self.net, self.recipe, source, device)


@final
class WidthExits:
    """The exits of a frozen network at all its widths in one step: at each they learn as :class:`ExitSubject`'s do.

    What a width's own end says is their teacher there. SlimSeg trains no exits; that they share weights across widths,
    and have norms of their own at each, is what it does to the rest of a network.
    """

    def __init__(self, net: Slimmable, exits: MultiExit, recipe: Recipe) -> None:
        self.net, self.recipe = net, recipe
        self.inner = ExitSubject(exits, recipe)
        self.exits, self.owner, self.fingerprint = exits, self.inner.owner, self.inner.fingerprint
        self.extra: nn.Module | None = None
        trains = [column for column in exits.columns if column.name in self.inner.columns]
        self.columns = [column.name for column in columns_at(trains, net.widths)]
        self.partial = True
        self.faults = [*self.inner.faults, *([] if recipe.freeze else [
            "a recipe that leaves the network as it is: train its widths before, by recipes.slim(), without exits"])]

    def set_modes(self) -> None:
        self.inner.set_modes()

    def example(self, source: Source) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        return self.inner.example(source)

    def module(self, source: Source) -> Exits:
        return self.inner.module(source)

    def passes(self, module: nn.Module, model: nn.Module, accelerator: Any, steps: int
               ) -> Callable[[Batch, int, int, float], Tensor]:
        alone(accelerator)
        one = self.inner.passes(module, model, accelerator, steps)

        def every(batch: Batch, number: int, rows: int, scale: float) -> Tensor:
            said = []
            for width in self.net.widths:
                with self.net.at(width):
                    said.append(one(batch, number, rows, scale))
            return torch.cat(said)

        return every

    def finish(self, source: Source, device: torch.device) -> str:
        return ""

    def measure(self, source: Source, device: torch.device) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for width in self.net.widths:
            with self.net.at(width):
                for measure_name, values in self.inner.measure(source, device).items():
                    named = {name if width == 1 else f"{name}@{width:g}": value for name, value in values.items()}
                    found.setdefault(measure_name, {}).update(named)
        return found

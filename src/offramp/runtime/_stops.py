"""Eager work that can be given up between two layers: the same graph, which asks before each of them."""

import operator
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from offramp.errors import OfframpError
from offramp.graph import Stage, Traced, begin, split
from offramp.runtime._direct import direct

__all__ = ["GivenUp", "Stoppable", "stoppable"]

class GivenUp(Exception):
    """The work was told to stop."""


def stoppable(module: fx.GraphModule) -> Callable[..., Any]:
    """The same graph over the same modules, as a function that takes ``stop`` behind its inputs and raises GivenUp
    where ``stop()`` says True before one of its layers.

    It asks where there is something to save: before layers with matrices of weights, and before functions that are not
    an operator's. That is some tenths of a microsecond each; a graph of its own leaves calls that nobody will stop
    without even these.
    """
    made = direct(module)
    graph = made.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        stop = graph.placeholder("stop")
    for node in list(graph.nodes):
        if _works(node, made):
            with graph.inserting_before(node):
                graph.call_function(_ask, (stop,))
    made.recompile()
    # not made itself: what fx wraps around an exception takes a millisecond
    return made.forward


def _works(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return any(weight.ndim > 1 for weight in module.get_submodule(str(node.target)).parameters())
    return node.op == "call_function" and node.target is not getattr and getattr(
        node.target, "__module__", "") != operator.add.__module__


def _ask(stop: Callable[[], bool]) -> None:
    if stop():
        raise GivenUp


class Stoppable:
    """A module that asks between its layers, cut open at the first call; one that cannot be traced asks before it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._whole: tuple[Traced, Stage] | None = None
        self._tried, self._lock = False, threading.Lock()

    def __call__(self, stop: Callable[[], bool], *inputs: Tensor) -> Any:
        _ask(stop)
        if not (self._tried or len(inputs[0])):  # nothing to cut it open with
            return self._module(*inputs)
        if not self._tried:
            with self._lock:
                if not self._tried:
                    self._whole, self._tried = self._opened(inputs), True
        if self._whole is None:
            return self._module(*inputs)
        traced, stage = self._whole
        return stage(begin(traced, *inputs), stop)

    def _opened(self, inputs: tuple[Tensor, ...]) -> tuple[Traced, Stage] | None:
        try:
            traced = Traced(self._module, inputs, {})
            return traced, split(traced, [])[0].compiled(stoppable)
        except OfframpError:
            return None

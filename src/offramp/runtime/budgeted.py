"""Budgeted: a static sub-model that ends at one exit (MESS, arXiv:2106.03527, 5.1). What lies deeper is let go of."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from offramp.errors import OfframpError
from offramp.graph import Stage, State
from offramp.graph.trace import Program
from offramp.runtime._legs import Leg, Legs

__all__ = ["Kept", "cut_short", "reads"]


def cut_short(legs: Legs, answer: Callable[[Tensor], Any]) -> Legs:
    """One leg instead of two: to the exit, whose logits ``answer`` puts in the form of the network's output.

    The tensors that only deeper layers read become one zero each, spread over the old shape without memory and known to
    no ``state_dict``: inputs of a new kind can still be traced, which runs the network to its end.
    """
    first = legs.legs[0]
    used = {id(tensor) for tensor in reads(first.plain.module())}
    module = Kept(legs.module, used)
    ends = [Ending(leg, answer, module) for leg in (first, replace(first, stage=first.plain, extras=0, mark=False))]
    return replace(legs, legs=(replace(first, stage=ends[0], plain=ends[1], head=None, extras=0, mark=False,
                                       asking=first.asking and ends[0], asking_head=None),), module=module)


class Ending(Stage):
    """From the inputs to an exit's answer."""

    def __init__(self, leg: Leg, answer: Callable[[Tensor], Any], kept: "Kept") -> None:
        super().__init__(leg.plain.traced, leg.plain.first, leg.plain.last)
        self._leg, self._answer, self._kept = leg, answer, kept
        self._proved: set[Program] = {leg.plain.traced.program}

    def __call__(self, state: State, *more: Any) -> Any:
        if state.program not in self._proved:
            # Another kind of input may take another way through the network: not one that reads what is gone.
            if self._kept.misses(self._leg.plain.module(state.program)):
                raise OfframpError(
                    expected="inputs that take the way through the network that its example took", where="deploy()",
                    got="inputs that need weights beyond the exit", todo="deploy with such inputs as the example.",
                )
            self._proved.add(state.program)
        return self._answer(self._leg.run(state, *more)[1])


class Kept(nn.ModuleList):
    """The guest and its head, of which only the tensors in ``used`` are still there."""

    def __init__(self, modules: nn.Module, used: set[int]) -> None:
        super().__init__(cast(nn.ModuleList, modules))
        self.gone: list[tuple[nn.Module, str]] = []
        for module in self[0].modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in list(held.items()):
                    if tensor is not None and id(tensor) not in used:
                        del held[name]
                        module._non_persistent_buffers_set.discard(name)
                        self.gone.append((module, name))
                        vars(module)[name] = _nothing(tensor.detach().new_zeros(()), tensor)
            if "_flat_weights" in vars(module):  # recurrent networks list their weights once more
                vars(module)["_flat_weights"] = [getattr(module, name) for name in vars(module)["_flat_weights_names"]]
        self.training = False
        self.register_load_state_dict_post_hook(_not_invented)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Any, recurse: bool = True) -> "Kept":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name in self.gone:
            old = vars(module)[name]
            vars(module)[name] = _nothing(fn(old.new_zeros(())), old)
        return self

    def misses(self, graph: fx.GraphModule) -> bool:
        """Whether a graph reads what is gone."""
        gone = {id(vars(module)[name]) for module, name in self.gone}
        return any(id(tensor) in gone for tensor in reads(graph))


def _not_invented(module: nn.Module, keys: Any) -> None:
    """A batch norm adds the count of its batches to weights that come without: one that is gone has nowhere for it."""
    keys.unexpected_keys[:] = [key for key in keys.unexpected_keys if not key.endswith(".num_batches_tracked")]


def _nothing(zero: Tensor, like: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return zero.expand(like.shape)


def reads(graph: fx.GraphModule) -> Iterator[Tensor]:
    """The guest's tensors that a stage reads."""
    for node in graph.graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        owner: Any = graph
        for part in str(node.target).split("."):
            owner = getattr(owner, part)
        if isinstance(owner, Tensor):
            yield owner
        elif isinstance(owner, nn.Module):
            for module in owner.modules() if node.op == "call_module" else (owner,):
                for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
                    if isinstance(value, Tensor):
                        yield value

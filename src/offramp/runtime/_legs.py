"""The pieces that a deployed network runs: merged stages with a head each, copied, cast and compiled as asked."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from offramp.graph import Stage, State, Traced, begin, split
from offramp.nn.guest import fold_batch_norms_
from offramp.nn.multiexit import MultiExit
from offramp.nn.shortcut import ShortcutHead
from offramp.runtime._direct import direct
from offramp.runtime._stops import Stoppable, stoppable

__all__ = ["Build", "Call", "Engine", "Leg", "Legs", "build_legs", "chain"]

Engine = Literal["eager", "compile"]


@dataclass(frozen=True, kw_only=True)
class Build:
    """How the pieces are made."""

    engine: Engine
    dtype: torch.dtype | None
    channels_last: bool
    fold: bool

    def convert_(self, module: nn.Module) -> nn.Module:
        """Cast and lay out the weights."""
        if self.dtype is not None:
            module.to(self.dtype)
        if self.channels_last:
            module.to(memory_format=torch.channels_last)
        return module

    def prepare(self, inputs: Any) -> Any:
        """Inputs, cast and laid out as the weights are."""
        return pytree.tree_map(self._prepare, inputs) if self.dtype is not None or self.channels_last else inputs

    def _prepare(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        if self.channels_last and leaf.ndim == 4:
            return leaf.to(dtype=self.dtype or leaf.dtype, memory_format=torch.channels_last)
        return leaf if self.dtype is None else leaf.to(self.dtype)

    @property
    def copies(self) -> bool:
        """Whether weights change, so that they can no longer be shared with the guest."""
        return self.dtype is not None or self.channels_last or self.fold


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of one call."""


_KINDS = 64  # of inputs, whose programs are found at once


@dataclass(frozen=True)
class Leg:
    """One merged stage, and the head at its end; the last leg has none."""

    stage: Stage
    plain: Stage
    """The same, not compiled: its work can be counted."""
    head: nn.Module | None
    extras: int
    """How many of the stage's last values are its head's: a compiled leg says logits, perhaps a score, in one graph."""
    may_shrink: bool
    """Whether rows may be dropped at its end."""
    wide: torch.dtype | None
    """What logits are cast to, where the network is narrower."""
    mark: bool
    """Whether inputs are marked to be of any batch size, for the compiler."""
    reads: Callable[[Any], Tensor] | None = None
    """Of a leg that ends a narrower network: finds the logits in its output, which is not the last word."""
    fresh: Callable[[Call, Tensor | None], State] | None = None
    """Of a leg that begins another width: the state of these rows of the call, from its inputs."""
    asking: Stage | None = None
    """The stage as one that takes ``stop`` behind its state and asks before each layer whether to give up. None of a
    leg that is compiled: its layers are one."""
    asking_head: Stoppable | None = None

    def run(self, state: State, stop: Callable[[], bool] | None = None) -> tuple[State, Tensor, Tensor | None]:
        """To the leg's end: the state there, its exit's logits, and each pixel's score where that is compiled too.

        GivenUp where ``stop()`` says True before one of its layers.
        """
        after = self._advance(state, stop)
        if self.reads is not None:
            said = self.reads(after)
            return state, said if self.wide is None else said.to(self.wide), None
        if self.extras:
            said = after.values[-self.extras :]
            after = replace(after, values=after.values[: -self.extras])
            return after, said[0], said[1] if self.extras > 1 else None
        assert self.head is not None
        if stop is None or self.asking_head is None:
            logits: Tensor = self.head(*after.tensors)
        else:
            logits = self.asking_head(stop, *after.tensors)
        return after, logits if self.wide is None else logits.to(self.wide), None

    def only_stage(self, state: State, stop: Callable[[], bool] | None = None) -> Any:
        """To the leg's end without a word from the exit; the whole output at the last. GivenUp as ``run``."""
        if self.head is not None:
            after = self._advance(state, stop)
            return replace(after, values=after.values[: -self.extras]) if self.extras else after
        output = self._advance(state, stop)
        return output if self.wide is None else pytree.tree_map(self._widen, output)

    def _advance(self, state: State, stop: Callable[[], bool] | None = None) -> Any:
        if stop is not None and self.asking is not None:
            return self.asking(state, stop)
        if self.mark and state.rows > 1:
            for tensor in (*state.tensors, *state.carried):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self.stage(state)

    def _widen(self, leaf: Any) -> Any:
        return leaf.to(self.wide) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


@dataclass(frozen=True)
class Legs:
    """All of them, and the copy of the guest that they run."""

    legs: tuple[Leg, ...]
    traced: Traced
    module: nn.Module
    build: Build
    _known: dict[Any, State] = field(default_factory=dict, init=False, repr=False, compare=False)

    def begin(self, *args: Any, **kwargs: Any) -> State:
        """The state before the first leg, inputs cast and laid out as the weights are."""
        args, kwargs = self.build.prepare((args, kwargs))
        first = args[0] if len(args) == 1 and not kwargs else None
        if type(first) is not Tensor:
            return begin(self.traced, *args, **kwargs)
        # What else decides on the program, every module's mode for one, never changes in a deployed network.
        kind = (first.shape, first.dtype, first.device, torch.is_autocast_enabled(first.device.type))
        known: State | None = self._known.get(kind)
        if known is not None:
            return replace(known, tensors=(first,))
        state = begin(self.traced, *args, **kwargs)
        if len(state.tensors) == 1 and not (state.values or state.carried or state.program.homes):
            if len(self._known) >= _KINDS:
                self._known.clear()
            self._known[kind] = replace(state, tensors=())
        return state

    def restart(self, call: Call, rows: Tensor | None) -> State:
        """The same of some rows of a call."""
        args, kwargs = call
        if rows is None:
            return self.begin(*args, **kwargs)
        count = next(len(leaf) for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.ndim)
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count else leaf, call)
        return self.begin(*args, **kwargs)


def chain(parts: Sequence[tuple[Legs, Callable[[Any], Tensor]]], ends: Sequence[bool]) -> Legs:
    """Networks of rising width one after another, each from the input: whoever a narrower one keeps starts again.

    ``ends`` says of each whether its own end is one of the plan's exits; the last one's always is.
    """
    if len(parts) == 1:
        return parts[0][0]
    legs: list[Leg] = []
    for k, ((part, reads), ended) in enumerate(zip(parts, ends, strict=True)):
        mine = list(part.legs)
        if k < len(parts) - 1:
            mine = [*mine[:-1], replace(mine[-1], reads=reads)] if ended else mine[:-1]
            mine[-1] = replace(mine[-1], may_shrink=False)  # nothing of its state goes on
        if k:
            mine[0] = replace(mine[0], fresh=part.restart)
        legs += mine
    first = parts[0][0]
    return replace(first, legs=tuple(legs), module=nn.ModuleList([part.module for part, _ in parts]))


def build_legs(net: MultiExit, exits: Sequence[str], build: Build, score: Callable[[Tensor], Tensor] | None) -> Legs:
    """Cut a copy of the guest at the chosen exits alone. ``score`` is fused into compiled dense exits."""
    columns = {column.name: column for column in net.columns}
    sites = {site.name: site for site in net.sites}
    chosen = [sites[columns[name].site] for name in exits]
    # A copy of the modules, so that nobody's .train() reaches the deployed network; weights are shared if they can be.
    memo = {} if build.copies else {id(t): t for t in (*net.parameters(), *net.buffers())}
    guest, heads = copy.deepcopy((net.backbone, [net.head(name) for name in exits]), memo)
    for module in (guest, *heads):
        module.eval()
    if build.fold:
        fold_batch_norms_(guest, split(net.traced, [])[0].module().graph, "guest.")
    for module in (guest, *heads):
        build.convert_(module)
    if build.engine == "eager":
        heads = [_direct_head(head) for head in heads]
    wide = next((p.dtype for p in net.parameters()), torch.float32) if build.dtype is not None else None
    args, kwargs = build.prepare(net.traced.few)
    traced = Traced(guest, args, kwargs)
    stages = split(traced, [site.name for site in chosen])
    made = []
    for k, stage in enumerate(stages):
        last = k == len(chosen)
        head = None if last else heads[k]
        extras, plain = 0, stage
        if build.engine == "compile":
            extras = 0 if last else 1 + (score is not None)
            live = 0 if last else len(chosen[k].live)
            stage = stage.compiled(_compiler(head, live, score, wide))
        else:
            stage = stage.compiled(direct)
        may_shrink = not last and chosen[k].shrinkable
        compiled = build.engine == "compile"
        made.append(Leg(stage, plain, head, extras, may_shrink, wide, compiled, asking=None if compiled else
                        plain.compiled(stoppable), asking_head=None if compiled or head is None else Stoppable(head)))
    return Legs(tuple(made), traced, nn.ModuleList([guest, *heads]), build)


def _direct_head(head: nn.Module) -> nn.Module:
    if isinstance(head, ShortcutHead):
        head.tail = direct(head.tail)
    return head


def _compiler(head: nn.Module | None, live: int, score: Callable[[Tensor], Tensor] | None,
              wide: torch.dtype | None) -> Callable[[fx.GraphModule], Any]:
    """A function from a stage's graph module to the compiled whole of it, its head and its score."""

    def compiled(module: fx.GraphModule) -> Any:
        # Each leg is a graph module with code of its own: the compiler's limit of recompilations is per code object.
        root, graph = nn.ModuleDict({"stage": module}), fx.Graph()
        inputs = [graph.placeholder(node.name) for node in module.graph.nodes if node.op == "placeholder"]
        out = graph.call_module("stage", tuple(inputs))
        if head is None:
            graph.output(out)
        else:
            root["head"] = head
            count = len(next(node for node in module.graph.nodes if node.op == "output").args[0])
            parts = [graph.call_function(_item, (out, i)) for i in range(count)]
            logits = graph.call_module("head", tuple(parts[:live]))
            if wide is not None:
                logits = graph.call_method("to", (logits, wide))
            said = [logits] if score is None else [logits, graph.call_function(score, (logits,))]
            graph.output((*parts, *said))
        return torch.compile(fx.GraphModule(root, graph), options={"freezing": True})

    return compiled


def _item(parts: Sequence[Any], index: int) -> Any:
    return parts[index]

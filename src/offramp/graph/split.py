"""Stages: the pieces between cuts, chained equal to the untouched network, sharing all it has."""

import copy
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from offramp.errors import CutError
from offramp.graph._guest import as_found, flat, rebuild
from offramp.graph.cuts import Cut, cut_at, labels, names_of
from offramp.graph.trace import Program, Traced

__all__ = ["Stage", "State", "begin", "split"]


@dataclass(frozen=True, eq=False)
class State:
    """All that the rest of the network needs at a cut."""

    tensors: tuple[Tensor, ...]
    """Live tensors, a row per sample, in the order of ``ExitSite.live``."""
    values: tuple[Any, ...]
    """Live numbers and tensors that know nothing of the batch."""
    program: Program
    carried: tuple[Tensor, ...] = ()
    """Live tensors with rows that only this mode has (an auxiliary head's output, in training)."""
    why_not: str = ""

    @property
    def rows(self) -> int:
        return int(self.tensors[0].shape[0])

    def select(self, index: Tensor) -> "State":
        """The state of some rows alone: a bool mask (N,) or a LongTensor of row numbers.

        CutError where the rest of the network needs all rows together.
        """
        if self.why_not:
            raise CutError(
                expected="a site where the batch may shrink", got=self.why_not, where="State.select()",
                todo="drop rows at another site, or let the whole batch go on",
            )
        return replace(
            self, tensors=tuple(t[index] for t in self.tensors), carried=tuple(t[index] for t in self.carried)
        )

    def to(self, *args: Any, **kwargs: Any) -> "State":
        """The state moved or cast, as ``Tensor.to`` does it."""
        def move(value: Any) -> Any:
            return value.to(*args, **kwargs) if isinstance(value, Tensor) else value

        return replace(self, tensors=tuple(map(move, self.tensors)), carried=tuple(map(move, self.carried)),
                       values=tuple(map(move, self.values)))


def begin(traced: Traced, *args: Any, **kwargs: Any) -> State:
    """The state before the first stage: the network's inputs, for a call ``model(*args, **kwargs)``."""
    program = traced.program_for(args, kwargs)
    tensors = [leaf for leaf in flat((args, kwargs))[0] if isinstance(leaf, Tensor)]
    return State(
        tensors=tuple(t for t, batched in zip(tensors, program.batched, strict=True) if batched),
        values=tuple(t for t, batched in zip(tensors, program.batched, strict=True) if not batched), program=program,
        why_not="the network treats every batch size differently" if traced.depends_on_batch else "",
    )


def split(traced: Traced, names: Sequence[str]) -> list["Stage"]:
    """``len(names) + 1`` stages that meet at the sites ``names``, in order of depth; the last gives the output.

    They share modules and parameters with the guest, in which nothing is registered. The stages are proved once, here:
    chained on the example they say exactly what the untouched network says. CutError for unknown or disordered names.
    """
    cuts = [_find(traced, traced.program, name) for name in names]
    if any(b.position <= a.position for a, b in zip(cuts, cuts[1:], strict=False)):
        raise CutError(expected="sites in order of depth, each once", got=f"{list(names)}", where="split()",
                       todo="take them in the order of offramp.sites()")
    ends = (None, *names, None)
    stages = [Stage(traced, first, last) for first, last in zip(ends, ends[1:], strict=False)]
    _prove(traced, stages)
    return stages


class Stage:
    """From one site to the next: ``stage(state) -> State``, and the last one gives the network's own output.

    ``module(program)`` is the plain ``torch.fx.GraphModule`` inside; ``compiled(fn)`` maps it, with ``torch.compile``
    for one.
    """

    def __init__(self, traced: Traced, first: str | None, last: str | None, wrap: Any = None) -> None:
        self.traced, self.first, self.last = traced, first, last
        self._wrap = wrap
        self._built: dict[Program, _Built] = {}

    def __deepcopy__(self, memo: Any) -> "Stage":
        return Stage(copy.deepcopy(self.traced, memo), self.first, self.last, self._wrap)

    def __repr__(self) -> str:
        return f"Stage({self.first or 'inputs'} -> {self.last or 'output'})"

    def compiled(self, fn: Any) -> "Stage":
        """A stage that runs ``fn(graph_module)`` in place of the graph module."""
        return Stage(self.traced, self.first, self.last, fn)

    def module(self, program: Program | None = None) -> fx.GraphModule:
        """The graph module for a program, the example's if not said."""
        return self._for(program or self.traced.program).module

    def __call__(self, state: State, *more: Any) -> Any:
        """``more`` goes to what ``compiled`` made, behind its inputs."""
        built = self._for(state.program)
        out = built.run(*state.tensors, *state.carried, *state.values, *more)
        if built.end is None:
            tensors = iter(out)
            rest = [next(tensors) if is_tensor else value
                    for is_tensor, value in zip(built.holds_tensor, state.program.rest, strict=True)]
            return rebuild(state.program.recipe, rest)
        live, carried = built.live, built.live + built.carried
        return State(tensors=tuple(out[:live]), carried=tuple(out[live:carried]), values=tuple(out[carried:]),
                     program=state.program, why_not=built.end.why_not)

    def _for(self, program: Program) -> "_Built":
        if program not in self._built:
            self._built[program] = _build(self, program)
        return self._built[program]


@dataclass
class _Built:
    module: fx.GraphModule
    run: Any
    end: Cut | None
    live: int
    carried: int
    holds_tensor: tuple[bool, ...]


def _ordered(traced: Traced, program: Program, name: str | None) -> tuple[Cut | None, list[fx.Node], list[fx.Node]]:
    """A cut of this program, its live tensors in the order of the site, and those that only this program has."""
    if name is None:
        return None, [], []
    cut = _find(traced, program, name)
    if program is traced.program:
        return cut, list(cut.rowwise), []
    known = _find(traced, traced.program, name)
    # Whether the batch may shrink was found out on the example's program; it is as true for calls of another kind.
    cut = replace(cut, why_not=known.why_not)
    reference = labels(traced, traced.program, known)
    here = dict(zip(labels(traced, program, cut), cut.rowwise, strict=True))
    if any(wanted not in here for wanted in reference):
        if len(reference) != len(cut.rowwise):
            raise CutError(
                expected=f"the tensors {reference} at {name}", got=f"{list(here)} with inputs of this kind",
                where="stage()", todo="place the exit at another site",
            )
        return cut, list(cut.rowwise), []
    chosen = [here[wanted] for wanted in reference]
    return cut, chosen, [node for node in cut.rowwise if node not in chosen]


def _build(stage: Stage, program: Program) -> _Built:
    traced = stage.traced
    start, live_in, extra_in = _ordered(traced, program, stage.first)
    end, live_out, extra_out = _ordered(traced, program, stage.last)
    first = start.position if start else program.inputs
    last = end.position if end else len(program.nodes) - 1
    if start is None:
        given = list(program.nodes[: program.inputs])
        live_in = [n for n, batched in zip(given, program.batched, strict=True) if batched]
        fixed_in = [n for n, batched in zip(given, program.batched, strict=True) if not batched]
        again: tuple[fx.Node, ...] = ()
    else:
        fixed_in, again = list(start.fixed), start.again
    graph = fx.Graph()
    at: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in (*live_in, *extra_in, *fixed_in)}
    body = program.nodes[first:last]
    written = {w.meta.get("root") for node in body for w in node.meta.get("writes", ())}
    for node in (*live_in, *extra_in, *fixed_in) if start else ():
        # The state must outlive this stage: a head may still need it for its gradient, a caller may run it again.
        if node.meta.get("root") in written:
            at[node] = graph.call_method("clone", (at[node],))
    for node in again:
        at[node] = graph.call_method("size", (at[live_in[0]], 0))

    def take(node: fx.Node) -> fx.Node:
        if node not in at:
            assert node.op == "get_attr", f"{node} is not live here"
            at[node] = graph.node_copy(node)
        return at[node]

    for node in body:
        if node.op != "get_attr" or "effect" in node.meta:
            at[node] = graph.node_copy(node, take)
    if end is None:
        graph.output(tuple(take(node) for node in cast(tuple[fx.Node, ...], program.nodes[-1].args[0])))
    else:
        graph.output(tuple(take(node) for node in (*live_out, *extra_out, *end.fixed)))
    # The guest stays whole under one name, so that whatever is later moved or swapped in it is seen here too.
    module = fx.GraphModule(nn.Module(), fx.Graph(), class_name="Stage")
    module._modules["guest"] = traced.model
    for name in {node.target for node in graph.nodes if node.op == "get_attr"} & program.constants.keys():
        object.__setattr__(module, name, program.constants[name])
    module.graph = graph
    run = module if stage._wrap is None else stage._wrap(module)
    return _Built(module, run, end, len(live_out), len(extra_out), program.tensor_at)


def _find(traced: Traced, program: Program, name: str) -> Cut:
    places = names_of(traced, program)
    for position, names in places.items():
        if name in names:
            cut = cut_at(traced, program, position)
            if cut is None:
                raise CutError(expected="a site where tensors determine the rest", got=repr(name), where="split()",
                               todo="choose from offramp.sites()")
            return cut
    known = [n for names in places.values() for n in names]
    near = difflib.get_close_matches(name, known, 3, 0.4)
    raise CutError(
        expected="the name of a site", got=repr(name), where="split()",
        todo=f"did you mean {' or '.join(near)}?" if near else "choose from offramp.sites()",
    )


def _prove(traced: Traced, stages: Sequence[Stage]) -> None:
    """Chained on two rows of the example, the stages say what the untouched network says, bit for bit."""
    with as_found(traced.model, mode=False), torch.no_grad():
        args, kwargs = traced.example()
        said = flat(traced.model(*args, **kwargs))[0]
    with as_found(traced.model, mode=False), torch.no_grad():
        args, kwargs = traced.example()
        state: Any = begin(traced, *args, **kwargs)
        for stage in stages:
            state = stage(state)
    for ours, theirs in zip(flat(state)[0], said, strict=True):
        if isinstance(theirs, Tensor) and not torch.equal(torch.nan_to_num(ours), torch.nan_to_num(theirs)):
            raise CutError(
                expected="stages that say what the untouched network says",
                got=f"a largest difference of {(ours.double() - theirs.double()).abs().max().item():.3g}",
                where="split()",
                todo="look for ops that draw random numbers in eval mode, or that write into views of their inputs",
            )

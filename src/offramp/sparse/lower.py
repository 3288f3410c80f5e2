"""From a masked network to the program that runs it after its first exit, for inputs of one size.

Stages between exits, the heads after the first, and the network's end up to what says its logits become a list of
operations on maps (:mod:`offramp._kernel.ops`). What is not known there is refused by name.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from offramp._kernel.ops import Conv, Level, Map, Op, Pool, Program, Segment, Sum, Term, View
from offramp.errors import OfframpError
from offramp.graph import State, split, trace
from offramp.graph._guest import flat
from offramp.nn.masked import Resizing, coarse_logits
from offramp.nn.multiexit import MultiExit
from offramp.sparse._draft import Cat, Convolution, Draft, Pooling, Step, Value, fused
from offramp.sparse._draft import Sum as SumStep
from offramp.sparse._read import Cell, Masking, Reader
from offramp.sparse._regions import Regions, nested

__all__ = ["First", "Lowered", "Masking", "lower", "lower_first"]


@dataclass(frozen=True, eq=False)
class Lowered:
    """A program, and where what goes in and what comes out lies in it."""

    program: Program
    frontiers: tuple[tuple[int | None, ...], ...]
    """At each exit the maps of the tensors that go on; None where nothing after it reads one."""
    logits: tuple[int, ...]
    """The map of each exit's logits but the first's, before they are resized; the last is of the network's own."""
    resizes: tuple[Resizing, ...]
    """Of these."""
    costs: tuple[Mapping[int, int], ...]
    """Of each exit but the first, MACs of its convolutions for each active place, by level."""
    end: fx.GraphModule | None
    """The last stage up to the convolution that says the network's logits; None where there is none such: these then
    are carried over at the output's size."""


@dataclass(frozen=True, eq=False)
class First:
    """What leads to the first exit's logits, on all places, as a program of one segment."""

    program: Program
    inputs: tuple[int | None, ...]
    """The map of each tensor that goes in; None where nothing reads it."""
    logits: int
    """The map of the logits before they are resized."""
    live: tuple[tuple[bool, int], ...]
    """Of each tensor that goes on whether it is one of the inputs as it is, and which, or its map."""
    values: tuple[Any, ...]
    """What goes on beside them: sizes, and the like."""
    resize: Resizing


class _Coarse(nn.Module):
    """A head as it speaks before its logits are resized."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, *frontier: Tensor) -> Tensor:
        return coarse_logits(self.head, frontier)[0]


def lower(net: MultiExit, masking: Mapping[nn.Module, Masking], state: State, first: Level) -> Lowered:
    """The program after the first exit.

    net: in eval mode, unmasked. masking: of its convolutions, as ``mask_`` made them. state: at the first exit, for
    inputs of the size to come. first: the size of that exit's own logits. OfframpError with all that cannot run at
    active places alone.
    """
    reader = Reader(masking)
    given: list[Any] = [reader.given(tensor, i) for i, tensor in enumerate((*state.tensors, *state.carried))]
    frontiers = [[cell.value for cell in given]]
    given += state.values
    draft, said, resizes = Draft(), list[Value | None](), list[Resizing]()
    for k, stage in enumerate(net.stages[1:], 1):
        given = list(reader.read(stage.module(state.program), given))
        if k < len(net.sites):
            cells = [one for one in given if isinstance(one, Cell)]
            frontiers.append([cell.value for cell in cells])
            live = [cell.value for cell in cells[: len(net.sites[k].live)]]
            coarse, resize = _said(reader, net.head(net.columns[net.columns_at(k)[0]].name), live, state.tensors[0])
            said.append(coarse)
            resizes.append(resize)
        else:
            said.append(given[_logits_at(net)].value)
        draft.steps.append(reader.emptied())
    logits = [value for value in said if value is not None]
    if reader.lasting or len(logits) < len(said):
        raise _refusal(reader.faults)
    logits[-1], ending = _before_resizing(logits[-1], draft.steps[-1])
    draft.kept = [[value] for value in logits]
    draft = fused(draft)
    read = {value for part in draft.steps for step in part for value in step.reads}
    faults = [step.out.name for part in draft.steps for step in part if isinstance(step, Convolution)
              and step.says and (step.out is not logits[-1] or step.out in read)]
    if faults:
        raise _refusal([f"{name}, logits that are read by more than a resize" for name in faults])
    says = next((layer for layer, found in masking.items() if found.says), None)
    end = None if says is None else _upto(net.stages[-1].module(state.program), says)
    return _placed(draft, frontiers, logits, first, [*resizes, ending], end)


def lower_first(net: MultiExit, state: State) -> First:
    """The program up to the first exit, for one image of the size of ``state``, which is of the network's inputs.

    OfframpError where it does what the language of programs has no operation for, or more than tensors go on.
    """
    stage, head = net.stages[0].module(state.program), net.head(net.columns[net.columns_at(0)[0]].name)
    reader = Reader({layer: Masking(1.0, False) for part in (stage, head) for layer in part.modules()
                     if isinstance(layer, nn.Conv2d)})
    given = [reader.given(tensor, i) for i, tensor in enumerate(state.tensors)]
    outputs = list(reader.read(stage, [*given, *state.values]))
    count = len(net.sites[0].live)
    live = [one.value for one in outputs[:count] if isinstance(one, Cell)]
    coarse, resize = _said(reader, head, live, state.tensors[0])
    if reader.lasting or coarse is None or None in live or any(isinstance(one, Cell) for one in outputs[count:]):
        raise _refusal(reader.faults or ["a stage that gives more tensors than go on"])
    inputs = [cell.value for cell in given]
    kept = [coarse, *(value for value in live if value is not None and value not in inputs)]
    placed = _placed(fused(Draft([reader.emptied()], [kept])), [inputs], kept, coarse.level, (), None)
    lies = dict(zip(kept, placed.logits, strict=True))
    return First(
        placed.program, placed.frontiers[0], lies[coarse],
        tuple((True, inputs.index(value)) if value in inputs else (False, lies[value]) for value in live if value),
        tuple(outputs[count:]), resize)


def _said(
    reader: Reader, head: nn.Module, frontier: Sequence[Value | None], like: Tensor
) -> tuple[Value | None, Resizing]:
    """A head's logits before they are resized, its steps read; and what resizes them."""
    tensors = [like.new_zeros(1, value.channels, value.level.height, value.level.width)
               for value in frontier if value is not None]
    if len(tensors) < len(frontier):
        return None, Resizing()
    with torch.inference_mode(False):
        stage = split(trace(_Coarse(head), tuple(tensors)), [])[0]
    cell = reader.read(stage.module(), [Cell(value) for value in frontier])[0]
    assert isinstance(cell, Cell)
    return cell.value, coarse_logits(head, tensors)[1]


def _logits_at(net: MultiExit) -> int:
    """Which of the tensors of the network's output the logits are."""
    tensors = [leaf for leaf in flat(net.traced.output)[0] if isinstance(leaf, Tensor)]
    logits = net.logits(net.traced.output)
    found = next((i for i, leaf in enumerate(tensors) if leaf is logits), None)
    if found is None:
        raise _refusal(["logits that are made of the network's output"])
    return found


def _before_resizing(logits: Value, steps: Sequence[Step]) -> tuple[Value, Resizing]:
    """What the convolution that says the network's logits gives, and the resizings after; logits as they are if none.
    """
    makers, value, ending = {step.out: step for step in steps}, logits, list[Any]()
    while (step := makers.get(value)) is not None:
        if isinstance(step, Convolution) and step.says:
            return value, Resizing(tuple(reversed(ending)))
        if not isinstance(step, SumStep) or not step.plain or len(step.terms) > 1 or step.terms[0].resize is None:
            break
        how = step.terms[0].resize
        ending.append(((value.level.height, value.level.width), how.mode,
                       how.align_corners if how.mode == "bilinear" else None))
        value = step.terms[0].value
    return logits, Resizing()


def _upto(module: fx.GraphModule, layer: nn.Module) -> fx.GraphModule:
    """A stage that ends with what a layer gives."""
    graph, known = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        known[node] = graph.node_copy(node, known.__getitem__)
        if node.op == "call_module" and module.get_submodule(str(node.target)) is layer:
            graph.output(known[node])
            break
    return fx.GraphModule(module, graph)


def _refusal(faults: Sequence[str]) -> OfframpError:
    return OfframpError(expected="layers that can run at active places alone", got="; ".join(faults), where="deploy()",
                        todo="place the first exit after them, or run the masked network as it is")


class _Maps:
    """Where values lie: most in a map of their own, what is concatenated in a part of one."""

    def __init__(self) -> None:
        self.levels: list[Level] = []
        self.shapes: list[tuple[int, int]] = []
        """Level and channels."""
        self._views: dict[Value, View] = {}

    def level(self, level: Level) -> int:
        if level not in self.levels:
            self.levels.append(level)
        return self.levels.index(level)

    def view(self, value: Value) -> View:
        if value not in self._views:
            self.shapes.append((self.level(value.level), value.channels))
            self._views[value] = View(len(self.shapes) - 1, 0, value.channels)
        return self._views[value]

    def lay(self, step: Cat, inside: set[Value]) -> list[Op]:
        """Lay those of the parts that may into the whole; the others are copied."""
        whole, first, copies = self.view(step.out), 0, list[Op]()
        for part in step.parts:
            there = View(whole.map, whole.first + first, part.channels)
            first += part.channels
            if part in inside:
                self._views[part] = there
                inside.discard(part)
            else:
                copies.append(Sum((Term(self.view(part)),), there))
        return copies


def _placed(
    draft: Draft, frontiers: Sequence[Sequence[Value | None]], logits: Sequence[Value], first: Level,
    resizes: Sequence[Resizing], end: fx.GraphModule | None,
) -> Lowered:
    """The program of a draft."""
    maps = _Maps()
    uses = Counter(value for part in draft.steps for step in part for value in step.reads)
    makers = {step.out: k for k, part in enumerate(draft.steps) for step in part}
    readers = {value: k for k, part in enumerate(draft.steps) for step in part for value in step.reads}  # the last one
    crossing = [value for value, k in readers.items() if makers.get(value, -1) < k]
    kept = frozenset(maps.view(value).map for value in (*crossing, *logits))
    inside = {value for value, count in uses.items() if count == 1} - {*crossing, *logits}
    copies = {step.out: maps.lay(step, inside) for part in reversed(draft.steps) for step in reversed(part)
              if isinstance(step, Cat)}  # the outermost first
    parts = [[op for step in part for op in (copies[step.out] if isinstance(step, Cat) else [_op(step, maps)])]
             for part in draft.steps]
    regions = Regions([level for level, _ in maps.shapes])
    for part in reversed(parts):
        for op in reversed(part):
            regions.feed(op)
    found = tuple(Map(level, regions.of(at), channels) for at, (level, channels) in enumerate(maps.shapes))
    sizes = [first, *(value.level for value in logits)]
    faults = [f"{value.name} of {value.level} between exits of {sizes[j]} and {sizes[j + 1]}"
              for value in crossing if value in makers for j in range(makers[value], readers[value])
              if not all(nested(maps.levels[at], sizes[j], sizes[j + 1])
                         for at in regions.levels_within(maps.view(value).map))]
    if faults:
        raise _refusal([f"{fault}, whose masks are not nested there" for fault in faults])
    return Lowered(
        Program(tuple(maps.levels), tuple(regions.regions), found,
                tuple(Segment(f"after exit {k}", tuple(part)) for k, part in enumerate(parts)), kept),
        tuple(tuple(maps.view(value).map if value in crossing else None for value in part) for part in frontiers),
        tuple(maps.view(value).map for value in logits), tuple(resizes),
        tuple(_costs(part, maps) for part in parts), end)


def _costs(ops: Sequence[Op], maps: _Maps) -> Mapping[int, int]:
    found: Counter[int] = Counter()
    for op in ops:
        if isinstance(op, Conv):
            found[maps.shapes[op.out.map][0]] += op.weight.numel()
    return found


def _op(step: Convolution | SumStep | Pooling, maps: _Maps) -> Op:
    out = maps.view(step.out)
    if isinstance(step, Convolution):
        return Conv(maps.view(step.source), out, step.weight, step.window, step.groups, step.scale, step.shift,
                    step.bare, step.lam, None if step.residual is None else maps.view(step.residual), step.relu)
    if isinstance(step, Pooling):
        return Pool(maps.view(step.source), out, step.window, step.kind, step.counts_padding)
    return Sum(tuple(Term(maps.view(term.value), term.resize) for term in step.terms), out, step.scale, step.shift,
               step.relu)

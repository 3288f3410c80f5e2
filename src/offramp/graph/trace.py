"""Trace a network by running it: on what kinds of inputs it runs the same program, and what a smaller batch changes.

One :class:`Program` is the graph for one kind of call: training flags, shapes beside the batch, dtypes, devices. A call
of another kind is traced when it comes, so that control flow on sizes or on ``self.training`` needs no guess.
"""

import copy
import operator
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from offramp.cost.macs import not_counted
from offramp.errors import CutError, OfframpError
from offramp.graph._blocks import blocks_of
from offramp.graph._guest import as_found, flat, rebuild
from offramp.graph._recorder import Close, Recorder, Untraceable

__all__ = ["Program", "Traced", "trace"]

_MOST_LEAVES = 64
_LARGE = 400_000
_recording = threading.RLock()  # a recorder stands in for methods of torch's own classes


@dataclass(frozen=True, eq=False)
class Program:
    """The graph of one kind of call; ``nodes`` in order of execution, ``closes`` where modules returned."""

    nodes: tuple[fx.Node, ...]
    inputs: int
    """How many of the first nodes are inputs."""
    batched: tuple[bool, ...]
    """Which inputs have a row per sample."""
    closes: tuple[Close, ...]
    constants: Mapping[str, Any]
    recipe: Any
    """Rebuilds the network's output, given its leaves; tensors among these are the graph's outputs."""
    rest: tuple[Any, ...]
    """The output's leaves with None for tensors."""
    tensor_at: tuple[bool, ...]
    """Which of the output's leaves are tensors."""
    homes: Mapping[str, Any]
    """Where constants were found that the network may replace, a cache of it for one: functions that fetch them."""
    watches: int
    """How often Python decided something on the values of tensors."""
    last_use: Mapping[fx.Node, int] = field(repr=False)
    index: Mapping[fx.Node, int] = field(repr=False)


class Traced:
    """A network that has been traced, and its programs so far; made by :func:`trace`."""

    depends_on_batch = False
    """Whether the network ran another program for fewer rows: Python took the batch size out of shapes."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model = model
        self.blocks = blocks_of(model)
        first = next(model.parameters(), None)
        self._first = None if first is None else (first.dtype, first.device)
        self._pretend = False
        self._leaves: frozenset[str] = frozenset()
        self._programs: dict[Any, Program] = {}
        self._tracing = threading.RLock()
        self.rows = _rows(args, kwargs)
        """Rows of the example inputs."""
        # A traced batch and some of its rows. One row is the hardest case for shapes, but also the odd one (squeeze,
        # broadcasting), so it is taken only where a row is large and three of them would be slow.
        large = max(t.numel() // max(self.rows, 1) for t in flat((args, kwargs))[0] if isinstance(t, Tensor)) > _LARGE
        self.many = 2 if large else 3
        self.kept: tuple[int, ...] = (1,) if large else (0, 2)
        self._probe = _probe(args, kwargs, self.rows, self.many)
        self.few = _take(self._probe, list(self.kept), self.many)
        """Those rows of the traced batch."""
        with torch.inference_mode(False), torch.no_grad():
            many, output = self._record(*self._probe, mode=False)
            if many.watches:
                # Python looked at data. Some libraries do not while a tracer works: transformers keeps its masks then.
                self._pretend = True
                blind, said = self._record(*self._probe, mode=False)
                self._pretend = blind.watches < many.watches
                many, output = (blind, said) if self._pretend else (many, output)
            fewer, _ = self._record(*self.few, mode=False)
        self.depends_on_batch = _signature(many) != _signature(fewer)
        self.shared = _shared(many, fewer)
        """How many nodes the programs for both batches share at their beginning and at their end."""
        with as_found(model, mode=False), torch.no_grad():
            self._programs[self._key(*self._probe)] = many
        self.program, self.fewer = many, fewer
        self.output = output
        """What the untouched network says, in eval mode, about ``many`` rows like the example inputs."""

    def __deepcopy__(self, memo: Any) -> "Traced":
        made = Traced(copy.deepcopy(self.model, memo), *self._probe)
        made.rows = self.rows
        return made

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A copy of ``few``, moved and cast as the network was since it was traced."""
        first = next(self.model.parameters(), None)

        def follow(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if first is None or self._first is None:
                return leaf.clone()
            device = first.device if leaf.device == self._first[1] else leaf.device
            return leaf.to(device, first.dtype if leaf.dtype == self._first[0] else leaf.dtype, copy=True)

        leaves, recipe = flat(self.few)
        made: tuple[tuple[Any, ...], dict[str, Any]] = rebuild(recipe, [follow(leaf) for leaf in leaves])
        return made

    def program_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """The program of this call; traced now if its kind is new."""
        key = self._key(args, kwargs)
        if not self._knows(key):
            with self._tracing:  # tracing puts every module in another state for a while
                if not self._knows(key):
                    with torch.inference_mode(False), not_counted():
                        program, _ = self._record(args, kwargs)
                    same = {_signature(other): other for other in reversed(self._programs.values())}
                    self._programs[key] = same.get(_signature(program), program)
        return self._programs[key]

    def _knows(self, key: Any) -> bool:
        known = self._programs.get(key)
        return known is not None and all(fetch() is known.constants[name] for name, fetch in known.homes.items())

    def _key(self, args: Any, kwargs: Any) -> Any:
        leaves, _ = flat((args, kwargs))
        rows = _rows(args, kwargs)

        def kind(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                free = _is_batched(leaf, rows) and not self.depends_on_batch
                return leaf.shape[1:] if free else leaf.shape, free, leaf.dtype, leaf.device
            return leaf if isinstance(leaf, bool | int | float | str | None) else id(leaf)

        first = next(self.model.parameters(), None)
        return (
            tuple(map(kind, leaves)), tuple(kwargs), len(args),
            tuple(module.training for module in self.model.modules()),
            first is not None and (first.dtype, first.device), torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"), torch.is_grad_enabled(),
        )

    def _record(self, args: Any, kwargs: Any, *, mode: bool | None = None) -> tuple[Program, Any]:
        """Run the model on copies of the inputs. Modules in which ops hide become leaves, and it is run again."""
        for _ in range(_MOST_LEAVES):
            try:
                with _recording, as_found(self.model, mode=mode):
                    return _record(self.model, args, kwargs, self._leaves, mode is False, self._pretend)
            except Untraceable as hidden:
                if not hidden.path:
                    raise CutError(
                        expected="a network whose forward calls torch ops or modules",
                        got=f"an op that cannot be recorded, {hidden.op} at {hidden.where}", where="trace()",
                        todo="move that op into a submodule of its own: it is then run whole, and cuts lie around it",
                    ) from None
                self._leaves |= {hidden.path}
            except OfframpError:
                raise
            except Exception as error:
                shapes = [tuple(t.shape) for t in flat((args, kwargs))[0] if isinstance(t, Tensor)]
                raise CutError(
                    expected=f"inputs on which {type(self.model).__name__} runs",
                    got=f"{type(error).__name__}: {error} for shapes {shapes}", where="trace()",
                    todo="call the model with these inputs yourself; then pass them as a tuple of arguments or a dict "
                         "of keyword arguments",
                ) from error
        raise CutError("trace(): too many modules with ops that cannot be recorded.")


def trace(model: nn.Module, example_inputs: Any, *, within: str | None = None) -> Traced:
    """Trace ``model`` (or its submodule ``within``) on a tensor, a tuple of arguments or a dict of keyword arguments.

    The model runs twice, in eval mode and without gradients, on a small batch made from the example and on some rows of
    that batch; it is left as found. CutError where its inputs have no batch, or where an op cannot be recorded.
    """
    args, kwargs = _arguments(example_inputs)
    if within:
        model, args, kwargs = _inside(model, within, args, kwargs)
    return Traced(model, args, kwargs)


def _record(
    model: nn.Module, args: Any, kwargs: Any, leaves: frozenset[str], fingerprints: bool, pretend: bool
) -> tuple[Program, Any]:
    values, recipe = flat((args, kwargs))
    values = [v.detach().clone().requires_grad_(False) if isinstance(v, Tensor) else v for v in values]
    args, kwargs = rebuild(recipe, values)
    rows = _rows(args, kwargs)
    inputs = [v for v in values if isinstance(v, Tensor)]
    recorder = Recorder(model, leaves=leaves, rows=rows if fingerprints else 0, pretend=pretend)
    for tensor in inputs:
        recorder.placeholder(tensor)
    try:
        with recorder:
            output = model(*args, **kwargs)
    except Exception:
        if recorder.hidden is not None:
            raise recorder.hidden from None
        raise
    said, out_recipe = flat(output)
    tensors = [leaf for leaf in said if isinstance(leaf, Tensor)]
    recorder.output(tensors)
    nodes, positions = _tidy(recorder.graph)
    index = {node: i for i, node in enumerate(nodes)}
    last_use: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        for used in node.all_input_nodes:
            last_use[used] = i
    program = Program(
        nodes=tuple(nodes), inputs=len(inputs), batched=tuple(_is_batched(t, rows) for t in inputs),
        closes=tuple(
            Close(c.path, c.call, positions[min(c.position, len(positions) - 1)], c.outputs, c.leaf)
            for c in recorder.closes
        ),
        constants=recorder.constants, recipe=out_recipe,
        rest=tuple(None if isinstance(leaf, Tensor) else leaf for leaf in said),
        tensor_at=tuple(isinstance(leaf, Tensor) for leaf in said), homes=_homes(model, recorder.constants),
        watches=recorder.watches,
        last_use=last_use, index=index,
    )
    for tensor in tensors:
        vars(tensor).pop("_offramp_node", None)
    return program, rebuild(out_recipe, [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in said])


def _homes(model: nn.Module, constants: Mapping[str, Any]) -> dict[str, Any]:
    """Constants that are plain attributes of a module, or lie in a dict that is one."""
    names = {id(value): name for name, value in constants.items() if isinstance(value, Tensor)}
    homes: dict[str, Any] = {}
    for module in model.modules() if names else ():
        for attribute, value in vars(module).items():
            if id(value) in names:
                homes[names[id(value)]] = lambda m=module, a=attribute: getattr(m, a, None)
            elif isinstance(value, dict) and attribute not in ("_parameters", "_buffers", "_modules"):
                for key, item in value.items():
                    if id(item) in names:
                        homes[names[id(item)]] = lambda v=value, k=key: v.get(k)
    return homes


def _tidy(graph: fx.Graph) -> tuple[list[fx.Node], list[int]]:
    """Drop sizes and elements that nobody uses; also says, for each old position, the new one."""
    kept = []
    for node in reversed(graph.nodes):
        idle = not node.users and "effect" not in node.meta and not node.meta.get("writes")
        droppable = node.op == "get_attr" or "value" in node.meta or node.target in (operator.getitem, getattr)
        kept.append(not (idle and droppable))
        if idle and droppable:
            graph.erase_node(node)
    positions, new = [0], 0
    for keep in reversed(kept):
        new += keep
        positions.append(new)
    return list(graph.nodes), positions


def _signature(program: Program) -> tuple[Any, ...]:
    """What the program does, node by node, in terms that two traces share."""
    return tuple(signature_of(program, node) for node in program.nodes) + (repr(program.rest),)


def signature_of(program: Program, node: fx.Node) -> Any:
    """One node: op, target and arguments, other nodes by their place."""
    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", program.index[value])
        if isinstance(value, tuple | list):
            return (type(value).__name__, *(plain(v) for v in value))
        if isinstance(value, dict):
            return tuple((k, plain(v)) for k, v in value.items())
        if isinstance(value, slice):
            return ("slice", plain(value.start), plain(value.stop), plain(value.step))
        return (type(value).__name__, repr(value))

    target: Any = node.target if not isinstance(node.target, str) or node.op != "placeholder" else ""
    if isinstance(target, str) and target in program.constants:
        constant = program.constants[target]
        if not isinstance(constant, Tensor):
            target = id(constant)
        elif constant.numel() <= 4096:
            target = (tuple(constant.shape), repr(constant.tolist()))
        else:
            target = (tuple(constant.shape), float(constant.double().sum()), float(constant.double().abs().sum()))
    elif not isinstance(target, str):
        target = id(target)
    return (node.op, target, plain(node.args), plain(node.kwargs))


def _shared(many: Program, fewer: Program) -> tuple[int, int]:
    same = [signature_of(many, a) == signature_of(fewer, b) for a, b in zip(many.nodes, fewer.nodes, strict=False)]
    prefix = same.index(False) if False in same else len(same)
    if len(many.nodes) != len(fewer.nodes):
        return prefix, 0  # places count from the beginning, so that nothing can be told of the end
    return prefix, same[::-1].index(False) if False in same else len(same)


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    return (example_inputs,), {}


def _rows(args: Any, kwargs: Any) -> int:
    """Size of the batch: dimension 0 of the first tensor."""
    for leaf in flat((args, kwargs))[0]:
        if isinstance(leaf, Tensor) and leaf.ndim:
            return int(leaf.shape[0])
    raise CutError(
        expected="example inputs with a tensor whose dimension 0 is the batch", got="none", where="trace()",
        todo="pass a tensor, a tuple of arguments or a dict of keyword arguments",
    )


def _is_batched(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows


def _probe(args: Any, kwargs: Any, rows: int, many: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As many rows, made from the example: its first ones, then shifted and dimmed copies of them."""
    def grow(value: Any) -> Any:
        if not _is_batched(value, rows):
            return value
        made = [value[i % rows] for i in range(many)]
        for i in range(rows, many):
            made[i] = made[i].roll(i, -1) if made[i].ndim else made[i]
            if made[i].is_floating_point():
                made[i] = made[i] * (1 - 0.25 * i) + 0.1 * i
        return torch.stack(made).to(value.device)

    leaves, recipe = flat((args, kwargs))
    made: tuple[tuple[Any, ...], dict[str, Any]] = rebuild(recipe, [grow(leaf) for leaf in leaves])
    return made


def _take(inputs: Any, rows: list[int], of: int) -> Any:
    leaves, recipe = flat(inputs)
    return rebuild(recipe, [leaf[rows] if _is_batched(leaf, of) else leaf for leaf in leaves])


class _Seen(Exception):
    pass


def _inside(model: nn.Module, within: str, args: Any, kwargs: Any) -> tuple[nn.Module, Any, Any]:
    """The submodule and what it is called with when the whole model runs on the example."""
    try:
        inner = model.get_submodule(within)
    except AttributeError as error:
        raise CutError(
            expected="the name of a submodule", got=f"{within!r} ({error})", where="within",
            todo=f"choose from {[name for name, _ in model.named_children()]} or deeper",
        ) from None
    seen: list[Any] = []

    def look(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.extend((args, kwargs))
        raise _Seen

    with as_found(model, mode=False), torch.no_grad():
        hook = inner.register_forward_pre_hook(look, with_kwargs=True)
        try:
            model(*args, **kwargs)
        except _Seen:
            pass
        finally:
            hook.remove()
    if not seen:
        raise CutError(
            expected=f"a model that calls {within}", got="a forward that does not", where="within",
            todo="name a submodule that the forward calls",
        )
    return inner, seen[0], seen[1]

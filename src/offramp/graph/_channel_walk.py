"""Goes through traced programs and keeps, for every node, which dimension of it holds channels, and which ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn

from offramp.errors import WidthError
from offramp.graph._axes import Axes, Axis, Segment
from offramp.graph.trace import Program

__all__ = ["Carry", "Layer", "Rule", "Walk", "key_of", "rule"]

Kind = Literal["conv", "linear", "norm", "parameter"]


@dataclass(frozen=True)
class Carry:
    """Channels along one dimension of a tensor."""

    dim: int
    axis: Axis


@dataclass(frozen=True)
class Layer:
    """A module with channels, or a parameter (or buffer) outside of one that meets channels elementwise."""

    path: str
    kind: Kind
    reads: Axis
    gives: Axis
    """What it writes; norms and parameters write what they read."""
    dim: int = 0
    """Which dimension of a parameter holds the channels."""


Rule = Callable[["Walk", fx.Node], Carry | None]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for functions, methods and modules of these names, in lower case and without underscores."""
    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in _RULES, name
            _RULES[name] = function
        return function

    return register


def key_of(walk: "Walk", node: fx.Node) -> str:
    """Under which name an op's rule is registered; a subclass of a module of torch.nn has none of its own."""
    if node.op == "call_module":
        kind = type(walk.module(node))
        name = kind.__name__ if kind.__module__.startswith("torch.nn.") else "?"
    else:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
    return name.replace("_", "").lower()


def _apply(walk: "Walk", node: fx.Node) -> Carry | None:
    """What a node's output carries."""
    found = _RULES.get(key_of(walk, node))
    if found is not None:
        return found(walk, node)
    for used in node.all_input_nodes:
        number = walk.follows.get(used)
        walk.doubt(node, number[0] if number else walk.carry(used), "is an op whose channels nobody here can follow")
    return None


class Walk:
    """Feed it programs, then ask it for the layers; programs share channels through their inputs."""

    def __init__(self, where: Callable[[str, nn.Module], bool] | None = None) -> None:
        self.axes = Axes()
        self.where = where
        self.carried: dict[fx.Node, Carry | None] = {}
        """A Carry, for each of several tensors the same; None where nothing can be narrowed."""
        self.follows: dict[fx.Node, tuple[Carry, bool]] = {}
        """Numbers that were computed from a number of channels; and whether they are that number."""
        self._whole: dict[fx.Node, tuple[str, bool]] = {}
        self._layers: dict[str, Layer] = {}
        self._weights: dict[int, Layer] = {}
        self._parameters: dict[str, Carry] = {}
        self._claimed: set[str] = set()
        self._doubts: list[tuple[fx.Node, Axis, str]] = []
        self._numbers: dict[int, int] = {}
        self._model = nn.Module()
        self._constants: Mapping[str, Any] = {}
        self._prefix = ""

    def feed(
        self, program: Program, model: nn.Module, inputs: Sequence[Carry | None] | None = None, *, prefix: str = "",
        output: str = "the network's output",
    ) -> None:
        """Go through a program of ``model``, whose paths get ``prefix`` before them.

        inputs: what its inputs carry, as ``carried`` has it of another program's nodes; None: nothing, all are kept.
        output: why what it says is kept at full width; empty leaves it free.
        """
        self._model, self._prefix, self._constants = model, prefix, program.constants
        for i, node in enumerate(program.nodes):
            if node.op == "placeholder":
                self.carried[node] = inputs[i] if inputs is not None else None
                self._whole[node] = ("the network's input", False)
            elif node.op == "output":
                for said in cast(Sequence[Any], node.args[0]):
                    if output and (carry := self.carry(said)) is not None:
                        self.axes.fix(carry.axis, output)
            elif node.op == "get_attr":
                self.carried[node] = self._parameter(node)
            elif "value" in node.meta:
                self._number(node)
            else:
                self.carried[node] = self._wide(_apply(self, node))
                if self.carried[node] is None:
                    self._blame(node)

    def __contains__(self, path: object) -> bool:
        """Whether a layer at that path was called so far."""
        return path in self._layers

    # -- what rules ask

    def carry(self, node: Any) -> Carry | None:
        return self.carried.get(node) if isinstance(node, fx.Node) else None

    def axis_at(self, node: fx.Node, dim: int, user: fx.Node) -> Axis:
        """What lies along a dimension of a tensor, for a layer that reads it; a new, fixed axis if nothing does."""
        carry = self.carry(node)
        if carry is not None and carry.dim == dim:
            return carry.axis
        if carry is not None:
            self.doubt(user, carry, "mixes another dimension than that of the channels")
        return self.axes.new(self.shape(node)[dim], self.reason(node))

    def reason(self, node: fx.Node) -> str:
        """Why a tensor that carries nothing is as wide as it is."""
        return self._whole.get(node, ("it meets a tensor that is never narrowed", False))[0]

    def hold(self, axis: Axis, node: fx.Node) -> None:
        """Fix an axis that meets a tensor which carries nothing."""
        why, soft = self._whole.get(node, ("it meets a tensor that is never narrowed", False))
        self.axes.fix(axis, why, soft=soft)

    def doubt(self, node: fx.Node, carry: Carry | None, what: str) -> None:
        """Something here is right only if this axis is fixed; asked once all is known."""
        if carry is not None:
            known = self.axes.is_fixed(carry.axis)
            if not known:
                self._doubts.append((node, carry.axis, what))
            self._whole[node] = (f"{name_of(node)} at {node.meta.get('where', '?')} {what}", not known)

    def size(self, value: Any) -> Axis | None:
        """The axis whose length a number is, if it is one's."""
        found = self.follows.get(value) if isinstance(value, fx.Node) else None
        return found[0].axis if found is not None and found[1] else None

    def moves(self, value: Any) -> bool:
        """Whether a number changes with the number of channels."""
        return isinstance(value, fx.Node) and value in self.follows

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls, or the innermost one in whose forward it was called."""
        path = str(node.target).removeprefix("guest").removeprefix(".") if node.op == "call_module" else None
        return self._model.get_submodule(node.meta["path"] if path is None else path)

    def path(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return self._prefix + str(node.target).removeprefix("guest").removeprefix(".")
        return self._prefix + str(node.meta["path"])

    def layer(self, node: fx.Node, kind: Kind, reads: Axis, gives: Axis) -> Axis:
        """Note a call of a layer; what it gives is the same channels at every call."""
        path, module = self.path(node), self.module(node)
        weight = getattr(module, "weight", None)
        known = self._layers.get(path) or self._weights.get(id(weight))
        if known is not None:
            self.axes.unify(known.reads, reads)
            self.axes.unify(known.gives, gives)
        if path not in self._layers:
            self._layers[path] = Layer(path, kind, reads, gives)
            if weight is not None:
                self._weights.setdefault(id(weight), self._layers[path])
            if self.where is not None and not self.where(path, module):
                self.axes.fix(gives, f"where() keeps {path}")
        return gives

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """A tensor's shape as it was traced, of parameters and constants too."""
        if node.op == "get_attr":
            return tuple(self._tensor(node).shape)
        return cast(tuple[int, ...], node.meta["shape"])

    def met(self, node: fx.Node, dim: int, axis: Axis) -> bool:
        """Whether a node is a parameter that can be narrowed along a dimension; if so, it now is."""
        path = self._parameter_path(node)
        if path is None:
            return False
        known = self._parameters.setdefault(path, Carry(dim, axis))
        if known.dim == dim:
            self.axes.unify(known.axis, axis)
        return known.dim == dim

    def claim(self, *nodes: Any) -> None:
        """These parameters belong to the layer that uses them."""
        self._claimed |= {path for node in nodes if (path := self._parameter_path(node)) is not None}

    # -- at the end

    def settled(self) -> tuple[tuple[Layer, ...], dict[int, int]]:
        """All layers, spaces numbered by first use, and which old number each new one had; WidthError for doubts."""
        written = {s.space for layer in self._layers.values() if layer.kind in ("conv", "linear")
                   for s in self.axes.resolve(layer.gives)}
        loose = {path: Layer(path, "parameter", carry.axis, carry.axis, carry.dim)
                 for path, carry in self._parameters.items() if path not in self._claimed}
        layers = [*self._layers.values(), *loose.values()]
        tensors = [carry.axis for node, carry in self.carried.items() if carry is not None and node.op != "get_attr"]
        for axis in [axis for layer in layers for axis in (layer.reads, layer.gives)] + tensors:
            for segment in self.axes.resolve(axis):
                if segment.space not in written:
                    self.axes.fix((segment,), "no layer writes it")
        self._refuse()
        self._numbers.clear()
        kept = [layer for layer in layers
                if layer.kind != "parameter" or any(s.space in written for s in self.axes.resolve(layer.gives))]
        told = tuple(replace(layer, reads=self._numbered(layer.reads), gives=self._numbered(layer.gives))
                     for layer in kept)
        for axis in tensors:
            self._numbered(axis)
        return told, dict(self._numbers)

    def at(self, node: fx.Node) -> Carry | None:
        """What a node carries, in the numbers of the plan; to be asked after it was made."""
        carry = self.carry(node)
        return None if carry is None else Carry(carry.dim, self._numbered(carry.axis))

    def _numbered(self, axis: Axis) -> Axis:
        return tuple(Segment(self._numbers.setdefault(s.space, len(self._numbers)), s.unit)
                     for s in self.axes.resolve(axis))

    def _refuse(self) -> None:
        bad = [(node, axis, what) for node, axis, what in self._doubts if not self.axes.is_fixed(axis)]
        if not bad:
            return
        node, _, what = bad[0]
        free = {s.space for _, axis, _ in bad for s in self.axes.resolve(axis) if not self.axes.is_fixed((s,))}
        writers = [layer.path for layer in self._layers.values() if layer.kind in ("conv", "linear")
                   and free & {s.space for s in self.axes.resolve(layer.gives)}]
        said = ", ".join(map(repr, writers[:8])) + (f" and {len(writers) - 8} more" if len(writers) > 8 else "")
        more = f" (and {len(bad) - 1} more such ops)" if len(bad) > 1 else ""
        raise WidthError(
            expected="ops through which channels can be followed",
            got=f"{name_of(node)} at {node.meta.get('where', '?')}, which {what}{more}", where="channels()",
            todo=f"keep these layers at full width with where=lambda path, module: ...: {said}",
        )

    # -- nodes without rules

    def _wide(self, carry: Carry | None) -> Carry | None:
        if carry is not None and self.axes.length(carry.axis) == 1:
            self.axes.fix(carry.axis, "a single channel")
            return None
        return carry

    def _tensor(self, node: fx.Node) -> Tensor:
        target = str(node.target)
        found: Any = self._constants.get(target, self._model)
        if target not in self._constants:
            for atom in target.split(".")[1:]:
                found = getattr(found, atom)
        return found if isinstance(found, Tensor) else torch.empty(0)

    def _parameter_path(self, node: Any) -> str | None:
        if not isinstance(node, fx.Node) or node.op != "get_attr" or not str(node.target).startswith("guest."):
            return None
        return self._prefix + str(node.target).removeprefix("guest.")

    def _parameter(self, node: fx.Node) -> Carry | None:
        path, shape = self._parameter_path(node), self.shape(node)
        wide = [dim for dim, size in enumerate(shape) if size > 1]
        if path is None or len(wide) != 1:
            return None
        return self._parameters.setdefault(path, Carry(wide[0], self.axes.new(shape[wide[0]])))

    def _number(self, node: fx.Node) -> None:
        if node.op == "call_method" and node.target in ("size", "numel", "nelement"):
            carry = self.carry(node.args[0])
            if carry is not None:
                dims = len(self.shape(cast(fx.Node, node.args[0])))
                exact = node.target == "size"
                if not exact or cast(int, node.args[1]) % dims == carry.dim:
                    self.follows[node] = carry, exact
        for used in node.all_input_nodes:
            if used in self.follows:
                self.follows[node] = self.follows[used][0], False

    def _blame(self, node: fx.Node) -> None:
        """A tensor that carries nothing is as wide as it is for the reason of what it was made from."""
        for used in node.all_input_nodes:
            if used in self._whole and node not in self._whole:
                self._whole[node] = self._whole[used]


def name_of(node: fx.Node) -> str:
    """The op that a node is, in words."""
    if node.op == "call_module":
        return f"module {str(node.target).removeprefix('guest.')}"
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target))

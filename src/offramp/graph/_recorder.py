"""Records a network as a graph while it really runs.

A ``TorchFunctionMode`` sees every torch call on *real* tensors, so that whatever Python asks of them (truth, length,
``isinstance``) has its usual answer; the calls become nodes of a ``torch.fx`` graph. Modules of ``torch.nn`` stay one
``call_module`` node each: norms and dropouts follow ``.training`` when the graph runs. Numbers read off shapes are
nodes too.
"""

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from offramp.cost.macs import MacCounter
from offramp.graph import _ops
from offramp.graph._guest import flat, version
from offramp.graph._numbers import TracedFloat, TracedInt, traced_number
from offramp.graph._ops import DATA_READS, OPERATORS, SIZES, same_as_traced, where_of

__all__ = ["Close", "Recorder", "Untraceable"]

_NODE = "_offramp_node"
_original_call = nn.Module.__call__
_original_setattr = nn.Module.__setattr__
_original_apply = vars(torch.autograd.Function)["apply"]


class Untraceable(Exception):
    """An op that no torch-function mode sees touched a recorded tensor inside ``path``."""

    def __init__(self, path: str, op: str, where: str) -> None:
        super().__init__(f"{op} at {where}, inside {path or 'the network itself'}")
        self.path, self.op, self.where = path, op, where


@dataclass(frozen=True)
class Close:
    """A module returned: its path, the how-manieth call of it, and what it returned."""

    path: str
    call: int
    position: int
    """Nodes recorded so far: the cut lies after them."""
    outputs: tuple[fx.Node, ...]
    leaf: bool


class Recorder(TorchFunctionMode):
    """Enter it, call the model, leave it: ``graph`` and ``closes`` hold what happened."""

    def __init__(
        self, model: nn.Module, *, leaves: frozenset[str] = frozenset(), rows: int = 0, pretend: bool = False
    ) -> None:
        """leaves: modules to run as one node. rows: fingerprint tensors of that many. pretend: say that jit traces."""
        super().__init__()
        self.rows, self.active = rows, False
        self.watches = 0
        self.hidden: Untraceable | None = None
        """Kept here too: TorchScript's interpreter lets no exception of ours through."""
        self._thread = threading.get_ident()
        self._pretend = pretend
        self.graph = fx.Graph()
        self.closes: list[Close] = []
        self.constants: dict[str, Any] = {}
        self._leaves = leaves
        self._paths = {id(module): name for name, module in model.named_modules()}
        self._state = {
            id(tensor): name
            for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
            for name, tensor in named
        }
        self._calls: Counter[str] = Counter()
        self._stack: list[str] = [""]
        self._busy = False  # inside an op that is one node: what happens there is its own affair
        self._counter = _Counter(self)
        self._exits = ExitStack()
        self._autocast, self._grad = _ops.autocast(), torch.is_grad_enabled()

    # -- entering and leaving

    def __enter__(self) -> "Recorder":
        recorder = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder.call_module(module, args, kwargs)

        def assign(module: nn.Module, name: str, value: Any) -> None:
            recorder.assign(module, name, value)

        def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
            return recorder.apply(function, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        nn.Module.__setattr__ = assign  # type: ignore[method-assign, assignment]
        self._exits.enter_context(patch.object(torch.autograd.Function, "apply", classmethod(apply)))
        if self._pretend:
            self._exits.enter_context(patch.object(torch.jit, "is_tracing", lambda: True))
        self._exits.enter_context(self._counter)
        super().__enter__()  # type: ignore[no-untyped-call]
        self.active = True
        return self

    def __exit__(self, *error: Any) -> None:
        self.active = False
        nn.Module.__call__ = _original_call  # type: ignore[method-assign]
        nn.Module.__setattr__ = _original_setattr  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._exits.close()

    def placeholder(self, tensor: Tensor) -> None:
        """Declare an input."""
        self._name(tensor, self._node("placeholder", f"input_{len(self.graph.nodes)}", (), {}))

    def output(self, tensors: Any) -> None:
        self.graph.output(tuple(self.argument(tensor) for tensor in tensors))

    # -- what the interpreter tells us

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._busy or not self.active:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func is torch._C._set_grad_enabled:
            return self._grad_mode(*args)
        tensors = [leaf for leaf in flat((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if name in DATA_READS:
            return self._read_data(func, name, args, kwargs)
        arguments = None
        if name != "__get__":  # before the call: it may write to what it was given
            arguments = self.argument(tuple(args)), self.argument(dict(kwargs))
        versions = [version(tensor) for tensor in tensors]
        self._busy, before = True, self._counter.total
        try:
            out = func(*args, **kwargs)
        finally:
            self._busy = False
        written = [t for t, seen in zip(tensors, versions, strict=True) if version(t) != seen]
        results = flat(out)[0]
        if name in SIZES or (name == "__get__" and _ops.attribute(func) == "shape"):
            return self._size(name, args, out)
        if not written and not any(isinstance(leaf, Tensor) for leaf in results):
            return out
        if name == "__set__" or name == "__delete__":
            node = self._node("call_function", setattr, (self.argument(args[0]), _ops.attribute(func),
                                                         self.argument(args[1])), {})
        elif name == "__get__":
            node = self._node("call_function", getattr, (self.argument(args[0]), _ops.attribute(func)), {})
        else:
            assert arguments is not None
            node = self._call(func, name, *arguments)
        self._done(node, tensors, written, out, self._counter.total - before)
        return out

    def call_module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What ``nn.Module.__call__`` does meanwhile."""
        path = self._paths.get(id(module))
        if self._busy or path is None or not self.active or threading.get_ident() != self._thread:
            return _original_call(module, *args, **kwargs)
        if path not in self._leaves and not _ops.is_leaf(module):
            self._stack.append(path)
            try:
                out = _original_call(module, *args, **kwargs)
            finally:
                self._stack.pop()
            self._close(path, out, leaf=False)
            return out
        out = self._whole("call_module", f"guest.{path}" if path else "guest",
                          lambda: _original_call(module, *args, **kwargs), args, kwargs)
        self._close(path, out, leaf=True)
        return out

    def apply(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What ``torch.autograd.Function.apply`` does meanwhile: one node, or its own backward would be lost."""
        def original() -> Any:
            return _original_apply.__get__(None, function)(*args, **kwargs)

        if self._busy or not self.active or threading.get_ident() != self._thread:
            return original()
        return self._whole("call_function", _ops.applier(function), original, args, kwargs)

    def _whole(self, op: str, target: Any, run: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """Run something as one node, whatever happens inside."""
        arguments = self.argument(tuple(args)), self.argument(dict(kwargs))
        tensors = [leaf for leaf in flat((args, kwargs))[0] if isinstance(leaf, Tensor)]
        versions = [version(tensor) for tensor in tensors]
        before, self._busy = self._counter.total, True
        try:
            with torch._C.DisableTorchFunction():
                out = run()
        finally:
            self._busy = False
        node = self._node(op, target, *arguments)
        written = [t for t, seen in zip(tensors, versions, strict=True) if version(t) != seen]
        self._done(node, tensors, written, out, self._counter.total - before)
        return out

    def assign(self, module: nn.Module, name: str, value: Any) -> None:
        """``module.name = tensor`` in forward is an effect like any other; the guest itself is restored afterwards."""
        path = self._paths.get(id(module))
        recorded = isinstance(value, Tensor) and (self._known(value) is not None or name in module._buffers)
        if path is not None and not self._busy and self.active and recorded:
            owner = self._node("get_attr", f"guest.{path}" if path else "guest", (), {})
            node = self._node("call_function", setattr, (owner, name, self.argument(value)), {})
            node.meta["effect"] = True
        elif isinstance(value, TracedInt | TracedFloat):
            value = value.__reduce__()[0](value)
        _original_setattr(module, name, value)

    def arithmetic(self, fn: Any, operands: tuple[Any, ...], value: Any) -> Any:
        """A result of Python arithmetic on traced numbers."""
        if self._busy:
            return value
        node = self._node("call_function", fn, tuple(self.argument(x) for x in operands), {})
        node.meta["value"] = value
        return traced_number(value, node, self)

    # -- nodes

    def argument(self, value: Any) -> Any:
        """``value`` as an argument of a node."""
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, TracedInt | TracedFloat):
            return value.node if value.recorder is self else value.__reduce__()[0](value)
        if isinstance(value, list):
            return [self.argument(item) for item in value]
        if isinstance(value, torch.Size):
            return tuple(self.argument(item) for item in value)
        if isinstance(value, tuple):
            items = [self.argument(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if type(value) is dict and all(isinstance(key, str) for key in value):
            return {key: self.argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if value is None or value is Ellipsis or type(value) in (bool, int, float, complex, str, torch.dtype,
                                                                 torch.device, torch.memory_format, torch.layout):
            return value
        return self._constant(value)

    def _node_of(self, tensor: Tensor) -> fx.Node:
        known = self._known(tensor)
        if known is not None:
            return known
        if id(tensor) in self._state:
            return self._node("get_attr", f"guest.{self._state[id(tensor)]}", (), {})
        return self._constant(tensor)

    def _known(self, tensor: Any) -> fx.Node | None:
        found = getattr(tensor, _NODE, None)
        return found[1] if found is not None and found[0] is self else None

    def _constant(self, value: Any) -> fx.Node:
        name = next((name for name, known in self.constants.items() if known is value), None)
        if name is None:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = value
        return self._node("get_attr", name, (), {})

    def _node(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        if _ops.autocast() != self._autocast:
            raise Untraceable(self._stack[-1], "an op under an autocast of the network's own", where_of())
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta.update(where=where_of(), path=self._stack[-1], macs=0, writes=())
        return node

    def _call(self, func: Any, name: str, args: Any, kwargs: Any) -> fx.Node:
        if name in OPERATORS and not kwargs:
            fn, swap = OPERATORS[name]
            return self._node("call_function", fn, args[::-1] if swap else args, {})
        if torch.overrides.is_tensor_method_or_property(func) and getattr(torch.Tensor, name, None) is not None:
            return self._node("call_method", name, args, kwargs)
        return self._node("call_function", func, args, kwargs)

    def _done(self, node: fx.Node, tensors: list[Tensor], written: list[Tensor], out: Any, macs: int) -> None:
        """Name the results of an op, and note what it read, wrote and cost."""
        node.meta["macs"] = macs
        node.meta["writes"] = tuple(self._node_of(tensor) for tensor in written)
        roots = {t.untyped_storage()._cdata: self._node_of(t).meta.get("root") for t in tensors if _ops.has_storage(t)}
        self._unpack(node, out, roots)

    def _unpack(self, node: fx.Node, out: Any, roots: dict[int, Any]) -> None:
        if isinstance(out, Tensor):
            if _ops.has_storage(out):
                node.meta["root"] = roots.get(out.untyped_storage()._cdata) or node
            self._name(out, node)
        elif isinstance(out, tuple | list):
            for index, item in enumerate(out):
                if _ops.holds_tensor(item):
                    part = self._node("call_function", OPERATORS["__getitem__"][0], (node, index), {})
                    self._unpack(part, item, roots)
        elif isinstance(out, dict):
            for key, item in out.items():
                if _ops.holds_tensor(item):
                    part = self._node("call_function", OPERATORS["__getitem__"][0], (node, key), {})
                    self._unpack(part, item, roots)
        elif hasattr(out, "__dataclass_fields__"):
            for key in out.__dataclass_fields__:
                if _ops.holds_tensor(getattr(out, key)):
                    part = self._node("call_function", getattr, (node, key), {})
                    self._unpack(part, getattr(out, key), roots)

    def _name(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta.setdefault("root", node)
        node.meta["shape"], node.meta["dtype"] = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        if self.rows:
            node.meta["print"] = _ops.fingerprint(tensor) if tensor.shape[:1] == (self.rows,) else None
        if id(tensor) not in self._state:
            setattr(tensor, _NODE, (self, node))

    def _size(self, name: str, args: Any, out: Any) -> Any:
        source = args[0]
        if not isinstance(source, Tensor) or self._known(source) is None:
            return out  # of a parameter: the guest's shape, not the input's
        if isinstance(out, torch.Size):
            numbers = []
            for dim, value in enumerate(out):
                node = self._node("call_method", "size", (self._node_of(source), dim), {})
                node.meta["value"] = value
                numbers.append(traced_number(value, node, self))
            return torch.Size(numbers)
        if name == "__len__":
            return out  # len() must be a true int: burnt in
        node = self._node("call_method", name, (self._node_of(source), *(self.argument(a) for a in args[1:])), {})
        node.meta["value"] = out
        return traced_number(out, node, self)

    def _read_data(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Python asks for a tensor's value: kept symbolic where it can be, otherwise watched when the graph runs."""
        self._busy = True
        try:
            out = func(*args, **kwargs)
        finally:
            self._busy = False
        if not any(isinstance(t, Tensor) and self._known(t) is not None for t in flat((args, kwargs))[0]):
            return out
        arguments = self.argument(tuple(args)), self.argument(dict(kwargs))
        node = self._call(func, name, *arguments)
        node.meta["value"] = out
        if name == "item":
            return traced_number(out, node, self)
        expected = out if isinstance(out, bool | int | float | list) else self._constant(out)
        self.watches += 1
        watch = self._node("call_function", same_as_traced, (node, expected, node.meta["where"]), {})
        watch.meta["effect"] = True
        return out

    def _grad_mode(self, enabled: bool) -> None:
        """``with torch.no_grad():`` in forward. Where gradients are off anyway, it is nothing to record."""
        if self._grad:
            self._node("call_function", torch._C._set_grad_enabled, (enabled,), {}).meta["effect"] = True
        torch._C._set_grad_enabled(enabled)

    def _close(self, path: str, out: Any, leaf: bool) -> None:
        call = self._calls[path]
        self._calls[path] += 1
        tensors = [leaf_ for leaf_ in flat(out)[0] if isinstance(leaf_, Tensor)]
        nodes = tuple(node for t in tensors if (node := self._known(t)) is not None)
        self.closes.append(Close(path, call, len(self.graph.nodes), nodes, leaf))

    def untracked(self, func: Any, args: Any, kwargs: Any) -> None:
        """An aten op ran outside any node, in a scripted function for one. Its module must become a leaf."""
        if self._busy or not self.active:
            return
        if any(isinstance(leaf, Tensor) and self._known(leaf) is not None for leaf in flat((args, kwargs))[0]):
            self.hidden = Untraceable(self._stack[-1], str(func), where_of())
            raise self.hidden


class _Counter(MacCounter):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        self._recorder.untracked(func, args, kwargs)
        super().note(func, args, kwargs, out)

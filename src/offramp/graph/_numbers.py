"""Numbers that remember where they came from: an int read off a shape stays an op of the graph.

They are true ``int`` and ``float`` objects, so that ``range``, ``if`` and torch's own parsers take them; only
arithmetic is recorded. What Python does behind their back (``range(n)``, ``math.sqrt(n)``) burns their value in;
the tracer finds that out by tracing twice.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

__all__ = ["TracedFloat", "TracedInt", "traced_number"]


class _Traced:
    """Shared by both kinds: the node that computes the number, and the recorder it belongs to."""

    node: fx.Node
    recorder: Any

    def __reduce__(self) -> Any:
        return (int, (int(self),)) if isinstance(self, int) else (float, (float(self),))  # type: ignore[arg-type]

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class TracedInt(_Traced, int):
    """An int with a node; a plain int once its trace is over."""


class TracedFloat(_Traced, float):
    """A float with a node; a plain float once its trace is over."""


def traced_number(value: float | int, node: fx.Node, recorder: Any) -> Any:
    """``value`` as a number that stands for ``node``; bools are left alone, they steer Python."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    made: Any = TracedInt(value) if isinstance(value, int) else TracedFloat(value)
    made.node, made.recorder = node, recorder
    return made


def _binary(base: type, name: str, fn: Callable[..., Any], swap: bool) -> Callable[..., Any]:
    plain = getattr(base, name)

    def method(self: Any, other: Any, *rest: Any) -> Any:
        value = plain(self, other, *rest)
        if value is NotImplemented or not self.recorder.active:
            return value
        return self.recorder.arithmetic(fn, (other, self) if swap else (self, other), value)

    method.__name__ = name
    return method


def _unary(base: type, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    plain = getattr(base, name)

    def method(self: Any) -> Any:
        value = plain(self)
        return self.recorder.arithmetic(fn, (self,), value) if self.recorder.active else value

    method.__name__ = name
    return method


for _cls, _base in ((TracedInt, int), (TracedFloat, float)):
    for _name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow"):
        setattr(_cls, f"__{_name}__", _binary(_base, f"__{_name}__", getattr(operator, _name), swap=False))
        setattr(_cls, f"__r{_name}__", _binary(_base, f"__r{_name}__", getattr(operator, _name), swap=True))
    for _name in ("neg", "abs", "pos"):
        setattr(_cls, f"__{_name}__", _unary(_base, f"__{_name}__", getattr(operator, _name)))

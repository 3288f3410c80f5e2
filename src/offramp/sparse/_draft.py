"""What a network does, value by value, before it is known which operations run as one and where their results lie.

A *value* is one activation, written once. :func:`fused` makes of single steps (a convolution, a norm, an addition, a
ReLU, a resize) the operations that a runner has, each of which ends in norm, addition and activation.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from offramp._kernel.ops import Level, Resize, Window

__all__ = ["Cat", "Convolution", "Draft", "Pooling", "Step", "Sum", "Term", "Value", "fused"]


@dataclass(frozen=True, eq=False)
class Value:
    """One activation of one image."""

    level: Level
    channels: int
    name: str


@dataclass(frozen=True)
class Term:
    value: Value
    resize: Resize | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class _Step:
    out: Value


@dataclass(frozen=True, eq=False, kw_only=True)
class Convolution(_Step):
    """As :class:`offramp._kernel.ops.Conv`."""

    source: Value
    weight: Tensor
    window: Window
    groups: int
    scale: Tensor
    shift: Tensor
    bare: Tensor
    lam: float
    says: bool = False
    """Whether it gives the network's own logits."""
    residual: Value | None = None
    relu: bool = False

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.source,) if self.residual is None else (self.source, self.residual)

    def normed(self, scale: Tensor | None, shift: Tensor) -> "Convolution":
        one = self if scale is None else replace(
            self, scale=self.scale * scale, shift=self.shift * scale, bare=self.bare * scale)
        return replace(one, shift=one.shift + shift, bare=one.bare + shift)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sum(_Step):
    """As :class:`offramp._kernel.ops.Sum`; of one term it is a norm, an activation, a resize or a copy."""

    terms: tuple[Term, ...]
    scale: Tensor | None = None
    shift: Tensor | None = None
    relu: bool = False

    @property
    def reads(self) -> tuple[Value, ...]:
        return tuple(term.value for term in self.terms)

    @property
    def plain(self) -> bool:
        """Whether it adds, and does no more."""
        return self.scale is None and self.shift is None and not self.relu

    def normed(self, scale: Tensor | None, shift: Tensor) -> "Sum":
        ours = scale if self.scale is None else self.scale if scale is None else self.scale * scale
        moved = self.shift if scale is None or self.shift is None else self.shift * scale
        return replace(self, scale=ours, shift=shift if moved is None else moved + shift)


@dataclass(frozen=True, eq=False, kw_only=True)
class Pooling(_Step):
    source: Value
    window: Window
    kind: Literal["mean", "max"]
    counts_padding: bool

    @property
    def reads(self) -> tuple[Value, ...]:
        return (self.source,)


@dataclass(frozen=True, eq=False, kw_only=True)
class Cat(_Step):
    """Values side by side in one; no operation where they can be written there."""

    parts: tuple[Value, ...]

    @property
    def reads(self) -> tuple[Value, ...]:
        return self.parts


Step = Convolution | Sum | Pooling | Cat


@dataclass
class Draft:
    """The steps of each segment, in order, and what somebody outside reads of it: frontiers and logits."""

    steps: list[list[Step]] = field(default_factory=list)
    kept: list[list[Value]] = field(default_factory=list)


def fused(draft: Draft) -> Draft:
    """The same values by fewer steps: norms, additions and activations go into what they alone follow."""
    steps = _needed(draft)
    uses = Counter(value for part in steps for step in part for value in step.reads)
    uses.update(value for part in draft.kept for value in part)
    return Draft([_added(_joined(part, uses), uses) for part in steps], draft.kept)


def _needed(draft: Draft) -> list[list[Step]]:
    """What no kept value comes from is left out."""
    found: list[list[Step]] = []
    wanted: set[Value] = set()
    for part, kept in zip(reversed(draft.steps), reversed(draft.kept), strict=True):
        wanted.update(kept)
        mine: list[Step] = []
        for step in reversed(part):
            if step.out in wanted:
                wanted.update(step.reads)
                mine.append(step)
        found.append(mine[::-1])
    return found[::-1]


def _joined(steps: Sequence[Step], uses: Counter[Value]) -> list[Step]:
    """Norms and activations join the step before; a sum of a sum, or of what was resized for it, is one sum."""
    made: dict[Value, Step] = {}  # by what it gives, in order

    def taken(value: Value) -> Step | None:
        """The step that gives a value to this one alone."""
        return made.get(value) if uses[value] == 1 else None

    for step in steps:
        if isinstance(step, Sum) and len(step.terms) == 1 and step.terms[0].resize is None:
            before = taken(step.terms[0].value)
            if isinstance(before, Convolution | Sum) and not before.relu:
                if step.shift is not None:
                    before = before.normed(step.scale, step.shift)
                elif step.scale is not None:
                    before = before.normed(step.scale, torch.zeros_like(step.scale))
                made.pop(step.terms[0].value)
                made[step.out] = replace(before, out=step.out, relu=step.relu)
                continue
        if isinstance(step, Sum):
            terms: list[Term] = []
            for term in step.terms:
                before = taken(term.value) if term.resize is None else None
                if isinstance(before, Sum) and before.plain:
                    terms += made.pop(term.value).terms  # type: ignore[union-attr]
                else:
                    terms.append(term)
            step = replace(step, terms=tuple(terms))
        made[step.out] = step
    return list(made.values())


def _added(steps: Sequence[Step], uses: Counter[Value]) -> list[Step]:
    """A sum's convolutions add the rest of it themselves, one after the other."""
    made: dict[Value, Step] = {}
    for step in steps:
        made[step.out] = step
        if not isinstance(step, Sum) or len(step.terms) < 2 or not replace(step, relu=False).plain:
            continue
        convs = [before for term in step.terms if term.resize is None and uses[term.value] == 1
                 and isinstance(before := made.get(term.value), Convolution)
                 and before.residual is None and not before.relu]
        if not convs:
            continue
        rest = [term for term in step.terms if term.value not in {conv.out for conv in convs}]
        del made[step.out]
        for conv in convs:
            del made[conv.out]
        total = rest[0].value if len(rest) == 1 and rest[0].resize is None else None
        if rest and total is None:
            total = Value(step.out.level, step.out.channels, f"{step.out.name}, in part")
            made[total] = Sum(out=total, terms=tuple(rest))
        for conv in convs[:-1]:
            made[conv.out] = replace(conv, residual=total)
            total = conv.out
        made[step.out] = replace(convs[-1], out=step.out, residual=total, relu=step.relu)
    return list(made.values())

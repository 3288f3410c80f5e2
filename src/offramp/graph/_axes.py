"""Which channels belong together: a union-find whose sets may turn out to be multiples or parts of one another.

An axis is a row of segments. To say that two axes are the same one is to cut both until their segments match, and to
join these pairwise: 64 channels that are added to a concatenation of 48 and 16 become two sets; 512 x 7 x 7 features
that a linear layer reads become 512 sets of 49.
"""

import math
from dataclasses import dataclass

__all__ = ["Axes", "Axis", "Segment"]


@dataclass(frozen=True)
class Segment:
    """Consecutive channels: every element of a space stands for ``unit`` of them."""

    space: int
    unit: int = 1


Axis = tuple[Segment, ...]


class Axes:
    """All sets of channels met so far; sizes in elements, lengths and offsets in channels."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._parts: list[Axis] = []
        self._why: dict[int, str] = {}
        self._soft: set[int] = set()

    def new(self, size: int, why: str = "") -> Axis:
        """An axis of ``size`` channels, each a set of its own; fixed if a reason is given."""
        self._sizes.append(size)
        self._parts.append(())
        if why:
            self._why[len(self._sizes) - 1] = why
        return (Segment(len(self._sizes) - 1),)

    def resolve(self, axis: Axis) -> Axis:
        """The axis in terms of what its spaces turned out to be."""
        found: list[Segment] = []
        for segment in axis:
            parts = self._parts[segment.space]
            found += self.resolve(scaled(parts, segment.unit)) if parts else (segment,)
        return tuple(found)

    def size(self, space: int) -> int:
        return self._sizes[space]

    def length(self, axis: Axis) -> int:
        return sum(self._sizes[segment.space] * segment.unit for segment in axis)

    def why(self, space: int) -> str:
        """Why a space is fixed; nothing if it is not."""
        return self._why.get(space, "")

    def is_fixed(self, axis: Axis) -> bool:
        """Whether nothing on this axis can be narrowed, for reasons other than ops that nobody understood."""
        spaces = {segment.space for segment in self.resolve(axis)}
        return all(space in self._why and space not in self._soft for space in spaces)

    def fix(self, axis: Axis, why: str, *, soft: bool = False) -> None:
        """Keep all of these channels. soft: only because an op was not understood; any other reason overrules it."""
        for segment in self.resolve(axis):
            space = segment.space
            if space not in self._why or (space in self._soft and not soft):
                self._why[space] = why
                (self._soft.add if soft else self._soft.discard)(space)

    def unify(self, a: Axis, b: Axis) -> None:
        """The two axes hold the same channels; both have the same length."""
        a, b = self.resolve(a), self.resolve(b)
        assert self.length(a) == self.length(b)
        while a:
            ours, theirs = self.length(a[:1]), self.length(b[:1])
            if ours > theirs:
                a = self._cut(a, theirs)
            elif theirs > ours:
                b = self._cut(b, ours)
            else:
                if a[0] != b[0]:
                    self._join(a[0], b[0])
                a, b = a[1:], b[1:]
            a, b = self.resolve(a), self.resolve(b)

    def parts(self, axis: Axis, count: int, unit: int = 1) -> Axis:
        """What the axis is ``count`` times over, ``unit`` times each; its length is a multiple of both."""
        part = self.new(self.length(axis) // count // unit)
        self.unify(axis, scaled(part, unit) * count)
        return self.resolve(part)

    def _join(self, a: Segment, b: Segment) -> None:
        width = math.lcm(a.unit, b.unit)  # channels that are kept or dropped together
        if width in (a.unit, b.unit):
            coarse, fine = (a, b) if width == a.unit else (b, a)
            space = coarse.space
            self._parts[fine.space] = (Segment(space, width // fine.unit),)
        else:
            (whole,) = self.new(self._sizes[a.space] * a.unit // width)
            space = whole.space
            for segment in (a, b):
                self._parts[segment.space] = (Segment(space, width // segment.unit),)
        known = [old for old in (a.space, b.space) if old in self._why]
        if known:
            hard = [old for old in known if old not in self._soft]
            self._why[space] = self._why[(hard or known)[0]]
            (self._soft.discard if hard else self._soft.add)(space)

    def _cut(self, axis: Axis, at: int) -> Axis:
        """The same axis with a border between segments at that channel."""
        while True:
            axis = self.resolve(axis)
            i, left = 0, at
            while left and left >= self.length(axis[i:i + 1]):
                left -= self.length(axis[i:i + 1])
                i += 1
            if not left:
                return axis
            segment = axis[i]
            size, unit, why = self._sizes[segment.space], segment.unit, self.why(segment.space)
            if why and left % unit:  # never narrowed, so that it need not stay one space
                pieces = self.new(left, why) + self.new(size * unit - left, why)
                if segment.space in self._soft:
                    self._soft |= {piece.space for piece in pieces}
                return axis[:i] + pieces + axis[i + 1:]
            # An element on both sides of the border: at no width could both sides do without it alike.
            first = left // unit
            middle = 1 if left % unit else 0
            split = ((first, why), (middle, why or "its channels lie on both sides of a split"),
                     (size - first - middle, why))
            pieces = tuple(piece for many, reason in split if many for piece in self.new(many, reason))
            self._parts[segment.space] = pieces
            if segment.space in self._soft:
                self._soft |= {piece.space for piece in pieces}


def scaled(axis: Axis, by: int) -> Axis:
    """Every channel ``by`` times in a row."""
    return tuple(Segment(segment.space, segment.unit * by) for segment in axis)

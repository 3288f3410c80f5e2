"""A canvas that draws colour and class together, a pinhole camera, and dice: integers only, the same everywhere.

Axes: H W space. The world is in centimetres: x to the right and y above the ground, z ahead of the camera.
"""

from dataclasses import dataclass
from typing import TypeVar, final

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Colour = tuple[int, int, int]
Ints = NDArray[np.int64]


@final
class Dice:
    """Integers from a Philox stream, whose raw words numpy promises never to change (its distributions it may)."""

    def __init__(self, seed: int, stream: int, index: int) -> None:
        mask = (1 << 64) - 1
        self._bits = np.random.Philox(key=np.array([seed & mask, stream & mask], dtype=np.uint64),
                                      counter=np.array([0, 0, 0, index & mask], dtype=np.uint64))
        self._words: list[int] = []

    def below(self, n: int) -> int:
        if not self._words:
            self._words = self._bits.random_raw(256).tolist()
        return (self._words.pop() >> 16) % n

    def between(self, low: int, high: int) -> int:
        """Both ends included; the two may come in either order."""
        return low + self.below(high - low + 1) if high >= low else high + self.below(low - high + 1)

    def chance(self, permille: int) -> bool:
        return self.below(1000) < permille

    def pick(self, things: tuple[T, ...]) -> T:
        return things[self.below(len(things))]

    def near(self, colour: Colour, spread: int) -> Colour:
        """A colour not further than ``spread`` from ``colour``, moved as a whole and then a little per channel."""
        move = self.between(-spread, spread)
        r, g, b = (min(255, max(0, c + move + self.between(-spread // 4, spread // 4))) for c in colour)
        return r, g, b

    def bytes(self, n: int) -> NDArray[np.uint8]:
        return self._bits.random_raw((n + 7) // 8).astype("<u8").view(np.uint8)[:n]


@final
@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole at ``height`` above the road, looking along it; (cx, cy) is the vanishing point, ``f`` in pixels."""

    cx: int
    cy: int
    f: int
    height: int = 150

    def column(self, x: int, z: int) -> int:
        return self.cx + self.f * x // z

    def row(self, y: int, z: int) -> int:
        return self.cy + self.f * (self.height - y) // z


@final
class Canvas:
    """``rgb`` (H, W, 3) and ``label`` (H, W), both uint8; every shape is clipped to the picture."""

    def __init__(self, height: int, width: int, haze: Colour, visibility: int) -> None:
        self.h, self.w = height, width
        self.rgb = np.zeros((height, width, 3), dtype=np.uint8)
        self.label = np.zeros((height, width), dtype=np.uint8)
        self.haze, self.visibility = haze, visibility
        self.ys: Ints = np.arange(height, dtype=np.int64)[:, None]
        self.xs: Ints = np.arange(width, dtype=np.int64)[None, :]

    def far(self, colour: Colour, z: int) -> Colour:
        """The colour as it looks through ``z`` centimetres of haze."""
        near_part, all_parts = self.visibility, self.visibility + z
        r, g, b = ((c * near_part + h * z) // all_parts for c, h in zip(colour, self.haze, strict=True))
        return r, g, b

    def box(self, x0: int, y0: int, x1: int, y1: int, colour: Colour, cls: int) -> None:
        """Columns x0 .. x1 and rows y0 .. y1, at least one pixel of each."""
        x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
        x0, y0 = max(x0, 0), max(y0, 0)
        if x1 > x0 and y1 > y0:
            self.rgb[y0:y1, x0:x1] = colour
            self.label[y0:y1, x0:x1] = cls

    def ellipse(self, cx: int, cy: int, rx: int, ry: int, colour: Colour, cls: int, hole: int = 0) -> None:
        """Filled, or a ring when ``hole`` (per mille of the radius) is above 0; at least one pixel."""
        rx, ry = max(rx, 1), max(ry, 1)
        x0, x1, y0, y1 = max(cx - rx, 0), min(cx + rx, self.w), max(cy - ry, 0), min(cy + ry, self.h)
        if x1 <= x0 or y1 <= y0:
            return
        dx = 2 * (self.xs[:, x0:x1] - cx) + 1
        dy = 2 * (self.ys[y0:y1] - cy) + 1
        distance = dx * dx * (ry * ry) + dy * dy * (rx * rx)
        limit = 4 * rx * rx * ry * ry
        inside = distance <= limit
        if hole:
            inside &= distance * 1000000 >= limit * hole * hole
        self.rgb[y0:y1, x0:x1][inside] = colour
        self.label[y0:y1, x0:x1][inside] = cls

    def triangle(self, cx: int, top: int, half: int, height: int, colour: Colour, cls: int) -> None:
        """Point upwards."""
        height = max(height, 1)
        for row in range(height):
            reach = half * (row + 1) // height
            self.box(cx - reach, top + row, cx + reach + 1, top + row + 1, colour, cls)

    def wall(self, eye: Camera, x: int, z0: int, z1: int, top: int, colours: tuple[Colour, Colour], cls: int,
             grid: tuple[int, int, int, int]) -> None:
        """A wall along the road at ``x`` from ``z0`` to ``z1``, ``top`` high, with windows (or slats) in a grid.

        ``grid`` is (period along z, opening along z, period up, opening up); openings take the second colour.
        """
        a, b = sorted((eye.column(x, z0), eye.column(x, z1)))
        a, b = max(a, 0), min(b, self.w)
        if b <= a:
            return
        offset = np.maximum(np.abs(self.xs[:, a:b] - eye.cx), 1)
        z = np.clip(eye.f * abs(x) // offset, z0, z1)
        upper = eye.cy + eye.f * (eye.height - top) // z
        lower = eye.cy + eye.f * eye.height // z
        r0, r1 = max(int(upper.min()), 0), min(int(lower.max()), self.h)
        if r1 <= r0:
            return
        rows = self.ys[r0:r1]
        inside = (rows >= upper) & (rows < lower)
        up = eye.height - (rows - eye.cy) * z // eye.f
        along_period, along_open, up_period, up_open = grid
        opening = (z % along_period < along_open) & (up % up_period < up_open)
        middle = (z0 + z1) // 2
        shades = np.array([self.far(c, middle) for c in colours], dtype=np.uint8)
        patch = self.rgb[r0:r1, a:b]
        patch[inside] = shades[opening[inside].astype(np.intp)]
        self.label[r0:r1, a:b][inside] = cls


@final
class Stand:
    """Draws in centimetres around a foot point (x, z): u to the right of it and v above the ground."""

    def __init__(self, canvas: Canvas, eye: Camera, x: int, z: int, cls: int) -> None:
        self.canvas, self.eye, self.x, self.z, self.cls = canvas, eye, x, z, cls

    def box(self, u0: int, v0: int, u1: int, v1: int, colour: Colour) -> None:
        eye, z = self.eye, self.z
        self.canvas.box(eye.column(self.x + u0, z), eye.row(v1, z), eye.column(self.x + u1, z), eye.row(v0, z),
                        self.canvas.far(colour, z), self.cls)

    def disc(self, u: int, v: int, ru: int, rv: int, colour: Colour, hole: int = 0) -> None:
        eye, z = self.eye, self.z
        self.canvas.ellipse(eye.column(self.x + u, z), eye.row(v, z), eye.f * ru // z, eye.f * rv // z,
                            self.canvas.far(colour, z), self.cls, hole)

    def triangle(self, u: int, v: int, half: int, height: int, colour: Colour) -> None:
        eye, z = self.eye, self.z
        self.canvas.triangle(eye.column(self.x + u, z), eye.row(v + height, z), eye.f * half // z,
                             eye.f * height // z, self.canvas.far(colour, z), self.cls)

"""One stick figure, drawn in integers alone, the same everywhere. Lengths are in sixteenths of a pixel; y goes down."""

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from offramp.data._canvas import Colour, Dice, Ints

__all__ = ["Body", "body", "paint"]

UNIT = 16
_TURN = 256  # steps of a whole turn
_SINE = tuple(round(4096 * math.sin(2 * math.pi * step / _TURN)) for step in range(_TURN))
Spot = tuple[int, int]


@final
@dataclass(frozen=True, kw_only=True)
class Body:
    """A posed figure."""

    joints: tuple[Spot, ...]
    """Sixteen, in MPII's order."""
    head: Spot
    radius: int
    """Of the head."""
    height: int
    facing: bool
    """Whether it is seen from the front, so that its right side is on the picture's left."""
    difficulty: int
    """Per mille."""


def _along(start: Spot, angle: int, length: int) -> Spot:
    """So far from a spot; angle 0 is down, a quarter of a turn is to the right."""
    x = start[0] + length * _SINE[angle % _TURN] // 4096
    return x, start[1] + length * _SINE[(angle + _TURN // 4) % _TURN] // 4096


def body(dice: Dice, size: tuple[int, int], low: int, high: int) -> Body:
    """A figure in a picture of ``size`` (H, W); harder ones bend further, and turn their back more often."""
    hard = dice.between(low, high)
    side = min(size) * UNIT
    height = side * dice.between(600, 820) // 1000
    facing = not dice.chance(hard // 4)
    right = -1 if facing else 1  # where in the picture the person's right is
    lean = dice.between(-6, 6) + dice.between(-26, 26) * hard // 1000

    def part(permille: int) -> int:
        return height * permille // 1000

    pelvis = (0, 0)
    thorax = _along(pelvis, _TURN // 2 - lean, part(290))
    neck = _along(thorax, _TURN // 2 - lean, part(50))
    tilt = lean + dice.between(-10, 10)
    top = _along(neck, _TURN // 2 - tilt, part(135))
    limbs: dict[str, tuple[Spot, Spot, Spot]] = {}
    for name, to in (("right", right), ("left", -right)):
        across = to * _TURN // 4 - lean
        hip, shoulder = _along(pelvis, across, part(65)), _along(thorax, across, part(110))
        free = 250 + 750 * hard // 1000
        thigh = to * (dice.between(-6, 12) + dice.between(0, 40) * free // 1000) - lean
        shin = thigh - to * dice.between(0, 44) * free // 1000
        arm = to * (8 + dice.between(-16, 110) * free // 1000) - lean
        fore = arm + to * dice.between(-30, 90) * free // 1000
        knee, elbow = _along(hip, thigh, part(240)), _along(shoulder, arm, part(165))
        limbs[f"{name} leg"] = hip, knee, _along(knee, shin, part(240))
        limbs[f"{name} arm"] = shoulder, elbow, _along(elbow, fore, part(150))
    (rh, rk, ra), (lh, lk, la) = limbs["right leg"], limbs["left leg"]
    (rs, re, rw), (ls, le, lw) = limbs["right arm"], limbs["left arm"]
    spots = (ra, rk, rh, lh, lk, la, pelvis, thorax, neck, top, rw, re, rs, ls, le, lw)
    wander = side * (20 + 60 * hard // 1000) // 1000
    middle = [size[1 - axis] * UNIT // 2 - (min(s[axis] for s in spots) + max(s[axis] for s in spots)) // 2
              + dice.between(-wander, wander) for axis in (0, 1)]
    joints = tuple((x + middle[0], y + middle[1]) for x, y in spots)
    head = ((joints[8][0] + joints[9][0]) // 2, (joints[8][1] + joints[9][1]) // 2)
    return Body(joints=joints, head=head, radius=part(68), height=height, facing=facing, difficulty=hard)


def paint(dice: Dice, one: Body, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture (H, W, 3): things behind, the figure, in harder ones something before it, haze and noise."""
    hard, (high, wide) = one.difficulty, size
    page = _Page(high, wide)
    upper, lower = [dice.near((128, 128, 128), 90) for _ in range(2)]
    share = page.ys // UNIT
    page.rgb[:] = np.array([[u * (high - y) // high + v * y // high for u, v in zip(upper, lower, strict=True)]
                            for y in share[:, 0].tolist()], np.uint8)[:, None]

    def somewhere() -> Spot:
        return dice.below(wide * UNIT), dice.below(high * UNIT)

    limb = max(one.height * 26 // 1000, UNIT * 3 // 4)
    skin, shirt, trousers = dice.near((196, 150, 120), 50), dice.near((128, 128, 128), 110), dice.near((80, 80, 90), 70)
    for _ in range(2 + dice.between(0, 12) * hard // 1000):
        start = somewhere()
        end = _along(start, dice.below(_TURN), one.height * dice.between(100, 500) // 1000)
        colour = skin if dice.chance(hard // 3) else dice.near((128, 128, 128), 110)
        page.limb(start, end, limb * dice.between(500, 2500) // 1000, colour)
    j = one.joints
    sleeves = shirt if dice.chance(500) else skin
    arms = [(12, 11, 10), (13, 14, 15)]
    hidden = [arm for arm in arms if dice.chance(250 if one.facing else 600)]  # an arm behind the trunk
    for shoulder, elbow, wrist in hidden:
        page.limb(j[shoulder], j[elbow], limb, sleeves)
        page.limb(j[elbow], j[wrist], limb * 4 // 5, skin)
    for hip, knee, ankle in ((2, 1, 0), (3, 4, 5)):
        page.limb(j[hip], j[knee], limb * 5 // 4, trousers)
        page.limb(j[knee], j[ankle], limb, trousers)
    page.limb(j[12], j[13], limb * 5 // 4, shirt)
    for above, below in ((12, 2), (13, 3), (7, 6)):
        page.limb(j[above], j[below], limb * 2, shirt)
    page.limb(j[7], j[8], limb, skin)
    for shoulder, elbow, wrist in (arm for arm in arms if arm not in hidden):
        page.limb(j[shoulder], j[elbow], limb, sleeves)
        page.limb(j[elbow], j[wrist], limb * 4 // 5, skin)
    hair = dice.near((60, 45, 35), 40)
    page.limb(one.head, one.head, one.radius, hair)
    if one.facing:  # a face, by which right and left can be told
        face = ((one.head[0] * 3 + j[8][0]) // 4, (one.head[1] * 3 + j[8][1]) // 4)
        page.limb(face, face, one.radius * 3 // 4, skin)
    for _ in range(dice.between(0, 3) * hard // 1000):
        start = somewhere()
        end = _along(start, dice.below(_TURN), one.height * dice.between(100, 300) // 1000)
        page.limb(start, end, limb * dice.between(1000, 2000) // 1000, dice.near((128, 128, 128), 110))
    haze, noise = dice.near((160, 160, 160), 40), 4 + 28 * hard // 1000
    keep = 1000 - dice.between(0, 500) * hard // 1000
    clear = page.rgb.astype(np.int64) * keep // 1000 + np.array(haze, np.int64) * (1000 - keep) // 1000
    grain = dice.bytes(high * wide * 3).astype(np.int64).reshape(high, wide, 3) - 128
    drawn: NDArray[np.uint8] = np.clip(clear + grain * noise // 128, 0, 255).astype(np.uint8)
    return drawn


@final
class _Page:
    """``rgb`` (H, W, 3), to draw thick lines with round ends on."""

    def __init__(self, high: int, wide: int) -> None:
        self.rgb = np.zeros((high, wide, 3), np.uint8)
        self.ys: Ints = UNIT * np.arange(high, dtype=np.int64)[:, None]
        self.xs: Ints = UNIT * np.arange(wide, dtype=np.int64)[None, :]

    def limb(self, a: Spot, b: Spot, radius: int, colour: Colour) -> None:
        """All pixels whose centres are no further than ``radius`` from the line from a to b."""
        dx, dy = self.xs - a[0], self.ys - a[1]
        vx, vy = b[0] - a[0], b[1] - a[1]
        along, length = dx * vx + dy * vy, vx * vx + vy * vy
        beside = (along >= 0) & (along <= length) & ((dx * vy - dy * vx) ** 2 <= radius * radius * length)
        ends = np.minimum(dx * dx + dy * dy, (dx - vx) ** 2 + (dy - vy) ** 2) <= radius * radius
        self.rgb[(beside & bool(length)) | ends] = colour

"""Draws one street scene: sky, ground, houses, then everything that stands on the ground from far to near."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.data._canvas import Camera, Canvas, Colour, Dice, Stand

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "person", "bicyclist")
SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PERSON, BICYCLIST = range(11)
VOID = 255
KINDS = ("empty", "car", "person", "bicyclist", "tree", "sign", "fence", "lamp")
"""What stands nearest, in the middle of the picture: the classes of the classification view."""

ROAD_HALF, PAVEMENT_END = 350, 650

PAINT: tuple[Colour, ...] = (
    (190, 30, 30), (30, 60, 160), (225, 225, 225), (35, 35, 40), (150, 155, 160), (220, 180, 40), (30, 110, 70),
    (120, 40, 110),
)
BRICK: tuple[Colour, ...] = (
    (150, 85, 65), (175, 155, 125), (120, 110, 105), (190, 175, 150), (135, 120, 95), (165, 120, 90),
)
SKIES: tuple[Colour, ...] = ((120, 170, 225), (150, 185, 220), (175, 190, 205), (200, 205, 210), (205, 170, 150))
STRIPES: tuple[tuple[Colour, Colour], ...] = (
    ((200, 40, 40), (235, 235, 235)), ((225, 180, 40), (40, 40, 40)), ((130, 100, 75), (95, 72, 52)),
)
SKIN: tuple[Colour, ...] = ((225, 185, 155), (165, 115, 85), (95, 65, 50))


@dataclass(frozen=True)
class Scene:
    rgb: NDArray[np.uint8]
    """(H, W, 3)"""
    label: NDArray[np.uint8]
    """(H, W), ids of CLASSES or 255"""
    kind: int
    """index into KINDS"""
    difficulty: int
    """per mille"""


def draw(seed: int, stream: int, index: int, size: tuple[int, int], low: int, high: int) -> Scene:
    """Scene ``index`` of a stream; its difficulty, per mille, is drawn evenly from ``low`` to ``high``."""
    dice = Dice(seed, stream, index)
    hard = dice.between(low, high)
    kind = dice.below(len(KINDS))
    height, width = size
    sky = dice.near(dice.pick(SKIES), 6 + hard // 40)
    canvas = Canvas(height, width, sky, dice.between(30000 - 27 * hard, 40000 - 30 * hard))
    eye = Camera(cx=width * dice.between(500 - hard // 8, 500 + hard // 8) // 1000,
                 cy=height * dice.between(400 - hard // 12, 430 + hard // 12) // 1000, f=max(width * 7 // 8, 1))
    _sky_and_ground(canvas, eye, dice, sky, hard)
    _houses(canvas, eye, dice, hard)
    for thing in sorted(_things(canvas, eye, dice, kind, hard), key=lambda thing: -thing[0]):
        thing[1]()
    _weather(canvas, eye, dice, hard)
    return Scene(canvas.rgb, canvas.label, kind, hard)


def _sky_and_ground(canvas: Canvas, eye: Camera, dice: Dice, sky: Colour, hard: int) -> None:
    ramp = np.clip(canvas.ys * 60 // max(eye.cy, 1), 0, 60)[:, :, None]
    canvas.rgb[:] = np.clip(np.array(sky, dtype=np.int64) - 30 + ramp, 0, 255)
    if dice.chance(600):
        for _ in range(dice.between(1, 3)):
            canvas.ellipse(dice.below(canvas.w), dice.below(max(eye.cy, 1)), canvas.w // dice.between(6, 12),
                           canvas.h // dice.between(14, 30), dice.near((225, 228, 232), 10), SKY)
    far_roofs = dice.near((130, 130, 135), 15)
    for left in range(0, canvas.w, max(canvas.w // 9, 1)):
        canvas.box(left, eye.cy - canvas.h * dice.between(20, 90) // 1000, left + canvas.w // 8 + 1, eye.cy,
                   canvas.far(far_roofs, 9000), BUILDING)
    down = canvas.ys[eye.cy :] - eye.cy + 1
    across = (canvas.xs - eye.cx) * eye.height // down
    ahead = eye.f * eye.height // down
    tar = dice.near((88, 88, 92), 8 + hard // 60)
    slab = dice.near((158, 150, 142), 10 + hard // 40)
    palette = np.array([tar, slab, dice.near((195, 192, 188), 8), (225, 225, 220)], dtype=np.uint8)
    side = np.abs(across)
    kerb = (side >= ROAD_HALF) & (side < ROAD_HALF + 25)
    which = (side >= ROAD_HALF).astype(np.intp)
    which[kerb] = 2
    dashes = (side < 9) & ((ahead + dice.below(400)) % 400 < 200)
    edge_line = (side > 300) & (side < 312) & bool(dice.below(2))
    which[(dashes | edge_line) & (which == 0)] = 3
    canvas.rgb[eye.cy :] = palette[which]
    seams = (which == 1) & ((ahead % 120 < 12) | (side % 100 < 6))
    canvas.rgb[eye.cy :][seams] = np.array(slab, dtype=np.uint8) // 10 * 9
    canvas.label[eye.cy :] = np.where(side >= ROAD_HALF, PAVEMENT, ROAD)


def _houses(canvas: Canvas, eye: Camera, dice: Dice, hard: int) -> None:
    """Rows of houses on both sides, from far to near, with gaps that a fence may close."""
    for side in (-1, 1):
        ends = [130]
        while ends[-1] < 6000:
            ends.append(ends[-1] + dice.between(500, 1400))
        for z0, z1 in reversed(list(zip(ends[:-1], ends[1:], strict=True))):
            x = side * (PAVEMENT_END + dice.below(60))
            if dice.chance(180):
                if dice.chance(700):
                    boards = dice.near((120, 95, 70), 12 + hard // 50)
                    lighter = (min(boards[0] + 40, 255), min(boards[1] + 40, 255), min(boards[2] + 40, 255))
                    canvas.wall(eye, x, z0, z1, dice.between(110, 190), (boards, lighter), FENCE, (40, 20, 400, 400))
                continue
            wall = dice.near(dice.pick(BRICK), 10 + hard // 30)
            pane = dice.near((60, 75, 95), 12) if dice.chance(800) else dice.near((225, 205, 140), 15)
            top = dice.between(600, 1600)
            front = dice.near((wall[0] * 8 // 10, wall[1] * 8 // 10, wall[2] * 8 // 10), 4)
            outer = side * 3000
            left, right = sorted((eye.column(x, z0), eye.column(outer, z0)))
            canvas.box(left, eye.row(top, z0), right, eye.row(0, z0), canvas.far(front, z0), BUILDING)
            grid = (dice.between(220, 340), dice.between(90, 150), dice.between(270, 330), dice.between(110, 160))
            canvas.wall(eye, x, z0, z1, top, (wall, pane), BUILDING, grid)


Thing = tuple[int, Callable[[], None]]


def _things(canvas: Canvas, eye: Camera, dice: Dice, kind: int, hard: int) -> list[Thing]:
    """Everything on the ground as (distance, how to paint it); the main object stands nearest the middle."""
    things: list[Thing] = []

    def add(make: Callable[[Stand, Dice, int], None], x: int, z: int, cls: int) -> None:
        things.append((z, lambda: make(Stand(canvas, eye, x, z, cls), dice, hard)))

    name = KINDS[kind]
    main_z = dice.between(400 + hard // 5, 520 + hard * 6 // 10) + FURTHER.get(name, 0)
    if name != "empty":
        reach = canvas.w * main_z * 28 // (100 * eye.f)
        x = dice.between(-reach // 2, reach // 2)
        make, cls = MAKERS[name]
        if name in FURTHER:
            x = dice.pick((-1, 1)) * min(reach * 3 // 2, 400)
        add(make, x, main_z, cls)
    nearest = max(main_z * 2, 1000) if name != "empty" else 2200 - hard // 2
    for _ in range(dice.between(1 + hard // 150, 3 + hard // 70)):
        other = dice.pick(("car", "car", "person", "bicyclist"))
        make, cls = MAKERS[other]
        z = dice.between(nearest, 4500)
        x = dice.between(-300, 300) if other != "person" else dice.pick((-1, 1)) * dice.between(380, 600)
        add(make, x, z, cls)
    for side in (-1, 1):
        z = nearest + dice.below(500)
        while z < 5000:
            other = dice.pick(("tree", "tree", "lamp", "sign", "parked"))
            make, cls = MAKERS["car" if other == "parked" else other]
            add(make, side * (dice.between(400, 460) if other != "parked" else 265), z, cls)
            z += dice.between(500, 1600 - hard // 2)
    if dice.chance(150 + hard // 3):
        side = dice.pick((-1, 1))
        z0 = nearest + dice.below(1500)
        rail = dice.near((120, 125, 120), 20)
        bright = (min(rail[0] + 70, 255), min(rail[1] + 70, 255), min(rail[2] + 70, 255))
        bars = (60, 30, 60, 30)
        things.append((z0, lambda: canvas.wall(eye, side * 375, z0, z0 + 1500, 95, (rail, bright), FENCE, bars)))
    if name not in ("empty", "lamp") and dice.chance(hard // 2 - 100):  # something thin in front of the main object
        add(_lamp, dice.between(-90, 90), main_z * 7 // 10, POLE)
    return things


def _car(at: Stand, dice: Dice, hard: int) -> None:
    paint = dice.near(dice.pick(PAINT), 12) if not dice.chance(hard // 2) else dice.near((100, 100, 104), 25)
    glass, tyre = dice.near((45, 55, 70), 10), (22, 22, 24)
    if dice.chance(200):  # a van or lorry from behind
        tall = dice.between(210, 300)
        at.box(-105, 30, 105, tall, paint)
        at.box(-88, tall - 90, 88, tall - 35, glass)
        lights, low = 98, 60
    elif dice.chance(350):  # from the side, crossing
        at.box(-210, 28, 210, 88, paint)
        at.box(-120, 85, 130, 145, paint)
        at.box(-105, 92, 0, 136, glass)
        at.box(12, 92, 115, 136, glass)
        for u in (-130, 130):
            at.disc(u, 32, 36, 36, tyre)
        return
    else:
        at.box(-90, 30, 90, 100, paint)
        at.box(-70, 98, 70, 150, paint)
        at.box(-60, 102, 60, 140, glass)
        lights, low = 84, 70
    glow: Colour = (200, 25, 25) if dice.chance(600) else (250, 245, 215)
    for side in (-1, 1):
        u = side * (lights - 12)
        at.box(u - 12, low, u + 12, low + 18, glow)
        at.box(side * 70 - 14, 0, side * 70 + 14, 36, tyre)


def _person(at: Stand, dice: Dice, hard: int) -> None:
    coat = dice.near(dice.pick(PAINT), 20) if not dice.chance(hard // 2) else dice.near((105, 100, 98), 25)
    legs = dice.near(dice.pick(((40, 45, 70), (50, 50, 50), (110, 95, 75))), 12)
    stride = dice.between(4, 20)
    at.box(-stride - 14, 0, -stride + 4, 88, legs)
    at.box(stride - 4, 0, stride + 14, 88, legs)
    at.box(-24, 80, 24, 146, coat)
    at.box(-33, 85, -24, 140, coat)
    at.box(24, 85, 33, 140, coat)
    at.disc(0, 161, 14, 17, dice.near(dice.pick(SKIN), 10))


def _bicyclist(at: Stand, dice: Dice, hard: int) -> None:
    coat = dice.near(dice.pick(PAINT), 20) if not dice.chance(hard // 2) else dice.near((105, 100, 98), 25)
    frame, way = dice.near(dice.pick(PAINT), 15), dice.pick((-1, 1))
    for u in (-56, 56):
        at.disc(u, 35, 36, 36, (25, 25, 28), 600)
    for u0, u1, v0, v1 in ((-56, 10, 36, 46), (5, 14, 36, 95), (-40, 40, 78, 86), (36, 50, 36, 105)):
        a, b = sorted((way * u0, way * u1))
        at.box(a, v0, b, v1, frame)
    for u0, u1, v0, v1, colour in ((-16, 6, 48, 98, (45, 48, 65)), (-22, 14, 92, 140, coat), (6, 40, 116, 130, coat)):
        a, b = sorted((way * u0, way * u1))
        at.box(a, v0, b, v1, colour)
    at.disc(way * 8, 157, 14, 17, dice.near(dice.pick(SKIN if dice.chance(500) else PAINT), 10))  # head or helmet


def _tree(at: Stand, dice: Dice, hard: int) -> None:
    tall = dice.between(230, 330)
    bark = dice.near((92, 68, 48), 12)
    leaves = dice.near(dice.pick(((52, 105, 45), (75, 120, 50), (45, 88, 55), (140, 115, 45))), 8 + hard // 50)
    at.box(-16, 0, 16, tall + 40, bark)
    darker = (leaves[0] * 7 // 10, leaves[1] * 7 // 10, leaves[2] * 7 // 10)
    for step in range(5):
        shade = darker if step < 2 else leaves
        middle = tall + 60 + step * 35 + dice.below(30)
        at.disc(dice.between(-90, 90), middle, dice.between(80, 130), dice.between(70, 110), dice.near(shade, 8))


def _sign(at: Stand, dice: Dice, hard: int) -> None:
    post = Stand(at.canvas, at.eye, at.x, at.z, POLE)
    post.box(-5, 0, 5, 215, dice.near((140, 142, 145), 15))
    face = dice.pick(((200, 30, 35), (30, 70, 170), (235, 200, 45), (30, 120, 70)))
    face = dice.near(face, 10 + hard // 40)
    shape = dice.below(3)
    if shape == 0:
        at.disc(0, 245, 46, 46, face)
        at.disc(0, 245, 28, 28, dice.near((235, 235, 235), 8))
    elif shape == 1:
        at.box(-46, 200, 46, 290, face)
        at.box(-30, 238, 30, 252, (240, 240, 240))
    else:
        at.triangle(0, 200, 54, 95, face)
        at.triangle(0, 210, 28, 52, (240, 240, 235))


def _lamp(at: Stand, dice: Dice, hard: int) -> None:
    steel, way = dice.near((95, 98, 100), 20 + hard // 50), dice.pick((-1, 1))
    at.box(-12, 0, 12, 60, steel)
    at.box(-8, 0, 8, 470, steel)
    a, b = sorted((0, way * 120))
    at.box(a, 458, b, 474, steel)
    at.disc(way * 120, 458, 24, 12, dice.near((230, 225, 190), 15))


def _barrier(at: Stand, dice: Dice, hard: int) -> None:
    half = dice.between(140, 240)
    first, second = dice.pick(STRIPES)
    first, second = dice.near(first, 8 + hard // 50), dice.near(second, 8 + hard // 50)
    for u in (-half + 10, half - 25):
        at.box(u, 0, u + 14, 110, (90, 90, 92))
    for v in (28, 75):
        for number, u in enumerate(range(-half, half, 40)):
            at.box(u, v, min(u + 40, half), v + 30, first if number % 2 else second)


FURTHER = {"tree": 250, "sign": 250, "lamp": 400}
"""These stand at the kerb, so they are in the picture only from further away (centimetres)."""
MAKERS: dict[str, tuple[Callable[[Stand, Dice, int], None], int]] = {
    "car": (_car, CAR), "person": (_person, PERSON), "bicyclist": (_bicyclist, BICYCLIST), "tree": (_tree, TREE),
    "sign": (_sign, SIGN), "fence": (_barrier, FENCE), "lamp": (_lamp, POLE),
}


def _weather(canvas: Canvas, eye: Camera, dice: Dice, hard: int) -> None:
    """Shadows, bonnet, light, contrast, dirt on the lens, blur and noise: what makes the same street hard to read."""
    height, width = canvas.h, canvas.w
    picture = canvas.rgb.astype(np.int32)
    for _ in range(dice.between(0, hard // 200)):
        a, lean = dice.below(width), dice.between(-width // 2, width // 2)
        left = a + lean * (canvas.ys[eye.cy :] - eye.cy) // height
        dark = (canvas.xs >= left) & (canvas.xs < left + width * dice.between(60, 200) // 1000)
        picture[eye.cy :][dark] = picture[eye.cy :][dark] * dice.between(500, 750) // 1000
    texture = np.array([2, 7, 4, 7, 7, 22, 4, 8, 4, 8, 6], dtype=np.int32)
    amplitude = texture[canvas.label] + hard * hard // 60000
    grain = dice.bytes(height * width * 4).reshape(height, width, 4).astype(np.int32) - 128
    bumps = (grain[:, :, 3:] * amplitude[:, :, None]) >> 7
    picture += bumps
    if dice.chance(250):
        bonnet = height - height * dice.between(40, 90) // 1000
        picture[bonnet:] = dice.near((45, 48, 55), 20)
        canvas.label[bonnet:] = VOID
    if hard > 550 and dice.chance(600):
        picture[:, 1:-1] = (picture[:, :-2] + 2 * picture[:, 1:-1] + picture[:, 2:]) >> 2
        picture[1:-1] = (picture[:-2] + 2 * picture[1:-1] + picture[2:]) >> 2
    contrast = 1000 - dice.between(hard // 4, hard * 13 // 20)
    light = 1000 - dice.between(0, hard // 2)
    cast = np.array([dice.between(-hard // 40, hard // 40) for _ in range(3)], dtype=np.int32)
    picture = ((picture - 120) * contrast // 1000 + 120) * light // 1000 + cast
    for _ in range(dice.between(0, hard // 180)):
        r = max(height * dice.between(30, 30 + hard // 12) // 1000, 1)
        cx, cy = dice.below(width), dice.below(height)
        x0, x1, y0, y1 = max(cx - r, 0), min(cx + r, width), max(cy - r, 0), min(cy + r, height)
        if x1 > x0 and y1 > y0:
            spot = (canvas.xs[:, x0:x1] - cx) ** 2 + (canvas.ys[y0:y1] - cy) ** 2 <= r * r
            patch = picture[y0:y1, x0:x1]
            patch[spot] = (patch[spot] + 3 * dice.between(60, 150)) >> 2
    noise = 2 + hard * hard // 34000
    picture += (grain[:, :, :3] * noise) >> 7
    canvas.rgb = np.clip(picture, 0, 255).astype(np.uint8)

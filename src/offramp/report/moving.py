"""A walk as a moving picture: every exit appears when it spoke, slowed down by a factor that the picture says."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from offramp._extras import require
from offramp.errors import OfframpError
from offramp.report.canvas import INK, LINE, PAPER, SOFT, Canvas, Colour, encoded, fit, width_of, wrapped
from offramp.report.pictures import Bytes, Palette, colours, confidence_pixels, image_pixels, label_pixels
from offramp.report.stills import classes_of, mask_legend, mask_pixels, told
from offramp.report.walk import Walk
from offramp.table import write_atomic

__all__ = ["Frame", "draw_frames", "frames", "gif", "gif_bytes", "mp4", "slow_down"]

_GRID, _LEAST = 10, 20
"""ms: GIF counts in hundredths of a second, and browsers show what is below two of them for ten."""
_TICK, _HOLD, _TARGET, _LONGEST = 100, 3000, 6000, 120_000
_ACCENT: Colour = (31, 95, 191)
_CLOCK = 180
"""Where the bar begins, in pixels: before it stand the time and the pace."""


@dataclass(frozen=True)
class Frame:
    """What is shown for a while."""

    at_ms: float
    """On the network's own clock."""
    spoken: int
    """How many exits have."""
    duration_ms: int
    """On the viewer's clock; a multiple of 10."""


def slow_down(elapsed_ms: Sequence[float]) -> float:
    """A factor of 1, 2 or 5 times a power of ten that shows the whole in about 6 s, and no exit for under 20 ms.

    >>> slow_down([11.0, 25.0, 61.0, 97.0])
    100.0
    """
    gaps = [after - before for before, after in zip([0.0, *elapsed_ms], elapsed_ms, strict=False)]
    if not elapsed_ms or not min(gaps) > 0:
        raise OfframpError(expected="times that rise from exit to exit", got=str(list(elapsed_ms)), where="slow_down()")
    wanted = max(_TARGET / elapsed_ms[-1], (_LEAST + _GRID) / min(gaps))
    ten: float = 10.0 ** math.floor(math.log10(wanted))
    return next(ten * one for one in (1.0, 2.0, 5.0, 10.0) if ten * one >= wanted * 0.999)


def frames(elapsed_ms: Sequence[float], slow: float) -> list[Frame]:
    """When which exits are on view: exit k from ``elapsed_ms[k] * slow`` on, to the nearest 10 ms of the viewer's.

    The clock moves ten times a second in between; the whole stays for 3 s at the end. OfframpError where two exits
    would come within 20 ms of each other, or the whole last more than two minutes.

    >>> [(one.at_ms, one.spoken, one.duration_ms) for one in frames([1.0, 2.5], 50)]
    [(0.0, 0, 50), (1.0, 1, 70), (2.5, 2, 3000)]
    """
    come = [_GRID * round(ms * slow / _GRID) for ms in elapsed_ms]
    if any(after - before < _LEAST for before, after in zip([0, *come], come, strict=False)) or come[-1] > _LONGEST:
        raise OfframpError(
            expected=f"exits {_LEAST} ms apart and at most {_LONGEST // 1000} s in all, on the viewer's clock",
            got=f"{come} ms, {slow:g} times as slow as it was", where="a moving picture",
            todo="choose another factor; slow_down() finds one where there is any.",
        )
    found: list[Frame] = []
    for spoken, (start, end) in enumerate(zip([0, *come], come, strict=False)):
        at = [*range(start, end - _LEAST + 1, _TICK)]
        real = elapsed_ms[spoken - 1] if spoken else 0.0
        found += [Frame(real if one == start else one / slow, spoken, after - one)
                  for one, after in zip(at, [*at[1:], end], strict=True)]
    return [*found, Frame(elapsed_ms[-1], len(come), _HOLD)]


def draw_frames(walk: Walk, palette: Palette = (), *, slow: float | None = None, panel: int = 420
                ) -> Iterator[tuple[Image.Image, Frame]]:
    """Each frame with how long it stays: the picture, what the last exit that spoke said, its confidence and its mask.

    slow: how many times slower than it was; :func:`slow_down` chooses where nothing is given. panel: how wide, at most.
    """
    elapsed = _elapsed(walk)
    slow = slow_down(elapsed) if slow is None else slow
    scene, made = _Scene(walk, palette, slow, panel), frames(elapsed, slow)
    stills = [scene.still(k) for k in range(-1, len(elapsed))]
    for frame in made:
        yield scene.with_clock(stills[frame.spoken], frame), frame


def gif_bytes(walk: Walk, palette: Palette = (), *, slow: float | None = None, most_bytes: int = 3_000_000) -> bytes:
    """An animated GIF of :func:`draw_frames`; its panels shrink until it is no larger than ``most_bytes``."""
    panel, flat = 420, _colours(walk, colours(walk.num_classes, palette))
    while True:
        images, durations = [], []
        for image, frame in draw_frames(walk, palette, slow=slow, panel=panel):
            images.append(image.quantize(palette=flat, dither=Image.Dither.NONE))
            durations.append(frame.duration_ms)
        data = encoded(images[0], "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0,
                       optimize=False, disposal=1)
        if len(data) <= most_bytes or panel < 100:
            return data
        panel = int(panel * max(0.5, min(0.9, math.sqrt(most_bytes / len(data)))))


def gif(walk: Walk, path: Path | str, palette: Palette = (), *, slow: float | None = None,
        most_bytes: int = 3_000_000) -> Path:
    """Write :func:`gif_bytes` to a file."""
    return write_atomic(path, gif_bytes(walk, palette, slow=slow, most_bytes=most_bytes))


def mp4(walk: Walk, path: Path | str, palette: Palette = (), *, slow: float | None = None) -> Path:
    """Write :func:`draw_frames` as H.264 at 50 pictures a second, so that exits come to the nearest 20 ms.

    Needs the extra ``video``, whose package brings the encoder.
    """
    writer: Any = require("imageio_ffmpeg", "MP4 files").write_frames
    with tempfile.TemporaryDirectory() as folder:
        made, sink, due, sent = Path(folder) / "walk.mp4", None, 0, 0
        try:
            for image, frame in draw_frames(walk, palette, slow=slow):
                if sink is None:
                    sink = writer(str(made), image.size, fps=50, macro_block_size=2, quality=7)
                    sink.send(None)
                due += frame.duration_ms
                for _ in range(round(due / 20) - sent):
                    sink.send(image.tobytes())
                sent = round(due / 20)
        finally:
            if sink is not None:
                sink.close()
        return write_atomic(path, made.read_bytes())


class _Scene:
    """Where everything stands in the frames of one walk."""

    def __init__(self, walk: Walk, palette: Palette, slow: float, panel: int) -> None:
        self.walk, self.painted, self.elapsed = walk, colours(walk.num_classes, palette), _elapsed(walk)
        self.pace = f"slowed down {slow:.4g} times" if slow > 1 else (
            "as fast as it was" if slow == 1 else f"sped up {1 / slow:.4g} times")
        height, width = walk.steps[0].predictions.shape
        panels = 4 if walk.masked or walk.label is not None else 3
        columns = panels if panels == 3 or width < height else 2
        self.size = fit((width, height), (panel if columns == 2 else panel * (7 - columns) // 5, panel))
        wide, high = max(self.size[0], 1 + 500 // columns) + 16, self.size[1] + 34
        self.at = [(20 + wide * (i % columns), 112 + high * (i // columns)) for i in range(panels)]
        self.width = (24 + columns * wide + 1) // 2 * 2  # video wants even numbers
        self.under = self.at[-1][1] + self.size[1] + 12
        self.listed = [row for items in (mask_legend(walk) if walk.masked else [], classes_of(walk, self.painted))
                       for row in wrapped(items, self.width - 40)]
        self.bar = self.under + 22 * len(self.listed) + 14
        self.height = (self.bar + 48) // 2 * 2

    def still(self, k: int) -> Image.Image:
        """All but the clock, once exit ``k`` has spoken; -1 before the first has."""
        walk, canvas = self.walk, Canvas((self.width, self.height))
        step, labels = (walk.steps[k] if k >= 0 else None), walk.label
        canvas.text((20, 14), walk.name, 18, most=self.width - 40)
        canvas.text((20, 42), "no answer yet" if step is None else step.name, 15, SOFT if step is None else _ACCENT,
                    most=self.width - 40)
        if step is not None:
            canvas.text((20, 64), ", ".join(told(walk, k)), 13, SOFT, most=self.width - 40)
        maps: list[tuple[str, Bytes | None]] = [
            ("picture", image_pixels(walk.image)),
            ("says", None if step is None else label_pixels(step.predictions, self.painted)),
            (f"how sure it is ({walk.measure})", None if step is None else confidence_pixels(step.confidence))]
        if walk.masked:
            maps.append(("what is settled after it", None if step is None else mask_pixels(walk, k)))
        elif labels is not None:
            maps.append(("labels", label_pixels(labels, self.painted)))
        for (title, pixels), at in zip(maps, self.at, strict=True):
            canvas.text((at[0], at[1] - 20), title, 13)
            canvas.panel(at, pixels, self.size, smooth=title == "picture")
        for row, swatches in enumerate(self.listed):
            for x, name, colour in swatches:
                canvas.swatch((20 + x, self.under + 22 * row), name, colour)
        taken: list[tuple[float, float]] = []
        for one, ms in [*zip(walk.steps, self.elapsed, strict=True)][::-1]:  # the last is named whatever its neighbours
            wide = width_of(one.name, 12)
            start = min(max(self._x(ms) - wide / 2, _CLOCK), self.width - 20 - wide)
            if all(start + wide + 8 < left or start > right + 8 for left, right in taken):
                canvas.text((start, self.bar + 18), one.name, 12, SOFT)
                taken.append((start, start + wide))
        return canvas.image

    def with_clock(self, still: Image.Image, frame: Frame) -> Image.Image:
        """The same with the clock, a number beside a bar: what changes between two frames is one narrow strip."""
        canvas, start = Canvas(still.size, still), _CLOCK
        canvas.text((20, self.bar - 8), f"{frame.at_ms:.1f} ms", 22)
        canvas.text((20, self.bar + 18), self.pace, 12, SOFT)
        canvas.box((start, self.bar), (self.width - 20 - start, 8), (236, 234, 228))
        canvas.box((start, self.bar), (self._x(frame.at_ms) - start, 8), _ACCENT)
        for ms in self.elapsed:
            canvas.box((min(self._x(ms), self.width - 22), self.bar - 4), (2, 16), INK)
        return canvas.image

    def _x(self, ms: float) -> float:
        return _CLOCK + (self.width - 20 - _CLOCK) * ms / self.elapsed[-1]


def _elapsed(walk: Walk) -> list[float]:
    found = [step.elapsed_ms for step in walk.steps if step.elapsed_ms is not None]
    if len(found) != len(walk.steps):
        raise OfframpError(expected="the time at which each exit spoke", got="none", where="a moving picture",
                           todo="give timed= to offramp.walk(): milliseconds, or what yields an answer an exit.")
    return found


def _colours(walk: Walk, painted: Bytes) -> Image.Image:
    """A palette with every colour that means something, exactly; what is left of 256 goes to the picture."""
    def towards_paper(colour: Colour, count: int) -> list[tuple[int, ...]]:
        return [tuple(round(a + (b - a) * i / (count - 1)) for a, b in zip(colour, PAPER, strict=True))
                for i in range(count)]

    drawn = [colour for _, colour in (*mask_legend(walk), *classes_of(walk, painted))]
    flat = [*towards_paper(INK, 8), *towards_paper(SOFT, 6), *towards_paper(_ACCENT, 5), LINE, (240, 239, 235),
            (236, 234, 228), (128, 128, 128), *drawn[:150]]
    sure = confidence_pixels(torch.linspace(0, 1, 32)[None])[0].tolist()
    fixed = list(dict.fromkeys([*flat, *(tuple(one) for one in sure)]))
    photo = Image.fromarray(image_pixels(walk.image)).quantize(256 - len(fixed), Image.Quantize.MEDIANCUT)
    rest = photo.getpalette() or []
    made = Image.new("P", (1, 1))
    made.putpalette(([value for one in fixed for value in one] + rest + [0] * 768)[:768])
    return made

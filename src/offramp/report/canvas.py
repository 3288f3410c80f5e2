"""Pictures put together: panels, words and legends on a white sheet, with the font that Pillow brings."""

import io
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from offramp.report.pictures import Bytes, confidence_pixels

__all__ = ["Canvas", "Colour", "INK", "LINE", "PAPER", "SOFT", "encoded", "fit", "width_of",
           "wrapped"]

Colour = tuple[int, int, int]
PAPER, INK, SOFT, LINE = (255, 255, 255), (28, 31, 36), (95, 102, 112), (214, 211, 204)


class Canvas:
    """A picture that is being made; places are (x, y) of a thing's upper left corner, in pixels."""

    def __init__(self, size: tuple[int, int], on: Image.Image | None = None) -> None:
        self.image = Image.new("RGB", size, PAPER) if on is None else on.copy()
        self._draw = ImageDraw.Draw(self.image)

    def text(self, at: tuple[float, float], words: str, size: int = 13, colour: Colour = INK, *,
             most: float | None = None) -> float:
        """Write a line, cut where it is wider than ``most``; how wide it came out."""
        words = _elided(_written(words), size, most)
        self._draw.text(at, words, fill=colour, font=_font(size))
        return width_of(words, size)

    def box(self, at: tuple[float, float], size: tuple[float, float], colour: Colour, edge: Colour | None = None
            ) -> None:
        """A filled rectangle."""
        x, y = at
        if size[0] >= 1 and size[1] >= 1:
            self._draw.rectangle((x, y, x + size[0] - 1, y + size[1] - 1), fill=colour, outline=edge)

    def swatch(self, at: tuple[float, float], words: str, colour: Colour, *, size: int = 13) -> float:
        """A small square of a colour, and what it means; how wide both are."""
        self.box((at[0], at[1] + 2), (size, size), colour, LINE)
        return size + 6 + self.text((at[0] + size + 6, at[1]), words, size)

    def panel(self, at: tuple[int, int], pixels: Bytes | None, size: tuple[int, int], *, smooth: bool = False) -> None:
        """Pixels (H, W, 3) brought to a size, in a thin frame; nothing but the frame where there are none."""
        x, y = at
        self.box((x - 1, y - 1), (size[0] + 2, size[1] + 2), (240, 239, 235), LINE)
        if pixels is not None:
            shown = Image.fromarray(np.ascontiguousarray(pixels))
            grows = shown.width < size[0]
            how = Image.Resampling.NEAREST if not smooth else (
                Image.Resampling.BICUBIC if grows else Image.Resampling.LANCZOS)
            self.image.paste(shown.resize(size, how), at)

    def ramp(self, at: tuple[int, int], width: int) -> None:
        """The colours of confidence from 0 to 1."""
        self.image.paste(Image.fromarray(confidence_pixels(torch.linspace(0, 1, width).expand(11, -1))), at)
        self.text((at[0], at[1] + 14), "0", 12, SOFT)
        self.text((at[0] + width / 2 - width_of("0.5", 12) / 2, at[1] + 14), "0.5", 12, SOFT)
        self.text((at[0] + width - width_of("1", 12), at[1] + 14), "1", 12, SOFT)


def width_of(words: str, size: int) -> float:
    """Of a line in the font."""
    return float(_font(size).getlength(_written(words)))


def fit(size: tuple[int, int], most: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in proportion, as large as goes into ``most``; at least a pixel."""
    scale = min(most[0] / size[0], most[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def wrapped(items: Sequence[tuple[str, Colour]], width: float, size: int = 13) -> list[list[tuple[float, str, Colour]]]:
    """Swatches in rows of a width: (x, words, colour) each."""
    rows: list[list[tuple[float, str, Colour]]] = [[]]
    x = 0.0
    for words, colour in items:
        wide = size + 6 + width_of(words, size)
        if rows[-1] and x + wide > width:
            rows.append([])
            x = 0.0
        rows[-1].append((x, words, colour))
        x += wide + 18
    return rows if items else []


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _written(words: str) -> str:
    """In letters that the font has: accents fall away, and what is no Latin letter becomes a question mark."""
    plain = unicodedata.normalize("NFKD", words.replace("–", "-").replace("×", "x"))
    return "".join(one for one in plain if not unicodedata.combining(one)).encode("ascii", "replace").decode()


def _elided(words: str, size: int, most: float | None) -> str:
    if most is None or width_of(words, size) <= most:
        return words
    while words and width_of(words + "...", size) > most:
        words = words[:-1]
    return words + "..."

"""A walk as a picture: a row for each exit. H W space."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from offramp.report.canvas import SOFT, Canvas, Colour, encoded, fit, wrapped
from offramp.report.pictures import Bytes, Palette, colours, confidence_pixels, image_pixels, label_pixels
from offramp.report.svg import macs, percent
from offramp.report.walk import Walk
from offramp.table import write_atomic

__all__ = ["MASK", "classes_of", "draw_sheet", "mask_legend", "mask_pixels", "png", "told"]

MASK: dict[str, Colour] = {
    "settled, right": (122, 178, 222), "settled, wrong": (200, 72, 0), "active, right": (246, 243, 234),
    "active, wrong": (34, 34, 34),
}
"""Blue and orange, pale and dark: apart for every kind of colour blindness, and in grey."""
_VOID: Colour = (128, 128, 128)


def mask_pixels(walk: Walk, k: int) -> Bytes:
    """Where the network goes on after exit ``k``, and what is right there, in the colours of ``MASK``: (H, W, 3).

    What has no label is grey where others have one; where none has, all counts as right.
    """
    active, found = walk.goes_on(k), walk.right(k)
    right, known = found if found is not None else (torch.ones_like(active),) * 2
    index = torch.where(known, 2 * active.long() + (~right).long(), len(MASK)).numpy()
    painted: Bytes = np.array([*MASK.values(), _VOID], np.uint8)[index]
    return painted


def mask_legend(walk: Walk, k: int | None = None) -> list[tuple[str, Colour]]:
    """(words, colour) of what :func:`mask_pixels` shows; of exit ``k`` with how many of the (labelled) pixels it is."""
    if walk.label is None:
        on = [] if k is None else [float(walk.goes_on(k).float().mean())]
        return [(" ".join(["settled", *(percent(1 - one) for one in on)]), MASK["settled, right"]),
                (" ".join(["active", *(percent(one) for one in on)]), MASK["active, right"])]
    shares = None if k is None else walk.shares(k)
    found = [(words if k is None else "-" if shares is None else percent(getattr(shares, words.replace(", ", "_"))),
              colour) for words, colour in MASK.items()]
    return found if k is not None else [*found, ("no label", _VOID)]


def classes_of(walk: Walk, painted: Bytes) -> list[tuple[str, Colour]]:
    """(name, colour) of the classes that its labels or its exits name."""
    maps = [step.predictions for step in walk.steps] + ([] if walk.label is None else [walk.label])
    seen = sorted({int(one) for each in maps for one in each.unique() if 0 <= one < walk.num_classes})
    named = walk.class_names or tuple(map(str, range(walk.num_classes)))
    return [(named[k], (int(painted[k][0]), int(painted[k][1]), int(painted[k][2]))) for k in seen]


def told(walk: Walk, k: int) -> list[str]:
    """What is known of exit ``k``, a line each: when it spoke and what it cost, how right it is, where it ran."""
    step = walk.steps[k]
    spent = ([] if step.elapsed_ms is None else [f"{step.elapsed_ms:.3g} ms"]) + (
        [] if step.macs is None else [f"{macs(step.macs)} MACs"])
    lines, found = ([", ".join(spent)] if spent else []), walk.right(k)
    if found is not None and bool(found[1].any()):
        lines += [f"mIoU {percent(walk.mean_iou(k))}", f"right {percent(float(found[0].sum() / found[1].sum()))}"]
    if walk.masked:
        lines.append(f"ran at {percent(float(walk.computed(k).float().mean()))}")
        if step.active is not None:
            lines.append(f"goes on at {percent(float(step.active.float().mean()))}")
    return lines


def draw_sheet(walk: Walk, palette: Palette = (), *, panel: int = 400) -> Image.Image:
    """What each exit says, how sure it is, and, of a masked network, what is settled and what is right; legends above.

    Panels are at most ``panel`` pixels wide, and three quarters as high. ADP-C (arXiv:2104.00749), Fig. 5, with a row
    an exit; there settled pixels are green whether they are right or wrong.
    """
    painted, masked = colours(walk.num_classes, palette), walk.masked
    height, width = walk.steps[0].predictions.shape
    size = fit((width, height), (panel, panel * 3 // 4))
    cell, left = max(size[0], 290 if masked else 240) + 20, 190
    lines = max(len(told(walk, k)) for k in range(len(walk.steps)))
    row = max(size[1] + (30 if masked else 0), 24 + 18 * lines) + 16
    whole = left + (3 if masked else 2) * cell + 4
    listed = wrapped(classes_of(walk, painted), whole - left - 24)
    y = 52 + size[1] + 14
    top = y + 22 * len(listed) + 14 + 78
    canvas = Canvas((whole, top + row * len(walk.steps) + 4))
    at = [left + i * cell for i in range(3)]
    canvas.text((24, 14), walk.name, 19, most=whole - 48)
    canvas.text((24, 50), "picture" if walk.label is None else "picture, labels", 15)
    canvas.panel((at[0], 52), image_pixels(walk.image), size, smooth=True)
    if walk.label is not None:
        canvas.panel((at[1], 52), label_pixels(walk.label, painted), size)
    for swatches in listed:
        for x, name, colour in swatches:
            canvas.swatch((left + x, y), name, colour)
        y += 22
    y += 14
    for x, words in zip(at, ("says", f"how sure it is ({walk.measure})", "what is settled after it")[:2 + masked],
                        strict=False):
        canvas.text((x, y), words, 15)
    canvas.ramp((at[1], y + 26), min(size[0], 240))
    if masked:
        for i, (words, colour) in enumerate(mask_legend(walk)):
            canvas.swatch((at[2] + 108 * (i // 2), y + 24 + 20 * (i % 2)), words, colour, size=12)
    for k, step in enumerate(walk.steps):
        y = top + k * row
        canvas.text((24, y - 3), step.name, 15, most=left - 40)
        for i, line in enumerate(told(walk, k)):
            canvas.text((24, y + 20 + 18 * i), line, 13, SOFT, most=left - 40)
        canvas.panel((at[0], y), label_pixels(step.predictions, painted), size)
        canvas.panel((at[1], y), confidence_pixels(step.confidence), size)
        if masked:
            canvas.panel((at[2], y), mask_pixels(walk, k), size)
            x = float(at[2])
            for words, colour in mask_legend(walk, k):
                x += canvas.swatch((x, y + size[1] + 7), words, colour, size=12) + 10
    return canvas.image


def png(walk: Walk, path: Path | str, palette: Palette = ()) -> Path:
    """Write :func:`draw_sheet` to a file."""
    return write_atomic(path, encoded(draw_sheet(walk, palette), optimize=True))

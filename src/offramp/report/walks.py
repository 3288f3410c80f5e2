"""Walks as a section of a page, and as a page of their own."""

import base64
from collections.abc import Sequence
from html import escape

import torch

from offramp.report.canvas import Colour
from offramp.report.draw import legend, page_of
from offramp.report.moving import gif_bytes
from offramp.report.pictures import Palette, colours, confidence_pixels, confidence_png, image_png, label_png, png_uri
from offramp.report.stills import classes_of, mask_legend, mask_pixels, told
from offramp.report.svg import percent
from offramp.report.walk import Walk

__all__ = ["SAY", "draw_walks", "render_walks"]

SAY = ("What each exit says of an image and how sure it is, from purple (0) to yellow (1), when it spoke and what it "
       "had cost. Of a masked network: what is settled after it, so that its features are no longer computed, and what "
       "it goes on with; at the end, where it ran last. Where it ran is a share of all pixels; what is right or wrong, "
       "of those with a label.")
_WIDE = 400


def draw_walks(walks: Sequence[Walk], palette: Palette = ()) -> str:
    """A row of pictures for each exit, and, where it is known when each spoke, all of it at a pace that eyes follow."""
    return "".join(_one(walk, palette) for walk in walks)


def render_walks(walks: Sequence[Walk], palette: Palette = (), *, title: str = "Exit by exit, as it comes") -> str:
    """A page of nothing else; for :func:`offramp.report.write`."""
    return page_of(title, f'<p class="say">{SAY}</p>{draw_walks(walks, palette)}')


def _one(walk: Walk, palette: Palette) -> str:
    painted = colours(walk.num_classes, palette)
    columns = 3 if walk.masked else 2
    cells = [_figure(image_png(walk.image, _WIDE), "picture"),
             "<figure></figure>" if walk.label is None else _figure(label_png(walk.label, painted, _WIDE), "labels"),
             *(["<figure></figure>"] if walk.masked else [])]
    for k, step in enumerate(walk.steps):
        said = f"<b>{escape(step.name)}</b>" + "".join(f" · {escape(line)}" for line in told(walk, k))
        cells += [_figure(label_png(step.predictions, painted, _WIDE), said),
                  _figure(confidence_png(step.confidence, _WIDE), f"sure {percent(float(step.confidence.mean()))}")]
        if walk.masked:
            shares = "".join(f'<span><i style="background:{_css(colour)}"></i>{escape(words)}</span>'
                              for words, colour in mask_legend(walk, k))
            cells.append(_figure(png_uri(mask_pixels(walk, k), _WIDE, nearest=True),
                                 f'<span class="key">{shares}</span>'))
    keys = legend([(name, _css(colour)) for name, colour in classes_of(walk, painted)])
    if walk.masked:
        keys += legend([(words, _css(colour)) for words, colour in mask_legend(walk)])
    stops = ",".join(_css(one) for one in confidence_pixels(torch.linspace(0, 1, 9)[None])[0].tolist())
    keys += (f'<div class="legend">{escape(walk.measure)}: 0<span class="ramp" style="background:linear-gradient('
             f'to right,{stops})"></span>1</div>')
    moving = ""
    if walk.timed:
        data = base64.b64encode(gif_bytes(walk, palette, most_bytes=1_500_000)).decode()
        moving = f'<figure><img class="moving" alt="each exit in turn" src="data:image/gif;base64,{data}"></figure>'
    return (f'<h3>{escape(walk.name)}</h3>{keys}<div class="maps" style="grid-template-columns:repeat({columns}, '
            f'minmax(9rem, 1fr))">{"".join(cells)}</div>{moving}')


def _figure(source: str, caption: str) -> str:
    return f'<figure><img alt="" src="{source}"><figcaption>{caption}</figcaption></figure>'


def _css(colour: Colour) -> str:
    return "#" + bytes(colour).hex()

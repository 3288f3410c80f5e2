"""Images for the page: thumbnails, label maps and confidence maps as PNGs inside the HTML. H W space, K classes."""

import base64
import colorsys
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from offramp.errors import OfframpError

__all__ = [
    "DenseExample", "colours", "confidence_pixels", "confidence_png", "difference_png", "image_pixels", "image_png",
    "label_pixels", "label_png", "legend", "picture", "png_uri", "to_uint8",
]

Bytes = NDArray[np.uint8]
Palette = Sequence[tuple[int, int, int]]
"""(R, G, B) of each class; empty where nobody chose any."""

# matplotlib's viridis (CC0) in eight steps: straight lines between them keep its even lightness
_SURE = np.array([[68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140], [40, 174, 128],
                  [94, 201, 98], [173, 220, 48], [253, 231, 37]], float)


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseExample:
    """One image as every exit saw it; what a dense report shows beside its numbers."""

    name: str
    image: Tensor
    """uint8 (3, H, W)."""
    label: Tensor | None
    """(H, W) int64, 255 and the like void."""
    predictions: Tensor
    """(E, H, W) int64: the plan's exits in order, the backbone last."""
    confidences: Tensor
    """(E, H, W) in [0, 1]."""
    left_at: int
    """The exit that answered, an index into E."""
    smoothed: Tensor | None = None
    """``confidences`` with edges smoothed (MESS, Eqs. 8-9), (E, H, W)."""
    ends: Mapping[float, Tensor] = field(default_factory=dict)
    """Of a network of several widths: what each says in the end, (H, W) int64, 1.0 among them."""

    def __post_init__(self) -> None:
        shape = tuple(self.predictions.shape)
        if shape != tuple(self.confidences.shape) or not 0 <= self.left_at < shape[0]:
            raise OfframpError(expected=f"confidences {shape} and left_at below {shape[0]}", where="DenseExample",
                               got=f"{tuple(self.confidences.shape)} and {self.left_at}")
        if self.ends and (1.0 not in self.ends or any(tuple(one.shape) != shape[1:] for one in self.ends.values())):
            raise OfframpError(expected=f"ends {shape[1:]}, that of width 1.0 among them", where="DenseExample",
                               got=str({width: tuple(one.shape) for width, one in self.ends.items()}))


def colours(count: int, palette: Palette = ()) -> Bytes:
    """K distinct colours (K, 3): the data's palette where it has one, else our own, of which the first eleven are for
    street scenes in CamVid's order."""
    if len(palette) >= count:
        return np.array(palette[:count], np.uint8).reshape(count, 3)
    street = ["#7fb2e5", "#a0522d", "#c9c2b4", "#80506e", "#f4a3c0", "#4f8f4a", "#e0b83f", "#5b6770", "#3949a3",
              "#d9433a", "#2bb0a5"]
    found = [tuple(int(one[i:i + 2], 16) for i in (1, 3, 5)) for one in street]
    for i in range(max(0, count - len(found))):
        rgb = colorsys.hsv_to_rgb((i * 0.618034) % 1, 0.55 + 0.3 * (i % 2), 0.85 - 0.2 * (i % 3))
        found.append(tuple(round(255 * one) for one in rgb))
    return np.array(found[:count], np.uint8)


def to_uint8(image: Tensor) -> Tensor:
    """An image (C, H, W) as uint8 (3, H, W); a normalised float image is stretched between its own extremes."""
    picture = image.detach().cpu()
    if picture.ndim != 3:
        raise OfframpError(expected="an image (C, H, W)", got=str(tuple(picture.shape)), where="report")
    if picture.shape[0] != 3:
        picture = picture[:1].expand(3, -1, -1)
    if picture.is_floating_point():
        low, high = picture.min(), picture.max()
        picture = ((picture - low) / (high - low).clamp(min=1e-6) * 255).round().byte()
    return picture


def picture(dataset: Any, index: int) -> Any:
    """The image of a sample, uint8 where the dataset can give it so."""
    if hasattr(dataset, "read"):
        return dataset.read(index)[0]
    sample = dataset[index]
    return sample[0] if isinstance(sample, tuple | list) else sample


def image_pixels(image: Tensor) -> Bytes:
    """(H, W, 3)."""
    pixels: Bytes = to_uint8(image).permute(1, 2, 0).numpy()
    return pixels


def image_png(image: Tensor, width: int = 192) -> str:
    """As an ``<img>`` source."""
    return png_uri(image_pixels(image), width)


def label_pixels(labels: Tensor, painted: Bytes) -> Bytes:
    """(H, W) in the colours (K, 3) of the classes; void is grey: (H, W, 3)."""
    classes = len(painted)
    palette = np.concatenate([painted, np.array([[128, 128, 128]], np.uint8)])
    index = labels.cpu().numpy()
    return palette[np.where((index >= 0) & (index < classes), index, classes)]


def label_png(labels: Tensor, painted: Bytes, width: int = 192) -> str:
    """In the colours (K, 3) of the classes; void is grey."""
    return png_uri(label_pixels(labels, painted), width, nearest=True)


def difference_png(apart: Tensor, told: Tensor, painted: Bytes, width: int = 320) -> str:
    """Where two label maps are ``apart`` the colour of what ``told`` says, else and where that is void black (SlimSeg,
    Fig. 2)."""
    classes, index = len(painted), told.cpu().numpy()
    shown = apart.cpu().numpy() & (index >= 0) & (index < classes)
    return png_uri(np.where(shown[..., None], painted[np.where(shown, index, 0)], np.uint8(0)), width, nearest=True)


def confidence_pixels(confidence: Tensor) -> Bytes:
    """(H, W) from dark purple (0) through green to yellow (1), (H, W, 3): lightness rises evenly, for all eyes."""
    at = np.clip(np.nan_to_num(confidence.float().cpu().numpy()), 0, 1) * (len(_SURE) - 1)
    low = np.minimum(at.astype(int), len(_SURE) - 2)
    mixed: Bytes = (_SURE[low] + (_SURE[low + 1] - _SURE[low]) * (at - low)[..., None]).round().astype(np.uint8)
    return mixed


def confidence_png(confidence: Tensor, width: int = 192) -> str:
    """In the colours of :func:`confidence_pixels`."""
    return png_uri(confidence_pixels(confidence), width)


def png_uri(pixels: Any, width: int, nearest: bool = False) -> str:
    """Pixels (H, W, 3) as an ``<img>`` source, made smaller where they are wider."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if picture.width > width:  # never enlarged here: the page does that without bytes
        size = (width, max(1, round(picture.height * width / picture.width)))
        picture = picture.resize(size, Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def legend(names: Sequence[str], painted: Bytes) -> list[tuple[str, str]]:
    """(name, CSS colour) of each class."""
    named = list(names) or [str(k) for k in range(len(painted))]
    return [(name, "#" + bytes(one).hex()) for name, one in zip(named, painted, strict=True)]

"""The compiled CPU kernel: convolutions at the active places of a mask alone. H W space, C channels, A active places.

Where confidence has settled a pixel, the papers' networks do not convolve but interpolate (ADP-C, arXiv:2104.00749).
Dense libraries gain nothing from that. Here activations stay in *framed* buffers (H + 2, W + 2, C) whose frame is zero,
and nothing is gathered: a convolution reads the inputs of each active place where they lie. A 3x3 convolution at an
active place reads at most a one-pixel *halo* of settled places, so that only these are interpolated, each from the
active places of its 7x7 window; what lies deeper is left as it was.

    places = find_places(mask)                       # once a mask
    packed = pack(conv.weight)                       # once a network
    convolve(packed, source, out, places, relu=True)

The kernel is optional at build. ``available()`` says whether it is there.
"""

from offramp._kernel.door import (
    Packed,
    Places,
    available,
    convolve,
    find_places,
    framed,
    isa,
    isas,
    pack,
    shares_threads,
)

__all__ = [
    "Packed", "Places", "available", "convolve", "find_places", "framed", "isa", "isas", "pack", "shares_threads",
]

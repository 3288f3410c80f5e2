"""The compiled CPU kernel: a masked part of a network, at the active places of its masks alone. C channels, H W space.

Where confidence has settled a pixel, the papers' networks do not convolve but interpolate (ADP-C, arXiv:2104.00749).
Dense libraries gain nothing from that. Here activations stay in *framed* NHWC buffers whose frame is zero, and nothing
is gathered: a convolution reads the inputs of each active place where they lie. What lies beside active places is
interpolated only where an operation reads it; what lies deeper is left as it was.

    kernel = Kernel(program)                         # once a network and size
    kernel.write(map, features)                      # for each input
    kernel.settle(mask)                              # for each segment
    kernel.run(0)
    kernel.read_active(map, logits)

``ops.py`` has the language of programs. The kernel is optional at build; ``available()`` says whether it is there.
"""

from offramp._kernel.door import available, isa, isas, shares_threads
from offramp._kernel.enlarge import enlarge, enlarges
from offramp._kernel.faults import faults
from offramp._kernel.program import Kernel
from offramp._kernel.unsure import unsure

__all__ = ["Kernel", "available", "enlarge", "enlarges", "faults", "isa", "isas", "shares_threads", "unsure"]

"""Tables in, plans out: calibration, policies, search and replay. Never sees an ``nn.Module``.

The verbs are names of ``offramp`` itself; here are two that few need, loaded when asked for: ``family``, a scheduler's
plans at many budgets for ``guarantee``, and ``replay_stream``, ``replay`` for a policy that learns on the way.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp.choose.guarantee import family
    from offramp.choose.stream import replay_stream

__all__ = ["family", "replay_stream"]
_FROM = {"family": "offramp.choose.guarantee", "replay_stream": "offramp.choose.stream"}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module 'offramp.choose' has no attribute {name!r}")
    return getattr(importlib.import_module(_FROM[name]), name)

"""Optional dependencies, imported when needed, with an error that says which extra brings them."""

import importlib
from types import ModuleType

from offramp.errors import OfframpError

_EXTRA_OF = {
    "segmentation_models_pytorch": "smp",
    "transformers": "text",
    "optuna": "search",
    "matplotlib": "report",
    "scipy": "data",
    "imageio_ffmpeg": "video",
}


class MissingExtra(OfframpError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, what_for: str) -> ModuleType:
    """Import ``module`` or say which extra brings it.

    >>> require("json", "reading").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.split(".")[0]
        extra = _EXTRA_OF.get(top)
        install = f"pip install 'offramp[{extra}]'" if extra else f"pip install {top}"
        raise MissingExtra(
            expected=f"the package {top} for {what_for}", got=str(error), todo=install
        ) from error

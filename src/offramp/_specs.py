"""What a user types to name a network or data: ``kind:name?option=value&...``, and near names for what is not there."""

import ast
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from offramp.errors import OfframpError

__all__ = ["Spec", "load_callable", "near", "parse"]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A parsed specification; ``options`` hold Python literals where they read as such, else strings."""

    text: str
    kind: str
    """What stands before the first colon, or all of it when there is no colon."""
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def parse(text: str) -> Spec:
    """Take ``kind:name?option=value`` apart; only the part after the last ``?`` that holds a ``=`` is options.

    >>> parse("scenes?size=96x128&n=400&task=classify").options
    {'size': '96x128', 'n': 400, 'task': 'classify'}
    >>> spec = parse("timm:hrnet_w18?pretrained=true&drop=none")
    >>> spec.kind, spec.name, spec.options
    ('timm', 'hrnet_w18', {'pretrained': True, 'drop': None})
    """
    head, mark, query = text.strip().rpartition("?")
    if not mark or "=" not in query:
        head, query = text.strip(), ""
    kind, _, name = head.partition(":")
    options = {key: _value(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    return Spec(text=text, kind=kind, name=name, options=options)


def _value(text: str) -> Any:
    lowered = text.lower()
    if lowered in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(lowered)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def near(name: str, known: Iterable[str], n: int = 4) -> str:
    """A phrase with the names most like ``name``, or with the first few when none is like it.

    >>> near("resnet5", ["resnet50", "vgg16"])
    'did you mean resnet50?'
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=n, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"known: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}"


def load_callable(text: str, what: str) -> Callable[..., Any]:
    """Import ``package.module:callable``, also from the working directory, or say what is missing."""
    module_name, _, attribute = text.partition(":")
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise OfframpError(
            expected=f"an importable module {module_name!r} in {text!r}", got=str(error), where=what,
            todo="check the spelling, and that the module's folder is the working directory or on PYTHONPATH",
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(found, part):
            todo = near(part, [n for n in dir(found) if not n.startswith("_")])
            raise OfframpError(expected=f"{part!r} in {module_name}", got="no such name there", where=what, todo=todo)
        found = getattr(found, part)
    if not callable(found):
        raise OfframpError(
            expected=f"{text} to be callable", got=type(found).__name__, where=what, todo="name a function or a class"
        )
    return found  # type: ignore[no-any-return]

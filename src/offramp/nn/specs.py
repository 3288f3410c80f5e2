"""What every spec of a head asks of the record that a file keeps of it."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from offramp.errors import HeadError

__all__ = ["spec_data"]


def spec_data(record: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The fields in a record ``{type, version, data}``; HeadError on another type, a future version, unknown fields."""
    name = kind.__name__
    if record.get("type") != name or record.get("version") != 1:
        got = f"type {record.get('type')!r}, version {record.get('version')!r}"
        raise HeadError(expected=f"a {name} of version 1", got=got, where=f"{name}.from_json()")
    data, known = dict(record["data"]), {field.name for field in fields(kind)}
    if unknown := set(data) - known:
        raise HeadError(expected="known fields", got=f"{sorted(unknown)}", where=f"{name}.from_json()",
                        todo=f"known are {sorted(known)}")
    return data

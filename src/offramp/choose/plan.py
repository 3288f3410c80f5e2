"""Plans as files: JSON ``{type, version, data}`` by allow-list; reading one runs no code from it."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from offramp.errors import FileFormatError, OfframpError
from offramp.policies import (
    Agreement,
    EENetPolicy,
    Patience,
    Random,
    Reliability,
    StopNets,
    StoppingPolicy,
    Switch,
    Thresholds,
)
from offramp.table import write_atomic
from offramp.table.files import read_json
from offramp.types import Plan, Policy

__all__ = ["finite", "load_plan", "plan_from_json", "plan_to_json", "save_plan"]

_FORMAT, _VERSION = "offramp.plan", 2
_OURS: tuple[type, ...] = (Agreement, EENetPolicy, Patience, Random, Reliability, StopNets, StoppingPolicy, Switch,
                           Thresholds)


class _Policy(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: str
    version: int
    data: dict[str, Any]
    parts: list["_Policy"] = []


class _Page(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal["offramp.plan"]
    version: int
    exits: list[str]
    policy: _Policy
    task: Literal["classify", "dense"]
    predicted: dict[str, Any]
    asked: dict[str, Any]
    fingerprints: dict[str, str]
    split: str
    notes: list[str]
    setting: Literal["budgeted", "anytime", "input_dependent"] = "input_dependent"  # version 1 knew no other
    certificate: dict[str, Any] = {}


def save_plan(plan: Plan, path: Path | str) -> Path:
    """Write a plan as one JSON page, whole or not at all.

    A policy of your own is kept when it is a dataclass of JSON values, or has ``to_json() -> dict`` and a class method
    ``from_json(data)``; ``version`` on the class (default 1) is kept beside it. One that holds other policies has
    ``parts``, a tuple of them, which are written the same way, and ``from_json(data, parts)``.
    """
    return write_atomic(path, json.dumps(plan_to_json(plan), indent=1, allow_nan=False) + "\n")


def load_plan(path: Path | str, known: Sequence[type] = ()) -> Plan:
    """Read a plan; ``known`` are the policy classes, besides offramp's own, that the file may name."""
    return plan_from_json(read_json(Path(path), format=_FORMAT, version=_VERSION), str(path), known)


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """A plan as a page of JSON values."""
    page = {
        "format": _FORMAT, "version": _VERSION, "exits": list(plan.exits), "task": plan.task, "split": plan.split,
        "policy": _written(plan.policy),
        "predicted": dict(plan.predicted), "asked": dict(plan.asked), "fingerprints": dict(plan.fingerprints),
        "notes": list(plan.notes), "setting": plan.setting, "certificate": dict(plan.certificate),
    }
    try:
        made: dict[str, Any] = json.loads(json.dumps(finite(page), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise OfframpError(expected="a plan of JSON values", got=str(error), where="save_plan()",
                           todo="give the policy to_json() and from_json().") from error
    return made


def plan_from_json(record: Any, path: str, known: Sequence[type] = ()) -> Plan:
    """The inverse, of a page that ``path`` holds; runs no code from it."""
    try:
        page = _Page.model_validate(record)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise FileFormatError(expected="a whole plan", got=f"{path}: {faults}", where="load_plan()") from error
    if page.version > _VERSION:
        raise FileFormatError(expected=f"a plan of version {_VERSION} or older", where="load_plan()",
                              got=f"version {page.version} in {path}",
                              todo="upgrade offramp: the file was written by a later one.")
    allowed = {kind.__name__: kind for kind in (*known, *_OURS)}
    policy = _revived(page.policy, allowed, page.exits, path)
    return Plan(
        exits=tuple(page.exits), policy=policy, task=page.task, predicted=page.predicted, asked=page.asked,
        fingerprints=page.fingerprints, split=page.split, notes=tuple(page.notes), setting=page.setting,
        certificate=page.certificate,
    )


def _written(policy: object) -> dict[str, Any]:
    written = {"type": type(policy).__name__, "version": _version(type(policy)), "data": _data(policy)}
    parts = getattr(policy, "parts", ())
    return {**written, "parts": [_written(part) for part in parts]} if parts else written


def _revived(page: _Policy, allowed: Mapping[str, Any], exits: Sequence[str], path: str) -> Policy:
    kind = allowed.get(page.type)
    if kind is None:
        raise FileFormatError(
            expected=f"a policy among {', '.join(allowed)}", got=repr(page.type), where="load_plan()",
            todo="pass its class: load_plan(path, known=(MyPolicy,)).",
        )
    if page.version > _version(kind):
        raise FileFormatError(expected=f"{kind.__name__} of version {_version(kind)} or older",
                              got=f"version {page.version}", where="load_plan()", todo="upgrade its package.")
    parts = [_revived(part, allowed, exits, path) for part in page.parts]
    try:
        if parts:
            policy = kind.from_json(page.data, parts)
        else:
            policy = kind.from_json(page.data) if hasattr(kind, "from_json") else kind(**page.data)
        if not isinstance(policy, Policy):
            raise TypeError(f"{kind.__name__} has no decide()")
        thresholds = getattr(policy, "thresholds", exits)
        if len(thresholds) != len(exits):
            raise ValueError(f"{len(thresholds)} thresholds for {len(exits)} exits")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise FileFormatError(expected=f"a whole {kind.__name__}", got=f"{path}: {error}",
                              where="load_plan()") from error
    return policy


def _version(kind: type) -> int:
    return int(getattr(kind, "version", 1))


def _data(policy: object) -> Mapping[str, Any]:
    if hasattr(policy, "to_json"):
        return dict(policy.to_json())
    if dataclasses.is_dataclass(policy) and not isinstance(policy, type):
        return dataclasses.asdict(policy)
    raise OfframpError(expected="a policy that can be written", got=type(policy).__name__, where="save_plan()",
                       todo="make it a dataclass of JSON values, or give it to_json() and from_json().")


def finite(value: Any) -> Any:
    """JSON values of JSON values: NaN in a report of figures (no labels, say) becomes null, as JSON has no NaN."""
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

"""Deployed networks as files: a versioned JSON page with the plan, and the weights that it uses, in safetensors.

    deployed.json               plan, heads' specs, form, shapes of the example inputs, fingerprint
    deployed-HASH.safetensors   ``backbone.*`` and ``heads.COLUMN.*``; of a budgeted plan nothing beyond its exit; of a
                                network of several widths ``0.5/backbone.*`` for each that the plan names, as small as
                                it is, and in the page how large its layers are; of a masked one ``lams.*`` too, and
                                in the page its masks' rule in the place of a plan

The architecture stays the user's code: loading builds the network from it, cuts it again and runs nothing of the file.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from offramp.choose.plan import plan_from_json, plan_to_json
from offramp.errors import FileFormatError, HeadError, OfframpError
from offramp.graph.channels import ChannelPlan
from offramp.nn.attach import attach
from offramp.nn.guest import fingerprint_of
from offramp.nn.masked import mask_
from offramp.nn.multiexit import MultiExit
from offramp.nn.output import read_logits
from offramp.nn.shortcut import spec_from_json
from offramp.nn.sizes import resize_
from offramp.nn.slim import Slimmable
from offramp.policies.thresholds import Thresholds
from offramp.runtime import Adaptive, deploy
from offramp.runtime.adaptive import Part
from offramp.runtime.pieces import Piece, piece
from offramp.sparse import Sparse
from offramp.sparse import deploy as deploy_masked
from offramp.table.files import read_json, read_tensors, write_tensors
from offramp.types import Plan

__all__ = ["load_deployed", "part", "rest", "save_deployed"]

_FORMAT, _PLAIN, _WIDTHS, _MASKS = "offramp.deployed", 1, 2, 3
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def save_deployed(fast: Adaptive | Sparse, folder: Path | str) -> Path:
    """Write a deployed network to a folder, whole or not at all; returns the page's path.

    Of a masked one, ``masked.deploy()``, its masks' rule and its lambdas too. Heads of your own, made without a spec,
    are kept as weights; ``load_deployed`` then asks for the modules.
    """
    tensors = _weights(fast)
    heads = {name: head.spec.to_json() if hasattr(head, "spec") else None  # type: ignore[union-attr, operator]
             for _, body, names in _bodies(fast) for name, head in zip(names, body[1:], strict=True)}
    args, kwargs = fast.example
    examples: dict[str, Tensor] = {}
    inputs = {"args": [_describe(f"inputs.{i}", leaf, examples) for i, leaf in enumerate(args)],
              "kwargs": {name: _describe(f"inputs.{name}", leaf, examples) for name, leaf in kwargs.items()}}
    page: dict[str, Any] = {"format": _FORMAT, "heads": heads, "inputs": inputs}
    if isinstance(fast, Sparse):
        page |= {"version": _MASKS, "masks": fast.masked.rule, "fingerprint": fingerprint_of(fast.masked),
                 "form": {"dense_above": fast.dense_above, "dtype": _named(fast.dtype)}}
    else:
        build = fast.build
        page |= {
            "version": _WIDTHS if fast.parts else _PLAIN, "plan": plan_to_json(fast.plan),
            "form": {"dtype": _named(build.dtype),
                     "channels_last": build.channels_last, "fold": build.fold},
            "fingerprint": fingerprint_of(fast.body),
            **({"widths": [part._asdict() for part in fast.parts]} if fast.parts else {}),
        }
    path = Path(folder) / "deployed.json"
    write_tensors(path, page, {**tensors, **examples})
    return path


def load_deployed(
    model: nn.Module | Callable[[], nn.Module],
    folder: Path | str,
    *,
    heads: Mapping[str, nn.Module] | None = None,
    known: Sequence[type] = (),
    logits: Callable[[Any], Tensor] = read_logits,
    example_inputs: Any = None,
    engine: Literal["eager", "compile"] = "eager",
    shrink: bool | Literal["auto"] = "auto",
) -> Adaptive | Sparse:
    """A deployed network from its folder and the code of its architecture; a masked one is ready to run, too.

    model: the network that was cut, with any weights, or a function that makes it (``lambda: resnet50(weights=None)``).
        A module given is copied and left as found. Of a network of several widths: the plain one, before ``slim_``.
    heads: column -> module, for heads that had no spec; ``known``: policy classes besides offramp's own.
    logits, example_inputs: as ``attach`` was given them, where the file cannot say.

    Every weight that is used must be in the file, and no other; what lies beyond a budgeted plan's exit is never read.
    FileFormatError where the file is damaged, from a later offramp, or of another architecture.
    """
    path = Path(folder) / "deployed.json"
    page = read_json(path, format=_FORMAT, version=_MASKS)
    tensors = read_tensors(path, page)
    try:
        rule = page.get("masks")
        plan = None if rule is not None else plan_from_json(page["plan"], str(path), known)
        specs = {name: None if spec is None else spec_from_json(spec) for name, spec in page["heads"].items()}
        form = _form(page["form"], masked=plan is None)
        described = page["inputs"]
        args = tuple(_revive(f"inputs.{i}", one, tensors) for i, one in enumerate(described["args"]))
        kwargs = {name: _revive(f"inputs.{name}", one, tensors) for name, one in described["kwargs"].items()}
        parts = [Part(float(one["width"]), tuple(one["heads"]), dict(one["sizes"]), int(one["stride"]))
                 for one in page.get("widths", ())]
    except (KeyError, TypeError, ValueError, AttributeError, HeadError) as error:
        raise FileFormatError(expected="a whole deployed.json", got=f"{path}: {error!r}", where="load_deployed()",
                              todo="save it again.") from error
    made = {**specs, **(heads or {})}
    names = [name for part in parts for name in part.heads] if parts else [*specs] if plan is None else plan.exits
    if lacking := [name for name in names if made.get(name) is None]:
        raise OfframpError(expected=f"the modules of the heads {', '.join(lacking)}", got="none", where="load_deployed",
                           todo="pass heads={column: module}; the file has their weights alone.")
    if example_inputs is None:
        if kwargs and args:
            raise OfframpError(expected="example inputs of one kind", got="positional and named ones",
                               where="load_deployed()", todo="pass example_inputs=, as to attach.")
        example_inputs = kwargs or args
    with torch.random.fork_rng(devices=[]):
        guest = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
        at: dict[str, dict[str, Any]] = {}
        for name in names:
            at.setdefault(name.partition("/")[0], {})[name.partition("/")[2]] = made[name]
        net = attach(guest.eval(), example_inputs, exits=list(at), heads=at or None, logits=logits,
                     task="dense" if plan is None else plan.task, keep_costly=True)
        fast: Any = _masked(net, rule, form, engine, str(path)) if plan is None else deploy(
            _Sized(net, parts, str(path)) if parts else net, replace(plan, fingerprints={}), engine=engine,
            shrink=shrink, **form)
    if plan is not None:
        fast.plan = plan
    _fill_(_weights(fast), {name: t for name, t in tensors.items() if not name.startswith("inputs.")}, path)
    if fingerprint_of(fast.masked if plan is None else fast.body) != page.get("fingerprint"):
        raise FileFormatError(expected="the architecture that was saved", got="other modules around the same weights",
                              where=str(path), todo="build the network with the code that it was saved with.")
    return fast  # type: ignore[no-any-return]


def _named(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _form(form: Mapping[str, Any], masked: bool) -> dict[str, Any]:
    """How it was deployed."""
    dtype = None if form.get("dtype") is None else _DTYPES[form["dtype"]]
    if masked:
        above = form["dense_above"]  # "measured" is so again by the machine that loads it
        return {"dense_above": above if above == "measured" else float(above), "dtype": dtype}
    return {"dtype": dtype, "channels_last": bool(form["channels_last"]),
            "fold": bool(form["fold"])}


def _masked(net: MultiExit, rule: Any, form: Any, engine: Any, where: str) -> Sparse:
    """A masked network whose lambdas and weights are to come."""
    try:
        masked = mask_(net, **{name: value for name, value in rule.items() if name != "enabled"})
    except (TypeError, AttributeError) as error:
        raise FileFormatError(expected="the rule of a mask", got=f"{rule!r}: {error}", where=where,
                              todo="save it again.") from error
    return deploy_masked(masked, engine=engine, **form)


class _Sized(Slimmable):
    """A network whose widths have sizes, and no weights yet."""

    def __init__(self, exits: MultiExit, parts: Sequence[Part], where: str) -> None:
        exits.columns = (*exits.columns[:-1], replace(exits.columns[-1], stride=parts[0].stride))
        super().__init__(exits, ChannelPlan((), ()), exits.traced.example())
        self.parts, self.where = {part.width: part for part in parts}, where
        self._gear.widths = tuple(sorted({*self.parts, 1.0}))

    def narrow(self, width: float) -> nn.Module:
        made = copy.deepcopy(self.backbone)
        assert isinstance(made, MultiExit)
        for name, sizes in self.parts[width].sizes.items():
            resize_(made.backbone if name == "backbone" else made.head(name), sizes, self.where)
        return made


def part(net: MultiExit, upto: str, *, frontier: bool = False, **form: Any) -> Adaptive | Piece:
    """``net.part(upto="layer2.1")``: the network up to one exit alone, for a device that holds no more of it.

    The exit's logits in the form of the network's output, bit for bit, and none of the weights that lie deeper: a plan
    in the budgeted setting, so that ``save_deployed`` and ``load_deployed`` take it; ``form`` is ``deploy``'s
    (``engine``, ``dtype``, ``fold``, ``channels_last``).

    frontier: also give what :func:`rest` goes on from: ``(logits, frontier)``, the logits as they are (EENet, C:
        what is not sure enough goes up). Such a part takes no ``form``; its weights are its ``state_dict``.
    """
    if not frontier:
        plan = Plan(exits=(upto,), policy=Thresholds(thresholds=(None,)), task=net.task, setting="budgeted")
        return deploy(net, plan, **form)
    if form:
        raise OfframpError(expected="a part with a frontier as it is", got=", ".join(form), where="net.part()")
    return piece(net, upto=upto)


def rest(net: MultiExit, after: str, *, upto: str | None = None) -> Piece:
    """``net.rest(after="layer2.1")``: what goes on from a part's frontier, to the network's own output.

    Takes ``*frontier``; part and rest chained are the untouched network, bit for bit. ``upto`` ends at a deeper exit
    instead and gives ``(logits, frontier)`` again, for a device in the middle.
    """
    return piece(net, after=after, upto=upto)


def _weights(fast: Adaptive | Sparse) -> dict[str, Tensor]:
    """What a deployed network holds, each tensor once, under names that say whose it is."""
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, body, names in _bodies(fast):
        for whose, module in zip(["backbone", *(f"heads.{name}" for name in names)], body, strict=True):
            for name, tensor in module.state_dict(keep_vars=True).items():
                if isinstance(tensor, Tensor):
                    found.setdefault(id(tensor), (f"{prefix}{whose}.{name}", tensor.detach()))
    if isinstance(fast, Sparse):
        found |= {id(lam): (f"lams.{name}", lam.detach()) for name, lam in fast.masked.lams.items()}
    return dict(found.values())


def _bodies(fast: Adaptive | Sparse) -> list[tuple[str, list[nn.Module], tuple[str, ...]]]:
    """Of each width: a prefix of its tensors' names, [its backbone, its heads ...], the names of these."""
    if isinstance(fast, Sparse):
        net = fast.masked.net
        columns = tuple(column.name for column in net.columns[:-1])
        return [("", [net.backbone, *map(net.head, columns)], columns)]
    bodies: Any = fast.body if len(fast.parts) > 1 else [fast.body]
    parts = [(f"{part.width:g}/", part.heads) for part in fast.parts] or [("", fast.plan.exits)]
    return [(prefix, list(body), tuple(names)) for body, (prefix, names) in zip(bodies, parts, strict=True)]


def _fill_(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], path: Path) -> None:
    faults = [f"no {name}" for name in mine if name not in theirs]
    faults += [f"{name}, which this network does not use" for name in theirs if name not in mine]
    faults += [f"{name} {theirs[name].dtype} {tuple(theirs[name].shape)}, here {tensor.dtype} {tuple(tensor.shape)}"
               for name, tensor in mine.items() if name in theirs
               and (theirs[name].shape, theirs[name].dtype) != (tensor.shape, tensor.dtype)]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise FileFormatError(expected="the weights of this network", got="; ".join(faults[:5]) + more, where=str(path),
                              todo="build the same architecture as the one that was saved.")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])


def _describe(name: str, leaf: Any, kept: dict[str, Tensor]) -> dict[str, Any]:
    """An example input: floats by their shape, whole numbers (which may index something) by their values."""
    if isinstance(leaf, Tensor):
        if not leaf.is_floating_point():
            kept[name] = leaf
        return {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return {"value": leaf}
    return {"type": type(leaf).__name__}


def _revive(name: str, described: Mapping[str, Any], kept: Mapping[str, Tensor]) -> Any:
    if "value" in described:
        return described["value"]
    if "type" in described:
        return None  # example_inputs= must say
    if name in kept:
        return kept[name]
    draw = torch.Generator().manual_seed(0)
    return torch.randn(described["shape"], generator=draw).to(_DTYPES[described["dtype"]])

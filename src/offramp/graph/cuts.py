"""Where a network can be cut: a small frontier of live tensors that determines everything after it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

import torch
from torch import Tensor, fx, nn

from offramp.errors import CutError
from offramp.graph._ops import same_as_traced
from offramp.graph.trace import Program, Traced, trace
from offramp.types import ExitSite, LiveTensor

__all__ = ["Cut", "Sites", "cut_at", "labels", "names_of", "sites"]

MOST_LIVE = 8
_LOOSE = {"bfloat16": 3e-2, "float16": 4e-3}  # relative; 1e-4 for the rest


@dataclass(frozen=True)
class Cut:
    """A place in one program, and what lives there."""

    position: int
    rowwise: tuple[fx.Node, ...]
    """Live tensors with a row per sample, in order of their making."""
    fixed: tuple[fx.Node, ...]
    """Live sizes, and live tensors that know nothing of the batch."""
    again: tuple[fx.Node, ...]
    """Ints worth as much as the batch: not carried but read again from what is live, to follow a smaller batch."""
    why_not: str = ""


class Sites(Sequence[ExitSite]):
    """The sites of a network in order of depth; prints as a table."""

    def __init__(self, items: Sequence[ExitSite], traced: Traced, aliases: Mapping[str, str]) -> None:
        self._items, self.traced = tuple(items), traced
        self.aliases = aliases
        """Names of other modules that return at the same place, as ``layer2`` does with its last block."""

    @overload
    def __getitem__(self, index: int) -> ExitSite: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ExitSite, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[ExitSite]:
        return iter(self._items)

    def to_json(self) -> str:
        """The sites as a JSON list, a field each."""
        return json.dumps([asdict(site) for site in self], indent=1)

    def __str__(self) -> str:
        whole = max((site.macs_before + site.macs_after for site in self), default=0)
        unit, scale = ("G", 1e9) if whole >= 1e9 else ("M", 1e6)
        reasons = list(dict.fromkeys(site.why_not for site in self if not site.shrinkable))
        rows = [("site", f"{unit}MACs before", "after", "param MB before", "shrinks", "live")] + [
            (("" if site.is_block else "  ") + site.name, f"{site.macs_before / scale:.3f}",
             f"{site.macs_after / scale:.3f}", f"{site.param_bytes_before / 1e6:.2f}",
             "yes" if site.shrinkable else f"no [{reasons.index(site.why_not) + 1}]", ", ".join(map(str, site.live)))
            for site in self
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] + [0]
        table = ["  ".join(cell.rjust(w) if i in (1, 2, 3) else cell.ljust(w)
                           for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
        return "\n".join(table + [f"[{i}] {reason}" for i, reason in enumerate(reasons, 1)])


def sites(model: nn.Module, example_inputs: Any, *, within: str | None = None) -> Sites:
    """Every place where ``model`` can be cut: what lives there, MACs on both sides, whether the batch may shrink.

    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. within: look inside that submodule
    alone; names are then relative to it. Indented sites lie inside or between blocks.
    """
    return sites_of(trace(model, example_inputs, within=within))


def sites_of(traced: Traced) -> Sites:
    """The sites of a traced network."""
    program = traced.program
    macs, costs = 0, []
    for cost in _macs_per_sample(traced):
        costs.append(macs)
        macs += cost
    costs.append(macs)
    held, seen, bytes_before = 0, set(), [0]
    for node in program.nodes:
        for parameter in _weights(traced.model, node):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                held += parameter.numel() * parameter.element_size()
        bytes_before.append(held)
    found = []
    places = names_of(traced, program)
    for position, names in places.items():
        if not 0 < costs[position] < macs or not names:
            continue
        cut = cut_at(traced, program, position)
        if cut is None or len(cut.rowwise) > MOST_LIVE:
            continue
        found.append(ExitSite(
            name=names[0],
            live=tuple(LiveTensor(name=said, shape=_shape(traced, node), dtype=node.meta["dtype"])
                       for said, node in zip(labels(traced, program, cut), cut.rowwise, strict=True)),
            macs_before=costs[position], macs_after=macs - costs[position], param_bytes_before=bytes_before[position],
            shrinkable=not cut.why_not, why_not=cut.why_not, is_block=names[0].split("#")[0] in traced.blocks,
        ))
    if not found:
        raise CutError(
            expected="a network with a place where a few tensors determine the rest",
            got=f"none (it counts {macs} MACs, and {len(places)} of its modules return on the way: {_widest(traced)})",
            where=f"sites({type(traced.model).__name__})",
            todo="split its forward into submodules: sites lie where a module returns, with MACs on both sides",
        )
    if sum(site.is_block for site in found) < 2:
        found = [ExitSite(**{**{k: getattr(s, k) for k in s.__dataclass_fields__}, "is_block": True}) for s in found]
    named = {site.name for site in found}
    aliases = {other: names[0] for names in places.values() if names[0] in named for other in names[1:]}
    return Sites(found, traced, aliases)


def _shape(traced: Traced, node: fx.Node) -> tuple[int, ...]:
    """A live tensor's shape for as many rows as the example has, from what it is for two batches."""
    twin = _twin(traced, node)
    many = node.meta["shape"]
    few = twin.meta.get("shape", ()) if twin else ()
    drop = traced.many - len(traced.kept)
    if len(many) != len(few):
        return (traced.rows, *many[1:])
    return tuple(a + (traced.rows - traced.many) * (a - b) // drop for a, b in zip(many, few, strict=True))


def _widest(traced: Traced) -> str:
    """Where most is alive, for the error that nothing can be cut."""
    program = traced.program
    tensors = [node for node in program.nodes if "shape" in node.meta and node.op != "get_attr"]
    live = [sum(program.index[n] < i <= program.last_use.get(n, -1) for n in tensors)
            for i in range(len(program.nodes))]
    node = program.nodes[live.index(max(live))]
    return f"at {node.name}, {node.meta.get('where', '?')}, {max(live)} tensors are still needed"


def names_of(traced: Traced, program: Program) -> dict[int, list[str]]:
    """Positions where modules return, with the names of those modules; the first is the site's own."""
    blocks = traced.blocks
    places: dict[int, list[tuple[bool, int, str]]] = {}
    for close in program.closes:
        inside = any(close.path.startswith(block + ".") for block in blocks)
        if not close.path or not close.outputs or (close.leaf and inside):
            continue
        name = f"{close.path}#{close.call}" if close.call else close.path
        places.setdefault(close.position, []).append((close.path not in blocks, close.path.count("."), name))
    return {position: [name for *_, name in sorted(found)] for position, found in sorted(places.items())}


def labels(traced: Traced, program: Program, cut: Cut) -> list[str]:
    """Names for a cut's tensors, the same in all modes: what module returned it, or in which module what op made it."""
    blocks = traced.blocks
    said: list[str] = []
    for node in cut.rowwise:
        names = [(c.path not in blocks, c.path.count("."), f"{c.path}#{c.call}" if c.call else c.path)
                 for c in program.closes if node in c.outputs and c.path]
        op = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "op")
        name = min(names)[2] if names else op if node.op == "placeholder" else f"{node.meta['path']}:{op}".lstrip(":")
        said.append(name if name not in said else f"{name}~{sum(s.split('~')[0] == name for s in said)}")
    return said


def cut_at(traced: Traced, program: Program, position: int) -> Cut | None:
    """What lives at a position; None where no cut can be: no tensor with rows, or views of one written to later."""
    live = [node for node in program.nodes[:position]
            if program.last_use.get(node, -1) >= position and node.op != "get_attr"]
    reference = traced.program
    rowwise: list[fx.Node] = []
    fixed: list[fx.Node] = []
    again: list[fx.Node] = []
    why = _burnt(traced, position) if program is reference else ""
    for node in live:
        twin = node if program is reference else None
        if "shape" in node.meta:
            verdict, reason = _tensor(traced, node) if twin is not None else (_has_rows(node, program), "")
            (rowwise if verdict else fixed).append(node)
            why = why or reason
        elif "value" in node.meta:
            verdict2, reason = _number(traced, program, node)
            (again if verdict2 else fixed).append(node)
            why = why or reason
        else:
            return None  # a tuple or the like whose parts are taken later
    roots = [node.meta["root"] for node in rowwise]
    written = {w.meta.get("root") for node in program.nodes[position:] for w in node.meta.get("writes", ())}
    grad = [n.args[0] for n in program.nodes[:position] if n.target is torch._C._set_grad_enabled]
    if grad and not grad[-1]:
        return None  # inside the network's own no_grad()
    if not rowwise or any(roots.count(root) > 1 and root in written for root in roots):
        return None
    if program is reference and not why:
        why = _mixed(traced)
    return Cut(position, tuple(rowwise), tuple(fixed), tuple(again), why)


def _has_rows(node: fx.Node, program: Program) -> bool:
    rows = next(program.nodes[i].meta["shape"][0] for i, batched in enumerate(program.batched) if batched)
    return bool(node.meta["shape"]) and node.meta["shape"][0] == rows


def _twin(traced: Traced, node: fx.Node) -> fx.Node | None:
    """The same node in the trace with fewer rows."""
    many, fewer = traced.program, traced.fewer
    at, (prefix, suffix) = many.index[node], traced.shared
    if at < prefix:
        return fewer.nodes[at]
    return fewer.nodes[at - len(many.nodes)] if len(many.nodes) - at <= suffix else None


def _tensor(traced: Traced, node: fx.Node) -> tuple[bool, str]:
    """Whether a live tensor has a row per sample, and if it is neither that nor blind to the batch, why not."""
    twin = _twin(traced, node)
    a, b = node.meta["shape"], twin.meta.get("shape") if twin else None
    said = f"{node.name} ({node.meta['where']})"
    if b is None:
        return True, f"{said} is made differently for each batch size"
    n, m = traced.many, len(traced.kept)
    if len(a) and (a[0], *b[:1]) == (n, m) and a[1:] == b[1:]:
        assert twin is not None
        ours, theirs = node.meta["print"], twin.meta["print"]
        loose = _LOOSE.get(node.meta["dtype"], 1e-4)
        same = ours is None or torch.allclose(ours[list(traced.kept)], theirs, rtol=loose, atol=1e-6, equal_nan=True)
        return True, "" if same else f"rows of {said} depend on the other rows"
    if a == b:
        return False, ""
    return True, f"{said} has shape {a} for {n} rows and {b} for {m}: the batch is not its dimension 0"


def _number(traced: Traced, program: Program, node: fx.Node) -> tuple[bool, str]:
    """Whether a live number must be read again after the batch shrank; or why that cannot be done."""
    if program is not traced.program:
        at = program.index[node]
        reference = traced.program.nodes
        if at >= len(reference) or "value" not in reference[at].meta:
            return False, ""
        node = reference[at]
    twin = _twin(traced, node)
    value, other = node.meta["value"], twin.meta.get("value") if twin else None
    if value == other:
        return False, ""
    n, m = traced.many, len(traced.kept)
    if (value, other) == (n, m):
        return True, ""
    return False, (f"{node.name} ({node.meta['where']}) changes with the batch size: {value} for {n} rows, {other} "
                   f"for {m}; read it from a tensor after the cut instead")


def _burnt(traced: Traced, position: int) -> str:
    """Why another batch size runs another program after a position; nothing if it does not."""
    nodes, (prefix, suffix) = traced.program.nodes, traced.shared
    if position >= len(nodes) - suffix:
        return ""
    node = nodes[min(prefix, len(nodes) - 1)]
    where = f"{node.name} ({node.meta.get('where', '?')})"
    if any(n.target is same_as_traced for n in nodes[max(prefix - 2, 0):prefix + 2]):
        return f"{where}: Python decides on the values of tensors there; use torch.where"
    return (f"{where} has the batch size burnt in: Python took it out of the shapes, with range(), int() or the like; "
            "use torch ops on sizes")


def _mixed(traced: Traced) -> str:
    """Where rows come to depend on each other, if they do so at all in what the network says."""
    nodes = traced.program.nodes
    for output in nodes[-1].all_input_nodes:
        if _tensor(traced, output)[1]:
            reasons = (_tensor(traced, node)[1] for node in nodes if "shape" in node.meta and node.op != "get_attr")
            return next((reason for reason in reasons if "depend on" in reason), _tensor(traced, output)[1])
    return ""


def _macs_per_sample(traced: Traced) -> list[int]:
    many, fewer = traced.program, traced.fewer
    if traced.depends_on_batch:
        return [round(node.meta.get("macs", 0) / traced.many) for node in many.nodes]
    # What one row costs, plus what is paid once a call.
    n, m = traced.many, len(traced.kept)
    costs = [(a.meta.get("macs", 0), b.meta.get("macs", 0)) for a, b in zip(many.nodes, fewer.nodes, strict=True)]
    return [few - (m - 1) * (most - few) // (n - m) for most, few in costs]


def _weights(model: nn.Module, node: fx.Node) -> list[Tensor]:
    """Parameters and buffers, as ``cost.memory.param_bytes`` counts them."""
    if node.op not in ("call_module", "get_attr") or not str(node.target).startswith("guest"):
        return []
    owner: Any = model
    for atom in str(node.target).split(".")[1:]:
        owner = getattr(owner, atom)
    if isinstance(owner, nn.Module):
        return [*owner.parameters(), *owner.buffers()]
    return [owner] if isinstance(owner, Tensor) else []

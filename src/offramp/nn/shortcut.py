"""Heads made of the network's own tail: a copy of what comes after a site, with most of its blocks left out.

Blocks of a residual network refine one estimate, so that one can be taken out and the rest still means something
(arXiv:1605.06431; LayerDrop, arXiv:1909.11556). An exit may therefore start as a short copy of the rest of the network
instead of from random weights, and learns what is missing from the network's own answers. The papers' heads start
from nothing; on a frozen CIFAR ResNet-56 this start learns in a fraction of the steps (docs/LOG.md).
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from offramp.errors import HeadError
from offramp.graph import Stage, Traced, begin
from offramp.nn.heads import HeadSpec
from offramp.nn.mess import MessSpec
from offramp.nn.redesigned import RedesignedSpec
from offramp.nn.specs import spec_data
from offramp.types import ExitSite

__all__ = ["ShortcutHead", "ShortcutSpec", "build_shortcut", "spec_from_json"]


@dataclass(frozen=True, kw_only=True)
class ShortcutSpec:
    """Which blocks of the network's tail an exit keeps.

    >>> ShortcutSpec.from_json(ShortcutSpec(keep=("layer3.8",)).to_json())
    ShortcutSpec(keep=('layer3.8',), share=0.15)
    """

    keep: tuple[str, ...] | None = None
    """Names of the blocks kept among those that can be left out (what enters has the shape of what leaves); None
    chooses by ``share``: the last block of each run of like blocks, deepest run first, then those before them."""
    share: float = 0.15
    """Without ``keep``: how much of the MACs after the site the head may cost. Blocks that change the shape stay
    whatever they cost."""

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        data = {"keep": None if self.keep is None else list(self.keep), "share": self.share}
        return {"type": "ShortcutSpec", "version": 1, "data": data}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "ShortcutSpec":
        """The inverse of :meth:`to_json`; HeadError on another type or a future version."""
        data = spec_data(record, cls)
        keep = data["keep"]
        return cls(keep=None if keep is None else tuple(keep), share=float(data["share"]))


def spec_from_json(record: Mapping[str, Any]) -> HeadSpec | ShortcutSpec | MessSpec | RedesignedSpec:
    """The spec of a head as a file keeps it, of any kind."""
    kinds: dict[Any, Any] = {"ShortcutSpec": ShortcutSpec, "MessSpec": MessSpec, "RedesignedSpec": RedesignedSpec}
    return kinds.get(record.get("type"), HeadSpec).from_json(record)  # type: ignore[no-any-return]


class ShortcutHead(nn.Module):
    """A thinned copy of the network's tail: ``head(*frontier)`` gives logits; its weights are its own."""

    def __init__(
        self, spec: ShortcutSpec, tail: fx.GraphModule, shapes: tuple[tuple[int, ...], ...], fixed: tuple[Any, ...]
    ) -> None:
        super().__init__()
        self.spec, self.tail = spec, tail
        self._shapes, self._fixed = shapes, fixed

    def forward(self, *frontier: Tensor) -> Tensor:
        if self._fixed and tuple(tuple(t.shape[1:]) for t in frontier) != self._shapes:
            raise HeadError(
                expected=f"inputs that give the frontier the shapes {self._shapes}, as when the head was made",
                got=str(tuple(tuple(t.shape[1:]) for t in frontier)), where="a shortcut head",
                todo="attach with example inputs of the size that is served",
            )
        return self.tail(*frontier, *self._fixed)  # type: ignore[no-any-return]

    def coarse(self, *frontier: Tensor) -> Tensor:
        """The same logits: where a copied tail resizes them, it may do more with them after."""
        return self(*frontier)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"keep={self.spec.keep}"


def build_shortcut(
    spec: ShortcutSpec, site: ExitSite, traced: Traced, logits: Callable[[Any], Tensor]
) -> ShortcutHead:
    """A head from the tail of a traced network. HeadError where ``keep`` names no block that can be left out."""
    stage = Stage(traced, site.name, None)
    module = stage.module()
    rows = traced.program.nodes[0].meta["shape"][0]
    costs = {node.name: node.meta.get("macs", 0) / rows for node in module.graph.nodes}
    _say_shapes(module.graph, site)
    removable = _removable(module.graph, set(traced.blocks))
    keep = spec.keep
    if keep is None:
        keep = _choose(removable, costs, spec.share * site.macs_after)
    if unknown := sorted(set(keep) - set(removable)):
        raise HeadError(
            expected=f"blocks after {site.name} that can be left out: {', '.join(removable) or 'there are none'}",
            got=", ".join(unknown), where="ShortcutSpec.keep",
        )
    graph = fx.Graph()
    at: dict[fx.Node, fx.Node] = {}
    gone: dict[fx.Node, fx.Node] = {}
    for name, (nodes, entry, exit_) in removable.items():
        if name not in keep:
            gone |= dict.fromkeys(nodes, entry)
            gone[exit_] = entry
    which = _logits_at(traced, logits)

    def take(node: fx.Node) -> fx.Node:
        while node in gone:
            node = gone[node]
        return at[node]

    for node in module.graph.nodes:
        if node in gone:
            continue
        if node.op == "output":
            graph.output(take(cast(Any, node.args[0])[which]))
        else:
            at[node] = graph.node_copy(node, take)
            if node.op in ("call_module", "get_attr"):
                at[node].target = str(node.target).removeprefix("guest.")
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or "effect" in node.meta)
    tail = fx.GraphModule(_copies(graph, module), graph, class_name="Tail")
    fixed = _fixed_values(traced, site, len(site.live))
    shapes = tuple(tuple(live.shape[1:]) for live in site.live)
    return ShortcutHead(ShortcutSpec(keep=tuple(keep), share=spec.share), tail, shapes, fixed)


def _say_shapes(graph: fx.Graph, site: ExitSite) -> None:
    """What enters a stage has no notes on its shape yet."""
    entries = [node for node in graph.nodes if node.op == "placeholder"][: len(site.live)]
    for node, live in zip(entries, site.live, strict=True):
        node.meta |= {"shape": live.shape, "dtype": live.dtype}
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "clone" and node.args[0] in entries:
            node.meta |= {k: node.args[0].meta[k] for k in ("shape", "dtype")}


_Block = tuple[tuple[fx.Node, ...], fx.Node, fx.Node]


def _removable(graph: fx.Graph, blocks: set[str]) -> dict[str, _Block]:
    """Blocks with one tensor in and one of the same shape out: name -> (nodes, what enters, what leaves)."""
    inside: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        path = str(node.target).removeprefix("guest.") if node.op == "call_module" else node.meta.get("path", "")
        name = next((b for b in _prefixes(path) if b in blocks), None)
        if name is not None and node.op != "get_attr":
            inside.setdefault(name, []).append(node)
    found: dict[str, _Block] = {}
    for name, nodes in inside.items():
        own = set(nodes)
        enters = {n for node in nodes for n in node.all_input_nodes if n not in own and n.op != "get_attr"}
        leaves = {node for node in nodes if any(user not in own for user in node.users)}
        if len(enters) == 1 and len(leaves) == 1:
            (entry,), (exit_,) = enters, leaves
            a, b = entry.meta, exit_.meta
            same = "shape" in a and "shape" in b and a["shape"][1:] == b["shape"][1:] and a["dtype"] == b["dtype"]
            if same and not any("effect" in node.meta for node in nodes):
                found[name] = (tuple(nodes), entry, exit_)
    return found


def _prefixes(path: str) -> list[str]:
    atoms = path.split(".")
    return [".".join(atoms[:i]) for i in range(1, len(atoms) + 1)]


def _choose(removable: Mapping[str, _Block], costs: Mapping[str, float], budget: float) -> tuple[str, ...]:
    """Runs of blocks that follow one another; the last of each run is kept first, from the deepest run on."""
    runs: list[list[str]] = []
    for name, (_, entry, _exit) in removable.items():
        if runs and removable[runs[-1][-1]][2] is entry:
            runs[-1].append(name)
        else:
            runs.append([name])
    graph = next(iter(removable.values()))[0][0].graph if removable else None
    total = sum(costs.values()) if graph is not None else 0.0
    price = {name: sum(costs[node.name] for node in nodes) for name, (nodes, *_) in removable.items()}
    spent, kept = total - sum(price.values()), []
    for depth in range(max((len(run) for run in runs), default=0)):
        for run in reversed(runs):
            if depth < len(run) and spent + price[run[-1 - depth]] <= budget:
                kept.append(run[-1 - depth])
                spent += price[run[-1 - depth]]
    return tuple(name for name in removable if name in kept)


def _copies(graph: fx.Graph, module: fx.GraphModule) -> nn.Module:
    """A root that owns copies of all that the graph names, under the guest's names."""
    root = nn.Module()
    memo: dict[int, Any] = {}
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        owner: Any = module._modules["guest"] if not str(node.target).startswith("constant_") else module
        for atom in str(node.target).split("."):
            owner = getattr(owner, atom)
        place, *path = [root, *str(node.target).split(".")]
        for atom in path[:-1]:
            if atom not in place._modules:
                place.add_module(atom, nn.Module())
            place = place._modules[atom]  # type: ignore[assignment]
        copied = copy.deepcopy(owner, memo)
        if isinstance(copied, nn.Module):
            place.add_module(path[-1], copied)
        elif isinstance(copied, nn.Parameter):
            place.register_parameter(path[-1], copied)
        elif isinstance(copied, Tensor):
            place.register_buffer(path[-1], copied, persistent=not path[-1].startswith("constant_"))
        else:
            setattr(place, path[-1], copied)
    root.requires_grad_(True)
    return root


def _logits_at(traced: Traced, logits: Callable[[Any], Tensor]) -> int:
    """Which of the network's output tensors holds the logits."""
    from torch.utils import _pytree as pytree

    said = logits(traced.output)
    for index, leaf in enumerate(leaf for leaf in pytree.tree_leaves(traced.output) if isinstance(leaf, Tensor)):
        if leaf is said:
            return index
    raise HeadError(expected="logits that are a tensor of the network's output", got="one computed from it",
                    where="a shortcut head", todo="use a HeadSpec, or return the logits as they are")


def _fixed_values(traced: Traced, site: ExitSite, live: int) -> tuple[Any, ...]:
    """Sizes of the example's inputs that the tail needs beside the frontier."""
    with torch.inference_mode():
        state = Stage(traced, None, site.name)(begin(traced, *traced.few[0], **traced.few[1]))
    assert len(state.tensors) == live
    return tuple(state.values)

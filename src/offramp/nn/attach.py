"""attach: cut a network, place exits, hang heads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from offramp.errors import HeadError
from offramp.graph import Traced, place, sites
from offramp.nn.heads import HeadSpec, build, check_pays, default_spec, head_macs
from offramp.nn.mess import MessSpec, blocks_before, build_mess
from offramp.nn.multiexit import MultiExit
from offramp.nn.output import read_logits, task_of
from offramp.nn.redesigned import RedesignedSpec, build_redesigned
from offramp.nn.shortcut import ShortcutSpec, build_shortcut
from offramp.types import ExitSite, Task

__all__ = ["Heads", "attach"]

Heads = (HeadSpec | ShortcutSpec | MessSpec | RedesignedSpec | nn.Module | Callable[["Site"], Any] | Mapping[str, Any]
         | None)


@dataclass(frozen=True)
class Site:
    """What a head maker is told: the site, and what its logits must look like."""

    site: ExitSite
    num_classes: int
    task: Task
    out_size: tuple[int, int] | None
    traced: Traced
    logits: Callable[[Any], Tensor]


def attach(
    model: nn.Module,
    example_inputs: Any,
    *,
    exits: int | Sequence[str] | Callable[[ExitSite], bool] = 4,
    heads: Heads = None,
    within: str | None = None,
    logits: Callable[[Any], Tensor] = read_logits,
    num_classes: int | None = None,
    task: Task | None = None,
    keep_costly: bool = False,
) -> MultiExit:
    """Cut a network and hang exits on the cuts: ``net(x)`` then answers at every exit and at the end.

    The model is shared, not copied, and left as found.

    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments; two rows or more are best.
    exits: a number places them at equal steps of MACs on block outputs (MESS, arXiv:2106.03527, 4.1); a list of names
        or a predicate on :class:`ExitSite` places them by hand (``offramp.sites`` lists them); 0 hangs none, for a
        network that adapts by its width alone.
    heads: nothing for a default by the site's shape; a :class:`HeadSpec`, or a :class:`ShortcutSpec` for a thinned copy
        of the network's own tail, or a :class:`RedesignedSpec` for dense logits; a function of a :class:`Site` that
        returns a spec, a module or a dict of candidates; or a mapping from site names to any of these. A mapping from
        names to :class:`MessSpec`, ``offramp.mess_space()`` for one, hangs all of them at every site; those that cost
        more than leaving there could save are left out, with a line in ``net.notes``.
    within: a submodule to cut instead of the whole, ``backbone.body`` for torchvision's detectors, say. The exits then
        belong to that submodule, which ``net`` stands for; ``num_classes`` and ``task`` must be given where its output
        has no logits.
    logits: reads the logits off the network's output, where the default cannot tell.
    keep_costly: hang such heads too, and refuse no other for its cost.

    CutError when the network cannot be cut there; HeadError when a head does not fit, or costs more than it could save.
    """
    guest = model.get_submodule(within) if within else model
    all_sites = sites(model, example_inputs, within=within)
    chosen = [] if not callable(exits) and exits in (0, (), []) else place(all_sites, exits)
    traced = all_sites.traced
    output, read = traced.output, cast(Callable[[Any], Tensor] | None, logits)
    try:
        said = logits(output)
        task = task or task_of(said)
        num_classes = num_classes or int(said.shape[1])
        out_size = _size(said) if task == "dense" else None
    except HeadError:
        if num_classes is None or task is None:
            raise
        read = None
        largest = max((t for t in _tensors(output) if t.ndim == 4), key=lambda t: t.shape[-1], default=None)
        out_size = _size(largest) if task == "dense" and largest is not None else None
    made, notes = {}, []
    for site in chosen:
        about = Site(site, num_classes, task, out_size, traced, logits)
        candidates = _make(heads, about)
        if not keep_costly:
            notes += _drop_costly(candidates, about)
        made[site.name] = {name: _module(head, about) for name, head in candidates.items()}
        for name, module in made[site.name].items():
            where = f"exit {site.name}{'/' + name if name else ''}"
            macs = _macs(module, site, where)
            if not keep_costly:
                check_pays(macs, site.macs_after, where)
    net = MultiExit(guest, traced, chosen, made, task=task, num_classes=num_classes, logits=read)
    net.notes = tuple(notes)
    return net


def _make(heads: Any, about: Site) -> dict[str, Any]:
    if isinstance(heads, Mapping) and about.site.name in heads:
        heads = heads[about.site.name]
    elif isinstance(heads, Mapping) and not any(isinstance(made, MessSpec) for made in heads.values()) and any(
        isinstance(made, HeadSpec | ShortcutSpec | RedesignedSpec | nn.Module) for made in heads.values()
    ):
        raise HeadError(
            expected=f"heads for the site {about.site.name}", got=f"heads for {sorted(heads)}", where="attach()",
            todo="give every site its heads, or pass one HeadSpec for all",
        )
    if callable(heads) and not isinstance(heads, nn.Module):
        heads = heads(about)
    live, size = about.site.live, (about.num_classes, about.task, about.out_size)
    if heads is None:
        heads = default_spec(live, *size, macs_after=about.site.macs_after)
    candidates = heads if isinstance(heads, Mapping) else {"": heads}
    if not candidates:
        raise HeadError(expected="at least one head", got="none", where=f"attach(), site {about.site.name}")
    return {str(name): head for name, head in candidates.items()}


def _drop_costly(candidates: dict[str, Any], about: Site) -> list[str]:
    """Leave out, of several, those of MESS's space that cannot pay; says which. HeadError when none is left."""
    after, where = about.site.macs_after, f"exit {about.site.name}"
    if len(candidates) == 1:
        return []
    macs = {}
    for name, spec in candidates.items():
        if isinstance(spec, MessSpec):
            with torch.device("meta"):  # the widest hold hundreds of megabytes, and may be the first to go
                module = _module(spec, about)
            macs[name] = _macs(module, about.site, f"{where}/{name}")
    costly = [name for name in macs if macs[name] >= after]
    if len(costly) == len(candidates):
        check_pays(min(macs.values()), after, f"{where}, the cheapest of {len(macs)}")
    for name in costly:
        del candidates[name]
    return [f"{about.site.name}: {len(costly)} of {len(macs)} heads left out, as they cost no less than the "
            f"{after / 1e6:.3f} M MACs that leaving there saves: {', '.join(costly)}"] if costly else []


def _module(head: Any, about: Site) -> nn.Module:
    if isinstance(head, HeadSpec):
        return build(head, about.site.live, about.num_classes, about.task, about.out_size)
    if isinstance(head, MessSpec):
        inverted = blocks_before(about.traced, about.site)
        return build_mess(head, about.site.live, about.num_classes, about.out_size, inverted)
    if isinstance(head, RedesignedSpec):
        return build_redesigned(head, about.site.live, about.num_classes, about.out_size)
    if isinstance(head, ShortcutSpec):
        return build_shortcut(head, about.site, about.traced, about.logits)
    if not isinstance(head, nn.Module):
        raise HeadError(
            expected="a HeadSpec, a ShortcutSpec, a MessSpec, a RedesignedSpec or an nn.Module",
            got=type(head).__name__, where=f"attach(), site {about.site.name}",
        )
    return head


def _macs(head: nn.Module, site: ExitSite, where: str) -> int:
    try:
        return head_macs(head, site.live)
    except (RuntimeError, TypeError) as error:
        raise HeadError(
            expected=f"a head that takes the frontier ({', '.join(map(str, site.live))})", got=f"an error: {error}",
            where=where, todo="make its forward take these tensors, one argument each",
        ) from error


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _size(logits: Tensor) -> tuple[int, int]:
    return int(logits.shape[-2]), int(logits.shape[-1])



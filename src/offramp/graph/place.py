"""Which sites get an exit: at equal steps of MACs, by name, or by a predicate."""

import difflib
from collections.abc import Callable, Sequence

from offramp.errors import CutError
from offramp.types import ExitSite

__all__ = ["place"]


def place(sites: Sequence[ExitSite], exits: int | Sequence[str] | Callable[[ExitSite], bool]) -> list[ExitSite]:
    """Choose sites, in order of depth.

    An int n takes the block outputs nearest to k / (n + 1) of the MACs, k = 1 ... n: "candidate exit points at block
    boundaries, approximately equidistant in workload" (MESS, arXiv:2106.03527, section 4.1); only where the batch may
    shrink, if there are enough such places. CutError when there are fewer blocks than exits, or a name is unknown.
    """
    if isinstance(exits, int):
        return _by_macs(sites, exits)
    if callable(exits):
        chosen = [site for site in sites if exits(site)]
        if not chosen:
            raise CutError(
                expected="a predicate that holds for a site", got=f"False for all {len(sites)}", where="place()"
            )
        return chosen
    aliases = getattr(sites, "aliases", {})
    names = [aliases.get(name, name) for name in ([exits] if isinstance(exits, str) else exits)]
    known = {site.name: site for site in sites}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        near = {name: difflib.get_close_matches(name, known, 3, 0.4) for name in unknown}
        raise CutError(
            expected="names of sites", got=", ".join(map(repr, unknown)) or "none", where="place()",
            todo="; ".join(f"for {name!r} did you mean {' or '.join(found)}?" for name, found in near.items() if found)
            or "choose from offramp.sites(model, example_inputs)",
        )
    return [site for site in sites if site.name in names]


def _by_macs(sites: Sequence[ExitSite], count: int) -> list[ExitSite]:
    blocks = [site for site in sites if site.is_block and site.shrinkable]
    if len(blocks) < count:
        blocks = [site for site in sites if site.shrinkable]
    if len(blocks) < count:
        blocks = list(sites)
    if not 1 <= count <= len(blocks):
        raise CutError(
            expected=f"1 to {len(blocks)} exits, as many as there are sites", got=str(count), where="place()",
            todo="ask for fewer exits",
        )
    whole = blocks[0].macs_before + blocks[0].macs_after
    chosen: list[ExitSite] = []
    rest = blocks
    for k in range(1, count + 1):
        room = rest[: len(rest) - (count - k)]  # leave a site for each exit still to come
        chosen.append(min(room, key=lambda site: abs(site.macs_before - whole * k / (count + 1))))
        rest = rest[rest.index(chosen[-1]) + 1 :]
    return chosen

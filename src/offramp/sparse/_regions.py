"""Where each map must stand, told backwards: at the active places, and at those that the operations after it read."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from offramp._kernel.ops import Conv, Level, Op, Pool, Read, Region, Window

__all__ = ["Regions", "nested"]


class Regions:
    """Fed the operations from the last to the first; ``of`` then says each map's region."""

    def __init__(self, levels: Sequence[int]) -> None:
        """levels: of each map."""
        self._levels = levels
        self._reads: list[dict[Read, None]] = [{} for _ in levels]  # a dict keeps their order
        self.regions: list[Region] = []
        self._known: dict[Region, int] = {}

    def of(self, map_: int) -> int:
        """The region of a map all of whose readers have been fed."""
        region = Region(self._levels[map_], tuple(self._reads[map_]))
        if region not in self._known:
            self._known[region] = len(self.regions)
            self.regions.append(region)
        return self._known[region]

    def levels_within(self, map_: int) -> set[int]:
        """All levels whose active places the region of a map names."""
        found, waiting = {self._levels[map_]}, list(self._reads[map_])
        while waiting:
            read = waiting.pop()
            found.add(read.level)
            waiting += self.regions[read.region].reads if read.region is not None else ()
        return found

    def feed(self, op: Op) -> None:
        """Note what an operation reads."""
        out = self.of(op.out.map)
        level = self._levels[op.out.map]
        if isinstance(op, Conv):
            if op.window != Window((1, 1)):  # a place reads itself, and active ones are there anyway
                self._add(op.source.map, Read(level, None, op.window))
            if op.residual is not None:
                self._pass_on(op.residual.map, out)
        elif isinstance(op, Pool):
            self._add(op.source.map, Read(level, out, op.window))
        else:
            for term in op.terms:
                if term.resize is None:
                    self._pass_on(term.source.map, out)
                else:
                    self._add(term.source.map, Read(level, out, term.resize))

    def _add(self, map_: int, read: Read) -> None:
        self._reads[map_][read] = None

    def _pass_on(self, map_: int, region: int) -> None:
        self._reads[map_].update(dict.fromkeys(self.regions[region].reads))


def nested(level: Level, earlier: Level, later: Level) -> bool:
    """Whether at a level each place that a later mask makes active was active by an earlier one, whatever these say.

    An exit's mask is within the mask before it where that is brought to its size by nearest; both are brought to the
    level by nearest too, and where sizes do not divide each other, nearest of nearest may be another place.
    """
    def at(size: int, goal: int) -> torch.Tensor:
        return F.interpolate(torch.arange(size, dtype=torch.float64)[None, None], goal, mode="nearest")[0, 0].long()

    return all(torch.equal(at(one, here), at(one, two)[at(two, here)]) for here, one, two in (
        (level.height, earlier.height, later.height), (level.width, earlier.width, later.width)))

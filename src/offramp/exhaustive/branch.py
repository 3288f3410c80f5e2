"""Which exits, heads and thresholds: the optimum of the whole space by branch and bound, proven (MESS, Eqs. 5-6).

Cells (``offramp.exhaustive.bound``) start as two or three whole sites; the cell with the lowest bound is cut in two
along the list that is widest, by how many samples leave or by the heads' cost, until its bound reaches the best plan or
so few plans are left that each is evaluated. A local search that moves one exit at a time finds the plan to beat.
Confusion matrices are summed; nothing is approximated.
"""

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.exhaustive.bound import Bounds, Lists, Scene, filter_lists
from offramp.exhaustive.climb import moves
from offramp.exhaustive.goal import Goal, Ledger
from offramp.exhaustive.space import Space
from offramp.table.payload import quality

__all__ = ["solve"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Chosen = tuple[tuple[int, int], ...]
"""(column, set) of each exit in order of depth."""
_GROUPS, _EACH, _HEADS, _ALIKE = 128, 4_000, 0.1, 8
_LOOKING, _THIN, _STARTS = 0.2, 16, 8
_TIE = 1e-9  # plans closer than this share of the objective count as equal


def solve(space: Space, goal: Goal, ledger: Ledger, *, max_exits: int, known: float) -> tuple[float, Chosen] | None:
    """(objective, the exits), or None where nothing is better than ``known`` and keeps the constraints."""
    hunt = _Hunt(space, goal, ledger, max_exits, known)
    hunt.search()
    if hunt.found is None:
        return None
    return hunt.best, tuple((int(hunt.scene.column[c]), int(hunt.member[c])) for c in hunt.found)


@dataclass(frozen=True, eq=False)
class _Cell:
    lists: Lists
    price: float
    near: Floats
    steer: float = 0.6
    """What the price is multiplied by from cut to cut, as long as the bound rises."""

    @property
    def count(self) -> int:
        return math.prod(len(one) for one in self.lists if one is not None)


class _Hunt:
    """One space, one goal: the arrays, the best plan so far and the cells still open."""

    def __init__(self, space: Space, goal: Goal, ledger: Ledger, max_exits: int, known: float) -> None:
        self.space, self.goal, self.ledger, self.max_exits = space, goal, ledger, max_exits
        self.best = known
        self.found: tuple[int, ...] | None = None
        costs = space.table.costs.one_width("search(tolerance='exact')")
        # bounds know one additive cost: the objective's own where it is one
        self.unit = next((u for u in goal.units if u == goal.minimise), goal.units[0] if goal.units else None)
        self.raw: dict[str, tuple[Floats, Floats]] = {unit: costs.parts(unit, batch=goal.batch) for unit in goal.units}
        body, head = self.raw.get(str(self.unit), (np.ones(space.exits + 1), np.zeros(space.exits + 1)))
        self.scale = float(body[-1]) or 1.0
        orders = [np.argsort(one.inside.sum(axis=1), kind="stable") for one in space.leavers]
        self.member = np.concatenate(orders) if orders else np.zeros(0, np.int64)
        self.samples = len(space.hit)
        pay = np.concatenate([space.hit, space.union], axis=2).transpose(1, 0, 2)
        self.scene = Scene(
            inside=np.concatenate([one.inside[order] for one, order in zip(space.leavers, orders, strict=True)])
            if orders else np.zeros((0, self.samples), bool),
            column=np.repeat(np.arange(space.exits), [len(order) for order in orders]),
            pay=np.ascontiguousarray(pay), body=body / self.scale,
            head=head / self.scale,
            sure=space.union.min(axis=1).sum(axis=0) > 0,
        )
        self.size = self.scene.inside.sum(axis=1)
        self.of_cost = float(self.unit is not None and (
            goal.minimise == self.unit or self.unit in goal.limits))
        self.open: list[tuple[float, int, _Cell]] = []
        self.ticket = itertools.count()
        names = sorted(set(space.site))
        of_column = np.array([names.index(one) for one in space.site], np.int64)
        self.site = of_column[self.scene.column]
        self.of_site = [np.flatnonzero(self.site == s) for s in range(len(names))]
        self.tried = [sum(one.tried for one, at in zip(space.leavers, of_column, strict=True) if at == s)
                      for s in range(len(names))]
        self.price, self.near = 4.0, np.zeros(0)

    # ---- exact ------------------------------------------------------------------------------------------------

    def judge(self, plans: Ints) -> Floats:
        """Objectives of plans (P, m): candidates in order of depth; inf where a constraint is broken."""
        parts = [self._judge(plans[p:p + 128]) for p in range(0, len(plans), 128)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _judge(self, plans: Ints) -> Floats:
        space, scene, exits = self.space, self.scene, plans.shape[1]
        where = np.full((len(plans), self.samples), exits)
        for k in range(exits - 1, -1, -1):
            where[scene.inside[plans[:, k]]] = k
        columns = np.concatenate([scene.column[plans], np.full((len(plans), 1), space.exits)], axis=1)
        answer = np.take_along_axis(columns, where, axis=1)
        rows = np.arange(self.samples)[None]
        reached = quality(space.hit[rows, answer].sum(axis=1), space.union[rows, answer].sum(axis=1))
        counts = np.stack([(where == k).sum(axis=1) for k in range(exits + 1)], axis=1)
        costs = space.table.costs
        spent: dict[str, Any] = {
            unit: ((body[columns] + head[columns].cumsum(axis=1)) * counts).sum(axis=1) / self.samples
            for unit, (body, head) in self.raw.items()}
        spent["param_bytes"] = costs.param_bytes[-1] + np.array(costs.head_param_bytes, float)[columns].sum(axis=1)
        spent["peak_bytes"] = np.array(costs.peak_bytes, float)[columns].max(axis=1)
        return np.where(self.goal.meets(reached, spent), self.goal.objective(reached, spent), np.inf)

    def offer(self, plans: Ints) -> None:
        """Evaluate plans and keep the best one if it is better than what is known."""
        values = self.judge(plans)
        if len(values) and values.min() < self.best - self.tie:
            p = int(values.argmin())
            self.best, self.found = float(values[p]), tuple(int(c) for c in plans[p])
            self.ledger.tell(self.best)

    def offer_singles(self) -> None:
        """Every plan of one exit: sums over whole sets of samples, a column at a time."""
        scene, space, costs = self.scene, self.space, self.space.table.costs
        half = space.hit.shape[2]
        at_end = scene.pay[-1].sum(axis=0)
        for e in np.unique(scene.column):
            ids = np.flatnonzero(scene.column == e)
            sums = at_end + scene.inside[ids].astype(np.float64) @ (scene.pay[e] - scene.pay[-1])
            reached = quality(sums[:, :half], sums[:, half:])
            gone = self.size[ids] / self.samples
            spent: dict[str, Any] = {unit: (body[e] + head[e]) * gone + (body[-1] + head[e]) * (1 - gone)
                                     for unit, (body, head) in self.raw.items()}
            for unit in ("param_bytes", "peak_bytes"):
                spent[unit] = costs.price((int(e), space.exits), unit)
            fits = np.where(self.goal.meets(reached, spent), self.goal.objective(reached, spent), np.inf)
            if fits.min() < self.best:
                self.offer(ids[[int(fits.argmin())]][:, None])

    @property
    def tie(self) -> float:
        return abs(self.best) * _TIE if np.isfinite(self.best) else 0.0

    # ---- what a plan of interest must keep ------------------------------------------------------------------------

    def terms(self) -> tuple[float, float]:
        """(the cost that a plan of interest stays below, as a share of the whole network's; the quality it reaches)."""
        goal = self.goal
        budget, asked = 0.0, goal.min_quality
        if self.of_cost:
            assert self.unit is not None
            most = goal.limits.get(self.unit, np.inf)
            budget = min(most, self.best - self.tie if goal.minimise == self.unit else np.inf) / self.scale
            budget = min(budget, 1e6)
        if goal.minimise == "drop":
            asked = max(asked, -self.best if np.isfinite(self.best) else -np.inf)
        return budget, asked

    def floor(self, bounds: Bounds, worth: float, terms: tuple[float, float]) -> float:
        """No plan of the cell has a smaller objective."""
        if self.goal.minimise == self.unit:
            return bounds.low * self.scale
        if self.goal.minimise == "drop":
            budget, asked = terms
            return -(asked + (budget - bounds.low) / worth) if worth else -1.0
        assert self.goal.minimise in ("param_bytes", "peak_bytes")
        return self.least_bytes(bounds.lists)

    def least_bytes(self, lists: Lists) -> float:
        costs = self.space.table.costs
        used = [np.unique(self.scene.column[one]) for one in lists if one is not None]
        if self.goal.minimise == "param_bytes":
            heads = np.array(costs.head_param_bytes, float)
            return float(costs.param_bytes[-1] + sum(heads[one].min() for one in used))
        peaks = np.array(costs.peak_bytes, float)
        return float(max([peaks[-1], *(peaks[one].min() for one in used)]))

    # ---- the search -----------------------------------------------------------------------------------------------

    def search(self) -> None:
        """Count the space, evaluate the plans of one exit or none, find a plan to beat, settle all other cells."""
        ledger, sites = self.ledger, range(len(self.of_site))
        for m in range(self.max_exits + 1):
            for chosen in itertools.combinations(sites, m):
                whole = math.prod(self.tried[s] for s in chosen)
                left = math.prod(len(self.of_site[s]) for s in chosen)
                ledger.configurations += whole
                ledger.cut("equal or empty sets", whole - left)
        self.offer(np.zeros((1, 0), np.int64))
        ledger.evaluated += 1
        if self.max_exits:
            self.offer_singles()
            ledger.evaluated += len(self.size)
        at_end = self.scene.pay[-1].sum(axis=0, dtype=np.float64)
        self.price, self.near = 4.0, at_end
        if self.max_exits > 1:
            self.explore()
            for m in (2, 3)[: self.max_exits - 1]:
                for chosen in itertools.combinations(sites, m):
                    lists = [self.of_site[s] for s in chosen]
                    # of the third, heads of like cost together: what crossing costs is charged by the dearest
                    for third in self.by_head(lists[2]) if m == 3 else (None,):
                        if len(lists[0]) and len(lists[1]) and (third is None or len(third)):
                            self.settle(_Cell((lists[0], lists[1], third), self.price, self.near))
                # two exits first, for half the time at most: the best of them makes short work of many threes
                self.run(0.5 if m < self.max_exits else 1.0)

    def heads(self, ids: Ints) -> Ints:
        """The columns of some candidates, the one with the cheapest head first."""
        columns = np.unique(self.scene.column[ids])
        cheapest: Ints = columns[np.argsort(self.scene.head[columns], kind="stable")]
        return cheapest

    def by_head(self, ids: Ints) -> list[Ints]:
        """Candidates of one site, cut into those of a few heads of about equal cost."""
        heads = self.heads(ids)
        return [ids[np.isin(self.scene.column[ids], heads[k:k + _ALIKE])] for k in range(0, len(heads), _ALIKE)]

    def run(self, until: float) -> None:
        """Best first, until the lowest bound reaches the best plan, or so large a share of the time is gone."""
        while self.open:
            low, _, cell = heapq.heappop(self.open)
            if low >= self.best - self.tie:
                self.ledger.cut("bound", cell.count)
                continue
            if self.ledger.spent > until:
                heapq.heappush(self.open, (low, next(self.ticket), cell))
                if until < 1:
                    return
                if np.isfinite(self.best):
                    self.ledger.gap = max(self.ledger.gap, (self.best - low) / (abs(self.best) or 1.0))
                else:
                    self.ledger.gap = 1.0
                return
            for part in self.halves(cell):
                self.settle(part, low)
            self.ledger.tell(self.best)

    def settle(self, cell: _Cell, known: float = -np.inf) -> None:
        """Bound a cell; drop it, evaluate it, or put what is left of it back."""
        ledger, count, terms = self.ledger, cell.count, self.terms()
        if ledger.out_of_time:
            # unlooked at: no plan costs less than nothing, or is better than perfect
            least = -1.0 if self.goal.minimise == "drop" else 0.0
            heapq.heappush(self.open, (max(known, least), next(self.ticket), cell))
            return
        budget, asked = terms
        lists, prices, floors = cell.lists, (cell.price, cell.price * cell.steer), []
        for worth in prices if np.isfinite(asked) and self.of_cost else (cell.price,):
            widest = max(len(one) for one in lists if one is not None)
            paid = worth if np.isfinite(asked) else 0.0
            bounds = filter_lists(
                self.scene, lists, budget=budget, asked=asked if paid else 0.0, price=paid, near=cell.near,
                per=max(1, -(-widest // _GROUPS)), of_cost=self.of_cost)
            if bounds.plans is not None and self.evaluate(bounds.plans, count):
                return
            lists = bounds.lists
            floors.append(self.floor(bounds, worth, terms))
            if any(one is not None and not len(one) for one in lists):
                ledger.cut("bound", count)
                return
        better = int(np.argmax(floors))
        left = _Cell(lists, prices[better], self.reached(bounds.near)[0], cell.steer if better else 1 / cell.steer)
        ledger.cut("bound", count - left.count)
        self.offer(np.array([bounds.near]))
        floor = max(*floors, known)
        if floor >= self.best - self.tie:
            ledger.cut("bound", left.count)
            return
        heapq.heappush(self.open, (floor, next(self.ticket), left))

    def evaluate(self, plans: Ints, count: int) -> bool:
        """Evaluate the plans that the bound leaves of a cell, unless they are too many."""
        if len(plans) > _EACH:
            return False
        self.offer(plans)
        self.ledger.evaluated += len(plans)
        self.ledger.cut("bound", count - len(plans))
        return True

    def reached(self, plan: Sequence[int]) -> tuple[Floats, float]:
        """((2K,) what hit and union add up to, quality) of one plan."""
        column = np.full(self.samples, self.space.exits)
        for c in sorted(plan, reverse=True):
            column[self.scene.inside[c]] = self.scene.column[c]
        sums = self.scene.pay[column, np.arange(self.samples)].sum(axis=0, dtype=np.float64)
        half = len(sums) // 2
        return sums, float(quality(sums[:half], sums[half:]))

    def halves(self, cell: _Cell) -> list[_Cell]:
        """Cut along the list that is widest: in how many leave, or in its heads."""
        width, which, along = -1.0, 0, "size"
        for k, one in enumerate(cell.lists):
            if one is None:
                continue
            spread = float(np.ptp(self.size[one])) / self.samples
            columns = len(np.unique(self.scene.column[one]))
            for wide, way in ((spread, "size"), (_HEADS * math.log2(columns), "heads"), (1e-6 * len(one), "middle")):
                if wide > width:
                    width, which, along = wide, k, way
        whole = cell.lists[which]
        assert whole is not None
        if along == "size":
            size = self.size[whole]
            upper = size > (int(size.min()) + int(size.max())) // 2
        elif along == "middle":
            upper = np.arange(len(whole)) >= len(whole) // 2
        else:
            heads = self.heads(whole)
            upper = np.isin(self.scene.column[whole], heads[len(heads) // 2:])
        return [
            _Cell((part if which == 0 else cell.lists[0], part if which == 1 else cell.lists[1],
                   part if which == 2 else cell.lists[2]), cell.price, cell.near, cell.steer)
            for part in (whole[~upper], whole[upper])
        ]

    # ---- a plan to beat -------------------------------------------------------------------------------------------

    def explore(self) -> None:
        """Climb from nothing at several prices for each choice of sites, on a few candidates; from the best, on all."""
        thin = [one[::_THIN] for one in self.of_site]
        sites = [s for s, one in enumerate(thin) if len(one)]
        asked = self.terms()[1]
        starts: set[tuple[int, ...]] = set()
        self.price = 24.0
        for worth in (24.0, 16.0, 12.0, 8.0, 4.0, 2.0, 1.0) if np.isfinite(asked) else (0.0,):
            plans = {self.climb((), chosen, thin, _LOOKING / 3, worth)[1]
                     for chosen in itertools.combinations(sites, min(self.max_exits, len(sites)))}
            bought = {plan for plan in plans if self.reached(plan)[1] >= asked}
            starts |= bought
            if not bought or self.ledger.spent > _LOOKING / 3:
                break
            self.price = worth  # the lowest that still buys the quality asked for is where bounds begin
        climbed = {self.climb(plan, sites, thin, _LOOKING * 2 / 3) for plan in starts}
        for _, plan in sorted(climbed)[:_STARTS]:
            self.climb(plan, sites, self.of_site, _LOOKING)
        self.climb(self.found or (), sites, self.of_site, _LOOKING)
        self.near = self.reached(self.found or ())[0]

    def climb(self, plan: tuple[int, ...], sites: Sequence[int], lists: Sequence[Ints], until: float,
              worth: float | None = None) -> tuple[float, tuple[int, ...]]:
        """(score, plan): add, drop or move one exit at a time as long as that lowers cost - ``worth`` * quality.

        Without ``worth``: as long as it lowers the objective under the constraints. ``until``: a share of the time.
        """
        score, better = np.inf, True
        if plan:
            score, plan = self.step(plan[:-1], np.array(plan[-1:]), worth)
        while better and self.ledger.spent <= until:
            better = False
            for gone, s in itertools.product((None, *plan), sites):
                rest = tuple(c for c in plan if c != gone)
                if len(rest) < self.max_exits and s not in self.site[list(rest)]:
                    found, other = self.step(rest, lists[s], worth)
                    if found < score - 1e-7:  # sums are of float32
                        score, plan, better = found, other, True
                        break
        return score, plan

    def step(self, rest: tuple[int, ...], ids: Ints, worth: float | None) -> tuple[float, tuple[int, ...]]:
        """(score, plan) of the best that one of ``ids``, or none, makes of ``rest``."""
        cost, sums = moves(self.scene, rest, ids)
        half = sums.shape[1] // 2
        reached = quality(sums[:, :half], sums[:, half:])
        if worth is not None:
            score = cost - worth * reached
        else:
            most = self.goal.limits.get(str(self.unit), np.inf) / self.scale
            fits = (reached >= self.goal.min_quality) & (cost <= most)
            score = np.where(fits, -reached if self.goal.minimise == "drop" else cost, np.inf)
        best = int(score.argmin())
        plan = rest if best == len(ids) else tuple(sorted((*rest, int(ids[best]))))
        if worth is None and np.isfinite(score[best]):
            self.offer(np.array([plan], np.int64).reshape(1, -1))
        return float(score[best]), plan

"""No plan of a cell beats the cell's bound, whatever the groups and the price: every plan beside it, one by one."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from choose.mess_tables import mess_table
from offramp.exhaustive import bound
from offramp.exhaustive.bound import Lists, Scene, filter_lists
from offramp.exhaustive.branch import _Hunt
from offramp.exhaustive.goal import Goal, Ledger
from offramp.exhaustive.space import lay_out
from offramp.table.payload import quality


def scene_of(seed: int) -> Scene:
    space = lay_out(mess_table(24, 3, 3, 4, pixels=128, skill=0.3, seed=seed, noise=2.0), against="labels",
                    confidence="top", steps=5, pixel_steps=3)
    return _Hunt(space, Goal(minimise="macs", min_quality=0.4), Ledger(), 3, np.inf).scene


def outcome(scene: Scene, plan: tuple[int, ...]) -> tuple[float, float]:
    """(cost, a share of the whole network's; quality) of one plan."""
    samples, last = scene.inside.shape[1], len(scene.body) - 1
    paid = 0.0
    sums = np.zeros(scene.pay.shape[2])
    for n in range(samples):
        spent, at = 0.0, last
        for c in plan:
            spent += scene.head[scene.column[c]]
            if scene.inside[c, n]:
                at = int(scene.column[c])
                break
        paid += scene.body[at] + spent
        sums += scene.pay[at, n]
    half = len(sums) // 2
    return paid / samples, float(quality(sums[:half], sums[half:]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("per", [1, 2, 50])
@pytest.mark.parametrize("exits", [1, 2, 3])
@pytest.mark.parametrize("pairs", [0, 8000])
def test_no_plan_beats_the_bound_of_its_cell(seed: int, per: int, exits: int, pairs: int,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound, "_PAIRS", pairs)
    scene, draw = scene_of(seed % 2), np.random.default_rng(seed)
    last = len(scene.body) - 1
    site = scene.column // 3
    picked = [np.sort(draw.choice(np.flatnonzero(site == s), 7, replace=False)) for s in range(3)]
    lists: Lists = {1: (None, picked[1], None), 2: (picked[0], picked[2], None), 3: tuple(picked)}[exits]  # type: ignore[assignment]
    near = scene.pay[draw.integers(0, last + 1)].sum(axis=0)
    plans = list(itertools.product(*(one for one in lists if one is not None)))
    known = np.array([outcome(scene, plan) for plan in plans])
    for price, of_cost in ((0.0, 1.0), (0.5, 1.0), (4.0, 1.0), (1.0, 0.0)):
        asked = float(np.quantile(known[:, 1], 0.7))
        worth = of_cost * known[:, 0] + price * (asked - known[:, 1])
        budget = float(np.quantile(worth, 0.2))
        found = filter_lists(scene, lists, budget=budget, asked=asked, price=price, near=near, per=per, of_cost=of_cost)
        assert found.low <= max(worth.min(), budget) + 1e-9
        if price == 0.5 and per == 1:
            assert found.low > worth.min() - 0.5  # a bound that says nothing would hold as well
        kept = [set(one.tolist()) for one in found.lists if one is not None]
        for plan, value in zip(plans, worth, strict=True):
            assert value > budget or all(c in one for c, one in zip(plan, kept, strict=True))
        if per == 1 and (exits < 3 or pairs):
            assert found.plans is not None
            told = {tuple(one) for one in found.plans.tolist()}
            assert told >= {plan for plan, value in zip(plans, worth, strict=True) if value <= budget}
            assert len(told) < len(plans)
        assert len(found.near) == exits


def test_one_exit_and_a_price_of_nothing_is_no_bound_but_the_cost() -> None:
    scene = scene_of(0)
    ids = np.flatnonzero(scene.column == 4)
    costs = [outcome(scene, (int(c),))[0] for c in ids]
    found = filter_lists(scene, (None, ids, None), budget=float(np.median(costs)), asked=0.0, price=0.0,
                         near=scene.pay[-1].sum(0), per=1)
    assert found.plans is not None and found.low == pytest.approx(min(costs), abs=1e-4)
    assert set(found.plans[:, 0].tolist()) == {int(c) for c, cost in zip(ids, costs, strict=True)
                                               if cost <= np.median(costs)}
    assert found.near == (int(ids[int(np.argmin(costs))]),)


@pytest.mark.parametrize("seed", range(4))
def test_every_plan_lies_in_the_box(seed: int) -> None:
    scene, draw = scene_of(seed % 2), np.random.default_rng(seed)
    # few heads a site, far apart: there the box of roles' means is the tighter one
    picked = [np.sort(draw.choice(np.flatnonzero(scene.column // 3 == s), 6, replace=False)) for s in range(3)]
    pay = scene.pay + draw.gamma(1.0, 40.0, scene.pay.shape)
    scene = replace(scene, pay=pay)
    low, high = bound._box(scene, tuple(bound._grouped(scene, one, 50) for one in picked))
    for plan in itertools.product(*picked):
        column = np.full(scene.inside.shape[1], len(scene.body) - 1)
        for c in reversed(plan):
            column[scene.inside[c]] = scene.column[c]
        sums = scene.pay[column, np.arange(len(column))].sum(axis=0)
        assert (low <= sums + 1e-6).all() and (sums <= high + 1e-6).all()
    each = scene.pay[np.r_[np.unique(scene.column[np.concatenate(picked)]), len(scene.body) - 1]]
    assert (low > each.min(axis=0).sum(axis=0) - 1e-6).all() and (high < each.max(axis=0).sum(axis=0) + 1e-6).all()

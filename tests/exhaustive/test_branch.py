"""The local search that finds a plan to beat, beside every plan that one move makes."""

import numpy as np
import pytest

from choose.mess_tables import mess_table
from exhaustive.test_bound import outcome, scene_of
from offramp.exhaustive.branch import _Hunt
from offramp.exhaustive.climb import moves
from offramp.exhaustive.goal import Goal, Ledger
from offramp.exhaustive.space import lay_out
from offramp.table.payload import quality


@pytest.mark.parametrize("others", [(), (0,), (2,), (0, 2)])
def test_moves_are_the_plans_that_one_more_exit_makes(others: tuple[int, ...]) -> None:
    scene, draw = scene_of(0), np.random.default_rng(3)
    site = scene.column // 3
    plan = tuple(int(draw.choice(np.flatnonzero(site == s))) for s in others)
    ids = np.flatnonzero(site == 1)[::3]
    cost, sums = moves(scene, plan, ids)
    half = sums.shape[1] // 2
    reached = quality(sums[:, :half], sums[:, half:])
    for row, more in enumerate([*((int(c),) for c in ids), ()]):
        assert (cost[row], reached[row]) == pytest.approx(outcome(scene, tuple(sorted((*plan, *more)))), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_no_single_move_betters_where_a_climb_ends(seed: int) -> None:
    space = lay_out(mess_table(24, 3, 3, 4, pixels=128, skill=0.3, seed=seed, noise=2.0), against="labels",
                    confidence="top", steps=5, pixel_steps=3)
    whole = float(quality(space.hit[:, -1].sum(0), space.union[:, -1].sum(0)))
    hunt = _Hunt(space, Goal(minimise="macs", min_quality=whole - 0.05), Ledger(), 2, np.inf)
    score, plan = hunt.climb((), range(3), hunt.of_site, 1.0)
    assert hunt.found is not None and score < 0.8
    assert (outcome(hunt.scene, plan)[0], hunt.best / hunt.scale) == pytest.approx((score, score), rel=1e-5)
    for gone in (None, *plan):
        rest = tuple(c for c in plan if c != gone)
        for c in range(len(hunt.size)):
            if len(rest) < 2 and hunt.site[c] not in hunt.site[list(rest)]:
                cost, got = outcome(hunt.scene, tuple(sorted((*rest, c))))
                assert cost >= score - 1e-6 or got < whole - 0.05

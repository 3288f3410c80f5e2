"""The exhaustive search beside brute force, on every setting and objective."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from choose.mess_tables import mess_table
from choose.synthetic import classify, dense
from offramp.choose import exact
from offramp.choose.replay import replay
from offramp.choose.search import PIXEL_THRESHOLDS, search, search_front
from offramp.errors import OfframpError, PlanError
from offramp.exhaustive import branch
from offramp.exhaustive.goal import Goal, Ledger
from offramp.exhaustive.settings import anytime
from offramp.exhaustive.space import lay_out
from offramp.functional.edges import EDGE_LEVELS
from offramp.functional.metrics import mean_iou
from offramp.functional.pareto import front
from offramp.table import ExitTable, Latency
from offramp.table.payload import quality
from offramp.types import EDGED


def plans_of(table: ExitTable, *, steps: int, pixel_steps: int, most: int,
             unit: Any = "macs") -> list[tuple[float, float, tuple[int, ...]]]:
    """(cost, quality, columns) of every plan, one sample at a time."""
    space = lay_out(table, against="labels", confidence="top", steps=steps, pixel_steps=pixel_steps)
    last, out = len(table.columns) - 1, []
    for m in range(most + 1):
        for columns in itertools.combinations(range(last), m):
            if len({space.site[e] for e in columns}) < m:
                continue
            path = table.costs.path((*columns, last), unit)
            for sets in itertools.product(*(space.leavers[e].inside for e in columns)):
                where = np.full(len(table), last)
                paid = np.full(len(table), path[-1])
                for k in range(m - 1, -1, -1):
                    where[sets[k]], paid[sets[k]] = columns[k], path[k]
                rows = np.arange(len(table))
                if table.task == "dense":
                    assert table.confusion is not None
                    got = float(mean_iou(table.confusion[rows, where].sum(0)))
                else:
                    assert table.logits is not None and table.labels is not None
                    got = float((table.logits[rows, where].argmax(-1) == table.labels).double().mean())
                out.append((float(paid.mean()), got, columns))
    return out


@pytest.fixture(scope="module", params=[0, 1, 2, 3])
def small(request: pytest.FixtureRequest) -> tuple[ExitTable, list[tuple[float, float, tuple[int, ...]]]]:
    table = mess_table(16, 3, 2, 3, pixels=128, skill=0.3, seed=request.param)
    return table, plans_of(table, steps=4, pixel_steps=2, most=3)


def whole(plans: list[tuple[float, float, tuple[int, ...]]]) -> float:
    return next(quality for _, quality, columns in plans if not columns)


@pytest.mark.parametrize("drop", [0.0, 0.01, 0.03, 0.2])
def test_cheapest_within_a_drop_is_brute_forces(small: Any, drop: float) -> None:
    table, plans = small
    plan = search(table, max_drop=drop, steps=4, pixel_steps=2)
    assert plan.predicted["macs"] == pytest.approx(
        min(macs for macs, got, _ in plans if got >= whole(plans) - drop - 1e-12), rel=1e-9)
    told = plan.certificate
    assert told["proven"] and told["gap"] == 0
    assert sum(told["pruned"].values()) + told["evaluated"] == told["configurations"]
    assert told["configurations"] == 17**3  # 2 heads x 4 x 2 thresholds or none at each of 3 sites
    assert told["evaluated"] < len(plans)


@pytest.mark.parametrize("drop", [0.0, 0.02, 0.1])
def test_the_proof_needs_no_luck(small: Any, drop: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a plan to beat from the local search, and with cells that must be cut often."""
    table, plans = small
    monkeypatch.setattr(branch._Hunt, "explore", lambda self: None)
    monkeypatch.setattr(branch, "_EACH", 3)
    for groups in (2, 20):
        monkeypatch.setattr(branch, "_GROUPS", groups)
        plan = search(table, max_drop=drop, steps=4, pixel_steps=2)
        assert plan.predicted["macs"] == pytest.approx(
            min(macs for macs, got, _ in plans if got >= whole(plans) - drop - 1e-12), rel=1e-9)
        told = plan.certificate
        assert told["proven"] and sum(told["pruned"].values()) + told["evaluated"] == told["configurations"]


@pytest.mark.parametrize("share", [0.4, 0.7, 1.1])
def test_best_within_a_budget_is_brute_forces(small: Any, share: float) -> None:
    table, plans = small
    most = share * table.costs.macs[-1]
    plan = search(table, minimise="drop", max_macs=most, steps=4, pixel_steps=2)
    assert plan.predicted["quality"] == pytest.approx(max(got for macs, got, _ in plans if macs <= most), rel=1e-12)
    assert plan.predicted["macs"] <= most


def test_bytes_are_brute_forces(small: Any) -> None:
    table, plans = small
    costs, last = table.costs, len(table.columns) - 1
    most = 0.7 * costs.macs[-1]
    for unit in ("param_bytes", "peak_bytes"):
        plan = search(table, minimise=unit, max_drop=0.1, max_macs=most, steps=4, pixel_steps=2)  # type: ignore[arg-type]
        assert plan.predicted[unit] == min(costs.price((*columns, last), unit) for macs, got, columns in plans
                                           if got >= whole(plans) - 0.1 - 1e-12 and macs <= most)
    held = sorted(costs.price((*columns, last), "param_bytes") + costs.price((*columns, last), "peak_bytes")
                  for _, _, columns in plans)[len(plans) // 3]
    plan = search(table, max_drop=0.1, max_bytes=held, steps=4, pixel_steps=2)
    assert plan.predicted["macs"] == pytest.approx(min(
        macs for macs, got, columns in plans if got >= whole(plans) - 0.1 - 1e-12
        and costs.price((*columns, last), "param_bytes") + costs.price((*columns, last), "peak_bytes") <= held))


@pytest.mark.parametrize("against", ["labels", "backbone"])
def test_classification_is_brute_forces(against: Any) -> None:
    table = classify(60, 3, 4, seed=2)
    plans = plans_of(table, steps=6, pixel_steps=1, most=2)
    if against == "labels":
        plan = search(table, tolerance="exact", max_drop=0.03, steps=6, max_exits=2)
        assert plan.predicted["macs"] == pytest.approx(
            min(macs for macs, got, _ in plans if got >= whole(plans) - 0.03 - 1e-12))
    else:
        plan = search(table, tolerance="exact", max_drop=0.03, steps=6, max_exits=2, against=against)
        assert replay(table, plan).disagreement <= 0.03 + 1e-12


def test_front_is_brute_forces() -> None:
    table = mess_table(10, 2, 2, 3, pixels=128, skill=0.3, seed=1)
    plans = plans_of(table, steps=3, pixel_steps=2, most=2)
    found = search_front(table, steps=3, pixel_steps=2, max_exits=2)
    kept = front([macs for macs, _, _ in plans], [got for _, got, _ in plans])
    assert [(one.predicted["macs"], one.predicted["quality"]) for one in found] == [
        pytest.approx(plans[k][:2], rel=1e-9) for k in kept]


def test_a_front_lays_its_space_out_once_and_tells_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    table = mess_table(10, 2, 2, 3, pixels=128, skill=0.3, seed=1)
    table = replace(table, histograms={"top": table.histograms["top"]})
    laid = []
    monkeypatch.setattr(exact, "lay_out", lambda *a, **more: laid.append(more["confidence"]) or lay_out(*a, **more))
    assert len(search_front(table, steps=3, pixel_steps=2, max_exits=1)) > 1 and laid == ["top"]
    with pytest.raises(PlanError, match="'margin'"):
        search_front(table, confidence="margin", steps=3, pixel_steps=2)


def test_latency_and_a_limit_on_macs() -> None:
    table = dense(20, 2, 3, seed=4)
    macs, times = (plans_of(table, steps=5, pixel_steps=2, most=2, unit=unit) for unit in ("macs", "latency_ms"))
    for most in (400.0, 900.0):
        plan = search(table, minimise="latency_ms", max_drop=0.4, max_macs=most, steps=5, pixel_steps=2)
        assert plan.predicted["latency_ms"] == pytest.approx(min(
            late for (spent, got, _), (late, _, _) in zip(macs, times, strict=True)
            if spent <= most and got >= whole(macs) - 0.4 - 1e-12))
        assert plan.predicted["macs"] <= most


@pytest.mark.parametrize("seed", [0, 5, 8])
def test_latency_is_bounded_by_latency_beside_a_limit_on_macs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads whose times have nothing to do with their macs, and a bound that nothing helps."""
    monkeypatch.setattr(branch._Hunt, "explore", lambda self: None)
    monkeypatch.setattr(branch, "_EACH", 3)
    table = mess_table(24, 3, 3, 3, pixels=128, skill=0.3, seed=seed)
    body = tuple(macs / 1e6 for macs in table.costs.macs)
    head = (*np.random.default_rng(seed).uniform(0, 30, len(body) - 1), 0.0)
    times = Latency(device="cpu", engine="eager", dtype="float32", batch=1, backbone_p50_ms=body, backbone_p95_ms=body,
                    head_p50_ms=head, head_p95_ms=head, dense_p50_ms=1.0, dense_p95_ms=1.0)
    table = replace(table, costs=replace(table.costs, latency=(times,)))
    macs, late = (plans_of(table, steps=4, pixel_steps=2, most=2, unit=unit) for unit in ("macs", "latency_ms"))
    most = 0.6 * table.costs.macs[-1]
    plan = search(table, minimise="latency_ms", max_drop=0.1, max_macs=most, steps=4, pixel_steps=2, max_exits=2)
    assert plan.certificate["proven"] and plan.predicted["macs"] <= most
    assert plan.predicted["latency_ms"] == pytest.approx(min(
        spent_ms for (spent, got, _), (spent_ms, _, _) in zip(macs, late, strict=True)
        if spent <= most and got >= whole(macs) - 0.1 - 1e-12))


def test_the_best_of_several_confidences() -> None:
    table = mess_table(16, 2, 2, 3, pixels=128, skill=0.3, seed=5)
    other = mess_table(16, 2, 2, 3, pixels=128, skill=0.3, seed=6).histograms["top"]
    table = replace(table, histograms={**table.histograms, "entropy": other})
    alone = [search(table, confidence=(name,), steps=4, pixel_steps=2) for name in ("top", "entropy")]
    both = search(table, confidence=("top", "entropy"), steps=4, pixel_steps=2)
    assert both.predicted["macs"] == min(one.predicted["macs"] for one in alone)
    assert both.certificate["configurations"] == sum(one.certificate["configurations"] for one in alone)


@pytest.mark.parametrize("name", EDGED)
def test_confidences_across_edges_have_coarser_pixel_thresholds(name: str) -> None:
    table = mess_table(16, 2, 2, 3, pixels=128, skill=0.3, seed=5)
    told = table.histograms["top"]
    table = replace(table, histograms={**table.histograms, name: told})
    plan = search(table, confidence=name, steps=4, pixel_steps=3)
    assert plan.exits and plan.certificate["proven"]
    space = lay_out(table, against="labels", confidence=name, steps=4, pixel_steps=3)
    for e, one in enumerate(space.leavers):
        cells = told[:, e].sum(dim=0).reshape(EDGE_LEVELS, -1).sum(dim=1).tolist()
        # the highest level that so many of all pixels reach
        wanted = {max(level for level in range(EDGE_LEVELS) if sum(cells[level:]) >= k / 4 * sum(cells))
                  for k in (1, 2, 3)}
        assert {pixel * EDGE_LEVELS for pixel in one.pixel if pixel is not None} <= wanted | {1}


# ---- settings -----------------------------------------------------------------------------------------------------


def test_budgeted_is_the_cheapest_column_that_reaches_the_goal() -> None:
    table = mess_table(20, 3, 4, 4, pixels=128, skill=0.3)
    assert table.confusion is not None
    reached = [float(mean_iou(table.confusion[:, e].sum(0))) for e in range(13)]
    goal = sorted(reached)[6]
    plan = search(table, setting="budgeted", min_miou=goal)
    costs = table.costs
    price = {e: costs.macs[e] + costs.head_macs[e] for e in range(13) if reached[e] >= goal}
    e = min(price, key=lambda one: price[one])
    assert plan.exits == (table.names[e],) and plan.setting == "budgeted" and plan.certificate["configurations"] == 13
    done = replay(table, plan)
    assert done.shares == (1.0, 0.0) and float(done.macs.mean()) == price[e] == plan.predicted["macs"]
    assert plan.predicted["param_bytes"] == costs.param_bytes[e] + costs.head_param_bytes[e] < costs.param_bytes[-1]
    assert plan.predicted["quality"] == pytest.approx(reached[e])
    tightest = min(costs.param_bytes[e] + costs.head_param_bytes[e] + costs.peak_bytes[e] for e in range(13))
    assert search(table, setting="budgeted", minimise="drop", max_bytes=tightest).exits  # the whole network is larger
    small = search(table, setting="budgeted", minimise="drop", max_bytes=plan.predicted["param_bytes"] + 20_000_000)
    assert small.predicted["param_bytes"] + small.predicted["peak_bytes"] <= plan.predicted["param_bytes"] + 20_000_000
    with pytest.raises(PlanError, match=r"quality >= 0.99"):
        search(table, setting="budgeted", min_miou=0.99)
    cheapest = search_front(table, setting="budgeted")
    assert [one.predicted["macs"] for one in cheapest] == sorted(one.predicted["macs"] for one in cheapest)
    assert cheapest[-1].predicted["quality_asked"] == max(reached)


@pytest.mark.parametrize("exits", [1, 2])
def test_anytime_has_the_least_overhead(exits: int) -> None:
    table = mess_table(20, 3, 3, 4, pixels=128, skill=0.3, seed=3)
    assert table.confusion is not None
    reached = [float(mean_iou(table.confusion[:, e].sum(0))) for e in range(10)]
    goal = sorted(reached)[3]
    plan = search(table, setting="anytime", min_miou=goal, max_exits=exits)
    heads = table.costs.head_macs
    fitting = [one for one in itertools.combinations(range(9), exits)
               if len({e // 3 for e in one}) == exits and all(reached[e] >= goal for e in one)
               and all(reached[a] <= reached[b] for a, b in itertools.pairwise(one))]
    least = min(sum(heads[e] for e in one) for one in fitting)
    assert plan.predicted["macs"] == table.costs.macs[-1] + least
    assert len(plan.exits) == exits and plan.setting == "anytime"
    first = min(table.costs.macs[one[0]] for one in fitting if sum(heads[e] for e in one) == least)
    assert table.costs.macs[table.index(plan.exits[0])] == first  # of equal ones the earliest
    done = replay(table, plan)
    assert done.shares[-1] == 1.0
    each = plan.predicted["each"]
    assert [one["quality"] for one in each] == [
        pytest.approx(reached[table.index(name)]) for name in (*plan.exits, "final")]
    assert each[0]["macs"] == sum(table.costs.head_macs[table.index(plan.exits[0])] for _ in (0,)) + first


def test_a_later_answer_is_never_worse_and_of_equal_overheads_the_earliest_speaks() -> None:
    table = mess_table(6, 3, 2, 3, pixels=128, skill=0.3)
    costs = replace(table.costs, head_macs=(5, 9, 5, 9, 5, 9, 0))
    reached = np.array([0.6, 0.8, 0.5, 0.5, 0.7, 0.75, 0.9])
    found = anytime(costs, reached, [0, 0, 1, 1, 2, 2], Goal(minimise="macs", min_quality=0.4), Ledger(), exits=2)
    assert found[0][0] == (0, 4)  # (0, 2) and (0, 3) fall from 0.6 to 0.5; (2, 4) costs as much and speaks later
    assert found[0][1] == costs.macs[-1] + 10
    assert all(reached[a] <= reached[b] for (a, b), _, _ in found)
    assert anytime(costs, reached, [0, 0, 1, 1, 2, 2], Goal(minimise="macs", min_quality=0.5), Ledger(),
                   exits=1)[0][0] == (0,)


def test_a_deadline_holds_until_the_first_answer() -> None:
    table = mess_table(20, 3, 3, 4, pixels=128, skill=0.3, seed=3)
    plan = search(table, setting="anytime", minimise="drop", max_macs=0.4 * table.costs.macs[-1])
    e = table.index(plan.exits[0])
    assert table.costs.macs[e] + table.costs.head_macs[e] <= 0.4 * table.costs.macs[-1]


def test_price_is_table_1s() -> None:
    costs = mess_table(4, 2, 2, 2, pixels=128).costs
    assert costs.price((1, 2, 4), setting="budgeted") == costs.macs[1] + costs.head_macs[1]
    assert costs.price((1, 2, 4), setting="anytime") == costs.macs[4] + costs.head_macs[1] + costs.head_macs[2]
    p = [0.5, 0.3, 0.2]  # leave at each; 1, 0.5 and 0.2 of the samples get there
    assert costs.price((1, 2, 4), shares=p) == pytest.approx(
        costs.macs[1] * 0.5 + costs.macs[2] * 0.3 + costs.macs[4] * 0.2 + costs.head_macs[1] + 0.5 * costs.head_macs[2])
    assert costs.price((1, 4), "param_bytes") == costs.param_bytes[4] + costs.head_param_bytes[1]
    assert costs.price((1, 4), "param_bytes", setting="budgeted") == costs.param_bytes[1] + costs.head_param_bytes[1]
    assert costs.price((1, 4), "peak_bytes") == max(costs.peak_bytes[1], costs.peak_bytes[4])
    with pytest.raises(OfframpError, match="3 shares"):
        costs.price((1, 2, 4), shares=[1.0])


# ---- what it refuses, and when it must stop -------------------------------------------------------------------------


def test_it_stops_in_time_with_a_gap_that_holds() -> None:
    table = mess_table(40, 4, 6, 4, pixels=128, skill=0.2, noise=2.0)
    stopped = search(table, steps=8, pixel_steps=3, time_limit_s=0.0)
    assert not stopped.certificate["proven"] and stopped.certificate["gap"] > 0
    told: list[tuple[float, float]] = []
    done = search(table, steps=8, pixel_steps=3, progress=lambda share, best: told.append((share, best)))
    assert done.certificate["proven"] and told[-1][0] <= 1.0
    assert done.predicted["macs"] <= stopped.predicted["macs"]
    assert done.predicted["macs"] >= stopped.predicted["macs"] * (1 - stopped.certificate["gap"]) - 1e-6


def test_nothing_found_in_time_is_not_nothing_there() -> None:
    table = mess_table(20, 3, 3, 4, pixels=128, skill=0.3)
    with pytest.raises(PlanError, match="raise time_limit_s"):
        search(table, min_miou=0.3, max_macs=1e6, time_limit_s=0.0)
    with pytest.raises(PlanError, match="loosen a constraint"):
        search(table, min_miou=0.3, max_macs=1e6)


def test_refuses_what_an_exhaustive_search_cannot_do() -> None:
    table = mess_table(8, 2, 2, 2, pixels=128)
    for wrong, told in (
        ({"smooth": True, "tolerance": "exact"}, "split_rows"),
        ({"confidence_level": 0.9, "min_miou": 0.1}, "split_rows"),
        ({"tolerance": "joint", "setting": "budgeted"}, "'exact'"), ({"setting": "sometimes"}, "'anytime'"),
        ({"max_exits": 4}, "at most 3"), ({"minimise": "flops"}, "'param_bytes'"), ({"confidence": ("odd",)}, "odd"),
        ({"max_macs": 1.0, "max_drop": 0.5}, "macs <= 1"), ({"setting": "anytime", "max_exits": 0}, "1 to 3"),
    ):
        with pytest.raises(OfframpError, match=told):
            search(table, **wrong)  # type: ignore[arg-type]
    for idle in ({"pixel_steps": 3}, {"time_limit_s": 5.0}, {"time_limit_s": 5.0, "tolerance": "halving"}):
        with pytest.raises(OfframpError, match=r"for tolerance .*set tolerance='exact'"):
            search(classify(9, 2, 3), **idle)  # type: ignore[arg-type]
    with pytest.raises(OfframpError, match="min_miou"):
        search(classify(9, 2, 3), min_miou=0.5)


def test_a_search_that_is_not_exhaustive_tells_how_far_it_is() -> None:
    for table, parts in ((classify(30, 2, 3), 1), (dense(20, 2, 3), len(PIXEL_THRESHOLDS))):
        told: list[tuple[float, float]] = []
        plan = search(table, tolerance="joint", progress=lambda *one, told=told: told.append(one))  # type: ignore[misc]
        assert [share for share, _ in told] == [pytest.approx((k + 1) / parts) for k in range(parts)]
        assert told[-1][1] == pytest.approx(plan.predicted["macs"])


def test_dense_tables_with_one_head_a_site_are_searched_as_before() -> None:
    table = dense(20, 2, 3)
    assert search(table).asked["tolerance"] == "joint"
    assert search(mess_table(8, 2, 2, 2, pixels=128)).asked["tolerance"] == "exact"
    assert search(mess_table(8, 2, 2, 2, pixels=128), smooth=True).asked["tolerance"] == "joint"
    several = classify(20, 3, 3)
    columns = tuple(replace(one, site="shared") for one in several.columns[:2])
    assert search(replace(several, columns=(*columns, *several.columns[2:]))).asked["tolerance"] == "joint"


def test_quality_counts_a_class_that_is_only_called() -> None:
    hit, union = np.array([[3.0, 0.0, 0.0]]), np.array([[4.0, 2.0, 0.0]])
    assert quality(hit, union).tolist() == [0.375]

import itertools
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score

from choose.synthetic import classify, costs_of, dense, pixels
from offramp.choose.calibrate import calibrate
from offramp.choose.categories import score
from offramp.choose.joint import best_joint, subsets
from offramp.choose.problem import Problem, pose
from offramp.choose.replay import replay
from offramp.choose.search import search
from offramp.choose.smooth import expected_counts, logistic
from offramp.errors import OfframpError, PlanError
from offramp.policies.quotas import thresholds_between
from offramp.policies.thresholds import Thresholds
from offramp.table import ExitTable
from offramp.types import ExitColumn, Plan


def posed(table: ExitTable, *, steps: int = 8, smooth: bool = False, unit: Any = "macs", **more: Any) -> Problem:
    exits = len(table.columns) - 1
    policy = Thresholds(thresholds=(None,) * exits,
                        pixel_thresholds=(0.5,) * exits if table.task == "dense" else ())
    return pose(table, policy, against=more.get("against", "labels"), unit=unit, batch=1, steps=steps, smooth=smooth)


def brute(problem: Problem, allowed: float) -> float:
    """The least cost over every subset and every threshold of the grid."""
    choices = itertools.product(*([None, *range(len(level))] for level in problem.levels))
    best = np.inf
    for picked in choices:
        choice = {e: j for e, j in enumerate(picked) if j is not None}
        if len({problem.site[e] for e in choice}) == len(choice):
            _, cost, loss = problem.run(choice)
            if loss <= allowed + 1e-12:
                best = min(best, cost)
    return best


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("against", ["labels", "backbone"])
def test_joint_against_brute_force(smooth: bool, against: str) -> None:
    gaps = []
    for seed in range(6):
        problem = posed(classify(150, 3, 5, seed=seed), steps=8, smooth=smooth, against=against)
        for allowed in (0.01, 0.04):
            _, cost, loss = problem.run(best_joint(problem, allowed))
            assert loss <= allowed + 1e-12
            gaps.append(cost / brute(problem, allowed) - 1)
    assert min(gaps) > -1e-12  # else brute force, or the cost, is wrong
    assert np.mean(np.array(gaps) < 1e-12) >= 0.9
    assert max(gaps) < 0.01


def test_joint_chooses_among_widths_too() -> None:
    for seed in range(4):
        problem = posed(wide(classify(150, 4, 5, seed=seed)), steps=6)
        for allowed in (0.0, 0.02, 0.06):
            choice = best_joint(problem, allowed)
            assert problem.run(choice)[1] <= brute(problem, allowed) * 1.01
    plan = search(wide(classify(600, 4, 5, skill=(2.5, 3.0))), max_drop=0.1)
    assert any(name.endswith("@0.5") for name in plan.exits)
    # by hand: samples that the narrow network keeps pay for it and start again
    done = replay(wide(classify(600, 4, 5, skill=(2.5, 3.0))), replace(plan, exits=("block0@0.5", "final@0.5"),
                                                                       policy=Thresholds(thresholds=(0.99, 0.9))))
    assert done.names == ("block0@0.5", "final@0.5", "final")
    paid = torch.tensor([130.0, 280.0, 1280.0])
    assert torch.equal(done.macs, paid[done.exit_index].double()) and len(set(done.exit_index.tolist())) == 3


def wide(table: ExitTable) -> ExitTable:
    """The first two of four early exits stand for a narrow network: its exit, and its end."""
    names = ("block0@0.5", "final@0.5", "block2", "block3", "final")
    columns = tuple(ExitColumn(name=name, site=name, width=0.5 if "@" in name else 1.0) for name in names)
    costs = replace(table.costs, macs=(100, 250, 400, 700, 1000), head_macs=(30, 0, 30, 30, 0), latency=(),
                    widths=(0.5, 0.5, 1, 1, 1))
    return replace(table, columns=columns, costs=costs)


def test_joint_against_brute_force_for_miou() -> None:
    for seed in range(3):
        problem = posed(dense(40, 2, seed=seed), steps=10)
        _, cost, loss = problem.run(best_joint(problem, 0.03))
        assert loss <= 0.03 and cost == pytest.approx(brute(problem, 0.03), rel=1e-3)


def test_candidates_of_one_site_exclude_each_other() -> None:
    table = classify(150, 3, 5, skill=(2.0, 3.0))
    columns = (*(ExitColumn(name=f"s/{head}", site="s", head=head) for head in "ab"), *table.columns[2:])
    table = replace(table, columns=columns)
    problem = posed(table)
    assert {chosen for chosen in subsets(problem) if len(chosen) == 2} == {(0, 2), (1, 2)}
    assert len(list(subsets(problem, 1))) == 3
    for allowed in (0.02, 0.3):
        choice = best_joint(problem, allowed)
        assert not {0, 1} <= set(choice)
        assert problem.run(choice)[1] <= brute(problem, allowed) * 1.005


def test_many_candidate_heads_are_searched_without_all_subsets() -> None:
    table = classify(200, 15, 5)
    heads = (ExitColumn(name=f"s{e // 3}/{e}", site=f"s{e // 3}", head=str(e)) for e in range(15))
    columns = (*heads, table.columns[-1])
    few, many = replace(table, columns=columns), table
    for tolerance in ("even", "halving"):
        all_of = search(few, max_drop=0.05, tolerance=tolerance)  # 4 ^ 5 subsets
        grown = search(many, max_drop=0.05, tolerance=tolerance)  # 2 ^ 15
        assert all_of.exits and grown.exits and grown.predicted["drop"] <= 0.05
        sites = [table.index(f"block{few.index(name)}") // 3 for name in all_of.exits]
        assert len(set(sites)) == len(sites)
    plan = search(many, max_drop=0.05, max_exits=2, tolerance="even")
    assert 0 < len(plan.exits) <= 2
    started = time.process_time()
    assert search(many, max_drop=0.05).exits and time.process_time() - started < 20


def test_max_exits_is_kept() -> None:
    table = classify(300, 5, 5)
    for tolerance in ("joint", "halving", "even"):
        for limit in (0, 1, 2):
            assert len(search(table, max_drop=0.05, tolerance=tolerance, max_exits=limit).exits) <= limit


@pytest.mark.parametrize("tolerance", ["joint", "halving", "even"])
@pytest.mark.parametrize("against", ["labels", "backbone"])
@pytest.mark.parametrize("task", ["classify", "dense"])
def test_the_plan_does_what_it_says(tolerance: Any, against: Any, task: str) -> None:
    table = classify(400, 3, 5) if task == "classify" else dense(40, 2)
    plan = search(table, max_drop=0.03, tolerance=tolerance, against=against)
    assert plan.exits
    done = replay(table, plan)
    loss = done.drop if against == "labels" else done.disagreement
    assert loss is not None and loss <= 0.03 + 1e-12
    if plan.asked["tolerance"] != "joint":
        assert plan.predicted["loss"] == pytest.approx(loss, abs=1e-12)
    assert plan.predicted["macs"] == pytest.approx(float(done.macs.mean())) and plan.predicted["macs"] < 1000
    assert plan.split == table.split and plan.fingerprints == table.fingerprints


def test_joint_is_cheapest_on_its_own_samples() -> None:
    for seed in range(3):
        table = classify(400, 4, 5, seed=seed)
        macs = {tolerance: search(table, tolerance=tolerance, smooth=False).predicted["macs"]
                for tolerance in ("joint", "halving", "even")}  # type: ignore[misc]
        assert macs["joint"] <= min(macs.values())


def test_halving_is_the_papers() -> None:
    """Eq. 3 by a loop: the lowest threshold with HR (1 - CA) <= T / 2^n, then the subset of the largest K(S)."""
    table = classify(300, 3, 5)
    problem = posed(table, steps=100, against="backbone")
    assert table.logits is not None
    told, chosen = table.logits[:, -1].argmax(1), {}
    for e in range(3):
        scores, said = table.logits[:, e].softmax(1).max(1).values, table.logits[:, e].argmax(1)
        for threshold in problem.levels[e]:
            hits = scores >= threshold
            hit_rate = float(hits.double().mean())
            agreement = float((said == told)[hits].double().mean()) if hits.any() else 1.0
            if hit_rate * (1 - agreement) <= 0.04 / 2 ** (e + 1) + 1e-12:
                chosen[e] = float(threshold)
    found = {}
    for size in range(4):
        for subset in itertools.combinations(range(3), size):
            plan = Plan(exits=tuple(f"block{e}" for e in subset), task="classify",
                        policy=Thresholds(thresholds=tuple(chosen[e] for e in subset)))
            found[subset] = score(table, plan)
    best = max(found, key=lambda subset: found[subset])
    plan = search(table, max_drop=0.04, tolerance="halving", against="backbone")
    assert plan.exits == tuple(f"block{e}" for e in best)
    assert isinstance(plan.policy, Thresholds)
    assert plan.policy.thresholds == tuple(chosen[e] for e in best)


def test_no_exit_where_none_pays() -> None:
    table = replace(classify(200, 3, 5), costs=costs_of(3, head=2000))
    plan = search(table, max_drop=0.02)
    assert plan.exits == () and plan.predicted["drop"] == 0 and "whole network" in plan.notes[0]
    flipped = classify(60, 1, 5)
    assert flipped.logits is not None
    flipped.logits[:, 0] = -flipped.logits[:, 1] * 9
    assert search(flipped, max_drop=0.0, against="backbone").exits == ()


def test_latency_is_minimised_where_it_was_measured() -> None:
    table = classify(300, 3, 5)
    slow = table.costs.latency[0]
    table = replace(table, costs=replace(table.costs, latency=(
        replace(slow, head_p50_ms=(50.0, 50.0, 0.1, 0.0)), *table.costs.latency[1:])))
    plan = search(table, max_drop=0.05, minimise="latency_ms")
    assert plan.exits == ("block2",)
    assert plan.predicted["latency_ms"] < plan.predicted["backbone_latency_ms"]
    with pytest.raises(PlanError, match="batch 5"):
        search(table, minimise="latency_ms", batch=5)


def test_refuses_what_cannot_be_searched() -> None:
    table = classify(20, 2, 5)
    for wrong, told in (({"max_drop": 1.0}, "fraction"), ({"max_drop": -0.1}, "fraction"),
                        ({"tolerance": "odd"}, "'even'"), ({"confidence": "x"}, "'x'"),
                        ({"against": "teacher"}, "'backbone'"), ({"temperatures": (1.0,)}, "temperatures")):
        with pytest.raises(OfframpError, match=told):
            search(table, **wrong)  # type: ignore[arg-type]
    with pytest.raises(OfframpError, match="empty"):
        search(table.slice(slice(0, 0)))
    with pytest.raises(PlanError, match="labels"):
        search(replace(table, labels=None), against="labels")
    assert search(replace(table, labels=None)).asked["against"] == "backbone"


# ---- thresholds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 50, 5000])
def test_thresholds_lie_between_scores(samples: int) -> None:
    scores = np.random.default_rng(0).beta(5, 1, samples).astype(np.float32).astype(np.float64)
    levels = thresholds_between(scores, 100)
    assert len(levels) <= 100 and (np.diff(levels) < 0).all()
    assert levels[-1] < scores.min() or levels[-1] == 0
    assert not np.isin(levels, scores).any()
    if samples == 5000:
        shares = (scores[None] >= levels[:, None]).mean(1)
        assert np.abs(np.diff(shares)).max() < 0.03 and len(levels) > 90


def test_thresholds_take_the_widest_gap_nearby() -> None:
    draw = np.random.default_rng(0)
    clusters = np.repeat(np.linspace(0.1, 0.9, 100), 20) + draw.uniform(-1e-6, 1e-6, 2000)
    levels = thresholds_between(clusters, 20)
    assert len(levels) == 20
    assert np.abs(levels[:, None] - clusters[None]).min() > 1e-4


def test_equal_scores_and_saturated_ones() -> None:
    assert thresholds_between(np.full(9, 1.0), 10).tolist() == [0.999]
    assert thresholds_between(np.zeros(0), 10).tolist() == []
    bits = np.array([1.0, np.nextafter(1.0, 0)])  # no middle between them: they leave together or not at all
    assert len(thresholds_between(bits, 10)) == 1
    table = classify(50, 2, 5)
    assert table.logits is not None
    same = replace(table, logits=torch.zeros_like(table.logits))
    saturated = replace(table, logits=table.logits * 1e4)
    for one in (same, saturated):
        plan = search(one, max_drop=0.1)
        assert replay(one, plan).drop is not None


def test_the_last_bit_of_a_score_flips_no_decision() -> None:
    table = classify(2000, 3, 5)
    plan = search(table, max_drop=0.02)
    assert table.logits is not None
    noisy = replace(table, logits=table.logits * (1 + 2e-7 * torch.randn(table.logits.shape)))
    assert torch.equal(replay(table, plan).exit_index, replay(noisy, plan).exit_index)


def test_codes_say_who_leaves() -> None:
    table = classify(100, 2, 5)
    problem = posed(table, steps=20)
    assert table.logits is not None
    for e in range(2):
        scores = table.logits[:, e].softmax(1).max(1).values.double().numpy()
        for j, threshold in enumerate(problem.levels[e]):
            assert ((problem.codes[:, e] <= j) == (scores >= threshold)).all()


# ---- against the noise of the samples --------------------------------------------------------------------------------


def test_logistic_against_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    features = draw.normal(size=(400, 3))
    happened = (draw.random(400) < 1 / (1 + np.exp(-features @ [1.0, -2.0, 0.5] + 1))).astype(np.float64)
    witness = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(
        (features - features.mean(0)) / features.std(0), happened)
    theirs = witness.predict_proba((features - features.mean(0)) / features.std(0))[:, 1]
    np.testing.assert_allclose(logistic(features, happened), theirs, atol=1e-5)
    assert logistic(features, happened).mean() == pytest.approx(happened.mean(), rel=1e-6)


def test_expected_counts_keep_the_sum() -> None:
    draw = np.random.default_rng(0)
    change = draw.normal(size=(50, 2, 9))
    found = expected_counts(draw.random((50, 2)), change)
    np.testing.assert_allclose(found.sum(0), change.sum(0), atol=1e-9)
    assert found.std() < change.std()


def test_smoothing_brings_the_loss_on_fresh_samples_down() -> None:
    fresh = classify(10_000, 3, 5, seed=99)
    drops: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(4):
        table = classify(800, 3, 5, seed=seed)
        for smooth in drops:
            drop = replay(fresh, search(table, max_drop=0.01, smooth=smooth)).drop
            assert drop is not None
            drops[smooth].append(drop)
    assert np.mean(drops[True]) < np.mean(drops[False])
    assert np.mean(drops[True]) < 0.015


def test_confidence_level_holds_on_fresh_samples() -> None:
    fresh = classify(10_000, 3, 5, seed=99)
    table = classify(3000, 3, 5)
    plan = search(table, max_drop=0.02, confidence_level=0.95)
    drop = replay(fresh, plan).drop
    assert plan.exits and drop is not None and drop <= 0.02
    assert plan.predicted["loss"] < search(table, max_drop=0.02).predicted["loss"]
    assert search(table.slice(slice(0, 20)), max_drop=0.01, confidence_level=0.99).exits == ()


def test_upper_bound_against_the_normal_one() -> None:
    table = classify(2000, 2, 5)
    problem = posed(table, steps=50, against="backbone")
    choice = {0: 20, 1: 30}
    column, _, loss = problem.run(choice)
    spread = problem.payload[np.arange(2000), column, 0, 0].std() / 2000**0.5
    assert problem.upper(choice, 0.95, repeats=2000) == pytest.approx(loss + 1.645 * spread + 1 / 2000, abs=3e-4)


# ---- calibration -----------------------------------------------------------------------------------------------------


def test_temperatures_bring_ece_down_and_are_built_in() -> None:
    table = classify(3000, 2, 5)
    found = calibrate(table)
    assert found.against == "labels" and len(found.temperatures) == 3 and len(found.early) == 2
    for e in range(3):
        assert found.nll_after[e] <= found.nll_before[e] and found.ece_after[e] < found.ece_before[e]
        assert found.brier_after[e] <= found.brier_before[e]
    plan = search(table, max_drop=0.02, temperatures=found.early)
    assert isinstance(plan.policy, Thresholds)
    assert plan.policy.temperatures == tuple(found.temperatures[table.index(name)] for name in plan.exits)


def test_without_labels_the_backbone_is_the_target() -> None:
    table = classify(500, 2, 5, labels=False)
    found = calibrate(table)
    assert found.against == "backbone" and found.temperatures[-1] == 1.0 and found.ece_before[-1] == 0.0
    assert table.logits is not None
    told = replace(table, labels=table.logits[:, -1].argmax(1))
    assert calibrate(told, against="labels").temperatures[:2] == found.temperatures[:2]
    with pytest.raises(PlanError, match="labels"):
        calibrate(table, against="labels")
    with pytest.raises(PlanError, match="dense"):
        calibrate(dense(3, 2))


# ---- size ------------------------------------------------------------------------------------------------------------


def test_all_subsets_of_8_exits_with_100_thresholds_on_10_000_samples() -> None:
    table = classify(10_000, 8, 10)
    started = time.process_time()
    plan = search(table, max_drop=0.01)
    assert plan.exits and time.process_time() - started < 20  # twice the bar, for a busy machine


def test_miou_of_the_plan_is_scikit_learns() -> None:
    table, (logits, labels) = dense(60, 2, seed=5), pixels(60, 2, seed=5)
    plan = search(table, max_drop=0.02)
    column = replay(table, plan).column_of
    mixed = torch.stack([logits[n, column[n]].argmax(0) for n in range(60)])
    kept = labels != 255
    whole = jaccard_score(labels[kept], logits[:, -1].argmax(1)[kept], average="macro")
    assert whole - jaccard_score(labels[kept], mixed[kept], average="macro") <= 0.02 + 1e-9

"""One of several sub-models a call: the best that should end in time, and nothing of the others runs."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

import offramp
from offramp.errors import OfframpError, PlanError
from offramp.runtime import deadline
from offramp.runtime.deadline import ByDeadline
from runtime.nets import classifier, images, plan
from runtime.test_budgeted import Refuses

MS = {"one": 2.0, "two": 5.0, "final": 9.0}


def plans(**how: Any) -> list[Any]:
    made = []
    for k, (name, ms) in enumerate(MS.items()):
        exits = () if name == "final" else (name,)
        made.append(replace(plan(Refuses(), setting="budgeted"), exits=exits, predicted={
            "latency_ms": ms, "macs": 10.0 * k + 1, "quality": 0.5 + 0.1 * k, **how}))
    return made


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> ByDeadline:
    """Three sub-models and a clock that moves only while one of them runs, by its own time."""
    made = classifier().deploy(plans()[::-1])
    clock = {"s": 0.0}
    monkeypatch.setattr(deadline.time, "perf_counter", lambda: clock["s"])
    for k, name in enumerate(made.names):
        def run(*args: Any, _call: Any = made.options[k].forward, _ms: float = MS[name], **kwargs: Any) -> Any:
            clock["s"] += made.slowness * _ms / 1e3
            return _call(*args, **kwargs)

        monkeypatch.setattr(made.options[k], "forward", run)
    made.slowness = 1.0
    return made


def test_the_best_that_ends_in_time_answers(fast: ByDeadline) -> None:
    net, x = classifier().eval(), images(3)
    with torch.no_grad():
        said = net(x)
    assert fast.names == ("one", "two", "final")
    fast.calibrate(x)
    for limit, wanted in ((1.0, 0), (2.1, 0), (4.9, 0), (5.1, 1), (8.9, 1), (9.1, 2), (None, 2)):
        assert torch.equal(fast(x, deadline_ms=limit), said[wanted]), limit
    assert fast.picked == [3, 2, 2] and fast.calls == 7
    assert fast.deadlines.missed == 1  # nothing answers in 1 ms; the fastest came late


def test_it_learns_what_this_machine_takes(fast: ByDeadline) -> None:
    x = images(2)
    assert fast.choose(x, deadline_ms=6.0) == 1  # as the plans foretold
    fast.slowness = 3.0
    fast.calibrate(x)
    assert fast.choose(x, deadline_ms=6.0) == 0 and fast.choose(x, deadline_ms=16.0) == 1
    assert fast.choose(images(4), deadline_ms=6.0) == 1  # inputs of another size were never timed


def test_what_was_not_timed_is_scaled_as_the_others(fast: ByDeadline) -> None:
    x = images(2)
    fast.slowness = 3.0
    for _ in range(3):
        fast(x, deadline_ms=0.1)  # the fastest alone is timed
    assert fast.picked == [3, 0, 0] and fast.deadlines.missed == 3
    assert fast.choose(x, deadline_ms=14.0) == 0 and fast.choose(x, deadline_ms=15.1) == 1


def test_one_slow_run_is_held_against_it(fast: ByDeadline) -> None:
    x = images(2)
    fast.calibrate(x)
    fast.slowness = 2.0
    fast(x, deadline_ms=6.0)
    fast.slowness = 1.0
    assert fast.deadlines.missed == 1 and fast.choose(x, deadline_ms=6.0) == 0


def test_what_is_no_deadline_is_refused_before_anything_runs(fast: ByDeadline) -> None:
    for bad in (float("nan"), -1.0, True, "9"):
        with pytest.raises(OfframpError, match="deadline_ms as a number >= 0"):
            fast(images(2), deadline_ms=bad)
    assert fast.calls == 0 and fast.deadlines.calls == 0 and "deadlines" not in repr(fast)
    fast(images(2))
    assert fast.calls == 1 and fast.deadlines.calls == 0
    fast(images(2), deadline_ms=0)
    assert "deadlines: 1 of 1 missed" in repr(fast)


def test_only_budgeted_plans(fast: ByDeadline) -> None:
    with pytest.raises(PlanError, match="budgeted.*anytime plan"):
        classifier().deploy([plan(Refuses(), setting="anytime")])
    with pytest.raises(PlanError, match="none"):
        classifier().deploy([])


def test_a_front_found_on_a_table_is_deployed() -> None:
    net, x = classifier().eval(), images(64)
    table = offramp.record(net, torch.utils.data.TensorDataset(x, torch.randint(0, 5, (64,))), latency=True)
    front = offramp.search_front(table, setting="budgeted", minimise="latency_ms", against="backbone")
    fast = net.deploy(front)
    assert fast.names[-1] == "final" and len(fast.names) == len(front)
    expected = fast.calibrate(x[:1])
    assert torch.equal(fast(x[:1]), net.backbone(x[:1]))
    slowest = max(expected.values())
    began = time.perf_counter()
    fast(x[:1], deadline_ms=100 * slowest + 1000)
    assert fast.deadlines.missed == 0 and 1e3 * (time.perf_counter() - began) < 100 * slowest + 1000

"""Anytime: ever better answers, no leg that will not end in time, and the last answer where nobody asks for more."""

import threading
import time
from typing import Any

import pytest
import torch

from offramp.errors import OfframpError
from offramp.runtime import anytime
from offramp.runtime._legs import Leg
from offramp.runtime.adaptive import Adaptive
from runtime.nets import ByLogit, classifier, images, plan, segmenter
from runtime.test_budgeted import Refuses
from runtime.test_deploy import expected

SOME = ByLogit(0, 1)


def fast_of(form: str = "tensor", **how: Any) -> tuple[Any, Adaptive]:
    net = classifier(form)
    return net, net.deploy(plan(Refuses(), setting="anytime"), **how)


class Clock:
    """A clock that moves only while a leg runs, and as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *legs_ms: float) -> None:
        self.ms, self.legs_ms, self.ran = 0.0, list(legs_ms), []
        monkeypatch.setattr(anytime, "now", lambda: self.ms)
        advance, clock = Leg._advance, self

        def spy(leg: Leg, state: Any) -> Any:
            k = clock.fast.legs.index(leg)
            clock.ran.append(k)
            clock.ms += clock.legs_ms[k]
            return advance(leg, state)

        monkeypatch.setattr(Leg, "_advance", spy)

    fast: Adaptive

    def exits(self, x: Any, deadline_ms: float | None) -> list[int]:
        self.ran.clear()
        return [one.exit_index for one in self.fast.anytime(x, deadline_ms=deadline_ms)]


def test_without_a_deadline_every_exit_speaks_and_the_last_is_the_network() -> None:
    net, fast = fast_of("dict")
    x = images(4)
    with torch.no_grad():
        said, whole = net.eval()(x), net.backbone(x)
    answers = list(fast.anytime(x))
    assert [one.exit_index for one in answers] == [0, 1, 2]
    for one, wanted in zip(answers, said, strict=True):
        assert torch.equal(one.output["out"], wanted) and one.exits.tolist() == [one.exit_index] * 4
    assert torch.equal(answers[-1].output["aux"], whole["aux"])
    assert sorted(one.elapsed_ms for one in answers) == [one.elapsed_ms for one in answers]


def test_a_plain_call_is_the_last_answer_and_runs_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    net, fast = fast_of()
    monkeypatch.setattr(Leg, "run", None)
    assert torch.equal(fast(images(5)), net.backbone.eval()(images(5)))
    assert fast.last_exits.tolist() == [2] * 5


def test_no_leg_starts_that_should_end_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 10.0, 20.0, 30.0)
    clock.fast = fast_of()[1]
    x = images(2)
    clock.fast.calibrate(x)
    for deadline, wanted in ((60.0, [0, 1, 2]), (59.0, [0, 1]), (30.0, [0, 1]), (29.0, [0]), (10.0, [0]), (0.0, [0]),
                             (-5.0, [0]), (None, [0, 1, 2])):
        assert clock.exits(x, deadline) == wanted, deadline
        assert clock.ran == wanted, "what is not given is not run either"


def test_time_that_the_user_spends_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 10.0, 20.0, 30.0)
    clock.fast = fast_of()[1]
    clock.fast.calibrate(images(2))
    seen = []
    for one in clock.fast.anytime(images(2), deadline_ms=60.0):
        seen.append(one.exit_index)
        clock.ms += 1.0
    assert seen == [0, 1]


def test_the_running_median_follows_and_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 10.0, 20.0, 30.0)
    clock.fast, x = fast_of()[1], images(2)
    clock.fast.calibrate(x)
    clock.legs_ms[2] = 3.0  # the machine got faster; only runs can tell
    for _ in range(2):
        clock.exits(x, None)
    assert clock.exits(x, 59.0) == [0, 1], "two of five say 3 ms: the median is still 30"
    clock.exits(x, None)
    clock.exits(x, None)
    assert clock.exits(x, 59.0) == [0, 1, 2]


def test_a_first_call_goes_by_its_own_pace_and_one_slow_run_rules_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fast_of()[1]
    clock = Clock(monkeypatch, 1000.0, 1000.0, 1000.0)
    clock.fast, x = fast, images(2)
    assert clock.exits(x, None) == [0, 1, 2]  # warms up; not kept
    per_mac = 10.0 / fast.pace.macs[0]
    clock.legs_ms = [macs * per_mac for macs in fast.pace.macs]
    whole = sum(clock.legs_ms)
    assert clock.exits(x, whole + 1e-6) == [0, 1, 2]
    fast = clock.fast = fast_of()[1]
    assert clock.exits(x, whole - 1e-6) == [0, 1], "before anything is known, MACs foretell"
    clock.exits(x, None)
    clock.legs_ms[2] = 1000.0
    clock.exits(x, None)
    clock.legs_ms[2] = whole - sum(clock.legs_ms[:2])
    assert clock.exits(x, whole + 1e-6) == [0, 1, 2], "the one slow run is outvoted by the call's own pace"


def test_stop_from_elsewhere_and_the_latest_answer() -> None:
    _, fast = fast_of()
    run = fast.anytime(images(3))
    assert run.latest is None
    first = next(run)
    run.stop()
    assert list(run) == [] and run.latest is first and first.exit_index == 0


def test_a_real_deadline_is_met_loosely() -> None:
    _, fast = fast_of()
    x = images(2)
    fast.calibrate(x)
    slow = Leg._advance

    def late(leg: Leg, state: Any) -> Any:
        time.sleep(0.05 if fast.legs.index(leg) == 2 else 0)
        return slow(leg, state)

    try:
        Leg._advance = late  # type: ignore[method-assign]
        fast.calibrate(x)
        start = time.perf_counter()
        answers = list(fast.anytime(x, deadline_ms=30))
        took = (time.perf_counter() - start) * 1e3
    finally:
        Leg._advance = slow  # type: ignore[method-assign]
    assert [one.exit_index for one in answers] == [0, 1] and took < 45, took


@pytest.mark.parametrize("shrink", [True, False, "auto"])
@pytest.mark.parametrize("rows", [1, 23])
def test_settled_rows_of_an_input_dependent_plan_keep_their_answer(shrink: Any, rows: int) -> None:
    net, x = classifier(), images(rows)
    wanted, exits = expected(net, SOME, x)
    with torch.no_grad():
        said = net.eval()(x)
    fast = net.deploy(plan(SOME), shrink=shrink)
    answers = list(fast.anytime(x))
    assert answers[-1].exits.tolist() == exits.tolist() and torch.allclose(answers[-1].output, wanted, atol=1e-6)
    for one in answers:
        at = exits.clamp(max=one.exit_index)
        assert one.exits.tolist() == at.tolist(), "the deepest exit so far, or where the row settled"
        assert torch.allclose(one.output, torch.stack(said, 1)[torch.arange(rows), at], atol=1e-6)
    assert len(answers) == int(exits.max()) + 1, "ends once all are settled"


def test_dense_and_budgeted_and_empty_and_nan() -> None:
    net, x = segmenter(), images(2, 16)
    fast = net.deploy(plan(Refuses(), setting="anytime", task="dense"))
    with torch.no_grad():
        said = net.eval()(x)
    assert all(torch.equal(a.output["out"], b) for a, b in zip(fast.anytime(x), said, strict=True))
    one = classifier().deploy(plan(Refuses(), ("one",), setting="budgeted"))
    assert [a.exit_index for a in one.anytime(images(2), deadline_ms=0)] == [0]
    assert [len(a.output) for a in fast_of()[1].anytime(images(0))] == [0, 0, 0]
    assert [len(a.output) for a in classifier().deploy(plan(SOME)).anytime(images(0))] == [0, 0, 0]
    with pytest.raises(OfframpError, match="deadline_ms"):
        fast_of()[1].anytime(images(1), deadline_ms=float("nan"))


def test_threads_refine_each_their_own() -> None:
    net, fast = fast_of()
    with torch.no_grad():
        wanted = {rows: net.eval()(images(rows)) for rows in (2, 5, 9)}
    faults: list[int] = []

    def work(rows: int) -> None:
        for _ in range(5):
            for one, said in zip(fast.anytime(images(rows)), wanted[rows], strict=True):
                if not torch.equal(one.output, said):
                    faults.append(rows)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_the_callers_mode_is_left_alone() -> None:
    for _ in fast_of()[1].anytime(images(2)):
        assert not torch.is_inference_mode_enabled()

"""Anytime: ever better answers, no leg that will not end in time, and the last answer where nobody asks for more."""

import math
import threading
import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from offramp.errors import OfframpError
from offramp.runtime import pace
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
        monkeypatch.setattr(pace, "now", lambda: self.ms)
        advance, clock = Leg._advance, self

        def spy(leg: Leg, state: Any, *stop: Any) -> Any:
            k = clock.fast.legs.index(leg)
            clock.ran.append(k)
            clock.ms += clock.legs_ms[k]
            return advance(leg, state, *stop)

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
    for deadline, wanted in ((60.01, [0, 1, 2]), (59.0, [0, 1]), (30.01, [0, 1]), (29.0, [0]), (10.0, [0]), (0.0, [0]),
                             (math.inf, [0, 1, 2]), (None, [0, 1, 2])):
        assert clock.exits(x, deadline) == wanted, deadline
        assert clock.ran == wanted, "what is not given is not run either"


def test_time_that_the_user_spends_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 10.0, 20.0, 30.0)
    clock.fast = fast_of()[1]
    clock.fast.calibrate(images(2))
    seen = []
    for one in clock.fast.anytime(images(2), deadline_ms=60.01):
        seen.append(one.exit_index)
        clock.ms += 1.0
    assert seen == [0, 1]


def test_a_first_call_goes_by_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fast_of()[1]
    clock = Clock(monkeypatch, 1000.0, 1000.0, 1000.0)
    clock.fast, x = fast, images(2)
    assert clock.exits(x, None) == [0, 1, 2]  # warms up; not kept
    clock.legs_ms = [macs * 10.0 / fast.macs[0] for macs in fast.macs]
    whole = sum(clock.legs_ms)
    assert clock.exits(x, whole - 1e-6) == [0, 1], "before anything is known, MACs foretell"
    assert clock.ran == [0, 1]
    assert clock.exits(x, whole + 1e-6) == [0, 1, 2]


def test_a_machine_that_is_slow_now_is_foretold_slow_and_quick_again_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 10.0, 20.0, 30.0)
    clock.fast, x = fast_of()[1], images(2)
    clock.fast.calibrate(x)
    clock.legs_ms = [20.0, 40.0, 60.0]
    for _ in range(3):
        assert clock.exits(x, None) == [0, 1, 2]
    assert clock.exits(x, 119.0) == [0, 1], "twice as slow from the start of this call"
    assert clock.exits(x, 120.01) == [0, 1, 2]
    clock.legs_ms = [10.0, 20.0, 30.0]
    assert clock.exits(x, 60.01) == [0, 1, 2], "the slow calls are not held against a quick one"


def test_an_impossible_deadline_gets_the_first_answer_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 10.0, 20.0, 30.0)
    fast = clock.fast = fast_of()[1]
    x = images(2)
    fast.calibrate(x)
    for deadline, late in ((9.0, True), (0, True), (10.01, False)):
        answer = fast.predict(x, deadline_ms=deadline)
        assert (answer.exit_index, answer.late, answer.elapsed_ms) == (0, late, pytest.approx(10.0))
    assert (fast.deadlines.calls, fast.deadlines.missed) == (3, 2)


def test_predict_is_the_last_answer_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 10.0, 20.0, 30.0)
    net, fast = fast_of()
    clock.fast, x = fast, images(3)
    with torch.no_grad():
        said = net.eval()(x)
    fast.calibrate(x)
    for deadline, wanted in ((35.0, 1), (65.0, 2), (None, 2), (12.0, 0)):
        answer = fast.predict(x, deadline_ms=deadline)
        assert answer.exit_index == wanted and torch.equal(answer.output, said[wanted]) and not answer.late
    calls = fast.deadlines.calls
    assert calls == 3 and fast.deadlines.missed == 0, "a call without a deadline keeps none"


def test_a_deeper_answer_that_comes_late_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 10.0, 20.0, 30.0)
    fast = clock.fast = fast_of()[1]
    x = images(2)
    fast.calibrate(x)
    monkeypatch.setattr(fast, "answer", lambda logits: setattr(clock, "ms", clock.ms + 3.0) or logits)
    assert fast.predict(x, deadline_ms=35.0).exit_index == 0, "13 + 20 + 3 ms, found out behind the last layer"
    assert (fast.deadlines.calls, fast.deadlines.missed) == (1, 1)


def test_confidence_is_the_mean_probability_of_what_was_said() -> None:
    net, fast = fast_of("dict")
    x = images(4)
    with torch.no_grad():
        said = net.eval()(x)
    for one, logits in zip(fast.anytime(x), said, strict=True):
        assert one.confidence == pytest.approx(float(logits.softmax(1).amax(1).mean()), rel=1e-6)
    pixels = segmenter()
    dense = pixels.deploy(plan(Refuses(), setting="anytime", task="dense"))
    with torch.no_grad():
        maps = pixels.eval()(images(2, 16))
    for one, logits in zip(dense.anytime(images(2, 16)), maps, strict=True):
        assert one.confidence == pytest.approx(float(logits.softmax(1).amax(1).mean()), rel=1e-6)


def test_confidence_is_of_the_rows_as_they_were_answered() -> None:
    net, x = classifier(), images(23)
    fast = net.deploy(plan(SOME))
    last = fast.predict(x)
    assert len(set(last.exits.tolist())) > 1
    assert last.confidence == pytest.approx(float(last.output.softmax(1).amax(1).mean()), rel=1e-6)
    assert math.isnan(fast.predict(images(0)).confidence)


def test_a_real_deadline_is_met_loosely() -> None:
    _, fast = fast_of()
    x = images(2)
    fast.calibrate(x)
    slow = Leg._advance

    def late(leg: Leg, state: Any, *stop: Any) -> Any:
        time.sleep(0.4 if fast.legs.index(leg) == 2 else 0)
        return slow(leg, state, *stop)

    try:
        Leg._advance = late  # type: ignore[method-assign]
        fast.calibrate(x)
        start = time.perf_counter()
        answers = list(fast.anytime(x, deadline_ms=200))
        took = (time.perf_counter() - start) * 1e3
    finally:
        Leg._advance = slow  # type: ignore[method-assign]
    assert answers[-1].exit_index < 2 and took < 400, took


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


def test_dense_and_budgeted_and_empty() -> None:
    net, x = segmenter(), images(2, 16)
    fast = net.deploy(plan(Refuses(), setting="anytime", task="dense"))
    with torch.no_grad():
        said = net.eval()(x)
    assert all(torch.equal(a.output["out"], b) for a, b in zip(fast.anytime(x), said, strict=True))
    one = classifier().deploy(plan(Refuses(), ("one",), setting="budgeted"))
    assert [a.exit_index for a in one.anytime(images(2), deadline_ms=0)] == [0]
    assert [len(a.output) for a in fast_of()[1].anytime(images(0))] == [0, 0, 0]
    assert [len(a.output) for a in classifier().deploy(plan(SOME)).anytime(images(0))] == [0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), -1, -0.5, True, "30", torch.tensor(30.0), 3j, [30]])
@pytest.mark.parametrize("way", ["anytime", "predict", "anytime_async"])
def test_what_is_no_deadline_is_refused_at_once(bad: Any, way: str) -> None:
    fast = fast_of()[1]
    with pytest.raises(OfframpError, match=rf"{way}\(\): expected deadline_ms as a number >= 0"):
        getattr(fast, way)(images(1), deadline_ms=bad)
    assert fast.deadlines.calls == 0


def test_numbers_of_any_kind_are_deadlines() -> None:
    fast = fast_of()[1]
    for good in (np.float32(1e6), np.int64(10**6), Fraction(10**6), 10**6, math.inf):
        assert fast.predict(images(1), deadline_ms=good).exit_index == 2


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

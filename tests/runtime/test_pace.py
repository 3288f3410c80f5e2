"""What is learnt of the clock, when work is given up, and how deadlines are counted."""

import math
import threading
import time

import pytest

from offramp.runtime import pace
from offramp.runtime.pace import Cancel, Deadlines, Pace, Watch
from offramp.types import Ahead

WORK = Ahead("second", 100.0, True)
WHOLE = WORK._replace(may_stop=False)


def learnt(*ratios: float, rate: float = 1.0) -> Pace:
    """A pace that has seen this work take so much longer than the calls' own pace before it."""
    made = Pace()
    made.note(WORK, 1e9, rate)  # traced; not kept
    for ratio in ratios:
        made.note(WORK, 100.0 * rate * ratio, rate)
    return made


def test_macs_foretell_until_something_is_known() -> None:
    assert Pace().expect(WORK, 0.5) == 50.0 and learnt().expect(WORK, 0.5) == 50.0


@pytest.mark.parametrize(("runs", "sure", "surest"), [(1, 1, 1), (10, 10, 10), (20, 19, 20), (40, 38, 40), (64, 61, 64),
                                                      (100, 97, 100)])
def test_it_is_a_high_quantile_of_the_last_64_runs(runs: int, sure: int, surest: int) -> None:
    made = learnt(*range(1, runs + 1))  # of more than 64 the first are forgotten
    assert made.expect(WORK, 1.0) == pytest.approx(100.0 * sure)
    assert made.expect(WHOLE, 1.0) == pytest.approx(100.0 * surest), "what cannot be given up is foretold more surely"


def test_it_scales_with_the_calls_own_pace_up_to_the_slowest_run() -> None:
    made = learnt(2.0, 2.0, 2.0, rate=1.0)
    made.note(WORK, 600.0, 3.0)  # a slow call: everything took thrice as long
    assert made.expect(WORK, 1.0) == pytest.approx(200.0), "the slow call was slow throughout"
    assert made.expect(WORK, 2.0) == pytest.approx(400.0)
    assert made.expect(WORK, 50.0) == pytest.approx(600.0), "a pause before it does not multiply"


def test_work_of_another_size_is_scaled() -> None:
    assert learnt(2.0).expect(WORK._replace(macs=10.0), 1.0) == pytest.approx(20.0)
    assert learnt(2.0).expect(Ahead("third", 10.0, True), 1.0) == 10.0, "another kind is not known"


def test_bad_luck_cannot_rule_work_out_for_good() -> None:
    made = learnt(*[1.0] * 10, 9.0)
    assert made.expect(WORK, 1.0) == pytest.approx(900.0)
    for _ in range(15):
        made.refuse(WORK)
    assert made.expect(WORK, 1.0) == pytest.approx(900.0)
    made.refuse(WORK)
    assert made.expect(WORK, 1.0) == pytest.approx(100.0)
    for _ in range(5):
        made.refuse(WORK)
    made.note(WORK, 500.0, 1.0)
    for _ in range(15):
        made.refuse(WORK)
    assert made.expect(WORK, 1.0) == pytest.approx(500.0), "a run in between starts the count anew"
    for _ in range(1000):
        made.refuse(WORK)
    assert made.expect(WORK, 1.0) == 100.0, "nothing is left but MACs"


class Ticks:
    """A clock that the test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ms = 0.0
        monkeypatch.setattr(pace, "now", lambda: self.ms)


def test_work_is_given_up_as_soon_as_even_its_quickest_rest_would_end_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, made = Ticks(monkeypatch), learnt(1.0, 2.0)
    watch = Watch(math.inf)
    watch.begin(False, [], 0.0)
    for at in (0.0, 25.0, 90.0):  # asked before layers that take 25, 65 and 10 of 100 ms
        clock.ms = at
        assert not watch()
    made.share(WORK, watch.shares(0.0, 100.0))
    rest, least = made.rest(WORK)
    assert rest == pytest.approx([1.0, 0.75, 0.1]) and least == pytest.approx(100.0)

    def asked(*times: float) -> list[bool]:
        watch = Watch(200.0)
        watch.begin(False, rest, least)
        said = []
        for clock.ms in times:
            said.append(watch())
        return said

    assert asked(100.0, 125.0, 190.0) == [False, False, False], "it can still arrive"
    assert asked(100.0, 126.0) == [False, True]
    assert asked(101.0) == [True]
    assert asked(50.0, 75.0, 191.0) == [False, False, True]
    assert asked(50.0, 75.0, 150.0, 199.0, 201.0)[3:] == [False, True], "beyond what is known, the deadline itself"


def test_shares_are_a_running_mean_and_start_anew_where_the_work_asks_otherwise() -> None:
    made = learnt(1.0)
    made.share(WORK, [1.0, 0.5])
    made.share(WORK, [1.0, 0.6])
    assert made.rest(WORK)[0] == pytest.approx([1.0, 0.51])
    made.share(WORK, [0.8])
    assert made.rest(WORK)[0] == [0.8]
    fresh = Pace()
    fresh.note(WORK, 5.0, 1.0)
    fresh.share(WORK, [0.3])
    fresh.note(WORK, 5.0, 1.0)
    assert fresh.rest(WORK) == ([], 5.0), "a run that traced or compiled says nothing of shares"


def test_the_first_answer_is_given_up_for_a_closed_watch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticks(monkeypatch)
    watch = Watch(10.0)
    watch.begin(True, [1.0] * 9, 1e9)
    clock.ms = 1e6
    watch.wish()
    assert not watch() and int(watch.flag) == 1
    watch.close()
    assert watch()


def test_native_code_hears_of_the_deadline_and_of_wishes() -> None:
    assert Watch(math.inf).due_ns is None
    watch = Watch(pace.now() + 5000.0)
    assert watch.due_ns is not None and watch.due_ns - time.monotonic_ns() == pytest.approx(5e9, rel=0.2)
    assert int(watch.flag) == 0
    watch.close()
    assert int(watch.flag) == 1


def test_one_handle_reaches_all_calls_before_and_after() -> None:
    cancel, watches = Cancel(), [Watch(math.inf) for _ in range(3)]
    for watch in watches[:2]:
        cancel.tell(watch)
    assert not cancel.is_set() and not watches[0].wished
    cancel.set()
    cancel.tell(watches[2])
    assert cancel.is_set() and all(watch.wished and int(watch.flag) for watch in watches)
    assert not any(watch.closed for watch in watches)


def test_a_handle_keeps_no_call_alive() -> None:
    cancel = Cancel()
    for _ in range(5):
        cancel.tell(Watch(math.inf))
    assert len(cancel._watches) == 0


def test_deadlines_are_counted_from_any_thread_and_start_anew() -> None:
    found = Deadlines()

    def count() -> None:
        for k in range(500):
            found.note(k % 5 == 0)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found.calls, found.missed) == (4000, 800) and repr(found) == "800 of 4000 missed"
    assert found.reset() == (4000, 800) and (found.calls, found.missed) == (0, 0)


def test_one_pace_serves_many_threads() -> None:
    made, faults = learnt(1.0, 1.0), []

    def work() -> None:
        try:
            for _ in range(300):
                made.note(WORK, 100.0, 1.0)
                made.share(WORK, [1.0, 0.5])
                made.refuse(WORK)
                if made.expect(WORK, 1.0) != 100.0 or made.rest(WORK)[0] != pytest.approx([1.0, 0.5]):
                    faults.append("wrong")
        except RuntimeError as error:  # a deque that changes while it is read
            faults.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults

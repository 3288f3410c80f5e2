"""Giving work up within a stage: for the clock, another thread, a cancelled task; and who else answers in steps."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offramp.errors import OfframpError
from offramp.runtime import Adaptive, Cancel, Deadlines, Refining, _stops, pace
from offramp.runtime.pace import Pace
from offramp.types import Ahead, Step, Stop
from runtime.nets import classifier, images, plan, segmenter
from runtime.test_anytime import fast_of
from runtime.test_budgeted import Refuses


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before, [thread.name for thread in threading.enumerate()]


def layer(fast: Any, name: str) -> nn.Module:
    return fast.body[0].get_submodule(name)  # type: ignore[no-any-return]


def before_(module: nn.Module, act: Callable[[], Any]) -> None:
    """Do something each time before a layer runs."""
    run = module.forward

    def forward(*args: Any) -> Any:
        act()
        return run(*args)

    module.forward = forward  # type: ignore[method-assign]


class Log(list[str]):
    """Which layers of the backbone ran."""

    def __init__(self, fast: Any) -> None:
        super().__init__()
        for name in ("one.0", "two.0", "three.0", "last"):
            before_(layer(fast, name), lambda name=name: self.append(name))


def test_a_leg_under_way_is_given_up_once_it_cannot_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"ms": 0.0, "three.0": 10.0}
    monkeypatch.setattr(pace, "now", lambda: clock["ms"])
    fast = fast_of()[1]

    def takes(name: str) -> None:
        clock["ms"] += clock.get(name, 10.0)

    ran = Log(fast)
    for name in ("one.0", "two.0", "three.0", "last"):
        before_(layer(fast, name), lambda name=name: takes(name))
    x = images(2)
    fast.calibrate(x)
    ran.clear()
    assert [one.exit_index for one in fast.anytime(x, deadline_ms=45.0)] == [0, 1, 2]
    assert ran == ["one.0", "two.0", "three.0", "last"]
    clock["three.0"] = 18.0
    ran.clear()
    answer = fast.predict(x, deadline_ms=45.0)
    assert answer.exit_index == 1 and not answer.late and ran == ["one.0", "two.0", "three.0"]
    assert fast.deadlines.missed == 0, "given up at 38 ms, as 10 more were due: the answer is there in time"
    clock["three.0"] = 14.0
    ran.clear()
    assert fast.predict(x, deadline_ms=45.0).exit_index == 2, "14 + 10 still fit"


def test_what_was_given_up_is_held_against_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"ms": 0.0, "three.0": 10.0}
    monkeypatch.setattr(pace, "now", lambda: clock["ms"])
    fast = fast_of()[1]
    ran = Log(fast)
    for name in ("one.0", "two.0", "three.0", "last"):
        before_(layer(fast, name), lambda name=name: clock.update(ms=clock["ms"] + clock.get(name, 10.0)))
    x = images(2)
    fast.calibrate(x)
    clock["three.0"] = 100.0
    for _ in range(3):
        assert fast.predict(x, deadline_ms=41.0).exit_index == 1
    ran.clear()
    assert fast.predict(x, deadline_ms=41.0).exit_index == 1
    assert ran == ["one.0", "two.0"], "it is not even begun any more"


@pytest.mark.parametrize("way", ["anytime", "predict", "async"])
def test_another_thread_stops_within_a_stage(way: str) -> None:
    net, fast = fast_of()
    x = images(3)
    with torch.no_grad():
        said = net.eval()(x)
    ran, cancel, inside, told = Log(fast), Cancel(), threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert told.wait(10)

    before_(layer(fast, "three.0"), wait)

    def other() -> None:
        assert inside.wait(10)
        cancel.set()
        told.set()

    thread = threading.Thread(target=other)
    thread.start()
    if way == "anytime":
        answers = list(fast.anytime(x, stop=cancel))
    elif way == "predict":
        answers = [fast.predict(x, stop=cancel)]
    else:
        async def collect() -> list[Any]:
            return [one async for one in fast.anytime_async(x, stop=cancel)]

        answers = asyncio.run(collect())
    thread.join()
    assert [one.exit_index for one in answers] == ([1] if way == "predict" else [0, 1])
    assert torch.equal(answers[-1].output, said[1])
    assert ran == ["one.0", "two.0", "three.0"], "the stage was left behind the layer under way"
    assert fast.deadlines.calls == 0


def test_stopped_before_it_begins_the_first_answer_comes_all_the_same() -> None:
    fast = fast_of()[1]
    ran, cancel = Log(fast), Cancel()
    cancel.set()
    assert fast.predict(images(2), stop=cancel).exit_index == 0 and ran == ["one.0"]
    assert [one.exit_index for one in fast.anytime(images(2), stop=cancel, deadline_ms=1e6)] == [0]
    run = fast.anytime(images(2))
    run.stop()
    assert [one.exit_index for one in run] == [0]


def test_closed_gives_no_answer_any_more() -> None:
    fast = fast_of()[1]
    ran = Log(fast)
    run = fast.anytime(images(2), deadline_ms=1e6)
    run.close()
    assert list(run) == [] and run.latest is None and ran == []
    run = fast.anytime(images(2), deadline_ms=1e6)
    before_(layer(fast, "one.0"), run.close)
    assert list(run) == [] and ran == ["one.0"], "before the first answer too"
    assert fast.deadlines.calls == 0


def test_a_stop_that_is_none_is_refused() -> None:
    with pytest.raises(OfframpError, match="stop as a Cancel"):
        fast_of()[1].predict(images(1), stop=True)


def test_a_compiled_leg_is_one_piece_and_a_budgeted_one_is_not() -> None:
    assert all(leg.asking is None for leg in fast_of(engine="compile")[1].legs)
    net = classifier()
    fast = net.deploy(plan(Refuses(), ("two",), setting="budgeted"))
    ran = Log(fast)
    run = fast.anytime(images(2))
    before_(layer(fast, "one.0"), run.close)
    assert list(run) == [] and ran == ["one.0"]
    fast = net.deploy(plan(Refuses(), ("two",), setting="budgeted"))
    with torch.no_grad():
        assert torch.equal(fast.predict(images(2)).output, net.eval()(images(2))[1])


def test_an_asking_stage_says_the_same_bit_for_bit_and_asks_before_each_layer() -> None:
    net, x = segmenter(), images(2, 16)
    fast = net.deploy(plan(Refuses(), setting="anytime", task="dense"))
    asked: list[int] = []

    def stop() -> bool:
        asked.append(0)
        return False

    plain, asking = fast.begin(x), fast.begin(x)
    with torch.inference_mode():
        for leg in fast.legs[:-1]:
            plain, said, _ = leg.run(plain)
            before = len(asked)
            asking, also, _ = leg.run(asking, stop)
            assert torch.equal(said, also) and len(asked) > before + 1, "in the head, too"
        before = len(asked)
        assert torch.equal(fast.legs[-1].only_stage(plain)["out"], fast.legs[-1].only_stage(asking, stop)["out"])
        assert len(asked) == before + 3  # two convolutions and a resize


def test_a_head_that_cannot_be_cut_open_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise OfframpError("no way in")

    monkeypatch.setattr(_stops, "Traced", refuse)
    net, fast = fast_of()
    with torch.no_grad():
        said = net.eval()(images(3))
    assert all(torch.equal(a.output, b) for a, b in zip(fast.anytime(images(3)), said, strict=True))
    assert fast.legs[0].asking_head is not None and fast.legs[0].asking_head._whole is None


# ---- at once ----------------------------------------------------------------------------------------------------


def test_two_networks_and_many_threads_each_obey_their_own_handle() -> None:
    nets = [fast_of(), fast_of("dict")]
    faults: list[str] = []

    def work(which: int, stopped: bool) -> None:
        net, fast = nets[which]
        for rows in (1, 4, 7):
            cancel = Cancel()
            if stopped:
                cancel.set()
            answers = list(fast.anytime(images(rows), stop=cancel, deadline_ms=1e6))
            wanted = [0] if stopped else [0, 1, 2]
            with torch.no_grad():
                said = net.backbone(images(rows)) if not stopped else None
            last = answers[-1].output
            if [one.exit_index for one in answers] != wanted or said is not None and not torch.equal(
                    last["out"] if which else last, said["out"] if which else said):
                faults.append(f"{which} {stopped} {rows}")

    for net, _ in nets:
        net.eval()
    threads = [threading.Thread(target=work, args=(which, stopped)) for which in (0, 1) for stopped in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert [fast.deadlines.calls for _, fast in nets] == [6, 6] and sum(fast.deadlines.missed for _, fast in nets) == 0


def test_misses_are_counted_once_a_call_and_by_whoever_missed() -> None:
    first, second = fast_of()[1], fast_of()[1]
    for _ in range(3):
        first.predict(images(1), deadline_ms=0)
    run = first.anytime(images(1), deadline_ms=0)
    assert next(run).late
    del run
    gc.collect()
    assert (first.deadlines.calls, first.deadlines.missed) == (4, 4) and second.deadlines.calls == 0
    assert "deadlines: 4 of 4 missed" in repr(first) and "deadlines" not in repr(second)
    assert first.deadlines.reset() == (4, 4) and "deadlines" not in repr(first)


# ---- asynchronous -----------------------------------------------------------------------------------------------


def test_asynchronous_answers_are_the_same_and_the_loop_stays_free() -> None:
    net, fast = fast_of()
    x = images(4)
    with torch.no_grad():
        said = net.eval()(x)
    before_(layer(fast, "three.0"), lambda: time.sleep(0.2))

    async def both() -> tuple[list[Any], int]:
        beats, done = 0, asyncio.Event()

        async def heart() -> None:
            nonlocal beats
            while not done.is_set():
                beats += 1
                await asyncio.sleep(0.005)

        beating = asyncio.create_task(heart())
        answers = [one async for one in fast.anytime_async(x)]
        done.set()
        await beating
        return answers, beats

    answers, beats = asyncio.run(both())
    assert [one.exit_index for one in answers] == [0, 1, 2] and beats >= 8
    assert all(torch.equal(one.output, wanted) for one, wanted in zip(answers, said, strict=True))


@pytest.mark.parametrize("held", ["one.0", "three.0"])
def test_a_cancelled_task_gives_the_work_up(held: str) -> None:
    fast = fast_of()[1]
    ran, inside, go_on = Log(fast), threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert go_on.wait(10)
        time.sleep(0.1)

    before_(layer(fast, held), wait)
    seen: list[int] = []

    async def listen() -> None:
        async for one in fast.anytime_async(images(2)):
            seen.append(one.exit_index)

    async def main() -> None:
        task = asyncio.create_task(listen())
        await asyncio.to_thread(inside.wait, 10)
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not [one for one in threading.enumerate() if one.name == "offramp-anytime"], "its thread has ended"

    asyncio.run(main())
    assert ran[-1] == held, "nothing ran behind the layer under way"
    assert seen == ([] if held == "one.0" else [0, 1])


def test_who_leaves_the_loop_early_leaves_no_work_behind() -> None:
    fast = fast_of()[1]
    ran, go_on = Log(fast), threading.Event()
    before_(layer(fast, "two.0"), lambda: go_on.wait(10))

    async def main() -> None:
        async for one in fast.anytime_async(images(2)):
            assert one.exit_index == 0
            break
        go_on.set()
        await asyncio.sleep(0.1)

    asyncio.run(main())
    assert "three.0" not in ran


def test_what_goes_wrong_in_the_thread_reaches_who_listens() -> None:
    fast = fast_of()[1]

    async def main() -> None:
        async for _ in fast.anytime_async(torch.zeros(2, 7, 12, 12)):
            raise AssertionError("no answer to that")

    with pytest.raises(OfframpError, match="channels"):
        asyncio.run(main())


def test_an_impossible_deadline_says_so_asynchronously_too() -> None:
    fast = fast_of()[1]

    async def main() -> list[tuple[int, bool]]:
        return [(one.exit_index, one.late) async for one in fast.anytime_async(images(2), deadline_ms=0)]

    assert asyncio.run(main()) == [(0, True)] and fast.deadlines.missed == 1


# ---- who else steps ---------------------------------------------------------------------------------------------


class Digits(Refining):
    """Answers with one more digit of the root of two each time; no network at all."""

    def __init__(self) -> None:
        self.pace, self.deadlines = Pace(), Deadlines()
        self.asked = 0

    def stepwise(self, call: Any, stop: Stop) -> Generator[Ahead | Step, None, None]:
        (x,), _ = call
        for k in range(4):
            yield Ahead(k, 10.0 ** k, True)
            for _ in range(10):
                self.asked += 1
                if stop():
                    return
            yield Step(torch.round(x.sqrt(), decimals=k), k, torch.full((len(x),), k))

    def sure(self, output: Tensor) -> Tensor:
        return torch.ones_like(output) / 2


def test_whatever_steps_keeps_deadlines() -> None:
    made, x = Digits(), torch.tensor([2.0])
    assert [round(float(one.output), 3) for one in made.anytime(x)] == [1.0, 1.4, 1.41, 1.414]
    assert made.predict(x).confidence == 0.5 and made.asked == 80
    late = made.predict(x, deadline_ms=0)
    assert late.late and late.exit_index == 0 and made.deadlines.missed == 1
    cancel = Cancel()
    cancel.set()
    assert made.predict(x, stop=cancel).exit_index == 0


def test_a_deployed_network_is_one_of_them() -> None:
    assert isinstance(fast_of()[1], Refining) and issubclass(Adaptive, nn.Module)

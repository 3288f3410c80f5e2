"""The timer: in turn, without the samples that waited."""

import time
from collections.abc import Iterator

import pytest
import torch

from offramp.cost import latency
from offramp.cost.latency import STEADY_ALLOCATOR, Timing, allocator, measure, quiet_share
from offramp.errors import OfframpError


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "_delays_ns", dict)


def test_callables_take_turns_and_each_starts_a_round(quiet: None) -> None:
    calls: list[str] = []
    times = measure({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert all(one.repeats == 3 and one.dropped == 0 and one.quiet for one in times.values())


def test_it_tells_slow_from_fast(quiet: None) -> None:
    times = measure({"slow": lambda: time.sleep(0.006), "fast": lambda: time.sleep(0.001)}, repeats=5)
    assert times["slow"].p50_ms > 5.9 and times["slow"].p95_ms >= times["slow"].p50_ms > times["fast"].p50_ms


def test_samples_whose_threads_waited_are_dropped_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = {"1": 0}
    readings: Iterator[int] = iter(range(10_000))

    def delays() -> dict[str, int]:
        if next(readings) % 6 == 1:  # at the end of every third sample
            waited["1"] += 10**9
        return dict(waited)

    monkeypatch.setattr(latency, "_delays_ns", delays)
    timing = measure({"a": lambda: None}, repeats=10, warmup=0)["a"]
    assert timing.repeats == 10 and timing.dropped == 5 and timing.quiet


def test_on_a_busy_machine_it_keeps_the_least_delayed_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = {"1": 0}

    def delays() -> dict[str, int]:
        waited["1"] += 10**9
        return dict(waited)

    monkeypatch.setattr(latency, "_delays_ns", delays)
    timing = measure({"a": lambda: None}, repeats=6, warmup=0)["a"]
    assert not timing.quiet and timing.repeats == 8 and timing.dropped == 16 and "busy" in str(timing)


def test_a_budget_ends_it_early(quiet: None) -> None:
    start = time.perf_counter()
    timing = measure({"a": lambda: time.sleep(0.02)}, repeats=1000, budget_s=0.2)["a"]
    assert 3 <= timing.repeats < 20 and time.perf_counter() - start < 2


def test_it_runs_in_inference_mode_and_a_failure_is_not_hidden() -> None:
    seen: list[bool] = []
    measure({"a": lambda: seen.append(torch.is_inference_mode_enabled())}, repeats=1)
    assert all(seen)
    with pytest.raises(ZeroDivisionError):
        measure({"a": lambda: 1 / 0}, repeats=1)
    with pytest.raises(OfframpError, match="callables"):
        measure({})


def test_quantiles() -> None:
    timing = Timing.of([float(i) for i in range(1, 101)])
    assert timing.p50_ms == 50.5 and timing.p95_ms == pytest.approx(95.05) and timing.spread_ms == pytest.approx(49.5)


def test_the_allocator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STEADY_ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert not allocator()["steady"]
    for name, value in STEADY_ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    assert allocator()["steady"] and allocator()["MALLOC_MMAP_MAX_"] == "0"


def test_the_same_program_starts_again_with_a_steady_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STEADY_ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    started: list[dict[str, str]] = []
    monkeypatch.setattr("os.execve", lambda program, arguments, environment: started.append(environment))
    latency.with_steady_allocator_()
    assert started and started[0].items() >= STEADY_ALLOCATOR.items()
    for name, value in STEADY_ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    latency.with_steady_allocator_()
    assert len(started) == 1, "once is enough"


def test_quiet_share_is_a_share() -> None:
    assert 0 <= quiet_share(0.02) <= 1

"""Anytime: ever better answers until a deadline (MESS, arXiv:2106.03527, 5.1 and 6.4; ADP-C, arXiv:2104.00749, 3.1).

:class:`Refining` gives ``anytime``, ``predict`` and ``anytime_async`` to whatever answers step by step
(``offramp.types.Stepwise``). Times are wall-clock milliseconds, from the call on.
"""

import asyncio
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from offramp.errors import OfframpError
from offramp.runtime import pace as clock
from offramp.runtime.pace import Cancel, Deadlines, Pace, Watch, deadline_of
from offramp.types import Ahead, Step, Stop

__all__ = ["Anytime", "Refined", "Refining"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Refined:
    """The best answer so far, for all rows of the call."""

    output: Any
    """Of the type and keys of the untouched network's output."""
    exit_index: int
    """The exit that spoke last, into the plan's exits; ``len(plan.exits)`` is the backbone."""
    exits: Tensor
    """The exit that each row's answer comes from (n,) int64."""
    elapsed_ms: float
    """Since the call."""
    late: bool
    """Whether it came after the deadline; only the first answer of a call can."""
    _sure: Callable[[Any], Tensor] = field(repr=False)

    @cached_property
    def confidence(self) -> float:
        """How sure the answer is of itself, in [0, 1]: the probability of the likeliest class, averaged over all rows
        and pixels; nan without rows. Computed when first asked for, so that nobody's deadline pays for it."""
        with torch.inference_mode():
            return float(self._sure(self.output).double().mean())


class Refining(ABC):
    """``anytime``, ``predict`` and ``anytime_async``, for a class that is ``offramp.types.Stepwise``.

    The first answer always comes, whatever the deadline: one that is impossible gets the first exit's answer, ``late``.
    Deeper work begins only where it should end in time by what earlier calls took
    (:class:`~offramp.runtime.pace.Pace`), and work that can be given up on its way is, as soon as it could not end in
    time any more. An answer that comes late all the same is dropped for the one before it.

    A ``stop``, a :class:`~offramp.runtime.pace.Cancel`, asks from another thread for what there is by now: work is
    given up at the next operation, or right behind the first answer where that had not come yet. Any number of threads
    may call at once, each with deadlines of its own.
    """

    pace: Pace
    """What is known of the clock."""
    deadlines: Deadlines
    """Calls with a deadline, and how many missed it: ``fast.deadlines.missed``, ``fast.deadlines.reset()``."""

    @abstractmethod
    def stepwise(self, call: Call, stop: Stop) -> Generator[Ahead | Step, None, None]:
        """As :class:`offramp.types.Stepwise` has it."""

    @abstractmethod
    def sure(self, output: Any) -> Tensor:
        """How sure an output is of each row or pixel, in [0, 1]."""

    def anytime(self, *args: Any, deadline_ms: float | None = None, stop: Cancel | None = None,
                **kwargs: Any) -> "Anytime":
        """Answers for all rows, each a :class:`Refined` and better than the one before, until the deadline.

        Nothing runs between the answers, and the time that whoever listens spends there counts. Without a deadline
        every exit speaks. OfframpError where the deadline is no number >= 0.
        """
        return Anytime(self, (args, kwargs), deadline_of(deadline_ms, "anytime()"), stop)

    def predict(self, *args: Any, deadline_ms: float | None = None, stop: Cancel | None = None,
                **kwargs: Any) -> Refined:
        """The last answer that arrived in time; the first exit's where none did. Without a deadline the best."""
        run = Anytime(self, (args, kwargs), deadline_of(deadline_ms, "predict()"), stop)
        for _ in run:
            pass
        assert run.latest is not None, "the first answer always comes"
        return run.latest

    def anytime_async(self, *args: Any, deadline_ms: float | None = None, stop: Cancel | None = None,
                      **kwargs: Any) -> AsyncGenerator[Refined, None]:
        """The same as an asynchronous iterator: ``async for answer in fast.anytime_async(x, deadline_ms=30)``.

        The work runs in a thread of this call's own, which waits for nobody who listens, so that the event loop stays
        free; the clock starts now. Where the iteration is left, its task is cancelled for one, work is given up at the
        next operation, before the first answer too, and the thread ends.
        """
        return _in_a_thread(Anytime(self, (args, kwargs), deadline_of(deadline_ms, "anytime_async()"), stop))


class Anytime(Iterator[Refined]):
    """Answers for all rows, each better than the one before; made by ``fast.anytime(x, deadline_ms=...)``.

    Any thread may read ``latest``, call ``stop()`` when a result is needed now, or ``close()`` when none is any more.
    """

    def __init__(self, fast: Refining, call: Call, deadline_ms: float | None, stop: Cancel | None = None) -> None:
        if not isinstance(stop, Cancel | None):
            raise OfframpError(expected="stop as a Cancel, or None", got=type(stop).__name__, where="anytime()",
                               todo="make one with offramp.runtime.Cancel().")
        self.latest: Refined | None = None
        """The best answer so far."""
        start = clock.now()
        self._watch = Watch(start + (math.inf if deadline_ms is None else deadline_ms))
        if stop is not None:
            stop.tell(self._watch)
        self._answers = self._refine(fast, call, start, deadline_ms is not None)

    def __next__(self) -> Refined:
        self.latest = next(self._answers)
        return self.latest

    def stop(self) -> None:
        """Take no further answer than the first: work under way is given up where it can be."""
        self._watch.wish()

    def close(self) -> None:
        """Give up at once, before the first answer too; no answer comes any more."""
        self._watch.close()

    def _refine(self, fast: Refining, call: Call, start: float, timed: bool) -> Iterator[Refined]:
        watch, pace, steps = self._watch, fast.pace, fast.stepwise(call, self._watch)
        spent, work, first, missed = 0.0, 0.0, True, False
        try:
            while isinstance(ahead := next(steps, None), Ahead):
                rate = spent / work if work else 0.0
                if watch.closed or not first and self._over(pace, ahead, rate):
                    return
                watch.begin(first, *pace.rest(ahead))
                began = clock.now()
                step = next(steps, None)
                ended = clock.now()
                missed = ended > watch.until
                if not isinstance(step, Step):  # given up
                    if not watch.wished:
                        pace.note(ahead, max(ended - began, watch.until - began), rate)
                    return
                pace.note(ahead, ended - began, rate)
                pace.share(ahead, watch.shares(began, ended))
                spent, work = spent + ended - began, work + ahead.macs
                if missed and not first or watch.closed:
                    return
                yield Refined(step.output, step.exit_index, step.exits, ended - start, missed, fast.sure)
                if missed:
                    return
                first = False
        finally:
            if timed and work:
                fast.deadlines.note(missed)
            steps.close()

    def _over(self, pace: Pace, ahead: Ahead, rate: float) -> bool:
        """Whether the next work is not to be begun."""
        if self._watch.wished:
            return True
        if clock.now() + pace.expect(ahead, rate) <= self._watch.until:
            return False
        pace.refuse(ahead)
        return True


async def _in_a_thread(run: Anytime) -> AsyncGenerator[Refined, None]:
    loop, said = asyncio.get_running_loop(), asyncio.Queue[Refined | BaseException | None]()
    ended = asyncio.Event()

    def tell(what: Refined | BaseException | None) -> None:
        try:
            loop.call_soon_threadsafe(said.put_nowait, what)
        except RuntimeError:  # nobody listens: the loop is closed
            run.close()

    def work() -> None:
        try:
            for answer in run:
                tell(answer)
            tell(None)
        except BaseException as error:
            tell(error)
        finally:
            try:
                loop.call_soon_threadsafe(ended.set)
            except RuntimeError:
                pass

    thread = threading.Thread(target=work, name="offramp-anytime", daemon=True)
    thread.start()
    try:
        while (what := await said.get()) is not None:
            if isinstance(what, BaseException):
                raise what
            yield what
    finally:
        run.close()
        await ended.wait()
        thread.join()  # it has nothing left to do

"""The deployed network: rows leave at the exits that a plan chose, and the rest of the batch goes on alone.

n rows of a call, m of them undecided, E exits (the plan's, then the backbone), K classes.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from offramp.errors import OfframpError, PlanError
from offramp.graph import State
from offramp.runtime._evidence import Gather
from offramp.runtime._legs import Build, Call, Engine, Leg, Legs
from offramp.runtime._output import Assembly, rows_of
from offramp.runtime._passing import Passing
from offramp.runtime._shrink import Crossover, Shrinker
from offramp.runtime._stepwise import stepwise
from offramp.runtime.anytime import Refining
from offramp.runtime.pace import Deadlines, Pace
from offramp.types import Ahead, Plan, Policy, Step, Stop

__all__ = ["Adaptive", "Answer", "Part"]


class Answer(NamedTuple):
    """Some rows' final answer."""

    rows: Tensor
    """Their places in the call (m,), int64."""
    output: Any
    """Of the type and keys of the untouched network's output, for these rows."""
    exit_index: int
    """Into the plan's exits; ``len(plan.exits)`` is the backbone."""


class Part(NamedTuple):
    """What runs of one width of a network of several."""

    width: float
    heads: tuple[str, ...]
    """Of its exits, the columns of the full width."""
    sizes: Mapping[str, Any]
    """Of "backbone" and each head, as ``nn.sizes.sizes_of`` has them."""
    stride: int
    """Of the maps that its end says."""


class _Piece(NamedTuple):
    rows: Tensor | None  # None: all rows of the call, in order
    picked: Tensor | None  # which rows of ``output`` they are; None: all
    output: Any
    exit_index: int


class Adaptive(Refining, nn.Module):
    """A network that takes as many stages as each input needs; made by :func:`deploy`.

    ``fast(x)`` answers as the untouched network would, in type, keys and order of rows. ``fast.stream(x)`` gives rows
    as soon as they are decided, ``fast.each(callback, x)`` calls back with them. ``fast.anytime(x, deadline_ms=30)``
    gives ever better answers for all of them, ``fast.predict(x, deadline_ms=30)`` the last of these in time. Any number
    of threads may call.

    What it does is the plan's ``setting``. "input_dependent": rows leave by the plan's policy. "budgeted": all end at
    the plan's one exit; deeper weights are gone. "anytime": ``fast(x)`` is the last answer, and earlier exits do not
    run; ``fast.anytime(x)`` gives them all.
    """

    parts: tuple[Part, ...] = ()
    """Of a network of several widths: those that run, in turn."""

    def __init__(self, legs: Legs, plan: Plan, *, answer: Callable[[Tensor], Any], gather: Gather,
                 shrink: bool | Literal["auto"], engine: Engine, macs: Sequence[int],
                 sure: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.plan, self.engine = plan, engine
        self.body = legs.module  # the copy of the guest and the chosen heads, for .parameters() and friends
        self._built, self._legs = legs, legs.legs
        self.answer = answer
        """Puts an exit's logits in the form of the network's output."""
        self.gather, self.macs = gather, tuple(macs)
        self.pace, self.deadlines, self._sure = Pace(), Deadlines(), sure
        self._silent_until = max((k for k, leg in enumerate(legs.legs) if leg.fresh is not None), default=0)
        self._shrinker = Shrinker(shrink, len(legs.legs))
        self._last = threading.local()
        self.training = False

    # ---- answering ----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The untouched network's output, each row from the exit where it left."""
        return self.each(None, *args, **kwargs)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Answer]:
        """Answers as soon as they exist, the earliest exit's first; every row comes once."""
        exits: list[tuple[Tensor | None, int]] = []
        pieces, count = self._pieces(args, kwargs)
        for piece in pieces:
            exits.append((piece.rows, piece.exit_index))
            yield _answer(piece, count)
        self._note(exits, count)

    def each(self, callback: Callable[[Answer], Any] | None, *args: Any, **kwargs: Any) -> Any:
        """Call back with each :class:`Answer` as soon as it exists; returns the whole output, as ``forward`` does."""
        exits: list[tuple[Tensor | None, int]] = []
        pieces, count = self._pieces(args, kwargs)
        whole = Assembly(count)
        for piece in pieces:
            if callback is not None:
                callback(_answer(piece, count))
            exits.append((piece.rows, piece.exit_index))
            whole.add(piece.rows, piece.picked, piece.output)
        self._note(exits, count)
        return whole.output()

    def stepwise(self, call: Call, stop: Stop) -> Generator[Ahead | Step, None, None]:
        """The exits' answers for all rows, one by one (``offramp.types.Stepwise``).

        Where the plan is input-dependent, rows that its policy settled keep their answer, and the answers end once all
        are settled. On a CPU a leg can be given up between its layers, unless it is compiled: then it is one.
        """
        return stepwise(self, call, stop)

    def sure(self, output: Any) -> Tensor:
        """The probability of the likeliest class, of each row (n,) or pixel (n, H, W)."""
        return self._sure(output)

    @property
    def shrink(self) -> bool | Literal["auto"]:
        """Whether the batch drops the rows that left, or a measured crossover says when."""
        return self._shrinker.mode

    @property
    def last_exits(self) -> Tensor:
        """Where each row of this thread's last finished call left (n,) int64; ``len(plan.exits)`` is the end."""
        found = getattr(self._last, "exits", None)
        if found is None:
            raise OfframpError(expected="a finished call in this thread", got="none yet", where="last_exits",
                               todo="call the network first, or drain its stream.")
        return _exits_of(*found)

    @torch.inference_mode()
    def calibrate(self, *args: Any, repeats: int = 7, **kwargs: Any) -> tuple[Crossover | None, ...]:
        """Measure on such inputs, of the batch size to come, at which stages shrinking pays; ``shrink="auto"`` obeys.

        Without it each stage is measured the first time that rows leave before it. For an "anytime" plan the legs are
        timed instead, ``repeats`` times, for the deadlines to come.
        """
        if self.plan.setting == "anytime":
            for _ in range(1 + repeats):  # the first is not kept
                deque(self.anytime(*args, **kwargs), maxlen=0)
            return self._shrinker.crossovers
        state: Any = self._built.begin(*args, **kwargs)
        for k, leg in enumerate(self._legs):
            if leg.fresh is not None:
                state = leg.fresh((args, kwargs), None)
            if k and self._legs[k - 1].may_shrink and state.rows > 1:
                self._shrinker.pays(k, state.rows, 1, state, leg.only_stage)
            state = leg.only_stage(state)
        return self._shrinker.crossovers

    def _pieces(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Iterator[_Piece], int]:
        with torch.inference_mode():
            state = self._built.begin(*args, **kwargs)
        return self._run(state, (args, kwargs)), state.rows

    def _run(self, state: State, call: Call) -> Iterator[_Piece]:
        turn = Passing(self.plan, state.rows)
        try:
            yield from self._steps(state, call, turn)
        finally:  # also where the caller stops listening, or an input is refused
            turn.end()

    def _steps(self, state: State, call: Call, turn: Passing) -> Iterator[_Piece]:
        rows: Tensor | None = None  # places in the call of the undecided rows; None: all of them, in order
        alive: Tensor | None = None  # their places in the state; None: the state holds no others
        parts: list[Any] = []  # what each exit so far said of them
        # Inference mode is left around each yield: it is a mode of the thread, and the caller's code runs there.
        first = self._silent_until if self.plan.setting == "anytime" else 0
        for k, leg in enumerate(self._legs[first:-1], first):
            with torch.inference_mode():
                if leg.fresh is not None:
                    state, alive = leg.fresh(call, rows), None
                if self.plan.setting == "anytime":
                    state = leg.only_stage(state)
                    continue
                state, logits, score = leg.run(state)
                if alive is not None:
                    logits, score = logits[alive], None if score is None else score[alive]
                leaves = self.ask(k, logits, score, parts, turn.policy)
                count = sum(leaves.tolist()) if len(leaves) <= 32 else int(leaves.sum())  # cheaper for a few
                turn.left(k, count)
                if count == 0:
                    continue
                output = self.answer(logits)
                if count == len(leaves):
                    picked, gone = None, rows
                else:
                    picked = leaves.nonzero().squeeze(1)
                    gone = picked if rows is None else rows[picked]
            yield _Piece(gone, picked, output, k)
            if picked is None:
                return
            del logits, score, output
            with torch.inference_mode():
                stay = (~leaves).nonzero().squeeze(1)
                parts[:] = [self.gather.keep(part, stay) for part in parts]
                rows = stay if rows is None else rows[stay]
                places = stay if alive is None else alive[stay]
                ahead = self._legs[k + 1]
                if leg.may_shrink and self._shrinker.pays(k + 1, state.rows, len(places), state, ahead.only_stage):
                    state, alive = state.select(places), None
                else:
                    alive = places
        with torch.inference_mode():
            if (fresh := self._legs[-1].fresh) is not None:
                state, alive = fresh(call, rows), None
            output = self._legs[-1].only_stage(state)
        turn.reached = len(self._legs) - 1
        yield _Piece(rows, alive, output, len(self._legs) - 1)

    def ask(self, k: int, logits: Tensor, score: Tensor | None, parts: list[Any], policy: Policy) -> Tensor:
        """Which of the undecided rows leave at exit k (m,) bool; ``parts`` is what earlier exits said of them."""
        gather, total = self.gather, len(logits)
        if total == 0:  # an empty call goes through to the end, where the network itself says what nothing looks like
            return torch.zeros(0, dtype=torch.bool)
        if score is None or gather.read_score is None:
            parts.append(gather.read(logits, k))
        else:
            parts.append(gather.read_score(score, k))
        leaves = policy.decide(k, gather.join(parts))
        if leaves.dtype != torch.bool or tuple(leaves.shape) != (total,):
            raise PlanError(expected=f"bool ({total},) from the policy", where=f"exit {self.plan.exits[k]!r}",
                            got=f"{leaves.dtype} {tuple(leaves.shape)}", todo="give one True or False a row.")
        return leaves

    def _note(self, exits: list[tuple[Tensor | None, int]], count: int) -> None:
        self._last.exits = (exits, count)

    # ---- looking inside ---------------------------------------------------------------------------------------------

    @property
    def build(self) -> Build:
        """How it was made: engine, type, layout."""
        return self._built.build

    @property
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments like those that the network was cut on, in the dtype that callers use."""
        wide = self._legs[0].wide

        def widen(leaf: Any) -> Any:
            return leaf.to(wide) if wide and isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(widen, self._built.traced.few)
        return found

    @property
    def legs(self) -> tuple[Leg, ...]:
        """The merged stages with their heads; one more than the plan has exits, or the one that a budget allows."""
        return self._legs

    def begin(self, *args: Any, **kwargs: Any) -> State:
        """The state before the first leg, for a call ``fast(*args, **kwargs)``."""
        return self._built.begin(*args, **kwargs)

    # ---- being a module -----------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "Adaptive":
        """A deployed network stays in eval mode; train the network that it came from."""
        return self

    def extra_repr(self) -> str:
        return (f"{self.plan.setting}, exits={list(self.plan.exits)}, engine={self.engine!r}, "
                f"shrink={self._shrinker.mode!r}" + (f", deadlines: {self.deadlines}" if self.deadlines.calls else ""))


def _answer(piece: _Piece, count: int) -> Answer:
    rows = torch.arange(count) if piece.rows is None else piece.rows
    return Answer(rows, rows_of(piece.output, piece.picked), piece.exit_index)


def _exits_of(exits: Sequence[tuple[Tensor | None, int]], count: int) -> Tensor:
    found = torch.zeros(count, dtype=torch.int64)
    for rows, index in exits:
        if rows is None:
            found[:] = index
        else:
            found[rows.cpu()] = index
    return found

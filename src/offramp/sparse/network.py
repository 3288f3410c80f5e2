"""A masked network that does what its masks leave it to do, with the answers of its dense simulation."""

import copy
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from offramp import _kernel
from offramp._kernel.ops import Conv, Level, Program
from offramp.errors import OfframpError
from offramp.functional.confidence import top
from offramp.graph import State
from offramp.graph._guest import flat
from offramp.nn._masked_layers import MaskedLayer
from offramp.nn.guest import fold_batch_norms_
from offramp.nn.masked import Masked, MaskedAnswers, Resizing, coarse_logits
from offramp.nn.output import form_of
from offramp.runtime._direct import direct
from offramp.runtime._legs import Build, Call, Engine, Legs
from offramp.runtime.anytime import Refining
from offramp.runtime.pace import Deadlines, Pace
from offramp.sparse._front import Front
from offramp.sparse._shelf import Shelf
from offramp.sparse._walk import Walk, enlarged, hand_over, onward
from offramp.sparse.crossover import Crossover, Stages, find, keep, kept, key_of
from offramp.sparse.lower import Lowered, Masking, lower
from offramp.sparse.plain import Plain, Runner
from offramp.sparse.triton import Triton, suits
from offramp.types import Ahead, Step, Stop

__all__ = ["Said", "Sparse", "deploy"]

@dataclass(frozen=True, eq=False)
class Said:
    """What an exit says of a batch."""

    exit: int
    coarse: Tensor
    """Its logits before they are resized, (N, K, h, w), with what was settled before."""
    mask: Tensor | None
    """Where the network goes on, bool (N, 1, h, w); None at its end."""
    resize: Resizing

    @cached_property
    def logits(self) -> Tensor:
        """(N, K, H, W), of the output's size."""
        with torch.inference_mode():
            return enlarged(self.coarse, self.resize)


class Sparse(Refining, nn.Module):
    """A masked network, run at active places alone; made by :func:`deploy`.

    ``fast(x)`` is the network's own output, in type and keys; ``fast.answers(x)`` what ``masked.answers(x)`` says;
    ``fast.steps(x)`` gives one exit after another; ``fast.anytime(x, deadline_ms=30)`` and ``fast.predict`` are those
    of every :class:`~offramp.runtime.Refining`, given up within a stage too. Any number of threads may call. The part
    up to the first exit runs at all places; after it images go one by one.
    """

    dense_above: float | Literal["measured"]
    """Share of active places above which a stage runs densely. What it computes at settled places is then real, not
    interpolated, so that its active places see better neighbours than the masked network's; settled logits stay.
    ``measured``: of each stage its own, as ``fast.measure`` found it; of sizes that were never measured none."""

    def __init__(self, masked: Masked, *, engine: Engine, dtype: torch.dtype | None,
                 runner: Callable[[Program], Runner], dense_above: float | Literal["measured"]) -> None:
        """masked: to keep."""
        super().__init__()
        self.dense_above, self.engine, self.dtype, self._make = dense_above, engine, dtype, runner
        self.pace, self.deadlines = Pace(), Deadlines()
        self._rigs: dict[nn.Module, tuple[str, bool]] = {
            layer: (layer._offramp_mask.key, layer._offramp_mask.says) for layer in masked.net.modules()
            if isinstance(layer, MaskedLayer)}
        net = masked.eval().unmask_()
        self.masked = masked  # its layers are plain ones now; it still says where the network goes on
        _fold_first_(masked)
        self.example = net.traced.example()  # of the type that the network has where it is built again
        build = Build(engine=engine, dtype=dtype, channels_last=True, fold=False)
        self._begins = Legs((), net.traced, build.convert_(net.backbone), build)
        self._heads = [build.convert_(net.head(net.columns[net.columns_at(k)[0]].name)) for k in range(len(net.sites))]
        self._stages = [stage.compiled(_compiled if engine == "compile" else direct) for stage in net.stages]
        self._answer = form_of(net.traced.output, net.logits(net.traced.output))
        self._shelf = Shelf(runner)
        on_kernel = engine == "eager" and runner in (_best, _on_kernel)
        self._front = Front(net, _suits_kernel, _everywhere) if on_kernel else None
        self._crossovers: dict[Any, Crossover] = {}  # by size, as programs are
        self.eval()

    def train(self, mode: bool = True) -> "Sparse":
        """A deployed network stays in eval mode; train the one that it came from."""
        return super().train(False)

    # ---- answering -------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output, at its end."""
        ends = [said for part in self._parts(args, kwargs) for said in self._walk(*part) if said.mask is None]
        return self._answer(torch.cat([said.logits for said in ends]))

    def answers(self, *args: Any, **kwargs: Any) -> MaskedAnswers:
        """What every exit says, and its masks."""
        exits = list(zip(*(list(self._walk(*part)) for part in self._parts(args, kwargs)), strict=True))
        return MaskedAnswers([torch.cat([said.logits for said in one]) for one in exits],
                             [torch.cat([said.mask for said in one if said.mask is not None]) for one in exits[:-1]])

    def steps(self, *args: Any, stop: Stop | None = None, **kwargs: Any) -> Iterator[Said]:
        """Each exit as soon as it has spoken, for the whole batch; the last is the network's end.

        stop: ends the steps, also between two operations of a stage, but not before the first exit has spoken.
        """
        return self._walk(*self._first(args, kwargs), stop)

    def stepwise(self, call: Call, stop: Stop) -> Generator[Ahead | Step, None, None]:
        """Work and answers in turn, as :class:`offramp.types.Stepwise` has them."""
        inputs = [leaf for leaf in flat(call)[0] if isinstance(leaf, Tensor)]
        kind = tuple((tuple(x.shape), x.dtype, x.device) for x in inputs)
        example = [leaf for leaf in flat(self.masked.net.traced.few)[0] if isinstance(leaf, Tensor)]
        share = inputs[0].numel() / max(1, math.prod(example[0].shape[1:]))  # of the example's, with all rows
        yield Ahead((0, kind), max(1.0, self.masked.net.sites[0].macs_before * share), False)
        if stop():
            return
        for said in self._announced(*self._first(*call), stop):
            if isinstance(said, tuple):
                yield Ahead((said[0], kind), max(1, said[1]), said[2])
                continue
            with torch.inference_mode():
                output = self._answer(said.logits)
            if said.coarse.is_cuda:
                torch.cuda.synchronize(said.coarse.device)
            yield Step(output, said.exit, torch.full((len(said.coarse),), said.exit))

    def measure(self, *args: Any, budget_s: float = 10.0, again: bool = False, **kwargs: Any) -> Crossover:
        """From which share of active places on each stage is faster densely, for inputs of this size, one at a time.

        Read from the user's cache folder where this machine has measured such a program under these settings before,
        and not ``again``; else timed for about ``budget_s`` under made masks, bands along edges and blobs, and written
        there. Calls obey it where ``dense_above`` is "measured". No call but this, and ``deploy`` for the example's
        size, ever measures.
        """
        state, coarse, _ = self._first(args, kwargs)
        if len(coarse) > 1:
            state, coarse = state.select(torch.tensor([0], device=coarse.device)), coarse[:1]
        with self._lent(state, coarse) as (lowered, lend):
            runner = lend()
            how = {"engine": self.engine, "runner": type(runner).__name__, "dtype": self.dtype,
                   "isa": _kernel.isa(self.dtype or torch.float32)}
            key = key_of(lowered.program, **how)
            found = None if again else kept(key)
            if found is None:
                found = find(self._both_ways(state, coarse, lowered, runner), budget_s=budget_s)
                if found.quiet:
                    keep(key, found, how)
            self._crossovers[_size_of(state, coarse)] = found
        return found

    def sure(self, output: Any) -> Tensor:
        """The probability of the likeliest class, of each pixel (n, H, W)."""
        return top(self.masked.net.logits(output))

    # ---- on the way ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _first(self, args: Any, kwargs: Any) -> tuple[State, Tensor, Resizing]:
        state = self._begins.begin(*args, **kwargs)
        found = None if self._front is None else self._front(state)
        if found is not None:
            return found[0], self._wide(found[1]), found[2]
        state = self._stages[0](state)
        return state, *self._said(self._heads[0], state)

    def _said(self, head: nn.Module, state: State) -> tuple[Tensor, Resizing]:
        coarse, resize = coarse_logits(head, state.tensors)
        return self._wide(coarse), resize

    def _wide(self, logits: Tensor) -> Tensor:
        """Logits in float32, where the network is narrower: what is sure is read off them."""
        return logits if self.dtype is None else logits.to(torch.promote_types(self.dtype, torch.float32))

    def _parts(self, args: Any, kwargs: Any) -> Iterator[tuple[State, Tensor, Resizing]]:
        """Image by image, so that one runner serves them all; together where what one is asked hangs on the others."""
        state, coarse, resize = self._first(args, kwargs)
        if len(coarse) == 1 or state.why_not or self.masked.confidence == "random":
            yield state, coarse, resize
            return
        for n in range(len(coarse)):
            yield state.select(torch.tensor([n], device=coarse.device)), coarse[n : n + 1], resize

    def _walk(self, state: State, coarse: Tensor, resize: Resizing, stop: Stop | None = None) -> Iterator[Said]:
        return (said for said in self._announced(state, coarse, resize, stop) if isinstance(said, Said))

    def _announced(
        self, state: State, coarse: Tensor, resize: Resizing, stop: Stop | None = None
    ) -> Iterator[Said | tuple[int, int, bool]]:
        """What each exit says; before each but the first its number, its MACs, and whether it may be stopped within."""
        with torch.inference_mode():
            said = Said(0, coarse, onward(self.masked, coarse, 0, None), resize)
        yield said
        with self._lent(state, coarse) as (lowered, lend):
            walk = Walk(lowered, lend, self._dense, state, self._above(state, coarse))
            for k, again in enumerate(lowered.resizes, 1):
                last = k == len(self._heads)
                assert said.mask is not None
                macs = walk.prepare(k, said.mask)
                yield k, macs, not walk.rows
                found = walk.run(k, said.logits if last and lowered.end is None else said.coarse, stop)
                if found is None:
                    return
                with torch.inference_mode():
                    mask = None if last else onward(self.masked, found, k, said.mask)
                    said = Said(k, found, mask, again)
                yield said

    @contextmanager
    def _lent(self, state: State, coarse: Tensor) -> Iterator[tuple[Lowered, Callable[[], Runner]]]:
        """The program of these inputs, and a function that lends one runner of it after another."""
        def lowered() -> Lowered:
            masking = {layer: Masking(float(self.masked.lams[lam].detach()), says)
                       for layer, (lam, says) in self._rigs.items()}
            with torch.inference_mode(False), torch.no_grad():
                return lower(self.masked.net, masking, state, Level(*coarse.shape[2:]))

        with self._shelf.lent(_size_of(state, coarse), lowered) as found:
            yield found

    def _above(self, state: State, coarse: Tensor) -> Sequence[float]:
        """Of each stage after the first exit."""
        if self.dense_above != "measured":
            return (self.dense_above,) * len(self._heads)
        found = self._crossovers.get(_size_of(state, coarse))
        return (1.0,) * len(self._heads) if found is None else found.above

    @torch.inference_mode()
    def _both_ways(self, state: State | None, coarse: Tensor, lowered: Lowered, runner: Runner) -> Stages:
        """Each stage on all places and under a mask, with what it takes to go over to that."""
        found: list[tuple[Callable[[], Any], Callable[[Tensor], Any], tuple[int, int]]] = []
        size = (coarse.shape[2], coarse.shape[3])
        for k, at in enumerate(lowered.logits, 1):
            assert state is not None
            after, said = self._dense(k, state, lowered.end)
            out = said[0].clone(memory_format=torch.preserve_format)

            def under(mask: Tensor, k: int = k, at: int = at, state: State = state, out: Tensor = out) -> None:
                mask = mask.to(out.device)
                hand_over(lowered, runner, k, state, 0, mask)
                runner.run(k - 1)
                runner.read_active(at, out)
                if out.is_cuda:
                    torch.cuda.synchronize(out.device)

            def densely(k: int = k, state: State = state, out: Tensor = out) -> None:
                self._dense(k, state, lowered.end)
                if out.is_cuda:
                    torch.cuda.synchronize(out.device)

            found.append((densely, under, size))
            state = after
        return found

    def _dense(self, k: int, state: State, end: fx.GraphModule | None) -> tuple[State | None, Tensor]:
        """Stage k on all places: the state after it, and its exit's logits as they are carried over."""
        if k < len(self._heads):
            after = self._stages[k](state)
            return after, self._said(self._heads[k], after)[0]
        if end is None:
            return None, self._wide(self.masked.net.logits(self._stages[k](state)))
        return None, self._wide(end(*state.tensors, *state.carried, *state.values))


def deploy(
    masked: Masked, *, engine: Engine = "eager", dtype: torch.dtype | None = None,
    runner: Literal["auto", "kernel", "triton", "plain"] = "auto",
    dense_above: float | Literal["measured"] = 1.0,
) -> Sparse:
    """Make a module that runs a masked network at its active places alone; also ``masked.deploy()``.

    The network it comes from is left as it is and may go on training; weights are copied as they are now. Answers are
    those of ``masked`` up to rounding.

    engine: "compile" gives what runs densely to ``torch.compile`` with frozen weights. With "eager" the part up to the
        first exit runs on the compiled kernel too, image by image, where that is in use and has all its operations.
    dtype: float32 or bfloat16, of weights and inputs, before the first exit and after it; logits are float32 then.
    runner: "kernel" is the compiled one, for float32 and bfloat16 on the CPU; "triton" is for CUDA devices, where
        Triton is installed; "plain" runs everywhere, by PyTorch alone, and is slower than no mask where much is active.
        "auto" takes one of the first two where it can.
    dense_above: share of active places above which an image runs densely (:attr:`Sparse.dense_above`); at 1, never,
        and answers are the same on all machines. "measured": where this machine is faster so, by stage; that is
        measured here for inputs of the example's size, for up to ten seconds, once a machine (:meth:`Sparse.measure`).

    OfframpError where ``masked`` has a reach of its own, or is switched off; at the first call of a size, where a layer
    after the first exit cannot run so, with all of these.
    """
    where = "deploy()"
    if not isinstance(masked, Masked) or not masked.enabled or masked.reach != "everywhere":
        got = type(masked).__name__ if not isinstance(masked, Masked) else (
            f"reach {masked.reach!r}" if masked.enabled else "one that is switched off")
        raise OfframpError(expected="a network that mask_ made, enabled, of reach 'everywhere'", got=got, where=where)
    if engine not in ("eager", "compile") or runner not in ("auto", "kernel", "triton", "plain"):
        raise OfframpError(expected="engine 'eager' or 'compile', and runner 'auto', 'kernel', 'triton' or 'plain'",
                           got=f"{engine!r} and {runner!r}", where=where)
    make: dict[str, Callable[[Program], Runner]] = {
        "auto": _best, "kernel": _on_kernel, "triton": _on_triton, "plain": Plain}
    fast = Sparse(copy.deepcopy(masked), engine=engine, dtype=dtype, runner=make[runner], dense_above=dense_above)
    if dense_above == "measured":
        args, kwargs = masked.net.traced.example()
        fast.measure(*args, **kwargs)
    return fast


def _size_of(state: State, coarse: Tensor) -> Any:
    """Equal where one program serves."""
    return (state.program, tuple(t.shape[1:] for t in (*state.tensors, *state.carried)),
            tuple(map(repr, state.values)), coarse.shape[2:])


def _best(program: Program) -> Runner:
    """The kernel or Triton's where they can."""
    if _suits_kernel(program):
        return _on_kernel(program)
    return Triton(program) if suits(program) else Plain(program)


def _suits_kernel(program: Program) -> bool:
    held = _held(program)
    known = len(held) == 1 and held <= {(torch.float32, "cpu"), (torch.bfloat16, "cpu")}
    return known and _kernel.available() and not _kernel.faults(program)


def _on_kernel(program: Program, *, everywhere: bool = False) -> _kernel.Kernel:
    narrow = _held(program) == {(torch.bfloat16, "cpu")}
    return _kernel.Kernel(program, dtype=torch.bfloat16 if narrow else torch.float32, everywhere=everywhere)


def _everywhere(program: Program) -> _kernel.Kernel:
    return _on_kernel(program, everywhere=True)


def _held(program: Program) -> set[tuple[torch.dtype, str]]:
    """The types of its convolutions' weights, and where these are."""
    return {(op.weight.dtype, op.weight.device.type)
            for part in program.segments for op in part.ops if isinstance(op, Conv)}


def _on_triton(program: Program) -> Runner:
    if not suits(program):
        raise OfframpError(expected="float32, bfloat16 or float16 on a CUDA device, and Triton installed",
                           got="a program that is otherwise", where="deploy(runner='triton')", todo="runner='auto'")
    return Triton(program)


def _fold_first_(masked: Masked) -> None:
    """Norms into convolutions, in what runs before the first exit and nowhere else."""
    first, *rest = (stage.module().graph for stage in masked.net.stages)
    later = {node.target for graph in rest for node in graph.nodes if node.op == "call_module"}
    if later.isdisjoint(node.target for node in first.nodes):
        fold_batch_norms_(masked.net.backbone, first, "guest.")


def _compiled(module: fx.GraphModule) -> Any:
    return torch.compile(module, options={"freezing": True})

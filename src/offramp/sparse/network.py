"""A masked network that does what its masks leave it to do, with the answers of its dense simulation."""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from offramp._kernel.ops import Level, Program
from offramp.errors import OfframpError
from offramp.graph import State
from offramp.nn._masked_layers import MaskedLayer
from offramp.nn.guest import fold_batch_norms_
from offramp.nn.masked import Masked, MaskedAnswers, coarse_logits
from offramp.nn.output import form_of
from offramp.sparse._walk import Walk, resized
from offramp.sparse.lower import Lowered, Masking, Resizing, lower
from offramp.sparse.plain import Plain, Runner

__all__ = ["Said", "Sparse", "deploy"]

_SIZES = 4  # of inputs, whose programs are kept
_IDLE = 2  # runners of each that wait for a call


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
            return self.resize(self.coarse)


class Sparse(nn.Module):
    """A masked network, run at active places alone; made by :func:`deploy`.

    ``fast(x)`` is the network's own output, in type and keys; ``fast.answers(x)`` what ``masked.answers(x)`` says;
    ``fast.steps(x)`` gives one exit after another. Any number of threads may call. The part up to the first exit runs
    densely, for the whole batch; after it images go one by one.
    """

    dense_above: float
    """Share of active places above which a stage runs densely. What it computes at settled places is then real, not
    interpolated, so that its active places see better neighbours than the masked network's; settled logits stay."""

    def __init__(self, masked: Masked, *, engine: Literal["eager", "compile"], runner: Callable[[Program], Runner],
                 dense_above: float) -> None:
        super().__init__()
        self.dense_above, self.engine = dense_above, engine
        rigs = {layer: layer._offramp_mask for layer in masked.net.modules() if isinstance(layer, MaskedLayer)}
        self._masking: dict[nn.Module, Masking] = {
            layer: Masking(float(masked.lams[rig.key]), rig.says) for layer, rig in rigs.items()}
        masked.unmask_()
        self.masked = masked  # its layers are plain ones now; it still says where the network goes on
        self._fold_first()
        masked.to(memory_format=torch.channels_last)
        self._stages = [stage.compiled(_compiled) if engine == "compile" else stage for stage in masked.net.stages]
        self._heads = [masked.net.head(masked.net.columns[masked.net.columns_at(k)[0]].name)
                       for k in range(len(masked.net.sites))]
        self._answer = form_of(masked.net.traced.output, masked.net.logits(masked.net.traced.output))
        self._make = runner
        self._programs: OrderedDict[Any, tuple[Lowered, list[Runner]]] = OrderedDict()
        self._lock = threading.RLock()
        self.eval()

    def train(self, mode: bool = True) -> "Sparse":
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output, at its end."""
        ends = [said for part in self._parts(args, kwargs) for said in self._walk(*part) if said.mask is None]
        return self._answer(torch.cat([said.logits for said in ends]))

    def answers(self, *args: Any, **kwargs: Any) -> MaskedAnswers:
        """What every exit says, and its masks."""
        parts = [list(self._walk(*part)) for part in self._parts(args, kwargs)]
        exits = list(zip(*parts, strict=True))
        return MaskedAnswers([torch.cat([said.logits for said in one]) for one in exits],
                             [torch.cat([said.mask for said in one if said.mask is not None]) for one in exits[:-1]])

    def steps(self, *args: Any, stop: Tensor | None = None, deadline_ns: int | None = None, **kwargs: Any
              ) -> Iterator[Said]:
        """Each exit as soon as it has spoken, for the whole batch; the last is the network's end.

        stop: one int32 that another thread may set, deadline_ns: of ``time.monotonic_ns()``; either ends the steps,
        also between two operations of a stage, but never before the first exit has spoken.
        """
        state, coarse, resize = self._first(args, kwargs)
        yield from self._walk(state, coarse, resize, stop, deadline_ns)

    # ---- the dense part --------------------------------------------------------------------------------------------

    def _fold_first(self) -> None:
        """Norms into convolutions, in what runs before the first exit and nowhere else."""
        net = self.masked.net
        first, *rest = (stage.module().graph for stage in net.stages)
        later = {node.target for graph in rest for node in graph.nodes if node.op == "call_module"}
        if later.isdisjoint(node.target for node in first.nodes):
            fold_batch_norms_(net.backbone, first, "guest.")

    @torch.inference_mode()
    def _first(self, args: Any, kwargs: Any) -> tuple[State, Tensor, Resizing]:
        def lay(leaf: Any) -> Any:
            is_map = isinstance(leaf, Tensor) and leaf.ndim == 4
            return leaf.contiguous(memory_format=torch.channels_last) if is_map else leaf

        state = self._stages[0](self.masked.net.begin(*map(lay, args), **{k: lay(v) for k, v in kwargs.items()}))
        return state, *coarse_logits(self._heads[0], state.tensors)

    def _parts(self, args: Any, kwargs: Any) -> Iterator[tuple[State, Tensor, Resizing]]:
        """Image by image, so that one runner serves them all; together where what one is asked hangs on the others."""
        state, coarse, resize = self._first(args, kwargs)
        if len(coarse) == 1 or state.why_not or self.masked.confidence == "random":
            yield state, coarse, resize
            return
        for n in range(len(coarse)):
            yield state.select(torch.tensor([n], device=coarse.device)), coarse[n : n + 1], resize

    # ---- the rest --------------------------------------------------------------------------------------------------

    def _walk(self, state: State, coarse: Tensor, resize: Resizing, stop: Tensor | None = None,
              deadline_ns: int | None = None) -> Iterator[Said]:
        with torch.inference_mode():
            said = Said(0, coarse, self.masked.goes_on(coarse, 0), resize)
        yield said
        with self._lent(state, coarse) as (lowered, lend):
            walk = Walk(lowered, lend, self._dense, state, self.dense_above)
            for k, again in enumerate(lowered.resizes, 1):
                last = k == len(self._heads)
                carried = said.logits if last and lowered.end is None else said.coarse
                assert said.mask is not None
                found = walk.go_on(k, said.mask, carried, stop, deadline_ns)
                if found is None:
                    return
                with torch.inference_mode():
                    said = Said(k, found, None if last else self.masked.goes_on(found, k) & resized(
                        said.mask, found.shape[2:]), again)
                yield said

    @contextmanager
    def _lent(self, state: State, coarse: Tensor) -> Iterator[tuple[Lowered, Callable[[], Runner]]]:
        """The program of these inputs, and a function that lends one runner of it after another."""
        key = (state.program, tuple(t.shape[1:] for t in (*state.tensors, *state.carried)),
               tuple(map(repr, state.values)), coarse.shape[2:])
        with self._lock:
            if key not in self._programs:
                with torch.inference_mode(False), torch.no_grad():
                    self._programs[key] = lower(self.masked.net, self._masking, state, Level(*coarse.shape[2:])), []
            self._programs.move_to_end(key)
            while len(self._programs) > _SIZES:
                self._programs.popitem(last=False)
            lowered, idle = self._programs[key]
        lent: list[Runner] = []

        def lend() -> Runner:
            with self._lock:
                lent.append(idle.pop() if idle else self._make(lowered.program))
            return lent[-1]

        try:
            yield lowered, lend
        finally:
            with self._lock:
                idle += lent[: max(0, _IDLE - len(idle))]

    def _dense(self, k: int, state: State, end: fx.GraphModule | None) -> tuple[State | None, Tensor]:
        """Stage k on all places: the state after it, and its exit's logits as they are carried over."""
        if k < len(self._heads):
            after = self._stages[k](state)
            return after, coarse_logits(self._heads[k], after.tensors)[0]
        if end is None:
            return None, self.masked.net.logits(self._stages[k](state))
        return None, end(*state.tensors, *state.carried, *state.values)


def deploy(
    masked: Masked, *, engine: Literal["eager", "compile"] = "eager",
    runner: Literal["auto", "kernel", "plain"] = "auto", dense_above: float = 1.0,
) -> Sparse:
    """Make a module that runs a masked network at its active places alone; also ``masked.deploy()``.

    The network it comes from is left as it is and may go on training; weights are copied as they are now. Answers are
    those of ``masked`` up to rounding.

    engine: "compile" gives what runs densely to ``torch.compile`` with frozen weights.
    runner: "kernel" is the compiled one, for float32 on the CPU; "plain" runs everywhere, by PyTorch alone, and is
        slower than no mask where much is active. "auto" takes the kernel where it can.
    dense_above: share of active places above which an image runs densely (:attr:`Sparse.dense_above`); at 1, never.

    OfframpError where ``masked`` has a reach of its own, or is switched off; at the first call of a size, where a layer
    after the first exit cannot run so, with all of these.
    """
    where = "deploy()"
    if not isinstance(masked, Masked) or not masked.enabled or masked.reach != "everywhere":
        got = type(masked).__name__ if not isinstance(masked, Masked) else (
            f"reach {masked.reach!r}" if masked.enabled else "one that is switched off")
        raise OfframpError(expected="a network that mask_ made, enabled, of reach 'everywhere'", got=got, where=where)
    if engine not in ("eager", "compile") or runner not in ("auto", "kernel", "plain"):
        raise OfframpError(expected="engine 'eager' or 'compile', and runner 'auto', 'kernel' or 'plain'",
                           got=f"{engine!r} and {runner!r}", where=where)
    return Sparse(copy.deepcopy(masked), engine=engine, runner=Plain, dense_above=dense_above)


def _compiled(module: fx.GraphModule) -> Any:
    return torch.compile(module, options={"freezing": True})

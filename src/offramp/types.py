"""Values that the rooms hand to each other, and the Protocols that a stranger may implement.

Axes, here and everywhere: N samples, E exits, K classes, C channels, H W space, T tokens, B histogram bins.
A suffix names the axes of a tensor: ``logits_NEK`` is (N, E, K); a small ``n`` is the rows still undecided.
"""

from collections.abc import Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

__all__ = [
    "Ahead", "Calibrator", "Confidence", "Decision", "Evidence", "ExitColumn", "ExitSite", "Head", "LiveTensor", "Plan",
    "Policy", "Setting", "Step", "Stepwise", "Stop", "Task",
]

Task = Literal["classify", "dense"]
Setting = Literal["budgeted", "anytime", "input_dependent"]

HISTOGRAM_BINS = 1024
CONFIDENCES = ("top", "margin", "entropy")
EDGED = ("top_edges", "entropy_edges")
"""Dense: the same, where pixels around semantic edges take their window's median (MESS, Eqs. 8-9)."""


@dataclass(frozen=True, kw_only=True)
class LiveTensor:
    """One tensor of a frontier: what the rest of the network still needs at a cut."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))}"


@dataclass(frozen=True, kw_only=True)
class ExitSite:
    """A place where a small frontier of live tensors determines everything after it."""

    name: str
    """Dotted name of the module whose output closes the cut, as in ``model.get_submodule(name)``; a second pass
    through a reused module adds ``#1``, ``#2`` ..."""
    live: tuple[LiveTensor, ...]
    macs_before: int
    """Per sample, from the input to here."""
    macs_after: int
    """Per sample, from here to the output."""
    param_bytes_before: int
    shrinkable: bool
    """Whether rows of the batch may be dropped here; proved on real inputs."""
    why_not: str = ""
    """When not shrinkable: the op, its file and line, and the reason."""
    is_block: bool = True
    """Whether this closes a block (a repeated unit of the network), the default places for exits."""


@dataclass(frozen=True, kw_only=True)
class ExitColumn:
    """One exit of a table: a head at a site. The last column of a table is always the backbone itself."""

    name: str
    """The site's name; ``site/head`` where the site carries several candidate heads; ``final`` for the backbone. Of a
    narrower network with its width behind: ``site@0.5``, ``final@0.5``."""
    site: str
    head: str = ""
    stride: int = 1
    """Dense: output pixels per step of the map that the head reads; semantic edges are as thick (MESS, Eq. 8)."""
    width: float = 1.0
    """At which share of its channels the network ran. Columns of one width share their work; those of another start
    again from the input."""


@dataclass(frozen=True)
class Evidence:
    """What this and the earlier exits said about the n rows still undecided: all that a policy may see, never a label.

    The second axis, j <= E, runs over the exits passed so far; index -1 is the exit that asks.
    """

    logits: Tensor | None = None
    """Classification: (n, j, K), as the heads gave them (no temperature)."""
    probs: Tensor | None = None
    """Dense: mean pixel probabilities (n, j, K)."""
    histograms: Mapping[str, Tensor] = field(default_factory=dict)
    """Dense: for each confidence, pixel counts (n, j, 1024) over [0, 1]; bin b holds [b/1024, (b+1)/1024)."""
    agreement: Tensor | None = None
    """Dense: share of pixels where this exit's label equals exit i's (n, j)."""

    def __len__(self) -> int:
        first = self.logits if self.logits is not None else self.probs
        assert first is not None, "evidence is empty"
        return int(first.shape[0])


@dataclass(frozen=True)
class Decision:
    """Who left where: ``exit_index`` (N,), an index into the plan's exits, the last being the backbone."""

    exit_index: Tensor


@runtime_checkable
class Policy(Protocol):
    """Decides at an exit which rows leave. One method; obeyed by the table's replay and by the runtime alike."""

    def decide(self, exit_index: int, evidence: Evidence) -> Tensor:
        """Bool (n,): True leaves here. Never asked at the last exit, which takes every remaining row."""
        ...


class Confidence(Protocol):
    """Scores logits in [0, 1], larger is surer: (n, K, ...) -> (n, ...)."""

    def __call__(self, logits: Tensor, /) -> Tensor: ...


class Calibrator(Protocol):
    """Maps an exit's logits to better calibrated logits of the same shape."""

    def __call__(self, exit_index: int, logits: Tensor, /) -> Tensor: ...


@runtime_checkable
class Head(Protocol):
    """A plain ``nn.Module`` that takes a frontier's tensors and gives logits (n, K) or (n, K, H, W)."""

    def __call__(self, *frontier: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which exits to keep and who leaves where: the outcome of a search, obeyed by ``net.deploy(plan)``."""

    exits: tuple[str, ...]
    """Column names in order of depth, without the final one, which is always there."""
    policy: Policy
    """Decides at index k of ``exits``; its evidence holds the chosen exits alone."""
    task: Task
    predicted: Mapping[str, Any] = field(default_factory=dict)
    """What the table says: loss, share of each exit, macs, latency_ms, each beside the backbone's."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """The arguments of the search that made it."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of the model, the data and the split that it was fitted on."""
    split: str = ""
    notes: Sequence[str] = ()
    setting: Setting = "input_dependent"
    """``budgeted``: everything ends at the one exit named; ``anytime``: all exits speak, nobody leaves by confidence;
    ``input_dependent``: the policy decides."""
    certificate: Mapping[str, Any] = field(default_factory=dict)
    """What can be relied on beyond the figures. Of an exhaustive search, where ``proven`` is: configurations, how many
    each bound ruled out, the remaining gap. Of ``guarantee``, where ``promise`` is: what was tested on how many
    samples, and the bounds reached with which confidence."""


class Ahead(NamedTuple):
    """The work between here and the next answer of a call, as far as its time depends on it."""

    kind: Hashable
    """Work of one kind takes as long for each MAC: which exit it leads to, on what shapes, types and device."""
    macs: float
    """What it comes to, all rows together; above 0."""
    may_stop: bool
    """Whether it asks on its way if it should go on."""


class Step(NamedTuple):
    """An answer of a call, for all its rows."""

    output: Any
    """Of the type and keys of the network's output."""
    exit_index: int
    """The exit that spoke last."""
    exits: Tensor
    """The exit that each row's answer comes from (N,) int64, on the CPU."""


class Stop(Protocol):
    """When one call is to give work up; any thread may bring that about."""

    flag: Tensor
    """One int32 on the CPU, not 0 once somebody wishes for no more: for native code, which cannot call Python."""
    due_ns: int | None
    """On the clock of ``time.monotonic_ns()``: after it nothing can come of work under way."""

    def __call__(self) -> bool:
        """Whether to give up now. Never before the first answer, unless nobody wants any answer at all."""
        ...


class Stepwise(Protocol):
    """A network that answers step by step: what ``runtime.anytime.Refining`` makes deadlines from."""

    def stepwise(self, call: tuple[tuple[Any, ...], dict[str, Any]], stop: Stop) -> Generator[Ahead | Step, None, None]:
        """In turn an :class:`Ahead`, before its work is begun, and the :class:`Step` that it led to.

        ``call`` is arguments and keyword arguments. Between operations, each time in the same order, the work calls
        ``stop()`` and ends the iterator, without a further answer, where that says True; native code heeds ``flag`` and
        ``due_ns`` instead. Whoever listens may leave off at an Ahead. The iterator runs in the thread that asks it, and
        is left in no special mode of torch's.
        """
        ...

"""What a policy is shown live: built by the functions that filled the table, limited to what the policy reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.functional.confidence import read
from offramp.functional.summaries import DenseSummary, bin_scores, evidence_of, summarise
from offramp.types import CONFIDENCES, EDGED, Evidence, Policy, Task

__all__ = ["Gather", "gather_for"]


@dataclass(frozen=True)
class Gather:
    """Turns the logits of the exits passed so far into evidence."""

    read: Callable[[Tensor, int], Any]
    """Logits of the m rows undecided, the exit's index -> this exit's part."""
    keep: Callable[[Any, Tensor], Any]
    """A part, for some of its rows."""
    join: Callable[[Sequence[Any]], Evidence]
    score: Callable[[Tensor], Tensor] | None = None
    """Where all that ``read`` needs is a confidence of each pixel, and for edges its label: a function from logits
    to these, which a compiler may fuse."""
    read_score: Callable[[Tensor, int], Any] | None = None
    """Its result, the exit's index -> this exit's part."""


def gather_for(task: Task, policy: Policy, strides: Sequence[int] = ()) -> Gather:
    """The cheapest evidence that serves a policy; ``strides`` are those of the plan's exits.

    A policy with an attribute ``reads``, confidences such as ``("top",)``, says that of a dense network it reads those
    histograms at the exit that asks, and nothing else; any other policy is shown everything, and of the smoothed
    confidences those that ``reads`` names. An attribute ``reads_above``, a pixel threshold or None for each exit, says
    that of the one histogram it reads the share above that threshold alone.
    """
    if task == "classify":
        return Gather(read=_logits, keep=_rows, join=lambda parts: Evidence(logits=torch.stack(list(parts), dim=1)))
    reads = getattr(policy, "reads", None)
    reads = tuple(reads) if isinstance(reads, Sequence) else ()
    if len(reads) == 1 and reads[0] in (*CONFIDENCES, *EDGED):
        return _lean(reads[0], strides, getattr(policy, "reads_above", ()))
    names = (*CONFIDENCES, *(name for name in EDGED if name in reads))

    def whole(logits: Tensor, k: int) -> DenseSummary:
        return summarise(logits, confidences=names, stride=_at(strides, k, 1))

    return Gather(read=whole, keep=DenseSummary.select, join=evidence_of)


def _lean(name: str, strides: Sequence[int], above: Sequence[float | None]) -> Gather:
    base, edged = name.removesuffix("_edges"), name in EDGED

    def counts(scores: Tensor, labels: Tensor | None, k: int) -> Tensor:
        return bin_scores(scores, labels, stride=_at(strides, k, 1), pixel_threshold=_at(above, k, None))

    def plain(logits: Tensor, k: int) -> Tensor:
        said = read(logits, (base,), labels=edged)
        return counts(said.scores[base], said.labels, k)

    def score(logits: Tensor) -> Tensor:
        said = read(logits, (base,), labels=edged)
        found = said.scores[base]
        return found if said.labels is None else torch.stack([found, said.labels.to(found.dtype)], dim=1)

    def read_score(found: Tensor, k: int) -> Tensor:
        return counts(found[:, 0], found[:, 1], k) if edged else counts(found, None, k)

    def join(parts: Sequence[Tensor]) -> Evidence:
        joined = torch.stack(list(parts), dim=1)
        # Nobody reads the probabilities; a NaN of their shape says so to whoever does.
        probs = torch.full((1, 1, 1), float("nan"), device=joined.device).expand(*joined.shape[:2], 1)
        return Evidence(probs=probs, histograms={name: joined})

    return Gather(read=plain, keep=_rows, join=join, score=score, read_score=read_score)


def _at(values: Sequence[Any], k: int, default: Any) -> Any:
    return values[k] if values else default


def _logits(logits: Tensor, k: int) -> Tensor:
    return logits.float()


def _rows(part: Tensor, rows: Tensor) -> Tensor:
    return part[rows]

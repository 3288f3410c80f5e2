"""What learned schedulers read of an exit, the same on a table and live (EENet, 3.2). n rows, K classes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.errors import DataError, OfframpError
from offramp.functional.confidence import read
from offramp.functional.summaries import mean_of_histogram
from offramp.types import CONFIDENCES, Evidence

__all__ = ["Signals", "signals"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Signals:
    """Of one exit, (n,) float64 unless said; all in [0, 1], larger is surer."""

    probs: Tensor
    """(n, K): softmax, of a dense exit the mean over its pixels."""
    top: Tensor
    """The largest probability; of a dense exit this and the next two are means over pixels."""
    margin: Tensor
    entropy: Tensor
    """1 + sum p log p / log K."""
    vote: Tensor
    """The share of the exits passed, this one among them, that name this one's class; EENet (Eq. 4) counts the
    commonest class, which this exit's answer need not be."""
    repeats: Tensor
    """How many exits in a row, this one the last, name one class: PABEE's count, from 1; dense: by pixel, the mean of
    the share that agrees, as only pairs of exits are known."""

    def columns(self) -> Tensor:
        """(n, K + 4): the statistics that EENet's scheduler sees, probabilities first."""
        four = torch.stack([self.top, self.margin, self.entropy, self.vote], dim=1)
        return torch.cat([self.probs, four], dim=1)


def signals(evidence: Evidence) -> Signals:
    """Read the exit that asks, the last one of the evidence. DataError on NaN; histograms of all three confidences.

    >>> said = signals(Evidence(logits=torch.tensor([[[4.0, 0.0], [0.0, 4.0]]])))
    >>> said.vote.item(), said.repeats.item()
    (0.5, 1.0)
    """
    if evidence.logits is not None:
        own = evidence.logits[:, -1]
        said = read(own, CONFIDENCES)
        probs, scores = own.double().softmax(dim=1), said.scores
        labels = evidence.logits.argmax(dim=2)
        same = (labels == labels[:, -1:]).double()
        agrees = same.mean(dim=1)
        repeats = same.flip(1).cumprod(dim=1).sum(dim=1)
    else:
        assert evidence.probs is not None
        if missing := [name for name in CONFIDENCES if name not in evidence.histograms]:
            raise OfframpError(
                expected=f"histograms of {', '.join(CONFIDENCES)}", got=f"none of {', '.join(missing)}",
                where="a learned scheduler", todo="record the table with these confidences.")
        probs = evidence.probs[:, -1].double()
        scores = {name: mean_of_histogram(evidence.histograms[name][:, -1]) for name in CONFIDENCES}
        if evidence.agreement is None:
            raise OfframpError(expected="the agreement of exits", got="a table without", where="a learned scheduler",
                               todo="record(..., agreement=True).")
        same = evidence.agreement.double()
        agrees = same.mean(dim=1)
        repeats = same.flip(1).cumprod(dim=1).sum(dim=1)
    broken = probs.sum(dim=1).isnan()
    if bool(broken.any()):
        raise DataError(expected="probabilities", got=f"NaN in row {int(broken.nonzero()[0])} of {len(broken)}",
                        where="a learned scheduler", todo="look at that input, and at the exit's head.")
    return Signals(probs=probs, vote=agrees, repeats=repeats,
                   **{name: scores[name].double() for name in CONFIDENCES})

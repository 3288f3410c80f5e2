"""What learned schedulers read of an exit, the same on a table and live (EENet, 3.2). n rows, K classes."""

from functools import cached_property

import torch
from torch import Tensor

from offramp.errors import DataError, OfframpError
from offramp.functional.confidence import read
from offramp.functional.summaries import mean_of_histogram
from offramp.types import CONFIDENCES, Evidence

__all__ = ["Signals", "signals"]


class Signals:
    """Of one exit, (n,) float64 unless said; all in [0, 1], larger is surer. Each is computed when first asked for."""

    def __init__(self, evidence: Evidence) -> None:
        self._logits, self._probs, self._agreement = evidence.logits, evidence.probs, evidence.agreement
        if evidence.logits is None:  # histograms are large: nothing is kept of them
            self._scores = {name: mean_of_histogram(evidence.histograms[name][:, -1]).double() for name in CONFIDENCES}

    @cached_property
    def probs(self) -> Tensor:
        """(n, K): softmax, of a dense exit the mean over its pixels."""
        if self._logits is not None:
            return self._logits[:, -1].double().softmax(dim=1)
        assert self._probs is not None
        return self._probs[:, -1].double()

    @property
    def top(self) -> Tensor:
        """The largest probability; of a dense exit this and the next two are means over pixels."""
        return self._scores["top"]

    @property
    def margin(self) -> Tensor:
        """The largest less the second."""
        return self._scores["margin"]

    @property
    def entropy(self) -> Tensor:
        """1 + sum p log p / log K."""
        return self._scores["entropy"]

    @cached_property
    def vote(self) -> Tensor:
        """The share of the exits passed, this one among them, that name this one's class; EENet (Eq. 4) counts the
        commonest class, which this exit's answer need not be."""
        return self._same.mean(dim=1)

    @cached_property
    def repeats(self) -> Tensor:
        """How many exits in a row, this one the last, name one class: PABEE's count, from 1; dense: by pixel, the mean
        of the share that agrees, as only pairs of exits are known."""
        return self._same.flip(1).cumprod(dim=1).sum(dim=1)

    def columns(self) -> Tensor:
        """(n, K + 4): the statistics that EENet's scheduler sees, probabilities first."""
        four = torch.stack([self.top, self.margin, self.entropy, self.vote], dim=1)
        return torch.cat([self.probs, four], dim=1)

    @cached_property
    def _scores(self) -> dict[str, Tensor]:
        assert self._logits is not None
        return {name: score.double() for name, score in read(self._logits[:, -1], CONFIDENCES).scores.items()}

    @cached_property
    def _same(self) -> Tensor:
        """(n, j) float64: whether, or on what share of the pixels, an exit names this one's class."""
        if self._logits is not None:
            labels = self._logits.argmax(dim=2)
            return (labels == labels[:, -1:]).double()
        assert self._agreement is not None
        return self._agreement.double()


def signals(evidence: Evidence) -> Signals:
    """Read the exit that asks, the last one of the evidence. DataError on NaN; histograms of all three confidences.

    >>> said = signals(Evidence(logits=torch.tensor([[[4.0, 0.0], [0.0, 4.0]]])))
    >>> said.vote.item(), said.repeats.item()
    (0.5, 1.0)
    """
    if evidence.logits is not None:
        # the largest is NaN where any is; where it is infinite the softmax is NaN
        broken = ~evidence.logits[:, -1].amax(dim=1).isfinite()
    else:
        assert evidence.probs is not None
        if missing := [name for name in CONFIDENCES if name not in evidence.histograms]:
            raise OfframpError(
                expected=f"histograms of {', '.join(CONFIDENCES)}", got=f"none of {', '.join(missing)}",
                where="a learned scheduler", todo="record the table with these confidences.")
        if evidence.agreement is None:
            raise OfframpError(expected="the agreement of exits", got="a table without", where="a learned scheduler",
                               todo="record(..., agreement=True).")
        broken = evidence.probs[:, -1].sum(dim=1).isnan()
    if bool(broken.any()):
        raise DataError(expected="probabilities", got=f"NaN in row {int(broken.nonzero()[0])} of {len(broken)}",
                        where="a learned scheduler", todo="look at that input, and at the exit's head.")
    return Signals(evidence)

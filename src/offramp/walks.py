"""The bridge to pictures: what every exit of a dense network says of one image, when, and where it goes on. H W space.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.cost.macs import MacCounter
from offramp.errors import OfframpError
from offramp.functional.confidence import BY_NAME
from offramp.nn.guest import evaluating
from offramp.nn.masked import Masked
from offramp.nn.multiexit import MultiExit
from offramp.nn.output import read_logits
from offramp.report.pictures import to_uint8
from offramp.report.walk import Said, Walk
from offramp.runtime import Adaptive
from offramp.runtime.bench import macs_to_exits

__all__ = ["times_of", "walk"]


def walk(
    net: MultiExit | Masked | Adaptive, inputs: Tensor, *,
    timed: Sequence[float] | Callable[[Tensor], Iterable[Any]] | None = None, label: Tensor | None = None,
    image: Tensor | None = None, name: str = "", class_names: Sequence[str] = (),
) -> Walk:
    """What each exit says of one image, its confidence, cost and time, and of a masked network each exit's mask.

    net: dense; a deployed one goes as far as its plan lets it, all the way where its setting is "anytime".
    inputs: (1, C, H, W). label: (H, W) of the output's size, what is not in [0, K) void. image: (3, h, w), to be shown
    instead of the inputs.
    timed: milliseconds from the call to each exit's answer, or what yields an answer an exit when it is called on the
        inputs, which is then timed (:func:`times_of`). Nothing: ``net`` itself is timed, unless it is masked: the dense
        simulation of a mask saves no time, so give ``masked.deploy().anytime``.

    ``offramp.report`` has ``png``, ``gif``, ``mp4`` and ``render_walks`` to draw it, and ``save_walk``. ADP-C
    (arXiv:2104.00749), Figs. 5, 9 and 10. Masks are shown at the output's size, by nearest, as later layers see them;
    what is said there is resized after it was carried over, so that beside an active place it may still move a little.
    OfframpError where the network labels no pixels, has several heads at a site, or gets more than one image.
    """
    if inputs.ndim != 4 or len(inputs) != 1:
        raise OfframpError(expected="one image (1, C, H, W)", got=f"shape {tuple(inputs.shape)}", where="walk()")
    measure, masks = "top", []
    with evaluating(net):
        if isinstance(net, Masked):
            _refuse(net.net)
            names, answers = [column.name for column in net.net.columns], net.answers(inputs)
            logits, masks, macs = answers.logits, answers.masks, net.macs(inputs)[0].tolist()
            measure = net.confidence if net.confidence in (*BY_NAME, "value") else "top"
        elif isinstance(net, MultiExit):
            _refuse(net)
            names, logits = [column.name for column in net.columns], net(inputs)
            macs = _macs(net, inputs)
            timed = timed or (lambda x: _answers(net, x))
        else:
            names, macs = [*net.plan.exits, "final"], list(macs_to_exits(net, inputs))
            logits = [read_logits(one.output) for one in net.anytime(inputs)]
            timed = timed or net.anytime
        times = times_of(timed, inputs) if callable(timed) else timed
    if logits[-1].ndim != 4:
        raise OfframpError(expected="dense logits (1, K, H, W)", got=str(tuple(logits[-1].shape)), where="walk()")
    if times is not None and len(times) != len(logits):
        raise OfframpError(expected=f"a time for each of {len(logits)} exits", got=f"{len(times)}", where="walk()")
    steps = []
    for k, said in enumerate(logits):
        sure = said.amax(1).clamp(0, 1) if measure == "value" else BY_NAME[measure](said)
        active = None
        if k < len(masks):
            active = F.interpolate(masks[k].to(torch.uint8), said.shape[2:], mode="nearest")[0, 0].bool().cpu()
        steps.append(Said(
            name=names[k], predictions=_spoken(said, measure)[0].to(torch.int16).cpu(), macs=int(macs[k]),
            confidence=sure[0].float().cpu(), active=active, elapsed_ms=None if times is None else float(times[k])))
    classes = logits[-1].shape[1]
    truth = None if label is None else label.cpu().where((label >= 0) & (label < classes), -1).to(torch.int16)
    return Walk(name=name, image=to_uint8(inputs[0] if image is None else image), steps=tuple(steps), label=truth,
                num_classes=classes, class_names=tuple(class_names) if len(class_names) == classes else (),
                measure=measure)


def times_of(answers: Callable[[Tensor], Iterable[Any]], inputs: Tensor, *, repeats: int = 7, budget_s: float = 10.0
             ) -> list[float]:
    """Milliseconds from a call to each of the answers that it yields: the median over ``repeats``, after one more.

    Three are enough once ``budget_s`` is spent.
    """
    wait = torch.cuda.synchronize if inputs.device.type == "cuda" else None
    found: list[list[float]] = []
    began = time.perf_counter()
    while len(found) <= repeats and (len(found) < 4 or time.perf_counter() - began < budget_s):
        start, taken = time.perf_counter(), []
        for _ in answers(inputs):
            if wait is not None:
                wait()
            taken.append((time.perf_counter() - start) * 1e3)
        found.append(taken)
    return [statistics.median(column) for column in zip(*found[1:], strict=True)]


def _answers(net: MultiExit, inputs: Tensor) -> Iterator[Any]:
    state: Any = net.begin(inputs)
    for k in range(len(net.sites) + 1):
        state, said = net.step(k, state)
        yield said


def _macs(net: MultiExit, inputs: Tensor) -> list[int]:
    """Until each exit has spoken."""
    found = []
    with MacCounter() as counter:
        for _ in _answers(net, inputs):
            found.append(counter.total)
    return found


def _spoken(logits: Tensor, measure: str) -> Tensor:
    """The likeliest class (1, H, W); of heatmaps the one that is largest, where it comes to half of its own peak."""
    said = logits.argmax(1)
    if measure != "value":
        return said
    largest, peaks = logits.amax(1), logits.amax((2, 3))[0]
    return torch.where((largest > 0) & (largest >= peaks[said] / 2), said, -1)


def _refuse(net: MultiExit) -> None:
    if net.task != "dense" or any(len(net.columns_at(k)) != 1 for k in range(len(net.sites))):
        raise OfframpError(
            expected="a network that labels pixels, one head at each site", where="walk()",
            got=f"one for {net.task} with {[column.name for column in net.columns]}",
            todo="a deployed one, net.deploy(plan), has the heads of its plan alone.")

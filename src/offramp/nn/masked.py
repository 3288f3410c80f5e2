"""Networks that go on only where they are not sure yet, simulated densely, and so differentiable (arXiv:2104.00749).

ADP-C, 3.4: an exit's confident pixels are settled. Convolutions after it, in the trunk and in later exits, give there a
mean of the active places around, before norm and activation, and each later exit repeats what was said. The simulation
computes every place and puts the means over it: to train with and to know what is saved, not to save time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from offramp.cost.macs import MacCounter
from offramp.errors import OfframpError
from offramp.functional.masking import CRITERIA, REACHES, Criterion, Reach, active
from offramp.graph._guest import as_found, flat
from offramp.nn._masked_layers import Frame, Link, MaskedLayer, mask_layer_, unmask_layer_
from offramp.nn._slim_layers import SlimLayer
from offramp.nn.multiexit import MultiExit, head_key
from offramp.nn.reading import MapReading

__all__ = ["Masked", "MaskedAnswers", "Resizing", "coarse_logits", "mask_"]

_THRESHOLDS: dict[str, float] = {"top": 0.998, "value": 0.002}  # ADP-C's, for pixels and for poses


@dataclass(frozen=True, eq=False)
class MaskedAnswers:
    """What one call says, and where it went on."""

    logits: list[Tensor]
    """Of each exit, by depth, (N, K, H, W)."""
    masks: list[Tensor]
    """Taken at each exit but the last, bool (N, 1, h, w) of its logits before they are resized; true where active."""


class Masked(nn.Module):
    """A dense network with exits that goes on where it is not sure; made by :func:`offramp.mask_`.

    ``masked(x)`` is the list of every exit's logits. ``masked.net`` is the network itself, unmasked when it is called,
    under the ``state_dict`` keys that it had, behind ``net.``; lambdas have keys of their own behind ``lams.``.
    Masks are those of the call's own input; nothing of them outlives it.
    """

    deploy: ClassVar[Callable[..., nn.Module]]
    """``masked.deploy()``, which runs active places alone; hung here by ``offramp/__init__``, for it stands above."""
    enabled: bool = True
    """Whether calls are masked; where not, ``masked(x)`` is ``masked.net(x)``, bit for bit."""
    notes: tuple[str, ...] = ()
    """Layers after the first exit that stay dense."""

    def __init__(
        self, net: MultiExit, *, confidence: Criterion, threshold: float | None, share: float | None, grid: int,
        seed: int, reach: Reach,
    ) -> None:
        super().__init__()
        self.net, self.confidence, self.threshold, self.share = net, confidence, threshold, share
        self.grid, self.seed, self.reach = grid, seed, reach
        self.lams = nn.ParameterDict()
        """By layer, how steeply weights fall with distance."""
        self.carries_inside = False
        """Whether the network's own logits are carried over before it resizes them."""
        self._link = Link()

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return self.answers(*args, **kwargs).logits

    def answers(self, *args: Any, **kwargs: Any) -> MaskedAnswers:
        """What ``masked(...)`` says, with the masks; these are empty where it is not enabled."""
        if not self.enabled:
            return MaskedAnswers(self.net(*args, **kwargs), [])
        return self._run(self._frame(), args, kwargs, lambda: None)

    def macs(self, *args: Any, **kwargs: Any) -> Tensor:
        """MACs that sparse execution does until each exit has spoken: int64 (N, E), a row per sample.

        A masked convolution counts by its active places, and by what it interpolates on the one-pixel halo around
        them, an active neighbour and channel each; all else, resizing and the exits passed too, as
        :mod:`offramp.cost.macs` counts it. The network runs in eval mode and is left as found.
        """
        return self.counted(*args, **kwargs)[1]

    def counted(self, *args: Any, **kwargs: Any) -> tuple[MaskedAnswers, Tensor]:
        """What ``masked.answers(...)`` says in eval mode, without gradients, and ``masked.macs(...)``, in one run."""
        frame, counter = self._frame(), MacCounter()
        frame.counting = True
        rows = next(len(leaf) for leaf in flat((args, kwargs))[0] if isinstance(leaf, Tensor))
        columns: list[Tensor] = []

        def note() -> None:
            rest = torch.full((rows,), counter.total // rows - frame.dense_macs)
            columns.append(rest if frame.sparse_macs is None else rest + frame.sparse_macs.cpu())

        with as_found(self, mode=False), torch.no_grad(), counter:
            if self.enabled:
                answers = self._run(frame, args, kwargs, note)
            else:
                answers = MaskedAnswers([], [])
                state: Any = self.net.begin(*args, **kwargs)
                for k in range(len(self.net.sites) + 1):
                    state, said = self.net.step(k, state)
                    answers.logits.append(said if k < len(self.net.sites) else self.net.logits(said))
                    note()
        return answers, torch.stack(columns, 1)

    def unmask_(self) -> MultiExit:
        """Make its layers the plain ones that they were; the network, which can be masked again."""
        for layer in self.net.modules():
            if isinstance(layer, MaskedLayer):
                unmask_layer_(layer)
        return self.net

    @property
    def rule(self) -> dict[str, Any]:
        """All that decides what is masked, besides weights."""
        names = ("confidence", "threshold", "share", "grid", "seed", "reach", "enabled")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        rule = f"threshold={self.threshold}" if self.share is None else f"share={self.share}"
        return f"confidence={self.confidence}, {rule}, reach={self.reach}, {len(self.lams)} convolutions"

    def _frame(self) -> Frame:
        return Frame(dict(self.lams.items()), self.reach)

    def _run(self, frame: Frame, args: Any, kwargs: Any, note: Callable[[], None]) -> MaskedAnswers:
        net, logits, masks = self.net, [], []
        with self._link.at(frame):
            state: Any = net.begin(*args, **kwargs)
            for k in range(len(net.sites)):
                state = net.stages[k](state)
                coarse, resize = coarse_logits(net.head(net.columns[net.columns_at(k)[0]].name), state.tensors)
                coarse = frame.carry(coarse)
                mask = self.goes_on(coarse, k)
                if frame.mask is not None:
                    mask &= frame.mask_at((coarse.shape[2], coarse.shape[3]))
                frame.settle(mask, coarse)
                logits.append(resize(coarse))
                masks.append(mask)
                note()
            frame.last = True
            said = net.logits(net.stages[-1](state))
            logits.append(said if self.carries_inside else frame.carry(said, logits[-1]))
            note()
        return MaskedAnswers(logits, masks)

    def goes_on(self, coarse: Tensor, k: int) -> Tensor:
        """The places of exit k's own logits (N, K, h, w) that are active after it, were all so before: (N, 1, h, w)."""
        generator = torch.Generator().manual_seed(self.seed + k) if self.confidence == "random" else None
        return active(coarse, self.confidence, self.threshold, share=self.share, generator=generator, grid=self.grid)


@dataclass(frozen=True)
class Resizing:
    """What brings logits to the output's size: (size, mode, align_corners), one after another; none leaves them."""

    steps: tuple[tuple[tuple[int, int], str, bool | None], ...] = ()

    def __call__(self, logits: Tensor) -> Tensor:
        for size, mode, align_corners in self.steps:
            logits = F.interpolate(logits, size, mode=mode, align_corners=align_corners)
        return logits


def coarse_logits(head: nn.Module, frontier: Sequence[Tensor]) -> tuple[Tensor, Resizing]:
    """A head's logits before they are resized, and what resizes them."""
    reading, on_map = getattr(head, "reading", None), getattr(head, "on_map", None)
    if not isinstance(reading, MapReading) or on_map is None:
        return head(*frontier), Resizing()
    joined = reading.join(frontier)
    goal = reading.output_of(joined.shape[-2:])
    return on_map(joined), Resizing(() if goal is None else ((goal, "bilinear", False),))


def mask_(
    net: MultiExit, *, confidence: Criterion = "top", threshold: float | None = None, share: float | None = None,
    lam: float = 3.0, learn_lam: bool = True, reach: Reach = "everywhere", grid: int = 0, seed: int = 0,
) -> Masked:
    """Make a dense network with exits go on only where it is not sure, in place on the convolutions after the first.

    confidence, threshold, share, grid: which pixels an exit settles, as :func:`offramp.functional.masking.active` says;
    the threshold is 0.998 for ``top`` and 0.002 for ``value`` (of heatmaps) where neither it nor a share is given.
    lam: what each convolution's lambda starts at; a parameter of its own where ``learn_lam``. reach: how deep inactive
    places are interpolated (:func:`offramp.functional.masking.interpolate`). seed: of ``random``, the same each call.

    ADP-C (arXiv:2104.00749), 3.4. An exit's mask, brought to each output's size by nearest, governs the stage after it
    and the next exit. Logits are carried over at the size at which a head computes them, before the next mask is
    taken, and what is settled stays so: masks are nested. Where the network's own logits come straight from a
    convolution, at most resized, they are carried over there, else at the output's size. An output of one place, a
    pooled context, is no map and stays dense. OfframpError where a convolution cannot be reached; the network is then
    as it was.
    """
    where = "mask_()"
    if not isinstance(net, MultiExit) or net.task != "dense" or not net.sites:
        raise OfframpError(expected="a network with exits that labels pixels (task 'dense')", where=where,
                           got=f"{type(net).__name__}{f' for {net.task}' if isinstance(net, MultiExit) else ''}",
                           todo="offramp.attach(network, example_inputs, exits=...) gives one")
    if confidence not in CRITERIA or reach not in REACHES:
        raise OfframpError(expected=f"a confidence of {list(CRITERIA)} and a reach of {list(REACHES)}",
                           got=f"{confidence!r} and {reach!r}", where=where)
    if share is None and threshold is None:
        threshold = _THRESHOLDS.get(confidence)
    # said now by the function that will be called, not at the first input
    active(torch.zeros(1, 2, 1, 1), confidence, threshold, share=share, grid=grid)
    if any(len(net.columns_at(k)) != 1 for k in range(len(net.sites))):
        raise OfframpError(expected="one head at each site", got=f"{[column.name for column in net.columns]}",
                           where=where, todo="choose one of the candidates, and attach it alone")
    if any(isinstance(module, MaskedLayer | SlimLayer) for module in net.modules()):
        raise OfframpError(expected="a network of plain layers", got="one that is masked or slimmable already",
                           where=where, todo="masked.unmask_() and slimmable.narrow(width) give a plain one")
    masked = Masked(net, confidence=confidence, threshold=threshold, share=share, grid=grid, seed=seed, reach=reach)
    names = {module: name for name, module in net.named_modules()}
    convs = dict.fromkeys(_after_the_first_exit(net))
    saying = _saying(net)
    for conv in convs:
        if not isinstance(conv, nn.Conv2d):
            masked.notes = (*masked.notes, f"{names[conv]} ({type(conv).__name__})")
            continue
        key = head_key(names[conv])
        weight = conv.weight
        masked.lams[key] = nn.Parameter(weight.new_full((), lam, dtype=torch.promote_types(weight.dtype, torch.float32),
                                                        requires_grad=False), requires_grad=learn_lam)
        mask_layer_(conv, masked._link, key).says = conv is saying
    masked.carries_inside = isinstance(saying, MaskedLayer)
    return masked.train(net.training)


def _after_the_first_exit(net: MultiExit) -> Iterator[nn.Module]:
    """Every convolution that runs there; OfframpError where the trunk calls one as a function."""
    faults = []
    for k, stage in enumerate(net.stages[1:], 1):
        module = stage.module()
        for node in module.graph.nodes:
            if node.op == "call_module":
                yield from (m for m in module.get_submodule(node.target).modules() if isinstance(m, _ConvNd))
            elif node.op == "call_function" and "conv" in getattr(node.target, "__name__", ""):
                faults.append(str(node))
        if k < len(net.sites):
            head = net.head(net.columns[net.columns_at(k)[0]].name)
            yield from (m for m in head.modules() if isinstance(m, _ConvNd))
    if faults:
        raise OfframpError(expected="convolutions that are modules of torch.nn", got=f"calls of functions: {faults}",
                           where="mask_()", todo="place the first exit after them, or use nn.Conv2d layers")


def _saying(net: MultiExit) -> nn.Module | None:
    """The convolution whose output, at most resized, is the network's logits; None where there is none such."""
    leaves = [leaf for leaf in flat(net.traced.output)[0] if isinstance(leaf, Tensor)]
    logits = net.logits(net.traced.output)
    at = next((i for i, leaf in enumerate(leaves) if leaf is logits), None)
    if at is None:
        return None
    module = net.stages[-1].module()
    node: Any = next(iter(reversed(module.graph.nodes))).args[0][at]
    while isinstance(node, fx.Node):
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            if isinstance(layer, nn.Conv2d):
                once = [other.target for other in module.graph.nodes].count(node.target) == 1
                return layer if once and layer.out_channels == logits.shape[1] else None
            if not isinstance(layer, nn.Upsample | nn.Identity):
                return None
        elif node.target is not F.interpolate:
            return None
        node = node.args[0]
    return None

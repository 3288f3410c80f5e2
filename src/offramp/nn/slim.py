"""Slimmable networks: one set of weights, of which every width uses the first channels (arXiv:2207.06242, 3.1)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from offramp.errors import WidthError
from offramp.graph import trace
from offramp.graph._guest import as_found, flat
from offramp.graph.channels import ChannelPlan, channels
from offramp.nn._slim_fits import KINDS, Part, fit_of, own_of, refusal
from offramp.nn._slim_layers import Fit, Gear, Rig, SlimLayer, plain_, rig_, store_key

__all__ = ["Slimmable", "install_", "slim_", "slim_plan"]


class Slimmable(nn.Module):
    """A network that answers at several widths; made by :func:`offramp.slim_`.

    ``net(x)`` is the guest's own output at ``net.width``, whole where that is 1.0, bit for bit. The guest's layers stay
    the objects that they were, under the same ``state_dict`` keys behind ``backbone.``; norms have keys of their own
    for each narrower width (``backbone.bn1.at_0:25.weight``). Where layers run again in backward
    (``torch.utils.checkpoint``), call it inside the same :meth:`at`.
    """

    notes: tuple[str, ...] = ()
    """Layers that the example does not call: they have their full width always."""

    def __init__(self, backbone: nn.Module, plan: ChannelPlan, example: Any) -> None:
        super().__init__()
        self.backbone, self.plan = backbone, plan
        self.example = example
        """A few rows of the inputs that it was made with: a tuple of arguments or a dict of keyword arguments."""
        self._gear = Gear((1.0,))

    @property
    def widths(self) -> tuple[float, ...]:
        """What ``width`` may be, from narrow to 1.0."""
        return self._gear.widths

    @property
    def width(self) -> float:
        """The width of the next call here; assign to it to switch all threads that are not inside an :meth:`at`."""
        return self._gear.width

    @width.setter
    def width(self, width: float) -> None:
        self._gear.default = self._gear.known(width, "net.width")

    @contextmanager
    def at(self, width: float) -> Iterator["Slimmable"]:
        """This width for the calls inside, in this thread or asynchronous task alone; nests."""
        with self._gear.at(self._gear.known(width, "net.at()")):
            yield self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._gear.at(self._gear.width):  # read once: whoever switches meanwhile switches the next call
            return self.backbone(*args, **kwargs)

    def narrow(self, width: float) -> nn.Module:
        """A plain copy of the guest at a width: of the guest's own classes, with small weights of its own."""
        width = self._gear.known(width, "net.narrow()")
        with torch.inference_mode(False):  # the copy may be trained, and one with exits is traced anew
            made = deepcopy(self.backbone)
            _release(made, width)
        return made

    def add_width_(self, width: float) -> "Slimmable":
        """Add a width. Its norms start from those of the next wider one; :meth:`recalibrate_` makes them its own.

        That is how US-Nets (arXiv:1903.05134) run at any width between those that were trained.
        """
        width = _checked((width, 1.0), "net.add_width_()")[0]
        if width in self.widths:
            raise WidthError(expected="a width that the network has not", got=f"{width} of {list(self.widths)}",
                             where="net.add_width_()")
        fits: dict[str, Fit | None] = {}
        faults = []
        for path, parts in _parts(self.plan).items():
            try:
                fits[path] = fit_of(self.backbone.get_submodule(path), parts, self.plan, width)
            except ValueError as fault:
                faults.append(f"{path}: at width {width}, {fault}")
        _refuse(self.backbone, faults)
        wider = min(known for known in self.widths if known > width)
        for path, fit in fits.items():
            layer = self.backbone.get_submodule(path)
            rig: Rig = vars(layer)["_offramp_rig"]
            if fit is not None and fit.store:
                before = rig.fits.get(wider)
                source = layer.get_submodule(before.store) if before is not None else layer
                layer.add_module(fit.store, own_of(layer, before, source, fit))
            rig.fits[width] = fit
        self._gear.widths = tuple(sorted((*self.widths, width)))
        return self

    def recalibrate_(self, batches: Iterable[Any], widths: Sequence[float] | None = None) -> "Slimmable":
        """Set the batch norms' statistics anew, to the mean over ``batches``; default: at all widths below 1.0.

        batches: each a tensor, (inputs, ...) of which the first is used, or a dict of arguments. They are read once.
        US-Nets (arXiv:1903.05134) do this after training; a cumulative mean, not a moving one. Weights, random
        states and training flags stay; so do the statistics if it fails.
        """
        chosen = [self._gear.known(width, "net.recalibrate_()") for width in widths or self.widths[:-1]]
        if isinstance(batches, Tensor | Mapping):
            raise WidthError(expected="an iterable of batches", got=type(batches).__name__, where="net.recalibrate_()",
                             todo="pass [batch] for a single one")
        norms = [layer for layer in self.backbone.modules()
                 if isinstance(layer, _NormBase) and isinstance(layer, SlimLayer) and layer.running_mean is not None]
        fresh: list[tuple[nn.Module, dict[str, Tensor]]] = []
        with as_found(self.backbone, mode=False):
            for norm in norms:
                norm.training, norm.momentum = True, None
            holders = [norm if width == 1.0 else norm.get_submodule(store_key(width))
                       for norm in norms for width in chosen]
            for holder in holders:
                _forget(holder)
            some = False
            for batch in batches:
                some = True
                for width in chosen:
                    with torch.no_grad(), self._gear.at(width):
                        _call(self.backbone, batch)
            if not some:
                raise WidthError(expected="at least one batch", got="none", where="net.recalibrate_()")
            fresh = [(holder, {name: held.clone() for name, held in holder.named_buffers(recurse=False)})
                     for holder in holders]
        for holder, values in fresh:  # as_found put the old ones back
            for name, value in values.items():
                holder.get_buffer(name).copy_(value)
        return self

    def extra_repr(self) -> str:
        return f"widths={list(self.widths)}"


def slim_(
    model: nn.Module,
    widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    *,
    example_inputs: Any,
    where: Callable[[str, nn.Module], bool] | None = None,
) -> Slimmable:
    """Make a network of convolutions, linear layers and norms slimmable, in place on its layers.

    widths: shares of the channels, 1.0 among them; channels are rounded to multiples of 8 (SlimSeg, arXiv:2207.06242).
    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments.
    where: (path, module) -> bool; False keeps what that layer gives at full width.
    Weights are shared, norms are private to each width; narrower ones start as slices of the network's own. All widths
    are tried on the example, and at 1.0 the output must equal the untouched network's. WidthError where the channels of
    an op cannot be followed or a layer cannot be cut; the model is then as it was found.

    >>> net = slim_(nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 2, 1)), (0.5, 1.0),
    ...             example_inputs=torch.zeros(1, 3, 8, 8))
    >>> with net.at(width=0.5):
    ...     net(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 2, 8, 8])
    >>> net.narrow(0.5)[0]
    Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
    """
    wanted = _checked(widths, "slim_()")
    if any(isinstance(module, SlimLayer) for module in model.modules()):
        raise WidthError(expected="a plain network", got="one that is slimmable already", where="slim_()",
                         todo="net.add_width_(width) adds a width; net.narrow(1.0) is the plain network")
    traced = trace(model, example_inputs)
    plan = channels(traced, where=where)
    args, kwargs = traced.example()
    with as_found(model, mode=False), torch.no_grad():
        before = model(*args, **kwargs)
    net = Slimmable(model, plan, kwargs or args)
    found = {name: dict(module._modules) for name, module in model.named_modules()}
    try:
        install_(net)
        for width in sorted(wanted, reverse=True)[1:]:
            net.add_width_(width)
        _verify(net, before, args, kwargs)
        kinds = tuple(kind for group in KINDS.values() for kind in group)
        net.notes = tuple(f"{path} is not called" for path, layer in model.named_modules()
                          if isinstance(layer, kinds) and not isinstance(layer, SlimLayer))
    except BaseException:
        _release(model, 1.0)
        assert found == {name: dict(module._modules) for name, module in model.named_modules()}
        raise
    return net


def slim_plan(
    model: nn.Module, *, example_inputs: Any, where: Callable[[str, nn.Module], bool] | None = None
) -> ChannelPlan:
    """Which channels :func:`slim_` would keep together; print it. The model is left as found."""
    return channels(trace(model, example_inputs), where=where)


def _checked(widths: Sequence[float], where: str) -> tuple[float, ...]:
    made = tuple(sorted({float(width) for width in widths}))
    if not all(0 < width <= 1 for width in made) or 1.0 not in made:
        raise WidthError(expected="widths in (0, 1], 1.0 among them", got=repr(tuple(widths)), where=where)
    return made


def _parts(plan: ChannelPlan) -> dict[str, list[Part]]:
    """By module, what of it the plan's layers are about."""
    parts: dict[str, list[Part]] = {}
    for layer in plan.layers:
        path, name = (layer.path, "") if layer.kind != "parameter" else layer.path.rpartition(".")[::2]
        parts.setdefault(path, []).append((name, layer))
    return parts


def install_(net: Slimmable) -> None:
    """Make the plan's layers slim, all at full width yet."""
    faults = []
    parts = _parts(net.plan)
    for path, here in parts.items():
        layer = net.backbone.get_submodule(path)
        if why := refusal(layer, here):
            faults.append(f"{path} ({type(layer).__name__}) {why}")
    _refuse(net.backbone, faults)
    for path, here in parts.items():
        whole = any(not name for name, _ in here)
        rig_(net.backbone.get_submodule(path), net._gear, () if whole else [name for name, _ in here])


def _refuse(model: nn.Module, faults: Sequence[str]) -> None:
    if faults:
        raise WidthError(
            expected=f"layers of {type(model).__name__} that can be cut", got="; ".join(faults), where="slim_()",
            todo="keep them whole by where=lambda path, module: ..., False for the layers that feed them and for them",
        )


def _release(model: nn.Module, width: float) -> None:
    """Make every slim layer the plain one that it is at a width."""
    memo: dict[Any, nn.Parameter] = {}
    for layer in list(model.modules()):
        if isinstance(layer, SlimLayer):
            plain_(layer, width, memo)


def _verify(net: Slimmable, before: Any, args: Any, kwargs: Any) -> None:
    expected, shapes = flat(before)[0], [_shape(leaf) for leaf in flat(before)[0]]
    with as_found(net.backbone, mode=False), torch.no_grad():  # once: what a width leaves behind, the next one meets
        for width in sorted(net.widths, reverse=True):
            try:
                with net.at(width):
                    said = flat(net(*args, **kwargs))[0]
            except Exception as error:
                raise WidthError(
                    expected=f"{type(net.backbone).__name__} to run at width {width}",
                    got=f"{type(error).__name__}: {error} in {_raised_in(net.backbone, error)}", where="slim_()",
                    todo="keep that part whole: where=lambda path, module: not path.startswith(...)",
                ) from error
            if [_shape(leaf) for leaf in said] != shapes:
                raise WidthError(expected=f"outputs of shapes {shapes} at width {width}",
                                 got=f"{[_shape(leaf) for leaf in said]}", where="slim_()")
            same = all(torch.equal(a, b) for a, b in zip(said, expected, strict=True) if isinstance(a, Tensor))
            if width == 1.0 and not same:
                raise WidthError(
                    expected="at full width the untouched network's output", got="another one", where="slim_()",
                    todo="a network that answers differently each time, in eval mode, cannot be checked",
                )


def _shape(leaf: Any) -> Any:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf


def _raised_in(model: nn.Module, error: BaseException) -> str:
    """The innermost module of the model whose forward was at work, and the line of it."""
    names = {id(module): name for name, module in model.named_modules()}
    place, trail = "the network itself", error.__traceback__
    while trail is not None:
        code, owner = trail.tb_frame.f_code, trail.tb_frame.f_locals.get("self")
        if id(owner) in names and "offramp" not in code.co_filename and not code.co_name.startswith("_"):
            place = f"{names[id(owner)] or 'the network itself'} ({code.co_filename}:{trail.tb_lineno})"
        trail = trail.tb_next
    return place


def _forget(holder: nn.Module) -> None:
    holder.get_buffer("running_mean").zero_()
    holder.get_buffer("running_var").fill_(1)
    if holder._buffers.get("num_batches_tracked") is not None:
        holder.get_buffer("num_batches_tracked").zero_()


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, list | tuple):
        batch = batch[0]
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch)

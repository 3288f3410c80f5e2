"""What a run stands in: process, device and precision, the folder, modes of the guest, the cache, the bar."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from offramp.errors import DataError
from offramp.train.batches import Source
from offramp.train.features import Features, Refused, collect
from offramp.train.recipe import Recipe

if TYPE_CHECKING:
    from offramp.nn.multiexit import MultiExit

__all__ = ["accelerated", "as_found", "cached", "channels_last", "drop_features", "lay_out", "run_folder", "set_modes",
           "show_progress"]


@contextmanager
def accelerated(device: str | torch.device | None, precision: str | None, *, find_unused: bool) -> Iterator[Any]:
    """An Accelerator of our own: its settings are global, so those of an earlier run in this process are dropped."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, GradientState

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    AcceleratorState._reset_state(reset_partial_state=alone)
    GradientState._reset_state()
    wanted = None if device is None else torch.device(device)
    kept = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if wanted is not None and alone:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(wanted)
    try:
        yield Accelerator(
            cpu=wanted is not None and wanted.type == "cpu", mixed_precision=precision or "no",
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused)],
        )
    finally:
        if kept is None:
            os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        else:
            os.environ["ACCELERATE_TORCH_DEVICE"] = kept
        AcceleratorState._reset_state(reset_partial_state=alone)
        GradientState._reset_state()


@contextmanager
def as_found(net: nn.Module) -> Iterator[None]:
    """Restore each module's mode, which parameters take gradients, their layout, and the device."""
    modes = [(module, module.training) for module in net.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
    device = next((parameter.device for parameter in net.parameters()), None)
    plain = [p for p in (*net.parameters(), *net.buffers()) if p.ndim == 4 and p.is_contiguous()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, grad in grads:
            parameter.requires_grad_(grad)
            parameter.grad = None
        for tensor in plain:
            tensor.data = tensor.data.contiguous()
        if device is not None:
            net.to(device)


def set_modes(net: "MultiExit", recipe: Recipe) -> None:
    """Frozen: the backbone in eval mode without gradients, the heads in train mode. Else all in train mode."""
    net.train()
    if recipe.freeze:
        net.backbone.eval()
        net.backbone.requires_grad_(False)


def lay_out(
    net: nn.Module, wanted: bool | None, example: Callable[[], Any], device: torch.device, notes: list[str]
) -> bool:
    """Put convolutions' weights, and then inputs, channels last; whether that was done.

    By itself where it pays for sure, on CPUs (1.4 to 2.4 times as fast, MobileNetV2 and ResNet-18 at 240x320), unless
    the network says another thing then: some reshape with ``view``, which asks for the plain layout.
    """
    if wanted is None and device.type == "cpu" and any(isinstance(m, nn.Conv2d) for m in net.modules()):
        args, kwargs = pytree.tree_map(channels_last, example())
        try:
            with as_found(net), torch.no_grad():
                net.eval().to(memory_format=torch.channels_last)
                net(*args, **kwargs)
            wanted = True
        except RuntimeError as error:
            notes.append(f"layout: channels first, since with channels last the network fails: {error}")
    if wanted:
        net.to(memory_format=torch.channels_last)
    return bool(wanted)


def channels_last(leaf: Any) -> Any:
    """A tensor (N, C, H, W) in that layout; anything else as it is."""
    maps = isinstance(leaf, Tensor) and leaf.ndim == 4 and leaf.is_floating_point()
    return leaf.contiguous(memory_format=torch.channels_last) if maps else leaf


def run_folder(run_dir: str | Path | None, stack: ExitStack, accelerator: Any) -> Path:
    """The run's folder, or a temporary one that goes with the stack; one for all processes."""
    if run_dir is not None:
        folder = Path(run_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(expected="a run_dir that can be made", got=str(error), where="fit()",
                            todo="give a folder that you may write to") from error
        return folder
    made = ""
    if accelerator.is_main_process:
        made = stack.enter_context(tempfile.TemporaryDirectory(prefix="offramp-"))
    return Path(_from_main(accelerator, made))


def cached(
    net: "MultiExit", source: Source, checks: Source | None, recipe: Recipe, folder: Path, limit_bytes: int,
    accelerator: Any, notes: list[str],
) -> tuple[Source, Source | None]:
    """The sources as cached features where they fit, with a note of what was decided."""
    if limit_bytes == 0:
        notes.append("features: not cached, as asked (cache_bytes=0)")
        return source, checks
    plain = replace(recipe, views=1, augment=None, augment_pair=None, loss_stride=1)
    try:
        features = _collect(net, source, recipe, folder / "features", limit_bytes, accelerator)
    except Refused as why:
        notes.append(f"features: not cached, the backbone runs in every pass: {why}")
        return source, checks
    notes.append(f"features: cached, {features.count} samples x {features.views} views of {len(features.tensors)} "
                 f"sites in {features.nbytes / 2**30:.3f} GiB of at most {limit_bytes / 2**30:.2f}")
    if checks is not None:
        try:
            room = limit_bytes - features.nbytes
            checks = _collect(net, checks, plain, folder / "validation", room, accelerator)
        except Refused as why:
            notes.append(f"validation features: not cached: {why}")
    return features.to(accelerator.device), checks


def _collect(
    net: "MultiExit", source: Source, recipe: Recipe, folder: Path, limit_bytes: int, accelerator: Any
) -> Features:
    """The main process writes, the others wait; what it raises, all raise."""
    def make() -> Features:
        return collect(net, source, recipe, folder=folder, limit_bytes=limit_bytes, device=accelerator.device)

    fault: Exception | None = None
    made: Features | None = None
    if accelerator.is_main_process:
        try:
            made = make()
        except (Refused, DataError) as error:
            fault = error
    said = _from_main(accelerator, None if fault is None else (isinstance(fault, Refused), str(fault)))
    if fault is not None:
        raise fault
    if said is not None:
        raise (Refused if said[0] else DataError)(said[1])
    return made or make()


def _from_main(accelerator: Any, value: Any) -> Any:
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def drop_features(folder: Path) -> None:
    """After the last step: gigabytes that only a resumed run would read."""
    for name in ("features", "validation"):
        shutil.rmtree(folder / name, ignore_errors=True)


@contextmanager
def show_progress(wanted: bool, steps: int, done: int) -> Iterator[Callable[[str], None]]:
    """A function that moves the bar by one step, on standard error; silent where that is no terminal."""
    if not wanted or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=steps, completed=done)
        yield lambda text: bar.update(task, advance=1, description=text)

"""Networks of several widths: what ``--widths`` and ``--keep`` make of a network, its training, one width as a file."""

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import Tensor, nn

from offramp._specs import near
from offramp.cli.say import note
from offramp.errors import OfframpError, WidthError
from offramp.graph import sites
from offramp.graph.channels import ChannelPlan, channels
from offramp.nn.multiexit import MultiExit
from offramp.nn.sizes import sizes_of
from offramp.nn.slim import Slimmable, slim_, slim_plan
from offramp.nn.widths import narrow_exits
from offramp.table import write_atomic
from offramp.train import recipes
from offramp.train.history import History
from offramp.train.loop import fit
from offramp.train.recipe import Recipe

if TYPE_CHECKING:
    from offramp.cli.folder import Run

__all__ = ["LOADING", "narrow_run", "packed", "plan_json", "plan_of", "slimmed", "train_widths"]

LOADING = """\
import json, torch, safetensors
# model: what {spec} makes, with any weights
with safetensors.safe_open({out!r}, "pt") as file:
    for path, sizes in json.loads(file.metadata()["sizes"]).items():
        vars(model.get_submodule(path)).update(sizes)
    for name in file.keys():
        owner, _, key = name.rpartition(".")
        held = vars(model.get_submodule(owner))
        if key in held["_parameters"]:
            held["_parameters"][key] = torch.nn.Parameter(file.get_tensor(name))
        else:
            held["_buffers"][key] = file.get_tensor(name)"""
"""How a narrow network's file becomes a network, without offramp."""


def keeping(keep: Sequence[str], network: nn.Module) -> Callable[[str, nn.Module], bool]:
    """False for layers of the network whose names begin with one of these; heads behind it are never kept."""
    names = [name for name, _ in network.named_modules() if name]
    for prefix in keep:
        if not any(name.startswith(prefix) for name in names):
            raise OfframpError(expected="the beginning of a layer's name", got=repr(prefix), where="--keep",
                               todo=near(prefix, names))
    return lambda path, module: not path.startswith(tuple(keep))


def plan_of(network: nn.Module, inputs: Any, keep: Sequence[str], within: str | None) -> ChannelPlan:
    """Which channels of a network belong together; it is left as found."""
    guest = network.get_submodule(within) if within else network
    where = keeping(keep, guest)
    try:
        if within is None:
            return slim_plan(network, example_inputs=inputs, where=where)
        return channels(sites(network, inputs, within=within).traced, where=where)
    except WidthError as error:
        raise _told(error) from error


def plan_json(plan: ChannelPlan, widths: Sequence[float]) -> list[dict[str, Any]]:
    """A channel plan's spaces: how many channels each width keeps, and why where all of them stay."""
    return [{"channels": one.size * one.channels, "layers": one.layers, "why_fixed": one.why,
             "kept": {f"{width:g}": plan.kept(k, width) * one.channels for width in widths}}
            for k, one in enumerate(plan.spaces)]


def slimmed(net: MultiExit, widths: Sequence[float], keep: Sequence[str]) -> Slimmable:
    """A network with exits, or none but its end, made slimmable in place."""
    guest = keeping(keep, net.backbone)
    args, kwargs = net.traced.example()

    def where(path: str, module: nn.Module) -> bool:
        owner, _, name = path.partition(".")
        return owner != "backbone" or guest(name, module)

    try:
        return slim_(net, widths, example_inputs=kwargs or args, where=where)
    except WidthError as error:
        raise _told(error) from error


def train_widths(run: "Run", net: Slimmable, recipe: Recipe, data: Any, **how: Any) -> History:
    """Train the network at all its widths, then its exits, frozen, on what each width's own end says.

    The exits learn without labels in as many epochs, and hang on the network afterwards: SlimSeg trains none.
    """
    exits = net.backbone
    assert isinstance(exits, MultiExit), "Run.attach makes it of one"
    made = run.manifest
    guest = copy.deepcopy(run.backbone.get_submodule(made.within or ""))
    plain = slim_(guest, net.widths, example_inputs=net.example, where=keeping(made.keep, guest))
    history = fit(plain, data, recipe, run_dir=run.path / "train", **how)
    exits.backbone.load_state_dict(plain.backbone.state_dict())
    if exits.sites:
        heads = recipes.label_free(epochs=recipe.epochs, seed=recipe.seed)
        fit(net, data, heads, run_dir=run.path / "train" / "exits", **how)
    if how.get("progress"):
        note(f"widths, in the last epoch:\n{history}")
    return history


def narrow_run(run: "Run", width: float, out: Path) -> dict[str, Any]:
    """Write the run's network at one width, without its exits, as safetensors; ``LOADING`` reads it back.

    Beside the weights, in the file's metadata, are the layers' sizes that differ from the wide network's.
    """
    net = run.net
    if not isinstance(net, Slimmable):
        raise OfframpError(expected="a run of a network with widths", got="one without", where=str(run.path),
                           todo="make one: offramp train MODEL --data DATA --out RUN --widths 0.25,0.5,0.75,1")
    made, whole = (narrow_exits(net, one).backbone for one in (width, 1.0))
    wide = sizes_of(whole)
    sizes = {path: {name: value for name, value in one["attributes"].items()
                    if value != wide[path]["attributes"][name]} for path, one in sizes_of(made).items()}
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}  # tied ones apart, as the format asks
    metadata = {"sizes": json.dumps({path: one for path, one in sizes.items() if one}), "width": f"{width:g}"}
    write_atomic(out, packed(state, metadata))
    count = {name: sum(p.numel() for p in one.parameters()) for name, one in (("parameters", made), ("of", whole))}
    return {"out": str(out), "width": width, **count,
            "loading": LOADING.format(out=str(out), spec=run.manifest.model)}


def packed(state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A state dict as a safetensors file."""
    data: bytes = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in state.items()}, metadata)
    return data


def _told(error: WidthError) -> WidthError:
    """The same for somebody at a command line."""
    flag = re.compile(r"where=lambda path, module: (\.\.\.|not path\.startswith\(\.\.\.\))(, False)?")
    todo = flag.sub("--keep PREFIX", error.todo)
    todo = todo.replace("'backbone.", "'")
    return WidthError(expected=error.expected, got=error.got, where="--widths", todo=todo)

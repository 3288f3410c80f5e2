"""The run folder: what one verb leaves and the next one reads.

    run.json                the manifest: network, data, exits, recipe, and the commands that made it
    heads.safetensors       the trained exits (network.safetensors: all of it, where the recipe trained all of it, of
                            several widths those of all; and backbone.safetensors: the network alone, at full width, for
                            MODEL?weights= of a second training)
    train/                  checkpoint and log, to go on after a stop
    tables/SPLIT.json       what every exit said on a split, with its safetensors beside it
    plan.json, bench.json, report.html
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from offramp.choose.plan import load_plan
from offramp.cli.masks import masked, to_its_end
from offramp.cli.widths import packed, slimmed
from offramp.data import Source, load_data
from offramp.errors import FileFormatError, OfframpError
from offramp.models import load_model
from offramp.nn.attach import attach
from offramp.nn.guest import fingerprint_of
from offramp.nn.masked import Masked
from offramp.nn.multiexit import MultiExit
from offramp.nn.shortcut import spec_from_json
from offramp.nn.slim import Slimmable
from offramp.nn.widths import exits_of
from offramp.table import ExitTable, write_atomic
from offramp.table.files import read_json
from offramp.types import Plan

__all__ = ["Manifest", "Run", "example", "inside", "probe"]

_FORMAT, _VERSION = "offramp.run", 1


@dataclass(kw_only=True)
class Manifest:
    """run.json."""

    model: str
    data: str
    exits: list[str] = field(default_factory=list)
    """Names of the sites."""
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Site -> head's name -> its spec as JSON."""
    notes: list[str] = field(default_factory=list)
    """Which heads of a space were left out, and why."""
    shape: list[int] = field(default_factory=list)
    """Of one input, (C, H, W)."""
    within: str | None = None
    widths: list[float] = field(default_factory=list)
    """Rising, 1.0 the last; none of a network that is not slimmable."""
    keep: list[str] = field(default_factory=list)
    """How the names of layers begin that stay at full width."""
    mask: dict[str, Any] = field(default_factory=dict)
    """Which pixels an exit settles, as ``mask_`` takes it; empty of a network without masks."""
    recipe: dict[str, Any] = field(default_factory=dict)
    backbone: str = ""
    """Fingerprint of the untouched network."""
    whole: bool = False
    """Whether the recipe trained the backbone too."""
    trained: bool = False
    commands: list[str] = field(default_factory=list)


class Run:
    """A run folder, opened."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    # ---- opening and saving ---------------------------------------------------------------------------------------

    @staticmethod
    def open(path: Path) -> "Run":
        """An existing run folder; OfframpError says what is missing and which verb makes it."""
        page = path / "run.json"
        if not page.is_file():
            raise OfframpError(expected=f"a run folder at {path}", got="no run.json there", where="offramp",
                               todo=f"make one: offramp train MODEL --data DATA --out {path}")
        record = read_json(page, format=_FORMAT, version=_VERSION)
        try:
            return Run(path, Manifest(**{k: v for k, v in record.items() if k not in ("format", "version")}))
        except TypeError as error:
            raise FileFormatError(expected="a whole run.json", got=f"{page}: {error}", where="offramp") from error

    def save(self, command: str = "") -> None:
        """Write run.json, whole or not at all."""
        if command and command not in self.manifest.commands:
            self.manifest.commands.append(command)
        page = {"format": _FORMAT, "version": _VERSION, **asdict(self.manifest)}
        write_atomic(self.path / "run.json", json.dumps(page, indent=1) + "\n")

    # ---- what it holds --------------------------------------------------------------------------------------------

    @cached_property
    def source(self) -> Source:
        """The data, with its splits."""
        return load_data(self.manifest.data)

    @cached_property
    def backbone(self) -> nn.Module:
        """The user's network: the one that the run was made with, unless the run holds all weights itself."""
        made, model = self.manifest, load_model(self.manifest.model)
        guest = model.get_submodule(made.within) if made.within else model
        kept = made.whole and made.trained
        if made.backbone and not kept and fingerprint_of(guest) != made.backbone:
            raise OfframpError(
                expected=f"the network that this run was made with ({self.manifest.backbone})",
                got=f"other weights ({fingerprint_of(guest)})", where=self.manifest.model,
                todo="give weights by a file (?weights=net.safetensors): random ones differ in each process.",
            )
        return model

    def attach(self, exits: Any = None, heads: Any = None) -> MultiExit | Slimmable | Masked:
        """The network with untrained exits, those of the manifest or new ones; slimmable or masked where it is."""
        made, restored = self.manifest, exits is None
        if restored:
            exits = made.exits
            heads = {site: {name: spec_from_json(spec) for name, spec in each.items()}
                     for site, each in made.heads.items()}
        # what is made slimmable or masked is a copy: the network that the run was made with is asked for again
        changed = made.widths or made.mask
        guest, inputs = copy.deepcopy(self.backbone) if changed else self.backbone, example(made.shape)
        torch.manual_seed(0)  # initial heads are part of what a seed promises
        net = attach(guest, inputs, exits=exits, heads=heads, within=made.within,
                     keep_costly=restored or bool(made.mask))  # what masks save pays for exits
        net.notes = tuple(made.notes) if restored else net.notes
        if made.mask:
            return masked(net, made.mask, None if restored else inputs[:1])
        return slimmed(net, made.widths, made.keep) if made.widths else net

    @property
    def exits(self) -> MultiExit:
        """The network with its trained exits, of several widths at the one that is set, of a masked one as it is."""
        return inside(self.net)

    @cached_property
    def net(self) -> MultiExit | Slimmable | Masked:
        """The network with its trained exits, at all its widths, or with its masks."""
        if not self.manifest.trained:
            raise OfframpError(expected="trained exits", got="none yet", where=str(self.path),
                               todo="run offramp train again with the same arguments; it goes on where it stopped.")
        net = self.attach()
        whole = self.manifest.whole
        path = self.path / ("network.safetensors" if whole else "heads.safetensors")
        tensors = read_tensors(path)
        try:
            (net if whole else inside(net).heads).load_state_dict(tensors)
        except RuntimeError as error:
            raise FileFormatError(expected="the heads of this run", got=f"others: {str(error).splitlines()[0]}",
                                  where=str(path), todo="train again with --again.") from error
        return net.eval()

    def keep(self, net: MultiExit | Slimmable | Masked) -> None:
        """Save trained exits, and the network where it was trained too."""
        whole = self.manifest.whole
        trained = (net if whole else inside(net).heads).state_dict()
        write_atomic(self.path / ("network.safetensors" if whole else "heads.safetensors"), packed(trained))
        if whole:
            alone = self.backbone.state_dict()
            if not isinstance(net, MultiExit):  # made of a copy; tensors of other widths have other names
                prefix = f"{self.manifest.within}." if self.manifest.within else ""
                own = {f"{prefix}{name}": t for name, t in inside(net).backbone.state_dict().items()}
                alone = {name: own.get(name, tensor) for name, tensor in alone.items()}
            write_atomic(self.path / "backbone.safetensors", packed(alone))

    def table(self, split: str) -> ExitTable:
        """What was recorded on a split; OfframpError when nothing was."""
        page = self.path / "tables" / f"{split}.json"
        if not page.is_file():
            raise OfframpError(expected=f"a table of the split {split!r}", got=f"no {page}", where="offramp",
                               todo=f"record it: offramp record {self.path} --split {split}")
        return ExitTable.load(page)

    def plan(self) -> Plan:
        """The plan that was searched; of a masked network without one, to its end."""
        page = self.path / "plan.json"
        if self.manifest.mask and not page.is_file():
            return to_its_end()
        if not page.is_file():
            raise OfframpError(expected="a plan", got=f"no {page}", where="offramp",
                               todo=f"search one: offramp search {self.path} --max-drop 0.01")
        return load_plan(page)

    def bench(self) -> Mapping[str, Any]:
        """Measured clocks; empty where none were taken."""
        page = self.path / "bench.json"
        return read_json(page, format="offramp.bench", version=1) if page.is_file() else {}


def inside(net: MultiExit | Slimmable | Masked) -> MultiExit:
    """The network that can be stepped through."""
    return net.net if isinstance(net, Masked) else exits_of(net)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file, or one sentence on why not."""
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
        return tensors
    except FileNotFoundError as error:
        raise FileFormatError(expected=f"a file {path}", got="none", where="offramp", todo="train again.") from error
    except Exception as error:  # safetensors raises its own and others for damaged headers
        raise FileFormatError(expected="an undamaged safetensors file", got=f"{path}: {error}", where="offramp",
                              todo="train again with --again.") from error


def example(shape: Any, rows: int = 2) -> Tensor:
    """Two inputs of that shape, always the same."""
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))


def probe(model: nn.Module, inputs: Tensor, what: str) -> Any:
    """Run the untouched network once, and say in one sentence when the data does not fit it."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            return model.eval()(inputs)
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
        raise OfframpError(
            expected="inputs that the network takes", where=what,
            got=f"{tuple(inputs.shape)}, at which it says: {str(error).strip().splitlines()[0][:300]}",
            todo="bring the data to the network's size (DATA?size=HEIGHTxWIDTH), or check the network.",
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode

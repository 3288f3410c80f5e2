"""offramp makes a pretrained PyTorch network leave early: exits, thresholds and a report, at a loss that you state.

    net   = offramp.attach(backbone, example_inputs, exits=4)
    offramp.fit(net, loader, offramp.recipes.label_free())
    table = offramp.record(net, calibration_loader)
    plan  = offramp.search(table, max_drop=0.01)
    fast  = net.deploy(plan)

Every public name is loaded when it is first asked for, so that ``import offramp`` costs next to nothing.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from offramp import policies
    from offramp.choose.calibrate import calibrate
    from offramp.choose.compare import Comparison, compare
    from offramp.choose.guarantee import guarantee
    from offramp.choose.plan import load_plan, save_plan
    from offramp.choose.replay import replay
    from offramp.choose.schedule import schedule
    from offramp.choose.search import search, search_front
    from offramp.data import load_data
    from offramp.deployed import load_deployed, save_deployed
    from offramp.devices import place
    from offramp.errors import OfframpError
    from offramp.graph import sites
    from offramp.models import load_model
    from offramp.nn.attach import attach
    from offramp.nn.heads import HeadSpec
    from offramp.nn.masked import mask_
    from offramp.nn.mess import MessSpec, mess_space
    from offramp.nn.multiexit import MultiExit
    from offramp.nn.redesigned import RedesignedSpec, redesigned
    from offramp.nn.shortcut import ShortcutSpec
    from offramp.nn.slim import slim_, slim_plan
    from offramp.nn.tune import tune_
    from offramp.policies.thresholds import Thresholds
    from offramp.record import record
    from offramp.runtime import Adaptive, deploy
    from offramp.runtime.bench import bench
    from offramp.table import Costs, ExitTable, Latency
    from offramp.train import recipes
    from offramp.train.loop import fit
    from offramp.train.recipe import Recipe
    from offramp.types import Evidence, ExitColumn, ExitSite, Plan, Policy
    from offramp.walks import walk

_FROM = {
    "Adaptive": "offramp.runtime", "Comparison": "offramp.choose.compare", "Costs": "offramp.table",
    "Evidence": "offramp.types", "ExitColumn": "offramp.types",
    "ExitSite": "offramp.types", "ExitTable": "offramp.table", "HeadSpec": "offramp.nn.heads",
    "Latency": "offramp.table", "MessSpec": "offramp.nn.mess", "MultiExit": "offramp.nn.multiexit",
    "OfframpError": "offramp.errors", "Plan": "offramp.types", "Policy": "offramp.types",
    "Recipe": "offramp.train.recipe", "RedesignedSpec": "offramp.nn.redesigned",
    "ShortcutSpec": "offramp.nn.shortcut", "Thresholds": "offramp.policies.thresholds",
    "attach": "offramp.nn.attach", "bench": "offramp.runtime.bench", "calibrate": "offramp.choose.calibrate",
    "compare": "offramp.choose.compare",
    "deploy": "offramp.runtime", "fit": "offramp.train.loop", "guarantee": "offramp.choose.guarantee",
    "load_data": "offramp.data", "load_deployed": "offramp.deployed", "load_model": "offramp.models",
    "load_plan": "offramp.choose.plan",
    "mask_": "offramp.nn.masked", "mess_space": "offramp.nn.mess", "place": "offramp.devices",
    "policies": "offramp.policies", "recipes": "offramp.train.recipes",
    "record": "offramp.record", "redesigned": "offramp.nn.redesigned", "replay": "offramp.choose.replay",
    "save_deployed": "offramp.deployed", "save_plan": "offramp.choose.plan", "schedule": "offramp.choose.schedule",
    "search": "offramp.choose.search",
    "search_front": "offramp.choose.search",
    "sites": "offramp.graph", "slim_": "offramp.nn.slim", "slim_plan": "offramp.nn.slim", "tune_": "offramp.nn.tune",
    "walk": "offramp.walks",
}

__all__ = [
    "Adaptive", "Comparison", "Costs", "Evidence", "ExitColumn", "ExitSite", "ExitTable", "HeadSpec", "Latency",
    "MessSpec", "MultiExit", "OfframpError", "Plan", "Policy", "Recipe", "RedesignedSpec", "ShortcutSpec", "Thresholds",
    "attach", "bench", "calibrate", "compare", "deploy", "fit", "guarantee", "load_data", "load_deployed", "load_model",
    "load_plan", "mask_", "mess_space", "place", "policies", "recipes", "record", "redesigned", "replay",
    "save_deployed", "save_plan", "schedule", "search", "search_front", "sites", "slim_", "slim_plan", "tune_",
    "walk",
]
_MODULES = {"policies", "recipes"}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}")
    module = importlib.import_module(_FROM[name])
    value = module if name in _MODULES else getattr(module, name)
    if name in _HUNG:
        _hang(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_DRAWN = {"svg": "offramp.report.comparison:draw_comparison", "html": "offramp.report.comparison:render_comparison"}
_NET = {"deploy": "offramp.runtime:deploy", "part": "offramp.deployed:part", "rest": "offramp.deployed:rest"}
_HUNG = {"MultiExit": ("offramp.nn.multiexit:MultiExit", _NET), "attach": ("offramp.nn.multiexit:MultiExit", _NET),
         "slim_": ("offramp.nn.slim:Slimmable", {"deploy": _NET["deploy"]}),
         "mask_": ("offramp.nn.masked:Masked", {"deploy": "offramp.sparse:deploy"}),
         "Comparison": ("offramp.choose.compare:Comparison", _DRAWN),
         "compare": ("offramp.choose.compare:Comparison", _DRAWN)}
"""Public name -> a class that it brings, and the methods of it that live in rooms above: only the roof joins them."""


def _hang(name: str) -> None:
    """``net.deploy(plan)`` and its like."""
    owner, methods = _HUNG[name]
    kind = _fetch(owner)
    for method, where in methods.items():
        if not hasattr(kind, method):
            def call(self: Any, /, *args: Any, _where: str = where, **kwargs: Any) -> Any:
                return _fetch(_where)(self, *args, **kwargs)

            call.__doc__ = f"See :func:`{where.replace(':', '.')}`."
            setattr(kind, method, call)


def _fetch(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


class _Package(ModuleType):
    """``offramp.record`` is the function, though a module has that name too: importing the module must not hide it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "record" and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

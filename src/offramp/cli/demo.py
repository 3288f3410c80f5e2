"""The whole job on the built-in scenes: a network of one's own, then exits without labels, plan, clock, report."""

import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from offramp.cli.bench import bench_run
from offramp.cli.folder import Run, example
from offramp.cli.judge import report_run
from offramp.cli.say import note
from offramp.cli.work import first_shape, make_recipe, record_run, search_run, start, train_run
from offramp.data import load_data
from offramp.models import load_model
from offramp.nn.attach import attach
from offramp.table import write_atomic
from offramp.train.loop import fit
from offramp.train.recipe import Recipe

__all__ = ["demo_run"]

MODEL = "offramp:scenes_dense"


def demo_run(
    out: Path, *, seed: int = 0, quick: bool = False, again: bool = False, quiet: bool = False, command: str = "",
) -> tuple[Path, dict[str, Any]]:
    """Everything is under ``out``; what is there already from the same settings is not done again."""
    started = time.perf_counter()
    data = f"scenes?n={24 if quick else 600}&size={'48x64' if quick else '96x128'}&seed={seed}"
    weights = out / "backbone.safetensors"
    if again or not weights.is_file():
        _say(quiet, "1/6  a network of one's own: training a small segmenter on labelled scenes")
        _pretrain(weights, data, epochs=1 if quick else 14, seed=seed, quiet=quiet)
    recipe = make_recipe("label_free", epochs=1 if quick else 12, batch_size=16, seed=seed)
    run = start(out, model=f"{MODEL}?weights={weights}", data=data, exits=2 if quick else 3, heads="shortcut",
                within=None, recipe=recipe,
                again=again, command=command)
    _say(quiet, "2/6  exits: trained on what the frozen network itself says, no label is read")
    train_run(run, recipe, quiet=quiet)
    _say(quiet, "3/6  memoising what every exit says on calibration and test")
    record_run(run, ("calibration", "test"), batches=(1,), quiet=quiet)
    _say(quiet, "4/6  searching exits and thresholds for a loss of at most one point")
    plan = search_run(run, options={"max_drop": 0.01, "minimise": "latency_ms"})
    _say(quiet, "5/6  timing it beside the untouched network")
    bench = bench_run(run, batches=(1, 16), repeats=5 if quick else 30, budget_s=4 if quick else 30, quiet=quiet)
    _say(quiet, "6/6  the report")
    page, report = report_run(Run.open(out), command=command, quiet=quiet)
    seconds = time.perf_counter() - started
    _say(quiet, f"{report.saved:.1%} fewer MACs at {100 * report.drop:.2f} points of {report.quality}, on images that "
                f"nothing was fitted on; {seconds:.0f} s in all")
    return page, {"report": str(page), "seconds": seconds, "saved_macs": report.saved, "drop": report.drop,
                  "drop_interval": report.drop_interval, "exits": plan.exits, "bench": bench["rows"]}


def _pretrain(path: Path, data: str, *, epochs: int, seed: int, quiet: bool) -> None:
    """The user's pretrained network, which the demo has to make for itself."""
    torch.manual_seed(seed)
    source = load_data(data)
    network = load_model(MODEL)
    split = source.split("train")
    net = attach(network, example(first_shape(split)), exits=1)
    recipe = Recipe(loss="labels", freeze=False, weights=(0.0, 1.0), epochs=epochs, batch_size=16, lr=3e-3, clip=1.0,
                    weight_decay=0.02, seed=seed)
    fit(net, split, recipe, run_dir=path.parent / "pretrain", progress=not quiet)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    write_atomic(path, safetensors.torch.save(state))


def _say(quiet: bool, words: str) -> None:
    if not quiet:
        note(words)



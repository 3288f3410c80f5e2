"""The report verb: gathers what the run folder holds, runs a few images for their maps, and writes one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from offramp.cli.folder import Run, example, probe
from offramp.cli.say import Steps
from offramp.cli.walks import walks_of
from offramp.cost import macs
from offramp.functional.edges import semantic_edges, smooth_edges
from offramp.functional.metrics import accuracy, confusion, mean_iou
from offramp.models import load_model
from offramp.nn.boundary import running_at
from offramp.nn.guest import evaluating
from offramp.nn.masked import Masked
from offramp.nn.output import read_logits
from offramp.report import DenseExample, Point, Report, gather, render, write
from offramp.report.curve import TOLERANCES

__all__ = ["dense_examples", "report_run", "static_point"]


def report_run(
    run: Run, *, out: Path | None = None, fitted_on: str = "calibration", test: str = "test",
    static: Sequence[str] = (), command: str = "", quiet: bool = False, examples: int = 4,
) -> tuple[Path, Report]:
    """Write the page; its path, and the figures on it."""
    plan, table = run.plan(), run.table(test)
    source = run.source
    split = source.split(test)
    points = [static_point(one, run, test, quiet=quiet) for one in static]
    made = run.manifest
    commands = list(dict.fromkeys([*made.commands, command]))
    about = {"model": made.model, "data": made.data, "recipe": f"{made.recipe.get('data', {}).get('loss')} loss",
             "command": "\n".join(filter(None, commands))}
    # a dense search weighs matrices: fewer points keep the report within a minute
    tolerances = TOLERANCES if table.task == "classify" else TOLERANCES[1:10:2]
    report = gather(fitted_on=run.table(fitted_on), test=table, plan=plan, bench=run.bench(), static=points,
                    about=about, tolerances=tolerances)
    maps = dense_examples(run, report, split, examples) if table.task == "dense" else []
    walks = []
    if maps and (made.mask or plan.setting == "anytime"):  # all exits speak, and when is what this is about
        walks = walks_of(run, split, {i: f"#{i}" for i in (*report.last, *report.first)[:2]}, quiet=quiet)
    page = write(out or run.path / "report.html",
                 render(report, dataset=split, dense=maps, walks=walks, title="offramp report"))
    return page, report


def dense_examples(run: Run, report: Report, split: Any, count: int) -> list[DenseExample]:
    """One image of each exit that was used, the surest first, then more of the hardest."""
    left = report.realised.exit_index
    wanted: list[int] = []
    for k in range(len(report.plan.exits)):
        rows = (left == k).nonzero().flatten().tolist()
        wanted += sorted(rows, key=lambda i: report.scores[i, k])[len(rows) // 2:][:1]
    wanted = list(dict.fromkeys([*wanted, *report.last]))[:count]
    columns, found = [*report.realised.columns], []
    net = run.net
    exits, widths = run.exits, run.manifest.widths or [1.0]
    strides = [column.stride for column in report.test.columns]
    with evaluating(net):
        for i in wanted:
            sample = split[i]
            image, label = sample if isinstance(sample, tuple | list) else (sample, None)
            said: list[Tensor] = []
            ends: dict[float, Tensor] = {}
            if isinstance(net, Masked):
                said += net.answers(image[None]).logits
            for width in widths:
                with running_at(width, net):
                    said += exits(image[None])[-1:] if isinstance(net, Masked) else exits(image[None])
                ends[width] = said[-1].argmax(1)[0]
            probs = torch.cat([said[c].float().softmax(1) for c in columns])
            labels, sure = probs.argmax(1), probs.amax(1)
            smoothed = [smooth_edges(sure[e:e + 1], semantic_edges(labels[e:e + 1], strides[c]), strides[c])
                        for e, c in enumerate(columns)]
            found.append(DenseExample(
                name=f"#{i}", image=split.read(i)[0], label=label, predictions=labels, confidences=sure,
                smoothed=torch.cat(smoothed), left_at=int(left[i]),
                ends=ends if len(ends) > 1 else {},
            ))
    return found


def static_point(spec: str, run: Run, test: str, *, quiet: bool = False) -> Point:
    """Another network on the same split: its quality, and what it costs."""
    model = load_model(spec)
    split = run.source.split(test)
    inputs = example(run.manifest.shape, rows=1)
    probe(model, inputs, spec)
    said, truth = [], []
    with evaluating(model):
        cost = macs.count(model, inputs).total
        for images, labels in Steps(DataLoader(split, batch_size=32), f"measuring {spec}", quiet=quiet):
            said.append(read_logits(model(images)).argmax(1))
            truth.append(labels)
    predictions, labels = torch.cat(said), torch.cat(truth)
    quality = accuracy(predictions, labels) if predictions.ndim == 1 else float(
        mean_iou(confusion(predictions, labels, run.exits.num_classes).sum(0)))
    return Point(name=spec, macs=float(cost), quality=quality)

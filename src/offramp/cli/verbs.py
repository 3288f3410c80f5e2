"""The verbs and their flags; what they do is in the modules beside this one, loaded when a verb runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.flags import (
    Again,
    Against,
    Batches,
    BatchSize,
    Boundary,
    Confidence,
    Confidences,
    Data,
    Device,
    Epochs,
    Exits,
    Folder,
    HeadKind,
    Keep,
    LatencyBatch,
    Mask,
    MaskFrom,
    MaxDrop,
    MaxExits,
    Minimise,
    Model,
    Out,
    Precision,
    Rate,
    RecipeName,
    Seed,
    Threshold,
    Tolerance,
    TrainSplit,
    Widths,
    Within,
    read_confidences,
    read_mask,
    read_numbers,
    read_options,
    read_widths,
    refuse_beside,
)
from offramp.cli.say import Debug, Json, command_line, fail, result, summary, verb

if TYPE_CHECKING:
    from offramp.cli.folder import Run
    from offramp.types import Plan

__all__ = ["app", "main"]

EPILOG = (
    "MODEL: torchvision:resnet50?weights=DEFAULT, timm:hrnet_w18, smp:Unet?encoder_name=resnet18, "
    "offramp:cifar_resnet56, or package.module:callable. "
    "DATA: imagefolder:PATH, cifar10:PATH, camvid:PATH, cityscapes:PATH, voc:PATH, coco:PATH, scenes, or "
    "package.module:callable."
)
app = typer.Typer(
    name="offramp", no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Make a pretrained network leave early: exits, thresholds and a report, at a loss that you state.\n\n"
         "[b]In one go:[/b] offramp adapt MODEL --data DATA --out run, then offramp bench run, offramp report run\n\n"
         "[b]Step by step:[/b] train, record, search, bench, report, run", epilog=EPILOG,
)


@app.command(epilog="offramp sites torchvision:resnet50 --shape 3x224x224\n\n" + EPILOG)
@verb
def sites(
    model: Model,
    data: Annotated[str | None, typer.Option("--data", help="Take the input's shape from this data.")] = None,
    shape: Annotated[str, typer.Option(help="Or give it: CHANNELSxHEIGHTxWIDTH.")] = "3x224x224", within: Within = None,
    widths: Widths = None, keep: Keep = None, as_json: Json = False, debug: Debug = False,
) -> None:
    """List the places where a network can be cut: what is live there, MACs before and after, may the batch shrink.

    With --widths: which of its channels belong together, and how many of them each width keeps; nothing is changed.
    """
    import json

    from offramp.cli.folder import example, probe
    from offramp.cli.widths import plan_json, plan_of
    from offramp.cli.work import open_model
    from offramp.data import load_data
    from offramp.graph import sites as sites_of
    from offramp.models import load_model

    if data is not None:
        source = load_data(data)
        network, size = open_model(model, source, source.splits[0])
    else:
        size = read_numbers(shape, "x", "--shape")
        network = load_model(model)
        probe(network, example(size), model)
    if shares := read_widths(widths):
        plan = plan_of(network, example(size), keep or (), within)
        result({"model": model, "channels": plan_json(plan, shares)}, plan.table(shares), as_json=as_json)
        return
    found = sites_of(network, example(size), within=within)
    result({"model": model, "sites": json.loads(found.to_json())}, str(found), as_json=as_json)


@app.command(epilog="offramp train offramp:cifar_resnet56?weights=net.pth --data cifar10:data/cifar10 --out run\n\n"
                    + EPILOG)
@verb
def train(
    model: Model, data: Data, out: Out, exits: Exits = "4", heads: HeadKind = "small",
    recipe: RecipeName = None, epochs: Epochs = None, lr: Rate = None, seed: Seed = 0,
    train_split: TrainSplit = None, within: Within = None, widths: Widths = None, keep: Keep = None,
    boundary: Boundary = None, mask: Mask = None, threshold: Threshold = None, mask_from: MaskFrom = None,
    device: Device = None, precision: Precision = None, again: Again = False, as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Cut a network, hang exits on the cuts and train them; makes the run folder. Goes on after a stop.

    With --widths the network learns to run with a share of its channels, too: [b]offramp train MODEL --data DATA --out
    run --widths 0.25,0.5,1 --epochs 20[/b]. With --mask it goes on only at pixels of which it is not sure:
    [b]--mask top --exits ends --heads redesigned --epochs 20[/b] for offramp:hrnet_w18_small?num_classes=11 on scenes.
    """
    run = _train(model, data, out, exits, heads, recipe, epochs, lr, seed, train_split, within, widths, keep, boundary,
                 (mask, threshold, mask_from), device, precision, again, as_json)
    made = run.manifest
    words = [f"exits at {', '.join(made.exits)}"] if made.exits else []
    words += [f"widths {', '.join(f'{width:g}' for width in made.widths)}"] if made.widths else []
    words += [f"masks by {made.mask['confidence']} from {made.mask['threshold']:g}"] if made.mask else []
    result({"run": str(out), "exits": made.exits, "widths": made.widths, "mask": made.mask},
           f"{out}: {'; '.join(words)}\nnext: offramp record {out}", as_json=as_json)


@app.command(epilog="offramp record run --batches 1,32")
@verb
def record(
    run: Folder, split: Annotated[str, typer.Option(help="Splits to record, with commas.")] = "calibration,test",
    batches: Batches = "1", batch_size: BatchSize = 32, confidences: Confidences = None, device: Device = None,
    again: Again = False, as_json: Json = False, debug: Debug = False,
) -> None:
    """Memoise what every exit says on a split, and what it costs; search and report read nothing else."""
    from offramp.cli.folder import Run
    from offramp.cli.work import record_run

    kept = read_confidences(confidences, "--confidences")
    opened = Run.open(run)
    opened.save(command_line())
    tables = record_run(opened, split.split(","), batches=read_numbers(batches, ",", "--batches"),
                        batch_size=batch_size, confidences=kept, device=device, again=again, quiet=as_json)
    counts = {name: len(table) for name, table in tables.items()}
    words = "\n".join(f"{run}/tables/{name}.json: {count} samples" for name, count in counts.items())
    result({"run": str(run), "tables": counts}, f"{words}\nnext: offramp search {run} --max-drop 0.01", as_json=as_json)


@app.command(epilog="offramp search run --max-drop 0.01 --minimise latency_ms")
@verb
def search(
    run: Folder, max_drop: Annotated[float | None, typer.Option(help="Loss to tolerate, a fraction; 0.01 where no "
                                                                "other goal for quality is set.")] = None,
    minimise: Minimise = "macs", tolerance: Tolerance = "auto", confidence: Confidence = "top",
    max_exits: MaxExits = None, against: Against = "auto", latency_batch: LatencyBatch = 1,
    setting: Annotated[str | None, typer.Option(help="input_dependent, budgeted (a static sub-model with one exit) or "
                                                "anytime (exits that refine until a deadline); input_dependent unless "
                                                "given, and of a network with masks budgeted.")] = None,
    min_miou: Annotated[float | None, typer.Option(help="Least mIoU, a fraction.")] = None,
    max_macs: Annotated[float | None, typer.Option(help="Most MACs a sample.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Most milliseconds a sample.")] = None,
    max_bytes: Annotated[float | None, typer.Option(help="Most bytes, parameters and peak together.")] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds, then the best plan so far and the gap.")] = 60.0,
    front: Annotated[bool, typer.Option("--front", help="Print the whole front of cost and quality; keeps no plan.")
                     ] = False,
    by: Annotated[str | None, typer.Option(help="Fit a policy to a --budget instead: a name as in compare; stopping "
                                           "unless given.")] = None,
    budget: Annotated[str | None, typer.Option(help="The mean a sample that --by may spend: 0.6x of the untouched "
                                               "network, 25ms, or 3.5e8 MACs.")] = None,
    guarantee: Annotated[float | None, typer.Option(metavar="CONFIDENCE", help="Promise --max-drop, --budget or both "
                                                    "for samples to come, with this confidence, such as 0.95.")] = None,
    as_json: Json = False, debug: Debug = False,
) -> None:
    """Choose exits and thresholds on the calibration split: the best plan within the limits that you state.

    Or fit a policy to a mean budget: [b]offramp search run --by stopping --budget 0.6x[/b]. Or ask for a promise:
    [b]offramp search run --max-drop 0.01 --guarantee 0.95[/b].
    """
    from offramp.cli.folder import Run
    from offramp.cli.masks import setting_of
    from offramp.cli.work import front_run, search_run

    if by is not None or budget is not None or guarantee is not None:
        from offramp.cli.budgets import schedule_run

        refuse_beside({
            "--tolerance": tolerance != "auto", "--confidence": confidence != "top", "--max-exits": max_exits,
            "--setting": setting, "--min-miou": min_miou, "--max-macs": max_macs,
            "--max-latency-ms": max_latency_ms, "--max-bytes": max_bytes, "--front": front,
            "--minimise": minimise not in ("macs", "latency_ms")})
        read_options(max_drop, minimise, tolerance, confidence, max_exits, against, latency_batch)
        _searched(run, schedule_run(
            Run.open(run), by=by, budget=budget, max_drop=max_drop, confidence=guarantee, unit=minimise,
            batch=latency_batch, against=against, command=command_line(), quiet=as_json), as_json)
        return
    options = read_options(max_drop, minimise, tolerance, confidence, max_exits, against, latency_batch)
    opened = Run.open(run)
    options |= {"setting": setting_of(opened.manifest.mask, setting), "min_miou": min_miou, "max_macs": max_macs,
                "max_latency_ms": max_latency_ms, "max_bytes": max_bytes, "time_limit_s": time_limit}
    if front:
        plans = front_run(opened, options=options, quiet=as_json)
        lines = [f"{float(one.predicted[minimise]):12.6g} {minimise}  quality "
                 f"{float(one.predicted['quality_asked']):.4f}  {', '.join(one.exits) or 'no exit'}" for one in plans]
        result({"run": str(run), "front": [{"exits": one.exits, "predicted": one.predicted,
                                            "certificate": one.certificate} for one in plans]}, "\n".join(lines),
               as_json=as_json)
        return
    _searched(run, search_run(opened, options=options, command=command_line(), quiet=as_json), as_json)


@app.command(epilog="offramp compare run --by stopping,eenet,msdnet --budgets 0.5x,0.6x,0.8x")
@verb
def compare(
    run: Folder, by: Annotated[str, typer.Option(help="Of stopping, eenet, msdnet, branchynet, pabee, pcee, mamlstop, "
                                                 "gati, threshold, topk; with commas.")] = "stopping,eenet,msdnet",
    budgets: Annotated[str, typer.Option(help="Means a sample: 0.6x of the untouched network, or plain numbers.")]
    = "0.5x,0.6x,0.7x,0.8x",
    unit: Annotated[str, typer.Option(help="macs or latency_ms.")] = "macs", latency_batch: LatencyBatch = 1,
    as_json: Json = False, debug: Debug = False,
) -> None:
    """Hold policies against each other: fitted on calibration, judged on test, with limits and controls."""
    from offramp.cli.budgets import compare_run
    from offramp.cli.folder import Run

    found = compare_run(Run.open(run), by=by, budgets=budgets, unit=unit, batch=latency_batch, quiet=as_json)
    page = run / "comparison.html"
    result({"run": str(run), "page": str(page), **found.to_json()}, f"{found.table()}\n{page}", as_json=as_json)


@app.command(epilog="offramp adapt torchvision:resnet18?weights=net.pth --data imagefolder:photos --out run "
                    "--max-drop 0.01\n\n" + EPILOG)
@verb
def adapt(
    model: Model, data: Data, out: Out, max_drop: MaxDrop = 0.01, exits: Exits = "4", heads: HeadKind = "small",
    recipe: RecipeName = None, epochs: Epochs = None, lr: Rate = None, seed: Seed = 0,
    train_split: TrainSplit = None, within: Within = None, widths: Widths = None, keep: Keep = None,
    boundary: Boundary = None, mask: Mask = None, threshold: Threshold = None, mask_from: MaskFrom = None,
    minimise: Minimise = "macs", tolerance: Tolerance = "auto", confidence: Confidence = "top",
    max_exits: MaxExits = None, against: Against = "auto", latency_batch: LatencyBatch = 1, batches: Batches = "1",
    batch_size: BatchSize = 32, confidences: Confidences = None, device: Device = None, precision: Precision = None,
    again: Again = False, as_json: Json = False, debug: Debug = False,
) -> None:
    """Train, record and search in one go: from a pretrained network and images to a plan."""
    from offramp.cli.work import record_run, search_run

    options = read_options(max_drop, minimise, tolerance, confidence, max_exits, against, latency_batch)
    options |= {"setting": "budgeted"} if mask else {}
    kept = read_confidences(confidences, "--confidences")
    run = _train(model, data, out, exits, heads, recipe, epochs, lr, seed, train_split, within, widths, keep, boundary,
                 (mask, threshold, mask_from), device, precision, again, as_json)
    splits = [one for one in ("calibration", "test") if one in run.source.splits]
    record_run(run, splits, batches=read_numbers(batches, ",", "--batches"), batch_size=batch_size, confidences=kept,
               device=device, quiet=as_json)
    _searched(out, search_run(run, options=options, command=command_line(), quiet=as_json), as_json)


@app.command(epilog="offramp run --model run photos/ --out answers/")
@verb
def run(
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of them.", show_default=False)],
    model: Annotated[Path, typer.Option("--model", metavar="RUN", help="The run folder of an adapted network.")],
    out: Annotated[Path, typer.Option(help="A .csv or .json file, or a folder.")], batch_size: BatchSize = 16,
    engine: Annotated[str, typer.Option(help="eager or compile.")] = "eager", device: Device = None,
    deadline_ms: Annotated[float | None, typer.Option(min=0, help="Milliseconds for each batch: the best answer by "
                                                                  "then; with --batch-size 1, for each image.")] = None,
    overlays: Annotated[bool, typer.Option(help="Dense networks: write each image under its labels' colours.")] = True,
    walks: Annotated[int, typer.Option(min=0, metavar="N", help="Dense networks: draw what every exit says of the "
                                       "first N images, and when, as walks.html and walks/STEM.png and .gif.")] = 0,
    as_json: Json = False, debug: Debug = False,
) -> None:
    """Answer for images with the adapted network: class, confidence, exit; dense networks write label PNGs, overlays.

    Label PNGs hold class numbers under the data's palette, at each image's own size. An image that breaks while it is
    read is named at the end, with exit code 2; all others are answered.
    """
    from offramp.cli.folder import Run
    from offramp.cli.predict import predict_run

    done = predict_run(Run.open(model), images, out, batch_size=batch_size, engine=engine, device=device,
                       deadline_ms=deadline_ms, overlays=overlays, walks=walks, quiet=as_json)
    left = ", ".join(f"{name} {count}" for name, count in done["exits"].items())
    result(done, f"{done['out']}: {done['images']} images; answered at {left}"
           + (f"; {done['missed']} of {done['deadlines']} deadlines missed" if "deadlines" in done else "")
           + (f"\n{done['walks']}" if "walks" in done else ""), as_json=as_json)


@app.command(epilog="offramp bench run --batches 1,32")
@verb
def bench(
    run: Folder, batches: Batches = "1,32", repeats: Annotated[int, typer.Option(min=3)] = 40,
    engine: Annotated[str, typer.Option(help="eager or compile.")] = "eager",
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; the network's own unless given.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds to spend at most.")] = 60.0, device: Device = None,
    as_json: Json = False, debug: Debug = False,
) -> None:
    """Time the adapted network beside the untouched one and a static one of about equal cost, on the test split."""
    from offramp.cli.bench import bench_run
    from offramp.cli.folder import Run

    opened = Run.open(run)
    page = bench_run(opened, batches=read_numbers(batches, ",", "--batches"), repeats=repeats, engine=engine,
                     dtype=dtype, device=device, budget_s=budget, quiet=as_json)
    opened.save(command_line())
    lines = [f"{'network':32} {'batch':>5} {'p50 ms':>9} {'p95 ms':>9} {'per second':>11}"]
    lines += [f"{row['network'][:32]:32} {row['batch']:5d} {row['p50_ms']:9.3g} {row['p95_ms']:9.3g} "
              f"{row['throughput_per_s']:11.4g}" for row in page["rows"]]
    result({"run": str(run), **page}, "\n".join([*lines, *([page["note"]] if page["note"] else [])]), as_json=as_json)


@app.command(epilog="offramp report run --static torchvision:resnet18?weights=small.pth")
@verb
def report(
    run: Folder, out: Annotated[Path | None, typer.Option(help="Where to; RUN/report.html unless given.")] = None,
    split: Annotated[str, typer.Option(help="The split to report on.")] = "test",
    static: Annotated[list[str] | None, typer.Option(metavar="MODEL", help="Another network to stand beside.")] = None,
    as_json: Json = False, debug: Debug = False,
) -> None:
    """Write one HTML page that opens anywhere: the curve, who leaves where, calibration, clocks, and its origins."""
    from offramp.cli.folder import Run
    from offramp.cli.judge import report_run

    page, found = report_run(Run.open(run), out=out, test=split, static=static or (), command=command_line(),
                             quiet=as_json)
    result({"report": str(page), "saved_macs": found.saved, "drop": found.drop, "drop_interval": found.drop_interval,
            "warnings": found.warnings}, str(page), as_json=as_json)


@app.command(epilog="offramp narrow run --width 0.5 --out net.safetensors")
@verb
def narrow(
    run: Folder, width: Annotated[float, typer.Option(help="One of the run's widths.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    as_json: Json = False, debug: Debug = False,
) -> None:
    """Write the network at one of its widths, without exits, as a file of its own, and say how to load it.

    The file holds the small weights and how many channels each layer has; loading it needs the network's own code, not
    offramp.
    """
    from offramp.cli.folder import Run
    from offramp.cli.widths import narrow_run

    done = narrow_run(Run.open(run), width, out)
    share = done["parameters"] / done["of"]
    result(done, f"{out}: {done['parameters']} parameters, {share:.1%} of those at full width; to load it:\n\n"
           f"{done['loading']}", as_json=as_json)


@app.command(epilog="offramp demo --out runs/demo")
@verb
def demo(
    out: Annotated[Path, typer.Option(metavar="RUN")] = Path("runs/demo"), seed: Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny run that shows the way, not the gain.")] = False,
    again: Again = False, as_json: Json = False, debug: Debug = False,
) -> None:
    """The whole job on built-in street scenes, no download: train a network, adapt it, time it, report on it."""
    from offramp.cli.demo import demo_run

    page, figures = demo_run(out, seed=seed, quick=quick, again=again, quiet=as_json, command=command_line())
    result(figures, f"report: {page}", as_json=as_json)


def _train(
    model: str, data: str, out: Path, exits: str, heads: str, recipe: str | None, epochs: int | None, lr: float | None,
    seed: int, train_split: str | None, within: str | None, widths: str | None, keep: list[str] | None,
    boundary: str | None, mask: tuple[str | None, float | None, int | None], device: str | None,
    precision: str | None, again: bool, quiet: bool,
) -> "Run":
    from offramp.cli.work import make_recipe, start, train_run

    if precision not in (None, "bf16"):
        fail(f"--precision: expected bf16 or nothing, but got {precision!r}.")
    places: Any = int(exits) if exits.isdigit() else [one.strip() for one in exits.split(",")]
    shares, rule = read_widths(widths), read_mask(*mask)
    habit = "slim" if shares else "anytime" if rule else "label_free"
    made = make_recipe(recipe or habit, epochs=epochs, lr=lr, seed=seed, boundary=boundary, mask_from=mask[2],
                       exits=places if isinstance(places, int) else len(places))
    run = start(out, model=model, data=data, exits=places, heads=heads, within=within, recipe=made, again=again,
                command=command_line(), widths=shares, keep=keep or (), mask=rule)
    train_run(run, made, split=train_split, device=device, precision=precision, quiet=quiet)
    return run


def _searched(run: Path, plan: "Plan", as_json: bool) -> None:
    result({"run": str(run), "exits": plan.exits, "predicted": plan.predicted, "notes": plan.notes,
            "certificate": plan.certificate},
           f"{summary(plan)}\nnext: offramp bench {run}; offramp report {run}", as_json=as_json)


def main() -> None:
    """``offramp``."""
    app()



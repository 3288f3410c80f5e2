"""Flags that several verbs share, and how what stands behind them is read."""

from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.cli.say import fail

__all__ = [
    "Again", "Against", "BatchSize", "Batches", "Boundary", "Confidence", "Confidences", "Data", "Device", "Epochs",
    "Exits", "Folder", "HeadKind", "Keep", "LatencyBatch", "Mask", "MaskFrom", "MaxDrop", "MaxExits", "Minimise",
    "Model", "Out", "Precision", "Rate", "RecipeName", "Seed", "Threshold", "Tolerance", "TrainSplit", "Widths",
    "Within", "read_confidences", "read_mask", "read_numbers", "read_options", "read_widths", "refuse_beside",
]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The network; see below.", show_default=False)]
Folder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]
Data = Annotated[str, typer.Option("--data", metavar="DATA", help="The data; see below.")]
Out = Annotated[Path, typer.Option("--out", metavar="RUN", help="The run folder to make or go on with.")]
Exits = Annotated[str, typer.Option(help="How many exits, or the names of their sites, with commas; ends, for those "
                                    "that the network names itself (offramp:hrnet_w18); 0, of a network with widths, "
                                    "for none but its end.")]
Within = Annotated[str | None, typer.Option(help="Cut this submodule instead of the whole network.")]
HeadKind = Annotated[str, typer.Option("--heads", help="small (new layers, sized by the site), shortcut (the network's "
                                       "own tail, most blocks left out; stronger on residual networks) or mess (dense "
                                       "networks: 64 candidates a site, for the search to choose from). redesigned, "
                                       "or redesigned:CHANNELS, is for networks with masks: an earlier exit sees more "
                                       "around.")]
RecipeName = Annotated[str | None, typer.Option(
    "--recipe", help="label_free (no labels, frozen network), unless given. All others need labels, and --epochs but "
                     "for joint and eenet: joint, eenet (deeper exits weigh more, and teach in the end), exit_aware "
                     "(one exit a step) and final_only (no exit) train the whole network, which is kept as "
                     "RUN/backbone.safetensors; mess, frozen, kd and self_distill train exits on a frozen one, mess "
                     "best on that of exit_aware. slim, the one of --widths, trains the network at all of them, then "
                     "exits on what each width says. anytime, the one of --mask, trains a dense network and all exits, "
                     "masks on.")]
Widths = Annotated[str | None, typer.Option(metavar="SHARES", help="Make the network slimmable: the shares of its "
                                            "channels that it can run with, such as 0.25,0.5,0.75,1.")]
Keep = Annotated[list[str] | None, typer.Option(metavar="PREFIX", help="With --widths: keep the layers whose names "
                                                "begin so at full width, such as decoder; repeatable.")]
Boundary = Annotated[str | None, typer.Option(metavar="MODULE", help="Recipe slim, dense networks: while training, "
                                              "tell classes' boundaries from this module's output, of a ResNet layer1.")
                     ]
Mask = Annotated[str | None, typer.Option(metavar="CONFIDENCE", help="Dense networks: go on only at pixels of which "
                                          "the exit before is not sure by top, margin or entropy.")]
Threshold = Annotated[float | None, typer.Option(help="With --mask: how sure settles a pixel; 0.998 for top.")]
MaskFrom = Annotated[int | None, typer.Option(metavar="EPOCH", min=0, help="With --mask: train without masks before.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Passes over the data; for label_free, joint and eenet the "
                                            "recipe's own unless given.")]
Rate = Annotated[float | None, typer.Option("--lr", help="Learning rate; the recipe's own unless given.")]
Seed = Annotated[int, typer.Option(help="Everything random follows from it.")]
TrainSplit = Annotated[str | None, typer.Option(help="Splits to train on, such as train+unlabelled.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")]
Precision = Annotated[str | None, typer.Option(help="bf16 trains in mixed precision.")]
Again = Annotated[bool, typer.Option("--again", help="Begin anew instead of going on.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
Batches = Annotated[str, typer.Option(help="Batch sizes to time, with commas.")]
MaxDrop = Annotated[float, typer.Option(help="Loss to tolerate, a fraction: 0.01 is one point.")]
Minimise = Annotated[str, typer.Option(help="macs, latency_ms, peak_bytes, param_bytes or drop (the best quality).")]
Tolerance = Annotated[str, typer.Option(help="joint spends the loss where it saves most; halving, even share it out; "
                                        "exact proves the optimum; auto chooses between exact and joint.")]
Confidence = Annotated[str, typer.Option(help="top, margin or entropy; dense also top_edges or entropy_edges; "
                                         "several with commas, for the exact search to choose.")]
Confidences = Annotated[str | None, typer.Option(help="Dense: whose histograms to keep, with commas: top, margin, "
                                                 "entropy, top_edges, entropy_edges. All unless given; of networks "
                                                 "with more than 16 exits only top.")]
MaxExits = Annotated[int | None, typer.Option(min=0, help="Use at most so many exits.")]
Against = Annotated[str, typer.Option(help="What the loss is measured against: auto, labels or backbone.")]
LatencyBatch = Annotated[int, typer.Option("--latency-batch", help="Batch size at which latency_ms is meant.")]


def read_options(max_drop: float | None, minimise: str, tolerance: str, confidence: str, max_exits: int | None,
                 against: str, batch: int) -> dict[str, Any]:
    """The arguments of ``search``."""
    allowed = {
        "--minimise": (minimise, ("macs", "latency_ms", "peak_bytes", "param_bytes", "drop")),
        "--tolerance": (tolerance, ("auto", "joint", "halving", "even", "exact")),
        "--against": (against, ("auto", "labels", "backbone")),
    }
    for flag, (value, known) in allowed.items():
        if value not in known:
            fail(f"{flag}: expected {', '.join(known)}, but got {value!r}.")
    names = read_confidences(confidence, "--confidence") or [confidence]
    return {"max_drop": max_drop, "minimise": minimise, "tolerance": None if tolerance == "auto" else tolerance,
            "confidence": names if len(names) > 1 else confidence,
            "max_exits": max_exits, "against": against, "batch": batch}


def refuse_beside(given: dict[str, Any]) -> None:
    """Refuse what --by, --budget and --guarantee would pass over."""
    if wrong := [flag for flag, value in given.items() if value is not None and value is not False]:
        fail(f"{', '.join(wrong)}: expected without --by, --budget and --guarantee, which fit a policy instead of "
             "searching; --minimise macs or latency_ms says what is spent.")


def read_confidences(text: str | None, flag: str) -> list[str] | None:
    """Their names; nothing where none are asked for."""
    from offramp.types import CONFIDENCES, EDGED

    names = None if text is None else text.split(",")
    for name in names or ():
        if name not in (known := (*CONFIDENCES, *EDGED)):
            fail(f"{flag}: expected {', '.join(known)}, but got {name!r}.")
    return names


def read_widths(text: str | None) -> list[float]:
    """Shares of the channels, rising, 1.0 the last; none where none are asked for."""
    if text is None:
        return []
    try:
        found = sorted({float(one) for one in text.split(",")})
    except ValueError:
        found = []
    if len(found) < 2 or found[0] <= 0 or found[-1] != 1:
        fail(f"--widths: expected 1 and smaller shares, such as 0.25,0.5,0.75,1, but got {text!r}.")
    return found


def read_mask(confidence: str | None, threshold: float | None, mask_from: int | None) -> dict[str, Any]:
    """The rule of the masks; nothing where there are none."""
    if confidence is None:
        flags = {"--threshold": threshold, "--mask-from": mask_from}
        if given := [flag for flag, value in flags.items() if value is not None]:
            fail(f"{', '.join(given)}: expected with --mask, such as --mask top.")
        return {}
    if confidence not in ("top", "margin", "entropy"):
        fail(f"--mask: expected top, margin or entropy, but got {confidence!r}.")
    if threshold is None and confidence != "top":
        fail(f"--mask {confidence}: expected --threshold, from which on a pixel is settled, but got none.")
    return {"confidence": confidence, "threshold": 0.998 if threshold is None else threshold}


def read_numbers(text: str, mark: str, flag: str) -> list[int]:
    """Whole numbers with a mark between them."""
    try:
        found = [int(one) for one in text.lower().split(mark)]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        fail(f"{flag}: expected whole numbers such as {mark.join(['1', '32'])}, but got {text!r}.")
    return found

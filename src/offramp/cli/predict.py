"""The run verb: answers for a folder of images, from the deployed network."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader

from offramp.cli.folder import Run
from offramp.cli.say import Steps
from offramp.data import FileSplit
from offramp.data.files import IMAGE_SUFFIXES, image_files
from offramp.errors import DataError
from offramp.nn.output import read_logits
from offramp.runtime import deploy
from offramp.table import write_atomic

__all__ = ["images_of", "predict_run"]


def images_of(paths: list[Path], run: Run) -> FileSplit:
    """Image files and folders as one split, prepared as the run's data is; DataError names what cannot be used."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(expected="an image or a folder of images", got=f"no such path {path}", where="offramp run",
                            todo="check the path.")
        files += image_files(path, deep=True) if path.is_dir() else [path]
    if not files:
        raise DataError(expected=f"images ({', '.join(sorted(IMAGE_SUFFIXES))})", where="offramp run",
                        got=f"none in {', '.join(map(str, paths))}", todo="name a folder that has some.")
    height, width = run.manifest.shape[1:]
    source = run.source
    base = Path(paths[0]) if len(paths) == 1 and paths[0].is_dir() else Path("/")
    return FileSplit([one.resolve() for one in files], root=base.resolve(), source="images", split="unlabelled",
                     task=source.task, class_names=source.class_names,
                     prepare=replace(source.prepare, size=(height, width), augment=None))


def predict_run(
    run: Run, paths: list[Path], out: Path, *, batch_size: int = 16, engine: Any = "eager",
    device: str | None = None, quiet: bool = False,
) -> dict[str, Any]:
    """Predict, and write ``out``: a .csv or .json file, or a folder (dense: with a PNG of classes an image)."""
    data, net, plan = images_of(paths, run), run.net, run.plan()
    where = torch.device(device or "cpu")
    fast = deploy(net.to(where), plan, engine=engine).to(where)
    names, dense = run.source.class_names, net.task == "dense"
    exits = [*plan.exits, "final"]
    folder = out if not out.suffix else out.parent
    rows: list[dict[str, Any]] = []
    for images in Steps(DataLoader(data, batch_size=batch_size), f"predicting {len(data)} images", quiet=quiet):
        logits = read_logits(fast(images.to(where))).float().cpu()
        _refuse_nan(logits, data, len(rows))
        probs = logits.softmax(1)
        for sure, said, left in zip(*probs.max(1), fast.last_exits.tolist(), strict=True):
            file, name = data.files[len(rows)], data.names[len(rows)]
            row: dict[str, Any] = {"file": name, "exit": exits[left], "confidence": round(float(sure.mean()), 6)}
            if dense:
                row["labels"] = f"{Path(name).with_suffix('').as_posix().replace('/', '__')}.png"
                write_atomic(folder / row["labels"], _label_png(said, file))
            else:
                row |= {"class": int(said), "class_name": names[int(said)] if names else ""}
            rows.append(row)
    target = out if out.suffix else out / "predictions.csv"
    if target.suffix == ".json":
        write_atomic(target, json.dumps({"exits": exits, "predictions": rows}, indent=1) + "\n")
    else:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(target, text.getvalue())
    counts = {name: sum(row["exit"] == name for row in rows) for name in exits}
    return {"images": len(rows), "out": str(target), "exits": counts}


def _refuse_nan(logits: torch.Tensor, data: FileSplit, start: int) -> None:
    bad = ~torch.isfinite(logits).flatten(1).all(1)
    if bool(bad.any()):
        raise DataError(expected="finite logits", got="NaN or infinity", todo="look at that image, and at the weights.",
                        where=data.names[start + int(bad.nonzero()[0])])


def _label_png(labels: torch.Tensor, file: Path) -> bytes:
    """Class numbers as grey values, at the size of the image."""
    with Image.open(file) as picture:
        size = picture.height, picture.width
    full = F.interpolate(labels[None, None].float(), size=size, mode="nearest")[0, 0]
    buffer = io.BytesIO()
    Image.fromarray(full.numpy().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()

"""The run verb: answers for a folder of images, from the deployed network. K classes, H W an image's own size."""

import csv
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from offramp.cli.folder import Run
from offramp.cli.masks import Until, deployed
from offramp.cli.say import Steps
from offramp.cli.walks import require_dense, walks_of, write_walks
from offramp.data import FileSplit
from offramp.data.base import Faults
from offramp.data.files import IMAGE_SUFFIXES, UNREADABLE, image_files
from offramp.errors import DataError
from offramp.nn.output import read_logits
from offramp.report.pictures import Bytes, colours
from offramp.runtime import Adaptive
from offramp.table import write_atomic

__all__ = ["images_of", "predict_run"]

_LARGEST = 1 << 26
"""Logits of one image at its own size, in numbers: 256 MiB. Beyond it labels are enlarged instead."""


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
    run: Run, paths: list[Path], out: Path, *, batch_size: int = 16, engine: Any = "eager", device: str | None = None,
    deadline_ms: float | None = None, overlays: bool = True, walks: int = 0, quiet: bool = False,
) -> dict[str, Any]:
    """Predict, and write ``out``: a .csv or .json file, or a folder for one.

    Dense: beside it STEM.png for each image, classes as palette indices at the image's own size (logits enlarged
    bilinearly, then the largest taken), and overlays/STEM.jpg. deadline_ms: for each batch, the last answer by then.
    walks: of so many images, what every exit says and when: walks/STEM.png, walks/STEM.gif and walks.html.

    DataError where images cannot be used. Files that are no images are found before anything is written; images that
    break while they are read are named at the end, and all others are answered.
    """
    if walks:
        require_dense(run)
    data, net, exits_net, plan = images_of(paths, run), run.net, run.exits, run.plan()
    where = torch.device(device or "cpu")
    fast, exits = deployed(net, plan, engine=engine, device=where)
    names, dense = run.source.class_names, exits_net.task == "dense"
    folder = out if not out.suffix else out.parent
    pictures = _picture_names(data, folder) if dense else []
    palette = colours(exits_net.num_classes, run.source.palette)
    faults = Faults("offramp run", "images that can be read; the others are answered", UNREADABLE)
    rows: list[dict[str, Any]] = []
    answered: list[int] = []
    loader = DataLoader(_Readable(data), batch_size=batch_size, collate_fn=list)
    for batch in Steps(loader, f"predicting {len(data)} images", quiet=quiet):
        for i, why in (one for one in batch if isinstance(one[1], str)):
            faults.add(data.names[i], why)
        good = [one for one in batch if isinstance(one[1], Tensor)]
        if not good:
            continue
        indices = [i for i, _ in good]
        answered += indices
        images = torch.stack([image for _, image in good]).to(where)
        if deadline_ms is not None and (plan.setting == "anytime" or isinstance(fast, Until)) and not rows:
            fast.calibrate(images)  # a deadline is kept by what is known of the clock
        output, left, timed = _answers(fast, images, deadline_ms)
        logits = read_logits(output).float().cpu()
        _refuse_nan(logits, [data.names[i] for i in indices])
        sure = logits.softmax(1).amax(1)
        for k, i in enumerate(indices):
            row: dict[str, Any] = {"file": data.names[i], "exit": exits[left[k]],
                                   "confidence": round(float(sure[k].mean()), 6)}
            row |= timed
            if dense:
                row |= _write_pictures(logits[k], data.files[i], folder, pictures[i], palette, overlays)
            else:
                said = int(logits[k].argmax())
                row |= {"class": said, "class_name": names[said] if names else ""}
            rows.append(row)
    target = out if out.suffix else out / "predictions.csv"
    if target.suffix == ".json":
        told = {"exits": exits, "class_names": list(names), "predictions": rows}
        write_atomic(target, json.dumps(told, indent=1) + "\n")
    elif rows:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(target, text.getvalue())
    page: dict[str, Any] = {}
    if shown := answered[:walks]:
        made = walks_of(run, data, {i: data.names[i] for i in shown}, engine=engine, device=device, quiet=quiet)
        page = {"walks": str(write_walks(made, [pictures[i] for i in shown], folder, run.source.palette))}
    faults.raise_if_any()
    counts = {name: sum(row["exit"] == name for row in rows) for name in exits}
    if fast.deadlines.calls:
        page |= {"deadlines": fast.deadlines.calls, "missed": fast.deadlines.missed}
    return {"images": len(rows), "out": str(target), "exits": counts, "setting": plan.setting, **page}


class _Readable(Dataset[Any]):
    """(index, image), or (index, why it cannot be read)."""

    def __init__(self, data: FileSplit) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.data[index]  # type: ignore[return-value]
        except DataError as error:
            return index, error.got


def _answers(fast: Adaptive | Until, images: Tensor, deadline_ms: float | None
             ) -> tuple[Any, list[int], dict[str, Any]]:
    """The output, each row's exit, and where time is bounded what is said of it."""
    if deadline_ms is None and isinstance(fast, Adaptive):
        return fast(images), fast.last_exits.tolist(), {}
    last = fast.predict(images, deadline_ms=deadline_ms)
    timed = {"ms": round(last.elapsed_ms, 3), "late": last.late}
    return last.output, last.exits.tolist(), {} if deadline_ms is None else timed


def _picture_names(data: FileSplit, folder: Path) -> list[str]:
    """One name an image: its stem, folders joined, with the suffix where two images differ by that alone."""
    plain = [Path(name).with_suffix("").as_posix().replace("/", "__") for name in data.names]
    twice = {one for one, count in Counter(plain).items() if count > 1}
    made = [f"{one}-{file.suffix[1:]}" if one in twice else one for one, file in zip(plain, data.files, strict=True)]
    inputs = set(data.files)
    if clash := [one for one in made if (folder / f"{one}.png").resolve() in inputs]:
        raise DataError(expected="another folder than that of the images", got=f"{folder}, where {clash[0]}.png is one",
                        where="--out", todo="choose another --out: labels would replace the images.")
    return made


def _refuse_nan(logits: Tensor, names: list[str]) -> None:
    bad = ~torch.isfinite(logits).flatten(1).all(1)
    if bool(bad.any()):
        raise DataError(expected="finite logits", got="NaN or infinity", todo="look at that image, and at the weights.",
                        where=names[int(bad.nonzero()[0])])


def _write_pictures(logits: Tensor, file: Path, folder: Path, name: str, palette: Bytes, overlay: bool
                    ) -> dict[str, str]:
    """Labels as a palette PNG (above 256 classes as numbers of 16 bits), and the image under their colours (K, 3)."""
    with Image.open(file) as picture:
        photo = picture.convert("RGB")
    size = photo.height, photo.width
    if logits.shape[0] * size[0] * size[1] <= _LARGEST:
        labels = F.interpolate(logits[None], size=size, mode="bilinear")[0].argmax(0)
    else:
        labels = F.interpolate(logits.argmax(0)[None, None].float(), size=size, mode="nearest-exact")[0, 0]
    said = labels.numpy().astype(np.uint16)
    if logits.shape[0] <= 256:
        labelled = Image.fromarray(said.astype(np.uint8), "P")
        labelled.putpalette(palette.flatten().tolist())
    else:
        labelled = Image.fromarray(said)
    write_atomic(folder / f"{name}.png", _encoded(labelled, "PNG"))
    if not overlay:
        return {"labels": f"{name}.png"}
    mixed = Image.blend(photo, Image.fromarray(palette[said]), 0.5)
    write_atomic(folder / "overlays" / f"{name}.jpg", _encoded(mixed, "JPEG"))
    return {"labels": f"{name}.png", "overlay": f"overlays/{name}.jpg"}


def _encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=90)
    return buffer.getvalue()

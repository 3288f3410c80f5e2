"""What every exit says of a few images, as pictures: for the run verb and for the report."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from offramp.cli.folder import Run
from offramp.cli.say import Steps
from offramp.errors import OfframpError
from offramp.nn.masked import Masked
from offramp.report import Walk, gif, png, render_walks, write
from offramp.runtime import deploy
from offramp.sparse import deploy as deploy_masked
from offramp.walks import walk

__all__ = ["require_dense", "walks_of", "write_walks"]


def require_dense(run: Run) -> None:
    """OfframpError where there are no pixels to show."""
    if run.exits.task != "dense":
        raise OfframpError(expected="a network that labels pixels", got=f"one for {run.exits.task}", where="--walks")


def walks_of(run: Run, split: Any, names: Mapping[int, str], *, engine: Any = "eager", device: str | None = None,
             quiet: bool = False) -> list[Walk]:
    """Of those rows of a split, all exits of the plan whatever its policy, timed here one image at a time.

    Of a masked network all that it has, with their masks.
    """
    require_dense(run)
    where = torch.device(device or "cpu")
    net: Any = run.net.to(where)
    timed = None
    if isinstance(net, Masked):
        timed = deploy_masked(net, engine=engine).anytime
    else:
        net = deploy(net, replace(run.plan(), setting="anytime"), engine=engine).to(where)
    found = []
    for i in Steps(list(names), f"timing every exit on {len(names)} images", quiet=quiet):
        sample = split[i]
        image, label = sample if isinstance(sample, tuple | list) else (sample, None)
        found.append(walk(net, image[None].to(where), timed=timed, label=label, image=split.read(i)[0], name=names[i],
                          class_names=run.source.class_names))
    return found


def write_walks(walks: Sequence[Walk], stems: Sequence[str], folder: Path, palette: Any) -> Path:
    """walks/STEM.png and walks/STEM.gif of each, and walks.html with all of them."""
    for one, stem in zip(walks, stems, strict=True):
        png(one, folder / "walks" / f"{stem}.png", palette)
        gif(one, folder / "walks" / f"{stem}.gif", palette)
    return write(folder / "walks.html", render_walks(walks, palette))

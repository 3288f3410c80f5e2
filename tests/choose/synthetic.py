"""Tables made by program: exits that grow surer and better with depth, as a trained network's do."""

from typing import Any

import numpy as np
import torch

from offramp.functional.metrics import confusion
from offramp.functional.summaries import agreement, summarise
from offramp.table import Costs, ExitTable, Latency
from offramp.types import ExitColumn


def costs_of(exits: int, *, latency: bool = True, head: int = 30) -> Costs:
    """``exits`` early ones and the end at 1000 macs."""
    macs = [round(1000 * (e + 1) / (exits + 1)) for e in range(exits)] + [1000]
    columns = exits + 1
    times = tuple(
        Latency(device="cpu", engine="eager", dtype="float32", batch=batch,
                backbone_p50_ms=tuple(0.01 * m * batch**0.9 for m in macs),
                backbone_p95_ms=tuple(0.012 * m * batch**0.9 for m in macs),
                head_p50_ms=(*(0.5 * batch**0.5,) * exits, 0.0), head_p95_ms=(*(0.6 * batch**0.5,) * exits, 0.0),
                dense_p50_ms=10.0 * batch**0.9, dense_p95_ms=12.0 * batch**0.9)
        for batch in (1, 32)
    )
    return Costs(macs=macs, head_macs=[head] * exits + [0], param_bytes=[4 * m for m in macs],
                 head_param_bytes=[40] * exits + [0], peak_bytes=[100] * columns, latency=times if latency else ())


def columns_of(exits: int) -> tuple[ExitColumn, ...]:
    return (*(ExitColumn(name=f"block{e}", site=f"block{e}") for e in range(exits)),
            ExitColumn(name="final", site="final"))


def classify(samples: int = 400, exits: int = 3, classes: int = 5, *, seed: int = 0, labels: bool = True,
             skill: tuple[float, float] = (1.0, 3.0), **more: Any) -> ExitTable:
    """Logits = skill * truth - a sample's difficulty + noise that neighbouring exits share."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, classes, samples)
    skills = np.linspace(*skill, exits + 1)
    ease = draw.gamma(2.0, 0.8, samples)
    noise = draw.normal(size=(samples, exits + 1, classes))
    for e in range(1, exits + 1):
        noise[:, e] = 0.7 * noise[:, e - 1] + 0.714 * noise[:, e]
    logits = noise.copy()
    logits[np.arange(samples), :, truth] += skills * ease[:, None]
    given: dict[str, Any] = {
        "task": "classify", "columns": columns_of(exits), "costs": costs_of(exits), "split": "calibration",
        "fingerprints": {"model": "m0", "data": "d0", "split": f"s{seed}"},
        "labels": torch.from_numpy(truth) if labels else None,
        "logits": torch.from_numpy(logits * 1.5).float(), **more,
    }
    return ExitTable(**given)


def pixels(samples: int = 40, exits: int = 2, classes: int = 4, side: int = 12, *, seed: int = 0,
           skill: tuple[float, float] = (1.0, 3.0)) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel logits (N, E, K, H, W) of exits that grow better with depth, and labels (N, H, W) with ignored pixels."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, classes, (samples, side, side))
    truth[:, : side // 2] = np.sort(truth[:, : side // 2], axis=1)
    ease = draw.gamma(2.0, 0.8, (samples, 1, 1)) * draw.gamma(4.0, 0.25, (samples, side, side))
    logits = draw.normal(size=(samples, exits + 1, classes, side, side))
    for e in range(1, exits + 1):
        logits[:, e] = 0.7 * logits[:, e - 1] + 0.714 * logits[:, e]
    for e, skilled in enumerate(np.linspace(*skill, exits + 1)):
        np.put_along_axis(logits[:, e], truth[:, None],
                          np.take_along_axis(logits[:, e], truth[:, None], 1) + skilled * ease[:, None], 1)
    labels = torch.from_numpy(truth)
    labels[:, 0, 0] = 255
    return torch.from_numpy(logits * 1.5).float(), labels


def dense(samples: int = 40, exits: int = 2, classes: int = 4, *, seed: int = 0, labels: bool = True,
          **more: Any) -> ExitTable:
    """A dense table filled by the same functions that the bridge uses."""
    logits, truth = pixels(samples, exits, classes, seed=seed)
    summaries = [summarise(logits[:, e]) for e in range(exits + 1)]
    given: dict[str, Any] = {
        "task": "dense", "columns": columns_of(exits), "costs": costs_of(exits), "split": "calibration",
        "fingerprints": {"model": "m0", "data": "d0", "split": f"s{seed}"},
        "confusion": torch.stack([confusion(one.labels, truth, classes) for one in summaries], 1) if labels else None,
        "agreement_confusion": torch.stack(
            [confusion(one.labels, summaries[-1].labels, classes) for one in summaries], 1),
        "histograms": {name: torch.stack([one.histograms[name] for one in summaries], 1)
                       for name in ("top", "margin", "entropy")},
        "probs": torch.stack([one.probs for one in summaries], 1),
        "agreement": torch.stack(
            [torch.stack([agreement(one.labels, other.labels) for other in summaries], 1) for one in summaries], 1),
        **more,
    }
    return ExitTable(**given)

"""Tables of an imagined network whose exits grow surer and more often right with depth."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from offramp.table import Costs, ExitTable, Latency
from offramp.types import CONFIDENCES, ExitColumn

EXITS = ("layer1.2", "layer2.1", "layer3.0", "final")


def costs(exits: int = 4) -> Costs:
    steps = range(1, exits + 1)
    macs = tuple(40_000_000 * k for k in steps)
    heads = (*(1_000_000 for _ in range(exits - 1)), 0)
    latency = tuple(
        Latency(
            device="cpu", engine="eager", dtype="float32", batch=batch,
            backbone_p50_ms=tuple(1.0 * k * scale for k in steps),
            backbone_p95_ms=tuple(1.2 * k * scale for k in steps),
            head_p50_ms=(*(0.05 * scale for _ in range(exits - 1)), 0.0),
            head_p95_ms=(*(0.06 * scale for _ in range(exits - 1)), 0.0), dense_p50_ms=4.0 * scale,
            dense_p95_ms=4.4 * scale,
        ) for batch, scale in ((1, 1.0), (32, 20.0))
    )
    return Costs(macs=macs, head_macs=heads, param_bytes=macs, head_param_bytes=heads, peak_bytes=macs, latency=latency)


def classify(n: int = 300, classes: int = 5, *, split: str = "test", seed: int = 0, labels: bool = True) -> ExitTable:
    draw = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (n,), generator=draw)
    hard = torch.rand(n, generator=draw) * 4
    logits = torch.randn(n, 4, classes, generator=draw) * 1.2
    for e in range(4):
        logits[torch.arange(n), e, truth] += (4.5 + 1.4 * e - 1.5 * hard).clamp(min=0.2)
    return ExitTable(
        task="classify", columns=columns(), costs=costs(), split=split, fingerprints=marks(split, seed),
        labels=truth if labels else None, logits=logits, class_names=tuple("abcdefghij"[:classes]),
    )


def dense(n: int = 60, classes: int = 4, *, split: str = "test", seed: int = 0, labels: bool = True) -> ExitTable:
    draw = torch.Generator().manual_seed(seed)
    hard = torch.rand(n, generator=draw)
    pixels, exits = 400, 4
    truth = torch.randint(0, classes, (n, pixels), generator=draw)
    said, sure = [], []
    for e in range(exits):
        wrong = torch.rand(n, pixels, generator=draw) < (0.32 - 0.08 * e) * hard[:, None] * 1.5
        said.append(torch.where(wrong, (truth + 1) % classes, truth))
        sure.append((1 - (0.4 - 0.08 * e) * hard[:, None] - 0.1 * torch.rand(n, pixels, generator=draw)).clamp(0, 1))

    def confusion(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        cell = rows * classes + columns + torch.arange(n)[:, None] * classes**2
        return torch.bincount(cell.flatten(), minlength=n * classes**2).view(n, classes, classes)

    counts = torch.stack([torch.stack([torch.histc(one, 1024, 0, 1) for one in each]) for each in sure], dim=1)
    probs = torch.stack([torch.nn.functional.one_hot(one, classes).float().mean(1) for one in said], dim=1)
    agreement = torch.stack([torch.stack([(a == b).float().mean(1) for b in said], dim=1) for a in said], dim=1)
    return ExitTable(
        task="dense", columns=columns(), costs=costs(), split=split, fingerprints=marks(split, seed),
        confusion=torch.stack([confusion(truth, one) for one in said], dim=1) if labels else None,
        agreement_confusion=torch.stack([confusion(said[-1], one) for one in said], dim=1),
        histograms=dict.fromkeys(CONFIDENCES, counts), probs=probs, agreement=agreement,
        class_names=("sky", "road", "car", "tree")[:classes],
    )


def columns() -> tuple[ExitColumn, ...]:
    return tuple(ExitColumn(name=name, site=name) for name in EXITS)


def marks(split: str, seed: int) -> dict[str, str]:
    return {"model": "m0", "data": "d0", "split": f"{split}:{seed}"}


def wide(make: Callable[..., ExitTable], n: int = 40, **more: Any) -> ExitTable:
    """The same at two widths: an exit and an end each; dense ones with labels know how far errors lie from borders."""
    table = make(n, **more)
    names = ("layer1.2@0.5", "final@0.5", "layer1.2", "final")
    each = tuple(ExitColumn(name=name, site=name, width=0.5 if "@" in name else 1.0) for name in names)
    paid = replace(table.costs, widths=tuple(one.width for one in each),
                   macs=tuple(1_000_000 * one for one in (10, 20, 80, 160)), head_macs=(300_000, 0, 1_000_000, 0))
    if table.confusion is None:
        return replace(table, columns=each, costs=paid)
    draw = torch.Generator().manual_seed(7)
    wrong = table.confusion.sum((2, 3)) - table.confusion.diagonal(dim1=2, dim2=3).sum(2)
    share = torch.stack([torch.rand(n, 31, generator=draw) ** 4 for _ in names], dim=1)
    errors = (share / share.sum(2, keepdim=True) * wrong[..., None]).floor().int()
    errors[..., 30] += (wrong - errors.sum(2)).int()
    pixels = errors.amax(1)
    pixels[:, 0] += (400 - pixels.sum(1)).int()
    return replace(table, columns=each, costs=paid, boundary_errors=errors, boundary_pixels=pixels)

"""Masks of a trained network for ``adpc_clock.py``."""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["kept", "run_of"]


def run_of(work: Path, data: Path, on: str) -> argparse.Namespace:
    """What ``adpc.py --part train --size 192x256 --epochs 10`` was called with, from 96x128 on CamVid."""
    return argparse.Namespace(
        data=data, work=work, on=on, network="hrnet_w48/3", size="192x256", scenes=600, epochs=10, start="trained",
        start_size="96x128" if on == "camvid" else None, threshold=0.998, lr=0.01, device="cpu", precision="bf16",
        halvings=(3, 2, 1), progress=False, quick=False)


def kept(work: Path, data: Path, on: str, size: tuple[int, int], count: int = 6) -> list[list[Tensor]]:
    """Of pictures of the test split, what a network that ``adpc.py`` trained on them leaves active after each of its
    exits: masks (1, 1, h, w), nested; of all densities that there are.
    """
    from adpc_train import folder_of, split_of, trained

    args = run_of(work, data, on)
    folder = folder_of(args, "RH + CA", 0)
    if not folder.is_dir():
        raise SystemExit(f"no run in {folder}: python benchmarks/papers/adpc.py --part train makes it")
    net = trained(args, "RH + CA", 0)
    pictures = split_of(args, "test")
    found = []
    with torch.inference_mode():
        for n in range(len(pictures)):  # type: ignore[arg-type]
            found.append([mask.clone() for mask in net.answers(pictures[n][0][None]).masks])
    found.sort(key=lambda masks: float(masks[0].float().mean()))
    chosen = [found[round(i * (len(found) - 1) / max(1, count - 1))] for i in range(count)]
    return [[_brought(mask, size) for mask in masks] for masks in chosen]


def _brought(mask: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(mask.to(torch.uint8), size, mode="nearest").bool()

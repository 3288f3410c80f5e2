"""Dense tables in MESS's shape, made by program: several heads a site, of many costs, alike in what they find hard.

Sites, heads, images and classes are free; 6, 64, 500 and 12 make the space that a search has to prove optimal.
"""

from typing import Any

import numpy as np
import torch

from offramp.table import Costs, ExitTable
from offramp.types import CONFIDENCES, HISTOGRAM_BINS, ExitColumn

PIXELS = 4096


def mess_table(samples: int = 500, sites: int = 6, heads: int = 64, classes: int = 12, *, seed: int = 0,
               noise: float = 1.0, skill: float = 1.0, spread: float = 1.0, pixels: int = PIXELS) -> ExitTable:
    """``noise``: how much heads and images differ beyond depth and size; ``skill``: how far early sites are behind;
    ``spread``: how unlike the images are in difficulty."""
    draw = np.random.default_rng(seed)
    depth = np.linspace(0.3, 0.92, sites) if sites > 1 else np.array([0.5])
    # channels / {1, 2, 4, 8} x {0..3} blocks x dilation x {FCN, DLB}: macs as a share of the backbone's
    size = np.array([
        0.15 * (2.2 if dlb else 1.0) * (1 + 1.1 * blocks) / shrink**1.6 + 0.002
        for shrink in (8, 4, 2, 1) for blocks in range(4) for _ in (0, 1) for dlb in (0, 1)
    ])
    size = np.sort(size)[np.linspace(0, len(size) - 1, heads).round().astype(int)]
    order = np.argsort(np.tile(np.arange(heads), 1))
    worth = 0.35 * (np.log(size / size[0]) / np.log(size[-1] / size[0] + 1e-9))[order] + 0.05 * draw.normal(size=heads)
    columns = sites * heads + 1
    site_of = np.repeat(np.arange(sites), heads)
    level = np.concatenate([(2.2 * skill * (depth[site_of] - 1)) + 0.6 * np.tile(worth, sites) *
                            (1.3 - depth[site_of]), [0.12]])  # (E,) logit of skill against the backbone's
    level[:-1] += 0.03 * noise * draw.normal(size=columns - 1)
    # what images hold: a few classes each, some of them rare
    share = draw.dirichlet(np.linspace(3, 0.15, classes) * 0.6, samples)
    truth = np.stack([draw.multinomial(pixels, one) for one in share])  # (N, K)
    hard = draw.normal(size=samples) * 0.7 * spread  # of an image
    of_class = np.linspace(2.6, 0.4, classes)
    by_site = draw.normal(size=(samples, sites)) * 0.25 * noise
    by_site = np.concatenate([by_site.cumsum(1) / np.sqrt(np.arange(1, sites + 1)), np.zeros((samples, 1))], 1)
    confusion = np.zeros((samples, columns, classes, classes), np.int32)
    histograms = np.zeros((samples, columns, HISTOGRAM_BINS), np.int32)
    taste = draw.dirichlet(np.ones(classes), classes)  # what a class is mistaken for
    for e in range(columns):
        s = site_of[e] if e < columns - 1 else sites
        own = 0.15 * noise * draw.normal(size=(samples, classes))
        odds = level[e] + of_class + (by_site[:, s] - hard)[:, None] + own
        right = 1 / (1 + np.exp(-odds))
        found = draw.binomial(truth, right)
        missed = truth - found
        confusion[:, e, np.arange(classes), np.arange(classes)] = found
        for k in range(classes):
            lost = np.stack([draw.multinomial(m, taste[k]) if m else np.zeros(classes, int) for m in missed[:, k]]) \
                if samples < 64 else np.floor(missed[:, k, None] * taste[k]).astype(int)
            lost[:, k] = 0
            lost[:, (k + 1) % classes] += missed[:, k] - lost.sum(1)
            confusion[:, e, k] += lost.astype(np.int32)
        mean = found.sum(1) / pixels
        told = np.clip(mean + 0.05 * noise * draw.normal(size=samples), 0.02, 0.995)
        # pixels' confidence: a beta whose mean the image's share of right pixels sets
        drawn = draw.beta(3 * told[:, None], 3 * (1 - told[:, None]), (samples, 128))
        bins = (drawn * (HISTOGRAM_BINS - 1e-6)).astype(int) + np.arange(samples)[:, None] * HISTOGRAM_BINS
        flat = np.bincount(bins.ravel(), minlength=samples * HISTOGRAM_BINS)
        histograms[:, e] = flat.reshape(samples, HISTOGRAM_BINS) * (pixels // 128)
    whole, macs = 138_000_000, [round(138_000_000 * depth[s]) for s in site_of] + [138_000_000]
    head_macs = [round(whole * size[h]) for _ in range(sites) for h in range(heads)] + [0]
    given: dict[str, Any] = {
        "task": "dense", "split": "calibration", "fingerprints": {"model": "m", "data": "d", "split": f"s{seed}"},
        "columns": (*(ExitColumn(name=f"site{s}/head{h}", site=f"site{s}", head=f"head{h}")
                      for s in range(sites) for h in range(heads)), ExitColumn(name="final", site="final")),
        "costs": Costs(macs=macs, head_macs=head_macs, param_bytes=[m // 4 for m in macs],
                       head_param_bytes=[m // 40 for m in head_macs],
                       peak_bytes=[20_000_000 - 1_000_000 * int(s) + m // 100 for s, m in
                                   zip([*site_of, sites], head_macs, strict=True)], latency=()),
        "confusion": torch.from_numpy(confusion), "agreement_confusion": torch.from_numpy(confusion),
        # every confidence alike, so that the largest tables share one array
        "histograms": {name: torch.from_numpy(histograms) for name in CONFIDENCES},
        "probs": torch.full((samples, columns, classes), 1 / classes),
        "agreement": torch.ones(samples, columns, columns),
    }
    return ExitTable(**given)

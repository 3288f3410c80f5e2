"""Networks and tables behind ``eenet.py``: every run is resumable and lies under ``--work``."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import offramp  # noqa: E402
from offramp.cli.demo import demo_run  # noqa: E402
from offramp.cli.folder import Run  # noqa: E402
from offramp.data import cifar10, load_data  # noqa: E402
from offramp.data.cifar10 import Cifar10Split  # noqa: E402
from offramp.models import load_model  # noqa: E402
from offramp.nn.heads import HeadSpec  # noqa: E402
from offramp.nn.shortcut import ShortcutSpec  # noqa: E402
from offramp.table import ExitTable  # noqa: E402
from offramp.train.recipes import flip_shift  # noqa: E402

LAST = "layer3.8"
"""The block that a thinned tail keeps besides those that change the shape."""
CANDIDATES: dict[str, tuple[ShortcutSpec | HeadSpec, ...]] = {
    "layer1.4": (ShortcutSpec(keep=(LAST,)), HeadSpec(convs=((64, 3, 2), (128, 3, 2)))),
    "layer1.8": (ShortcutSpec(keep=(LAST,)), ShortcutSpec(keep=()),
                 HeadSpec(convs=((64, 3, 2), (128, 3, 2), (128, 3, 1)))),
    "layer2.4": (ShortcutSpec(keep=(LAST,)), ShortcutSpec(keep=())),
    "layer2.8": (ShortcutSpec(keep=(LAST,)), ShortcutSpec(keep=()), HeadSpec(convs=((128, 3, 2), (128, 3, 1)))),
}
"""Sites and heads that two exits are chosen from, by what they cost in milliseconds (``--part exits``)."""
HEADS = {"layer1.4": ShortcutSpec(keep=(LAST,)), "layer2.4": ShortcutSpec(keep=(LAST,))}
"""The choice: exits after 19 and 52 % of the blocks; the final one included, three as in EENet's Table 1."""
VARIANTS = ("joint", "frozen")
EPOCHS = {"joint": 8, "frozen": 24}
RATE = {"joint": 0.05, "frozen": 0.5}
"""Of EENet's weighted sum, in which the first exit counts a twelfth."""


def network(args: argparse.Namespace) -> torch.nn.Module:
    """The trained ResNet-56."""
    weights = args.data / "checkpoints" / "cifar10_resnet56.safetensors"
    return load_model(f"offramp:cifar_resnet56?weights={weights}").eval()


def adapted(args: argparse.Namespace, variant: str, seed: int) -> offramp.MultiExit:
    """Three exits trained on the 20,000 labelled images with EENet's weights and self-distillation.

    ``frozen``: the heads alone. ``joint``: everything, from there on.
    """
    if variant == "joint":
        net = adapted(args, "frozen", seed)
    else:
        torch.manual_seed(seed)
        net = offramp.attach(network(args), torch.randn(4, 3, 32, 32), exits=list(HEADS), heads=HEADS)
    images = cifar10(args.data / "cifar10").split("train")
    if args.quick:
        images = torch.utils.data.Subset(images, range(512))
    recipe = offramp.recipes.eenet(
        len(net.columns), epochs=1 if args.quick else EPOCHS[variant], freeze=variant == "frozen", lr=RATE[variant],
        batch_size=128, weight_decay=5e-4, augment=flip_shift, seed=seed)
    if variant == "frozen":  # its features are cached
        recipe = replace(recipe, views=4)
    offramp.fit(net, images, recipe, run_dir=args.work / f"{variant}-seed{seed}", device=args.device,
                engine="eager" if args.quick else "compile", progress=args.progress, checkpoint_every=50)
    return net


def candidates(args: argparse.Namespace) -> ExitTable:
    """Every candidate exit on the frozen network, trained side by side, with times at batch 1."""
    folder = args.work / "candidates-table"
    torch.manual_seed(0)
    heads = {site: {f"h{i}": spec for i, spec in enumerate(specs)} for site, specs in CANDIDATES.items()}
    net = offramp.attach(network(args), torch.randn(4, 3, 32, 32), exits=list(heads), heads=heads)
    recipe = replace(offramp.recipes.eenet(
        len(net.columns), epochs=1 if args.quick else 16, freeze=True, lr=0.1, batch_size=128, weight_decay=5e-4,
        augment=flip_shift), views=4, weights=None)
    images = cifar10(args.data / "cifar10").split("train")
    offramp.fit(net, torch.utils.data.Subset(images, range(512)) if args.quick else images, recipe,
                run_dir=args.work / "candidates", device=args.device, progress=args.progress, checkpoint_every=100)
    if not (folder / "table.json").is_file():
        offramp.record(net, torch.utils.data.DataLoader(held(args), batch_size=256), split="held", device=args.device,
                       latency=False).save(folder)
    return replace(ExitTable.load(folder), costs=offramp.record(
        net, torch.utils.data.DataLoader(torch.utils.data.Subset(held(args), range(256)), batch_size=256),
        split="few", device=args.device).costs)


def held(args: argparse.Namespace) -> Cifar10Split:
    """The 7,000 images that no training saw, with their labels; pixels as the network wants them."""
    # all of the file: "unlabelled" hides the labels of its part, as the label-free paper wants it
    prepare = cifar10(args.data / "cifar10").split("test").prepare
    file = next((args.data / "cifar10").rglob("test_batch.bin"))
    return Cifar10Split([file], "held", labels=True, prepare=prepare)


def recorded(args: argparse.Namespace, variant: str, seed: int) -> ExitTable:
    """What the exits say of the 7,000, with MACs alone."""
    folder = args.work / f"{variant}-seed{seed}-table"
    if not (folder / "table.json").is_file():
        offramp.record(adapted(args, variant, seed), torch.utils.data.DataLoader(held(args), batch_size=256),
                       split="held", device=args.device, latency=False).save(folder)
    return ExitTable.load(folder)


def tables(args: argparse.Namespace, variant: str, seed: int, halving: int = 0) -> tuple[ExitTable, ExitTable]:
    """(to fit on, to report on): disjoint halves of the 7,000; times at batch 1 want a quiet machine."""
    folder = args.work / f"{variant}-seed{seed}-times"
    if not (folder / "table.json").is_file():
        few = torch.utils.data.Subset(held(args), range(256))
        offramp.record(adapted(args, variant, seed), torch.utils.data.DataLoader(few, batch_size=256), split="few",
                       device=args.device).save(folder)
    timed = replace(recorded(args, variant, seed), costs=ExitTable.load(folder).costs)
    halves = timed.split_rows({"calibration": 0.5, "test": 0.5}, seed=halving)
    return halves["calibration"], halves["test"]


class Corrupted(torch.utils.data.Dataset):
    """Images under noise and less contrast."""

    def __init__(self, rows: Cifar10Split) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image, label = self.rows[i]
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(i))
        return 0.7 * image + 0.25 * noise, label


def corrupted(args: argparse.Namespace, variant: str, seed: int) -> ExitTable:
    """The report half again, its images corrupted."""
    folder = args.work / f"{variant}-seed{seed}-corrupted"
    whole = recorded(args, variant, seed)
    if not (folder / "table.json").is_file():
        found = offramp.record(
            adapted(args, variant, seed), torch.utils.data.DataLoader(Corrupted(held(args)), batch_size=256),
            split="held", device=args.device, latency=False)
        # one stream with the others
        replace(found, costs=whole.costs, class_names=whole.class_names,
                fingerprints={**whole.fingerprints, "split": "corrupted"}).save(folder)
    return ExitTable.load(folder).split_rows({"calibration": 0.5, "test": 0.5}, seed=0)["test"]


def scenes(args: argparse.Namespace) -> ExitTable:
    """What the demo's network with its exits says of 1,200 further street scenes."""
    folder = args.work / "scenes-table"
    if not (folder / "table.json").is_file():
        if not (args.work / "scenes" / "heads.safetensors").is_file():
            demo_run(args.work / "scenes", quick=args.quick)
        net = Run.open(args.work / "scenes").net
        size = "48x64" if args.quick else "96x128"
        rows = load_data(f"scenes?n={40 if args.quick else 1600}&size={size}&seed=77").split("train")
        offramp.record(net, torch.utils.data.DataLoader(rows, batch_size=16), split="held", device=args.device,
                       latency=False).save(folder)
    return ExitTable.load(folder)

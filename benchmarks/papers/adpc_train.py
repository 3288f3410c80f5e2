"""Networks and trainings behind ``adpc.py``: every run is resumable and lies under ``--work``.

The paper's rows are 484 epochs of crops of 512x1024, from ImageNet. Two cores have time for a small network on small
pictures, and for a hundredth of those steps. So all rows start from one trained network (``--start``): scenes, which
stand for ImageNet, then CamVid; each then sees the same number of steps. The network is HRNet-W48, Table 1's, with a
third of its channels throughout. It is as cheap as W18-small, but costs 7 % up to its first exit, where masks save
nothing, as W48 itself does (6 %); W18-small, whose stem is W48's, costs 32 % up to there.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from slimseg_train import size_of  # noqa: E402

import offramp  # noqa: E402
from offramp.data import camvid, load_data  # noqa: E402
from offramp.data.base import Prepare  # noqa: E402
from offramp.functional.confidence import BY_NAME  # noqa: E402
from offramp.functional.metrics import mean_iou  # noqa: E402
from offramp.models import load_model  # noqa: E402
from offramp.nn.masked import Masked  # noqa: E402
from offramp.table import ExitTable  # noqa: E402

__all__ = ["ROWS", "Reached", "masked", "reached", "split_of", "thresholds_for", "trained"]

ROWS = {"alone": None, "EE": (0, 0, 0), "RH": (3, 2, 1), "RH + CA": (3, 2, 1), "D = 1/1/1": (1, 1, 1),
        "D = 3/3/3": (3, 3, 3)}
"""How often the heads halve their maps; 0 is the plain head, None no early exits."""

@dataclass(frozen=True)
class Reached:
    """A network on a split: every exit's mIoU in %, and the MACs up to it, the mean over the pictures."""

    miou: tuple[float, ...]
    macs: tuple[float, ...]

    @property
    def means(self) -> tuple[float, float]:
        """Of all exits, as in Fig. 7: (MACs, mIoU)."""
        return sum(self.macs) / len(self.macs), sum(self.miou) / len(self.miou)


def split_of(args: argparse.Namespace, name: str) -> Dataset[Any]:
    """``train``, ``calibration`` to choose thresholds on, or ``test``."""
    found: Any
    if args.on == "camvid":
        found = camvid(args.data / "camvid", prepare=Prepare(size=size_of(args))).split(name)
    else:
        count, seed = {"train": (args.scenes, 0), "calibration": (150, 98), "test": (300, 99)}[name]
        found = load_data(f"scenes?n={count}&size={args.size}&seed={seed}").split("train")
    return Subset(found, range(16 if name == "train" else 8)) if args.quick else found


@cache
def _guest(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    name, _, by = name.partition("/")
    net = load_model(f"offramp:{name}?num_classes=11")
    if not by:
        return net
    return offramp.slim_(net, (1 / int(by), 1.0), example_inputs=torch.randn(2, 3, 64, 96)).narrow(1 / int(by))


def guest_of(args: argparse.Namespace, seed: int) -> Any:
    """``hrnet_w48/3``: with a third of its channels, rounded as :func:`offramp.slim_` does."""
    return copy.deepcopy(_guest(args.network, seed))


def channels_of(args: argparse.Namespace) -> int:
    """Of redesigned heads: 128 on W48, 64 on others, or that part of it that the network has."""
    name, _, by = args.network.partition("/")
    return round((128 if "w48" in name else 64) / int(by or 1) / 8) * 8


def start(args: argparse.Namespace) -> Path:
    """Weights of the whole network, by AdamW: few steps from far away are slow with SGD at the paper's rate."""
    args = argparse.Namespace(**{**vars(args), "size": args.start_size or args.size})
    folder = args.work / f"start-{args.network.replace('/', 'by')}-{args.on}-{args.size}"
    path = folder / "weights.safetensors"
    if not path.is_file():
        net = offramp.attach(guest_of(args, 0), example(args), exits=0)
        for on, epochs in (("scenes", 12), ("camvid", 40)) if args.on == "camvid" else (("scenes", 20),):
            how = replace(recipe(args, 0), epochs=1 if args.quick else epochs, optimiser="adamw", lr=1e-3,
                          weight_decay=0.02, schedule="cosine", warmup=0.05, clip=1.0)
            fit(args, net, how, folder / on, split_of(argparse.Namespace(**{**vars(args), "on": on}), "train"))
        safetensors.torch.save_file({k: v.contiguous() for k, v in net.backbone.state_dict().items()}, path)
    return path


def example(args: argparse.Namespace) -> Tensor:
    return torch.randn(2, 3, *size_of(args), generator=torch.Generator().manual_seed(0))


def recipe(args: argparse.Namespace, seed: int) -> offramp.Recipe:
    """The paper's, but for the size of crops and the number of steps."""
    high, wide = size_of(args)
    crop = (high * 3 // 4 // 8 * 8, wide * 3 // 4 // 8 * 8)
    return offramp.recipes.anytime(epochs=args.epochs, lr=args.lr, batch_size=8, seed=seed,
                                   augment_pair=offramp.recipes.scale_crop_flip(crop=crop))


def fit(args: argparse.Namespace, net: nn.Module, how: offramp.Recipe, folder: Path, data: Dataset[Any]) -> None:
    offramp.fit(net, data, how, run_dir=folder, device=args.device, checkpoint_every=50, progress=args.progress,
                precision=None if args.precision == "fp32" else "bf16")


def trained(args: argparse.Namespace, row: str, seed: int) -> offramp.MultiExit | Masked:
    """A row's network, of a run that is made or found."""
    guest = guest_of(args, seed)
    if args.start == "trained":
        guest.load_state_dict(safetensors.torch.load_file(start(args)))
    halvings, channels = args.halvings if row.startswith("RH") else ROWS[row], channels_of(args)
    torch.manual_seed(seed)
    heads = {} if halvings is None else {
        end: offramp.RedesignedSpec(down=down, channels=channels if down else None)
        for end, down in zip(guest.ends, halvings, strict=True)}
    made: Any = offramp.attach(guest, example(args), exits=[*heads] or 0, heads=heads or None)
    if row.endswith("CA"):
        made = offramp.mask_(made, threshold=args.threshold)
    fit(args, made, recipe(args, seed), folder_of(args, row, seed), split_of(args, "train"))
    return made.eval()  # type: ignore[no-any-return]


def folder_of(args: argparse.Namespace, row: str, seed: int) -> Path:
    kind = "-".join((args.on, args.network.replace("/", "by"), args.size, str(args.epochs), f"{args.lr:g}",
                     args.precision, "from", args.start))
    rule = f"-{args.threshold:g}" if row.endswith("CA") else ""
    if row.startswith("RH") and tuple(args.halvings) != ROWS["RH"]:
        row = f"{row} {'/'.join(map(str, args.halvings))}"
    return Path(args.work / kind / f"{row.replace(' ', '').replace('/', '')}{rule}-seed{seed}")


def reached(args: argparse.Namespace, net: offramp.MultiExit | Masked, row: str, seed: int, split: str) -> Reached:
    """Measured now, or read from the table that was kept."""
    rule = "".join(f"-{name}{value}" for name, value in net.rule.items()) if isinstance(net, Masked) else "-plain"
    folder = folder_of(args, row, seed) / f"{split}{rule}"
    if not (folder / "table.json").is_file():
        loader = torch.utils.data.DataLoader(split_of(args, split), batch_size=8)
        offramp.record(net, loader, split=split, device=args.device, latency=False, confidences=("top",),
                       agreement=False, boundary_errors=False).save(folder)
    table = ExitTable.load(folder)
    assert table.confusion is not None
    return Reached(miou=tuple(100 * float(value) for value in mean_iou(table.confusion.sum(0))),
                   macs=tuple(map(float, table.costs.path(range(len(table.columns))))))


def masked(args: argparse.Namespace, net: offramp.MultiExit, row: str, seed: int, **rule: Any) -> Reached:
    """A network on the test split, masked there alone, as for the paper's Fig. 7."""
    made = offramp.mask_(net, **rule).eval()
    try:
        return reached(args, made, row, seed, "test")
    finally:
        made.unmask_()


def thresholds_for(args: argparse.Namespace, net: offramp.MultiExit, confidence: str, shares: Sequence[float]
                   ) -> list[float]:
    """At which the first exit settles such shares of the calibration pictures."""
    said = []
    head = net.head(net.columns[0].name)
    with torch.inference_mode():
        for x, *_ in torch.utils.data.DataLoader(split_of(args, "calibration"), batch_size=8):
            said.append(BY_NAME[confidence](head(*net.stages[0](net.begin(x)).tensors)).flatten())
    every = torch.cat(said).double().sort().values
    return [float(every[min(len(every) - 1, round((1 - share) * len(every)))]) for share in shares]

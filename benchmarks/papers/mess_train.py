"""Networks and trainings behind ``mess.py``: every run is resumable and lies under ``--work``.

The paper starts from ImageNet weights and trains 60,000 steps; two cores cannot. All rows and seeds of a table start
from one network trained on the built-in ``scenes`` (its classes are CamVid's) and then on CamVid until it converges, as
a user's would be. Then the paper's A.2: SGD, poly schedule, rescaling by 0.5 to 2, crops, flips.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

sys.path.insert(0, str(Path(__file__).parents[1]))
import offramp  # noqa: E402
from offramp.data import camvid, load_data  # noqa: E402
from offramp.data.base import Prepare, Source  # noqa: E402
from offramp.functional.metrics import mean_iou  # noqa: E402
from offramp.train.augment import scale_crop_flip  # noqa: E402

SIZE = (240, 320)
CROP = (176, 240)
"""Three quarters of the picture where the paper takes 0.9: a third less to compute."""
EXITS = {
    "resnet18": [f"backbone.layer{name}" for name in ("1.1", "2.1", "3.0", "3.1", "4.0")],
    "mobilenetv2_100": [f"backbone.blocks.{name}" for name in ("1.1", "3.2", "4.2", "5.0", "5.2")],
}
"""Early ones, near equal steps of MACs; with the final one the paper's N = 6. At the last block's end an exit's FCN
head would cost as much as the final one's, which ``attach`` refuses."""
LOSSES = ("frozen", "kd", "self_distill", "mess")


class Fcn(nn.Module):
    """A dilated classification backbone at 1/16, an FCN head, bilinear upsampling."""

    def __init__(self, name: str, num_classes: int = 11) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, pretrained=False, features_only=True, output_stride=16,
                                          out_indices=(4,))
        self.classifier = FCNHead(self.backbone.feature_info.channels()[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        return F.interpolate(self.classifier(self.backbone(x)[-1]), size=size, mode="bilinear", align_corners=False)


def source(args: argparse.Namespace) -> Source:
    """CamVid at 240x320; val's blocks of ten frames go to calibration and test in turn."""
    return camvid(args.data / "camvid", prepare=Prepare(size=SIZE))


def pictures(args: argparse.Namespace) -> Any:
    """The training images, a few of them where only the path is checked."""
    rows = source(args).split("train")
    return torch.utils.data.Subset(rows, range(16)) if args.quick else rows


def start(args: argparse.Namespace, backbone: str, *, scenes_alone: bool = False) -> Fcn:
    """A trained network, as a user brings it: first scenes, which stand for ImageNet, then CamVid, both by AdamW."""
    path = args.work / f"{backbone}_{'scenes' if scenes_alone else 'start'}.safetensors"
    torch.manual_seed(0)
    model = Fcn(backbone)
    if not path.is_file():
        scenes = load_data(f"scenes?n={args.scenes}&size={SIZE[0]}x{SIZE[1]}&seed=0")
        net = attach(model, heads=vanilla(), exits=1)
        recipe = replace(adamw(offramp.recipes.joint(epochs=args.scene_epochs, batch_size=8, seed=0)),
                         weights=(0.0, 1.0), lr=2e-3)
        fit(args, net, scenes.split("train"), recipe, f"{backbone}-scenes")
        if not scenes_alone:
            recipe = replace(recipe, epochs=args.start_epochs, lr=1e-3, loss_stride=4,
                             augment_pair=scale_crop_flip(crop=CROP))
            fit(args, net, pictures(args), recipe, f"{backbone}-start")
        safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    model.load_state_dict(safetensors.torch.load_file(path))
    return model


def adamw(recipe: offramp.Recipe) -> offramp.Recipe:
    """Few steps from far away: there SGD with the paper's rate is slow."""
    return replace(recipe, optimiser="adamw", lr=1e-3, weight_decay=0.02, schedule="cosine", warmup=0.05, clip=1.0)


def attach(model: nn.Module, *, heads: Any, exits: Any) -> offramp.MultiExit:
    return offramp.attach(model, torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)), exits=exits,
                          heads=heads)


def vanilla() -> Mapping[str, Any]:
    """The FCN head that the paper hangs everywhere in its first stage."""
    from offramp.nn.mess import mess_space

    return {"fcn": mess_space()["crm1-b0-plain-fcn"]}


def fit(args: argparse.Namespace, net: offramp.MultiExit, data: Any, recipe: offramp.Recipe, name: str, **how: Any):
    return offramp.fit(net, data, recipe, run_dir=args.work / name, device=args.device,
                       precision="bf16" if args.bf16 else None, checkpoint_every=100, progress=args.progress, **how)


def first_stage(args: argparse.Namespace, backbone: str, row: str, seed: int) -> offramp.MultiExit:
    """Rows (i) ``final_only``, (ii) ``joint`` and (iii) ``exit_aware`` of Table 5: end to end, vanilla FCN heads."""
    # --long: from scenes, as long as the plain network, which then is the start itself
    plain = args.long and row == "final_only"
    model = start(args, backbone, scenes_alone=args.long and not plain)
    torch.manual_seed(seed)
    net = attach(model, heads=vanilla(), exits=EXITS[backbone])
    if plain:
        return net
    kind = getattr(offramp.recipes, row)
    recipe = replace(kind(epochs=args.epochs, seed=seed), batch_size=8, augment_pair=scale_crop_flip(crop=CROP),
                     loss_stride=4)
    if args.long:
        recipe = adamw(replace(recipe, epochs=args.start_epochs))
    else:
        recipe = replace(recipe, lr=0.01, weight_decay=1e-4, warmup=0.05)
    fit(args, net, pictures(args), recipe, stage(args, backbone, row, seed))
    return net


def stage(args: argparse.Namespace, backbone: str, row: str, seed: int) -> str:
    """The name of a first stage's runs."""
    return f"{backbone}-{row}{'-long' if args.long else ''}-seed{seed}"


def second_stage(
    args: argparse.Namespace, backbone: str, row: str, seed: int, loss: str, heads: Any = None, name: str = "fcn",
    epochs: int | None = None, **how: Any,
) -> offramp.MultiExit:
    """Heads on the frozen backbone of a first stage, from labels and, but for ``frozen``, from its own answers."""
    model = first_stage(args, backbone, row, seed).backbone
    torch.manual_seed(seed)
    net = attach(model, heads=vanilla() if heads is None else heads, exits=EXITS[backbone])
    recipe = replace(getattr(offramp.recipes, loss)(epochs=epochs or args.head_epochs, seed=seed), lr=0.02,
                     batch_size=8, weight_decay=1e-4, warmup=0.0, augment_pair=scale_crop_flip(crop=CROP),
                     views=args.views, loss_stride=4)
    fit(args, net, pictures(args), recipe, f"{stage(args, backbone, row, seed)}-{loss}-{name}", **how)
    return net


def quality(args: argparse.Namespace, net: offramp.MultiExit, name: str) -> list[float]:
    """mIoU in % of every exit, the final one last, on all of val: nothing is fitted there."""
    path = args.work / f"{name}-val"
    if not (path / "table.json").is_file():
        rows = source(args)
        both = torch.utils.data.ConcatDataset([rows.split("calibration"), rows.split("test")])
        offramp.record(net, torch.utils.data.DataLoader(both, batch_size=8), split="val", latency=False,
                       device=args.device, confidences=("top",)).save(path)
    table = offramp.ExitTable.load(path)
    return [100 * float(v) for v in mean_iou(table.confusion.sum(0))]



"""A small network of three widths, its data, and SlimSeg's Algorithm 1 written out by hand for it."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.nn.boundary import boundary_head
from offramp.nn.slim import Slimmable, slim_
from offramp.train.batches import seed_all
from train.fakes import Block

WIDTHS = (0.25, 0.5, 1.0)
KEPT = {1.0: 32, 0.5: 16, 0.25: 8}


def plain(seed: int = 0, classes: int = 4) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Sequential(Block(3, 32), Block(32, 32, 2), nn.Conv2d(32, classes, 1),
                             nn.Upsample(scale_factor=2, mode="bilinear"))
        with torch.no_grad():
            made[2].weight.mul_(8)  # some pixels are easy
        return made


def make(widths: tuple[float, ...] = WIDTHS, seed: int = 0, classes: int = 4) -> Slimmable:
    return slim_(plain(seed, classes), widths, example_inputs=torch.zeros(2, 3, 12, 12))


def batches(count: int = 4, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    """A loader of batches of 6, in this order: blocks of classes with some void, colours that tell the class."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        labels = torch.randint(0, 4, (6, 3, 3), generator=draw).repeat_interleave(4, 1).repeat_interleave(4, 2)
        images = F.one_hot(labels, 4)[..., :3].permute(0, 3, 1, 2) + 0.5 * torch.randn(6, 3, 12, 12, generator=draw)
        labels[0, :4, :4] = 255
        made.append((images, labels))
    return made


def near_border(labels: Tensor, radius: float) -> Tensor:
    """Every pixel against every other one."""
    found = torch.zeros(labels.shape)
    for n, image in enumerate(labels.tolist()):
        for y, x in ((y, x) for y in range(12) for x in range(12)):
            found[n, y, x] = any(
                image[v][u] not in (255, image[y][x]) and (v - y) ** 2 + (u - x) ** 2 <= radius**2
                for v in range(12) for u in range(12))
    return found


class ByHand:
    """Algorithm 1 with every slice, norm and loss spelt out; nothing of offramp but the first weights of the head."""

    def __init__(self, net: Slimmable, recipe: Any, x: Tensor) -> None:
        self.step, self.recipe = recipe.slim, recipe
        seed_all(recipe.seed, 3)
        head = boundary_head(net, "0", x) if recipe.slim.boundary else None
        self.t = {n: p.detach().clone() for n, p in net.state_dict().items()}
        if head is not None:
            self.t |= {f"head.{n.removeprefix('backbone.')}": p.detach().clone() for n, p in head.state_dict().items()}
        for name, tensor in self.t.items():
            tensor.requires_grad_(tensor.is_floating_point() and "running" not in name)

    def norm(self, x: Tensor, name: str, width: float) -> Tensor:
        key = name if width == 1.0 else f"{name}.at_{str(width).replace('.', ':')}"
        t = self.t
        t[f"{key}.num_batches_tracked"] += 1
        return F.batch_norm(x, t[f"{key}.running_mean"], t[f"{key}.running_var"], t[f"{key}.weight"],
                            t[f"{key}.bias"], True, 0.1, 1e-5).relu()

    def run(self, x: Tensor, width: float) -> tuple[Tensor, Tensor | None]:
        t, c = self.t, KEPT[width]
        low = self.norm(F.conv2d(x, t["backbone.0.conv.weight"][:c], None, 1, 1), "backbone.0.bn", width)
        y = self.norm(F.conv2d(low, t["backbone.1.conv.weight"][:c, :c], None, 2, 1), "backbone.1.bn", width)
        logits = F.interpolate(F.conv2d(y, t["backbone.2.weight"][:, :c], t["backbone.2.bias"]), (12, 12),
                               mode="bilinear")
        if "head.0.weight" not in t:
            return logits, None
        z = self.norm(F.conv2d(low, t["head.0.weight"][:c, :c], None, 1, 1), "head.1", width)
        return logits, F.conv2d(z, t["head.3.weight"][:, :c], t["head.3.bias"])[:, 0]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        valid, step = y != 255, self.step
        border = near_border(y, step.radius) if step.boundary or step.guided_weight else None
        said: list[tuple[Tensor, Tensor | None]] = []
        total = torch.zeros(())
        for width in (1.0, 0.5, 0.25):
            logits, edge = self.run(x, width)
            teachers = self.teachers(said)

            def seg(where: Tensor, hard: bool, logits: Tensor = logits, teachers: Any = teachers) -> Tensor:
                if teachers:
                    each = [-(q[0] * logits.log_softmax(1)).sum(1)[where].mean() for q in teachers]
                    return sum(each) / len(each)
                losses = F.cross_entropy(logits, y, ignore_index=255, reduction="none")[where]
                return losses[(-losses).exp() < 0.7].mean() if hard else losses.mean()

            loss = seg(valid, step.ohem)
            if edge is not None:
                goals = [q[1] for q in teachers] or [border]
                each = [F.binary_cross_entropy(edge.sigmoid()[valid], goal[valid]) for goal in goals]
                loss = loss + step.boundary_weight * sum(each) / len(each)
            if step.guided_weight:
                near = valid & (border == 1 if edge is None else edge.sigmoid() > step.tau)
                loss = loss + step.guided_weight * (seg(near, False) if near.any() else 0)
            total = total + loss
            said.append((logits.softmax(1).detach(), None if edge is None else edge.sigmoid().detach()))
        return total

    def teachers(self, said: list[Any]) -> list[Any]:
        if not said or self.step.teacher is None:
            return []
        if self.step.teacher == "mean":
            edges = [e for _, e in said if e is not None]
            return [(torch.stack([s for s, _ in said]).mean(0), torch.stack(edges).mean(0) if edges else None)]
        return {"prev": said[-1:], "largest": said[:1], "larger": said}[self.step.teacher]

    def train(self, data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        deep = [t for t in self.t.values() if t.requires_grad and t.ndim > 1]
        flat = [t for t in self.t.values() if t.requires_grad and t.ndim == 1]
        optimiser = torch.optim.SGD([{"params": deep, "weight_decay": self.recipe.weight_decay},
                                     {"params": flat, "weight_decay": 0}], lr=1.0, momentum=0.9, nesterov=True)
        steps = len(data) * self.recipe.epochs
        for number in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = self.recipe.lr * math.pow(1 - number / steps, 0.9)
            optimiser.zero_grad()
            self.loss(*data[number % len(data)]).backward()
            optimiser.step()
        return {n: t.detach() for n, t in self.t.items()}

"""Tiny networks with exits, and data, for the training tests."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from offramp.nn.heads import HeadSpec
from offramp.nn.multiexit import MultiExit

CONV = HeadSpec(convs=((8, 3, 2),), dropout=0.2)
PLAIN = HeadSpec(linears=(8,))
"""Without batch norm: rows do not look at each other in training either."""


class Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Tiny(nn.Module):
    """Three blocks on 8x8 images, four classes; a map of them when ``dense``."""

    def __init__(self, dense: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.three = Block(3, 8), Block(8, 16, 2), Block(16, 16)
        self.dense, self.last = dense, nn.Conv2d(16, 4, 1) if dense else nn.Linear(16, 4)
        with torch.no_grad():  # a teacher with opinions, and batch norms that a pass in train mode would move
            self.last.weight.mul_(8)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(std=0.3)
                    module.running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.three(self.two(self.one(x)))
        if not self.dense:
            return self.last(x.mean((2, 3)))
        return nn.functional.interpolate(self.last(x), scale_factor=2.0, mode="bilinear")


def make(spec: HeadSpec | None = CONV, *, exits: Any = ("one", "two"), dense: bool = False, seed: int = 0) -> MultiExit:
    """The tiny network with heads at its first two blocks, the same one each time."""
    from offramp.nn.attach import attach

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return attach(Tiny(dense).eval(), torch.randn(2, 3, 8, 8), exits=exits, heads=spec)


def images(count: int = 96, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def unlabelled(count: int = 96) -> TensorDataset:
    return TensorDataset(images(count))


def labelled(count: int = 96, dense: bool = False) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(images(count), torch.randint(0, 4, (count, 8, 8) if dense else (count,), generator=generator))


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Augments with the global generator, as datasets do."""

    def __init__(self, count: int = 96) -> None:
        self.plain = labelled(count)

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.plain[index]
        return x + 0.1 * torch.randn(x.shape), y


class Untouchable:
    """A label that cannot be looked at."""

    def _raise(self, *args: object, **kwargs: object) -> Any:
        raise AssertionError("a label was read")

    __getattr__ = __len__ = __iter__ = __eq__ = __float__ = __index__ = __bool__ = __array__ = _raise  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class Teased(Dataset[Any]):
    """Images whose labels are untouchable, as tuples or as dicts."""

    def __init__(self, form: str, count: int = 96) -> None:
        self.x, self.form = images(count), form

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return {"x": self.x[index], "labels": Untouchable()} if self.form == "dict" else (self.x[index], Untouchable())


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), f"{name} differs by {(ours[name] - theirs[name]).abs().max()}"


def run_script(text: str, path: Path, *before: str) -> int:
    """Run Python text in another process, with these folders importable; its exit status."""
    import subprocess
    import sys

    path.write_text(text)
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *before, str(path)], env=env, timeout=240, capture_output=True, text=True)
    if done.returncode > 0:
        print(done.stdout[-2000:], done.stderr[-6000:])
    return done.returncode

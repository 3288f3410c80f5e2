"""MDEQ (Bai et al. 2020, arXiv:2006.08656): one cell, applied to its own output until that no longer changes.

The network says what it says at the fixed point z* = f(z*; x). ADP-C (arXiv:2104.00749, Table 1) decodes what the
solver holds on its way there as anytime predictions; with ``attach`` every application of the cell is a place for an
exit, ``MDEQ.exits`` names them and ``MDEQ.decoder`` hangs the network's own head there::

    net = offramp.attach(mdeq, x, exits=mdeq.exits(4, 6, 8), heads=mdeq.decoder)

What ``mdeq_small`` costs at 1024x2048 with 19 classes: 33.2 G MACs of convolutions before and after, 52.7 G for every
application. ADP-C's four figures are, to their last digit, those of 2 (k + 1) applications for iterate k of Broyden's
method; an iterate k of ours is k applications, less than half of that.

Where we differ from the paper and its code: the solver is Anderson's, row by row; no weight norm (a group norm follows
each of those convolutions) and no dropout; maps of any size; corners are not aligned where the head resizes.

Axes: N samples, C channels, H W space, K classes, D all numbers of a row's state, m states that are remembered.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.errors import OfframpError

__all__ = ["MDEQ", "Cell", "anderson", "mdeq_small"]


_Sizes = Sequence[tuple[int, int, int]]


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)


@final
class Block(nn.Module):
    """Two 3x3 convolutions, wide between them, and a way around them; the picture joins before the second norm."""

    def __init__(self, width: int, expansion: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(width, expansion * width, 3), nn.GroupNorm(groups, expansion * width)
        self.conv2, self.norm2 = _conv(expansion * width, width, 3), nn.GroupNorm(groups, width)
        self.norm3 = nn.GroupNorm(groups, width)

    def forward(self, z_NCHW: Tensor, injected_NCHW: Tensor | None) -> Tensor:
        out = self.conv2(F.relu(self.norm1(self.conv1(z_NCHW))))
        out = self.norm2(out if injected_NCHW is None else out + injected_NCHW)
        return self.norm3(F.relu(out + z_NCHW))  # type: ignore[no-any-return]


@final
class Cell(nn.Module):
    """f(z; x): a block at each resolution, then every map gets a sum of all; maps in, maps of the same sizes out."""

    def __init__(self, channels: Sequence[int], expansion: int, groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, expansion, groups) for width in channels)
        self.fuse = nn.ModuleList(
            nn.ModuleList(_path(channels, j, i, groups) for j in range(len(channels))) for i in range(len(channels)))
        self.ends = nn.ModuleList(
            nn.Sequential(nn.ReLU(), _conv(width, width, 1), nn.GroupNorm(groups // 2, width)) for width in channels)

    def forward(self, maps: Sequence[Tensor], injected_NCHW: Tensor) -> list[Tensor]:
        maps = [block(z, None if i else injected_NCHW) for i, (block, z) in
                enumerate(zip(self.blocks, maps, strict=True))]
        said = []
        for i, (row, end) in enumerate(zip(self.fuse, self.ends, strict=True)):
            assert isinstance(row, nn.ModuleList)
            total = maps[i]
            for j, (path, z) in enumerate(zip(row, maps, strict=True)):
                if j != i:
                    term = path(z)
                    total = total + (F.interpolate(term, size=maps[i].shape[-2:]) if j > i else term)
            said.append(end(total))
        return said


def _path(channels: Sequence[int], source: int, goal: int, groups: int) -> nn.Module:
    """From one resolution to another: 3x3 convolutions of stride 2 down, a 1x1 up (resized by the cell)."""
    if source == goal:
        return nn.Identity()
    if source > goal:
        return nn.Sequential(_conv(channels[source], channels[goal], 1), nn.GroupNorm(groups, channels[goal]))
    layers: list[nn.Module] = []
    for step in range(source, goal):
        width = channels[goal] if step == goal - 1 else channels[source]
        layers += [_conv(channels[source], width, 3, 2), nn.GroupNorm(groups, width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def anderson(f: Callable[[Tensor], Tensor], start_ND: Tensor, *, memory: int = 5, ridge: float = 1e-4
             ) -> Iterator[tuple[Tensor, Tensor]]:
    r"""Points z_k and their images f(z_k), without end: Anderson's mixing (1965) of the last ``memory`` of them.

    .. math:: z_{k+1} = f(z_k) - \sum_i \gamma_i \Delta f_i, \quad
        \gamma = \arg\min \| r_k - \sum_i \gamma_i \Delta r_i \|^2

    with r = f(z) - z, and differences from one point to the next. Every row has a gamma of its own, so that no row
    depends on what else is in the batch. ``ridge`` keeps the least squares of differences scaled to length 1 well
    posed. Of n points the mixing costs (n - 1) (n + 1) D MACs.

    >>> points = anderson(lambda z: z.cos(), torch.zeros(1, 1, dtype=torch.float64))
    >>> round(next(islice(points, 8, None))[1].item(), 6)
    0.739085
    """
    past_NmD, images_NmD = start_ND[:, None], f(start_ND)[:, None]
    while True:
        yield past_NmD[:, -1], images_NmD[:, -1]
        z_ND = _mixed(images_NmD - past_NmD, images_NmD, ridge)
        past_NmD = torch.cat([past_NmD, z_ND[:, None]], 1)[:, -memory:]
        images_NmD = torch.cat([images_NmD, f(z_ND)[:, None]], 1)[:, -memory:]


def _mixed(residuals_NmD: Tensor, images_NmD: Tensor, ridge: float) -> Tensor:
    image_ND = images_NmD[:, -1]
    if images_NmD.shape[1] == 1:
        return image_ND
    turns_NnD = residuals_NmD.diff(dim=1)
    gram_Nnn = (turns_NnD @ turns_NnD.mT).double()  # of few numbers, but nearly singular
    length_Nn1 = gram_Nnn.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-30)[:, :, None]
    gram_Nnn = gram_Nnn / (length_Nn1 * length_Nn1.mT) + ridge * torch.eye(gram_Nnn.shape[1], device=image_ND.device)
    wanted_Nn1 = (turns_NnD @ residuals_NmD[:, -1:].mT) / length_Nn1
    gamma_Nn1 = torch.linalg.solve(gram_Nnn, wanted_Nn1) / length_Nn1
    back_ND: Tensor = (gamma_Nn1.mT.to(image_ND.dtype) @ images_NmD.diff(dim=1))[:, 0]
    return image_ND - back_ND


class _Implicit(torch.autograd.Function):
    """The identity on f(z) with f's graph behind it; its gradient g becomes v = J^T v + g (arXiv:1909.01377)."""

    @staticmethod
    def forward(ctx: Any, image_ND: Tensor, z_ND: Tensor, steps: int) -> Tensor:
        ctx.save_for_backward(image_ND, z_ND)
        ctx.steps = steps
        return image_ND.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        image_ND, z_ND = ctx.saved_tensors

        def f(v_ND: Tensor) -> Tensor:
            passed_ND = torch.autograd.grad(image_ND, z_ND, v_ND, retain_graph=True)[0]
            return grads[0] + passed_ND  # type: ignore[no-any-return]

        return _nth(anderson(f, grads[0]), ctx.steps)[1], None, None


@final
class MDEQ(nn.Module):
    """(N, 3, H, W) -> logits (N, K, H, W) after ``steps`` applications of one cell; each row is solved on its own.

    channels: of the maps at 1/4, 1/8, ... of the picture; ``expansion`` times as many inside the blocks.
    steps: applications of the cell, always as many, so that a trace holds and a row's answer is its own;
        ``equilibrium`` goes on until nothing changes.
    gradient_steps: of the same solver for the implicit gradient, while training; 0 takes the gradient through the last
        application alone (arXiv:2103.12803).

    >>> net = MDEQ(5, channels=(8, 16), expansion=1, groups=4, steps=3).eval()
    >>> net(torch.zeros(2, 3, 33, 50)).shape
    torch.Size([2, 5, 33, 50])
    """

    def __init__(self, num_classes: int, *, channels: Sequence[int] = (32, 64, 128, 256), expansion: int = 5,
                 groups: int = 8, steps: int = 10, gradient_steps: int = 0) -> None:
        super().__init__()
        faults = [text for text, wrong in {
            f"channels that {groups} groups divide, two maps or more, not {tuple(channels)}":
                len(channels) < 2 or any(width % groups for width in channels),
            f"groups >= 2, an even number, not {groups}": groups < 2 or groups % 2,
            f"steps >= 1, not {steps}": steps < 1,
            f"gradient_steps >= 0, not {gradient_steps}": gradient_steps < 0,
        }.items() if wrong]
        if faults:
            raise OfframpError("MDEQ: expected " + "; ".join(faults) + ".")
        self.channels, self.steps, self.gradient_steps = tuple(channels), steps, gradient_steps
        first, width = channels[0], sum(channels)
        self.stem = nn.Sequential(
            _conv(3, first, 3, 2), nn.BatchNorm2d(first), nn.ReLU(), _conv(first, first, 3, 2), nn.BatchNorm2d(first),
            nn.ReLU(), _conv(first, first, 1), nn.BatchNorm2d(first), nn.ReLU())
        self.cell = Cell(channels, expansion, groups)
        self.head = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(),
                                  nn.Conv2d(width, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]  # read here: a network that is cut need not keep its input for it
        f, zero_ND, sizes = self._problem(self.stem(x))
        if self.training and torch.is_grad_enabled():
            image_ND = self._taught(f, zero_ND)
        else:
            image_ND = _nth(anderson(f, zero_ND), self.steps)[1]
        return _resize(_join(_unpack(image_ND, sizes), self.head), size)

    def iterates(self, x: Tensor, at: Sequence[int]) -> Iterator[Tensor]:
        """Logits (N, K, H, W) after so many applications of the cell, in that order, as early as they are known."""
        if not at or list(at) != sorted(set(at)) or at[0] < 1:
            raise OfframpError(expected="rising numbers of applications, from 1 on", got=str(tuple(at)),
                               where="MDEQ.iterates()")
        f, zero_ND, sizes = self._problem(self.stem(x))
        for k, (_, image_ND) in enumerate(islice(anderson(f, zero_ND), at[-1]), 1):
            if k in at:
                yield _resize(_join(_unpack(image_ND, sizes), self.head), x.shape[-2:])

    @torch.no_grad()
    def equilibrium(self, x: Tensor, *, start: Sequence[Tensor] | None = None, tolerance: float = 1e-4, most: int = 100
                    ) -> tuple[list[Tensor], Tensor]:
        r"""Maps f(z) of each row's first z where \|f(z) - z\| <= tolerance \|f(z)\|, and the applications (N,) it took.

        A row at rest stays as it is while others go on. OfframpError where a row needs more than ``most``.
        """
        f, z_ND, sizes = self._problem(self.stem(x))
        z_ND = z_ND if start is None else _pack(start)
        found, taken = torch.zeros_like(z_ND), torch.zeros(len(x), dtype=torch.long, device=x.device)
        for k, (z, image) in enumerate(islice(anderson(f, z_ND), most), 1):
            there = (image - z).norm(dim=1) <= tolerance * image.norm(dim=1)
            new = there & (taken == 0)
            found, taken = torch.where(new[:, None], image, found), torch.where(new, k, taken)
            if bool((taken > 0).all()):
                return _unpack(found, sizes), taken
        left, moving = float(((image - z).norm(dim=1) / image.norm(dim=1)).max()), int((taken == 0).sum())
        raise OfframpError(expected=f"rows at rest within {most} applications of the cell",
                           got=f"{moving} of {len(x)} that still move, by up to {left:.2g} of their size",
                           where="MDEQ.equilibrium()", todo="allow more, ask for less, or train the network longer")

    def exits(self, *at: int) -> tuple[str, ...]:
        """Names of the sites after so many applications of the cell, for ``attach``."""
        if any(not 1 <= k < self.steps for k in at):
            raise OfframpError(expected=f"applications 1 to {self.steps - 1}, before the last", got=str(at),
                               where="MDEQ.exits()", todo="give more steps, or take the network's own answer")
        return tuple(f"cell#{k - 1}" if k > 1 else "cell" for k in at)

    def decoder(self, site: Any) -> nn.Module:
        """What ``attach(heads=...)`` hangs at a site: the network's own head, shared, on the cell's maps there.

        ``fit`` refuses to train such exits: train the network before, as it is.
        """
        height, width = site.site.live[-len(self.channels)].shape[2:]
        return Decoder(self.head, len(self.channels), (site.out_size[0] / height, site.out_size[1] / width))

    def _problem(self, injected: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor, _Sizes]:
        """f on flat states, where the solver starts, and the sizes (C, H, W) of the maps."""
        height, wide = injected.shape[-2:]
        sizes = []
        for width in self.channels:
            sizes.append((width, height, wide))
            height, wide = (height + 1) // 2, (wide + 1) // 2
        zero_ND = injected.new_zeros(injected.shape[0], sum(c * h * w for c, h, w in sizes))
        return lambda z_ND: _pack(self.cell(_unpack(z_ND, sizes), injected)), zero_ND, sizes

    def _taught(self, f: Callable[[Tensor], Tensor], zero_ND: Tensor) -> Tensor:
        """The same state as without gradients, the last application again with them."""
        with torch.no_grad():
            z_ND = _nth(anderson(f, zero_ND), self.steps)[0]
        z_ND = z_ND.detach().requires_grad_()
        image_ND = f(z_ND)
        if not self.gradient_steps:
            return image_ND
        return _Implicit.apply(image_ND, z_ND, self.gradient_steps)  # type: ignore[no-any-return]


@final
class Decoder(nn.Module):
    """A head on the last maps of a frontier; logits so many times as large as the finest of them."""

    def __init__(self, head: nn.Module, maps: int, scale: tuple[float, float]) -> None:
        super().__init__()
        self.head, self.maps, self.scale = head, maps, scale

    def forward(self, *frontier: Tensor) -> Tensor:
        maps = frontier[-self.maps:]
        height, width = maps[0].shape[-2:]
        return _resize(_join(maps, self.head), (round(height * self.scale[0]), round(width * self.scale[1])))


def _join(maps: Sequence[Tensor], head: nn.Module) -> Tensor:
    finest, *coarser = maps
    joined = torch.cat([finest, *(_resize(z, finest.shape[-2:]) for z in coarser)], dim=1)
    return head(joined)  # type: ignore[no-any-return]


def _resize(x_NCHW: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x_NCHW, size=tuple(size), mode="bilinear", align_corners=False)


def _pack(maps: Sequence[Tensor]) -> Tensor:
    return torch.cat([z.flatten(1) for z in maps], dim=1)


def _unpack(z_ND: Tensor, sizes: _Sizes) -> list[Tensor]:
    parts = z_ND.split([c * h * w for c, h, w in sizes], dim=1)
    return [part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)]


def _nth(points: Iterator[tuple[Tensor, Tensor]], n: int) -> tuple[Tensor, Tensor]:
    return next(islice(points, n - 1, None))


def mdeq_small(num_classes: int = 19, **how: Any) -> MDEQ:
    """MDEQ-small as ADP-C counts it: 32 to 256 channels at 1/4 to 1/32, five times as many inside."""
    return MDEQ(num_classes, **how)

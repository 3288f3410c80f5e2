"""tune_: swap layers that leave the fast path of the installed CPU library for an equal form that measures faster."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offramp.cost.latency import measure

__all__ = ["ShiftedConv2d", "Tuned", "shifted_conv2d", "tune_"]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was measured of one convolution."""

    name: str
    shape: tuple[int, ...]
    """Of the input it was measured on."""
    conv_ms: float
    shifted_ms: float
    swapped: bool


def shifted_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int],
                   dilation: tuple[int, int]) -> Tensor:
    """A convolution of stride 1 as one matmul for each tap, over the places where the tap meets no padding.

    x (N, C, H, W), weight (O, C, h, w) -> (N, O, H', W'), channels last. Sums in float32, whatever the type of x.
    At dilation 36 on 65x65 the taps of a 3x3 meet 40 % of the places that a padded convolution multiplies.
    """
    rows, _, high, wide = x.shape
    outs, _, kernel_h, kernel_w = weight.shape
    out_h = high + 2 * padding[0] - dilation[0] * (kernel_h - 1)
    out_w = wide + 2 * padding[1] - dilation[1] * (kernel_w - 1)
    pixels = x.permute(0, 2, 3, 1)
    total = torch.zeros(rows, out_h, out_w, outs, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if bias is not None:
        total += bias
    for i in range(kernel_h):
        dy = i * dilation[0] - padding[0]
        top, bottom = max(0, -dy), min(out_h, high - dy)
        for j in range(kernel_w):
            dx = j * dilation[1] - padding[1]
            left, right = max(0, -dx), min(out_w, wide - dx)
            if top < bottom and left < right:
                seen = pixels[:, top + dy : bottom + dy, left + dx : right + dx]
                total[:, top:bottom, left:right] += seen @ weight[:, :, i, j].t()
    return total.to(x.dtype).permute(0, 3, 1, 2)


torch.fx.wrap("shifted_conv2d")  # one node of a trace: its loop reads sizes


class ShiftedConv2d(nn.Conv2d):
    """A ``Conv2d`` of stride 1 that runs as shifted matmuls; same parameters, same ``state_dict``."""

    def forward(self, input: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        return shifted_conv2d(input, self.weight, self.bias, (self.padding[0], self.padding[1]),
                              (self.dilation[0], self.dilation[1]))


def tune_(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    pays: float = 1.1,
    min_dilation: int = 12,
    min_channels: int = 256,
    repeats: int = 5,
) -> tuple[Tuned, ...]:
    """Swap dilated convolutions for shifted matmuls where that is measured to be faster here; returns what it measured.

    oneDNN leaves its fast path for bfloat16 convolutions of dilation >= 12 with many channels (ASPP of DeepLab) on
    some processors: on one with AMX, 119-292 ms against 12-22 ms. On others the library's own form wins, and
    the model is left alone. Results are equal to float tolerance; parameters and ``state_dict`` keys stay.

    example_inputs: shows the layers their true input sizes; without it they are measured on maps of 64x64.
    pays: swap where the convolution takes this many times longer.
    """
    candidates = {
        name: module for name, module in model.named_modules()
        if type(module) is nn.Conv2d and _fits(module, min_dilation, min_channels)
    }
    shapes = _shapes(model, example_inputs, candidates) if candidates and example_inputs is not None else {}
    measured: dict[Any, tuple[float, float]] = {}
    done = []
    for name, conv in candidates.items():
        shape = shapes.get(name, (1, conv.in_channels, 64, 64))
        key = (shape, conv.weight.shape, conv.dilation, conv.padding, conv.weight.dtype)
        if key not in measured:
            measured[key] = _race(conv, shape, repeats)
        conv_ms, shifted_ms = measured[key]
        swap = conv_ms > pays * shifted_ms
        if swap:
            conv.__class__ = ShiftedConv2d  # in place: hooks, parameters and references to the module stay
        done.append(Tuned(name=name, shape=shape, conv_ms=conv_ms, shifted_ms=shifted_ms, swapped=swap))
    return tuple(done)


def _fits(conv: nn.Conv2d, min_dilation: int, min_channels: int) -> bool:
    return (
        max(conv.dilation) >= min_dilation and conv.in_channels >= min_channels and conv.groups == 1
        and set(conv.stride) == {1} and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        and conv.weight.device.type == "cpu"
    )


def _shapes(model: nn.Module, example_inputs: Any, convs: dict[str, nn.Conv2d]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            shapes[name] = tuple(args[0].shape)

        return hook

    handles = [conv.register_forward_pre_hook(note(name)) for name, conv in convs.items()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode():
            if isinstance(example_inputs, dict):
                model(**example_inputs)
            else:
                model(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return shapes


def _race(conv: nn.Conv2d, shape: tuple[int, ...], repeats: int) -> tuple[float, float]:
    weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
    padding, dilation = (int(conv.padding[0]), int(conv.padding[1])), (conv.dilation[0], conv.dilation[1])
    with torch.random.fork_rng(devices=[]):
        x = torch.randn(shape).to(weight.dtype).contiguous(memory_format=torch.channels_last)
    times = measure({
        "conv": lambda: nn.functional.conv2d(x, weight, bias, padding=padding, dilation=dilation),
        "shifted": lambda: shifted_conv2d(x, weight, bias, padding, dilation),
    }, repeats=repeats, warmup=1, budget_s=10)
    return times["conv"].p50_ms, times["shifted"].p50_ms

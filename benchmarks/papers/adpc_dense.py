"""The dense side of ``adpc_clock.py``: a network with exits, the part after its first, or a branch, by each engine."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import offramp
from offramp._kernel.layout import reads_of
from offramp._kernel.ops import Conv, Op, Program, Segment, View
from offramp.graph import split, trace
from offramp.nn.guest import fold_batch_norms_

__all__ = ["ENGINES", "Branch", "Dense", "made", "restricted"]

ENGINES = ("eager", "compile", "openvino")


class Dense(nn.Module):
    """A network's stages from one on with their heads, as plain modules: (tensors) -> all their logits."""

    def __init__(self, net: offramp.MultiExit, state: Any, values: Sequence[Any], first: int = 0) -> None:
        """state: at the start of that stage, for inputs of any size; values: that state's, of the size to come."""
        super().__init__()
        net = copy.deepcopy(net)
        self.first, self.values = first, tuple(values)
        self.lives = [len(site.live) for site in net.sites]
        self.stages = nn.ModuleList(stage.module(state.program) for stage in net.stages[first:])
        heads = [net.head(net.columns[net.columns_at(k)[0]].name) for k in range(first, len(net.sites))]
        for stage in self.stages:
            fold_batch_norms_(stage, stage.graph)
        given: Any = (*state.tensors, *state.carried, *state.values)
        for k, (stage, head) in enumerate(zip(self.stages, heads, strict=False), first):
            with torch.no_grad():
                given = stage(*given)
            live = tuple(given[: self.lives[k]])
            fold_batch_norms_(head, split(trace(head, live), [])[0].module().graph, "guest.")
        self.heads = nn.ModuleList(heads)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        given: Any = (*tensors, *self.values)
        said = []
        for k, stage in enumerate(self.stages, self.first):
            given = stage(*given)
            if k < len(self.lives):
                said.append(self.heads[k - self.first](*given[: self.lives[k]]))
        return [*said, given[0]]


def restricted(program: Program, level: int) -> Program:
    """What writes maps of one level, as a program of one segment; ``kept`` is what it reads from outside, and gives."""
    ops = tuple(op for part in program.segments for op in part.ops if program.maps[op.out.map].level == level)
    written = {op.out.map for op in ops}
    read = {view.map for op in ops for view in reads_of(op)}
    return Program(program.levels, program.regions, program.maps, (Segment(f"level {level}", ops),),
                   frozenset(read - written | written - read))


class Branch(nn.Module):
    """A program of one segment on all places of its maps, the norms folded: (maps (N, C, H, W)) -> what it gives."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program, (segment,) = program, program.segments
        written = {op.out.map for op in segment.ops}
        self.inputs = [at for at in sorted(program.kept) if at not in written]
        self.outputs = [at for at in sorted(program.kept) if at in written]
        self.steps = nn.ModuleList(_layer(op) for op in segment.ops)

    def macs(self) -> int:
        """Of its convolutions, for each place."""
        return sum(op.weight.numel() for op in self.program.segments[0].ops if isinstance(op, Conv))

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        held: dict[View, Tensor] = {
            View(at, 0, self.program.maps[at].channels): x for at, x in zip(self.inputs, tensors, strict=True)}
        for op, layer in zip(self.program.segments[0].ops, self.steps, strict=True):
            held[op.out] = self._done(op, layer, held)
        return [self._get(View(at, 0, self.program.maps[at].channels), held) for at in self.outputs]

    def _done(self, op: Op, layer: Any, held: dict[View, Tensor]) -> Tensor:
        xs = [self._get(view, held) for view in reads_of(op)]
        if isinstance(op, Conv):
            y = layer(xs[0])
            y = y if op.residual is None else y + xs[1]
            return F.relu(y) if op.relu else y
        if not isinstance(op, offramp._kernel.ops.Sum):
            return layer(xs[0])  # type: ignore[no-any-return]
        level = self.program.levels[self.program.maps[op.out.map].level]
        total: Any = 0
        for x, term in zip(xs, op.terms, strict=True):
            if term.resize is not None:
                corners = term.resize.align_corners if term.resize.mode == "bilinear" else None
                x = F.interpolate(x, (level.height, level.width), mode=term.resize.mode, align_corners=corners)
            total = total + x
        total = total if op.scale is None else total * op.scale.view(-1, 1, 1)
        total = total if op.shift is None else total + op.shift.view(-1, 1, 1)
        return F.relu(total) if op.relu else total

    def _get(self, view: View, held: dict[View, Tensor]) -> Tensor:
        if view in held:
            return held[view]
        parts = sorted((part for part in held if part.map == view.map), key=lambda part: part.first)
        whole = torch.cat([held[part] for part in parts], 1)
        return whole[:, view.first : view.first + view.count]


def _layer(op: Op) -> nn.Module:
    if isinstance(op, Conv):
        count, inputs = op.weight.shape[0], op.weight.shape[1] * op.groups
        made = nn.Conv2d(inputs, count, op.window.kernel, op.window.stride, op.window.padding, op.window.dilation,
                         op.groups)
        made.weight.data = op.weight.float() * op.scale.float().view(-1, 1, 1, 1)
        made.bias.data = op.shift.float()  # type: ignore[union-attr]
        return made
    if isinstance(op, offramp._kernel.ops.Pool):
        if op.kind == "max":
            return nn.MaxPool2d(op.window.kernel, op.window.stride, op.window.padding, op.window.dilation)
        return nn.AvgPool2d(op.window.kernel, op.window.stride, op.window.padding,
                            count_include_pad=op.counts_padding)
    return nn.Identity()


def made(net: nn.Module, engine: str, tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32
         ) -> Callable[[], Any]:
    """One call of an engine on these inputs."""
    if engine == "openvino":
        import openvino

        # exported: sizes that are rounded on their way cannot be traced
        model = openvino.convert_model(torch.export.export(net, tuple(x.contiguous() for x in tensors)))
        ready = openvino.compile_model(model, "CPU", {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16"})
        request, inputs = ready.create_infer_request(), {k: x.contiguous().numpy() for k, x in enumerate(tensors)}
        return lambda: request.infer(inputs)
    net = copy.deepcopy(net).to(dtype=dtype, memory_format=torch.channels_last)
    ours = [x.to(dtype=dtype, memory_format=torch.channels_last) for x in tensors]
    run: Any = torch.compile(net, dynamic=False, options={"freezing": True}) if engine == "compile" else net
    return lambda: run(*ours)

"""Dense execution of one network by the engines that there are, under one clock."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from offramp.graph import split
from offramp.graph.trace import trace
from offramp.nn.guest import fold_batch_norms_

__all__ = ["ENGINES", "timed"]

ENGINES = ("eager", "compile", "openvino")


def timed(nets: Mapping[float, nn.Module], engine: str, size: tuple[int, int], repeats: int) -> dict[float, float]:
    """Median CPU milliseconds of one picture on one thread, the networks in turn; of all threads' work, otherwise.

    One thread's own time does not count what other processes take from it.
    """
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.inference_mode():
        calls = {width: _call(net, engine, x) for width, net in nets.items()}
        samples: dict[float, list[float]] = {width: [] for width in nets}
        for turn in range(2 + repeats):
            for width, call in calls.items():
                began = clock()
                call()
                if turn > 1:
                    samples[width].append(1e3 * (clock() - began))
    return {width: statistics.median(times) for width, times in samples.items()}


def _call(net: nn.Module, engine: str, x: torch.Tensor) -> Callable[[], Any]:
    few = torch.randn(2, 3, 64, 128)
    if engine == "openvino":
        import openvino

        with torch.inference_mode(False):
            model = openvino.convert_model(net, example_input=x, input=[list(x.shape)])
        made = openvino.compile_model(model, "CPU", {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32"})
        request, inputs = made.create_infer_request(), x.numpy()
        return lambda: request.infer({0: inputs})
    with torch.inference_mode(False):
        fold_batch_norms_(net, split(trace(net, few), [])[0].module().graph, "guest.")
    net = net.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    if engine == "compile":
        net = torch.compile(net, options={"freezing": True})
    return lambda: net(x)

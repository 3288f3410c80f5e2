"""Working on somebody's model without leaving a trace."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["bytes_of", "evaluating", "fingerprint_of", "fold_batch_norms_"]


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode and ``torch.inference_mode`` for a while; every module's own ``training`` comes back, whatever happens.

    >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with evaluating(net):
    ...     net[0].training
    False
    >>> [module.training for module in net]
    [True, False]
    """
    found = {id(module): (module, module.training) for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, training in found.values():
            module.training = training


def fingerprint_of(net: nn.Module) -> str:
    """Sixteen hex digits of the structure, names and bytes of a network: one changed weight changes them."""
    digest = hashlib.sha256()
    for name, module in net.named_modules():
        digest.update(f"{name}:{type(module).__name__};".encode())
    for name, tensor in net.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            digest.update(bytes_of(tensor))
    return digest.hexdigest()[:16]


def bytes_of(tensor: Tensor) -> bytes:
    """The values of a tensor, row by row, whatever its layout."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def fold_batch_norms_(model: nn.Module, module_graph: fx.Graph, prefix: str = "") -> int:
    """Fold each batch norm that alone reads a convolution into its weights, for inference; returns how many.

    ``module_graph`` shows who reads what, its module calls named ``prefix`` + the path in ``model``. Modules that are
    called twice are left alone. Answers change by rounding only.
    """
    calls = [node for node in module_graph.nodes if node.op == "call_module"]
    times = Counter(str(node.target) for node in calls)
    folded = 0
    for node in calls:
        before = node.args[0] if node.args else None
        if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
            continue
        names = str(before.target).removeprefix(prefix), str(node.target).removeprefix(prefix)
        conv, norm = model.get_submodule(names[0]), model.get_submodule(names[1])
        if times[str(before.target)] > 1 or times[str(node.target)] > 1 or type(conv) is not nn.Conv2d:
            continue
        if type(norm) is not nn.BatchNorm2d or norm.running_mean is None or _hooked(conv) or _hooked(norm):
            continue
        _put(model, names[0], fuse_conv_bn_eval(conv.eval(), norm.eval()))
        _put(model, names[1], nn.Identity())
        folded += 1
    return folded


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or getattr(module, "parametrizations", None))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module.eval())

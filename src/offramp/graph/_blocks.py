"""Which modules are the repeated units of a network: the default places for exits."""

from torch import nn

__all__ = ["blocks_of"]


def blocks_of(model: nn.Module) -> frozenset[str]:
    """The repeated units: children of a container, or siblings of one class; not inside another unit, not leaves."""
    found: set[str] = set()

    def walk(module: nn.Module, path: str) -> None:
        grown = [(name, child) for name, child in module.named_children() if _has_children(child)]
        kinds = [type(child) for _, child in grown]
        for name, child in grown:
            inner = f"{path}.{name}" if path else name
            holds_units = _is_container(child) and any(map(_has_children, child.children()))
            if not holds_units and (_is_container(module) or kinds.count(type(child)) > 1):
                found.add(inner)
            else:
                walk(child, inner)

    walk(model, "")
    return frozenset(found)


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _is_container(module: nn.Module) -> bool:
    forward = type(module).forward
    return forward is nn.Sequential.forward or (
        isinstance(module, nn.ModuleList | nn.ModuleDict) and forward is nn.ModuleList.forward)

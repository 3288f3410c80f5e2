"""What hangs on a network: the heads of every site, their parameters and costs, beside the network's own."""

from torch import nn

from offramp.nn.heads import head_macs
from offramp.nn.multiexit import MultiExit

__all__ = ["overview"]


def overview(net: MultiExit) -> str:
    """A table, a row a site: how many heads, their parameters together, and from what to what each costs.

    MESS (arXiv:2106.03527) calls the network with all candidates over-provisioned; only the heads of a plan are served.
    """
    whole = net.sites[0].macs_before + net.sites[0].macs_after if net.sites else 0
    unit, scale = ("G", 1e9) if whole >= 1e9 else ("M", 1e6)
    rows = [("site", f"{unit}MACs before", "after", "heads", "M parameters", f"{unit}MACs a head")]
    for k, site in enumerate(net.sites):
        heads = [net.head(net.columns[c].name) for c in net.columns_at(k)]
        costs = [head_macs(head, site.live) / scale for head in heads]
        spread = f"{min(costs):.3f}" + (f" - {max(costs):.3f}" if len(costs) > 1 else "")
        rows.append((site.name, f"{site.macs_before / scale:.3f}", f"{site.macs_after / scale:.3f}", str(len(heads)),
                     f"{sum(map(_parameters, heads)) / 1e6:.3f}", spread))
    count = len(net.columns) - 1
    rows.append((f"all {count} heads", "", "", str(count), f"{_parameters(net.heads) / 1e6:.3f}", ""))
    rows.append(("the network", f"{whole / scale:.3f}", "0.000", "", f"{_parameters(net.backbone) / 1e6:.3f}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [row[0].ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)
                                               ).rstrip() for row in rows]
    return "\n".join([*lines, *net.notes])


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())

"""``net.deploy(plan)``: from a plan to a plain module that obeys it."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from offramp.cost.macs import count
from offramp.errors import HeadError, OfframpError, PlanError
from offramp.functional.confidence import top
from offramp.nn.guest import evaluating, fingerprint_of
from offramp.nn.multiexit import MultiExit, columns_at
from offramp.nn.output import form_of, with_logits
from offramp.nn.sizes import sizes_of
from offramp.nn.slim import Slimmable
from offramp.nn.widths import exits_of, narrow_exits
from offramp.runtime._evidence import gather_for
from offramp.runtime._legs import Build, Engine, build_legs, chain
from offramp.runtime.adaptive import Adaptive, Part
from offramp.runtime.budgeted import cut_short
from offramp.runtime.deadline import ByDeadline
from offramp.types import ExitColumn, Plan

__all__ = ["deploy"]


@overload
def deploy(
    net: MultiExit | Slimmable, plan: Plan, *,
    engine: Engine = ..., dtype: torch.dtype | Literal["bf16", "fp32"] | None = ...,
    shrink: bool | Literal["auto"] = ..., channels_last: bool | None = ..., fold: bool | None = ...,
) -> Adaptive: ...
@overload
def deploy(
    net: MultiExit | Slimmable, plan: Sequence[Plan], *,
    engine: Engine = ..., dtype: torch.dtype | Literal["bf16", "fp32"] | None = ...,
    shrink: bool | Literal["auto"] = ..., channels_last: bool | None = ..., fold: bool | None = ...,
) -> ByDeadline: ...
def deploy(
    net: MultiExit | Slimmable,
    plan: Plan | Sequence[Plan],
    *,
    engine: Engine = "eager",
    dtype: torch.dtype | Literal["bf16", "fp32"] | None = None,
    shrink: bool | Literal["auto"] = "auto",
    channels_last: bool | None = None,
    fold: bool | None = None,
) -> Adaptive | ByDeadline:
    """Make a plain module that obeys a plan: stages merged between the chosen exits, only their heads kept.

    Of several budgeted plans it makes one that picks among them call by call: :class:`ByDeadline`.

    The network it comes from is left as it is and may go on training. With ``engine="eager"`` and nothing else asked,
    weights are shared with it, and a call in which no row leaves early says what the untouched network says, bit for
    bit; every other choice changes rounding. Of a network of several widths, those that the plan names become narrow
    networks with weights of their own.

    engine: "compile" gives each stage, its head and its confidence to ``torch.compile`` with frozen weights, once for a
        single row and once for any larger batch.
    dtype: "bf16" runs the network in bfloat16; confidences and answers stay as wide as the network was.
    shrink: whether the batch drops the rows that left. "auto" measures once on this machine where that pays.
    channels_last: how 4-D tensors lie; nothing: channels last wherever weights are copied anyway.
    fold: whether batch norms go into the convolutions before them; nothing: wherever weights are copied anyway.

    PlanError where the plan does not belong to this network; HeadError where an exit cannot answer in the form of the
    network's output.
    """
    if not isinstance(plan, Plan):
        return ByDeadline([deploy(net, one, engine=engine, dtype=dtype, shrink=shrink, fold=fold,
                                  channels_last=channels_last) for one in plan])
    _check_plan(net, plan)
    if engine not in ("eager", "compile"):
        raise OfframpError(expected="engine 'eager' or 'compile'", got=repr(engine), where="deploy()")
    if shrink not in (True, False, "auto"):
        raise OfframpError(expected="shrink True, False or 'auto'", got=repr(shrink), where="deploy()")
    narrow = _dtype(dtype)
    copied = engine == "compile" or narrow is not None or bool(channels_last) or bool(fold)
    build = Build(engine=engine, dtype=narrow, channels_last=copied if channels_last is None else channels_last,
                  fold=copied if fold is None else fold)
    answer = _answers(exits_of(net), plan)
    strides = {column.name: column.stride for column in _columns(net)}
    gather = gather_for(plan.task, plan.policy, [strides[name] for name in plan.exits])
    parts, ends, macs = [], [], []
    widths = _by_width(net, plan)
    for _, part, names, ended in widths:
        legs = build_legs(part, names, build, gather.score if plan.setting == "input_dependent" else None)
        if plan.setting == "budgeted" and names:
            legs = cut_short(legs, answer)
        parts.append((legs, part.logits))
        ends.append(ended)
        macs += _macs(part, names)[: None if ended else -1]
    fast = Adaptive(chain(parts, ends), plan, answer=answer, gather=gather, shrink=shrink, engine=engine, macs=macs,
                    sure=_sureness(exits_of(net)))
    if isinstance(net, Slimmable):
        fast.parts = tuple(
            Part(width, tuple(names), {"backbone": sizes_of(part.backbone),
                                       **{name: sizes_of(part.head(name)) for name in names}}, strides["final"])
            for width, part, names, _ in widths)
    return fast


def _by_width(net: MultiExit | Slimmable, plan: Plan) -> list[tuple[float, MultiExit, list[str], bool]]:
    """Each width that the plan runs, its network, the names of its exits there, and whether its own end is asked."""
    if isinstance(net, MultiExit):
        return [(1.0, net, list(plan.exits), True)]
    columns = {column.name: column for column in _columns(net)}
    widths: dict[float, list[str]] = {}
    for name in plan.exits:
        widths.setdefault(columns[name].width, []).append(name.removesuffix(f"@{columns[name].width:g}"))
    if plan.setting != "budgeted" or not plan.exits:
        widths.setdefault(1.0, [])
    made = []
    for width, names in widths.items():
        ended = width == 1.0 or names[-1] == "final"
        made.append((width, narrow_exits(net, width), [name for name in names if name != "final"], ended))
    return made


def _macs(net: MultiExit, names: Sequence[str]) -> list[int]:
    """Of the backbone, from each exit to the next, and to the end."""
    before = {column.name: site.macs_before for column in net.columns for site in net.sites if site.name == column.site}
    if net.sites:
        whole = net.sites[0].macs_before + net.sites[0].macs_after
    else:
        args, kwargs = net.traced.example()
        with evaluating(net.backbone):
            whole = int(count(net.backbone, *args, **kwargs).total) // len(net.traced.kept)
    ends = [*(before[name] for name in names), whole]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _columns(net: MultiExit | Slimmable) -> tuple[ExitColumn, ...]:
    return net.columns if isinstance(net, MultiExit) else columns_at(exits_of(net).columns, net.widths)


def _answers(net: MultiExit, plan: Plan) -> Callable[[Tensor], Any]:
    """From an exit's logits to an output; holds the output's form, not the network."""
    template = net.traced.output
    if not plan.exits:
        return lambda logits: logits
    said = net.logits(template)
    with_logits(template, said, lambda _: said)
    return form_of(template, said)


def _sureness(net: MultiExit) -> Callable[[Any], Tensor]:
    """From an output to the probability of each row's or pixel's likeliest class; holds no network."""
    reads = net.reads

    def sure(output: Any) -> Tensor:
        if reads is None:
            raise HeadError(expected="a network whose output holds logits", got=type(output).__name__,
                            where="confidence", todo="pass logits= to attach")
        return top(reads(output))

    return sure


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    known = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, torch.float32: torch.float32,
             torch.bfloat16: torch.bfloat16, torch.float16: torch.float16, torch.float64: torch.float64}
    if dtype not in known:
        raise OfframpError(expected="dtype None, 'bf16', 'fp32' or a floating torch.dtype", got=repr(dtype),
                           where="deploy()")
    return known[dtype]


def _check_plan(net: MultiExit | Slimmable, plan: Plan) -> None:
    columns, exits = _columns(net), exits_of(net)
    names = [column.name for column in columns]
    faults = []
    if plan.task != exits.task:
        faults.append(f"task {plan.task!r}, the network's is {exits.task!r}")
    if plan.setting == "budgeted" and len(plan.exits) > 1:
        faults.append(f"{len(plan.exits)} exits in a budgeted plan, which ends at one")
    if missing := [name for name in plan.exits if name not in names[:-1]]:
        faults.append(f"exits {missing}, the network has {names[:-1]}")
    else:
        places = [names.index(name) for name in plan.exits]
        sites = [columns[place].site for place in places]
        if places != sorted(set(places)) or len(set(sites)) != len(sites):
            faults.append(f"exits {list(plan.exits)}, not in order of depth with one a site")
    made_for = plan.fingerprints.get("model")
    if not faults and made_for and made_for != fingerprint_of(exits):
        faults.append(f"network {made_for}, this one is {fingerprint_of(exits)}: other weights or another model")
    if faults:
        raise PlanError(expected="a plan for this network", got="; ".join(faults), where="deploy()",
                        todo="record this network and search a plan on that table.")

"""A network with exits: the guest, its stages between the exits' sites, and the heads that hang there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from offramp.errors import HeadError, PlanError
from offramp.graph import Stage, State, Traced, begin, split
from offramp.graph.cuts import sites_of
from offramp.nn.output import read_logits
from offramp.nn.reading import Layout, MapReading, read_as_map, reads_of
from offramp.types import ExitColumn, ExitSite, Task

__all__ = ["MultiExit", "columns_at", "head_key"]


def head_key(column: str) -> str:
    """A column's name as a key of ``net.heads``: module names may not hold dots.

    >>> head_key("layer1.2/wide")
    'layer1:2/wide'
    """
    return column.replace(".", ":")


def columns_at(columns: Sequence[ExitColumn], widths: Sequence[float]) -> tuple[ExitColumn, ...]:
    """The columns of a table of several widths, the narrowest first; those of the full width keep their names.

    >>> [column.name for column in columns_at([ExitColumn(name="final", site="final")], (0.25, 1.0))]
    ['final@0.25', 'final']
    """
    narrow = (replace(column, name=f"{column.name}@{width:g}", site=f"{column.site}@{width:g}", width=width)
              for width in widths if width < 1 for column in columns)
    return (*narrow, *columns)


class MultiExit(nn.Module):
    """Steps through a guest network and answers at every exit; made by :func:`offramp.attach`.

    ``net(x)`` is a list of logits, one a column; the last is the backbone's own, bit for bit. ``net.begin(x)`` and
    ``net.step(k, state)`` go one site at a time, so that whoever steps may drop rows of the state in between.
    The guest stays as it is, under the same ``state_dict`` keys behind ``backbone.``; its stages share its parameters.
    """

    deploy: ClassVar[Callable[..., nn.Module]]
    """``net.deploy(plan)``; the runtime stands above this room, so ``offramp/__init__`` hangs it here."""
    part: ClassVar[Callable[..., nn.Module]]
    """``net.part(upto=exit)``: the network up to there alone; hung here too."""
    rest: ClassVar[Callable[..., nn.Module]]
    """``net.rest(after=exit)``: what goes on from a part's frontier; hung here too."""

    def __init__(
        self,
        backbone: nn.Module,
        traced: Traced,
        sites: Sequence[ExitSite],
        heads: Mapping[str, Mapping[str, nn.Module]],
        *,
        task: Task,
        num_classes: int,
        logits: Callable[[Any], Tensor] | None = read_logits,
    ) -> None:
        super().__init__()
        assert list(heads) == [site.name for site in sites], "heads follow the sites"
        self.backbone = backbone
        self.task, self.num_classes, self.sites = task, num_classes, tuple(sites)
        self.reads = logits
        """Finds the logits in the guest's output; None where it holds none."""
        self._traced, self._stages = traced, split(traced, [site.name for site in sites])
        said = tuple(logits(traced.output).shape) if task == "dense" and logits is not None else ()
        columns: list[ExitColumn] = []
        self._columns_at: list[range] = []
        self.heads = nn.ModuleDict()
        for site in self.sites:
            self._columns_at.append(range(len(columns), len(columns) + len(heads[site.name])))
            for head_name, head in heads[site.name].items():
                column = ExitColumn(name=f"{site.name}/{head_name}" if head_name else site.name,
                                    site=site.name, head=head_name, stride=_stride(head, site, said))
                columns.append(column)
                self.heads[head_key(column.name)] = head
        # where the network itself computes its logits it does not say; the deepest exit's map is the nearest
        last = columns[-1].stride if columns else 1
        self.columns = (*columns, ExitColumn(name="final", site="final", stride=last))

    @property
    def traced(self) -> Traced:
        """The guest's trace, from which other cuts of it can be split."""
        return self._traced

    @property
    def stages(self) -> Sequence[Stage]:
        """``len(sites) + 1`` stages; chained they are the guest."""
        return self._stages

    def head(self, column: str) -> nn.Module:
        """The head of a column, by its name."""
        if head_key(column) not in self.heads:
            raise PlanError(
                expected=f"one of the exits {[c.name for c in self.columns[:-1]]}", got=repr(column), where="net.head()"
            )
        return self.heads[head_key(column)]

    def logits(self, output: Any) -> Tensor:
        """The logits in the guest's output; HeadError where it holds none (a submodule's feature maps, say)."""
        if self.reads is None:
            raise HeadError(
                expected="a network whose output holds logits", got=type(output).__name__, where="net.logits()",
                todo="pass logits= to attach; without it exits can be stepped through, but not taught by the network",
            )
        return self.reads(output)

    def columns_at(self, k: int) -> range:
        """Indices of the columns that hang at site ``k``."""
        return self._columns_at[k]

    def begin(self, *args: Any, **kwargs: Any) -> State:
        """The state before the first stage: the network's inputs."""
        return begin(self._traced, *args, **kwargs)

    def step(self, k: int, state: State) -> tuple[State | None, Any]:
        """Run stage ``k``: the state at site ``k`` and what its exit says.

        The second value is the logits (a tuple of them where the site has several candidate heads); after the last
        site, ``k == len(sites)``, it is the guest's own output, whole, and the state is None.
        """
        after = self._stages[k](state)
        if k == len(self.sites):
            return None, after
        said = [self.heads[head_key(self.columns[c].name)](*after.tensors) for c in self._columns_at[k]]
        return after, said[0] if len(said) == 1 else tuple(said)

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Logits of every column, by depth; the last is the guest's own (its whole output, where that holds none)."""
        state = self.begin(*args, **kwargs)
        said: list[Tensor] = []
        for k in range(len(self.sites)):
            after, logits = self.step(k, state)
            said.extend(logits if isinstance(logits, tuple) else (logits,))
            state = cast(State, after)
        output = self.step(len(self.sites), state)[1]
        said.append(output if self.reads is None else self.reads(output))
        return said

    def retraced(self) -> "MultiExit":
        """The same network and heads, traced and cut anew: for when layers of it have changed their shapes."""
        traced = Traced(self.backbone, *self._traced.example())
        known = {site.name: site for site in sites_of(traced)}
        heads = {site.name: {column.head: self.head(column.name) for column in self.columns if column.site == site.name}
                 for site in self.sites}
        made = MultiExit(self.backbone, traced, [known[site.name] for site in self.sites], heads, task=self.task,
                         num_classes=self.num_classes, logits=self.reads)
        made.notes = self.notes
        return made.train(self.training)

    def extra_repr(self) -> str:
        return f"exits={[column.name for column in self.columns]}, task={self.task}, num_classes={self.num_classes}"

    def freeze_backbone_(self) -> "MultiExit":
        """Stop gradients into the guest and put it in eval mode; ``train()`` then leaves it there."""
        self.backbone.requires_grad_(False)
        self._frozen = True
        self.train(self.training)
        return self

    def unfreeze_backbone_(self) -> "MultiExit":
        """Let the guest learn again."""
        self.backbone.requires_grad_(True)
        self._frozen = False
        return self

    _frozen: bool = False
    notes: tuple[str, ...] = ()
    """What attach left out, and why."""

    def train(self, mode: bool = True) -> "MultiExit":
        super().train(mode)
        if self._frozen:
            self.backbone.eval()
        return self


def _stride(head: nn.Module, site: ExitSite, said: tuple[int, ...]) -> int:
    """Output pixels for each step of the map on which a head computes its logits; 1 where it reads none.

    A module of the user's is taken to read a frontier as a spec's heads do.
    """
    if len(said) != 4:
        return 1
    own = getattr(head, "reading", None)
    if isinstance(own, MapReading):
        return max(1, round(own.scale[0])) if own.scale else 1
    size: tuple[int, int] = said[2], said[3]
    layout: Layout = getattr(getattr(head, "spec", None), "layout", "auto")
    try:
        scale = read_as_map(reads_of(site.live, "dense", size, layout), "dense", size).scale
    except HeadError:
        return 1
    return max(1, round(scale[0])) if scale else 1

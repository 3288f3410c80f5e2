"""Search of head shapes: each site's heads are trained on cached features and weighed against what they cost.

Axes: N samples, K classes.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from offramp._extras import require
from offramp.errors import DataError, HeadError, OfframpError
from offramp.functional.losses import kl_to_teacher
from offramp.nn.heads import HeadSpec, build, default_spec, head_macs
from offramp.nn.shortcut import ShortcutSpec, build_shortcut
from offramp.train.batches import rng_kept, seed_all, source_of
from offramp.train.features import Features, Refused, collect
from offramp.train.recipe import Recipe
from offramp.train.recipes import label_free
from offramp.train.setup import accelerated, as_found, run_folder, set_modes, show_progress
from offramp.types import ExitSite, Task

if TYPE_CHECKING:
    from offramp.nn.multiexit import MultiExit

__all__ = ["HeadSearch", "HeadTrial", "label_free_space", "search_heads"]

Spec = HeadSpec | ShortcutSpec
Space = Callable[[Any, ExitSite, Task], Spec]


@dataclass(frozen=True, kw_only=True)
class HeadTrial:
    """One head, trained and measured on samples that were held out."""

    spec: Spec
    macs: int
    agreement: float
    """Share of samples (pixels) for which it names the class that the backbone names."""
    leaving: float
    """Share of samples that may leave here, the surest first, before the tolerance is spent on disagreements."""
    saved_macs: float
    """Per sample, if this were the only exit: leaving * MACs after the site - MACs of the head."""


@dataclass(frozen=True, kw_only=True)
class HeadSearch:
    """What a search tried at each site, and what it chose: ``attach(model, x, exits=..., heads=found.specs)``."""

    trials: Mapping[str, tuple[HeadTrial, ...]]
    tolerance: float

    def best(self, site: str) -> HeadTrial:
        """The head that saves most."""
        return max(self.trials[site], key=lambda trial: trial.saved_macs)

    @property
    def specs(self) -> dict[str, Spec]:
        """The chosen spec of each site."""
        return {site: self.best(site).spec for site in self.trials}

    def front(self, site: str) -> tuple[HeadTrial, ...]:
        """Heads that no other one beats in both agreement and MACs, cheapest first."""
        kept: list[HeadTrial] = []
        for trial in sorted(self.trials[site], key=lambda t: (t.macs, -t.agreement)):
            if not kept or trial.agreement > kept[-1].agreement:
                kept.append(trial)
        return tuple(kept)

    def __str__(self) -> str:
        lines = [f"{'site':20} {'head M MACs':>11} {'agreement':>9} {'leaving':>8} {'saves M MACs':>12}  head "
                 f"(of {sum(map(len, self.trials.values()))} tried; tolerance {self.tolerance:g})"]
        for site in self.trials:
            best = self.best(site)
            lines.append(f"{site:20} {best.macs / 1e6:11.3f} {best.agreement:9.4f} {best.leaving:8.3f} "
                         f"{best.saved_macs / 1e6:12.3f}  {_brief(best.spec)}")
        return "\n".join(lines)


def _brief(spec: Spec) -> str:
    if isinstance(spec, ShortcutSpec):
        return f"the network's own tail, of whose blocks it keeps {', '.join(spec.keep or ()) or 'none'}"
    plain = HeadSpec()
    names = ("convs", "separable", "blocks", "gate", "pool", "linears", "dropout")
    return ", ".join(f"{n}={getattr(spec, n)}" for n in names if getattr(spec, n) != getattr(plain, n)) or "one linear"


def label_free_space(trial: Any, site: ExitSite, task: Task) -> Spec:
    """The label-free paper's space (up to two convolutions, then up to two linears), plus what it does not have:
    residual blocks, a gate, and thinned copies of the network's own tail.

    Widths follow the frontier's channels; frontiers without maps have linears alone.
    """
    maps = task == "dense" or all(len(live.shape) == 4 for live in site.live)
    kinds = ["tail", "linear", *(["conv", "conv2", "block", "block2"] if maps else [])]
    kind = trial.suggest_categorical("kind", kinds)
    if kind == "tail":
        return ShortcutSpec(share=trial.suggest_categorical("share", [0.03, 0.07, 0.15, 0.3]))
    linears = () if task == "dense" else ((), (64,), (128,))[trial.suggest_int("linears", 0, 2)]
    if not maps:
        return HeadSpec(linears=linears)
    width = min(256, max(8, sum(min(live.shape[1:]) for live in site.live if len(live.shape) == 4)))
    wide = [max(8, round(width * trial.suggest_categorical(f"width{i}", [0.5, 1.0, 2.0, 4.0]))) for i in range(2)]
    stride = [trial.suggest_categorical(f"stride{i}", [1, 2]) for i in range(2)]
    number = {"linear": 0, "conv": 1, "conv2": 2, "block": 1, "block2": 2}[kind]
    if kind.startswith("block"):
        return HeadSpec(blocks=tuple(zip(wide, stride, strict=True))[:number], linears=linears)
    kernel = [trial.suggest_categorical(f"kernel{i}", [1, 3, 5]) for i in range(2)]
    return HeadSpec(
        convs=tuple(zip(wide, kernel, stride, strict=True))[:number],
        separable=trial.suggest_categorical("separable", [False, True]), linears=linears,
        gate=task == "dense" and trial.suggest_categorical("gate", [False, True]),
        pool=trial.suggest_categorical("pool", [1, 2]) if task == "classify" else 1,
    )


def search_heads(
    net: "MultiExit",
    data: Any,
    *,
    trials: int = 30,
    epochs: int = 8,
    tolerance: float = 0.01,
    largest: float = 0.5,
    held_out: float = 0.25,
    recipe: Recipe | None = None,
    space: Space = label_free_space,
    run_dir: str | Path | None = None,
    cache_bytes: int = 4 * 2**30,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> HeadSearch:
    """Try head shapes at every site of ``net`` on the frozen network's cached features; labels are not read.

    trials: per site; the first are the default head and the default copy of the network's tail, so that on the samples
        held out the choice is never worse than these.
    epochs: of each trial; ``recipe`` overrules the rest of the training.
    tolerance: share of samples that may leave with another class than the backbone's, when heads are compared.
    largest: heads that cost more than this share of the MACs after the site are not tried.
    space: function of an optuna trial, a site and the task that gives a spec.

    Optuna's TPE searches for agreement against MACs, as the paper's NAS does; the choice among what was tried is by
    expected saving. MissingExtra without optuna; DataError where the features do not fit ``cache_bytes``.
    """
    optuna = require("optuna", "search_heads()")
    wrong = {f"trials >= 1, not {trials}": trials < 1, f"held_out in (0, 1), not {held_out}": not 0 < held_out < 1,
             f"tolerance in [0, 1], not {tolerance}": not 0 <= tolerance <= 1}
    if any(wrong.values()):
        raise OfframpError("search_heads(): expected " + "; ".join(text for text, bad in wrong.items() if bad) + ".")
    recipe = recipe or label_free(epochs=epochs, seed=seed)
    source = source_of(data, batch_size=recipe.batch_size, labels=False, seed=seed, where="search_heads()")
    found: dict[str, tuple[HeadTrial, ...]] = {}
    with ExitStack() as stack:
        stack.enter_context(rng_kept())
        stack.enter_context(as_found(net))
        accelerator = stack.enter_context(accelerated(device, None, find_unused=False))
        net.to(accelerator.device)
        set_modes(net, recipe)
        folder = run_folder(run_dir, stack, accelerator) / "features"
        try:
            held = collect(net, source, recipe, folder=folder, limit_bytes=cache_bytes, device=accelerator.device)
        except Refused as why:
            raise DataError(expected="features that fit the cache", got=str(why), where="search_heads()",
                            todo="give fewer samples (torch.utils.data.Subset) or more cache_bytes") from why
        bar = stack.enter_context(show_progress(progress, trials * len(net.sites), 0))
        level = optuna.logging.get_verbosity()
        stack.callback(optuna.logging.set_verbosity, level)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        for k, site in enumerate(net.sites):
            parts = _split(held.site(k), held_out, seed)
            tried = _Tried(net, site, parts, recipe, tolerance, largest, accelerator.device)
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(5, trials // 3))
            study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
            for spec in tried.defaults()[:trials]:
                tried(spec, always=True)
                bar(site.name)
            for _ in range(trials - 2):
                trial = study.ask()
                done = tried(space(trial, site, net.task))
                if done is None:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                else:
                    study.tell(trial, (done.agreement, float(done.macs)))
                bar(site.name)
            found[site.name] = tuple(tried.done.values())
    return HeadSearch(trials=found, tolerance=tolerance)


def _split(features: Features, held_out: float, seed: int) -> tuple[Features, Features]:
    order = torch.randperm(features.count, generator=torch.Generator().manual_seed(seed))
    upto = max(1, round(features.count * (1 - held_out)))
    if upto >= features.count:
        raise DataError(expected="samples to train on and to hold out", got=f"{features.count}", where="search_heads()")
    views = torch.arange(features.views)[:, None] * features.count
    train = features.rows((order[:upto] + views).flatten(), upto)
    return train, features.rows(order[upto:], features.count - upto)


class _Tried:
    """Trains and measures heads of one site, each spec once."""

    def __init__(
        self, net: "MultiExit", site: ExitSite, parts: tuple[Features, Features], recipe: Recipe, tolerance: float,
        largest: float, device: torch.device,
    ) -> None:
        self.net, self.site, self.task, self.classes = net, site, net.task, net.num_classes
        (self.train, self.test), self.recipe, self.tolerance, self.device = parts, recipe, tolerance, device
        self.largest = largest * site.macs_after
        shape = self.test.teacher.shape
        self.out = (shape[2], shape[3]) if net.task == "dense" else None
        self.done: dict[Spec, HeadTrial] = {}

    def defaults(self) -> list[Spec]:
        """What ``attach`` would hang here if nothing were said, and what a bare ShortcutSpec would."""
        plain = default_spec(self.site.live, self.classes, self.task, self.out, macs_after=self.site.macs_after)
        return [plain, ShortcutSpec()]

    def __call__(self, spec: Spec, always: bool = False) -> HeadTrial | None:
        seed_all(self.recipe.seed, 2)
        head: nn.Module
        try:
            if isinstance(spec, ShortcutSpec):
                head = build_shortcut(spec, self.site, self.net.traced, self.net.logits)
                spec = ShortcutSpec(keep=head.spec.keep)  # two shares may keep the same blocks
            else:
                head = build(spec, self.site.live, self.classes, self.task, self.out)
        except HeadError:
            return None
        if spec in self.done:
            return self.done[spec]
        macs = head_macs(head, self.site.live)
        if macs > self.largest and not always:
            return None
        head.to(self.device)
        self._fit(head)
        agreement, leaving = self._measure(head)
        self.done[spec] = HeadTrial(spec=spec, macs=macs, agreement=agreement, leaving=leaving,
                                    saved_macs=leaving * self.site.macs_after - macs)
        return self.done[spec]

    def _fit(self, head: nn.Module) -> None:
        recipe, steps = self.recipe, self.train.steps(1) * self.recipe.epochs
        optimiser = torch.optim.AdamW(head.train().parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        step = 0
        for epoch in range(recipe.epochs):
            for (batch,) in self.train.windows(epoch, 1, 0):
                assert batch.teacher is not None, "features carry their teacher"
                for group in optimiser.param_groups:
                    group["lr"] = recipe.lr_at(step, steps)
                frontier = [t.to(self.device) for t in batch.args[0]]
                loss = kl_to_teacher(head(*frontier), batch.teacher.to(self.device), recipe.temperature)
                loss.backward()
                optimiser.step()
                optimiser.zero_grad()
                step += 1

    def _measure(self, head: nn.Module) -> tuple[float, float]:
        head.eval()
        sure, wrong = [], []
        with torch.no_grad():
            for batch in self.test.sweep():
                assert batch.teacher is not None, "features carry their teacher"
                logits = head(*[t.to(self.device) for t in batch.args[0]])
                apart = logits.argmax(1) != batch.teacher.to(self.device).argmax(1)
                sure.append(logits.softmax(1).amax(1).double().view(len(logits), -1).mean(1))
                wrong.append(apart.double().view(len(logits), -1).mean(1))
        wrong_N = torch.cat(wrong)
        return 1 - float(wrong_N.mean()), leaving(torch.cat(sure), wrong_N, self.tolerance)


def leaving(sure_N: Tensor, wrong_N: Tensor, tolerance: float) -> float:
    """Largest share of samples, the surest first, whose disagreements add up to at most ``tolerance`` of all samples.

    >>> leaving(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0.0, 0.0, 1.0, 0.0]), 0.0)
    0.5
    """
    spent_N = wrong_N.double()[sure_N.argsort(descending=True)].cumsum(0)
    return float((spent_N <= tolerance * len(wrong_N) + 1e-9).double().mean())

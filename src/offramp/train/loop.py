"""One loop for every recipe: cached or live features, one process or many, resumable at any step.

Axes: N samples, E trained columns: exits, or widths.
"""

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from offramp.errors import DataError, FileFormatError, OfframpError
from offramp.functional.poses import check_says
from offramp.nn.multiexit import MultiExit
from offramp.nn.slim import Slimmable
from offramp.train import checkpoint
from offramp.train.augment import augmented
from offramp.train.batches import Batch, Source, rng_kept, seed_all, source_of
from offramp.train.features import Features
from offramp.train.history import EpochRecord, History, Log
from offramp.train.parallel import shared_batch_norm
from offramp.train.recipe import Recipe
from offramp.train.setup import (
    accelerated,
    as_found,
    cached,
    channels_last,
    drop_features,
    lay_out,
    run_folder,
    show_progress,
)
from offramp.train.step import means
from offramp.train.subject import ExitSubject, Subject, subject_of

__all__ = ["fit", "restore"]

CHECKPOINT = "checkpoint.safetensors"


def fit(
    net: nn.Module,
    data: Any,
    recipe: Recipe,
    *,
    run_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    precision: Literal["bf16"] | None = None,
    engine: Literal["eager", "compile"] = "eager",
    channels_last: bool | None = None,
    accumulate: int = 1,
    resume: bool = True,
    validate: Any = None,
    cache_bytes: int = 4 * 2**30,
    checkpoint_every: int = 200,
    progress: bool = True,
) -> History:
    """Train the exits of a network (and the network, if the recipe says so), or its widths, in place.

    net: made by :func:`offramp.attach` for recipes of exits, and then by :func:`offramp.slim_` where they are to learn
        at every width of a frozen network; for ``recipes.slim()`` by ``slim_`` alone, or a plain network, which is one
        of a single width. For ``recipes.anytime()`` by ``attach`` alone, or then by :func:`offramp.mask_`.
    data: a dataset, or a loader of batches: a tensor, (inputs, labels), (inputs,), or a dict of arguments by name. For
        a recipe without labels, labels in there are dropped unread.
    run_dir: where features, ``checkpoint.safetensors`` and ``log.jsonl`` go; without it nothing is kept, nor resumed.
    precision: ``bf16`` runs the training passes in mixed precision; features and teacher are computed in fp32.
    engine: ``compile`` hands the training pass of exits to ``torch.compile``; it pays when training takes minutes.
    channels_last: layout of maps and of convolutions while training; None takes it on CPUs, where the network can.
    accumulate: batches of one optimiser step.
    resume: go on from the checkpoint in run_dir, at the step after it; the end is that of an unbroken run.
    validate: data to measure each exit on after every epoch, or a function of the network that returns a dict.
    cache_bytes: features of the frozen network are cached on disk if they take no more; 0 never caches.

    Under ``torchrun`` or ``accelerate launch`` every process calls it with the same data and takes its share of each
    batch; gradients and batch norms are those of the whole batch. Where labels ignore pixels, each share is averaged
    on its own, and what is drawn at random (dropout, live augmentation) differs from one process's. Widths are trained
    in one process alone.

    DataError on empty or unusable data or a full disk; FileFormatError when the checkpoint is of another run;
    OfframpError when the loss is not a number, with the step, before any weight has taken harm from it.
    """
    subject = subject_of(net, recipe)
    faults = [
        text for text, wrong in {
            f"accumulate >= 1, not {accumulate}": accumulate < 1,
            f"checkpoint_every >= 1, not {checkpoint_every}": checkpoint_every < 1,
            f"cache_bytes >= 0, not {cache_bytes}": cache_bytes < 0,
            f"precision None or 'bf16', not {precision!r}": precision not in (None, "bf16"),
            f"engine 'eager' or 'compile', not {engine!r}": engine not in ("eager", "compile"),
            # torch.compile breaks the graph at every layer that looks up its width, and gives up after eight of them
            "engine 'eager' for networks of widths or masks":
                engine == "compile" and not isinstance(subject, ExitSubject),
        }.items() if wrong
    ] + subject.faults
    if faults:
        raise OfframpError("fit(): expected " + "; ".join(faults) + ".")
    for given in (data, validate):
        check_says(given, recipe.anytime.says if recipe.anytime is not None else "classes", "fit()")
    labels = recipe.reads_labels
    source = source_of(data, batch_size=recipe.batch_size, labels=labels, seed=recipe.seed)
    checks: Source | None = None
    if validate is not None and (not callable(validate) or hasattr(validate, "__getitem__")):
        checks = source_of(validate, batch_size=recipe.batch_size, labels=labels, seed=recipe.seed, where="validate")
    with ExitStack() as stack:
        stack.enter_context(rng_kept())
        stack.enter_context(as_found(net))
        accelerator = stack.enter_context(accelerated(device, precision, find_unused=subject.partial))
        net.to(accelerator.device)
        subject.set_modes()
        folder = run_folder(run_dir, stack, accelerator)
        run = _Run(subject, recipe, accelerator, run_dir=None if run_dir is None else folder, accumulate=accumulate,
                   engine=engine)
        run.identify(source)
        if resume and run.finished():
            return restore(net, folder)
        run.channels_last = lay_out(net, channels_last, lambda: subject.example(source), accelerator.device, run.notes)
        if isinstance(subject, ExitSubject) and recipe.freeze:
            source, checks = cached(subject.net, source, checks, recipe, folder, cache_bytes, accelerator, run.notes)
        run.prepare(source)
        if resume:
            run.resume()
        stack.enter_context(shared_batch_norm(net, accelerator.num_processes))
        history = run.train(source, checks, validate if checks is None else None, checkpoint_every, progress)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            drop_features(folder)
        return history


def restore(net: nn.Module, run_dir: str | Path) -> History:
    """Load what ``fit`` left in ``run_dir`` into a network that was attached, or made slimmable, the same way."""
    path = Path(run_dir) / CHECKPOINT
    if not path.is_file():
        todo = "run fit(..., run_dir=...) first"
        raise DataError(expected=f"a {CHECKPOINT}", got="none", where=str(run_dir), todo=todo)
    tensors, state = checkpoint.load(path)
    exits = net.backbone if isinstance(net, Slimmable) and isinstance(net.backbone, MultiExit) else net
    _load_module(net if state["whole"] else cast(MultiExit, exits).heads, tensors, path)
    return History(columns=tuple(state["columns"]), epochs=tuple(EpochRecord(**e) for e in state["epochs"]),
                   notes=tuple(state["notes"]))


@dataclass
class _Run:
    subject: Subject
    recipe: Recipe
    accelerator: Any
    run_dir: Path | None
    accumulate: int
    engine: str = "eager"
    channels_last: bool = False
    notes: list[str] = field(default_factory=list)
    step: int = 0
    epochs: list[EpochRecord] = field(default_factory=list)

    def identify(self, source: Source) -> None:
        """What must be the same for a checkpoint to be of this run."""
        self.columns = self.subject.columns
        self.identity: dict[str, Any] = {
            "recipe": self.recipe.to_json(), "columns": self.columns, "samples": source.count,
            "accumulate": self.accumulate, "backbone": self.subject.fingerprint,
        }

    def finished(self) -> bool:
        """Whether the checkpoint is the last one of this very run."""
        path = None if self.run_dir is None else self.run_dir / CHECKPOINT
        if path is None or not path.is_file():
            return False
        state = checkpoint.load(path)[1]
        return bool(state["finished"] and {k: state["identity"].get(k) for k in self.identity} == self.identity)

    def prepare(self, source: Source) -> None:
        recipe = self.recipe
        module = self.subject.module(source)
        parameters = {n: p for n, p in self.subject.owner.named_parameters() if p.requires_grad}
        if self.subject.extra is not None:
            parameters |= {f"extra.{n}": p for n, p in self.subject.extra.named_parameters()}
        if not parameters:
            raise OfframpError(expected="something to train", got="no parameter that takes gradients", where="fit()")
        self.parameters = parameters
        flat, deep = [p for p in parameters.values() if p.ndim < 2], [p for p in parameters.values() if p.ndim >= 2]
        groups = [{"params": deep, "weight_decay": recipe.weight_decay}, {"params": flat, "weight_decay": 0.0}]
        optimiser: torch.optim.Optimizer
        if recipe.optimiser == "adamw":
            optimiser = torch.optim.AdamW(groups, lr=recipe.lr)
        else:
            optimiser = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
        # Batches come in two sizes, the last one of an epoch being smaller: two static graphs beat one dynamic.
        whole = torch.compile(module, dynamic=False) if self.engine == "compile" else module
        self.model, self.optimiser = self.accelerator.prepare(whole, optimiser)
        self.mean = {n: p.detach().clone() for n, p in parameters.items()} if recipe.ema else {}
        self.sums = torch.zeros(len(self.columns), 6, dtype=torch.float64)
        self.steps_an_epoch = source.steps(self.accumulate)
        self.steps = self.steps_an_epoch * recipe.epochs
        self.forward_backward = self.subject.passes(module, self.model, self.accelerator, self.steps)
        self.identity |= {"steps": self.steps, "cached": isinstance(source, Features)}

    def resume(self) -> None:
        if self.run_dir is None or not (path := self.run_dir / CHECKPOINT).is_file():
            return
        tensors, state = checkpoint.load(path)
        if state["identity"] != self.identity:
            theirs, ours = state["identity"], self.identity
            different = [key for key in ours if theirs.get(key) != ours[key]]
            raise FileFormatError(
                expected="a checkpoint of this very run", got=f"one whose {', '.join(different)} differ",
                where=str(path), todo="give another run_dir, or resume=False to overwrite it",
            )
        _load_module(self.subject.owner, tensors, path)
        if self.subject.extra is not None:
            _load_module(self.subject.extra, tensors, path, "extra.")
        checkpoint.restore_optimiser(self.optimiser.optimizer, tensors)
        for name in self.mean:
            self.mean[name].copy_(tensors[f"mean.{name}"])
        self.step, self.epochs = state["step"], [EpochRecord(**e) for e in state["epochs"]]
        if self.accelerator.is_main_process:  # every process adds its own; they are summed at an epoch's end
            self.sums = torch.tensor(state["sums"], dtype=torch.float64)
        self.notes.append(f"resumed at step {self.step} of {self.steps}")

    def save(self) -> None:
        sums = self.accelerator.reduce(self.sums.clone().to(self.accelerator.device), "sum").cpu()
        if self.run_dir is None or not self.accelerator.is_main_process:
            return
        tensors = {f"model.{n}": t for n, t in self.subject.owner.state_dict().items()}
        if self.subject.extra is not None:
            tensors |= {f"extra.{n}": t for n, t in self.subject.extra.state_dict().items()}
        tensors |= checkpoint.optimiser_tensors(self.optimiser.optimizer)
        tensors |= {f"mean.{n}": t for n, t in self.mean.items()}
        state = {
            "identity": self.identity, "step": self.step, "finished": self.step == self.steps, "sums": sums.tolist(),
            "columns": self.columns, "epochs": [asdict(e) for e in self.epochs], "notes": self.notes,
            "whole": not self.recipe.freeze,
        }
        checkpoint.save(self.run_dir / CHECKPOINT, tensors, state)

    def train(
        self, source: Source, checks: Source | None, custom: Any, checkpoint_every: int, progress: bool
    ) -> History:
        log = Log(self.run_dir if self.accelerator.is_main_process else None)
        log.begin({**self.identity, "notes": self.notes, "device": str(self.accelerator.device)}, self.epochs)
        started, saved = time.perf_counter(), self.step
        with show_progress(progress and self.accelerator.is_main_process, self.steps, self.step) as bar:
            for epoch in range(self.step // self.steps_an_epoch, self.recipe.epochs):
                start = self.step - epoch * self.steps_an_epoch
                for window in source.windows(epoch, self.accumulate, start):
                    lr = self._step(window)
                    said = f", {self.epochs[-1].brief}" if self.epochs else ""
                    bar(f"epoch {epoch + 1}/{self.recipe.epochs}{said}")
                    if self.step % checkpoint_every == 0 and self.step % self.steps_an_epoch:
                        self.save()
                        saved = self.step
                last = epoch == self.recipe.epochs - 1
                if last and (note := self.subject.finish(source, self.accelerator.device)):
                    self.notes.append(note)
                self.epochs.append(self._record(epoch, lr, time.perf_counter() - started, checks, custom))
                started = time.perf_counter()
                log.add("epoch", asdict(self.epochs[-1]))
                if last:
                    for name, mean in self.mean.items():
                        self.parameters[name].data.copy_(mean)
                if last or self.step - saved >= checkpoint_every:
                    self.save()
                    saved = self.step
        return History(columns=tuple(self.columns), epochs=tuple(self.epochs), notes=tuple(self.notes))

    def _step(self, window: list[Batch]) -> float:
        lr = self.recipe.lr_at(self.step, self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        seed_all(self.recipe.seed, 1, self.step)
        total = sum(len(batch) for batch in window)
        said = torch.zeros_like(self.sums, device=self.accelerator.device)
        for number, batch in enumerate(window):
            last = number == len(window) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                said += self._backward(batch, total)
        said = said.cpu()  # once a step: on accelerators it waits for all that was asked for
        whole = self.accelerator.reduce(said.to(self.accelerator.device), "sum").cpu()
        if not torch.isfinite(whole).all():
            wrong = [n for n, value in zip(self.columns, whole[:, 0].tolist(), strict=True) if not math.isfinite(value)]
            raise OfframpError(
                expected="a finite loss", got=f"NaN or infinity at {', '.join(wrong)}",
                where=f"fit(), step {self.step}",
                todo="lower lr, set clip=1.0, or check the inputs; the weights are those before this step",
            )
        if self.recipe.clip is not None:
            self.accelerator.clip_grad_norm_(self.parameters.values(), self.recipe.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        self.sums += said
        if self.recipe.ema is not None:
            decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
            for name, mean in self.mean.items():
                mean.lerp_(self.parameters[name].detach(), 1 - decay)
        return lr

    def _backward(self, batch: Batch, total: int) -> Tensor:
        """Gradients of this process's share of a batch; what it said, summed over its samples."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = batch.rows(slice(rank, None, world)) if world > 1 else batch
        counts = len(batch) > rank  # else the process goes along with a row that counts for nothing
        share = (share if counts else batch.rows(slice(0, 1))).map(lambda t: t.to(self.accelerator.device))
        if share.teacher is None:
            share = augmented(share, self.recipe)
            if self.channels_last:
                share = share.map(channels_last)
        rows = len(share) if counts else 0
        return self.forward_backward(share, self.step, rows, rows * world / total)  # DDP averages over processes

    def _record(self, epoch: int, lr: float, seconds: float, checks: Source | None, custom: Any) -> EpochRecord:
        sums = self.accelerator.reduce(self.sums.to(self.accelerator.device), "sum").cpu()
        self.sums.zero_()
        validation: Mapping[str, Any] = {}
        if checks is not None or custom is not None:
            net = self.subject.net
            with as_found(net):
                net.eval()
                validation = dict(custom(net)) if checks is None else self.subject.measure(
                    checks, self.accelerator.device)
        return EpochRecord(epoch=epoch, step=self.step, lr=lr, seconds=seconds, validation=validation,
                           **means(sums, self.columns))


def _load_module(module: nn.Module, tensors: Mapping[str, Tensor], path: Path, prefix: str = "model.") -> None:
    mine = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    try:
        module.load_state_dict(mine)
    except RuntimeError as error:
        raise FileFormatError(expected="weights of this network and these heads", got=str(error), where=str(path),
                              todo="attach with the same exits and heads, or slim to the same widths, or give another "
                              "run_dir") from error

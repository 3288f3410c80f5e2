"""How the command line speaks: results on stdout, everything else on stderr, faults in one sentence."""

import errno
import functools
import json
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from offramp.errors import OfframpError
from offramp.types import Plan

__all__ = ["Debug", "Json", "Settled", "Steps", "command_line", "fail", "note", "result", "summary", "verb"]

P = ParamSpec("P")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a fault.")]

_stderr = Console(stderr=True, highlight=False)


def note(words: str) -> None:
    """Something to know, on stderr."""
    _stderr.print(words, markup=False, soft_wrap=True)


def result(data: Mapping[str, Any], words: str, *, as_json: bool) -> None:
    """The outcome of a verb: for a machine or for a person."""
    sys.stdout.write((json.dumps(_plain(data), indent=1) if as_json else words.rstrip()) + "\n")
    sys.stdout.flush()


def fail(words: str) -> NoReturn:
    """End with exit code 2 and one message."""
    raise OfframpError(words)


def command_line() -> str:
    """What the user typed."""
    return shlex.join(["offramp", *sys.argv[1:]])


def verb(function: Callable[P, None]) -> Callable[P, None]:
    """Ends with exit code 2 and one clear sentence when the input is at fault; ``--debug`` adds the traceback."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            note("stopped; the same command goes on from here")
            raise typer.Exit(130) from None
        except (OfframpError, OSError, MemoryError, RuntimeError) as error:
            words = _sentence(error)
            if words is None:
                raise
            if kwargs.get("debug"):
                traceback.print_exc()
            if kwargs.get("as_json"):
                sys.stdout.write(json.dumps({"error": words}) + "\n")
            _stderr.print("error: ", style="bold red", end="")
            note(words)
            raise typer.Exit(2) from None

    return wrapped


def _sentence(error: BaseException) -> str | None:
    if isinstance(error, OfframpError):
        return str(error)
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "no space left on the disk; nothing was half-written. What to do: free some, or choose another --out"
        return f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        first = (str(error).splitlines() or [""])[0][:200]
        return f"out of memory ({first}). What to do: a smaller --batch-size, or another --device"
    return None


def summary(plan: Plan) -> str:
    """A plan in a few lines: who leaves where, what it saves and loses, and what is vouched for."""
    said = plan.predicted
    lines = [f"exits {', '.join(plan.exits) or 'none'}; on {plan.split}, which it was fitted on:"]
    macs, whole = float(said["macs"]), float(said["backbone_macs"])
    lines.append(f"  {1 - macs / whole:.1%} fewer MACs ({macs / 1e6:.4g} M instead of {whole / 1e6:.4g} M a sample), "
                 f"loss {float(said['loss']):.4f} against {said['loss_against']}")
    lines.append("  leave at: " + ", ".join(f"{name} {share:.1%}" for name, share in
                                            zip(said["exits"], said["shares"], strict=True)))
    if "budget" in plan.asked:
        lines.append(f"  {plan.asked['scheduler']}: {float(said['cost']):.6g} {plan.asked['unit']} a sample of the "
                     f"{float(plan.asked['budget']):.6g} asked")
    if "proven" in (told := plan.certificate):
        proof = "proven" if told["proven"] else f"not proven, {float(told['gap']):.1%} may be left"
        lines.append(f"  {plan.setting}: optimum of {float(told['configurations']):.4g} configurations {proof}, "
                     f"{told['evaluated']} evaluated in {float(told['seconds']):.3g} s")
    return "\n".join([*lines, *map(str, plan.notes)])


class Steps:
    """An iterable with a progress bar and its remaining time on stderr; keeps ``.dataset`` for who looks for it."""

    def __init__(self, items: Iterable[Any], words: str, *, quiet: bool = False) -> None:
        self.items, self.words, self.quiet = items, words, quiet
        self.dataset = getattr(items, "dataset", None)

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        if self.quiet or not _stderr.is_terminal:
            if not self.quiet:
                note(self.words)
            yield from self.items
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn())
        with Progress(*columns, console=_stderr, transient=True) as bar:
            yield from bar.track(self.items, total=len(self), description=self.words)


class Settled:
    """A bar on stderr of the share of an exhaustive search that is settled; ``with`` it, then call it."""

    def __init__(self, words: str, *, quiet: bool = False) -> None:
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"),
                            TimeElapsedColumn(), console=_stderr, transient=True,
                            disable=quiet or not _stderr.is_terminal)
        self.task = self.bar.add_task(words, total=1.0)

    def __enter__(self) -> "Settled":
        self.bar.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self.bar.stop()

    def __call__(self, settled: float, best: float) -> None:
        self.bar.update(self.task, completed=settled)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)

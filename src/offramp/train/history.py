"""What a training run said: one record an epoch, kept in memory, in the checkpoint and in ``log.jsonl``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["EpochRecord", "History", "Log"]


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """Means over an epoch's training samples, a number for each trained column by name; without those left out."""

    epoch: int
    step: int
    """Optimiser steps done at its end."""
    lr: float
    seconds: float
    loss: Mapping[str, float]
    agreement: Mapping[str, float]
    """Share of samples (pixels) for which the exit names the class that the backbone names."""
    accuracy: Mapping[str, float]
    """Against labels; empty where none are read."""
    validation: Mapping[str, Any]
    """What ``validate`` gave; for data, by measure and column: KL to the network (``loss``), ``agreement``, and where
    labels are read ``accuracy`` and, for maps, ``miou``, of confusions summed over the data."""

    @property
    def brief(self) -> str:
        """The latest measure that says most, of the worst and the best exit: ``mIoU 0.412 to 0.583``."""
        for name, where in (("miou", self.validation), ("accuracy", self.validation), ("accuracy", self.__dict__),
                            ("agreement", self.__dict__)):
            if isinstance(values := where.get(name), Mapping) and values:
                return f"{name.replace('miou', 'mIoU')} {min(values.values()):.3f} to {max(values.values()):.3f}"
        return ""


@dataclass(frozen=True, kw_only=True)
class History:
    """The outcome of ``fit``; the network itself was trained in place."""

    columns: tuple[str, ...]
    """Trained columns in order of depth."""
    epochs: tuple[EpochRecord, ...]
    notes: tuple[str, ...]
    """What was decided: whether features were cached, from which step the run went on, settings without effect."""

    @property
    def last(self) -> EpochRecord:
        return self.epochs[-1]

    def __str__(self) -> str:
        said, last = self.last.validation, self.last
        shown: dict[str, Any] = {"loss": last.loss, "agreement": last.agreement, "accuracy": last.accuracy}
        shown |= {f"val. {name}": said[name] for name in ("accuracy", "miou") if isinstance(said.get(name), Mapping)}
        shown = {name: values for name, values in shown.items() if values}
        lines = [*self.notes, " ".join([f"{'exit':24}", *(f"{name:>13}" for name in shown)])]
        for column in dict.fromkeys([*self.columns, *(c for values in shown.values() for c in values)]):
            row = [f"{values[column]:13.4f}" if column in values else f"{'-':>13}" for values in shown.values()]
            lines.append(" ".join([f"{column:24}", *row]))
        return "\n".join(lines)


class Log:
    """Appends JSON lines to ``run_dir/log.jsonl``; nothing without a run_dir."""

    def __init__(self, run_dir: Path | None) -> None:
        self.path = None if run_dir is None else run_dir / "log.jsonl"

    def begin(self, head: Mapping[str, Any], epochs: Sequence[EpochRecord]) -> None:
        """Start over with what a resumed run knows: lines written after the last checkpoint would else come twice."""
        if self.path is not None:
            lines = [{"event": "start", **head}, *({"event": "epoch", **asdict(e)} for e in epochs)]
            part = self.path.with_suffix(".part")
            part.write_text("".join(json.dumps(line) + "\n" for line in lines))
            part.replace(self.path)

    def add(self, event: str, record: Mapping[str, Any]) -> None:
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps({"event": event, **record}) + "\n")

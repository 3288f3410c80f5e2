"""One self-contained page: everything inside, nothing fetched, readable by light and by dark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from offramp.choose.calibrate import calibrate
from offramp.choose.replay import Replay, replay
from offramp.errors import OfframpError
from offramp.policies.thresholds import Thresholds
from offramp.report.borders import Distances, distances, wrong_pixels
from offramp.report.curve import TOLERANCES, Curve, Point, curve, static_at
from offramp.report.dense import class_table, differences, gallery
from offramp.report.draw import draw_categories, draw_curve, draw_hit_rate, draw_reliability, draw_shares, page_of
from offramp.report.measures import (
    Categories,
    HitRate,
    Reliability,
    categories,
    hit_rates,
    quality_of,
    reliability,
    scores_of,
    widths_of,
)
from offramp.report.pictures import DenseExample
from offramp.report.sections import about, costs, headline, maps, masked, samples, section, speaking
from offramp.report.walk import Walk
from offramp.report.walks import SAY, draw_walks
from offramp.table import ExitTable, write_atomic
from offramp.types import Plan

__all__ = ["Report", "gather", "render", "write"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """Everything that the page says, computed and not yet drawn."""

    plan: Plan
    test: ExitTable
    fitted: Replay
    """The plan on the split that it was fitted on."""
    realised: Replay
    """The plan on the split reported on."""
    quality: str
    drop: float
    """Of quality, on the split reported on; negative: the exits help."""
    drop_interval: tuple[float, float]
    """Paired bootstrap at 95 %."""
    curve: Curve
    reliability: tuple[Reliability, ...]
    hit_rates: tuple[HitRate, ...]
    categories: tuple[Categories, ...]
    first: tuple[int, ...]
    """Samples that left first, surest first."""
    last: tuple[int, ...]
    """Samples that went to the end, least sure first."""
    scores: Any
    """(N, exits)"""
    warnings: tuple[str, ...]
    bench: Mapping[str, Any] = field(default_factory=dict)
    distances: tuple[Distances, ...] = ()
    """Dense, where recorded: wrong pixels by their distance to the nearest border."""
    about: Mapping[str, str] = field(default_factory=dict)
    """What is what, for the last section: model, data, command ..."""

    @property
    def saved(self) -> float:
        """Share of the untouched network's MACs that is not spent, heads counted."""
        return 1 - float(self.realised.macs.mean()) / self.realised.backbone_macs

    @property
    def over_static(self) -> float | None:
        """Quality beyond the best static network, or mixture of them, of the same cost."""
        static = static_at(self.curve, self.curve.chosen.macs)
        return None if static is None else self.curve.chosen.quality - static


def gather(
    *, fitted_on: ExitTable, test: ExitTable, plan: Plan, bench: Mapping[str, Any] | None = None,
    static: Sequence[Point] = (), about: Mapping[str, str] | None = None, tolerances: Sequence[float] = TOLERANCES,
    samples: int = 8,
) -> Report:
    """Compute a report: the plan that was fitted on one table, judged on another.

    bench: what ``offramp bench`` wrote: measured clocks. static: other static networks on the same test split.
    """
    fitted, realised, quality = replay(fitted_on, plan), replay(test, plan), quality_of(test)
    warnings = list(dict.fromkeys([*realised.notes, *plan.notes]))
    if fitted_on.fingerprints["split"] == test.fingerprints["split"] and not realised.notes:
        warnings.append(f"The curve was searched on the split that it is drawn on ({test.split}).")
    if not test.has_labels:
        warnings.append("The split has no labels: quality here is agreement with the untouched network, "
                        "and what it loses against the truth can only be smaller or equal.")
    column, last = realised.column_of.numpy(), len(test.columns) - 1
    whole, mine = quality.mean(np.full(len(test), last)), quality.mean(column)
    low, high = quality.interval(column, minus=last)
    temperatures = calibrate(fitted_on).temperatures if test.task == "classify" else None
    asked = temperatures[:-1] if temperatures and isinstance(plan.policy, Thresholds) and any(
        one != 1.0 for one in plan.policy.temperatures) else None
    scores, left = scores_of(test, plan), realised.exit_index.numpy()
    gone = [np.nonzero(left == k)[0] for k in range(len(plan.exits) + 1)]
    earliest = next((k for k in range(len(plan.exits)) if len(gone[k])), None)
    first: Any = [] if earliest is None else gone[earliest][
        np.argsort(-scores[gone[earliest], earliest], kind="stable")]
    late = gone[-1] if not plan.exits else gone[-1][np.argsort(scores[gone[-1], -1], kind="stable")]
    return Report(
        plan=plan, test=test, fitted=fitted, realised=realised, quality=quality.name, drop=whole - mine,
        drop_interval=(-high, -low), scores=scores, warnings=tuple(warnings), bench=bench or {}, about=about or {},
        curve=curve(fitted_on, test, plan, tolerances=tolerances, static=static, temperatures=asked),
        reliability=reliability(test, temperatures), hit_rates=hit_rates(test, plan),
        categories=categories(test, plan, left), distances=distances(test, plan, realised.column_of),
        first=tuple(int(i) for i in first[:samples]),
        last=tuple(int(i) for i in late[:samples]),
    )


def render(report: Report, *, dataset: Any = None, dense: Sequence[DenseExample] = (), walks: Sequence[Walk] = (),
           title: str = "offramp") -> str:
    """The page. ``dataset`` gives the images of the test split for thumbnails, ``dense`` the maps of some of them;
    ``walks`` are images that every exit answered, with the times."""
    is_dense, plan = report.test.task == "dense", report.plan
    parts = [headline(report), *(f'<div class="warning">{escape(one)}</div>' for one in report.warnings)]
    parts.append(section(
        "Accuracy against cost",
        f"Each blue point is a plan searched on <b>{escape(report.fitted.table.split)}</b> at one tolerance and obeyed "
        f"on <b>{escape(report.test.split)}</b>; exits, heads and thresholds are chosen anew for each. "
        + ("Grey is the network with masks up to each exit, at the mean of what that costs." if report.curve.masked else
           "Grey are static networks, which treat every sample alike: a full line through the ends of the widths, a "
           "dashed one through each width's exits; a coin that picks one of two gives any point between them."
           if len(widths_of(report.test)) > 1 else
           "The dashed grey line joins static networks, which treat every sample alike; a coin that picks one gives "
           "any point on it."),
        f'<div class="card">{draw_curve(report.curve)}</div>'))
    parts.append(section(
        "Who leaves where", "Share of the samples that each exit answered.",
        '<div class="card">' + draw_shares([
            (f"planned ({report.fitted.table.split})", report.fitted),
            (f"realised ({report.test.split})", report.realised)]) + "</div>"))
    if plan.setting == "anytime":
        parts.append(speaking(report))
    parts += [costs(report), masked(report)]
    if is_dense and report.curve.backbone.classes:
        parts.append(section(
            "Class by class, goal by goal",
            ("IoU of each class as each exit speaks" if plan.setting == "anytime" else
             "IoU of each class under the best plan of the curve that "
             + ("is so many times faster" if report.curve.clocked else "costs so many times fewer MACs")
             + " than the untouched network, and under this plan")
            + "; red where a class loses against the untouched network, green where it gains.",
            class_table(report)))
    if plan.exits and plan.setting == "input_dependent":
        parts.append(section(
            "Threshold by threshold",
            "Were each exit the only one: the share that leaves (orange), how right it is "
            f"(blue, {escape(report.quality)}) and how right the untouched network is on the same samples (grey). "
            "The dashed line is this plan's threshold.",
            '<div class="trio">' + "".join(draw_hit_rate(one, report.quality) for one in report.hit_rates) + "</div>"))
        shown = [one for one in report.reliability if one.name in (*plan.exits, "final")]
        parts.append(section(
            "As right as they are sure?",
            ("Images in twelve groups by mean pixel confidence." if is_dense else
             "Samples in twelve groups by confidence: orange as the exit says it, blue with the temperature fitted on "
             f"{escape(report.fitted.table.split)}.") + " On the dashed line confidence would be honest.",
            '<div class="trio">' + "".join(draw_reliability(one, is_dense) for one in shown) + "</div>"))
    if report.categories:
        parts.append(section(
            "Where leaving helped, and where it hurt",
            "Of the samples that left at each exit, held against what the whole network would have said"
            + (": an image counts as better or worse when its share of right pixels moves by more than a tenth of a "
               "point." if is_dense else "."),
            f'<div class="card">{draw_categories(report.categories, is_dense)}</div>'))
    if report.distances:
        parts.append(section(
            "How far from a border",
            "Wrong pixels by their distance to the nearest pixel of another class in the labels: of the ends of all "
            "widths, of this plan's exits, and of the plan itself; then what each step mends of the one before. "
            "Below zero, a step adds errors there.", wrong_pixels(report)))
    if is_dense and dataset is not None and plan.setting == "input_dependent":
        parts.append(section("Which exit each image took", "Images spread over the split, by the exit that answered.",
                             gallery(report, dataset)))
    palette = getattr(dataset, "palette", ())
    apart = differences(report, dense, palette)
    if apart:
        parts.append(section(
            "Width against width",
            "Where a narrower width says another class than the full one: black where they agree"
            + (" or nothing is labelled, else the colour of the label." if dense[0].label is not None else
               ", else the colour of what the full width says."), apart))
    if walks:
        parts.append(section("Exit by exit, as it comes", SAY, draw_walks(walks, palette)))
    parts += [samples(report, dataset), maps(report, dense, palette), about(report)]
    body = "\n".join(part for part in parts if part)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    footer = f"<footer>Written by offramp, {now}. MACs are multiply-accumulates; 1 G = 1e9.</footer>"
    return page_of(title, f"{body}\n{footer}")


def write(path: Path | str, html: str) -> Path:
    """The whole page or nothing; a page that was there stays until the new one is complete."""
    if not html.startswith("<!doctype html>"):
        raise OfframpError(expected="a page from render()", got=repr(html[:20]), where="report.write()")
    return write_atomic(path, html)

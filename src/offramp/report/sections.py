"""Sections of the page that are words, tables and images rather than charts."""

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, cast

from offramp.report.dense import masks
from offramp.report.measures import widths_of
from offramp.report.pictures import DenseExample, Palette, image_png, picture
from offramp.report.svg import macs, percent

if TYPE_CHECKING:
    from offramp.report.page import Report

__all__ = ["about", "costs", "headline", "maps", "masked", "samples", "section", "speaking"]


_MINE = ("adaptive", "budgeted", "anytime", "masked")
"""What bench calls the deployed network."""


def section(title: str, say: str, body: str) -> str:
    """A heading, a sentence or two (HTML), and what they are about."""
    return f'<section><h2>{escape(title)}</h2><p class="say">{say}</p>{body}</section>'


def headline(report: "Report") -> str:
    """What was saved, what it cost, and beside whom."""
    low, high = report.drop_interval
    gone = 1 - report.realised.shares[-1]
    asked = report.plan.asked.get("max_drop")
    tiles = [
        (percent(report.saved), "fewer MACs", f"{macs(float(report.realised.macs.mean()))} instead of "
         f"{macs(report.realised.backbone_macs)} a sample, heads counted"),
        (_points(report.drop), f"{report.quality} lost, in points",
         f"95 % interval {_points(low)} to {_points(high)}"
         + (f"; asked for at most {_points(float(asked))}" if isinstance(asked, int | float) else "")),
        (percent(gone, 0), "left early", f"of {len(report.test)} samples of {escape(report.test.split)}"),
    ]
    clock = _best_clock(report)
    if clock:
        tiles.append(clock)
    over = report.over_static
    if over is not None:
        tiles.append((f"{100 * over:+.1f}", "points over a static network",
                      "of the same cost: the best mixture of all static networks here"))
    lede = f"{escape(report.about.get('model', 'A network'))} on {escape(report.about.get('data', report.test.split))}"
    return f'<p class="lede">{lede}</p><div class="tiles">' + "".join(
        f'<div class="tile"><b>{value}</b><span>{words}</span><small>{small}</small></div>'
        for value, words, small in tiles) + "</div>"


def _points(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{100 * value:.2f}".replace("-0.00", "0.00")


def _best_clock(report: "Report") -> tuple[str, str, str] | None:
    rows = report.bench.get("rows", ())
    dense = {row["batch"]: row for row in rows if row["network"] == "untouched"}
    pairs = [(dense[row["batch"]], row) for row in rows if row["network"] in _MINE and row["batch"] in dense]
    if not pairs:
        return None
    # Samples a second: where most leave early, the median sample says nothing of those that stay.
    ratios = [(row["throughput_per_s"] / one["throughput_per_s"], row["batch"]) for one, row in pairs]
    best, batch = max(ratios)
    others = ", ".join(f"{ratio:.2f}× at batch {size}" for ratio, size in ratios if size != batch)
    return (f"{best:.2f}×", "as fast on the clock", f"in the mean at batch {batch}" + (f"; {others}" if others else ""))


def costs(report: "Report") -> str:
    """Planned beside realised, and the clock beside the untouched network."""
    planned, real = report.fitted, report.realised
    lines = [
        ("samples", str(len(planned.table)), str(len(real.table)), ""),
        ("MACs a sample", macs(float(planned.macs.mean())), macs(float(real.macs.mean())), macs(real.backbone_macs)),
        (report.quality, _quality(planned), _quality(real), _backbone(real)),
        ("disagreement with the network", percent(planned.disagreement, 2), percent(real.disagreement, 2),
         percent(0, 2)),
    ]
    if planned.latency_ms is not None and real.latency_ms is not None:
        lines.append((f"latency from the table, batch {planned.latency_batch}", _ms(float(planned.latency_ms.mean())),
                      _ms(float(real.latency_ms.mean())), _ms(real.backbone_latency_ms)))
    body = ('<div class="scroll"><table><tr><th></th><th class="n">planned, on ' + escape(planned.table.split)
            + '</th><th class="n">realised, on ' + escape(real.table.split)
            + '</th><th class="n">untouched network</th></tr>'
            + "".join(f'<tr><td>{escape(a)}</td><td class="n">{b}</td><td class="n">{c}</td><td class="n">{d}</td></tr>'
                      for a, b, c, d in lines) + "</table></div>")
    body += _chain(report)
    rows = report.bench.get("rows", ())
    if rows:
        batches = list(dict.fromkeys(row["batch"] for row in rows))
        body += "<h3>On the clock</h3>"
        body += '<div class="scroll"><table><tr><th>network</th><th class="n">batch</th><th class="n">p50</th>' \
                '<th class="n">p95</th><th class="n">samples a second</th><th class="n">speed-up</th></tr>'
        for batch in batches:
            group = [row for row in rows if row["batch"] == batch]
            base = next((row["p50_ms"] for row in group if row["network"] == "untouched"), float("nan"))
            for row in group:
                mine = ' class="mine"' if row["network"] in _MINE else ""
                body += (f'<tr{mine}><td>{escape(row["network"])}</td><td class="n">{batch}</td>'
                         f'<td class="n">{row["p50_ms"]:.3g} ms</td><td class="n">{row["p95_ms"]:.3g} ms</td>'
                         f'<td class="n">{row["throughput_per_s"]:.4g}</td>'
                         f'<td class="n">{base / row["p50_ms"]:.2f}×</td></tr>')
        said = ", ".join(f"{k}: {v}" for k, v in report.bench.get("setting", {}).items())
        body += ('</table></div><p class="say">Timed in turn, in one process, on samples of the test split. '
                 f"{escape(said)}</p>")
        if report.bench.get("note"):
            body += f'<p class="say">{escape(str(report.bench["note"]))}</p>'
    say = "What the search promised on its own split, and what came true on another."
    return section("Planned and realised", say, body)


def _chain(report: "Report") -> str:
    """Of a plan that goes from width to width: what each exit costs there and alone."""
    done, taken = report.realised, report.test
    if report.plan.setting == "budgeted" or len({taken.columns[c].width for c in done.columns}) < 2:
        return ""
    way = taken.costs.path(done.columns)
    lines = ""
    for k, (c, share) in enumerate(zip(done.columns, done.shares, strict=True)):
        alone = float(taken.costs.path([c])[0])
        lines += (f'<tr><td>{escape(done.names[k])}</td><td class="n">{taken.columns[c].width:g}</td>'
                  f'<td class="n">{percent(share)}</td><td class="n">{macs(alone)}</td>'
                  f'<td class="n">{macs(float(way[k]))}</td><td class="n">{macs(float(way[k]) - alone)}</td></tr>')
    head = "".join(f'<th class="n">{words}</th>' for words in (
        "width", "of the samples", "MACs, asked alone", "MACs in this plan", "of them for exits that passed it on"))
    return ('<h3>From width to width</h3><p class="say">A wider network starts again from the picture: what a narrower '
            "one did for a sample that it did not answer is paid, and used no more.</p>"
            f'<div class="scroll"><table><tr><th>answered at</th>{head}</tr>{lines}</table></div>')


def _quality(one: Any) -> str:
    return percent(one.quality if one.quality is not None else 1 - one.disagreement, 2)


def _backbone(one: Any) -> str:
    return percent(one.backbone_quality if one.backbone_quality is not None else 1.0, 2)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g} ms"


def samples(report: "Report", dataset: Any) -> str:
    """Who left first and who stayed to the end, as thumbnails where the images are at hand."""
    if dataset is None or not (report.first or report.last):
        return ""
    parts = []
    for title, rows in (("Left first", report.first), ("Stayed to the end", report.last)):
        if rows:
            parts.append(f"<h3>{title}</h3>" + '<div class="strip">' + "".join(
                f'<figure><img alt="sample {i}" src="{image_png(picture(dataset, i), 160)}">'
                f"<figcaption>{_caption(report, i)}</figcaption></figure>" for i in rows) + "</div>")
    return section("Easy and hard", "The samples that the first used exit was surest of, and those that no exit dared "
                                    "to answer, least sure first.", "".join(parts))


def speaking(report: "Report") -> str:
    """Of an anytime plan: what each exit says of all samples, and by when."""
    lines = "".join(
        f'<tr><td>{escape(str(one["name"]))}</td><td class="n">{_share(one["quality"])}</td>'
        f'<td class="n">{macs(float(cast(float, one["macs"])))}</td>'
        f'<td class="n">{_ms(cast(float | None, one["latency_ms"]))}</td></tr>' for one in report.realised.speaks)
    say = "Every sample hears every exit until its deadline; MACs and times are those to the exit, heads counted."
    head = "".join(f'<th class="n">{escape(words)}</th>' for words in (report.quality, "MACs", "after"))
    body = f'<div class="scroll"><table><tr><th>exit</th>{head}</tr>{lines}</table></div>'
    return section("Ever better answers", say, body)


def masked(report: "Report") -> str:
    """Of a masked network: what each exit says of all samples, and what that costs in the mean; else nothing."""
    if not report.curve.masked:
        return ""
    untouched = report.curve.backbone
    lines = "".join(
        f'<tr><td>{escape(one.name)}</td><td class="n">{percent(one.quality, 2)}</td>'
        f'<td class="n">{macs(one.macs)}</td><td class="n">{percent(one.macs / untouched.macs)}</td></tr>'
        for one in (*report.curve.cut, untouched))
    head = "".join(f'<th class="n">{escape(words)}</th>' for words in (report.quality, "MACs", "of the untouched"))
    say = ("Each exit settles the pixels that it is sure of, and what follows runs at the others alone: "
           f"{escape(str(report.test.meta['masks']))}. MACs are means over the samples, to the exit's answer, "
           "earlier exits counted.")
    body = f'<div class="scroll"><table><tr><th>up to</th>{head}</tr>{lines}</table></div>'
    return section("With masks, exit by exit", say, body)


def _share(value: object) -> str:
    return percent(value, 2) if isinstance(value, float) else "–"


def _caption(report: "Report", i: int) -> str:
    test, names = report.test, report.test.class_names
    k = int(report.realised.exit_index[i])
    column = report.realised.columns[k]
    where = report.realised.names[k]
    words = f"#{i} · {escape(where)}"
    if report.scores.shape[1]:
        words += f" · score {float(report.scores[i, min(k, report.scores.shape[1] - 1)]):.2f}"
    if test.logits is not None:
        said = int(test.logits[i, column].argmax())
        words = f"<b>{escape(names[said] if names else str(said))}</b>" + (
            "" if test.labels is None or int(test.labels[i]) == said else
            f" (is {escape(names[int(test.labels[i])] if names else str(int(test.labels[i])))})") + f"<br>{words}"
    elif test.confusion is not None:
        mine = test.confusion[i, column].double()
        words += f"<br>{percent(float(mine.diagonal().sum() / mine.sum().clamp(min=1)))} of pixels right"
    return words


def maps(report: "Report", examples: Sequence[DenseExample], palette: Palette = ()) -> str:
    """Per-exit predictions and confidence maps, in the data's colours."""
    if not examples:
        return ""
    say = "What each exit would say of an image, and how sure it is of each pixel (purple: not; yellow: fully), " \
          "below it with the pixels around borders of its own labels set to their neighbourhood's median. " \
          "The outlined exit gave the answer; later ones are shown for comparison and do not run."
    return section("Exit by exit", say, masks(report, examples, palette))


def about(report: "Report") -> str:
    """Splits, fingerprints, the plan, and the command line."""
    planned, real, plan = report.fitted.table, report.test, report.plan
    widths = widths_of(real)
    rows = [("exits", ", ".join(plan.exits) or "none"), ("setting", plan.setting.replace("_", "-")),
            *([("widths", f"{', '.join(f'{one:g}' for one in widths)}; the untouched network is the full one")]
              if len(widths) > 1 else []),
            ("asked of the search", ", ".join(f"{k} = {v}" for k, v in plan.asked.items() if v is not None)),
            ("policy fitted on", f"{plan.split} ({len(planned)} samples), {plan.fingerprints.get('split', '')}"),
            ("reported on", f"{real.split} ({len(real)} samples), {real.fingerprints['split']}"),
            ("fingerprint of the network", real.fingerprints["model"]),
            ("fingerprint of the data", real.fingerprints["data"])]
    if plan.certificate:
        rows.insert(3, ("what the search vouches for", ", ".join(
            f"{k} {v:,}" if isinstance(v, int) and not isinstance(v, bool) else f"{k} {v}"
            for k, v in plan.certificate.items() if v not in (None, {}, []))))
    rows += [(k, v) for k, v in report.about.items() if k != "command"]
    machine = real.meta.get("machine")
    if isinstance(machine, dict):
        rows.append(("recorded on", ", ".join(f"{k} {machine[k]}" for k in ("cpu", "cores", "threads", "torch", "gpu")
                                              if k in machine)))
    table = "<table>" + "".join(f"<tr><th>{escape(k)}</th><td><code>{escape(str(v))}</code></td></tr>" for k, v in rows)
    command = report.about.get("command")
    made = f"<h3>Made by</h3><pre>{escape(command)}</pre>" if command else ""
    body = f'<div class="scroll">{table}</table></div>{made}'
    return section("What this is about", "Enough to make it again.", body)

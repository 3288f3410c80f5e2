"""What the verbs do, one function each, on a run folder; each goes on where it stopped."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch.utils.data import DataLoader

from offramp._specs import near
from offramp.choose.calibrate import calibrate
from offramp.choose.plan import save_plan
from offramp.choose.search import search, search_front
from offramp.cli.folder import Manifest, Run, example, inside, probe
from offramp.cli.masks import own_ends, redesigned_heads
from offramp.cli.say import Settled, Steps, note
from offramp.cli.widths import train_widths
from offramp.data import Source, Split, load_data
from offramp.errors import OfframpError
from offramp.models import load_model
from offramp.nn.guest import fingerprint_of
from offramp.nn.masked import Masked
from offramp.nn.mess import mess_space
from offramp.nn.overview import overview
from offramp.nn.shortcut import ShortcutSpec
from offramp.nn.slim import Slimmable
from offramp.record import model_fingerprint, record
from offramp.table import ExitTable
from offramp.train import recipes
from offramp.train.history import History
from offramp.train.loop import fit
from offramp.train.recipe import Recipe
from offramp.types import Plan

__all__ = ["front_run", "make_recipe", "open_model", "record_run", "search_run", "start", "train_run"]

HEADS: dict[str, Any] = {"small": None, "shortcut": ShortcutSpec(share=0.2), "mess": mess_space()}
RECIPES: dict[str, Callable[..., Recipe]] = {one.__name__: one for one in (
    recipes.label_free, recipes.joint, recipes.exit_aware, recipes.mess, recipes.final_only, recipes.frozen, recipes.kd,
    recipes.self_distill, recipes.eenet, recipes.slim, recipes.anytime)}
_HABITS = ("label_free", "joint", "eenet")


def make_recipe(name: str, *, exits: int = 0, **options: Any) -> Recipe:
    """A recipe by its function's name, for so many early exits; options that are None keep its defaults."""
    if name not in RECIPES:
        raise OfframpError(expected=f"a recipe among {', '.join(RECIPES)}", got=repr(name), where="--recipe",
                           todo=near(name, RECIPES))
    if options.get("epochs") is None and name not in _HABITS:
        raise OfframpError(expected=f"--epochs, which {name} has no habit of its own for", got="none", where="--recipe",
                           todo="say how often it may pass over the data, such as --epochs 20.")
    if options.get("boundary") is not None and name != "slim":
        raise OfframpError(expected="--boundary with --recipe slim", got=f"--recipe {name}", where="--boundary",
                           todo="leave it out: other recipes train no boundaries.")
    if options.get("mask_from") is not None and name != "anytime":
        raise OfframpError(expected="--mask-from with --recipe anytime", got=f"--recipe {name}", where="--mask-from",
                           todo="leave it out: other recipes train without masks.")
    if name == "eenet":
        options["exits"] = exits + 1  # the final one counts
    return RECIPES[name](**{k: v for k, v in options.items() if v is not None})


def first_shape(split: Split) -> list[int]:
    """(C, H, W) of the first input."""
    sample = split[0]
    return list((sample[0] if isinstance(sample, tuple | list) else sample).shape)


def training_split(source: Source, recipe: Recipe, wanted: str | None) -> Split:
    """Which images the exits learn from: without labels all that may be trained on."""
    if wanted is None:
        wanted = "train" if recipe.reads_labels or "unlabelled" not in source.splits else "unlabelled"
    if {"calibration", "test"} & set(wanted.split("+")):
        raise OfframpError(expected="a split to train on", got=repr(wanted), where="--train-split",
                           todo="exits are tuned on calibration and judged on test; train on train or unlabelled.")
    return source.split(wanted, labels=recipe.reads_labels)


def open_model(model: str, data: Source, split: str) -> tuple[Any, list[int]]:
    """The network, tried on the shape of the data."""
    network = load_model(model)
    shape = first_shape(data.split(split, labels=False))
    probe(network, example(shape), model)
    return network, shape


def start(
    out: Path, *, model: str, data: str, exits: int | Sequence[str], heads: str, within: str | None, recipe: Recipe,
    again: bool, command: str, widths: Sequence[float] = (), keep: Sequence[str] = (),
    mask: Mapping[str, Any] | None = None,
) -> Run:
    """A run folder with its network cut; an existing one when it was begun with the same arguments."""
    _check_widths(exits, heads, recipe, widths, keep)
    rule = dict(mask or {})
    if rule and widths:
        raise OfframpError(expected="--mask or --widths", got="both", where="--mask", todo="choose one of them.")
    kind = heads.partition(":")[0]
    if heads not in HEADS and kind != "redesigned":
        raise OfframpError(expected=f"heads among {', '.join(HEADS)} and redesigned", got=repr(heads), where="--heads",
                           todo=near(heads, [*HEADS, "redesigned"]))
    if (out / "run.json").is_file() and not again:
        run = Run.open(out)
        made = run.manifest
        theirs = {"MODEL": made.model, "--data": made.data, "--within": made.within, "--recipe": made.recipe,
                  "--widths": made.widths, "--keep": made.keep, "--mask": made.mask}
        ours = {"MODEL": model, "--data": data, "--within": within, "--recipe": recipe.to_json(),
                "--widths": [*widths], "--keep": [*keep], "--mask": rule}
        other = [f"{name} {theirs[name]!r}" for name in ours if theirs[name] != ours[name]]
        count = exits if isinstance(exits, int) else len(exits)
        if exits != ["ends"] and len(made.exits) != count:
            other.append(f"{len(made.exits)} exits")
        if other:
            raise OfframpError(expected=f"a run folder begun with these arguments at {out}",
                               got=f"one begun with {'; '.join(other)}", where="--out",
                               todo="choose another --out, or give --again to begin anew.")
        return run
    source = load_data(data)
    if getattr(source.split(source.splits[0], labels=False), "says", "classes") != "classes":
        raise OfframpError(expected="data with classes", got="data with heatmaps", where="--data",
                           todo="poses are learnt in Python: fit(net, data, recipes.anytime(says='heatmaps', ...)) "
                                "on offramp.mask_(net, confidence='value'), and measured by split.pckh(points).")
    network, shape = open_model(model, source, source.splits[0])
    exits = own_ends(network, model) if exits == ["ends"] else exits
    made_heads = HEADS.get(heads) or (
        redesigned_heads(heads, network, example(shape), exits, within) if kind == "redesigned" else None)
    if again:
        for old in ("plan.json", "bench.json", "report.html", *(f"tables/{one}.json" for one in source.splits),
                    "train/checkpoint.safetensors", "train/exits/checkpoint.safetensors"):
            (out / old).unlink(missing_ok=True)
    run = Run(out, Manifest(model=model, data=data, shape=shape, within=within, recipe=recipe.to_json(),
                            whole=not recipe.freeze, widths=[*widths], keep=[*keep], mask=rule))
    run.__dict__["backbone"], run.__dict__["source"] = network, source
    guest = network.get_submodule(within) if within else network
    run.manifest.backbone = fingerprint_of(guest)
    net = inside(run.attach(exits, made_heads))
    run.manifest.exits, run.manifest.notes = [site.name for site in net.sites], list(net.notes)
    for site in net.sites:
        columns = [column for column in net.columns if column.site == site.name]
        run.manifest.heads[site.name] = {c.head: net.head(c.name).spec.to_json() for c in columns}  # type: ignore[union-attr, operator]
    run.save(command)
    return run


def _check_widths(exits: int | Sequence[str], heads: str, recipe: Recipe, widths: Sequence[float],
                  keep: Sequence[str]) -> None:
    def refuse(expected: str, got: str, where: str, todo: str = "") -> NoReturn:
        raise OfframpError(expected=expected, got=got, where=where, todo=todo)

    if not widths:
        if keep:
            refuse("--keep with --widths", "no widths", "--keep")
        if recipe.slim is not None:
            refuse("--widths with --recipe slim", "none", "--recipe", "say which, such as --widths 0.25,0.5,0.75,1.")
        if exits in (0, []):
            refuse("at least one exit", "--exits 0", "--exits", "a network without exits needs --widths to adapt.")
    elif recipe.slim is None:
        refuse("--recipe slim with --widths", "another recipe", "--recipe", "leave --recipe out.")
    elif heads != "small" and exits not in (0, []):
        refuse("--heads small with --widths", f"--heads {heads}", "--heads")


def train_run(
    run: Run, recipe: Recipe, *, split: str | None = None, device: str | None = None, precision: Any = None,
    quiet: bool = False,
) -> History | None:
    """Train the exits; None when they are trained already."""
    if run.manifest.trained:
        note(f"exits of {run.path} are trained already")
        return None
    net = run.attach()
    exits = inside(net)
    data = training_split(run.source, recipe, split)
    if not quiet:
        if any(column.head for column in exits.columns):  # several candidates a site
            note(overview(exits))
        what = [f"{len(run.manifest.widths)} widths"] if run.manifest.widths else []
        what += [f"{len(exits.columns) - 1} exits"] if len(exits.columns) > 1 else []
        note(f"training {' and '.join(what)} on {len(data)} images of {data.split}, "
             + ("with labels" if recipe.reads_labels else "without labels"))
    how: Any = {"device": device, "precision": precision, "progress": not quiet}
    if isinstance(net, Slimmable):
        history = train_widths(run, net, recipe, data, **how)
    else:  # masks go on afterwards where a recipe knows none
        plain = isinstance(net, Masked) and recipe.anytime is None
        history = fit(inside(net) if plain else net, data, recipe, run_dir=run.path / "train", **how)
    run.keep(net)
    run.manifest.trained = True
    run.save()
    run.__dict__["net"] = net.eval()
    return history


def record_run(
    run: Run, splits: Sequence[str], *, batches: Sequence[int] = (1,), batch_size: int = 32,
    confidences: Sequence[str] | None = None, device: str | None = None, latency: bool = True, again: bool = False,
    quiet: bool = False,
) -> dict[str, ExitTable]:
    """Memoise each split that has no table of this very network, with these confidences, yet."""
    tables = {}
    for name in splits:
        page = run.path / "tables" / f"{name}.json"
        if page.is_file() and not again:
            table = ExitTable.load(page)
            lacking = table.task == "dense" and not set(confidences or ()) <= set(table.histograms)
            if table.fingerprints["model"] == model_fingerprint(run.net) and not lacking:
                tables[name] = table
                continue
        split = run.source.split(name)
        words = f"recording {len(split)} images of {name}"
        loader = Steps(DataLoader(split, batch_size=batch_size), words, quiet=quiet)
        tables[name] = record(run.net, loader, split=name, device=device, class_names=run.source.class_names,
                              confidences=confidences, untouched=True,
                              latency={"batches": tuple(batches)} if latency else False)
        tables[name].save(page)
    return tables


def search_run(run: Run, *, split: str = "calibration", options: Mapping[str, Any], command: str = "",
               quiet: bool = False) -> Plan:
    """Search a plan on a split's table and keep it."""
    table = run.table(split)
    with Settled("searching", quiet=quiet) as told:
        plan = search(table, temperatures=_temperatures(table, options), progress=told, **options)
    save_plan(plan, run.path / "plan.json")
    run.save(command)
    return plan


def front_run(run: Run, *, split: str = "calibration", options: Mapping[str, Any], quiet: bool = False) -> list[Plan]:
    """The front of cost and quality on a split's table."""
    table = run.table(split)
    with Settled("searching", quiet=quiet) as told:
        return search_front(table, temperatures=_temperatures(table, options), progress=told, **options)


def _temperatures(table: ExitTable, options: Mapping[str, Any]) -> tuple[float, ...] | None:
    return calibrate(table, against=options.get("against", "auto")).early if table.task == "classify" else None

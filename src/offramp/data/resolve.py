"""From what a user types to data: ``camvid:PATH``, ``scenes?n=400``, ``package.module:callable`` ..."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, final, overload

import torch
from torch import Tensor
from torch.utils.data import Dataset

from offramp._specs import Spec, load_callable, near, parse
from offramp.data.base import SPLITS, Augment, Prepare, Source, Split, fingerprint
from offramp.data.camvid import camvid
from offramp.data.cifar10 import cifar10
from offramp.data.cityscapes import cityscapes
from offramp.data.coco import coco
from offramp.data.figures import figures
from offramp.data.imagefolder import imagefolder
from offramp.data.mpii import mpii
from offramp.data.scenes import scenes
from offramp.data.voc import voc
from offramp.errors import DataError, OfframpError

__all__ = ["Foreign", "load_data"]

READERS: dict[str, Callable[..., Source]] = {
    "camvid": camvid, "cifar10": cifar10, "cityscapes": cityscapes, "coco": coco, "imagefolder": imagefolder,
    "mpii": mpii, "voc": voc,
}
DRAWN: dict[str, Callable[..., Source]] = {"figures": figures, "scenes": scenes}
"""Built in: they have no path."""
PREPARE_OPTIONS = ("size", "mean", "std")


@overload
def load_data(spec: str, split: None = None, *, size: tuple[int, int] | str | None = None,
              mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None) -> Source: ...
@overload
def load_data(spec: str, split: str, *, labels: bool = True, augment: Augment | None = None,
              size: tuple[int, int] | str | None = None, mean: tuple[float, ...] | None = None,
              std: tuple[float, ...] | None = None) -> Split: ...
def load_data(
    spec: str, split: str | None = None, *, labels: bool = True, augment: Augment | None = None,
    size: tuple[int, int] | str | None = None, mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Source | Split:
    """Find data by what a user types; the whole source, or one of its splits (or several, as ``train+unlabelled``).

    ``spec`` is ``camvid:PATH``, ``cityscapes:PATH``, ``voc:PATH``, ``coco:PATH``, ``cifar10:PATH``, ``mpii:PATH``,
    ``imagefolder:PATH``, ``scenes`` or ``figures``, each with options such as ``?size=96x128`` (also mean and std;
    train=trainaug and sbd for voc, min_area for coco, sigma for mpii and figures, n and difficulty=0.2-0.8 for scenes
    and figures, task for scenes, seed for all that draw), or
    ``package.module:callable``: a function that takes ``split`` and the options and returns a Dataset, or that takes
    the options alone and returns a Source or a dict of Datasets by split. Arguments here win over options in ``spec``.

    >>> len(load_data("scenes?size=32x48&n=6", "test"))
    3
    """
    parsed = parse(spec)
    options = dict(parsed.options)
    given = {name: value for name, value in (("size", size), ("mean", mean), ("std", std)) if value is not None}
    wanted = {name: options.pop(name) for name in PREPARE_OPTIONS if name in options} | given
    source = _source(parsed, options, _prepare_options(wanted, spec))
    return source if split is None else source.split(split, labels=labels, augment=augment)


def _prepare_options(wanted: Mapping[str, Any], spec: str) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for name, value in wanted.items():
        if name == "size":
            checked[name] = _size(value, spec)
            continue
        numbers = value.split(",") if isinstance(value, str) else value
        try:
            checked[name] = tuple(float(n) for n in numbers)
        except (TypeError, ValueError) as error:
            raise DataError(expected=f"{name} as three numbers, such as {name}=0.5,0.5,0.5", got=repr(value),
                            where=spec, todo="mend the option") from error
    return checked


def _size(value: Any, spec: str) -> tuple[int, int]:
    try:
        numbers = tuple(int(n) for n in value.lower().split("x")) if isinstance(value, str) else (
            (value, value) if isinstance(value, int) else tuple(int(n) for n in value))
        height, width = numbers if len(numbers) == 2 else (numbers[0], numbers[0])
        if min(height, width) < 1 or len(numbers) > 2:
            raise ValueError
    except (TypeError, ValueError, IndexError) as error:
        raise DataError(expected="a size as HEIGHTxWIDTH, such as size=96x128", got=repr(value), where=spec,
                        todo="mend the option") from error
    return height, width


def _source(spec: Spec, options: dict[str, Any], prepare: dict[str, Any]) -> Source:
    if spec.kind in DRAWN:
        if spec.name:
            raise DataError(expected=f"{spec.kind} without a path", got=repr(spec.text), where="load_data",
                            todo=f"{spec.kind} are drawn by program: {spec.kind}?size=96x128&n=400")
        fixed = {"size": prepare.pop("size", (96, 128))} if spec.kind == "scenes" else {}
        if "difficulty" in options:
            options["difficulty"] = _range(options["difficulty"], spec.text)
        source: Source = _call(DRAWN[spec.kind], options, spec, **fixed, prepare=Prepare(**prepare))
        return source
    if spec.kind in READERS:
        if not spec.name:
            raise DataError(expected=f"{spec.kind}:PATH", got=repr(spec.text), where="load_data", todo="add the path")
        reader = READERS[spec.kind]
        if spec.kind == "imagefolder":
            prepare = {"size": (224, 224), **prepare}
        if spec.kind == "cifar10" and "size" in prepare:
            raise DataError(expected="cifar10 at its own 32x32", got=f"size={prepare['size']}", where=spec.text,
                            todo="leave the option out, or resize in augment=")
        source = _call(partial(reader, spec.name), options, spec, prepare=Prepare(**prepare))
        return source
    if spec.name and "/" not in spec.kind:
        if "." not in spec.kind and (close := near(spec.kind, [*READERS, *DRAWN])).startswith("did you mean"):
            raise DataError(expected=_known(), got=repr(spec.text), where="load_data", todo=close)
        return _foreign_source(spec, options, prepare)
    close = near(spec.kind, [*READERS, *DRAWN])
    raise DataError(expected=_known(), got=repr(spec.text), where="load_data", todo=close)


def _known() -> str:
    return f"data named {', '.join([*(f'{k}:PATH' for k in READERS), *DRAWN])} or package.module:callable"


def _range(value: Any, spec: str) -> tuple[float, float]:
    try:
        if isinstance(value, int | float):
            return float(value), float(value)
        low, high = (float(v) for v in (value.split("-") if isinstance(value, str) else value))
        return low, high
    except (TypeError, ValueError) as error:
        raise DataError(expected="difficulty as LOW-HIGH within 0 .. 1, such as difficulty=0.2-0.8", got=repr(value),
                        where=spec, todo="mend the option") from error


def _call(make: Callable[..., Any], options: Mapping[str, Any], spec: Spec, **fixed: Any) -> Any:
    """Call with the options, or say which of them the source does not know."""
    parameters = inspect.signature(make).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        known = [n for n in parameters if n not in fixed and n not in ("path", "split")]
        unknown = [name for name in options if name not in known]
        if unknown:
            allowed = [*known, *PREPARE_OPTIONS]
            raise DataError(expected=f"options among {', '.join(allowed)}", got=", ".join(unknown), where=spec.text,
                            todo=near(unknown[0], allowed))
    try:
        return make(**options, **fixed)
    except OfframpError:
        raise
    except TypeError as error:
        raise DataError(expected="options of the right kind", got=f"{dict(options)}: {error}", where=spec.text,
                        todo="mend the options after the ?, or the function's arguments") from error


@final
class Foreign(Split):
    """A Dataset of the user's own, passed through as it is; it must have a length.

    Its fingerprint covers its length and its first, middle and last sample: a change anywhere else goes unseen.
    """

    def __init__(self, inner: Dataset[Any], *, source: str, split: str, labels: bool, prepare: Prepare) -> None:
        self.inner, self.source, self.split, self.prepare = inner, source, split, prepare
        length = len(inner)  # type: ignore[arg-type]
        if not length:
            raise DataError(expected="a Dataset with samples", got="an empty one", where=f"{source}/{split}",
                            todo="check the function that makes it")
        first = inner[0]
        labelled = isinstance(first, tuple | list) and len(first) > 1
        self.labels = labelled and labels
        target = torch.as_tensor(first[1]) if labelled else None
        self.task = getattr(inner, "task", "dense" if target is not None and target.ndim >= 2 else "classify")
        self.class_names = tuple(getattr(inner, "class_names", None) or getattr(inner, "classes", None) or ())
        self.names = list(getattr(inner, "names", None) or (f"{split}/{i}" for i in range(length)))

    @property
    def identity(self) -> Iterable[object]:
        rows = sorted({0, len(self) // 2, len(self) - 1})
        return [self.split, len(self), *(_digest(self.inner[i]) for i in rows)]

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        sample = self.inner[index]
        if not isinstance(sample, tuple | list):
            return sample, None
        return sample[0], torch.as_tensor(sample[1]) if self.labels else None

    def __getitem__(self, index: int) -> Any:
        image, label = self.read(range(len(self))[index])
        if self.prepare.augment is not None:
            image, label = self.prepare.augmented(image, label)
        return image if label is None else (image, label)


def _digest(sample: Any) -> str:
    if isinstance(sample, Tensor):
        return fingerprint([tuple(sample.shape), sample.dtype, sample.detach().cpu().contiguous().numpy().tobytes()])
    if isinstance(sample, Mapping):
        return fingerprint([(key, _digest(value)) for key, value in sample.items()])
    if isinstance(sample, tuple | list):
        # the first part alone: the same inputs with and without labels are the same data
        return _digest(sample[0]) if sample else ""
    return fingerprint([sample])


def _foreign_source(spec: Spec, options: dict[str, Any], prepare: dict[str, Any]) -> Source:
    where = f"{spec.kind}:{spec.name}"
    function = load_callable(where, "load_data")
    parameters = inspect.signature(function).parameters
    options |= {name: value for name, value in prepare.items() if name in parameters}
    by_split = "split" in parameters

    def wrap(inner: Any, split: str, labels: bool, prepared: Prepare) -> Split:
        if isinstance(inner, Split):
            return inner
        if not (hasattr(inner, "__len__") and hasattr(inner, "__getitem__")):
            raise DataError(expected="a Dataset with __len__ and __getitem__", got=type(inner).__name__, where=where,
                            todo="return a torch Dataset, a dict of them by split, or an offramp.data.Source")
        return Foreign(inner, source=where, split=split, labels=labels and split != "unlabelled", prepare=prepared)

    if by_split:
        def make(split: str, labels: bool, prepared: Prepare) -> Split:
            return wrap(_call(function, options, spec, split=split), split, labels, prepared)
        names: Iterable[str] = getattr(function, "splits", SPLITS)
        probe = make(next(iter(names)), True, Prepare())
    else:
        result = _call(function, options, spec)
        if isinstance(result, Source):
            return result
        inner = dict(result) if isinstance(result, Mapping) else {"unlabelled": result}

        def make(split: str, labels: bool, prepared: Prepare) -> Split:
            return wrap(inner[split], split, labels, prepared)
        names = inner
        probe = make(next(iter(names)), True, Prepare())
    return Source(name=where, task=probe.task, class_names=probe.class_names, make={s: partial(make, s) for s in names})

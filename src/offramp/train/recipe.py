"""What a training run does, in one frozen value: a recipe is made by a function of ``recipes`` and given to ``fit``."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal

from torch import Tensor

from offramp.errors import OfframpError

__all__ = ["AnytimeStep", "Recipe", "SlimStep"]

Augment = Callable[[Tensor], Tensor]
AugmentPair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class SlimStep:
    """How a step trains all widths of a network, from the widest down: SlimSeg, Algorithm 1.

    >>> SlimStep(teacher="next", tau=2.0)
    Traceback (most recent call last):
        ...
    offramp.errors.OfframpError: SlimStep: expected teacher prev, largest, mean, larger or None, not 'next'; tau ...
    """

    teacher: Literal["prev", "largest", "mean", "larger"] | None = "prev"
    """Whose softmax each narrower width learns: the next wider one's, the widest's, the mean of all wider ones', or
    each of theirs with the mean of the losses; None: labels teach every width. The widest always learns from labels."""
    boundary: str | None = None
    """Dotted name of the module whose output, low-level features, a boundary head reads while training."""
    boundary_weight: float = 0.0
    """Of L_b, what that head loses; above 0 where there is a head, else 0."""
    guided_weight: float = 0.0
    """Of L_g, what is lost where the head sees a boundary; without a head, where the labels have one."""
    tau: float = 0.7
    """The head sees a boundary where it gives more than this probability."""
    radius: float = 3
    """How near a border pixels of the boundary are: see ``functional.boundary.boundary_labels``."""
    ohem: bool = True
    """Whether L_seg takes the hard pixels alone, where it is learnt from labels."""
    sandwich: int | None = None
    """US-Net's rule: a step trains the widest, the narrowest and so many others drawn at random, and in the end every
    width's norms are estimated anew; None: a step trains all widths."""

    def __post_init__(self) -> None:
        checks = {
            f"teacher prev, largest, mean, larger or None, not {self.teacher!r}":
                self.teacher in ("prev", "largest", "mean", "larger", None),
            f"boundary_weight > 0 with a boundary and 0 without, not {self.boundary_weight} with {self.boundary!r}":
                (self.boundary_weight > 0) if self.boundary else self.boundary_weight == 0,
            f"guided_weight >= 0, not {self.guided_weight}": self.guided_weight >= 0,
            f"tau in (0, 1), not {self.tau}": 0 < self.tau < 1,
            f"radius >= 1, not {self.radius}": self.radius >= 1,
            f"sandwich >= 0 or None, not {self.sandwich}": self.sandwich is None or self.sandwich >= 0,
        }
        if faults := [expected for expected, holds in checks.items() if not holds]:
            raise OfframpError("SlimStep: expected " + "; ".join(faults) + ".")


@dataclass(frozen=True, kw_only=True)
class AnytimeStep:
    """How a step trains all exits of a dense network, masks on or off: ADP-C.

    >>> AnytimeStep(mask_from=-1)
    Traceback (most recent call last):
        ...
    offramp.errors.OfframpError: AnytimeStep: expected mask_from >= 0, not -1.
    """

    says: Literal["classes", "heatmaps"] = "classes"
    """What an exit's channels are: classes, by cross-entropy, or heatmaps, by the mean squared error."""
    mask_from: int = 0
    """The epoch from which masks are on, where the network has any; before, all exits run unmasked."""
    channel_weights: tuple[float, ...] | None = None
    """What a position of each class, or of each joint's heatmap, counts in the mean; None: all alike."""

    def __post_init__(self) -> None:
        weights = self.channel_weights
        checks = {
            f"says classes or heatmaps, not {self.says!r}": self.says in ("classes", "heatmaps"),
            f"mask_from >= 0, not {self.mask_from}": self.mask_from >= 0,
            f"channel_weights >= 0 with one above, not {weights}":
                weights is None or (all(w >= 0 for w in weights) and any(weights)),
        }
        if faults := [expected for expected, holds in checks.items() if not holds]:
            raise OfframpError("AnytimeStep: expected " + "; ".join(faults) + ".")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All choices of a training run but the network, the data and the machine.

    >>> Recipe(loss="teacher", epochs=0, lr=-1.0)
    Traceback (most recent call last):
        ...
    offramp.errors.OfframpError: Recipe: expected epochs >= 1, not 0; lr > 0, not -1.0.
    """

    loss: Literal["teacher", "labels", "kd", "pfd"]
    """``teacher``: KL from the network's own output to each early exit, no label is read. ``labels``: cross-entropy of
    every trained exit. ``kd``, ``pfd``: both for each early exit, ``functional.losses.distillation`` and
    ``positive_filtering``."""
    epochs: int
    """Passes over the N samples (with several views, each pass takes one view of each sample)."""
    freeze: bool = True
    """Whether the backbone stays as it is: no gradients, eval mode, buffers untouched. Needed for cached features."""
    temperature: float = 1.0
    """Softens both sides of the teacher loss; confidences are calibrated best near 1."""
    alpha: float = 0.5
    """Share of the labels in ``kd`` and ``pfd``; the teacher has the rest."""
    distill: float = 0.0
    """Beside ``labels``: so many times T^2 KL from the final exit, as it stands, to each early one (EENet, 3.1)."""
    distill_from: float = 0.75
    """The share of all steps after which that begins."""
    weights: tuple[float, ...] | None = None
    """One weight for each column in order of depth, the final one included unless ``freeze``; None gives each exit 1.
    What weighs 0 is neither trained nor computed."""
    dropout: Literal["round_robin", "printed", "all"] | None = None
    """Which early exits a step trains, and computes: None all of them; ``round_robin`` one after another; ``printed``
    exit i where step j (from 1) is a multiple of i, as MESS's Eq. 2 has it; ``all`` none of them. The final exit is
    never left out."""
    loss_stride: int = 1
    """Of dense logits: losses are computed on a grid so many times coarser than the output (labels by the nearest
    pixel), and heads that can are not upsampled before."""
    batch_size: int = 128
    """For datasets and cached features; a DataLoader keeps its own when nothing is cached."""
    optimiser: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    """At the end of the warm-up."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 0.0
    """Spared for one-dimensional parameters: biases and norms."""
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    """Down to zero: half a cosine, or (1 - progress)^0.9."""
    warmup: float = 0.05
    """Share of all steps in which the rate rises linearly."""
    clip: float | None = None
    """Largest norm of the gradient; None does not clip."""
    ema: float | None = None
    """Decay of an exponential mean of the trained weights, which is what remains at the end; None keeps the last."""
    views: int = 1
    """How often each sample goes through the frozen network for the cache: first as it is, then augmented. One view
    with an augmentation caches nothing: each pass is drawn anew."""
    augment: Augment | None = None
    """Takes a batch of inputs, gives a changed batch of the same shape; it may draw from torch's global generator."""
    augment_pair: AugmentPair | None = None
    """Like ``augment``, for recipes that read labels: takes and gives (inputs, labels), which move together and may
    change their size. All views are drawn, the first one too, so that they have one size."""
    slim: SlimStep | None = None
    """For networks of several widths; None for networks with exits."""
    anytime: AnytimeStep | None = None
    """For the exits of dense networks, end to end, masks on (:func:`offramp.mask_`) or off."""
    seed: int = 0
    """All that is random follows from it and the step's number alone, so that a resumed run repeats an unbroken one."""

    def __post_init__(self) -> None:
        checks = {
            f"loss teacher, labels, kd or pfd, not {self.loss!r}": self.loss in ("teacher", "labels", "kd", "pfd"),
            f"epochs >= 1, not {self.epochs}": self.epochs >= 1,
            f"temperature > 0, not {self.temperature}": self.temperature > 0,
            f"alpha in [0, 1], not {self.alpha}": 0 <= self.alpha <= 1,
            f"dropout round_robin, printed, all or None, not {self.dropout!r}":
                self.dropout in (None, "round_robin", "printed", "all"),
            "freeze=False for dropout='all', which leaves the final exit": not (self.freeze and self.dropout == "all"),
            f"distill >= 0, not {self.distill}": self.distill >= 0,
            f"distill=0 beside the {self.loss} loss, which has a teacher of its own":
                self.distill == 0 or self.loss == "labels",
            f"distill_from in [0, 1], not {self.distill_from}": 0 <= self.distill_from <= 1,
            f"loss_stride >= 1, not {self.loss_stride}": self.loss_stride >= 1,
            f"weights >= 0 with one above, not {self.weights}":
                self.weights is None or (all(w >= 0 for w in self.weights) and any(self.weights)),
            f"batch_size >= 1, not {self.batch_size}": self.batch_size >= 1,
            f"optimiser adamw or sgd, not {self.optimiser!r}": self.optimiser in ("adamw", "sgd"),
            f"lr > 0, not {self.lr}": self.lr > 0,
            f"momentum in [0, 1), not {self.momentum}": 0 <= self.momentum < 1,
            f"weight_decay >= 0, not {self.weight_decay}": self.weight_decay >= 0,
            f"schedule cosine, poly or constant, not {self.schedule!r}":
                self.schedule in ("cosine", "poly", "constant"),
            f"warmup in [0, 1), not {self.warmup}": 0 <= self.warmup < 1,
            f"clip > 0 or None, not {self.clip}": self.clip is None or self.clip > 0,
            f"ema in (0, 1) or None, not {self.ema}": self.ema is None or 0 < self.ema < 1,
            f"views >= 1, not {self.views}": self.views >= 1,
            f"an augment for {self.views} views, which would else be the same": self.views <= 1 or self.augmented,
            "augment or augment_pair, not both": not (self.augment and self.augment_pair),
            "augment_pair with a loss that reads labels, augment for the teacher loss":
                self.reads_labels or self.augment_pair is None,
            f"freeze=True for the {self.loss} loss, whose teacher is the frozen network":
                self.freeze or self.loss == "labels",
            "loss='labels', freeze=False and no weights, dropout, distill or views beside slim": self.slim is None or (
                self.loss == "labels" and not self.freeze and self.weights is None and self.dropout is None
                and self.distill == 0 and self.views == 1),
            "loss='labels', freeze=False and no slim, dropout, distill or views beside anytime":
                self.anytime is None or (
                self.loss == "labels" and not self.freeze and self.slim is None and self.dropout is None
                and self.distill == 0 and self.views == 1),
            f"loss_stride 1 for heatmaps, not {self.loss_stride}":
                self.anytime is None or self.anytime.says == "classes" or self.loss_stride == 1,
            "no ema beside sandwich, whose norms would be those of other weights":
                self.slim is None or self.slim.sandwich is None or self.ema is None,
        }
        if faults := [expected for expected, holds in checks.items() if not holds]:
            raise OfframpError("Recipe: expected " + "; ".join(faults) + ".")

    @property
    def reads_labels(self) -> bool:
        return self.loss != "teacher"

    @property
    def augmented(self) -> bool:
        return self.augment is not None or self.augment_pair is not None

    def turn(self, step: int, early: int) -> tuple[int, ...]:
        """Which of so many early exits learn in a step.

        >>> [recipe.turn(step, 3) for recipe in (Recipe(loss="labels", epochs=1, dropout="round_robin"),
        ...                                      Recipe(loss="labels", epochs=1, dropout="printed")) for step in (3, 4)]
        [(0,), (1,), (0, 1), (0,)]
        """
        match self.dropout:
            case "round_robin":
                return (step % early,) if early else ()
            case "printed":
                return tuple(i for i in range(early) if (step + 1) % (i + 1) == 0)
            case "all":
                return ()
            case _:
                return tuple(range(early))

    def distill_at(self, step: int, steps: int) -> float:
        """What the final exit's answer weighs in a step in [0, steps).

        >>> [Recipe(loss="labels", epochs=1, distill=0.5).distill_at(step, 4) for step in range(4)]
        [0.0, 0.0, 0.0, 0.5]
        """
        return self.distill if step >= self.distill_from * steps else 0.0

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of a step in [0, steps).

        >>> recipe = Recipe(loss="teacher", epochs=1, lr=1.0, warmup=0.5)
        >>> [recipe.lr_at(step, 4) for step in range(4)]
        [0.5, 1.0, 1.0, 0.5]
        """
        rise = math.ceil(self.warmup * steps)
        if step < rise:
            return self.lr * (step + 1) / rise
        progress = (step - rise) / max(1, steps - rise)
        match self.schedule:
            case "cosine":
                return self.lr * (1 + math.cos(math.pi * progress)) / 2
            case "poly":
                return float(self.lr * (1 - progress) ** 0.9)
            case _:
                return self.lr

    def to_json(self) -> dict[str, Any]:
        """Plain values; a callable is named by its module and name, to be compared, not to be imported."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("augment", "augment_pair"):
            if (function := data[name]) is not None:
                kind = type(function)
                own = repr(function) if is_dataclass(kind) else getattr(function, "__qualname__", kind.__qualname__)
                data[name] = f"{getattr(function, '__module__', '')}:{own}"
        if self.weights is not None:
            data["weights"] = list(self.weights)
        for name in ("slim", "anytime"):
            if (step := data.pop(name)) is not None:  # checkpoints of other recipes are older than these
                data[name] = json.loads(json.dumps(asdict(step)))
        return {"type": "Recipe", "version": 1, "data": data}

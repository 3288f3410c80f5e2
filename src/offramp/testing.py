"""Contract suites that a stranger's class can inherit: subclass one, say how to make yours, and let pytest collect it.

N samples, E exits (the last being the backbone), K classes.

>>> from offramp.policies.thresholds import Thresholds
>>> class TestMine(PolicyContract):
...     def policy(self):
...         return Thresholds(thresholds=(0.5, 0.8))
>>> TestMine().test_a_row_is_judged_alone()
"""

import copy
import random
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.choose.plan import load_plan, save_plan
from offramp.choose.replay import Replay, replay
from offramp.errors import DataError, OfframpError, PlanError
from offramp.functional.metrics import confusion
from offramp.functional.summaries import agreement, evidence_of, summarise
from offramp.policies.lesson import Lesson, Scheduler, lesson
from offramp.table import Costs, ExitTable, Latency
from offramp.types import CONFIDENCES, EDGED, Evidence, ExitColumn, Plan, Policy, Task

__all__ = ["PolicyContract", "SchedulerContract"]

_EVERY = (*CONFIDENCES, *EDGED)
_STRIDE = 2


def _evidence(logits: Tensor) -> Evidence:
    """What the runtime shows of the exits passed so far: (n, j, K), or of images (n, j, K, H, W)."""
    if logits.ndim == 3:
        return Evidence(logits=logits)
    return evidence_of([summarise(logits[:, e], confidences=_EVERY, stride=_STRIDE) for e in range(logits.shape[1])])


def _table(logits: Tensor, labels: Tensor | None) -> ExitTable:
    """A table of these exits, the last being the backbone: (N, E, K) and (N,), or (N, E, K, H, W) and (N, H, W)."""
    samples, exits, classes = logits.shape[:3]
    names = [*(f"exit{e}" for e in range(exits - 1)), "final"]
    macs, head_macs = tuple(100 * (e + 1) for e in range(exits)), (*[10] * (exits - 1), 0)
    ms, head_ms = tuple(float(e + 1) ** 1.5 for e in range(exits)), (*[0.25] * (exits - 1), 0.0)
    late = Latency(device="cpu", engine="eager", dtype="float32", batch=1, backbone_p50_ms=ms, backbone_p95_ms=ms,
                   head_p50_ms=head_ms, head_p95_ms=head_ms, dense_p50_ms=ms[-1], dense_p95_ms=ms[-1])
    given: dict[str, Any] = {
        "columns": [ExitColumn(name=name, site=name, stride=_STRIDE) for name in names], "split": "contract",
        "costs": Costs(macs=macs, head_macs=head_macs, param_bytes=macs, head_param_bytes=head_macs,
                       peak_bytes=(100,) * exits, latency=(late,)),
        "fingerprints": {"model": "contract", "data": "contract", "split": f"{samples} samples"},
    }
    if logits.ndim == 3:
        return ExitTable(task="classify", labels=labels, logits=logits, **given)
    said = [summarise(logits[:, e], confidences=_EVERY, stride=_STRIDE) for e in range(exits)]

    def held(truth: Tensor) -> Tensor:
        return torch.stack([confusion(one.labels, truth, classes) for one in said], dim=1)

    return ExitTable(
        task="dense", confusion=None if labels is None else held(labels), agreement_confusion=held(said[-1].labels),
        histograms={name: torch.stack([one.histograms[name] for one in said], dim=1) for name in _EVERY},
        probs=torch.stack([one.probs for one in said], dim=1),
        agreement=torch.stack([torch.stack([agreement(one.labels, other.labels) for other in said], dim=1)
                               for one in said], dim=1), **given)


def _replayed(table: ExitTable, policy: Policy) -> Replay:
    return replay(table, Plan(exits=table.names[:-1], policy=policy, task=table.task))


def _live(logits: Tensor, policy: Policy, batch: int) -> Tensor:
    """Where each row of ``logits`` (N, E, ...) leaves as the runtime asks: batch by batch, each shrinking."""
    exits = []
    for rows in logits.split(batch):
        at, alive = torch.full((len(rows),), logits.shape[1] - 1), torch.arange(len(rows))
        for e in range(logits.shape[1] - 1):
            if len(alive):
                leaves = policy.decide(e, _evidence(rows[alive, : e + 1]))
                at[alive[leaves]] = e
                alive = alive[~leaves]
        exits.append(at)
    return torch.cat(exits)


class PolicyContract(ABC):
    """What the runtime and the replay rely on in a ``Policy``; a subclass gives ``policy()`` and sets what differs.

    The batch shrinks and is cut up differently live and on the table, so a row must be judged by its own evidence
    alone, twice the same. The policy never sees a label: evidence has no place for one, and the suite passes none.
    """

    exits = 2
    """Early exits that the policy decides at."""
    classes = 5
    task: Task = "classify"

    @abstractmethod
    def policy(self) -> Policy:
        """A new policy, fitted and ready to decide."""

    # ---- inputs -----------------------------------------------------------------------------------------------

    def logits(self, rows: int, *, seed: int = 0) -> Tensor:
        """(n, E, K), or (n, E, K, 6, 6) for dense: from unsure to sure."""
        draw = torch.Generator().manual_seed(seed)
        shape = (rows, self.exits, self.classes, *((6, 6) if self.task == "dense" else ()))
        sure = torch.logspace(-1, 1.3, max(rows, 1))[:rows].view(-1, *[1] * (len(shape) - 1))
        return torch.randn(shape, generator=draw) * sure

    def evidence(self, logits: Tensor, exit_index: int) -> Evidence:
        """What the policy is shown at an exit."""
        return _evidence(logits[:, : exit_index + 1])

    def decisions(self, logits: Tensor, policy: Policy | None = None) -> Tensor:
        """(n, E) bool: every exit asked about every row, checked for type and shape."""
        policy = policy or self.policy()
        answers = []
        for exit_index in range(self.exits):
            leaves = policy.decide(exit_index, self.evidence(logits, exit_index))
            assert isinstance(leaves, Tensor) and leaves.dtype == torch.bool, \
                f"decide({exit_index}) must give a bool tensor, but gave {getattr(leaves, 'dtype', type(leaves))}"
            assert tuple(leaves.shape) == (len(logits),), \
                f"decide({exit_index}) must give one answer a row, ({len(logits)},), but gave {tuple(leaves.shape)}"
            answers.append(leaves)
        return torch.stack(answers, dim=1)

    # ---- the contract -----------------------------------------------------------------------------------------

    def test_is_a_policy(self) -> None:
        assert isinstance(self.policy(), Policy)

    def test_one_bool_a_row(self) -> None:
        assert self.decisions(self.logits(16)).shape == (16, self.exits)

    def test_a_batch_of_one_and_an_empty_batch(self) -> None:
        self.decisions(self.logits(1))
        self.decisions(self.logits(4)[:0])

    def test_a_row_is_judged_alone(self) -> None:
        logits = self.logits(16)
        whole = self.decisions(logits)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
        assert torch.equal(self.decisions(logits[order]), whole[order]), "the order of the batch changes decisions"
        single = torch.cat([self.decisions(logits[n : n + 1]) for n in range(16)])
        assert torch.equal(single, whole), "the rest of the batch changes a row's decision"

    def test_asked_twice_it_says_the_same(self) -> None:
        logits, policy = self.logits(16), self.policy()
        assert torch.equal(self.decisions(logits, policy), self.decisions(logits, policy))

    def test_evidence_is_left_as_found(self) -> None:
        logits = self.logits(8)
        for exit_index in range(self.exits):
            shown = self.evidence(logits, exit_index)
            kept = copy.deepcopy(shown)
            self.policy().decide(exit_index, shown)
            for name in ("logits", "probs", "agreement"):
                before, after = getattr(kept, name), getattr(shown, name)
                assert before is None or torch.equal(before, after), f"decide({exit_index}) wrote into {name}"
            assert all(torch.equal(kept.histograms[name], counts) for name, counts in shown.histograms.items())

    def test_equal_evidence_gets_equal_answers(self) -> None:
        found = self.decisions(torch.zeros_like(self.logits(8)))
        assert torch.equal(found, found[:1].expand_as(found)), "rows with equal evidence are parted"

    def test_a_saturated_softmax_is_judged(self) -> None:
        logits = torch.zeros_like(self.logits(4))
        logits[:, :, 0] = 1e4
        found = self.decisions(logits)
        assert torch.equal(found, found[:1].expand_as(found))

    def test_nan_is_refused(self) -> None:
        logits = self.logits(4)
        logits[2] = torch.nan
        for exit_index in range(self.exits):
            try:
                self.policy().decide(exit_index, self.evidence(logits, exit_index))
            except DataError:
                continue
            raise AssertionError(f"decide({exit_index}) must raise DataError on NaN, but let it pass")

    def test_replayed_on_a_table_without_labels_it_decides_as_live(self) -> None:
        policy = self.policy()
        early = self.logits(16)
        logits = torch.cat([early, early[:, -1:]], dim=1)  # the backbone, which is never asked
        replayed = _replayed(_table(logits, None), policy).exit_index
        for batch in (1, 5, 16):
            assert torch.equal(_live(logits, policy, batch), replayed), f"batches of {batch} leave elsewhere"

    def test_saved_and_loaded_it_decides_the_same(self) -> None:
        policy, logits = self.policy(), self.logits(16)
        plan = Plan(exits=tuple(f"exit{e}" for e in range(self.exits)), policy=policy, task=self.task)
        with tempfile.TemporaryDirectory() as folder:
            try:
                loaded = load_plan(save_plan(plan, Path(folder) / "plan.json"), known=(type(policy),))
            except OfframpError as error:
                raise AssertionError(f"a plan with this policy cannot be saved and loaded: {error}") from error
        assert torch.equal(self.decisions(logits, loaded.policy), self.decisions(logits, policy))


class SchedulerContract(ABC):
    """What ``compare`` and the budgets rely on in a ``Scheduler``; a subclass gives ``scheduler()``.

    Whatever the table is like, each budget from the first exit's cost up gives a policy that keeps it on the table's
    own samples, that keeps the ``PolicyContract``, and that is the same whenever it is asked for.
    """

    exits = 3
    """The backbone counted."""
    classes = 4
    samples = 80
    task: Task = "classify"
    unspent = 0.15
    """The share of the way from the first exit's cost to the backbone's by which a policy may stay below its budget,
    where scores differ; 1: as far as it likes."""

    @abstractmethod
    def scheduler(self) -> Scheduler:
        """A new scheduler, to be fitted."""

    # ---- inputs -----------------------------------------------------------------------------------------------

    def logits(self, rows: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(N, E, K) and labels (N,), or of images of 6 x 6: exits that are surer and better with depth."""
        draw = torch.Generator().manual_seed(seed)
        side = (6, 6) if self.task == "dense" else ()
        truth = torch.randint(self.classes, (rows, *side), generator=draw)
        ease = 4 * torch.rand((rows, 1, *[1] * len(side)), generator=draw)
        noise = torch.randn((rows, self.exits, self.classes, *side), generator=draw)
        hint = torch.nn.functional.one_hot(truth, self.classes).float().movedim(-1, 1)
        skill = torch.linspace(0.5, 1.5, self.exits)
        return torch.stack([noise[:, e] + skill[e] * ease * hint for e in range(self.exits)], dim=1), truth

    def table(self, rows: int | None = None, *, labels: bool = True, seed: int = 0) -> ExitTable:
        """What a table says of ``logits``."""
        made, truth = self.logits(rows or self.samples, seed=seed)
        return _table(made, truth if labels else None)

    def fit(self, table: ExitTable, **how: Any) -> tuple[Lesson, Callable[[float], Policy]]:
        """A new scheduler's ``at``, and the lesson that it was fitted to."""
        taught = lesson(table, **how)
        return taught, self.scheduler().fit(taught)

    def budgets(self, taught: Lesson) -> Sequence[float]:
        """From the first exit's cost to beyond the backbone's."""
        low, high = float(taught.cost[0]), float(taught.cost[-1])
        return [low, *(low + (high - low) * share for share in (0.01, 0.2, 0.4, 0.5, 0.6, 0.8, 0.99)), high, 2 * high]

    def assert_kept(self, table: ExitTable, **how: Any) -> list[float]:
        """Each budget is kept on the lesson's samples, by decisions and not by a forecast; gives what was spent."""
        taught, at = self.fit(table, **how)
        spent = []
        for budget in self.budgets(taught):
            cost = float(taught.cost[_replayed(table, at(budget)).exit_index].mean())
            assert cost <= budget * (1 + 1e-9), f"a budget of {budget:g} {taught.unit} is exceeded: {cost:g}"
            spent.append(cost)
        return spent

    # ---- the contract -----------------------------------------------------------------------------------------

    def test_budgets_are_kept(self) -> None:
        self.assert_kept(self.table())
        self.assert_kept(self.table(seed=1), unit="latency_ms")

    def test_budgets_are_used(self) -> None:
        table = self.table()
        costs = table.costs.path(range(self.exits))
        for budget, spent in zip(self.budgets(lesson(table)), self.assert_kept(table), strict=True):
            room = min(budget, costs[-1]) - spent
            assert room <= self.unspent * (costs[-1] - costs[0]) + 1e-9, f"of {budget:g} macs {spent:g} are spent"

    def test_a_budget_below_the_first_exit_is_refused(self) -> None:
        taught, at = self.fit(self.table())
        try:
            at(0.99 * float(taught.cost[0]))
        except PlanError:
            return
        raise AssertionError("at() must raise PlanError where even the first exit for everyone costs more")

    def test_its_policies_keep_the_contract(self) -> None:
        taught, at = self.fit(self.table())
        low, high = float(taught.cost[0]), float(taught.cost[-1])
        outer = self

        class Suite(PolicyContract):
            exits, classes, task = outer.exits - 1, outer.classes, outer.task
            budget = low

            def policy(self) -> Policy:
                return at(self.budget)

        for share in (0.0, 0.5):
            Suite.budget = low + share * (high - low)
            for name in [name for name in dir(Suite) if name.startswith("test_")]:
                getattr(Suite(), name)()

    def test_live_equals_replay(self) -> None:
        taught, at = self.fit(self.table())
        logits, truth = self.logits(12, seed=2)
        other = _table(logits, truth)  # samples that it never saw
        for budget in self.budgets(taught)[::3]:
            policy = at(budget)
            replayed = _replayed(other, policy).exit_index
            for batch in (1, 5, 12):
                assert torch.equal(_live(logits, policy, batch), replayed), f"batches of {batch} leave elsewhere"

    def test_all_equal_scores(self) -> None:
        logits, truth = self.logits(self.samples)
        self.assert_kept(_table(logits[:1].expand_as(logits).contiguous(), truth))
        self.assert_kept(_table(torch.zeros_like(logits), truth))

    def test_a_saturated_softmax(self) -> None:
        logits, truth = self.logits(self.samples)
        self.assert_kept(_table(logits * 1e4, truth))

    def test_a_masked_class(self) -> None:
        if self.task == "classify":
            logits, truth = self.logits(self.samples)
            logits[:, :, 0] = -torch.inf  # as a network masks a class
            self.assert_kept(_table(logits, truth))

    def test_one_sample(self) -> None:
        self.assert_kept(self.table(1))

    def test_exits_that_are_never_right_or_always(self) -> None:
        # EENet's target shares are 0 / 0 where no exit is right, unless guarded
        logits, truth = self.logits(self.samples)
        always = torch.zeros_like(logits) + 3 * torch.nn.functional.one_hot(truth, self.classes).movedim(-1, 1)[:, None]
        noise = 0.1 * self.logits(self.samples, seed=3)[0]
        self.assert_kept(_table(always + noise, truth))
        self.assert_kept(_table(always + noise, (truth + 1) % self.classes))

    def test_fitted_twice_it_is_the_same(self) -> None:
        answers = []
        for seed in (0, 1):  # whatever state the process is in, and in whatever order budgets are asked for
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            taught, at = self.fit(self.table())
            budgets = list(self.budgets(taught))
            found = {budget: at(budget) for budget in (budgets if seed else reversed(budgets))}
            answers.append([found[budget] for budget in budgets])
        assert answers[0] == answers[1], "the same lesson gave two policies: seed what is drawn"

    def test_the_process_is_left_as_found(self) -> None:
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
        grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
        taught, at = self.fit(self.table())
        at(float(taught.cost[-1]))
        assert torch.equal(torch.get_rng_state(), before[0]), "torch's global generator was drawn from"
        assert np.random.get_state()[1].tolist() == before[1], "numpy's was"  # type: ignore[index]
        assert random.getstate() == before[2], "Python's was"
        assert (torch.is_grad_enabled(), torch.get_num_threads()) == (grad, threads)

    def test_the_table_is_left_as_found(self) -> None:
        table, kept = self.table(), self.table()
        taught, at = self.fit(table)
        at(float(taught.cost[-1]))
        for name in ("labels", "logits", "confusion", "agreement_confusion", "probs", "agreement"):
            before, after = getattr(kept, name), getattr(table, name)
            assert before is None or torch.equal(before, after), f"{name} of the table were written into"

    def test_without_labels_it_learns_from_the_backbone(self) -> None:
        with_labels, without = self.table(), self.table(labels=False)
        taught, at = self.fit(with_labels, against="backbone")
        _, blind = self.fit(without)
        for budget in self.budgets(taught):
            assert at(budget) == blind(budget), "against the backbone, labels must not count"
        self.assert_kept(without)

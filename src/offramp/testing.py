"""Contract suites that a stranger's class can inherit: subclass one, say how to make yours, and let pytest collect it.

>>> from offramp.policies.thresholds import Thresholds
>>> class TestMine(PolicyContract):
...     def policy(self):
...         return Thresholds(thresholds=(0.5, 0.8))
>>> TestMine().test_a_row_is_judged_alone()
"""

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from offramp.choose.plan import load_plan, save_plan
from offramp.errors import DataError, OfframpError
from offramp.functional.summaries import evidence_of, summarise
from offramp.types import CONFIDENCES, EDGED, Evidence, Plan, Policy, Task

__all__ = ["PolicyContract"]


class PolicyContract:
    """What the runtime and the replay rely on in a ``Policy``; a subclass gives ``policy()`` and sets what differs.

    The batch shrinks and is cut up differently live and on the table, so a row must be judged by its own evidence
    alone, twice the same. The policy never sees a label: evidence has no place for one, and the suite passes none.
    """

    exits = 2
    """Early exits that the policy decides at."""
    classes = 5
    task: Task = "classify"

    def policy(self) -> Policy:
        """A new policy, fitted and ready to decide."""
        raise NotImplementedError(f"{type(self).__name__}.policy() must return the policy under test")

    # ---- inputs -----------------------------------------------------------------------------------------------

    def logits(self, rows: int, *, seed: int = 0) -> Tensor:
        """(n, E, K), or (n, E, K, 6, 6) for dense: from unsure to sure."""
        draw = torch.Generator().manual_seed(seed)
        shape = (rows, self.exits, self.classes, *((6, 6) if self.task == "dense" else ()))
        sure = torch.logspace(-1, 1.3, max(rows, 1))[:rows].view(-1, *[1] * (len(shape) - 1))
        return torch.randn(shape, generator=draw) * sure

    def evidence(self, logits: Tensor, exit_index: int) -> Evidence:
        """What the policy is shown at an exit."""
        passed = logits[:, : exit_index + 1]
        if self.task == "classify":
            return Evidence(logits=passed)
        every = (*CONFIDENCES, *EDGED)
        return evidence_of([summarise(passed[:, e], confidences=every, stride=2) for e in range(passed.shape[1])])

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
        if self.task == "classify":
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

    def test_saved_and_loaded_it_decides_the_same(self) -> None:
        policy, logits = self.policy(), self.logits(16)
        plan = Plan(exits=tuple(f"exit{e}" for e in range(self.exits)), policy=policy, task=self.task)
        with tempfile.TemporaryDirectory() as folder:
            try:
                loaded = load_plan(save_plan(plan, Path(folder) / "plan.json"), known=(type(policy),))
            except OfframpError as error:
                raise AssertionError(f"a plan with this policy cannot be saved and loaded: {error}") from error
        assert torch.equal(self.decisions(logits, loaded.policy), self.decisions(logits, policy))

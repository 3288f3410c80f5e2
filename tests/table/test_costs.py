from dataclasses import asdict, replace

import numpy as np
import pytest

from choose.synthetic import costs_of
from offramp.errors import FileFormatError, OfframpError, PlanError
from offramp.table import Costs


def test_a_sample_pays_for_every_head_it_passes() -> None:
    costs = Costs(macs=(100, 300, 600, 1000), head_macs=(7, 20, 30, 0), param_bytes=(1,) * 4, head_param_bytes=(1,) * 4,
                  peak_bytes=(1,) * 4)
    assert costs.path([0, 2, 3]).tolist() == [107, 637, 1037]
    assert costs.path([3]).tolist() == [1000]
    assert costs.path([1, 3]).tolist() == [320, 1020]


def test_latency_is_a_samples_share_of_its_batch() -> None:
    costs = costs_of(2)
    one, many = costs.at(batch=1), costs.at(batch=32)
    np.testing.assert_allclose(costs.path([0, 2], "latency_ms"), [
        one.backbone_p50_ms[0] + one.head_p50_ms[0], one.backbone_p50_ms[2] + one.head_p50_ms[0]])
    np.testing.assert_allclose(costs.path([2], "latency_ms", batch=32), [many.backbone_p50_ms[2] / 32])
    with pytest.raises(PlanError, match="batch 7.*batch 1 on cpu"):
        costs.path([2], "latency_ms", batch=7)
    with pytest.raises(PlanError, match="engine compile"):
        costs.at(batch=1, engine="compile")
    with pytest.raises(OfframpError, match="'macs' or 'latency_ms'"):
        costs.path([2], "flops")  # type: ignore[arg-type]


def test_parts_are_what_paths_are_made_of() -> None:
    costs = costs_of(2)
    assert [part.tolist() for part in costs.parts()] == [list(costs.macs), list(costs.head_macs)]
    many = costs.at(batch=32)
    body, head = costs.parts("latency_ms", batch=32)
    assert body.tolist() == [one / 32 for one in many.backbone_p50_ms]
    assert head.tolist() == [one / 32 for one in many.head_p50_ms]


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(OfframpError, match="head_macs has 1 values; peak_bytes has 3 values"):
        Costs(macs=(1, 2), head_macs=(1,), param_bytes=(1, 2), head_param_bytes=(1, 2), peak_bytes=(1, 2, 3))
    with pytest.raises(OfframpError, match="fall with depth.*has a head"):
        Costs(macs=(2, 1, 1), head_macs=(1, 1, 1), param_bytes=(1,) * 3, head_param_bytes=(1,) * 3, peak_bytes=(1,) * 3)


def test_select_keeps_the_times_of_the_chosen() -> None:
    costs = costs_of(3).select([1, 3])
    assert costs.macs == (500, 1000)
    assert costs.at(batch=32).backbone_p50_ms == (costs_of(3).at(batch=32).backbone_p50_ms[1],
                                                  costs_of(3).at(batch=32).backbone_p50_ms[3])
    with pytest.raises(FileFormatError):
        Costs.from_json({"macs": [1]})


def wide() -> Costs:
    """A network at half its width, with an exit, and at full width, with two."""
    return Costs(macs=(30, 100, 120, 250, 400), head_macs=(3, 0, 12, 20, 0), param_bytes=(1, 10, 4, 8, 40),
                 head_param_bytes=(1, 0, 2, 2, 0), peak_bytes=(5, 6, 9, 9, 8), widths=(0.5, 0.5, 1, 1, 1))


def test_another_width_starts_again_and_pays_for_what_ran_before() -> None:
    costs = wide()
    # by hand: leave the narrow one at its exit, run it to its end, or give it up at the exit
    assert costs.path([0, 1, 3, 4]).tolist() == [33, 103, 100 + 3 + 250 + 20, 100 + 3 + 20 + 400]
    assert costs.path([0, 4]).tolist() == [33, 30 + 3 + 400]
    assert costs.path([2, 4]).tolist() == [132, 412]
    assert costs.price([1], setting="budgeted") == 100
    assert costs.price([0, 1, 3, 4], "param_bytes") == 10 + 40 + 1 + 2
    assert costs.price([0, 4], "param_bytes") == 1 + 1 + 40
    assert Costs.from_json(asdict(costs)) == costs
    assert costs.select([2, 4]).widths == ()
    assert costs.select([1, 4]).path([0, 1]).tolist() == [100, 500]


def test_widths_rise_and_macs_within_them() -> None:
    with pytest.raises(OfframpError, match="not one a column, the narrowest first"):
        replace(wide(), widths=(1, 1, 0.5, 0.5, 0.5))
    with pytest.raises(OfframpError, match="fall with depth"):
        replace(wide(), macs=(100, 30, 120, 250, 400))
    with pytest.raises(PlanError, match="several|columns of one width"):
        wide().one_width("here")
    assert wide().select([2, 3, 4]).one_width("here").macs == (120, 250, 400)

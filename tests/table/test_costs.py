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
        Costs(macs=(2, 1), head_macs=(1, 1), param_bytes=(1, 2), head_param_bytes=(1, 2), peak_bytes=(1, 2))


def test_select_keeps_the_times_of_the_chosen() -> None:
    costs = costs_of(3).select([1, 3])
    assert costs.macs == (500, 1000)
    assert costs.at(batch=32).backbone_p50_ms == (costs_of(3).at(batch=32).backbone_p50_ms[1],
                                                  costs_of(3).at(batch=32).backbone_p50_ms[3])
    with pytest.raises(FileFormatError):
        Costs.from_json({"macs": [1]})

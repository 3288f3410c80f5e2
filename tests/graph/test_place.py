"""Which sites get an exit, under which names, and what a list of sites says."""

import json

import pytest
import torch
from torch import Tensor, nn

from offramp.errors import CutError
from offramp.graph import place, sites, split


class Net(nn.Module):
    """Four blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_names() -> None:
    found = sites(Net(), torch.randn(2, 8))
    with pytest.raises(CutError, match=r"did you mean blocks\.\d"):
        place(found, ["block.1"])
    with pytest.raises(CutError, match=r"did you mean blocks\.\d"):
        split(found.traced, ["block.1"])
    with pytest.raises(CutError, match="in order of depth"):
        split(found.traced, ["blocks.2", "blocks.1"])
    with pytest.raises(CutError, match="as many as there are sites"):
        place(found, 99)
    with pytest.raises(CutError, match="a predicate that holds"):
        place(found, lambda site: False)
    with pytest.raises(CutError, match="names of sites"):
        place(found, [])


def test_placing() -> None:
    found = sites(Net(), torch.randn(2, 8))
    assert [site.name for site in place(found, 3)] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [site.name for site in place(found, ["blocks.2", "blocks.0"])] == ["blocks.0", "blocks.2"]
    assert [site.name for site in place(found, lambda site: site.name.endswith("1"))] == ["blocks.1"]


def test_equal_steps_of_macs() -> None:
    wide = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(11)), nn.Linear(4, 4)).eval()
    chosen = place(sites(wide, torch.randn(2, 4)), 3)
    assert [site.macs_before / (site.macs_before + site.macs_after) for site in chosen] == [0.25, 0.5, 0.75]


def test_other_names_of_a_place() -> None:
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4))),
                          nn.Linear(4, 4))
    found = sites(model, torch.randn(2, 4))
    assert found.aliases["0"] == "0.1" and [site.name for site in place(found, ["0"])] == ["0.1"]
    split(found.traced, ["0"])


def test_shapes_speak_of_the_users_batch() -> None:
    for rows in (1, 2, 7):
        assert sites(Net(), torch.randn(rows, 8))[0].live[0].shape == (rows, 8)


def test_sites_as_json() -> None:
    found = sites(Net(), torch.randn(2, 8))
    assert [site["name"] for site in json.loads(found.to_json())] == [site.name for site in found]

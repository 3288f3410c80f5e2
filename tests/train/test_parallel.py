"""Two processes give one process's result, batch norms included."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from offramp.nn.heads import HeadSpec
from offramp.train import fit, recipes
from train.fakes import CONV, labelled, make, run_script, weights

torch.set_num_threads(1)
BN = HeadSpec(convs=((8, 3, 2),))

SCRIPT = """
import os
import torch
from pathlib import Path
from safetensors.torch import save_file
from train.fakes import labelled, make, weights
from train.test_parallel import BN, RECIPES
from offramp.train import fit
torch.set_num_threads(1)
for name, recipe in RECIPES.items():
    net = make(BN)
    run_dir = Path({run!r}) / name
    history = fit(net, labelled(90), recipe, device="cpu", run_dir=run_dir, checkpoint_every=2, accumulate=2)
    save_file({{**weights(net), "loss": torch.tensor([e.loss["two"] for e in history.epochs])}},
              Path({run!r}) / f"{{name}}-{{os.environ['RANK']}}.safetensors")
"""

# 90 samples in batches of 16: the last batch has 10 rows, the last window one batch, and two processes share them all.
RECIPES = {
    "label_free": recipes.label_free(epochs=2, batch_size=16, lr=0.01),
    "joint": recipes.joint(epochs=2, batch_size=16, lr=0.01),
    "exit_aware": recipes.exit_aware(epochs=2, batch_size=16, lr=0.01),
    "mess": recipes.mess(epochs=2, batch_size=16, lr=0.01, weights=(0.0, 1.0)),
}


def test_two_gloo_processes_are_one(tmp_path: Path) -> None:
    status = run_script(SCRIPT.format(run=str(tmp_path)), tmp_path / "script.py", "-m", "torch.distributed.run",
                        "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0")
    assert status == 0
    for name, recipe in RECIPES.items():
        net = make(BN)
        history = fit(net, labelled(90), recipe, device="cpu", accumulate=2)
        for rank in (0, 1):
            got = load_file(tmp_path / f"{name}-{rank}.safetensors")
            assert torch.allclose(got.pop("loss"), torch.tensor([e.loss["two"] for e in history.epochs]), atol=1e-4)
            for key, tensor in weights(net).items():
                assert torch.allclose(got[key].float(), tensor.float(), atol=1e-4), f"{name}: {key}"


def test_batch_norm_is_left_in_place_by_one_process() -> None:
    net = make(CONV)
    kinds = [type(module) for module in net.modules()]
    fit(net, labelled(32), RECIPES["label_free"])
    assert kinds == [type(module) for module in net.modules()]
    assert not any("forward" in vars(module) for module in net.modules())


@pytest.mark.parametrize("rows", [1, 5])
def test_fewer_rows_than_a_batch(rows: int) -> None:
    history = fit(make(HeadSpec()), labelled(rows), RECIPES["label_free"])
    assert history.last.step == 2

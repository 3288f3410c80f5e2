"""Lines that are held: public names, a light import, what stays out of the package, and the command line's flags."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import offramp

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "Adaptive", "Comparison", "Costs", "Evidence", "ExitColumn", "ExitSite", "ExitTable", "HeadSpec", "Latency",
    "MessSpec", "MultiExit", "OfframpError", "Plan", "Policy", "Recipe", "RedesignedSpec", "ShortcutSpec", "Thresholds",
    "attach", "bench", "calibrate", "compare", "deploy", "fit", "guarantee", "load_data", "load_deployed", "load_model",
    "load_plan", "mask_", "mess_space", "place", "policies", "recipes", "record", "redesigned", "replay",
    "save_deployed", "save_plan", "schedule", "search", "search_front", "sites", "slim_", "slim_plan", "tune_", "walk",
}
EXTRAS = {"segmentation_models_pytorch", "transformers", "optuna", "matplotlib"}


def in_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names() -> None:
    assert set(offramp.__all__) == PUBLIC, "a public name is a promise: change this set only with the changelog"
    assert set(offramp.__all__) <= set(dir(offramp))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(offramp, name) is not None
    assert getattr(offramp, name) is getattr(offramp, name)


def test_record_is_the_function_whatever_is_imported_first() -> None:
    assert in_fresh_python("import offramp.record, offramp; print(callable(offramp.record))").strip() == "True"
    assert in_fresh_python("import offramp; offramp.record; import offramp.record as m; print(callable(offramp.record))"
                           ).strip() == "True"


def test_deploy_hangs_on_the_network() -> None:
    assert callable(offramp.MultiExit.deploy)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        offramp.atach  # noqa: B018


def test_import_is_light() -> None:
    code = (
        "import time, sys, json; start = time.perf_counter(); import offramp; took = time.perf_counter() - start\n"
        "print(json.dumps({'took': took, 'modules': sorted({name.split('.')[0] for name in sys.modules})}))"
    )
    found = json.loads(in_fresh_python(code))
    assert found["took"] <= 2.0
    assert not EXTRAS & set(found["modules"])


def test_the_whole_interface_needs_no_extra_and_no_cuda() -> None:
    code = (
        "import sys, json\n"
        f"for name in {sorted(EXTRAS)!r}: sys.modules[name] = None\n"  # importing any of them now fails
        "import offramp\n"
        "for name in offramp.__all__: getattr(offramp, name)\n"
        "import offramp.cli, offramp.report, torch\n"
        "print(json.dumps(torch.cuda.is_initialized()))"
    )
    assert json.loads(in_fresh_python(code)) is False


def test_packaging_says_what_the_house_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == offramp.__version__
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {one.partition(">")[0].lower().replace("_", "-") for one in wanted}
    assert names <= pinned, f"constraints.txt pins no {sorted(names - pinned)}"

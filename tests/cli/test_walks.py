"""Pictures from the command line: of what every exit says of one's own images, and in the report of an anytime plan."""

import json
from pathlib import Path

from PIL import Image

from cli.test_cli import call, one_thread, refused, weights  # noqa: F401
from cli.test_cli import run as classifier  # noqa: F401
from cli.test_settings import photos, run, set_plan  # noqa: F401


def test_every_exit_of_the_plan_speaks_whatever_its_setting(run: Path, photos: Path, tmp_path: Path) -> None:  # noqa: F811
    exits = set_plan(run, "input_dependent")
    said = call("run", photos, "--model", run, "--out", tmp_path / "o", "--walks", 2).stdout
    assert str(tmp_path / "o" / "walks.html") in said
    assert {one.name for one in (tmp_path / "o" / "walks").iterdir()} == {"a.png", "a.gif", "b.png", "b.gif"}
    page = (tmp_path / "o" / "walks.html").read_text()
    assert page.count("data:image/gif") == 2 and "a.png" in page and "deep" not in page
    assert all(page.count(f"<b>{name}</b>") == 2 for name in (*exits, "final"))
    with Image.open(tmp_path / "o" / "walks" / "b.gif") as moving:
        assert moving.n_frames > 3
    assert not (tmp_path / "o" / "walks" / "deep__a.png").exists()


def test_no_pictures_unless_asked_and_none_of_a_classifier(run: Path, classifier: Path, photos: Path,  # noqa: F811
                                                           tmp_path: Path) -> None:
    set_plan(run, "budgeted")
    done = json.loads(call("run", photos, "--model", run, "--out", tmp_path / "o", "--json").stdout)
    assert "walks" not in done and not (tmp_path / "o" / "walks").exists()
    assert "--walks" in refused("run", photos, "--model", classifier, "--out", tmp_path / "c", "--walks", 1)
    assert not (tmp_path / "c").exists()


def test_the_report_of_an_anytime_plan_shows_when_exits_speak(run: Path, tmp_path: Path) -> None:  # noqa: F811
    set_plan(run, "anytime")
    call("report", run, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Exit by exit, as it comes" in page and page.count("data:image/gif") == 2
    set_plan(run, "budgeted")
    call("report", run, "--out", tmp_path / "report.html")
    assert "data:image/gif" not in (tmp_path / "report.html").read_text()

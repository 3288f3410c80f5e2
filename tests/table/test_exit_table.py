import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from choose.synthetic import classify, costs_of, dense, pixels
from offramp.errors import DataError, FileFormatError, OfframpError
from offramp.functional.summaries import evidence_of, summarise
from offramp.table import ExitTable, write_atomic


def same(one: ExitTable, other: ExitTable) -> None:
    """Raises where two tables differ in anything."""
    for name in ("task", "columns", "costs", "split", "class_names", "meta", "fingerprints"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("labels", "logits", "confusion", "agreement_confusion", "probs", "agreement",
                 "boundary_pixels", "boundary_errors"):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None), name
        assert left is None or (torch.equal(left, right) and left.dtype == right.dtype), name
    assert set(one.histograms) == set(other.histograms)
    assert all(torch.equal(counts, other.histograms[name]) for name, counts in one.histograms.items())


def far(samples: int, **more: Any) -> ExitTable:
    """As recorded with labels: pixels and errors by their distance to the border."""
    pixels = torch.randint(5, 9, (samples, 31), dtype=torch.int32)
    return dense(samples, 2, boundary_pixels=pixels, boundary_errors=pixels[:, None] - torch.arange(3)[:, None], **more)


TABLES = {
    "classify": lambda **more: classify(12, 2, 3, meta={"note": "ü"}, class_names=("a", "b", "c"), **more),
    "classify without labels": lambda **more: classify(12, 2, 3, labels=False, **more),
    "dense": lambda **more: dense(5, 2, **more),
    "dense with distances": lambda **more: far(5, **more),
    "dense without labels": lambda **more: dense(5, 2, labels=False, **more),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("where", ["folder", "calibration.json"])
def test_saved_is_loaded(kind: str, where: str, tmp_path: Path) -> None:
    table = TABLES[kind]()
    page = table.save(tmp_path / where)
    same(ExitTable.load(tmp_path / where), table)
    same(ExitTable.load(page), table)
    assert json.loads(page.read_text())["version"] == 4
    assert not [path for path in page.parent.iterdir() if path.name.startswith(".")]


def test_saving_again_leaves_no_stale_tensors(tmp_path: Path) -> None:
    classify(12, 2, 3).save(tmp_path)
    other = classify(13, 2, 3)
    other.save(tmp_path)
    same(ExitTable.load(tmp_path), other)
    assert len(list(tmp_path.iterdir())) == 2


def damage_tensors(page: Path, payload: Path) -> None:
    data = bytearray(payload.read_bytes())
    data[-3] ^= 1
    payload.write_bytes(bytes(data))


def edit(**changes: Any) -> Any:
    def change(page: Path, payload: Path) -> None:
        page.write_text(json.dumps({**json.loads(page.read_text()), **changes}))
    return change


@pytest.mark.parametrize(("damage", "told"), [
    (damage_tensors, "another hash"),
    (lambda page, payload: payload.write_bytes(payload.read_bytes()[:-20]), "another hash"),
    (lambda page, payload: payload.unlink(), "No such file"),
    (lambda page, payload: page.write_text(page.read_text()[:100]), "undamaged"),
    (lambda page, payload: page.write_bytes(b"\x80\x04\x95"), "undamaged"),
    (lambda page, payload: page.unlink(), "nothing at"),
    (edit(version=5), "later one"), (edit(version="x"), "undamaged"), (edit(format="other"), "format"),
    (edit(samples=99), "99 promised"), (edit(columns=[]), "columns"), (edit(task="pose"), "task"),
    (edit(tensors={"file": "../x", "sha256": ""}), "does not name"), (edit(costs={}), "macs"),
    (edit(fingerprints={}), "fingerprint"), (edit(fingerprints=None), "whole table"),
])
def test_a_damaged_file_is_refused(damage: Any, told: str, tmp_path: Path) -> None:
    page = classify(12, 2, 3).save(tmp_path)
    payload = next(tmp_path.glob("*.safetensors"))
    damage(page, payload)
    with pytest.raises(FileFormatError, match=told):
        ExitTable.load(tmp_path)


def test_a_full_disk_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = classify(12, 2, 3)
    table.save(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OfframpError, match="full disk.*nothing was half-written"):
        classify(40, 2, 3).save(tmp_path)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    same(ExitTable.load(tmp_path), table)


def test_a_page_that_cannot_be_renamed_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = classify(12, 2, 3)
    table.save(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    real = os.replace

    def refuse(source: str, target: Path) -> None:
        if str(target).endswith(".json"):
            raise OSError(errno.EACCES, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OfframpError, match="Permission denied"):
        classify(40, 2, 3).save(tmp_path)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    same(ExitTable.load(tmp_path), table)


def test_meta_must_be_json(tmp_path: Path) -> None:
    with pytest.raises((TypeError, OfframpError)):
        classify(12, 2, 3, meta={"x": object()}).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OfframpError, match="to write"):
        write_atomic(tmp_path / "taken" / "x.json", "{}")


def test_all_faults_are_told_at_once() -> None:
    table = classify(12, 2, 3)
    with pytest.raises(OfframpError) as caught:
        replace(table, labels=torch.zeros(5), costs=costs_of(4), class_names=("a",), fingerprints={"model": "m"})
    for part in ("labels of shape (5,)", "costs of 5 columns", "1 class names for 3", "no fingerprint of the data",
                 "no fingerprint of the split"):
        assert part in str(caught.value)
    with pytest.raises(OfframpError, match="not 'final'"):
        replace(table, columns=table.columns[::-1])
    with pytest.raises(OfframpError, match="no logits"):
        replace(table, logits=None)
    with pytest.raises(OfframpError, match="logits in a table of task 'dense'"):
        replace(dense(3, 2), logits=table.logits)
    with pytest.raises(OfframpError, match="histograms of"):
        replace(dense(3, 2), histograms={})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_refused_by_sample_and_exit(value: float) -> None:
    logits = classify(12, 2, 3).logits
    assert logits is not None
    logits[7, 1, 2] = value
    with pytest.raises(DataError, match="sample 7 at exit 'block1'"):
        classify(12, 2, 3, logits=logits)
    logits[7, 1, 2] = -torch.inf  # a masked class
    classify(12, 2, 3, logits=logits)


def test_parts_are_disjoint_and_marked() -> None:
    table = classify(101, 2, 3)
    marked = replace(table, labels=torch.arange(101))
    parts = marked.split_rows({"fit": 0.5, "hold": 0.3}, seed=3)
    fit, hold = parts["fit"].labels, parts["hold"].labels
    assert fit is not None and hold is not None
    assert len(fit) == round(50.5) and len(set(fit.tolist()) | set(hold.tolist())) == len(fit) + len(hold) == 81
    assert parts["fit"].split == "calibration/fit"
    marks = {parts[name].fingerprints["split"] for name in parts} | {table.fingerprints["split"]}
    assert len(marks) == 3
    assert torch.equal(fit, marked.split_rows({"fit": 0.5, "hold": 0.3}, seed=3)["fit"].labels)
    assert not torch.equal(fit, marked.split_rows({"fit": 0.5}, seed=4)["fit"].labels)
    with pytest.raises(OfframpError, match="at most 1"):
        table.split_rows({"fit": 0.8, "hold": 0.3})


def test_any_histograms_and_no_agreement_are_kept_through_files(tmp_path: Path) -> None:
    table = dense(5, 2)
    columns = tuple(replace(column, stride=4 * (e + 1)) for e, column in enumerate(table.columns))
    part = replace(table, columns=columns, agreement=None, histograms={"top_edges": table.histograms["top"]})
    part.save(tmp_path)
    same(ExitTable.load(tmp_path), part)
    same(ExitTable.concat([part.slice(slice(0, 2)), part.slice(slice(2, None))]), part)
    assert part.select(["block1"]).agreement is None and part.evidence([0]).agreement is None
    assert [column.stride for column in ExitTable.load(tmp_path).columns] == [4, 8, 12]
    with pytest.raises(OfframpError, match="histograms of"):
        replace(table, histograms={"sure": table.histograms["top"]})


def test_a_table_without_strides_is_still_read(tmp_path: Path) -> None:
    page = dense(5, 2).save(tmp_path)
    record = json.loads(page.read_text())
    for column in record["columns"]:
        del column["stride"]
    page.write_text(json.dumps({**record, "version": 1}))
    assert [column.stride for column in ExitTable.load(tmp_path).columns] == [1, 1, 1]


def test_distances_to_the_border_are_cut_with_their_rows_and_columns(tmp_path: Path) -> None:
    table = far(6)
    assert table.boundary_errors is not None and table.boundary_pixels is not None
    same(ExitTable.concat([table.slice(slice(0, 2)), table.slice(slice(2, None))]), table)
    some = table.select(["block1"]).slice([4, 1])
    assert some.boundary_errors is not None and some.boundary_pixels is not None
    assert torch.equal(some.boundary_errors, table.boundary_errors[[4, 1]][:, [1, 2]])
    assert torch.equal(some.boundary_pixels, table.boundary_pixels[[4, 1]])
    rows = [part.boundary_errors for part in table.split_rows({"fit": 0.5, "hold": 0.5}).values()]
    assert sum(one.sum() for one in rows if one is not None) == table.boundary_errors.sum()
    page = dense(6, 2).save(tmp_path)  # as they were written before there were any
    page.write_text(page.read_text().replace('"version": 4', '"version": 3'))
    assert ExitTable.load(tmp_path).boundary_errors is None
    for broken, told in (({"boundary_pixels": None}, "without the other"),
                         ({"boundary_pixels": table.boundary_pixels[:, :9]}, "boundary_errors of shape"),
                         ({"boundary_errors": table.boundary_errors[:, :2]}, "boundary_errors of shape")):
        with pytest.raises(OfframpError, match=told):
            replace(table, **broken)
    with pytest.raises(OfframpError, match="in one alone"):
        ExitTable.concat([table, dense(6, 2, seed=1)])


def test_select_keeps_the_backbone_and_the_order() -> None:
    table = classify(12, 3, 3).select(["block2", "block0"])
    assert table.names == ("block0", "block2", "final")
    assert table.costs.macs == (250, 750, 1000)
    whole = classify(12, 3, 3)
    assert whole.logits is not None and table.logits is not None
    assert torch.equal(table.logits, whole.logits[:, [0, 2, 3]])
    wide = dense(4, 3)
    part = wide.select(["block1"])
    assert wide.agreement is not None and part.agreement is not None
    assert torch.equal(part.agreement, wide.agreement[:, [1, 3]][:, :, [1, 3]])
    with pytest.raises(OfframpError, match="block0, block2, final"):
        table.select(["block9"])


def test_concat_joins_what_was_cut_and_refuses_other_networks() -> None:
    for table in (classify(20, 2, 3), dense(6, 2)):
        joined = ExitTable.concat([table.slice(slice(0, 3)), table.slice(slice(3, None))])
        same(joined, table)
    table = classify(20, 2, 3)
    for changes in ({"fingerprints": {**table.fingerprints, "model": "m9"}}, {"costs": costs_of(2, head=9)},
                    {"labels": None}):
        with pytest.raises(OfframpError, match="one network"):
            ExitTable.concat([table, replace(table, **changes)])  # type: ignore[arg-type]
    other = ExitTable.concat([table, classify(20, 2, 3, seed=1)])
    assert other.fingerprints["split"] == "s0+s1"


def test_evidence_on_the_table_is_the_evidence_live() -> None:
    table, (logits, _) = dense(8, 2), pixels(8, 2)
    rows = torch.tensor([6, 1, 3])
    live = evidence_of([summarise(logits[rows, 0]), summarise(logits[rows, 2])])
    stored = table.evidence([0, 2], rows)
    assert torch.equal(live.agreement, stored.agreement)  # type: ignore[arg-type]
    for name in ("top", "margin", "entropy"):
        assert torch.equal(live.histograms[name], stored.histograms[name])
    torch.testing.assert_close(live.probs, stored.probs)
    whole = classify(12, 2, 3)
    assert torch.equal(whole.evidence([0, 1], rows).logits, whole.logits[rows][:, :2])  # type: ignore[index,arg-type]

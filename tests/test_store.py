import json
import math
import os
import stat
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gstlib import store as store_module
from gstlib.spec import DataSpec, InputError, ModelSpec, OptimiserSpec, PruningSpec, RunSpec
from gstlib.store import DamagedRun, Store

PROVENANCE = {"profile": "smoke", "commit": "abc", "device": "a CPU", "versions": {"torch": "2"}}


def spec(seed: int = 0) -> RunSpec:
    pruning = PruningSpec(("conv8",), (0,), (1,), (0.5,), 1)
    return RunSpec(DataSpec("digits", "f" * 64), ModelSpec("vgg11", 1 / 16), OptimiserSpec(epochs=2), pruning, seed)


def tables() -> dict[str, list[dict]]:
    epochs = [{"epoch": n, "lr": 0.001, "train_loss": 2 / 3 - n / 7, "train_accuracy": 0.5, "parameters": 37_146 - n,
               "seconds": 0.25} for n in range(3)]
    epochs[2] |= {"test_loss": 1e-3, "test_accuracy": 0.1 + 0.2, "test_accuracy_clean": 0.1 + 0.2}
    events = [{"epoch": 0, "layer": name, "units": 32, "removed": 3, "removed_total": 3, "mean_score": score,
               "t_pre": 0.5, "t_post": 0.4} for name, score in (("conv7", math.nan), ("conv8", 1e-300))]
    bins = [{"epoch": -1, "layer": "bn1", "layer_index": 0, "ks": 0.01, "left": k / 2, "right": k + 1.5, "count": 5}
            for k in range(4)]
    return {"epoch": epochs, "event": events, "histogram": bins}


@pytest.fixture
def filled(tmp_path) -> Store:
    store = Store(tmp_path / "results")
    store.write(spec(), PROVENANCE, tables())
    return store


def leftovers(store: Store) -> list[str]:
    return [p.name for p in store.path.rglob("*") if p.is_file() and p.suffix != ".parquet"]


def test_what_is_read_is_what_was_written(filled):
    run = filled.read(spec().id)
    assert run.spec == spec() and run.provenance == PROVENANCE
    for name, rows in tables().items():
        pd.testing.assert_frame_equal(run.tables[name], pd.DataFrame(rows), check_like=True, check_exact=True)


def test_numbers_come_back_to_the_last_bit(filled):
    epochs = filled.read(spec().id).tables["epoch"]
    assert epochs["train_loss"].tolist() == [2 / 3, 2 / 3 - 1 / 7, 2 / 3 - 2 / 7]
    assert np.isnan(epochs["test_accuracy"][:2]).all() and epochs["test_accuracy"][2] == 0.1 + 0.2
    events = filled.read(spec().id).tables["event"]
    assert events["removed"].dtype == "int64"
    assert events["mean_score"][1] == 1e-300 and math.isnan(events["mean_score"][0])


def test_a_column_without_any_value_is_kept(tmp_path):
    store, rows = Store(tmp_path), tables()
    for row in rows["event"]:
        row["mean_score"] = math.nan
    store.write(spec(), PROVENANCE, rows)
    assert "mean_score" in store.read(spec().id).tables["event"]


def test_tables_without_rows_are_empty(tmp_path):
    store = Store(tmp_path)
    store.write(spec(), PROVENANCE, {"epoch": tables()["epoch"], "event": [], "histogram": []})
    run = store.read(spec().id)
    assert len(run.tables["epoch"]) == 3 and run.tables["event"].empty and run.tables["histogram"].empty


def test_ids_and_membership(filled):
    assert spec().id in filled and spec(1).id not in filled
    filled.write(spec(1), PROVENANCE, tables())
    assert filled.ids() == sorted([spec().id, spec(1).id])
    with pytest.raises(KeyError):
        filled.read(spec(2).id)


def test_an_empty_store_has_nothing_and_makes_nothing(tmp_path):
    store = Store(tmp_path / "nowhere")
    assert store.ids() == [] and spec().id not in store
    assert list(store.about()) == [] and not store.path.exists()


def test_about_tells_specifications_without_rows(filled, monkeypatch):
    filled.write(spec(1), PROVENANCE, tables())
    (filled.runs / f"{spec(2).id}.parquet").write_bytes(b"nonsense")
    monkeypatch.setattr(pq, "read_table", lambda *_: pytest.fail("rows were read"))
    assert {run_id: (s, p) for run_id, s, p in filled.about()} == {s.id: (s, PROVENANCE) for s in (spec(), spec(1))}


def test_a_run_written_again_replaces_the_old_one(filled):
    changed = tables()
    changed["epoch"][0]["train_loss"] = 9.0
    filled.write(spec(), {**PROVENANCE, "commit": "later"}, changed)
    run = filled.read(spec().id)
    assert run.tables["epoch"]["train_loss"][0] == 9.0 and run.provenance["commit"] == "later"
    assert len(filled.ids()) == 1 and not leftovers(filled)


def test_stored_files_can_be_read_by_others(filled):
    assert stat.S_IMODE(filled.file(spec().id).stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("again", [False, True])
def test_an_interrupted_write_leaves_the_store_as_it_was(filled, monkeypatch, error, again):
    before = filled.file(spec().id).read_bytes()

    def half(table, file, **_):
        file.write(before[:len(before) // 2])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(store_module.pq, "write_table", half)
        expected = InputError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected) as caught:
            filled.write(spec(0 if again else 1), PROVENANCE, tables())
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
    assert filled.ids() == [spec().id] and not leftovers(filled)
    assert filled.file(spec().id).read_bytes() == before and filled.read(spec().id).spec == spec()
    filled.write(spec(1), PROVENANCE, tables())
    assert spec(1).id in filled


def test_a_rename_that_fails_leaves_the_store_as_it_was(filled, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        with pytest.raises(InputError, match="Permission denied"):
            filled.write(spec(1), PROVENANCE, tables())
    assert filled.ids() == [spec().id] and not leftovers(filled)


def test_a_temporary_file_left_by_a_crash_is_no_run(filled):
    (filled.runs / f".{spec(1).id}-xyz.tmp").write_bytes(b"half")
    assert filled.ids() == [spec().id] and spec(1).id not in filled


def test_truncation_is_detected(filled):
    place = filled.file(spec().id)
    content = place.read_bytes()
    for length in [*range(0, len(content), len(content) // 40), len(content) - 1]:
        place.write_bytes(content[:length])
        with pytest.raises(DamagedRun, match=spec().id):
            filled.read(spec().id)


@pytest.mark.parametrize("flip", [0xFF, 0x01])
def test_a_flipped_byte_is_detected_or_harmless(filled, flip):
    place = filled.file(spec().id)
    content, original = place.read_bytes(), filled.read(spec().id)
    damaged = 0
    for index in range(flip % 7, len(content), 53):
        place.write_bytes(content[:index] + bytes([content[index] ^ flip]) + content[index + 1:])
        try:
            run = filled.read(spec().id)
        except InputError as error:
            damaged += 1
            assert isinstance(error, DamagedRun) and spec().id in str(error), f"byte {index}: {error}"
            continue
        except Exception as error:
            pytest.fail(f"byte {index}: {error!r}")
        # some bytes hold statistics and padding that no value depends on
        assert run.spec == original.spec and run.provenance == original.provenance
        assert all(run.tables[name].equals(original.tables[name]) for name in run.tables)
    assert damaged > 40


@pytest.mark.parametrize("column", ["train_loss", "test_accuracy", "t_post", "layer", "table", "count"])
def test_a_changed_value_is_detected(filled, column):
    place = filled.file(spec().id)
    table = pq.read_table(place)
    values = table.column(column).to_pylist()
    index = next(i for i, value in enumerate(values) if value is not None)
    values[index] = "epoch2" if isinstance(values[index], str) else values[index] + 1
    position = table.column_names.index(column)
    changed = table.set_column(position, table.schema.field(column), pa.array(values, table.schema.field(column).type))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), place)
    with pytest.raises(DamagedRun, match="not as it was written"):
        filled.read(spec().id)


@pytest.mark.parametrize("change", ["row dropped", "row doubled", "column dropped", "column renamed"])
def test_changed_rows_and_columns_are_detected(filled, change):
    place = filled.file(spec().id)
    table = pq.read_table(place)
    meta = table.schema.metadata
    names = ["train_lost" if name == "train_loss" else name for name in table.column_names]
    changed = {
        "row dropped": lambda: table.slice(1), "row doubled": lambda: pa.concat_tables([table, table.slice(0, 1)]),
        "column dropped": lambda: table.drop_columns(["t_post"]), "column renamed": lambda: table.rename_columns(names),
    }[change]()
    pq.write_table(changed.replace_schema_metadata(meta), place)
    with pytest.raises(DamagedRun):
        filled.read(spec().id)


def rewrite(store: Store, **meta: str | None) -> None:
    place = store.file(spec().id)
    table = pq.read_table(place)
    known = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    known |= {f"gstlib.{key}": value for key, value in meta.items()}
    pq.write_table(table.replace_schema_metadata({k: v for k, v in known.items() if v is not None}), place)


@pytest.mark.parametrize("meta", [
    {"digest": "0" * 64}, {"digest": None}, {"schema": None}, {"schema": "one"}, {"spec": None}, {"provenance": None},
    {"provenance": json.dumps({**PROVENANCE, "profile": "paper"})}, {"spec": spec(1).to_json()},
])
def test_changed_heads_are_detected(filled, meta):
    rewrite(filled, **meta)
    with pytest.raises(DamagedRun, match=spec().id):
        filled.read(spec().id)


@pytest.mark.parametrize("text", ["{}", "not JSON", spec().to_json().replace("vgg11", "vgg12")])
def test_a_head_without_a_specification_is_named(filled, text):
    rewrite(filled, spec=text)
    with pytest.raises(DamagedRun, match=spec().id):
        filled.read(spec().id)


def test_a_newer_schema_is_refused(filled):
    rewrite(filled, schema="2")
    with pytest.raises(InputError, match="newer.*update gstlib") as caught:
        filled.read(spec().id)
    assert not isinstance(caught.value, DamagedRun)


@pytest.mark.parametrize("content", ["parquet", "text", "empty", "folder"])
def test_foreign_files_are_no_runs(filled, content):
    place = filled.file(spec(1).id)
    if content == "parquet":
        pq.write_table(pa.table({"a": [1, 2]}), place)
    elif content == "folder":
        place.mkdir()
    else:
        place.write_bytes(b"text" if content == "text" else b"")
    with pytest.raises(DamagedRun, match="no stored run"):
        filled.read(spec(1).id)


def test_a_run_under_another_s_id_is_refused(filled):
    filled.file(spec(1).id).write_bytes(filled.file(spec().id).read_bytes())
    with pytest.raises(DamagedRun, match=spec(1).id):
        filled.read(spec(1).id)


@pytest.mark.parametrize("run_id", [
    "", "abc", "0" * 15, "0" * 17, "g" * 16, "A" * 16, "../../etc/passwd", "0123456789abcde/", "..............//",
    "0123456789abcdé0",
])
def test_what_is_no_id_is_refused(filled, run_id):
    for use in (filled.file, filled.read, filled.__contains__):
        with pytest.raises(InputError, match="no run id"):
            use(run_id)


def test_an_unknown_table_is_refused(tmp_path):
    with pytest.raises(InputError, match="unknown table 'epochs'"):
        Store(tmp_path).write(spec(), PROVENANCE, {"epochs": tables()["epoch"]})
    assert not list(tmp_path.iterdir())


def test_a_results_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        Store(tmp_path / "file")


@pytest.mark.parametrize("below", ["file/results", "folder"])
def test_a_folder_that_cannot_be_written_is_told(tmp_path, below):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "runs").write_text("")
    store = Store(tmp_path / below)
    with pytest.raises(InputError, match="cannot be written"):
        store.check_writable()
    with pytest.raises(InputError, match="cannot be written"):
        store.write(spec(), PROVENANCE, tables())
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder", "runs"]


def test_check_writable_leaves_no_file(tmp_path):
    store = Store(tmp_path / "a" / "b")
    store.check_writable()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_an_archive_takes_runs_elsewhere(filled, tmp_path):
    filled.write(spec(1), PROVENANCE, tables())
    assert filled.export(tmp_path / "runs.zip") == 2
    other = Store(tmp_path / "other")
    other.write(spec(2), PROVENANCE, tables())
    added, known, refused = other.import_(tmp_path / "runs.zip")
    assert sorted(added) == filled.ids() and known == [] and refused == {}
    for s in (spec(), spec(1)):
        assert other.file(s.id).read_bytes() == filled.file(s.id).read_bytes() and other.read(s.id).spec == s
    assert other.import_(tmp_path / "runs.zip") == ([], filled.ids(), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "results", "runs.zip"] and not leftovers(other)


def test_chosen_runs_alone_are_exported(filled, tmp_path):
    filled.write(spec(1), PROVENANCE, tables())
    assert filled.export(tmp_path / "runs.zip", [spec(1).id]) == 1
    other = Store(tmp_path / "other")
    assert other.import_(tmp_path / "runs.zip")[0] == other.ids() == [spec(1).id]


def test_a_damaged_run_is_not_exported(filled, tmp_path):
    filled.file(spec().id).write_bytes(b"nonsense")
    with pytest.raises(DamagedRun):
        filled.export(tmp_path / "runs.zip")
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


def test_other_rows_of_a_stored_run_are_refused(filled, tmp_path):
    other, changed, slower = Store(tmp_path / "other"), tables(), tables()
    changed["epoch"][0]["train_loss"] = 9.0
    for row in slower["epoch"]:
        row["seconds"] = 99.0
    other.write(spec(), PROVENANCE, changed)
    other.export(tmp_path / "changed.zip")
    added, known, refused = filled.import_(tmp_path / "changed.zip")
    assert (added, known) == ([], []) and "other rows" in refused[spec().id]
    assert filled.read(spec().id).tables["epoch"]["train_loss"][0] == 2 / 3
    other.write(spec(), PROVENANCE, slower)
    other.export(tmp_path / "slower.zip")
    assert filled.import_(tmp_path / "slower.zip") == ([], [spec().id], {})


def test_an_archive_s_foreign_members_are_refused_one_by_one(filled, tmp_path):
    good = filled.file(spec().id).read_bytes()
    names = {
        "runs/../../escaped.parquet": good, "/absolute.parquet": good, f"{spec().id}.parquet": good,
        "notes.txt": b"hello", f"runs/{spec(1).id}.parquet": good, f"runs/{spec(2).id}.parquet": good[:500],
        f"runs/{spec().id}.parquet": good,
    }
    with zipfile.ZipFile(tmp_path / "runs.zip", "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    other = Store(tmp_path / "other")
    added, known, refused = other.import_(tmp_path / "runs.zip")
    assert added == other.ids() == [spec().id] and known == []
    assert set(refused) == set(names) - {f"runs/{spec().id}.parquet"}
    assert not list(tmp_path.rglob("escaped*")) and not list(tmp_path.rglob("absolute*")) and not leftovers(other)


def test_a_member_cut_or_changed_inside_the_archive_is_refused(filled, tmp_path):
    filled.export(tmp_path / "runs.zip")
    content = bytearray((tmp_path / "runs.zip").read_bytes())
    content[1000] ^= 0xFF
    (tmp_path / "runs.zip").write_bytes(content)
    other = Store(tmp_path / "other")
    added, known, refused = other.import_(tmp_path / "runs.zip")
    assert (added, known, list(refused)) == ([], [], [f"runs/{spec().id}.parquet"]) and other.ids() == []


@pytest.mark.parametrize("content", [None, b"", b"no archive at all"])
def test_what_is_no_archive_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "runs.zip").write_bytes(content)
    with pytest.raises(InputError, match="runs.zip is no archive"):
        Store(tmp_path / "other").import_(tmp_path / "runs.zip")
    assert not (tmp_path / "other").exists()


def test_an_archive_that_cannot_be_written_is_told(filled, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not be exported"):
        filled.export(tmp_path / "file" / "runs.zip")

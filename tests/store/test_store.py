import json
import math
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import zipfile

import made_up
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gstlib import experiments, files
from gstlib import store as store_module
from gstlib.errors import InputError
from gstlib.reading import analysis
from gstlib.spec import DataSpec, ModelSpec, OptimiserSpec, PruningSpec, RunSpec
from gstlib.store import DamagedRun, NewerSchema, Store

PROVENANCE = {"profile": "smoke", "commit": "abc", "device": "a CPU", "versions": {"torch": "2"},
              "data_title": "digits", "finished": "2026-01-02T03:04:05+00:00"}


def spec(seed: int = 0) -> RunSpec:
    pruning = PruningSpec(("conv8",), (0,), (1,), (0.5,), 1)
    return RunSpec(DataSpec("digits", "f" * 64), ModelSpec("vgg11", 1 / 16), OptimiserSpec(epochs=3), pruning, seed)


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
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("rows were read"))
    assert {run_id: (s, p) for run_id, s, p in filled.about()} == {s.id: (s, PROVENANCE) for s in (spec(), spec(1))}


@pytest.mark.parametrize(("column", "told"), [("train_loss", True), ("seconds", False)])
def test_a_run_written_again_stays_as_it_was_first(filled, capsys, column, told):
    before, changed = filled.file(spec().id).read_bytes(), tables()
    changed["epoch"][0][column] = 9.0
    place = filled.write(spec(), {**PROVENANCE, "commit": "later", "device": "a GPU"}, changed)
    assert place == filled.file(spec().id) and place.read_bytes() == before and not leftovers(filled)
    said = capsys.readouterr().err
    assert said.count("\n") == told
    if told:
        assert all(text in said for text in (spec().id, "other rows", "on a CPU", "on a GPU", "is kept"))


@pytest.mark.parametrize("change", ["row", "column", "provenance", "layer", "text", "gap"])
def test_rows_that_are_no_run_s_are_not_stored(tmp_path, change):
    store, rows, about = Store(tmp_path), tables(), dict(PROVENANCE)
    if change == "row":
        rows["epoch"].pop()
    elif change == "column":
        rows["event"] = [{k: v for k, v in row.items() if k != "t_pre"} for row in rows["event"]]
    elif change == "provenance":
        del about["device"]
    elif change == "layer":
        rows["event"][0]["layer"] = "<script>"
    elif change == "text":
        rows["epoch"][0]["lr"] = "fast"
    else:
        rows["event"][0]["units"] = math.nan
    with pytest.raises(InputError, match="cannot be stored") as caught:
        store.write(spec(), about, rows)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_nan_of_another_kind_is_a_nan(tmp_path):
    store, rows = Store(tmp_path), tables()
    rows["event"][0]["mean_score"] = float(-np.float64("nan"))
    store.write(spec(), PROVENANCE, rows)
    assert math.isnan(store.read(spec().id).tables["event"]["mean_score"][0])


def test_stored_files_can_be_read_by_others(filled):
    assert stat.S_IMODE(filled.file(spec().id).stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("again", [False, True])
def test_an_interrupted_write_leaves_the_store_as_it_was(filled, monkeypatch, error, again):
    before = filled.file(spec().id).read_bytes()

    def fails(handle):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        expected = InputError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected) as caught:
            filled.write(spec(0 if again else 1), PROVENANCE, tables())
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
    assert filled.ids() == [spec().id] and not leftovers(filled)
    assert filled.file(spec().id).read_bytes() == before and filled.read(spec().id).spec == spec()
    filled.write(spec(1), PROVENANCE, tables())
    assert spec(1).id in filled


def refuse(*_):
    raise PermissionError(13, "Permission denied")


def test_a_rename_that_fails_leaves_the_store_as_it_was(filled, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        patch.setattr(os, "replace", refuse)
        with pytest.raises(InputError, match="Permission denied"):
            filled.write(spec(1), PROVENANCE, tables())
    assert filled.ids() == [spec().id] and not leftovers(filled)


def test_what_killed_writers_left_disturbs_nobody_and_goes_after_a_day(filled):
    old, new = (filled.runs / f".{spec(1).id}.parquet-{name}.tmp" for name in ("old", "new"))
    for left in (old, new):
        left.write_bytes(b"half")
    os.utime(old, (old.stat().st_mtime - 100_000,) * 2)
    assert filled.ids() == [spec().id] and spec(1).id not in filled
    assert {(o.name, o.kind) for o in filled.others()} == {(f"runs/{p.name}", "temporary") for p in (old, new)}
    Store(filled.path).write(spec(1), PROVENANCE, tables())
    assert not old.exists() and new.exists() and len(filled.ids()) == 2


def test_names_that_are_no_ids_are_no_runs(filled):
    names = ["notes.parquet", f"{spec(1).id}.parquet.bak", f"{spec(1).id.upper()}.parquet", f"{spec(1).id}0.parquet",
             "\x1b[2J.parquet", f"{spec(1).id}.PARQUET"]
    for name in names:
        (filled.runs / name).write_bytes(b"")
    assert filled.ids() == [spec().id] and [run_id for run_id, *_ in filled.about()] == [spec().id]
    assert {o.name for o in filled.others()} == {f"runs/{name}".replace("\x1b", " ") for name in names}
    assert {o.kind for o in filled.others()} == {"foreign"}


def test_a_file_system_without_hard_links_serves_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse)
    store = Store(tmp_path)
    store.write(spec(), PROVENANCE, tables())
    before = store.file(spec().id).read_bytes()
    store.write(spec(), PROVENANCE | {"commit": "later"}, tables())
    assert store.file(spec().id).read_bytes() == before and not leftovers(store)


def in_processes(number: int, act) -> list[int]:
    """Exit codes of `number` processes that do `act(which)` at once."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(number)

    def begin(which):
        start.wait()
        act(which)

    crew = [context.Process(target=begin, args=(which,)) for which in range(number)]
    for process in crew:
        process.start()
    for process in crew:
        process.join(120)
    return [process.exitcode for process in crew]


def test_many_writers_of_the_same_and_of_other_runs(tmp_path):
    def write(which: int) -> None:
        store = Store(tmp_path / "results")
        for seed in (0, 10 + which, 1, 20 + which, 2):
            rows = tables()
            rows["epoch"][0]["train_loss"] = float(which)
            store.write(spec(seed), PROVENANCE, rows)
            assert store.read(spec(seed).id).spec == spec(seed)

    assert in_processes(6, write) == [0] * 6
    store = Store(tmp_path / "results")
    assert set(store.ids()) == {spec(seed).id for seed in (0, 1, 2, *range(10, 16), *range(20, 26))}
    assert all(store.whole(run_id) for run_id in store.ids()) and store.others() == []


def test_many_readers_of_a_damaged_run_set_it_aside_once(filled):
    filled.file(spec().id).write_bytes(b"nonsense")
    assert in_processes(6, lambda _: filled.get(spec().id)) == [0] * 6
    assert len(list((filled.path / "damaged").iterdir())) == 1 and filled.ids() == []


def test_a_writer_killed_at_any_moment_leaves_a_whole_run_or_none(tmp_path):
    context = multiprocessing.get_context("fork")

    def forever() -> None:
        store = Store(tmp_path / "results")
        for seed in range(1_000_000):
            store.write(spec(seed), PROVENANCE, tables())

    for _ in range(4):
        process = context.Process(target=forever)
        process.start()
        process.join(0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    store = Store(tmp_path / "results")
    assert all(store.whole(run_id) for run_id in store.ids())
    assert {other.kind for other in store.others()} <= {"temporary"}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is for root")
    yield place
    subprocess.run(["umount", place], check=True)


def fill_up(place) -> None:
    with open(place / "filler", "wb", buffering=0) as filler:
        with pytest.raises(OSError, match="No space left"):
            while True:
                filler.write(bytes(4096))


def test_a_full_disk_is_told_in_one_sentence_and_loses_nothing(small_disk, tmp_path):
    store, other = Store(small_disk / "results"), Store(tmp_path / "other")
    store.write(spec(), PROVENANCE, tables())
    before = store.file(spec().id).read_bytes()
    for seed in range(2):
        other.write(spec(seed), PROVENANCE, tables())
    other.export(tmp_path / "runs.zip")
    fill_up(small_disk)
    for act in (store.check_writable, lambda: store.write(spec(1), PROVENANCE, tables()),
                lambda: store.import_(tmp_path / "runs.zip"), lambda: store.export(small_disk / "runs.zip")):
        with pytest.raises(InputError, match="No space left on device") as caught:
            act()
        assert "\n" not in str(caught.value)
    assert store.file(spec().id).read_bytes() == before and store.ids() == [spec().id] and not leftovers(store)
    assert {p.name for p in small_disk.iterdir()} == {"results", "filler"}
    (small_disk / "filler").unlink()
    store.write(spec(1), PROVENANCE, tables())
    assert store.whole(spec(1).id)


def test_a_folder_that_is_read_only_is_read_and_never_changed(small_disk, capsys):
    store = Store(small_disk / "results")
    for seed in range(2):
        store.write(spec(seed), PROVENANCE, tables())
    store.file(spec(1).id).write_bytes(b"nonsense")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert store.whole(spec().id) and not store.whole(spec(1).id) and not store.whole(spec(1).id)
    assert [run_id for run_id, *_ in store.about()] == [spec().id]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Read-only file system" in said and "counts as missing" in said
    for act in (store.check_writable, lambda: store.write(spec(2), PROVENANCE, tables())):
        with pytest.raises(InputError, match="cannot be written.*Read-only file system"):
            act()


@pytest.mark.parametrize("limit", [0, 1000])
def test_a_limit_on_file_size_is_told_and_loses_nothing(filled, limit):
    def write(_: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        for act in (filled.check_writable, lambda: filled.write(spec(1), PROVENANCE, tables())):
            with pytest.raises(InputError, match="File too large"):
                act()

    assert in_processes(1, write) == [0]
    assert filled.whole(spec().id) and filled.ids() == [spec().id] and not leftovers(filled)


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
    before = filled.file(spec().id).read_bytes()
    for use in (filled.read, filled.get, filled.whole, lambda _: list(filled.about()),
                lambda _: filled.write(spec(), PROVENANCE, tables())):
        with pytest.raises(NewerSchema, match="newer.*update gstlib") as caught:
            use(spec().id)
        assert not isinstance(caught.value, DamagedRun)
    assert filled.file(spec().id).read_bytes() == before and filled.others() == []


FOREIGN = ["parquet", "text", "empty", "folder", "pipe", "dangling link", "huge"]


def plant(place, content: str) -> None:
    if content == "parquet":
        pq.write_table(pa.table({"a": [1, 2]}), place)
    elif content == "folder":
        (place / "inside").mkdir(parents=True)
    elif content == "pipe":
        os.mkfifo(place)
    elif content == "dangling link":
        place.symlink_to("nowhere")
    elif content == "huge":
        with open(place, "wb") as file:
            file.truncate(2**40)
    else:
        place.write_bytes(b"text" if content == "text" else b"")


@pytest.mark.parametrize("content", FOREIGN)
def test_foreign_files_are_no_runs_and_are_set_aside(filled, content, capsys):
    place = filled.file(spec(1).id)
    plant(place, content)
    with pytest.raises(DamagedRun, match="no stored run"):
        filled.read(spec(1).id)
    assert os.path.lexists(place) and capsys.readouterr().err == ""  # reading changes nothing
    assert filled.get(spec(1).id) is None and not os.path.lexists(place)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("gstlib: ") and "no stored run" in said and "set aside" in said
    assert os.path.lexists(filled.path / "damaged" / place.name) and filled.ids() == [spec().id]
    filled.write(spec(1), PROVENANCE, tables())
    assert filled.whole(spec(1).id) and capsys.readouterr().err == ""


def test_a_damaged_run_is_set_aside_beside_earlier_ones_and_its_place_is_free(filled, capsys):
    place, contents = filled.file(spec().id), [b"first", b"second", b"third"]
    for content in contents:
        place.write_bytes(content)
        assert not filled.whole(spec().id) and spec().id not in filled
        filled.write(spec(), PROVENANCE, tables())
        assert filled.whole(spec().id)
    aside = sorted((filled.path / "damaged").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    assert [p.read_bytes() for p in aside] == contents and len({p.name for p in aside}) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 3 and all(str(p) in said for p in aside)


def test_writing_over_a_damaged_run_sets_it_aside(filled):
    filled.file(spec().id).write_bytes(b"nonsense")
    filled.write(spec(), PROVENANCE, tables())
    assert filled.read(spec().id).spec == spec() and len(list((filled.path / "damaged").iterdir())) == 1


def test_a_whole_run_that_came_since_is_not_set_aside(filled):
    filled.file(spec().id).write_bytes(b"nonsense")
    with pytest.raises(DamagedRun) as caught:
        filled.read(spec().id)
    filled.get(spec().id)
    filled.write(spec(), PROVENANCE, tables())
    filled.set_aside(spec().id, str(caught.value), caught.value.seen)
    assert filled.whole(spec().id)
    filled.set_aside(spec().id, "because")
    assert spec().id not in filled
    filled.set_aside(spec().id, "because")  # nothing there


def test_a_file_that_cannot_be_read_is_told_and_stays(filled, monkeypatch):
    def fails(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fails)
        for use in (filled.read, filled.get, filled.whole):
            with pytest.raises(InputError, match="cannot be read: Input/output error") as caught:
                use(spec().id)
            assert not isinstance(caught.value, DamagedRun)
    assert filled.whole(spec().id) and filled.others() == []


def test_where_nothing_can_be_moved_a_damaged_run_is_missing_all_the_same(filled, monkeypatch, capsys):
    filled.file(spec().id).write_bytes(b"nonsense")
    monkeypatch.setattr(os, "replace", refuse)
    assert not filled.whole(spec().id) and filled.get(spec().id) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot be set aside" in said and "Permission denied" in said
    assert filled.others() == [] and filled.file(spec().id).read_bytes() == b"nonsense"
    with pytest.raises(InputError, match="could not be stored.*cannot be moved away"):
        filled.write(spec(), PROVENANCE, tables())
    assert not leftovers(filled)


@pytest.mark.parametrize("damage", ["rows", "head"])
def test_a_figure_says_that_a_damaged_run_is_missing(tmp_path, capsys, damage):
    store = made_up.fill(tmp_path / "results")
    gone = experiments.figures.figure1_vgg11(made_up.SMOKE, made_up.DATA, [1])[3]
    content = store.file(gone.spec.id).read_bytes()
    damaged = content[:-100] if damage == "head" else content[:200] + bytes(200) + content[400:]
    store.file(gone.spec.id).write_bytes(damaged)
    study = analysis.study(store, "figure1-vgg11")
    assert [(run.label, run.spec.seed) for run in study.missing] == [(gone.label, 1)]
    assert "set aside" in capsys.readouterr().err and "Missing: 1 of" in analysis.caption(study)
    assert len(study.runs) == len(study.wanted) - 1 and analysis.histograms(store, study).empty


def test_provenance_of_unknown_origin_is_shown_as_plain_text(tmp_path):
    store, about = Store(tmp_path), PROVENANCE | {"device": "a\x1b[2Jb\nc\u202e", "note": 3}
    store.write(spec(), about, tables())
    assert store.read(spec().id).provenance == about | {"device": "a [2Jb c "}
    assert [shown for _, _, shown in store.about()] == [about | {"device": "a [2Jb c "}]


def test_a_run_under_another_s_id_is_refused(filled):
    filled.file(spec(1).id).write_bytes(filled.file(spec().id).read_bytes())
    with pytest.raises(DamagedRun, match=spec(1).id):
        filled.read(spec(1).id)


@pytest.mark.parametrize("run_id", [
    "", "abc", "0" * 15, "0" * 17, "g" * 16, "A" * 16, "../../etc/passwd", "0123456789abcde/", "..............//",
    "0123456789abcdé0",
])
def test_what_is_no_id_is_refused(filled, run_id):
    for use in (filled.file, filled.read, filled.__contains__, filled.get, filled.whole,
                lambda name: filled.set_aside(name, "why")):
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


def test_a_damaged_run_is_set_aside_and_not_exported(filled, tmp_path, capsys):
    filled.write(spec(1), PROVENANCE, tables())
    filled.file(spec().id).write_bytes(b"nonsense")
    assert filled.export(tmp_path / "runs.zip") == 1 and filled.ids() == [spec(1).id]
    assert "set aside" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "runs.zip") as archive:
        assert archive.namelist() == [f"runs/{spec(1).id}.parquet"]


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
    other.file(spec().id).unlink()
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


def forge(store: Store, table: pa.Table, **options) -> None:
    """Put `table` in the place of the stored run, with its head."""
    place = store.file(spec().id)
    meta = pq.read_schema(place).metadata
    pq.write_table(table.replace_schema_metadata(meta), place, **options)


@pytest.mark.parametrize("bomb", ["rows", "bytes", "columns", "head"])
def test_a_file_that_unpacks_to_much_more_is_refused_unread(filled, monkeypatch, bomb):
    table = {
        "rows": lambda: pa.table({"epoch": np.zeros(50_000_000, np.int8)}),
        "bytes": lambda: pa.table({"layer": ["a" * 10_000_000 + str(i) for i in range(8)]}),
        "columns": lambda: pa.table({f"c{i}": [0] for i in range(300)}),
        "head": lambda: pq.read_table(filled.file(spec().id)),
    }[bomb]()
    if bomb == "head":
        rewrite(filled, provenance=json.dumps(PROVENANCE | {"note": "x" * 100_000}))
    else:
        forge(filled, table, compression="zstd", use_dictionary=False)
        monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("rows were read"))
    assert filled.file(spec().id).stat().st_size < 300_000
    with pytest.raises(DamagedRun, match="claims|digest|longer than"):
        filled.read(spec().id)
    assert list(filled.about()) == []


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.struct({"a": pa.int64()}), pa.binary(), pa.timestamp("ns"),
                                  pa.dictionary(pa.int8(), pa.string()), pa.null(), pa.bool_(), pa.decimal128(5)])
def test_columns_of_other_kinds_are_refused(filled, kind):
    table = pq.read_table(filled.file(spec().id))
    forge(filled, table.set_column(table.column_names.index("lr"), "lr", pa.nulls(len(table), kind)))
    with pytest.raises(DamagedRun, match="other kinds"):
        filled.read(spec().id)


def test_columns_of_one_name_are_refused(filled):
    table = pq.read_table(filled.file(spec().id))
    forge(filled, table.append_column("lr", table["lr"]))
    with pytest.raises(DamagedRun):
        filled.read(spec().id)


@pytest.mark.parametrize("text", ["[" * 50_000, "[]", '"text"', "{}", "1" * 5000,
                                  json.dumps(PROVENANCE | {"device": 3})])
def test_provenance_that_is_none_is_refused(filled, text):
    rewrite(filled, provenance=text)
    assert list(filled.about()) == [] and filled.get(spec().id) is None


def test_an_archive_that_unpacks_to_much_more_is_refused(filled, tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(f"runs/{spec(1).id}.parquet", "w") as member:
            for _ in range(64):
                member.write(bytes(2**20))
        archive.writestr(f"runs/{spec(2).id}.parquet", bytes(2**20))
        archive.writestr("\x1b[2J\nname", b"")
        archive.write(filled.file(spec().id), f"runs/{spec().id}.parquet")
    other = Store(tmp_path / "other")
    added, known, refused = other.import_(tmp_path / "bomb.zip")
    assert (added, known) == ([spec().id], []) and len(refused) == 3 and other.ids() == added
    assert refused[f"runs/{spec(1).id}.parquet"] == "larger than any run" and " [2J name" in refused


def test_an_archive_whose_members_cannot_be_unpacked_is_refused_member_by_member(filled, tmp_path):
    filled.export(tmp_path / "runs.zip")
    content = (tmp_path / "runs.zip").read_bytes()
    for place, value in ((8, 99), (6, 1)):  # an unknown method of compression; encrypted
        changed = bytearray(content)
        changed[place] = value
        changed[content.index(b"PK\x01\x02") + place + 2] = value
        (tmp_path / "changed.zip").write_bytes(changed)
        added, known, refused = Store(tmp_path / "other").import_(tmp_path / "changed.zip")
        assert (added, known, list(refused)) == ([], [], [f"runs/{spec().id}.parquet"])


def test_an_archive_mends_a_damaged_run(filled, tmp_path):
    filled.export(tmp_path / "runs.zip")
    filled.file(spec().id).write_bytes(b"nonsense")
    assert filled.import_(tmp_path / "runs.zip") == ([spec().id], [], {}) and filled.whole(spec().id)


def test_a_newer_run_stops_no_import_of_others(filled, tmp_path):
    filled.write(spec(1), PROVENANCE, tables())
    rewrite(filled, schema="2")
    with zipfile.ZipFile(tmp_path / "runs.zip", "w") as archive:
        for s in (spec(), spec(1)):
            archive.write(filled.file(s.id), f"runs/{s.id}.parquet")
    added, known, refused = Store(tmp_path / "other").import_(tmp_path / "runs.zip")
    assert added == [spec(1).id] and "newer" in refused[f"runs/{spec().id}.parquet"]


@pytest.fixture
def indexed(tmp_path, monkeypatch) -> Store:
    """Six runs in a store that keeps an index from three on."""
    monkeypatch.setattr(store_module, "_INDEXED", 3)
    store = Store(tmp_path / "results")
    for seed in range(6):
        store.write(spec(seed), PROVENANCE, tables())
    list(Store(store.path).about())
    assert (store.path / ".index.parquet").is_file() and not leftovers(store)
    return store


def heads_read(monkeypatch) -> list[str]:
    """Ids of the runs whose files are opened from now on."""
    seen, content = [], Store._content
    monkeypatch.setattr(Store, "_content", lambda self, run_id: (seen.append(run_id), content(self, run_id))[1])
    return seen


def test_an_index_spares_the_heads(indexed, monkeypatch):
    seen, store = heads_read(monkeypatch), Store(indexed.path)
    for _ in range(2):
        assert list(store.about()) == [(s.id, s, PROVENANCE) for s in sorted(map(spec, range(6)), key=lambda s: s.id)]
    assert seen == []


def test_an_index_knows_what_has_changed_since(indexed, monkeypatch):
    indexed.write(spec(6), PROVENANCE, tables())
    indexed.file(spec(0).id).unlink()
    indexed.file(spec(1).id).write_bytes(b"nonsense")
    indexed.file(spec(2).id).unlink()
    indexed.write(spec(2), PROVENANCE | {"commit": "another"}, tables())
    seen = heads_read(monkeypatch)
    found = {run_id: about["commit"] for run_id, _, about in Store(indexed.path).about()}
    assert found == {spec(n).id: "another" if n == 2 else "abc" for n in range(2, 7)}
    assert set(seen) == {spec(n).id for n in (1, 2, 6)}


@pytest.mark.parametrize("content", [None, b"", b"nonsense", "cut", "empty", "folder", "pipe", "forged", "bomb"])
def test_an_index_that_is_no_good_is_made_anew(indexed, monkeypatch, content):
    place = indexed.path / ".index.parquet"
    good, table = place.read_bytes(), pq.read_table(place)
    place.unlink()
    if content == "empty":
        pq.write_table(pa.table({}), place)
    elif content == "forged":  # a head under another's id
        pq.write_table(table.set_column(0, "id", [table["id"].to_pylist()[::-1]]), place)
    elif content == "bomb":
        pq.write_table(pa.table({"id": np.zeros(10_000_000, np.int8)}), place)
    elif content in ("folder", "pipe"):
        plant(place, content)
    elif content is not None:
        place.write_bytes(good[:len(good) // 2] if content == "cut" else content)
    expected = [(s.id, s, PROVENANCE) for s in sorted(map(spec, range(6)), key=lambda s: s.id)]
    assert list(Store(indexed.path).about()) == expected
    seen = heads_read(monkeypatch)
    assert list(Store(indexed.path).about()) == expected and bool(seen) == (content == "folder")


def test_an_index_that_cannot_be_written_is_done_without(indexed, monkeypatch):
    (indexed.path / ".index.parquet").unlink()
    monkeypatch.setattr(files, "write_whole", refuse)
    assert len(list(indexed.about())) == 6 and not (indexed.path / ".index.parquet").exists()


def test_few_runs_make_no_index(filled):
    list(filled.about())
    assert [p.name for p in filled.path.iterdir()] == ["runs"]

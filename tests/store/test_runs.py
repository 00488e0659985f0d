import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from contextlib import suppress
from unittest import mock

import made_up
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gstlib import experiments, files
from gstlib.errors import InputError
from gstlib.reading import study as reading
from gstlib.reading import text
from gstlib.spec import DataSpec, FlatnessSpec, ModelSpec, OptimiserSpec, PruningSpec, RunSpec
from gstlib.store import DamagedRun, NewerSchema, Store, export, import_, runs

PROVENANCE = {"profile": "smoke", "commit": "abc", "device": "a CPU", "versions": {"torch": "2"},
              "data_title": "digits", "finished": "2026-01-02T03:04:05+00:00"}


def spec(seed: int = 0) -> RunSpec:
    pruning = PruningSpec(("conv7", "conv8"), (1, 1), (2, 1), (0.5, 0.5), 1)
    return RunSpec(DataSpec("digits", "f" * 64), ModelSpec("vgg11", 1 / 16), OptimiserSpec(epochs=4), pruning, seed,
                   test_every=3)


def tables() -> dict[str, list[dict]]:
    epochs = [{"epoch": n, "lr": 0.001, "train_loss": 2 / 3 - n / 7, "train_accuracy": 0.5, "parameters": 37_146 - n,
               "seconds": 0.25} for n in range(4)]
    for row in epochs:
        row |= dict.fromkeys(("test_loss", "test_accuracy", "test_accuracy_clean"), 0.1 + 0.2)
    for name in ("test_loss", "test_accuracy", "test_accuracy_clean"):
        del epochs[0][name]  # an epoch that is not tested
    events = [{"epoch": epoch, "layer": name, "units": 32, "removed": 3, "removed_total": 3, "mean_score": score,
               "t_pre": 0.5, "t_post": 0.4}
              for epoch, name, score in ((1, "conv7", math.nan), (1, "conv8", 1e-300), (2, "conv7", -1.5))]
    bins = [{"epoch": -1, "layer": "bn1", "layer_index": 0, "ks": 0.01, "sd": 1.0, "left": k / 2, "right": k + 1.5,
             "count": 5} for k in range(9)]
    final = [{"images": 1437, "accuracy": 0.9, "loss": 0.3, "train_accuracy": 1.0, "train_loss": 1e-9}]
    return {"epoch": epochs, "event": events, "histogram": bins, "final": final}


@pytest.fixture
def filled(tmp_path) -> Store:
    store = Store(tmp_path / "results")
    store.write(spec(), PROVENANCE, tables())
    return store


def leftovers(store: Store) -> list[str]:
    return [p.name for p in store.path.rglob("*") if p.is_file() and p.suffix != ".parquet"]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].equals(b[name]) for name in a)


# ---------------------------------------------------------------- what is written is what is read

def test_what_is_read_is_what_was_written_to_the_last_bit(filled):
    run = filled.read(spec().id)
    assert run.spec == spec() and run.provenance == PROVENANCE and list(run.tables) == list(runs.TABLES)
    for name, rows in tables().items():
        pd.testing.assert_frame_equal(run.tables[name], pd.DataFrame(rows), check_exact=True)
    assert run.tables["event"]["removed"].dtype == "int64" and filled.file(spec().id).stat().st_mode & 0o777 == 0o644


def test_columns_and_tables_that_the_store_does_not_know_just_work(tmp_path):
    store, rows = Store(tmp_path), tables()
    for row in rows["event"]:
        row |= {"score": math.nan, "why": "because", "negative_scales": 2}
    rows["event"][0]["score"] = float(-np.float64("nan"))  # another nan is a nan
    rows["overlap"] = [{"epoch": 3, "cosine": -0.5}]
    store.write(spec(), PROVENANCE, rows)
    found = store.read(spec().id).tables
    assert found["event"]["score"].isna().all() and set(found["event"]["why"]) == {"because"}
    assert found["overlap"].to_dict("records") == rows["overlap"]


def test_tables_without_rows_are_empty(tmp_path):
    store, plain = Store(tmp_path), RunSpec(spec().data, spec().model, spec().optimiser, test_every=3)
    store.write(plain, PROVENANCE, {"epoch": tables()["epoch"], "event": [], "final": tables()["final"]})
    found = store.read(plain.id).tables
    assert len(found["epoch"]) == 4 and found["event"].empty and found["histogram"].empty


def test_runs_are_listed_and_asked_for(filled):
    filled.write(spec(1), PROVENANCE, tables())
    assert filled.ids() == sorted([spec().id, spec(1).id]) == [run_id for run_id, _ in filled.runs()]
    with pytest.raises(KeyError):
        filled.read(spec(2).id)
    assert [run_id for run_id, _ in filled.runs([spec(2).id, spec(1).id])] == [spec(1).id]
    (filled.folder / "notes.parquet").write_bytes(b"")
    (filled.folder / f"{spec(2).id.upper()}.parquet").write_bytes(b"")
    assert len(filled.ids()) == 2 == len(list(filled.about()))


def test_an_empty_store_has_nothing_and_makes_nothing(tmp_path):
    store = Store(tmp_path / "nowhere")
    assert store.ids() == [] and list(store.about()) == list(store.runs()) == [] and not store.path.exists()


@pytest.mark.parametrize("run_id", ["", "0" * 15, "0" * 17, "A" * 16, "../../etc/passwd", "0123456789abcdé0"])
def test_what_is_no_id_is_refused(filled, run_id):
    for use in (filled.file, filled.read):
        with pytest.raises(InputError, match="no run id"):
            use(run_id)


@pytest.mark.parametrize(("column", "told"), [("train_loss", True), ("seconds", False)])
def test_a_run_written_again_stays_as_it_was_first(filled, capsys, column, told):
    before, changed = filled.file(spec().id).read_bytes(), tables()
    changed["epoch"][0][column] = 9.0
    place = filled.write(spec(), {**PROVENANCE, "commit": "later", "device": "a\x1b[2J GPU"}, changed)
    assert place == filled.file(spec().id) and place.read_bytes() == before and not leftovers(filled)
    said = capsys.readouterr().err
    assert said.count("\n") == told and "\x1b" not in said
    if told:
        assert all(text in said for text in (spec().id, "other rows", "on a CPU", "a [2J GPU", "is kept"))


# ---------------------------------------------------------------- rows that cannot be

CHANGES = {
    "an epoch too few": lambda rows: rows["epoch"].pop(),
    "an epoch twice": lambda rows: rows["epoch"][1].update(epoch=0),
    "negative epochs": lambda rows: [row.update(epoch=-7) for row in rows["epoch"]],
    "accuracy above 1": lambda rows: rows["epoch"][1].update(test_accuracy=1e308),
    "accuracy below 0": lambda rows: rows["epoch"][1].update(train_accuracy=-5.0),
    "accuracy missing where it was tested": lambda rows: rows["epoch"][2].update(test_accuracy=math.nan),
    "infinite loss": lambda rows: rows["epoch"][1].update(train_loss=math.inf),
    "no training loss": lambda rows: rows["epoch"][0].update(train_loss=math.nan),
    "negative parameters": lambda rows: rows["epoch"][1].update(parameters=-1),
    "parts of a unit": lambda rows: rows["event"][1].update(removed=0.5),
    "units missing": lambda rows: rows["event"][1].update(units=math.nan),
    "more units than there are": lambda rows: rows["event"][1].update(removed_total=33),
    "an event too late": lambda rows: rows["event"][2].update(epoch=10**9),
    "an event of another layer": lambda rows: rows["event"][2].update(layer="conv99"),
    "an event twice": lambda rows: rows["event"].append(rows["event"][0]),
    "an event too few": lambda rows: rows["event"].pop(),
    "no events": lambda rows: rows.pop("event"),
    "accuracy at an event above 1": lambda rows: rows["event"][0].update(t_post=99.0),
    "a negative loss": lambda rows: rows["epoch"][1].update(train_loss=-0.1),
    "a negative duration": lambda rows: rows["epoch"][1].update(seconds=-1.0),
    "no end": lambda rows: rows.pop("final"),
    "infinitely small score": lambda rows: rows["event"][0].update(mean_score=-math.inf),
    "infinite score": lambda rows: rows["event"][0].update(mean_score=math.inf),
    "a bar of no epoch": lambda rows: rows["histogram"][0].update(epoch=4),
    "a negative bar": lambda rows: rows["histogram"][0].update(count=-1),
    "two ends": lambda rows: rows["final"].append(rows["final"][0]),
    "an end without accuracy": lambda rows: rows["final"][0].update(accuracy=math.nan),
    "a column missing": lambda rows: [row.pop("t_pre") for row in rows["event"]],
    "a text for a number": lambda rows: [row.update(lr="fast") for row in rows["epoch"]],
    "a very long text": lambda rows: rows["histogram"][0].update(layer="a" * 10_000),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_that_no_run_can_have_are_neither_stored_nor_believed(tmp_path, monkeypatch, change):
    store, rows = Store(tmp_path / "results"), tables()
    CHANGES[change](rows)
    with pytest.raises(InputError, match="cannot be stored") as caught:
        store.write(spec(), PROVENANCE, rows)
    assert "\n" not in str(caught.value) and not store.path.exists()
    with monkeypatch.context() as patch:  # as someone would store them who does not care
        patch.setattr(runs, "_check", lambda *_: None)
        patch.setattr(runs, "_TEXT", 2**20)
        store.write(spec(), PROVENANCE, rows)
    with pytest.raises(DamagedRun, match="not as it was written") as caught:
        store.read(spec().id)
    assert "digest" not in str(caught.value) and not list(store.runs())


@pytest.mark.parametrize("claim", [{"optimiser": OptimiserSpec(epochs=2**31 - 1)},
                                   {"pruning": PruningSpec(("conv7",) * 99, (1,) * 99, (2**31 - 1,) * 99, (0.5,) * 99, 1)}])
def test_a_specification_that_claims_billions_takes_neither_memory_nor_time(tmp_path, monkeypatch, claim):
    store, large = Store(tmp_path), dataclasses.replace(spec(), **claim)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_check", lambda *_: None)
        store.write(large, PROVENANCE, tables())
    with pytest.raises(DamagedRun, match="its (epochs|events) are not"):
        store.read(large.id)


HOW = FlatnessSpec(40, 30, 3, 2, step=0.2)
MEASURED = dataclasses.replace(spec(), measures=("flatness",), measured_at=2, flatness=HOW)


def with_flatness() -> dict[str, list[dict]]:
    row = {"epoch": 2, "images": 40, "hessian_images": 30, "loss": 1.0, "accuracy": 0.5, "trace": 9.0, "trace_error": 1.0,
           "trace_centred": 8.0, "curvature_error": 0.5, "curvature_other": -0.25, "curvature_other_error": 0.5,
           "relative_mean": 1.25, "relative_worst": 2.5, "seconds": 0.5}
    curves = [{"number": number, "step": step, "loss": 2.0, "accuracy": 0.25} for number in (1, 2) for step in HOW.steps]
    return tables() | {"flatness": [row], "direction": curves,
                       "eigenvalue": [{"number": n, "eigenvalue": 5.0 - 3 * n} for n in (1, 2, 3)]}


def test_flatness_is_stored_as_it_was_measured(tmp_path):
    store = Store(tmp_path)
    store.write(MEASURED, PROVENANCE, with_flatness())
    found = Store(tmp_path).read(MEASURED.id).tables
    for name in ("flatness", "eigenvalue", "direction"):
        pd.testing.assert_frame_equal(found[name], pd.DataFrame(with_flatness()[name]), check_exact=True)


IMPOSSIBLE = {
    "not measured": lambda rows: [rows.pop(name) for name in ("flatness", "eigenvalue", "direction")],
    "measured twice": lambda rows: rows["flatness"].append(rows["flatness"][0]),
    "at another epoch": lambda rows: rows["flatness"][0].update(epoch=3),
    "on other images": lambda rows: rows["flatness"][0].update(images=41),
    "a negative trace": lambda rows: rows["flatness"][0].update(trace=-1.0),
    "no curvature elsewhere": lambda rows: rows["flatness"][0].update(curvature_other=math.nan),
    "an infinite loss": lambda rows: rows["flatness"][0].update(relative_worst=math.inf),
    "an error below zero": lambda rows: rows["flatness"][0].update(curvature_error=-1e-9),
    "eigenvalues that rise": lambda rows: rows["eigenvalue"][2].update(eigenvalue=3.0),
    "an eigenvalue too few": lambda rows: rows["eigenvalue"].pop(),
    "an eigenvalue that is none": lambda rows: rows["eigenvalue"][0].update(eigenvalue=math.nan),
    "a curve too few": lambda rows: rows.update(direction=rows["direction"][:5]),
    "a step of another length": lambda rows: rows["direction"][0].update(step=-0.41),
    "accuracy of a curve above 1": lambda rows: rows["direction"][0].update(accuracy=1.5),
    "a column missing": lambda rows: rows["flatness"][0].pop("trace_error"),
}


@pytest.mark.parametrize("change", IMPOSSIBLE)
def test_flatness_that_cannot_be_is_not_stored(tmp_path, change):
    rows = with_flatness()
    IMPOSSIBLE[change](rows)
    with pytest.raises(InputError, match="cannot be stored"):
        Store(tmp_path).write(MEASURED, PROVENANCE, rows)


def test_a_run_whose_flatness_was_not_asked_for_has_none(tmp_path):
    with pytest.raises(InputError, match="cannot be stored: its flatness"):
        Store(tmp_path).write(spec(), PROVENANCE, with_flatness())


@pytest.mark.parametrize("measured", [[-1], [3], [-1, 2], [-1, 2, 3]])
def test_histograms_are_from_before_and_after_training(tmp_path, measured):
    asked, rows = dataclasses.replace(spec(), measures=("bn-histogram",)), tables()
    for epochs in ((), (-1, 3)):
        Store(tmp_path / str(len(epochs))).write(asked, PROVENANCE, rows | {
            "histogram": [bar | {"epoch": epoch} for epoch in epochs for bar in rows["histogram"]]})
    with pytest.raises(InputError, match="cannot be stored: its histograms"):
        Store(tmp_path / "bad").write(asked, PROVENANCE, rows | {
            "histogram": [bar | {"epoch": epoch} for epoch in measured for bar in rows["histogram"]]})


def test_a_run_of_today_has_one_final_row(tmp_path):
    today = RunSpec(spec().data, spec().model, spec().optimiser, spec().pruning, semantics=2, test_every=3)
    rows = tables()
    del rows["final"]
    with pytest.raises(InputError, match="cannot be stored: it has 0 final rows"):
        Store(tmp_path).write(today, PROVENANCE, rows)


def test_provenance_says_what_readers_rely_on(tmp_path):
    for about in ({**PROVENANCE, "device": 3}, {**PROVENANCE, "versions": ["torch"]}, {**PROVENANCE, "seconds": math.inf},
                  {**PROVENANCE, "instructions": ["AVX2"]}, {**PROVENANCE, "images": [[9], [9]]},
                  {k: v for k, v in PROVENANCE.items() if k != "commit"}):
        with pytest.raises(InputError, match="cannot be stored.*provenance"):
            Store(tmp_path).write(spec(), about, tables())


def test_the_name_of_a_folder_that_is_no_text_is_read_as_one(tmp_path):
    store = Store(tmp_path)
    store.write(spec(), {**PROVENANCE, "data_title": "images from \u00e9\udcff"}, tables())
    assert store.read(spec().id).provenance["data_title"] == "images from \u00e9?"


# ---------------------------------------------------------------- damaged, newer, foreign

PLAIN = {"use_dictionary": False, "compression": "none"}


def rewrite(store: Store, change=lambda table: table, options=PLAIN, **meta) -> None:
    """Change a stored run's table and its head, and seal it as one who knows how it is done."""
    place = store.file(spec().id)
    table = pq.read_table(place)
    known = table.schema.metadata | {f"gstlib.{key}".encode(): value for key, value in meta.items()}
    known = {key: value for key, value in known.items() if value is not None}
    known[b"gstlib.digest"] = b"sha256:" + b"0" * 64
    pq.write_table(change(table).replace_schema_metadata(known), place, **options)
    seal(place, place.read_bytes())


def seal(place, content: bytes) -> None:
    """Write the content of a run's file with a right digest for the zeros or the digest in it."""
    at = content.rfind(b"sha256:") + 7
    content = content[:at] + b"0" * 64 + content[at + 64:]
    place.write_bytes(content[:at] + hashlib.sha256(content).hexdigest().encode() + content[at + 64:])


def test_a_flipped_byte_and_a_cut_are_detected(filled):
    place = filled.file(spec().id)
    content = place.read_bytes()
    for index in [*range(100), *range(100, len(content), 31), len(content) - 1]:
        for changed in (content[:index] + bytes([content[index] ^ 1]) + content[index + 1:], content[:index]):
            place.write_bytes(changed)
            with pytest.raises(DamagedRun, match=f"{spec().id}.*digest"):
                filled.read(spec().id)
    place.write_bytes(content)
    assert pd.read_parquet(place)["epoch.epoch"].dropna().tolist() == [0, 1, 2, 3]  # anyone reads it


@pytest.mark.parametrize("meta", [
    {"schema": None}, {"spec": None}, {"texts": b"{}"}, {"provenance": b"[]"}, {"spec": spec(1).to_json().encode()},
    {"spec": b"{}"}, {"provenance": b"[" * 50_000}, {"provenance": b"\xff"}, {"texts": b'{"event.layer": ["conv7"]}'},
    {"texts": b'{"event.layer": ["conv7", "conv8"], "histogram.layer": ["\\udcff"]}'},
])
def test_a_head_that_is_no_run_s_is_damage(filled, meta):
    rewrite(filled, **meta)
    with pytest.raises(DamagedRun, match=spec().id):
        filled.read(spec().id)


def test_a_run_under_another_s_id_is_refused(filled, capsys):
    filled.file(spec(1).id).write_bytes(filled.file(spec().id).read_bytes())
    with pytest.raises(DamagedRun, match=f"{spec(1).id}.*holds run {spec().id}"):
        filled.read(spec(1).id)
    assert [run_id for run_id, *_ in filled.about()] == [spec().id] and capsys.readouterr().err.count("\n") == 1


def plant(place, content: str) -> None:
    if content == "folder":
        (place / "inside").mkdir(parents=True)
    elif content == "pipe":
        os.mkfifo(place)
    elif content == "endless":
        place.symlink_to("/dev/zero")
    elif content == "huge":
        with open(place, "wb") as file:
            file.truncate(2**40)
    elif content == "parquet":
        pq.write_table(pa.table({"a": [1, 2]}), place)
    else:
        place.write_bytes(content.encode())


@pytest.mark.parametrize("content", ["", "text", "parquet", "huge"])
def test_a_damaged_file_is_reported_counts_as_missing_and_is_replaced(filled, capsys, content):
    place = filled.file(spec(1).id)
    plant(place, content)
    before = place.stat()
    with pytest.raises(DamagedRun, match="no stored run"):
        filled.read(spec(1).id)
    assert [run_id for _ in range(2) for run_id, _ in filled.runs()] == [spec().id] * 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("gstlib: ") and place.name in said and "counts as missing" in said
    assert (place.stat().st_ino, place.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    filled.write(spec(1), PROVENANCE, tables())
    assert filled.read(spec(1).id).spec == spec(1) and capsys.readouterr().err == "" and not leftovers(filled)


@pytest.mark.parametrize("content", ["folder", "pipe", "endless"])
def test_what_is_no_file_is_neither_waited_for_nor_replaced(filled, content):
    place = filled.file(spec(1).id)
    plant(place, content)
    with pytest.raises(InputError, match=spec(1).id):
        filled.read(spec(1).id)
    with pytest.raises(InputError):
        filled.write(spec(1), PROVENANCE, tables())
    assert not place.is_file()


@pytest.mark.parametrize("target", ["nowhere", "damaged"])
def test_a_link_in_a_run_s_place_is_told_before_anything_is_trained(filled, tmp_path, target):
    (tmp_path / "damaged").write_text("nonsense")
    filled.file(spec(1).id).symlink_to(tmp_path / target)
    filled.check_writable([spec().id, spec(2).id])
    with pytest.raises(InputError, match=f"{spec(1).id}.*link"):
        filled.check_writable([spec(1).id])


@pytest.mark.parametrize("damage", ["rows", "head"])
def test_a_figure_says_that_a_damaged_run_is_missing(tmp_path, capsys, damage):
    store = made_up.fill(tmp_path / "results")
    gone = experiments.figures.figure1_vgg11(made_up.SMOKE, made_up.DATA, [1])[3]
    content = store.file(gone.spec.id).read_bytes()
    damaged = content[:-100] if damage == "head" else content[:200] + bytes(200) + content[400:]
    store.file(gone.spec.id).write_bytes(damaged)
    study = reading.study(store, "figure1-vgg11")
    assert [(run.label, run.spec.seed) for run in study.missing] == [(gone.label, 1)]
    assert "counts as missing" in capsys.readouterr().err and "Missing: 1 of" in text.caption(study)
    assert len(study.runs) == len(study.wanted) - 1 and study.histograms.empty


def newer(store: Store, kind: str) -> str:
    """Turn the stored run into one that a later gstlib wrote; returns its id."""
    if kind == "schema":
        rewrite(store, schema=b"99")
        return spec().id
    fields = json.loads(spec().to_json())
    if kind == "field":
        fields["optimiser"]["nesterov"] = 0.1
    elif kind == "semantics":
        fields["semantics"] = 99
    else:
        fields["pruning"]["target"] = "unheard-of"
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    run_id = hashlib.sha256(text.encode()).hexdigest()[:16]
    columns = runs._flat(store.read(spec().id).tables)
    store.file(run_id).write_bytes(runs._pack(text, json.dumps(PROVENANCE), columns))
    return run_id


@pytest.mark.parametrize("kind", ["schema", "field", "choice", "semantics"])
def test_what_a_newer_gstlib_wrote_is_no_damage_and_stays(filled, capsys, kind):
    filled.write(spec(1), PROVENANCE, tables())
    rows = {run_id: run.tables for run_id, run in filled.runs()}
    later = newer(filled, kind)
    before = {run_id: filled.file(run_id).read_bytes() for run_id in filled.ids()}
    with pytest.raises(NewerSchema) as caught:
        filled.read(later)
    assert not isinstance(caught.value, DamagedRun) and "\n" not in str(caught.value)
    known = sorted(set(filled.ids()) - {later})
    assert [run_id for run_id, *_ in filled.about()] == known
    found = dict(filled.runs())
    assert sorted(found) == known and all(equal(found[run_id].tables, rows[run_id]) for run_id in known)
    assert capsys.readouterr().err.count("\n") == 1
    if kind == "schema":
        with pytest.raises(NewerSchema, match="schema 99"):
            filled.write(spec(), PROVENANCE, tables())
    assert {run_id: filled.file(run_id).read_bytes() for run_id in filled.ids()} == before
    assert export(filled, filled.path / "runs.zip") == len(known)


# ---------------------------------------------------------------- hostile files

def bomb(kind: str):
    """A table that claims to be small, and how it is written."""
    long = pa.table({"event.layer": ["a" * 2**20] * 20})
    return {
        "one text many times": (long, {"use_dictionary": True, "compression": "none"}),
        "compressed text": (long, PLAIN | {"compression": "zstd"}),
        "prefixes": (long, PLAIN | {"column_encoding": {"event.layer": "DELTA_BYTE_ARRAY"}}),
        "zeros": (pa.table({"epoch.epoch": np.zeros(100_000)}), PLAIN | {"compression": "zstd"}),
        "rows": (pa.table({"epoch.epoch": np.zeros(9_000_000, np.int64)}),
                 PLAIN | {"column_encoding": {"epoch.epoch": "DELTA_BINARY_PACKED"}}),
        "columns": (pa.table(dict.fromkeys([f"epoch.c{i}" for i in range(100)], pa.nulls(100_000, pa.int64()))), PLAIN),
        "groups": (pa.table({"epoch.epoch": np.zeros(20)}), PLAIN | {"row_group_size": 10}),
        "lists": (pa.table({"epoch.epoch": [[1, 2]]}), PLAIN),
        "dates": (pa.table({"epoch.epoch": [pd.Timestamp(0)]}), PLAIN),
        "categories": (pa.table({"event.layer": pd.Categorical(["a"])}), PLAIN),
    }[kind]


@pytest.mark.parametrize("kind", ["one text many times", "compressed text", "prefixes", "zeros", "rows", "columns",
                                  "groups", "lists", "dates", "categories"])
def test_a_file_that_could_take_much_memory_is_refused_unread(filled, monkeypatch, kind):
    table, options = bomb(kind)
    rewrite(filled, lambda _: table, options)
    assert filled.file(spec().id).stat().st_size < runs.LARGEST
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("rows were read"))
    with pytest.raises(DamagedRun, match="claims|other kinds"):
        filled.read(spec().id)


@pytest.mark.parametrize("codec", [1, 4, 10, 63])
def test_a_forged_codec_is_damage_and_does_not_end_the_process(filled, codec):
    place = filled.file(spec().id)
    content, told = place.read_bytes(), b"epoch.lr\x15\x00"  # the column's path, then its codec
    assert content.count(told) == 1
    seal(place, content.replace(told, told[:-1] + bytes([2 * codec])))

    def read(_: int) -> None:
        with pytest.raises(DamagedRun, match="other kinds"):
            filled.read(spec().id)

    assert in_processes(1, read) == [0]


def test_bytes_of_a_head_changed_at_random_end_no_process(filled):
    place, draw = filled.file(spec().id), random.Random(0)
    content = place.read_bytes()
    head = len(content) - 8 - int.from_bytes(content[-8:-4], "little")

    def read(_: int) -> None:
        for _ in range(1500):
            changed = bytearray(content)
            changed[draw.randrange(head, len(content))] = draw.randrange(256)
            seal(place, bytes(changed))
            with suppress(DamagedRun, NewerSchema):
                filled.read(spec().id)

    assert in_processes(1, read) == [0]


def test_long_texts_in_a_head_are_refused(filled):
    rewrite(filled, provenance=json.dumps(PROVENANCE | {"note": "x" * 100_000}).encode())
    with pytest.raises(DamagedRun, match="head is longer"):
        filled.read(spec().id)
    assert list(filled.about()) == []


# ---------------------------------------------------------------- disks, folders, processes

@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_store_as_it_was(filled, monkeypatch, error, call):
    before = filled.file(spec().id).read_bytes()

    def fails(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            filled.write(spec(1), PROVENANCE, tables())
    assert isinstance(error, KeyboardInterrupt) or "No space left" in str(caught.value)
    assert filled.ids() == [spec().id] and not leftovers(filled) and filled.file(spec().id).read_bytes() == before
    filled.write(spec(1), PROVENANCE, tables())
    assert len(dict(filled.runs())) == 2


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


def test_many_writers_of_the_same_and_of_other_runs(filled):
    filled.file(spec().id).write_bytes(b"nonsense")  # damaged for all of them at once

    def write(which: int) -> None:
        store = Store(filled.path)
        for seed in (0, 10 + which, 1, 20 + which, 2):
            rows = tables()
            rows["epoch"][0]["train_loss"] = float(which)
            store.write(spec(seed), PROVENANCE, rows)
            assert store.read(spec(seed).id).spec == spec(seed)

    assert in_processes(6, write) == [0] * 6
    assert set(dict(filled.runs())) == {spec(seed).id for seed in (0, 1, 2, *range(10, 16), *range(20, 26))}
    assert not leftovers(filled)


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
    assert list(dict(store.runs())) == store.ids()
    for left in store.folder.glob(".*.tmp"):
        os.utime(left, (time.time() - 100_000,) * 2)
    store.write(spec(-1 % 2**31), PROVENANCE, tables())
    assert not leftovers(store)


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


def test_a_full_disk_is_told_in_one_sentence_and_loses_nothing(small_disk, tmp_path):
    store, other = Store(small_disk / "results"), Store(tmp_path / "other")
    store.write(spec(), PROVENANCE, tables())
    other.write(spec(1), PROVENANCE, tables())
    export(other, tmp_path / "runs.zip")
    with open(small_disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(4096))
    for act in (store.check_writable, lambda: store.write(spec(1), PROVENANCE, tables()),
                lambda: import_(store, tmp_path / "runs.zip"), lambda: export(store, small_disk / "runs.zip")):
        with pytest.raises(InputError, match="No space left on device") as caught:
            act()
        assert "\n" not in str(caught.value)
    assert list(dict(store.runs())) == [spec().id] and not leftovers(store)
    assert {p.name for p in small_disk.iterdir()} == {"results", "filler"}


def test_a_folder_that_is_read_only_is_read_and_never_changed(small_disk):
    store = Store(small_disk / "results")
    for seed in range(2):
        store.write(spec(seed), PROVENANCE, tables())
    store.file(spec(1).id).write_bytes(b"nonsense")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert [run_id for run_id, *_ in store.about()] == [run_id for run_id, _ in store.runs()] == [spec().id]
    for act in (store.check_writable, lambda: store.write(spec(1), PROVENANCE, tables())):
        with pytest.raises(InputError, match="cannot be written.*Read-only file system"):
            act()


def test_a_limit_on_file_size_is_told_and_loses_nothing(filled):
    def write(_: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        for act in (filled.check_writable, lambda: filled.write(spec(1), PROVENANCE, tables())):
            with pytest.raises(InputError, match="File too large"):
                act()

    assert in_processes(1, write) == [0] and list(dict(filled.runs())) == [spec().id] and not leftovers(filled)


def test_a_file_that_cannot_be_read_is_told_and_stays(filled, monkeypatch):
    def fails(*_, **__):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fails)
        for use in (filled.read, lambda _: list(filled.runs()), lambda _: filled.write(spec(), PROVENANCE, tables())):
            with pytest.raises(InputError, match="cannot be read: Input/output error") as caught:
                use(spec().id)
            assert not isinstance(caught.value, DamagedRun)
    assert filled.read(spec().id).spec == spec()


@pytest.mark.parametrize("below", ["file/results", "folder", "a" * 300])
def test_a_folder_that_cannot_be_written_is_told(tmp_path, below):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "runs").write_text("")
    store = Store(tmp_path / below)
    for act in (store.check_writable, lambda: store.write(spec(), PROVENANCE, tables()),
                lambda: Store(tmp_path / "file")):
        with pytest.raises(InputError, match="cannot be (written|read)|is a file"):
            act()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder", "runs"]


# ---------------------------------------------------------------- the index

@pytest.fixture
def indexed(tmp_path, monkeypatch) -> Store:
    """Six runs in a store that keeps an index from three on."""
    monkeypatch.setattr(runs, "_INDEXED", 3)
    store = Store(tmp_path / "results")
    for seed in range(6):
        store.write(spec(seed), PROVENANCE, tables())
    list(Store(store.path).about())
    assert leftovers(store) == [".index.json"]
    return store


def heads(store: Store, monkeypatch) -> tuple[list, list[str]]:
    """What `about` tells of a store opened anew, and the ids of the runs whose files it opened for that."""
    opened, read = [], Store.read
    monkeypatch.setattr(Store, "read", lambda self, run_id, rows: (opened.append(run_id), read(self, run_id, rows))[1])
    found = list(Store(store.path).about())
    monkeypatch.setattr(Store, "read", read)
    return found, opened


EXPECTED = [(s.id, s, PROVENANCE) for s in sorted(map(spec, range(6)), key=lambda s: s.id)]


def test_an_index_spares_the_heads_and_knows_what_has_changed_since(indexed, monkeypatch):
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("rows were read"))
    assert heads(indexed, monkeypatch) == (EXPECTED, []) and list(indexed.about()) == EXPECTED
    monkeypatch.undo()
    monkeypatch.setattr(runs, "_INDEXED", 3)
    indexed.write(spec(6), PROVENANCE, tables())
    for seed in (0, 2):
        indexed.file(spec(seed).id).unlink()
    indexed.file(spec(1).id).write_bytes(b"nonsense")
    indexed.write(spec(2), PROVENANCE | {"commit": "another"}, tables())
    found, opened = heads(indexed, monkeypatch)
    assert {run_id: about["commit"] for run_id, _, about in found} == {
        spec(n).id: "another" if n == 2 else "abc" for n in range(2, 7)}
    assert set(opened) == {spec(n).id for n in (1, 2, 6)}


@pytest.mark.parametrize("content", [None, "", "cut", "[[1]]", "[" * 5000, "folder", "pipe", "huge", "forged"])
def test_an_index_that_is_no_good_is_done_without(indexed, monkeypatch, content):
    place = indexed.path / ".index.json"
    good = place.read_text()
    place.unlink()
    if content == "forged":  # every head under another's id
        index = json.loads(good)
        place.write_text(json.dumps(dict(zip(index, [*index.values()][::-1]))))
    elif content is not None:
        plant(place, good[:-9] if content == "cut" else content)
    assert heads(indexed, monkeypatch) == (EXPECTED, [run_id for run_id, *_ in EXPECTED])
    made_anew = content not in ("folder", "pipe")
    assert heads(indexed, monkeypatch)[1] == ([] if made_anew else [run_id for run_id, *_ in EXPECTED])


def test_few_runs_make_no_index_and_a_folder_that_cannot_be_written_has_none(filled, indexed, monkeypatch):
    (indexed.path / ".index.json").unlink()
    monkeypatch.setattr(files, "write_whole", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    assert len(list(Store(indexed.path).about())) == 6 and not leftovers(indexed)
    monkeypatch.undo()
    assert len(list(Store(indexed.path).about())) == 6 and not leftovers(indexed)

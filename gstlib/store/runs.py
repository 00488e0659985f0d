"""Finished runs on disk: one Parquet file a run, with its specification and provenance inside.

`<results>/runs/<id>.parquet` holds every row of a run in columns named "table.column" ("epoch.test_accuracy");
shorter tables end in nulls, and a column of texts holds numbers that count into a list in the file's head.  Whenever a
file is read, its digest is checked, and that its rows can be a run's.  Reading changes nothing: a damaged file is
reported, counts as missing, and is replaced when its run is stored anew.  Any number of processes may share a folder.

A results folder may come from anyone.  Nothing in it can run code, and since files hold numbers alone, uncompressed,
none takes more memory than the cells that it claims.
"""

import hashlib
import io
import json
import os
import re
import shlex
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gstlib import files
from gstlib.errors import InputError, plain, say
from gstlib.spec import SEMANTICS, RunSpec

SCHEMA = 2
TABLES = ("epoch", "event", "histogram", "final", "flatness", "eigenvalue", "direction")
# limits on bytes and cells of a file, on bytes of its head and on characters of a text in its rows; a run of 325 epochs
# takes 60 kB and 10,000 cells, 10 kB of them its head
LARGEST, _CELLS, _HEAD, _TEXT = 16 * 2**20, 2**20, 2**16, 200
_SPACE = 2**18  # bytes that a folder must take to count as writable: a run and a checkpoint's head
_INDEXED = 200  # heads read one by one take less time than an index up to here
_ABOUT = ("profile", "data_title", "device", "finished", "commit")  # what readers rely on
# what reading something that is no run may raise
_NO_RUN = (pa.ArrowException, ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError,
           ValueError)

_NEEDED = {"epoch": ("epoch", "train_accuracy", "test_accuracy", "parameters"), "final": ("images", "accuracy", "loss", "train_accuracy", "train_loss"),
           "event": ("epoch", "layer", "units", "removed", "removed_total", "t_pre", "t_post", "mean_score"),
           "histogram": ("epoch", "layer", "layer_index", "left", "right", "count", "ks", "sd"),
           "flatness": ("epoch", "images", "hessian_images", "loss", "accuracy", "trace", "trace_error", "trace_centred",
                        "curvature_error", "curvature_other", "curvature_other_error", "relative_mean", "relative_worst"),
           "eigenvalue": ("number", "eigenvalue"), "direction": ("number", "step", "loss", "accuracy")}
# beside these where some labels are wrong: training accuracy by kind of label
_FITTED = {"final": ("train_true", "train_wrong"),
           "event": tuple(f"train_{kind}_{when}" for when in ("pre", "post") for kind in ("true", "wrong"))}
# columns with bounds: within 0 … 1; whole and not negative; finite and not negative; finite
_SHARES = {"train_accuracy", "test_accuracy", "test_accuracy_clean", "accuracy", "t_pre", "t_post", "ks",
           *_FITTED["final"], *_FITTED["event"]}
_COUNTS = {"parameters", "units", "removed", "removed_total", "layer_index", "count", "images", "hessian_images", "number"}
_SIZES = {"lr", "train_loss", "test_loss", "loss", "seconds", "sd", "trace", "trace_error", "trace_centred",
          "curvature_error", "curvature_other_error", "relative_mean", "relative_worst"}
_FINITE = {"left", "right", "curvature_other", "eigenvalue", "step"}


class DamagedRun(InputError):
    """A stored file that is not what was written, or whose rows no run can have."""


class NewerSchema(InputError):
    """A stored file of a schema, or with a specification, that this gstlib does not know."""


class Run(NamedTuple):
    """A finished run: its specification, its provenance, and its tables by name (see `TABLES`)."""

    spec: RunSpec
    provenance: dict
    tables: dict[str, pd.DataFrame]


class Store:
    """The finished runs under a results folder, which is made on the first write. Raises `InputError` for a file."""

    def __init__(self, path: str | os.PathLike):
        self.path, self.folder, self._index = Path(path), Path(path) / "runs", Path(path) / ".index.json"
        self._heads: dict[str, tuple[list[int], RunSpec, dict]] | None = None
        self._told: set[str] = set()
        if os.path.exists(path) and not os.path.isdir(path):
            raise InputError(f"results folder {self.path} is a file; name a folder")

    def file(self, run_id: str) -> Path:
        """Where the run `run_id` is kept. Raises `InputError` for what is no id (16 hex digits)."""
        if not re.fullmatch("[0-9a-f]{16}", run_id):
            raise InputError(f"{run_id!r} is no run id (16 hexadecimal digits)")
        return self.folder / f"{run_id}.parquet"

    def ids(self) -> list[str]:
        """Ids of all stored runs, sorted; files unread."""
        try:
            return sorted(name[:16] for name in os.listdir(self.folder) if re.fullmatch(r"[0-9a-f]{16}\.parquet", name))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise InputError(f"results folder {self.path} cannot be read: {error.strerror or error}") from error

    def read(self, run_id: str, rows: bool = True) -> Run:
        """A stored run, verified; without `rows` only what its head says, and no table.

        Raises `KeyError` when it is not there, `DamagedRun` when it is not as it was written or no run can have its
        rows, `NewerSchema` when this gstlib does not know its schema or specification, and `InputError` when the file
        cannot be read: the disk, the network or a right may be at fault, and the run whole.
        """
        place = self.file(run_id)
        try:  # a pipe is not waited for
            with open(place, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise OSError("it is no regular file; remove it")
                content = file.read(LARGEST + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise KeyError(run_id) from None
        except OSError as error:
            raise InputError(f"{place} cannot be read: {error.strerror or error}") from error
        return parse(content, place, run_id, rows)

    def _found(self, run_id: str, rows: bool) -> Run | None:
        """`read`, but None where a run is missing, damaged or newer; a message says once which of the last two."""
        try:
            return self.read(run_id, rows)
        except KeyError:
            return None
        except (DamagedRun, NewerSchema) as error:
            if run_id not in self._told:
                say(f"gstlib: {error}; the run counts as missing")
            self._told.add(run_id)
            return None

    def runs(self, ids: Iterable[str] | None = None) -> Iterator[tuple[str, Run]]:
        """(id, run) of those of `ids` (None: of all) that are stored; a message names each damaged or newer one."""
        return ((run_id, run) for run_id in (self.ids() if ids is None else ids) if (run := self._found(run_id, True)))

    def about(self) -> Iterator[tuple[str, RunSpec, dict]]:
        """(id, specification, provenance) of every stored run by id, from the files' heads alone, rows unread.

        A message names each damaged or newer one.  The heads of many runs are kept in an index, which may be deleted.
        """
        stamps, fresh = {}, 0
        for run_id in self.ids():
            with suppress(OSError):  # gone since
                file = os.lstat(self.file(run_id))
                stamps[run_id] = [file.st_size, file.st_mtime_ns]
        known = self._read_index(len(stamps)) if self._heads is None and len(stamps) >= _INDEXED else self._heads or {}
        self._heads = {}
        for run_id, stamp in stamps.items():
            if run_id in known and known[run_id][0] == stamp:
                self._heads[run_id] = known[run_id]
            elif run := self._found(run_id, False):
                self._heads[run_id] = stamp, run.spec, run.provenance
                fresh += 1
        if fresh >= _INDEXED:
            index = {run_id: (stamp, spec.to_json(), about) for run_id, (stamp, spec, about) in self._heads.items()}
            with suppress(OSError):  # a folder that cannot be written is read without an index
                files.write_whole(self._index, lambda file: file.write(json.dumps(index).encode()))
        return ((run_id, spec, about) for run_id, (_, spec, about) in self._heads.items())

    def _read_index(self, number: int) -> dict[str, tuple[list[int], RunSpec, dict]]:
        """What `about` kept of some `number` runs; nothing where there is no index, or none that can be used."""
        with suppress(*_NO_RUN):
            if self._index.is_file() and self._index.stat().st_size < number * _HEAD // 8:
                return {run_id: (stamp, *_described(run_id, spec, about))
                        for run_id, (stamp, spec, about) in json.loads(self._index.read_bytes()).items()}
        return {}

    def benchmarks(self, *needed: str) -> list[dict]:
        """What `python -m gstlib bench` wrote into the results folder (`bench*.json`), by file name.

        Raises `InputError` for a file that holds something else, or nothing under one of the names `needed`.
        """
        found = []
        for place in sorted(self.path.glob("bench*.json")):
            try:
                result = json.loads(place.read_text() if place.is_file() else "")  # a pipe is not waited for
                if lacking := [name for name in needed if name not in result]:
                    raise ValueError(f"it lacks {', '.join(lacking)}")
            except (OSError, ValueError, TypeError, RecursionError) as error:
                raise InputError(f"{place} is no benchmark ({error}); "
                                 f"make it with: python -m gstlib bench --output {shlex.quote(str(place))}") from error
            found.append(result)
        return found

    def check_writable(self, ids: Iterable[str] = ()) -> None:
        """Raise `InputError` when no run, or none of `ids`, can be stored here, before hours are spent on one."""
        for place in map(self.file, ids):
            if os.path.islink(place):
                raise InputError(f"{place} is a link to something that is no stored run; remove it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(bytes(_SPACE))
        except OSError as error:
            raise InputError(f"results folder {self.path} cannot be written: {error.strerror or error}") from error

    def write(self, spec: RunSpec, provenance: dict, tables: dict[str, list[dict]]) -> Path:
        """The file of a finished run, now stored, whole or not at all.

        A whole run that is here already stays as it is; where its rows are others (wall-clock seconds aside) a message
        says so.  Raises `DamagedRun` where no run of `spec` can have these rows, `InputError` where the folder cannot be
        written or a newer gstlib's run is in its place.
        """
        try:
            columns = _flat({name: pd.DataFrame(rows) for name, rows in tables.items()})
            content = _pack(spec.to_json(), json.dumps(provenance, sort_keys=True), columns)
            run = parse(content, "it", spec.id)  # what could not be read back is not stored
        except _NO_RUN as error:
            raise DamagedRun(f"run {spec.id} cannot be stored: {plain(error.__cause__ or error)}") from error
        stored = self.place(spec.id, content)
        if stored is not None and not same_rows(stored, run):
            devices = [plain(one.provenance["device"]) for one in (stored, run)]
            say(f"gstlib: run {spec.id} is stored already with other rows (computed on {devices[0]}, these on "
                f"{devices[1]}); the stored one is kept")
        return self.file(spec.id)

    def place(self, run_id: str, content: bytes) -> Run | None:
        """The whole run that is stored as `run_id` and stays; None where `content` is its file now."""
        with suppress(KeyError, DamagedRun):
            return self.read(run_id)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.sweep(self.folder)
            files.write_whole(self.file(run_id), lambda file: file.write(content))
        except OSError as error:
            raise InputError(f"run {run_id} could not be stored: results folder {self.path} cannot be written: "
                             f"{error.strerror or error}") from error
        return None


def parse(content: bytes, place: Path | str, run_id: str, rows: bool = True) -> Run:
    """The run `run_id` in a file, which messages call `place`, as `Store.read` gives it. Raises what that raises."""
    try:
        if len(content) > LARGEST:
            raise ValueError("it is larger than any run")
        if content != _sealed(content):  # before anything else reads it
            raise ValueError("its digest is another")
        file = pq.ParquetFile(pa.BufferReader(content))
        if file.metadata.serialized_size > _HEAD:
            raise ValueError("its head is longer than any run's")
        head = {key.decode(): text.decode() for key, text in file.metadata.metadata.items()}
        if head["gstlib.schema"] != str(SCHEMA):
            raise NewerSchema(f"{place} has schema {plain(head['gstlib.schema'])}, and this gstlib knows {SCHEMA} "
                              "alone; read it with the gstlib that wrote it")
        spec, about, texts = (head[f"gstlib.{name}"] for name in ("spec", "provenance", "texts"))
        columns = _columns(file, content, json.loads(texts)) if rows else {}
        # the name of a folder of images, which its title has, may hold bytes that are no text
        about = json.dumps(json.loads(about), ensure_ascii=False).encode(errors="replace")
        run = Run(*_described(run_id, spec, json.loads(about)), _tables(columns))
        if rows:
            _check(run.spec, columns)
        return run
    except NewerSchema:
        raise
    except _NO_RUN as error:
        raise DamagedRun(f"{place} is not as it was written, or no stored run ({plain(error)})") from error


def same_rows(a: Run, b: Run) -> bool:
    """Whether two runs have the same rows; how long each epoch took does not count."""
    one, other = ({name: rows.drop(columns="seconds", errors="ignore") for name, rows in run.tables.items()}
                  for run in (a, b))
    return one.keys() == other.keys() and all(one[name].equals(other[name]) for name in one)


def _described(run_id: str, spec: str, about: dict) -> tuple[RunSpec, dict]:
    """Specification and provenance of a run from its head. Raises `ValueError` where they are not those of `run_id`."""
    if (found := hashlib.sha256(spec.encode()).hexdigest()[:16]) != run_id:
        raise ValueError(f"it holds run {found}")
    if not all(isinstance(about.get(name), str) for name in _ABOUT):
        raise ValueError("its provenance does not say " + ", ".join(_ABOUT))
    if not (isinstance(about.get("versions", {}), dict) and 0 <= about.get("seconds", 0) < np.inf
            and isinstance(about.get("instructions", ""), str) and all(type(n) is int for n in about.get("images", ()))):
        raise ValueError("its provenance has impossible versions, seconds, instructions or images")
    try:
        known = RunSpec.from_json(spec)
        if known.semantics > SEMANTICS:
            raise InputError(f"semantics {known.semantics}")
        return known, about
    except InputError as error:  # it is the one that was meant, so whoever wrote it knew more
        raise NewerSchema(f"run {run_id} has a specification that this gstlib does not know ({plain(error)}); "
                          "update gstlib") from error


def _flat(tables: dict[str, pd.DataFrame]) -> dict[str, np.ndarray]:
    return {f"{table}.{name}": rows[name].to_numpy() for table, rows in tables.items() for name in rows}


def _tables(columns: dict[str, np.ndarray]) -> dict[str, pd.DataFrame]:
    tables: dict[str, dict] = {table: {} for table in TABLES}
    for key, values in columns.items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = values
    return {table: pd.DataFrame(rows) for table, rows in tables.items()}


def _pack(spec: str, about: str, columns: dict[str, np.ndarray]) -> bytes:
    """The file of a run."""
    arrays, texts, length = {}, {}, max(map(len, columns.values()))
    for key, values in columns.items():
        if values.dtype == object:
            values, names = pd.factorize(values)
            texts[key] = list(names)
        array = pa.array(values)  # nan stays, and is no null
        arrays[key] = pa.concat_arrays([array, pa.nulls(length - len(array), array.type)])
    head = {"schema": str(SCHEMA), "spec": spec, "provenance": about, "texts": json.dumps(texts),
            "digest": f"sha256:{0:064}"}
    table = pa.table(arrays).replace_schema_metadata({f"gstlib.{name}": text for name, text in head.items()})
    file = io.BytesIO()
    pq.write_table(table, file, compression="none", use_dictionary=False, write_statistics=False)
    return _sealed(file.getvalue())


def _columns(file: pq.ParquetFile, content: bytes, texts: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """The columns in a file. Raises `ValueError`, rows unread, where they could take more memory than a run's."""
    meta, group = file.metadata, file.metadata.row_group(0)
    if meta.num_row_groups != 1 or not 0 <= group.num_rows * meta.num_columns <= _CELLS:
        raise ValueError(f"it claims {group.num_rows} rows of {meta.num_columns} columns")
    # behind each column's name the file's footer has its codec, 0 for none; pyarrow, asked for one that it does not know,
    # ends the process
    if not ({field.type for field in file.schema_arrow} <= {pa.int64(), pa.float64()}
            and all(f"{name}\x15\0".encode() in content[-meta.serialized_size - 8:] for name in file.schema_arrow.names)
            and all(isinstance(text, str) and text.isprintable() and len(text) <= _TEXT
                    for names in texts.values() for text in names)):
        raise ValueError("it has columns of other kinds than a run's")
    read = file.read(use_threads=False)
    columns = {key: values.drop_null().to_numpy() for key, values in zip(read.column_names, read.columns)}
    return columns | {key: np.array(names, object)[columns[key]] for key, names in texts.items()}


def _sealed(content: bytes) -> bytes:
    """A file with the digest that it should have after the last "sha256:", taken with zeros in the digest's place."""
    start = content.rfind(b"sha256:") + 7
    before, after = content[:start], content[start + 64:]
    return before + hashlib.sha256(before + b"0" * 64 + after).hexdigest().encode() + after


def _check(spec: RunSpec, columns: dict[str, np.ndarray]) -> None:
    """Raise `ValueError` where `columns` hold what no run of `spec` can have."""
    epochs, pruning = range(spec.optimiser.epochs), spec.pruning

    def column(key: str) -> list:
        return columns[key].tolist() if key in columns else []

    if len(column("epoch.epoch")) != len(epochs) or column("epoch.epoch") != list(epochs):  # which may claim to be many
        raise ValueError(f"its epochs are not 0 … {epochs[-1]}")
    for table in {key.partition(".")[0] for key in columns}:
        needed = _NEEDED.get(table, ()) + (_FITTED.get(table, ()) if spec.data.wrong_labels else ())
        if lacking := [name for name in needed if f"{table}.{name}" not in columns]:
            raise ValueError(f"its {table} rows lack {', '.join(lacking)}")
    for key, values in columns.items():
        name = key.partition(".")[2]
        right = ((0 <= values) & (values <= 1) if name in _SHARES else
                 (0 <= values) & (values.dtype.kind == "i") if name in _COUNTS else
                 (0 <= values) & (values < np.inf) if name in _SIZES else
                 np.isfinite(values) if name in _FINITE else abs(values) != np.inf if values.dtype != object else
                 values == values)
        if key.startswith("epoch.test_"):
            right |= [value != value and not spec.tested_after(epoch) for epoch, value in enumerate(values.tolist())]
        if not right.all():
            raise ValueError(f"it has an impossible {key}: {values[~right][0]}")

    planned = [pruning.schedule.event_epochs(index) for index in range(len(pruning.layers))] if pruning else []
    due = [range(when.start, min(when.stop, len(epochs)), when.step) for when in planned]  # where these claim to be many
    found = sorted(zip(column("event.layer"), column("event.epoch")))
    if sum(map(len, due)) != len(found) or found != sorted(
            (layer, epoch) for when, layer in zip(due, pruning.layers if pruning else ()) for epoch in when):
        raise ValueError("its events are not those of its schedule")
    counts = zip(*(column(f"event.{name}") for name in ("removed", "removed_total", "units")))
    if any(not now <= so_far <= units for now, so_far, units in counts):
        raise ValueError("its events remove more units than there are")
    seen = {*column("histogram.epoch")}  # none in a network without batch normalisation
    if not seen <= {-1, *epochs} or "bn-histogram" in spec.measures and seen not in (set(), {-1, epochs[-1]}):
        raise ValueError("its histograms are of epochs that it does not have, or not from before and after training")
    how, measured = spec.flatness, "flatness" in spec.measures
    asked = [(spec.flatness_epoch, how.images, how.hessian_images)] if measured else []
    if asked != list(zip(*(column(f"flatness.{name}") for name in ("epoch", "images", "hessian_images")))):
        raise ValueError("its flatness is not measured as its specification says")
    values, numbers = column("eigenvalue.eigenvalue"), column("eigenvalue.number")
    if (len(numbers) != how.eigenvalues * measured or numbers != [*range(1, len(numbers) + 1)]
            or values != sorted(values, reverse=True)):
        raise ValueError("its eigenvalues are not the leading ones, or not as many as its specification says")
    ways = list(zip(column("direction.number"), column("direction.step")))
    if len(ways) != how.directions * measured * len(how.steps) or ways != [
            (number, step) for number in range(1, how.directions * measured + 1) for step in how.steps]:
        raise ValueError("its curves are not along the eigenvectors that its specification says")
    if (number := len(column("final.accuracy"))) != 1:
        raise ValueError(f"it has {number} final rows, not one")

"""Finished runs on disk: one Parquet file a run, with its specification and provenance inside.

A file `<id>.parquet` under `<results>/runs/` holds every row of a run; the
column `table` says which table a row belongs to ("epoch", "event" or
"histogram").  It appears whole or not at all, is never overwritten, and its
digest is checked whenever it is read.  What is not as it was written goes to
`<results>/damaged/` and counts as missing.  Any number of processes and
machines may write to one folder.

A results folder may come from anyone: nothing in it can run code, and how
much it may claim to hold is bounded before it is read.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import lzma
import os
import re
import stat
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from gstlib import files
from gstlib.errors import InputError
from gstlib.spec import RunSpec

SCHEMA = 1
TABLES = ("epoch", "event", "histogram", "final")
_WHOLE = ("epoch", "units", "removed", "removed_total", "parameters", "layer_index", "count", "images")
_TEXTS = ("layer", "table")
# what every reader of a run relies on
_NEEDED = {"epoch": ("epoch", "train_accuracy", "test_accuracy", "parameters"),
           "event": ("epoch", "layer", "removed", "t_pre", "t_post"),
           "histogram": ("epoch", "layer", "layer_index", "left", "right", "count"), "final": ("images", "accuracy")}
_ABOUT = ("profile", "data_title", "device", "finished", "commit")

# a run of 325 epochs is some 30 kB and 2,000 rows; what claims much more is none
_LARGEST, _UNPACKED, _ROWS, _COLUMNS, _LONGEST = 16 * 2**20, 64 * 2**20, 100_000, 200, 2**16
_SPACE = 2**18  # bytes that a folder must take to count as writable: a run and a checkpoint's head
_INDEX = ".index.parquet"
_INDEXED = 200  # heads read one by one take less time than an index up to here
_NAME = re.compile(r"([0-9a-f]{16})\.parquet")
_LAYER = re.compile(r"[A-Za-z0-9_.-]{1,100}")
# what reading something that is no run may raise
_NO_RUN = (OSError, pa.ArrowException, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
           ValueError)
_NO_ARCHIVE = (OSError, EOFError, NotImplementedError, RuntimeError, ValueError, lzma.LZMAError, zipfile.BadZipFile,
               zlib.error)


class DamagedRun(InputError):
    """A stored file that is not what was written. `seen`: device, inode, size and time of change of that file."""

    seen: tuple[int, ...] | None = None


class NewerSchema(InputError):
    """A stored file that a newer gstlib wrote."""


class Run(NamedTuple):
    """A finished run: its specification, its provenance, and its tables by name."""

    spec: RunSpec
    provenance: dict
    tables: dict[str, pd.DataFrame]


class Other(NamedTuple):
    """Something in a results folder that is no stored run: its path there, and its kind ("foreign", …)."""

    name: str
    kind: str

    @property
    def what(self) -> str:
        """Its kind in words."""
        return {"foreign": "its name is no stored run's", "temporary": "unfinished, of a writer at work or killed",
                "set aside": "set aside as damaged"}[self.kind]


class _Head(NamedTuple):
    size: int
    mtime_ns: int
    spec: RunSpec
    provenance: dict


class Store:
    """The finished runs under a results folder. The folder is made on the first write."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.runs = self.path / "runs"
        self._heads: dict[str, _Head] | None = None
        self._told: set[str] = set()
        self._swept = False
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"results folder {self.path} is a file; name a folder")

    def file(self, run_id: str) -> Path:
        """Where the run `run_id` is kept. Raises `InputError` for what is no id (16 hex digits)."""
        if not _NAME.fullmatch(f"{run_id}.parquet"):
            raise InputError(f"{run_id!r} is no run id (16 hexadecimal digits)")
        return self.runs / f"{run_id}.parquet"

    def __contains__(self, run_id: str) -> bool:
        """Whether there is a file for `run_id`; `whole` also says whether it is as it was written."""
        return self.file(run_id).exists()

    def ids(self) -> list[str]:
        """Ids of all stored runs, sorted; files unread."""
        return sorted(match[1] for name in self._names() if (match := _NAME.fullmatch(name)))

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.runs)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise InputError(f"results folder {self.path} cannot be read: {error.strerror or error}") from error

    def others(self) -> list[Other]:
        """What lies beside the runs and is none, and what was set aside, sorted by name."""
        beside = [Other(_plain(f"runs/{name}"), "temporary" if name.startswith(".") and name.endswith(".tmp") else "foreign")
                  for name in self._names() if not _NAME.fullmatch(name)]
        with suppress(FileNotFoundError, NotADirectoryError):
            beside += [Other(_plain(f"damaged/{name}"), "set aside") for name in os.listdir(self.path / "damaged")]
        return sorted(beside)

    def check_writable(self) -> None:
        """Raise `InputError` when no run can be stored here, before hours are spent on one."""
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.runs) as file:
                file.write(bytes(_SPACE))
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"results folder {self.path} cannot be written: {error.strerror or error}")

    def write(self, spec: RunSpec, provenance: dict, tables: dict[str, list[dict]]) -> Path:
        """Store a finished run, whole or not at all, and return its file.

        A run that is here already stays as it is; where its rows are others
        (wall-clock seconds aside) a message says so.  Raises `InputError`
        where the folder cannot be written or the rows are not those of `spec`.
        """
        try:
            content = _pack(spec, provenance, _table(tables))
            run = _parse(content, f"run {spec.id}", spec.id)  # what could not be read back is not stored
        except _NO_RUN as error:
            raise InputError(f"run {spec.id} cannot be stored: {_plain(error)}") from error
        first = self._place(spec.id, content)
        if first is not None and not _same(first, run):
            _tell(f"run {spec.id} is stored already with other rows (computed on {first.provenance['device']}, "
                  f"these on {run.provenance['device']}); the stored one is kept")
        return self.file(spec.id)

    def _place(self, run_id: str, content: bytes) -> Run | None:
        """Give a run its file; where a whole one is there already, return that and change nothing."""
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            if not self._swept:
                files.sweep(self.runs)
                self._swept = True
            for _ in range(2):
                try:
                    files.write_whole(self.file(run_id), lambda file: file.write(content), replace=False)
                    return None
                except FileExistsError:
                    if (stored := self.get(run_id)) is not None:
                        return stored
        except OSError as error:
            raise InputError(f"run {run_id} could not be stored: {self._unwritable(error)}") from error
        raise InputError(f"run {run_id} could not be stored: {self.file(run_id)} is damaged and cannot be moved away")

    def read(self, run_id: str) -> Run:
        """A stored run, verified; changes nothing.

        Raises `KeyError` when it is not there, `DamagedRun` when it is not as
        it was written, `NewerSchema` when a newer gstlib wrote it, and
        `InputError` when the file cannot be read at all.
        """
        content, seen = self._content(run_id)
        try:
            return _verified(content, self.file(run_id), run_id)
        except DamagedRun as error:
            error.seen = seen
            raise

    def get(self, run_id: str) -> Run | None:
        """A stored run, verified; None when it is missing. A damaged one is set aside with a message, and missing."""
        try:
            return self.read(run_id)
        except KeyError:
            return None
        except DamagedRun as error:
            self.set_aside(run_id, str(error), error.seen)
            return None

    def whole(self, run_id: str) -> bool:
        """Whether a run is stored and as it was written; a damaged one is set aside, as by `get`."""
        return self.get(run_id) is not None

    def set_aside(self, run_id: str, why: str, seen: tuple[int, ...] | None = None) -> None:
        """Move what is stored as `run_id` to `<results>/damaged/`, beside any earlier one, and say so.

        Where `seen` is given, only the file that it describes.  Where the
        folder cannot be changed the file stays, and a message says so once.
        """
        place, folder = self.file(run_id), self.path / "damaged"
        try:
            found = place.lstat()
            if seen is not None and _stamp(found) != seen:
                return  # another process has been here, and a whole run may have come since
            folder.mkdir(exist_ok=True)
            aside = _reserve(folder, run_id, stat.S_ISDIR(found.st_mode))
            try:
                os.replace(place, aside)
            except OSError:
                aside.rmdir() if aside.is_dir() else aside.unlink()
                raise
        except FileNotFoundError:
            return
        except OSError as error:
            if run_id not in self._told:
                _tell(f"{why}; it cannot be set aside in {folder} ({error.strerror}), but counts as missing")
            self._told.add(run_id)
        else:
            _tell(f"{why}; set aside as {aside}, the run counts as missing")

    def _content(self, run_id: str) -> tuple[bytes, tuple[int, ...]]:
        """What the file of a run holds, and which file that is."""
        place = self.file(run_id)
        try:
            found = place.lstat()
            seen = _stamp(found)
            if stat.S_ISLNK(found.st_mode) and place.exists():
                found = place.stat()
            # opening anything else, like a pipe, could wait for ever
            problem = ("it is no file" if not stat.S_ISREG(found.st_mode) else
                       "it is larger than any run" if found.st_size > _LARGEST else None)
            if problem is None:
                with open(place, "rb") as file:
                    return file.read(_LARGEST), seen
        except (FileNotFoundError, NotADirectoryError):
            raise KeyError(run_id) from None
        except OSError as error:
            # the disk, the network or a right is at fault; the run may be whole
            raise InputError(f"{place} cannot be read: {error.strerror or error}") from error
        damaged = _damaged(place, problem)
        damaged.seen = seen
        raise damaged

    def export(self, place: str | os.PathLike, ids: Iterable[str] | None = None) -> int:
        """Pack stored runs (all, when `ids` is None) into one zip archive, each verified first; returns their number.

        A damaged one is set aside, with a message, and left out.
        """
        number, place = 0, Path(place)

        def write(file) -> None:
            nonlocal number
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for run_id in sorted(self.ids() if ids is None else ids):
                    if self.whole(run_id):
                        entry = zipfile.ZipInfo(f"runs/{run_id}.parquet")
                        entry.external_attr = 0o644 << 16
                        archive.writestr(entry, self._content(run_id)[0])
                        number += 1

        try:
            files.write_whole(place, write)
        except OSError as error:
            raise InputError(f"runs could not be exported to {place}: {error.strerror or error}") from error
        return number

    def import_(self, place: str | os.PathLike) -> tuple[list[str], list[str], dict[str, str]]:
        """Take runs from an archive that `export` made: (ids added, ids there already, refused: why by name).

        Each run is verified before it is stored.  A run that is here already
        stays as it is; where the archive's has other rows (wall-clock seconds
        aside) it is refused.  Names in the archive never become paths.
        """
        added, known, refused = [], [], {}
        try:
            archive = zipfile.ZipFile(place)
        except _NO_ARCHIVE as error:
            raise InputError(f"{place} is no archive of runs ({_plain(error)}); "
                             "make one with: python -m gstlib export") from error
        self.check_writable()
        with archive:
            for entry in archive.infolist():
                name = _plain(entry.filename)
                match = re.fullmatch(rf"runs/{_NAME.pattern}", entry.filename)
                if not match or entry.file_size > _LARGEST:
                    refused[name] = "not a stored run's name" if not match else "larger than any run"
                    continue
                run_id = match[1]
                try:
                    content = archive.read(entry)
                    run = _verified(content, name, run_id)
                    stored = self.get(run_id)
                except (InputError, *_NO_ARCHIVE) as error:
                    refused[name] = _plain(error)
                    continue
                if stored is None:
                    stored = self._place(run_id, content)
                if stored is None:
                    added.append(run_id)
                elif _same(run, stored):
                    known.append(run_id)
                else:
                    refused[run_id] = "is stored here with other rows; the stored one was kept"
        return added, known, refused

    def about(self) -> Iterator[tuple[str, RunSpec, dict]]:
        """(id, specification, provenance) of every stored run by id, from the files' heads alone, rows unread.

        A file without a head is damaged and set aside.  The heads of many
        runs are kept in an index, a file that may be deleted at any time.
        Raises `NewerSchema` where a newer gstlib wrote one.
        """
        heads, fresh = {}, 0
        sizes = self._sizes()
        if self._heads is None:
            self._heads = self._read_index(2 * len(sizes)) if len(sizes) >= _INDEXED else {}
        for run_id, size in sorted(sizes.items()):
            head = self._heads.get(run_id)
            if head is None or head[:2] != size:
                found = self._head(run_id)
                if found is None:
                    continue
                head, fresh = _Head(*size, *found), fresh + 1
            heads[run_id] = head
        self._heads = heads
        if fresh >= _INDEXED:
            self._write_index(heads)
        return ((run_id, head.spec, head.provenance) for run_id, head in heads.items())

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Size in bytes and time of change in ns of each run's file."""
        found = {}
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.runs) as entries:
            for entry in entries:
                if match := _NAME.fullmatch(entry.name):
                    with suppress(OSError):
                        known = entry.stat()
                        found[match[1]] = known.st_size, known.st_mtime_ns
        return found

    def _head(self, run_id: str) -> tuple[RunSpec, dict] | None:
        """Specification and provenance of a run; None when it is missing or damaged."""
        try:
            _, meta = _open(self._content(run_id)[0], self.file(run_id))
            return _described(run_id, meta["gstlib.spec"], meta["gstlib.provenance"])
        except (DamagedRun, *_NO_RUN) as error:
            if isinstance(error, NewerSchema):
                raise
            run = self.get(run_id)
            return None if run is None else (run.spec, run.provenance)

    def _read_index(self, most: int) -> dict[str, _Head]:
        """The heads kept in the index; none where there is none, or none that can be used."""
        place = self.path / _INDEX
        with suppress(*_NO_RUN):
            if not place.is_file() or place.stat().st_size > most * _LONGEST:
                return {}
            table = _parquet(place.read_bytes(), most, most * _LONGEST).read(use_threads=False)
            rows = zip(*(table[name].to_pylist() for name in ("id", *_Head._fields)))
            return {run_id: _Head(size, changed, *_described(run_id, spec, about))
                    for run_id, size, changed, spec, about in rows}
        return {}

    def _write_index(self, heads: dict[str, _Head]) -> None:
        table = pa.table({
            "id": list(heads), "size": [head.size for head in heads.values()],
            "mtime_ns": [head.mtime_ns for head in heads.values()],
            "spec": [head.spec.to_json() for head in heads.values()],
            "provenance": [json.dumps(head.provenance) for head in heads.values()]})
        with suppress(OSError):  # a folder that cannot be written is read without an index
            files.write_whole(self.path / _INDEX, lambda file: pq.write_table(table, file, compression="zstd"))


def _table(tables: dict[str, list[dict]]) -> pa.Table:
    """All rows of a run as one table; its metadata say which column belongs to which."""
    frames = {}
    for name, rows in tables.items():
        if name not in TABLES:
            raise InputError(f"unknown table {name!r}; choose from {', '.join(TABLES)}")
        frames[name] = pd.DataFrame(rows)
    together = pd.concat([frame.assign(table=name) for name, frame in frames.items() if len(frame)], ignore_index=True)
    columns = json.dumps({name: list(frame) for name, frame in frames.items()})
    return pa.Table.from_pandas(together, preserve_index=False).replace_schema_metadata({"gstlib.columns": columns})


def _pack(spec: RunSpec, provenance: dict, table: pa.Table) -> bytes:
    """The file of a run whose rows `_table` put together."""
    text, about = spec.to_json(), json.dumps(provenance, sort_keys=True)
    table = table.replace_schema_metadata(table.schema.metadata | {
        "gstlib.schema": str(SCHEMA), "gstlib.spec": text, "gstlib.provenance": about,
        "gstlib.digest": _digest(text, about, len(table), _arrays(table)),
    })
    file = io.BytesIO()
    # so few rows gain little from dictionaries, statistics and denser packing, which take longer to read than the values
    pq.write_table(table, file, compression="lz4", use_dictionary=False, write_statistics=False)
    return file.getvalue()


def _parquet(content: bytes, rows: int, unpacked: int) -> pq.ParquetFile:
    """Open a Parquet file in memory. Raises `ValueError` when it claims more rows or bytes unpacked than these."""
    file = pq.ParquetFile(pa.BufferReader(content))
    meta = file.metadata
    size = sum(meta.row_group(number).total_byte_size for number in range(meta.num_row_groups))
    if meta.num_rows > rows or not 0 <= size <= unpacked or meta.num_columns > _COLUMNS:
        raise ValueError(f"it claims {meta.num_rows} rows of {meta.num_columns} columns, {size} bytes unpacked")
    return file


def _open(content: bytes, place: Path | str) -> tuple[pq.ParquetFile, dict[str, str]]:
    """A run's file and what its head says, as texts. Raises `NewerSchema`."""
    file = _parquet(content, _ROWS, _UNPACKED)
    meta = {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}
    schema = int(meta["gstlib.schema"])
    if schema > SCHEMA:
        raise NewerSchema(f"{place} has schema {schema}, newer than this gstlib knows ({SCHEMA}); update gstlib")
    if schema < 1:
        raise ValueError(f"it has schema {schema}")
    return file, meta


def _described(run_id: str, spec: str, about: str) -> tuple[RunSpec, dict]:
    """Specification and provenance of a run from its head. Raises `ValueError` where they are not those of `run_id`."""
    if max(len(spec), len(about)) > _LONGEST:
        raise ValueError("its head is longer than any run's")
    found = hashlib.sha256(spec.encode()).hexdigest()[:16]
    if found != run_id:
        raise ValueError(f"it holds run {found}")
    provenance = json.loads(about)
    if not isinstance(provenance, dict) or not all(isinstance(provenance.get(name), str) for name in _ABOUT):
        raise ValueError("its provenance does not say " + ", ".join(_ABOUT))
    return RunSpec.from_json(spec), {_plain(key): _plain(value) if isinstance(value, str) else value
                                     for key, value in provenance.items()}


def _verified(content: bytes, place: Path | str, run_id: str) -> Run:
    """The run in a file, shown in messages as `place`. Raises `DamagedRun` and `NewerSchema`."""
    try:
        return _parse(content, place, run_id)
    except NewerSchema:
        raise
    except _NO_RUN as error:
        raise _damaged(place, error) from error


def _parse(content: bytes, place: Path | str, run_id: str) -> Run:
    """`_verified`, but raises one of `_NO_RUN` instead of `DamagedRun`."""
    file, meta = _open(content, place)
    kinds = {field.name: field.type for field in file.schema_arrow}
    wrong = [name for name, kind in kinds.items() if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) if name in _TEXTS else
        pa.types.is_integer(kind) or pa.types.is_floating(kind))]
    if wrong or len(kinds) != file.metadata.num_columns:
        raise ValueError("it has columns of other kinds than a run's")
    columns = _arrays(file.read(use_threads=False))
    text, about, digest = meta["gstlib.spec"], meta["gstlib.provenance"], meta["gstlib.digest"]
    if _digest(text, about, file.metadata.num_rows, columns) != digest:
        raise ValueError("its digest is another")
    spec, provenance = _described(run_id, text, about)
    if any(layer is not None and not _LAYER.fullmatch(layer) for layer in set(columns.get("layer", ()))):
        raise ValueError("a layer has no layer's name")
    names = json.loads(meta["gstlib.columns"]) if "gstlib.columns" in meta else {}
    tables = {name: _rows(columns, name, names.get(name)) for name in TABLES}
    if len(tables["epoch"]) != spec.optimiser.epochs:
        raise ValueError(f"{len(tables['epoch'])} epoch rows of {spec.optimiser.epochs}")
    return Run(spec, provenance, tables)


def _arrays(table: pa.Table) -> dict[str, np.ndarray]:
    """A run's columns as arrays: texts as objects, whole numbers without gaps as int64, others as float64."""
    arrays = {}
    for name, column in zip(table.column_names, table.columns):
        if name in _TEXTS:
            arrays[name] = column.to_numpy()
        else:
            whole = pa.types.is_integer(column.type) and not column.null_count
            arrays[name] = column.to_numpy().astype("int64" if whole else "float64")
    return arrays


def _rows(columns: dict[str, np.ndarray], table: str, names: list[str] | None) -> pd.DataFrame:
    """The rows of one table, without the columns that only others have, whole numbers whole again."""
    rows = np.flatnonzero(columns["table"] == table)
    if len(rows) == 0:
        return pd.DataFrame(columns=names and pd.Index(names))
    if rows[-1] - rows[0] == len(rows) - 1:
        rows = slice(rows[0], rows[-1] + 1)  # a view, not a copy
    chosen = {name: columns[name][rows] for name in (columns if names is None else names) if name != "table"}
    if names is None:  # the first files written do not name their columns
        chosen = {name: values for name, values in chosen.items() if not pd.isna(values).all()}
    if not set(_NEEDED[table]) <= set(chosen):
        raise ValueError(f"its {table} rows lack {', '.join(sorted(set(_NEEDED[table]) - set(chosen)))}")
    for name in set(_WHOLE) & set(chosen):
        if chosen[name].dtype != "int64":
            if not np.isfinite(chosen[name]).all():
                raise ValueError(f"{name} has gaps")
            chosen[name] = chosen[name].astype("int64")
    return pd.DataFrame(chosen)


def _digest(spec: str, provenance: str, rows: int, columns: dict[str, np.ndarray]) -> str:
    """sha256 (hex) over the texts and every column's name and values, whatever the file's encoding."""
    digest = hashlib.sha256()
    for text in (spec, provenance, str(rows)):
        digest.update(text.encode() + b"\0")
    for name in sorted(columns):
        digest.update(name.encode() + b"\0")
        if columns[name].dtype == object:
            digest.update("\0".join(value or "" for value in columns[name]).encode())
        else:
            digest.update(columns[name].astype("<f8").tobytes())
    return digest.hexdigest()


def _same(a: Run, b: Run) -> bool:
    """Whether two runs have the same rows; how long each epoch took does not count."""
    return all(a.tables[name].drop(columns="seconds", errors="ignore")
               .equals(b.tables[name].drop(columns="seconds", errors="ignore")) for name in TABLES)


def _reserve(folder: Path, run_id: str, is_folder: bool) -> Path:
    """A new empty file or folder to move something onto: a rename alone would write over what is there."""
    for number in itertools.count():
        place = folder / f"{run_id}{f'-{number}' if number else ''}.parquet"
        with suppress(FileExistsError):
            place.mkdir() if is_folder else place.touch(exist_ok=False)
            return place


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _damaged(place: Path | str, why: object) -> DamagedRun:
    return DamagedRun(f"{place} is not as it was written, or no stored run ({_plain(why)})")


def _plain(text: object) -> str:
    """A text of unknown origin, fit for a terminal: one line of at most 200 characters, no control codes."""
    text = str(text)[:200]
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _tell(text: str) -> None:
    tqdm.write(f"gstlib: {text}", file=sys.stderr)

"""Finished runs on disk: one Parquet file a run, with its specification and provenance inside.

A file `<id>.parquet` under `<results>/runs/` holds every row of a run; the
column `table` says which table a row belongs to ("epoch", "event" or
"histogram").  It is written beside its place and renamed into it, so a run is
there whole or not at all, and its digest is checked whenever it is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gstlib.spec import InputError, RunSpec

SCHEMA = 1
TABLES = ("epoch", "event", "histogram")
_WHOLE = ("epoch", "units", "removed", "removed_total", "parameters", "layer_index", "count")


# a run of 325 epochs is some 40 kB; what claims more is not one
_LARGEST = 64 * 2**20


class DamagedRun(InputError):
    """A stored file that is not what was written."""


class NewerSchema(InputError):
    """A stored file that a newer gstlib wrote."""


class Run(NamedTuple):
    """A finished run: its specification, its provenance, and its tables by name."""

    spec: RunSpec
    provenance: dict
    tables: dict[str, pd.DataFrame]


class Store:
    """The finished runs under a results folder. The folder is made on the first write."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.runs = self.path / "runs"
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"results folder {self.path} is a file; name a folder")

    def file(self, run_id: str) -> Path:
        """Where the run `run_id` is kept. Raises `InputError` for what is no id (16 hex digits)."""
        if len(run_id) != 16 or set(run_id) - set("0123456789abcdef"):
            raise InputError(f"{run_id!r} is no run id (16 hexadecimal digits)")
        return self.runs / f"{run_id}.parquet"

    def __contains__(self, run_id: str) -> bool:
        return self.file(run_id).exists()

    def ids(self) -> list[str]:
        """Ids of all stored runs, sorted."""
        return sorted(p.stem for p in self.runs.glob("*.parquet"))

    def check_writable(self) -> None:
        """Raise `InputError` when nothing can be written here, before hours are spent on a run."""
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.runs):
                pass
        except OSError as error:
            raise InputError(f"results folder {self.path} cannot be written: {error.strerror or error}") from error

    def write(self, spec: RunSpec, provenance: dict, tables: dict[str, list[dict]]) -> Path:
        """Store a finished run, whole or not at all. Raises `InputError` where the folder cannot be written."""
        frames = []
        for name, rows in tables.items():
            if name not in TABLES:
                raise InputError(f"unknown table {name!r}; choose from {', '.join(TABLES)}")
            if rows:
                frames.append(pd.DataFrame(rows).assign(table=name))
        frame = pd.concat(frames, ignore_index=True)
        text = spec.to_json()
        about = json.dumps(provenance, sort_keys=True)
        table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata({
            "gstlib.schema": str(SCHEMA),
            "gstlib.spec": text,
            "gstlib.provenance": about,
            "gstlib.digest": _digest(text, about, frame),
            "gstlib.columns": json.dumps({name: list(pd.DataFrame(rows)) for name, rows in tables.items()}),
        })
        return self._place(spec.id, lambda file: pq.write_table(table, file, compression="zstd"))

    def _place(self, run_id: str, write: Callable[[IO[bytes]], object]) -> Path:
        """Let `write` fill a file beside the run's place, then rename it into place."""
        self.check_writable()
        place = self.file(run_id)
        handle, temporary = tempfile.mkstemp(dir=self.runs, prefix=f".{run_id}-", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, place)
        except BaseException as error:
            Path(temporary).unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise InputError(f"run {run_id} could not be stored in {self.path}: {error.strerror}") from error
            raise
        return place

    def read(self, run_id: str) -> Run:
        """A stored run, verified. Raises `KeyError` when it is not there and `DamagedRun` when it is not as written."""
        place = self.file(run_id)
        if not place.exists():
            raise KeyError(run_id)
        return self._verified(place, place, run_id)

    @staticmethod
    def _verified(source, place: Path | str, run_id: str) -> Run:
        """The run in `source` (a path or an open file), shown in messages as `place`."""
        try:
            table = pq.read_table(source)
            meta = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
            schema = int(meta["gstlib.schema"])
            if schema > SCHEMA:
                raise NewerSchema(f"{place} has schema {schema}, newer than this gstlib knows ({SCHEMA}); update gstlib")
            text, about, digest = meta["gstlib.spec"], meta["gstlib.provenance"], meta["gstlib.digest"]
            columns = json.loads(meta.get("gstlib.columns", "{}"))
            frame = table.to_pandas()
            if _digest(text, about, frame) != digest:
                raise ValueError("its digest is another")
            spec = RunSpec.from_json(text)
            if spec.id != run_id:
                raise ValueError(f"it holds run {spec.id}")
            return Run(spec, json.loads(about), {name: _rows(frame, name, columns.get(name)) for name in TABLES})
        except NewerSchema:
            raise
        except (OSError, pa.ArrowException, LookupError, TypeError, ValueError) as error:
            raise DamagedRun(f"{place} is not as it was written, or no stored run ({error}); "
                             "delete it and run again") from error

    def export(self, place: str | os.PathLike, ids: Iterable[str] | None = None) -> int:
        """Pack stored runs (all, when `ids` is None) into one zip archive, each verified first; returns their number."""
        chosen = sorted(self.ids() if ids is None else ids)
        place = Path(place)
        temporary = place.with_name(place.name + ".tmp")
        try:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                for run_id in chosen:
                    self.read(run_id)
                    archive.write(self.file(run_id), f"runs/{run_id}.parquet")
            os.replace(temporary, place)
        except OSError as error:
            raise InputError(f"runs could not be exported to {place}: {error.strerror or error}") from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        return len(chosen)

    def import_(self, place: str | os.PathLike) -> tuple[list[str], list[str], dict[str, str]]:
        """Take runs from an archive that `export` made: (ids added, ids there already, refused: why by name).

        Each run is verified before it is stored.  A run that is here already
        stays as it is; where the archive's has other rows (wall-clock seconds
        aside) it is refused.  Names in the archive never become paths.
        """
        added, known, refused = [], [], {}
        try:
            archive = zipfile.ZipFile(place)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{place} is no archive of runs ({error}); make one with: python -m gstlib export") from error
        self.check_writable()
        with archive:
            for entry in archive.infolist():
                match = re.fullmatch(r"runs/([0-9a-f]{16})\.parquet", entry.filename)
                if not match or entry.file_size > _LARGEST:
                    refused[entry.filename] = "not a stored run's name" if not match else "larger than any run"
                    continue
                run_id = match[1]
                try:
                    content = archive.read(entry)
                    run = self._verified(io.BytesIO(content), entry.filename, run_id)
                    if run_id in self:
                        if _same(run, self.read(run_id)):
                            known.append(run_id)
                        else:
                            refused[run_id] = "is stored here with other rows; the stored one was kept"
                        continue
                except (InputError, zipfile.BadZipFile) as error:
                    refused[entry.filename] = str(error)
                    continue
                self._place(run_id, lambda file: file.write(content))
                added.append(run_id)
        return added, known, refused

    def about(self) -> Iterator[tuple[str, RunSpec, dict]]:
        """(id, specification, provenance) of every stored run, from the files' heads alone, rows unread.

        Files that cannot be read are passed over here; `read` and the command `verify` name them.
        """
        for run_id in self.ids():
            try:
                meta = pq.read_schema(self.file(run_id)).metadata
                yield run_id, RunSpec.from_json(meta[b"gstlib.spec"].decode()), json.loads(meta[b"gstlib.provenance"])
            except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
                continue


def _same(a: Run, b: Run) -> bool:
    """Whether two runs have the same rows; how long each epoch took does not count."""
    return all(a.tables[name].drop(columns="seconds", errors="ignore")
               .equals(b.tables[name].drop(columns="seconds", errors="ignore")) for name in TABLES)


def _rows(frame: pd.DataFrame, table: str, columns: list[str] | None) -> pd.DataFrame:
    """The rows of one table, without the columns that only others have, whole numbers whole again."""
    rows = frame[frame["table"] == table].drop(columns="table").reset_index(drop=True)
    # the first files written do not name their columns
    rows = rows.dropna(axis=1, how="all") if columns is None else rows[columns]
    return rows.astype({name: "int64" for name in _WHOLE if name in rows})


def _digest(spec: str, provenance: str, frame: pd.DataFrame) -> str:
    """sha256 (hex) over the texts and every column's name and values, whatever the file's encoding."""
    digest = hashlib.sha256()
    for text in (spec, provenance, str(len(frame))):
        digest.update(text.encode() + b"\0")
    for name in sorted(frame.columns):
        column = frame[name]
        digest.update(name.encode() + b"\0")
        if pd.api.types.is_numeric_dtype(column):
            digest.update(column.to_numpy("float64", na_value=float("nan")).astype("<f8").tobytes())
        else:
            digest.update("\0".join("" if pd.isna(v) else str(v) for v in column).encode())
    return digest.hexdigest()

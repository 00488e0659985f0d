"""Finished runs on disk: one Parquet file a run, with its specification and provenance inside.

A file `<id>.parquet` under `<results>/runs/` holds every row of a run; the
column `table` says which table a row belongs to ("epoch", "event" or
"histogram").  It is written beside its place and renamed into it, so a run is
there whole or not at all, and its digest is checked whenever it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gstlib.spec import InputError, RunSpec

SCHEMA = 1
TABLES = ("epoch", "event", "histogram")
_WHOLE = ("epoch", "units", "removed", "removed_total", "parameters", "layer_index", "count")


class DamagedRun(InputError):
    """A stored file that is not what was written."""


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
        })
        self.check_writable()
        place = self.file(spec.id)
        handle, temporary = tempfile.mkstemp(dir=self.runs, prefix=f".{spec.id}-", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                pq.write_table(table, file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, place)
        except BaseException as error:
            Path(temporary).unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise InputError(f"run {spec.id} could not be stored in {self.path}: {error.strerror}") from error
            raise
        return place

    def read(self, run_id: str) -> Run:
        """A stored run, verified. Raises `KeyError` when it is not there and `DamagedRun` when it is not as written."""
        place = self.file(run_id)
        if not place.exists():
            raise KeyError(run_id)
        try:
            table = pq.read_table(place)
            meta = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
            schema = int(meta["gstlib.schema"])
            text, about, digest = meta["gstlib.spec"], meta["gstlib.provenance"], meta["gstlib.digest"]
        except (OSError, pa.ArrowException, KeyError, ValueError, UnicodeDecodeError) as error:
            raise DamagedRun(f"{place} is damaged or no stored run ({error}); delete it and run again") from error
        if schema > SCHEMA:
            raise InputError(f"{place} has schema {schema}, newer than this gstlib knows ({SCHEMA}); update gstlib")
        frame = table.to_pandas()
        spec = RunSpec.from_json(text)
        if _digest(text, about, frame) != digest or spec.id != run_id:
            raise DamagedRun(f"{place} is not as it was written; delete it and run again")
        return Run(spec, json.loads(about), {name: _rows(frame, name) for name in TABLES})

    def load(self, ids: Iterable[str], table: str) -> tuple[pd.DataFrame, list[str]]:
        """One table of many runs, with a column `run`; and the ids that are missing."""
        frames, missing = [], []
        for run_id in ids:
            try:
                frames.append(self.read(run_id).tables[table].assign(run=run_id))
            except KeyError:
                missing.append(run_id)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(), missing


def _rows(frame: pd.DataFrame, table: str) -> pd.DataFrame:
    """The rows of one table, without the columns that only others have, whole numbers whole again."""
    rows = frame[frame["table"] == table].drop(columns="table").dropna(axis=1, how="all").reset_index(drop=True)
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

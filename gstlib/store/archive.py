"""Stored runs packed into a zip archive, and taken from one, which may come from anyone."""

import os
import re
import shlex
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from gstlib import files
from gstlib.errors import InputError, plain
from gstlib.store.runs import LARGEST, NewerSchema, Store, parse, same_rows

# of the other methods a few bytes may become gigabytes in one step
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BROKEN = (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)


def export(store: Store, place: str | os.PathLike, ids: Iterable[str] | None = None) -> int:
    """How many runs of `store` (of `ids`, or all) were packed into an archive at `place`, each verified first.

    Damaged and newer ones are left out, with a message.  Raises `InputError`
    where none is left, `place` cannot be written, or lies among the stored runs.
    """
    place, packed = Path(place), []
    if Path(os.path.realpath(store.folder)) in Path(os.path.realpath(place)).parents:
        raise InputError(f"an archive at {place} would lie among the stored runs; name another place")

    def write(file) -> None:
        with zipfile.ZipFile(file, "w", strict_timestamps=False) as archive:  # files may be of 1970
            for run_id, _ in store.runs(ids):
                archive.write(store.file(run_id), f"runs/{run_id}.parquet")
                packed.append(run_id)
        if not packed:
            raise InputError(f"no run to export in {store.path}; see what is stored with: "
                             f"python -m gstlib status --results {shlex.quote(os.fspath(store.path))}")

    try:
        files.write_output(place, write)
    except OSError as error:
        raise InputError(f"runs could not be exported to {place}: {error.strerror or error}") from error
    return len(packed)


def import_(store: Store, place: str | os.PathLike) -> tuple[list[str], list[str], dict[str, str]]:
    """What became of the runs in an archive that `export` made: (ids added, ids there already, refused: why by name).

    Each run is verified before it is stored.  A run that is here already
    stays as it is; where the archive's has other rows (wall-clock seconds
    aside) it is refused.  Names in the archive never become paths.  Raises
    `InputError` for what is no archive, and where the store cannot be written.
    """
    added, known, refused = [], [], {}
    try:
        if not os.path.isfile(place):  # a pipe or a device may have no end
            raise ValueError("it is no file")
        archive = zipfile.ZipFile(place)
    except _BROKEN as error:
        raise InputError(f"{place} is no archive of runs ({plain(error)}); "
                         f"make one with: python -m gstlib export --archive {shlex.quote(os.fspath(place))}") from error
    store.check_writable()
    with archive:
        for entry in archive.infolist():
            name, match = plain(entry.filename), re.fullmatch(r"runs/([0-9a-f]{16})\.parquet", entry.filename)
            try:
                if not match or entry.compress_type not in _METHODS:
                    raise ValueError("compressed as export never does" if match else "not a stored run's name")
                with archive.open(entry) as member:
                    content = member.read(LARGEST + 1)
                run = parse(content, name, match[1])
            except _BROKEN as error:
                refused[name] = plain(error)
                continue
            try:
                stored = store.place(match[1], content)
            except NewerSchema as error:
                refused[match[1]] = plain(error, 1000)
                continue
            if stored is not None and not same_rows(run, stored):
                refused[match[1]] = "is stored here with other rows; the stored one was kept"
            else:
                (added if stored is None else known).append(match[1])
    return added, known, refused

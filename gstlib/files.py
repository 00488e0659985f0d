"""Files that appear whole or not at all, whoever is killed in the midst of writing them."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

_ABANDONED = 24 * 3600  # seconds after which no writer is at work on a temporary file any more


def write_whole(place: Path, write: Callable[[IO[bytes]], object], replace: bool = True) -> None:
    """Let `write` fill a file beside `place`, then put it there, on the disk before this returns.

    Raises `OSError` where that cannot be done, `FileExistsError` where
    something is there and `replace` is False; then nothing has changed.
    """
    handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        if replace:
            os.replace(temporary, place)
        else:
            _link(temporary, place)
    finally:
        with suppress(OSError):
            os.unlink(temporary)
    _sync(place.parent)


def _link(temporary: str, place: Path) -> None:
    """Give a finished file its name where nothing has that name yet."""
    try:
        os.link(temporary, place)
    except FileExistsError:
        if not os.path.samefile(temporary, place):  # a network file system may do it and yet say that it was done
            raise
    except OSError:
        # not every file system knows hard links; who comes between these two lines writes a whole file too
        if place.exists():
            raise FileExistsError(place) from None
        os.replace(temporary, place)


def _sync(folder: Path) -> None:
    with suppress(OSError):  # not every system lets a folder be synced, and the file is in its place
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def temporaries(folder: Path) -> list[Path]:
    """Files that `write_whole` is at work on in `folder`, or that its killed writers left, sorted."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        return sorted(Path(e.path) for e in entries if e.name.startswith(".") and e.name.endswith(".tmp"))
    return []


def sweep(folder: Path) -> None:
    """Remove from `folder` what killed writers left there more than a day ago."""
    with suppress(OSError):
        with tempfile.TemporaryFile(dir=folder) as file:
            # what the folder's own machine takes for now: another's clock may be wrong
            now = os.fstat(file.fileno()).st_mtime
        for left in temporaries(folder):
            with suppress(OSError):
                found = left.lstat()
                if stat.S_ISREG(found.st_mode) and now - found.st_mtime > _ABANDONED:
                    left.unlink()

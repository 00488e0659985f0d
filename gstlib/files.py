"""Files that appear whole or not at all, whoever is killed in the midst of writing them."""

import os
import re
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

_ABANDONED = 24 * 3600  # seconds after which no writer is at work on a temporary file any more


def write_whole(place: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file beside `place`, then put it there, on the disk before this returns.

    Raises `OSError` where that cannot be done, or where something is there
    that is no regular file, like a device or a link; then nothing has changed.
    """
    if os.path.lexists(place) and not stat.S_ISREG(place.lstat().st_mode):
        raise FileExistsError(17, "something is there that is no regular file", str(place))
    handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name[:50]}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, place)
    finally:
        with suppress(OSError):
            os.unlink(temporary)
    with suppress(OSError):  # not every system lets a folder be synced, and the file is in its place
        folder = os.open(place.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_output(place: Path, write: Callable[[IO[bytes]], object]) -> None:
    """`write_whole` where a user said, unless that is where a stored run belongs, in whatever results folder."""
    if re.fullmatch(r"[0-9a-f]{16}\.parquet", place.name):
        raise FileExistsError(17, "that is the name of a stored run's file", str(place))
    write_whole(place, write)


def sweep(folder: Path) -> None:
    """Remove from `folder` what killed writers left there more than a day ago."""
    for left in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()

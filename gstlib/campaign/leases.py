"""Who is training what: a locked file a run in a shared folder, so that no run is trained twice at a time."""

from __future__ import annotations

import os
from contextlib import suppress
from errno import ENOLCK, ENOTSUP
from pathlib import Path

from filelock import FileLock, Timeout

from gstlib.errors import InputError


class Leases:
    """The runs that this process has locked in `folder`; a context manager that unlocks all.

    The system frees the locks of a process that ends, however it ends, and keeps those of one that is suspended.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder, self.held = Path(folder), {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"runs cannot be locked in {folder} ({error.strerror}); remove what is there") from error

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *_) -> None:
        for run_id in list(self.held):
            self.release(run_id)

    def take(self, run_id: str) -> bool:
        """Whether `run_id` is this process's from now on. Raises `InputError` where its file cannot be locked."""
        lock = FileLock(self.folder / f"{run_id}.lock", mode=0o666)  # others may share the folder
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        except OSError as error:
            if error.errno in (ENOLCK, ENOTSUP):  # a file system without locks: another may train it too, for nothing
                self.held[run_id] = lock
                return True
            raise InputError(f"{lock.lock_file} cannot be locked ({error.strerror}); remove it") from error
        self.held[run_id] = lock
        return True

    def release(self, run_id: str) -> None:
        """Give `run_id` back; nothing where it is not held."""
        if lock := self.held.pop(run_id, None):
            with suppress(OSError):
                os.unlink(lock.lock_file)  # while locked: who has it open sees that it is no lock any more
            lock.release()

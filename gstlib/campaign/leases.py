"""Who is training what: leases in a shared folder, so that no run is trained twice at a time.

A lease is a file `<id>.<n>` that its owner made (with O_EXCL, so that one
alone succeeds) and keeps changing.  No clock is compared with another: a
lease counts as abandoned when whoever wants it has watched it for `patience`
seconds, by its own monotonic clock, without seeing it change, or at once when
the owner was a process of this very machine that is gone.  Taking over makes
`<id>.<n+1>`, which again one alone can; an owner that was only asleep sees
that and gives the run up.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from gstlib.errors import InputError


class Leases:
    """Leases of this process in `folder`, renewed by a thread until released; a context manager that releases all.

    `patience`: seconds without a sign of life after which another's lease may be taken over.
    """

    def __init__(self, folder: str | os.PathLike, patience: float = 60.0):
        self.folder, self.patience = Path(folder), patience
        self._owner = {"owner": uuid.uuid4().hex, **_process(os.getpid())}
        self._held: dict[str, int] = {}
        self._watched: dict[str, tuple[str, float]] = {}
        self._lost: set[str] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._beats = 0
        self._thread = threading.Thread(target=self._renew, daemon=True, name="leases")

    def __enter__(self) -> Leases:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()
        for run_id in list(self._held):
            self.release(run_id)

    def take(self, run_id: str) -> bool:
        """Whether `run_id` is this process's from now on. Raises `InputError` where the folder cannot be written."""
        if run_id in self._held:
            return True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            newest = self._newest(run_id)
            if newest >= 0 and not self._abandoned(run_id, newest):
                return False
            handle = os.open(self._file(run_id, newest + 1), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        except OSError as error:
            raise InputError(f"leases cannot be written to {self.folder}: {error.strerror or error}") from error
        with os.fdopen(handle, "wb") as file:
            file.write(self._text())
        watched = self._watched.pop(run_id, None)
        if newest >= 0 and (watched is None or self._read(run_id, newest) != watched[0]):
            # what was watched has gone, and another has begun a count of its own meanwhile
            self._file(run_id, newest + 1).unlink(missing_ok=True)
            return False
        with self._lock:
            self._held[run_id] = newest + 1
        return True

    def release(self, run_id: str) -> None:
        """Give `run_id` back, with what earlier owners left; nothing where it is not held."""
        with self._lock:
            mine = self._held.pop(run_id, None)
            self._lost.discard(run_id)
        if mine is None:
            return
        for number in range(mine + 1):  # the newest last: as long as any is there, nobody starts a new count
            with suppress(OSError):
                self._file(run_id, number).unlink(missing_ok=True)

    def lost(self, run_id: str) -> bool:
        """Whether another took `run_id` over while this process gave no sign of life."""
        return run_id in self._lost

    def _file(self, run_id: str, number: int) -> Path:
        return self.folder / f"{run_id}.{number}"

    def _newest(self, run_id: str) -> int:
        numbers = [p.suffix[1:] for p in self.folder.glob(f"{run_id}.*")]
        return max((int(n) for n in numbers if n.isdecimal()), default=-1)

    def _text(self) -> bytes:
        self._beats += 1
        return json.dumps(self._owner | {"beat": f"{self._beats:012d}"}).encode()

    def _read(self, run_id: str, number: int) -> str | None:
        try:
            # opened anew each time: that is when network file systems look for what others wrote
            return f"{number} {self._file(run_id, number).read_text(errors='replace')}"
        except FileNotFoundError:
            return None

    def _abandoned(self, run_id: str, number: int) -> bool:
        if (text := self._read(run_id, number)) is None:
            return False  # released this moment; the next call takes it
        now = time.monotonic()
        seen, since = self._watched.setdefault(run_id, (text, now))
        if seen != text:
            self._watched[run_id] = (text, now)
            return False
        return now - since >= self.patience or _gone(text.partition(" ")[2])

    def _renew(self) -> None:
        while not self._ended.wait(self.patience / 6):
            with self._lock:
                held = dict(self._held)
            for run_id, number in held.items():
                # where the folder is out of reach for a while, the next beat tries again
                with suppress(OSError):
                    if self._newest(run_id) > number:
                        self._lost.add(run_id)
                    elif run_id in self._held:
                        with open(self._file(run_id, number), "r+b") as file:
                            file.write(self._text())


def _process(pid: int) -> dict:
    """What tells process `pid` of this boot and this process namespace from every other; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state in "ZX":  # killed, and only not yet waited for
            return {}
        started = rest[18]
        return {"machine": f"{boot} {os.readlink('/proc/self/ns/pid')}", "pid": pid, "started": started}
    except (OSError, IndexError):
        return {}


def _gone(text: str) -> bool:
    """Whether a lease's text names a process of this machine that is no more."""
    try:
        owner = json.loads(text)
        here = _process(os.getpid())
        if not here or owner.get("machine") != here["machine"] or not isinstance(owner["pid"], int):
            return False
        return _process(owner["pid"]).get("started") != owner["started"]
    except (ValueError, KeyError, AttributeError, TypeError):
        return False

"""Runs in progress on disk: what a run needs to go on as if it had never been interrupted.

A file `<id>.ckpt` is a line of JSON (which run, how far, made with what, a
sha256 over all of it) and then what `torch.save` makes of the state, read
back with `weights_only=True`, so that a planted file can run no code.  It is
written beside its place and renamed into it: after a kill at any moment there
is the old checkpoint or the new one, never half of either.
"""

import hashlib
import io
import json
import os
import zipfile
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from gstlib.errors import InputError, plain, say
from gstlib.files import write_whole
from gstlib.training.provenance import processor

SCHEMA = 1
_HEADER, _LARGEST = 4096, 2**31  # bytes that the first line and the file may have at most; VGG19's has 2**28
_SOURCES = ("*.py", "network/*.py", "data/*.py", "training/*.py")  # what decides what training computes


@cache
def code() -> str:
    """sha256 (hex) over the sources that decide what training computes."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for place in sorted(place for pattern in _SOURCES for place in package.glob(pattern)):
        digest.update(place.name.encode() + b"\0" + place.read_bytes())
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints under `folder`, for runs on a device of type `device`; `every`: seconds between two of a run.

    A checkpoint of other code, another torch, another type of device or of CPU
    is passed over, and so is, with a message, one that is not as it was
    written: a run is wholly of one kind or it is begun anew.
    """

    def __init__(self, folder: str | os.PathLike, device: str, every: float = 300.0):
        if not every > 0:
            raise InputError(f"the time between checkpoints must be a positive number of seconds, not {every}")
        self.folder, self.every = Path(folder), every
        self._failing = False
        self._told: set[tuple[str, str]] = set()
        self.kind = {"code": code(), "torch": version("torch"), "device": device}
        if device == "cpu":
            self.kind["processor"] = ", ".join(processor(torch.device(device)).values())

    def file(self, run_id: str) -> Path:
        """Where the checkpoint of `run_id` is kept."""
        return self.folder / f"{run_id}.ckpt"

    def position(self, run_id: str) -> tuple[int, int]:
        """(epoch, steps of it done) at which a run would go on; (0, 0) without a checkpoint that it can use."""
        found = self._open(run_id)
        return (0, 0) if found is None else (found[0]["epoch"], found[0]["step"])

    def load(self, run_id: str) -> dict | None:
        """The state last saved for `run_id`, its tensors on the CPU; None without a checkpoint that it can use."""
        if not (found := self._open(run_id)):
            return None
        try:
            if any(entry.compress_type for entry in zipfile.ZipFile(io.BytesIO(found[1])).infolist()):
                raise ValueError("it is compressed")  # and may become much larger; torch.save compresses nothing
            return torch.load(io.BytesIO(found[1]), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for bytes that are no state
            return self.pass_over(run_id, error)

    def save(self, run_id: str, epoch: int, step: int, state: dict) -> bool:
        """Keep `state`: tensors, numbers, texts, lists and dicts of them. Where the folder cannot take it, the last
        checkpoint stays, a message says so, and training goes on; returns whether it was kept."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        head = {"gstlib.checkpoint": SCHEMA, "id": run_id, "epoch": epoch, "step": step, "kind": self.kind}
        head["sha256"] = digest(head, content)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.file(run_id), lambda file: file.writelines([json.dumps(head).encode(), b"\n", content]))
        except OSError as error:
            if not self._failing:  # once is enough until one succeeds again
                say(f"run {run_id}: no checkpoint could be written to {self.folder} ({error.strerror or error}); "
                     "training goes on, the last one stays")
            self._failing = True
            return False
        self._failing = False
        return True

    def remove(self, run_id: str) -> None:
        """Forget a run: its checkpoint and what a killed writer left of one."""
        with suppress(OSError):
            self.file(run_id).unlink(missing_ok=True)
            for left in self.folder.glob(f".{run_id}*.tmp"):
                left.unlink(missing_ok=True)

    def _open(self, run_id: str) -> tuple[dict, bytes] | None:
        """Head and content of a whole checkpoint that a run on this kind of device and code can use."""
        place = self.file(run_id)
        if not os.path.lexists(place):
            return None
        try:
            if not place.is_file() or place.stat().st_size > _LARGEST:  # a pipe or a device could be read for ever
                raise ValueError("it is no file, or larger than any run's")
            with open(place, "rb") as file:
                head = json.loads(file.readline(_HEADER))
                schema, stated = head["gstlib.checkpoint"], head.pop("sha256")
                if isinstance(schema, int) and schema > SCHEMA:
                    raise ValueError("a newer gstlib wrote it")
                content = file.read()
            if digest(head, content) != stated:
                raise ValueError("its digest is another")
            if head["id"] != run_id or not all(type(head[name]) is int and 0 <= head[name] < _LARGEST
                                               for name in ("epoch", "step")):
                raise ValueError(f"it is of run {head['id']}")
            other = next((name for name in self.kind if head["kind"].get(name) != self.kind[name]), None)
            if other:
                raise ValueError(f"it was made with another {other}")
            return head, content
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return self.pass_over(run_id, error)

    def pass_over(self, run_id: str, why: object) -> None:
        """Say, once, why the checkpoint of `run_id` is of no use."""
        if (run_id, text := plain(why)) not in self._told:
            say(f"checkpoint {self.file(run_id)} is passed over ({text}); the run begins anew")
        self._told.add((run_id, text))


def digest(head: dict, content) -> str:
    """sha256 (hex) over a checkpoint's head, its own digest apart, and its content."""
    found = hashlib.sha256(json.dumps(head, sort_keys=True).encode() + b"\n")
    found.update(content)
    return found.hexdigest()

"""Which data set a name or a path means, and what is known of it without decoding it or importing torch.

What was found is kept in a cache, under a key that cannot stay the same when
the files change (path, inode, size, times) or the code that read them does.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from gstlib import files
from gstlib.errors import InputError, check_choice
from gstlib.spec import DATASETS, DataSpec

CIFAR10 = ("cifar-10-batches-py", "cifar-10-python.tar.gz")


class Known(NamedTuple):
    """A data set by name, fingerprint and number of classes."""

    name: str
    fingerprint: str
    classes: int


def locate(source: str | os.PathLike) -> tuple[str, Path]:
    """The data set's kind ("digits", "cifar10" or "cifar10-folder") and the folder or archive that `source` means.

    Raises `InputError` for an unknown name and for a path where nothing is.
    """
    text = os.fspath(source)
    home = Path(os.environ.get("GSTLIB_DATA") or "data")
    if text in DATASETS and text != "cifar10-folder":
        return text, home
    path = home / text if text == "cifar10-folder" else Path(text)
    if not path.exists():
        if os.sep in text or text.startswith("."):
            raise InputError(f"data {text!r} does not exist; give a folder with train/<class>/* and test/<class>/*")
        check_choice("data set", text, (*DATASETS, "the path of a folder or archive"))
        raise InputError(f"data 'cifar10-folder' is looked for at {path}, which does not exist; give its path instead")
    if path.is_dir() and any((path / name).exists() for name in CIFAR10):
        return "cifar10", path
    return "cifar10-folder", path


def cache() -> Path:
    """The folder of what can be made again: decoded images and what is known of them."""
    if stated := os.environ.get("GSTLIB_CACHE"):
        return Path(stated)
    with suppress(RuntimeError):  # an account may have no home
        return Path.home() / ".cache" / "gstlib"
    return Path(tempfile.gettempdir()) / f"gstlib-{os.getuid()}"


def place(kind: str, path: Path, ending: str) -> Path:
    """Where the cache keeps something of a set as its files are now. Raises `OSError` where they cannot be looked at."""
    if kind == "digits":
        now: object = version("scikit-learn")
    else:
        now = [str(path.resolve()), _stamps(path / CIFAR10[0] if kind == "cifar10" else path)]
    code = Path(__file__).with_name("sources.py").read_text()
    return cache() / f"{hashlib.sha256(json.dumps([kind, now, code]).encode()).hexdigest()[:32]}.{ending}"


def _stamps(place: Path | str, depth: int = 3) -> list:
    """What tells whether a file, or a folder's files of train/<class>/* and test/<class>/*, are what they were."""
    if not os.path.isdir(place):
        known = os.stat(place)  # not even who sets the time of change back can do so with st_ctime
        return [known.st_size, known.st_mtime_ns, known.st_ctime_ns, known.st_ino]
    with os.scandir(place) as entries:
        return [[e.name, _stamps(e.path, depth - 1)] for e in sorted(entries, key=lambda e: e.name)
                if depth or not e.is_dir()]


def recall(source: str | os.PathLike) -> Known | None:
    """What `data.load(source)` found, where nothing has changed since. Raises `InputError` as `locate` does."""
    kind, path = locate(source)
    with suppress(OSError, TypeError, ValueError, RecursionError):
        known = Known(**json.loads(place(kind, path, "json").read_text()))
        DataSpec(*known)  # raises where no set can be like this
        return known
    return None


def remember(kind: str, path: Path, known: Known) -> None:
    """Keep what was found at `path`, for `recall`; a cache that cannot be written is done without."""
    with suppress(OSError):
        kept = place(kind, path, "json")
        kept.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(kept, lambda file: file.write(json.dumps(known._asdict()).encode()))

"""Which data set a name or a path means, and its fingerprint, told again without decoding it or importing torch.

What `data.load` found is remembered beside its decoded images, under a key
made of the names, sizes and times of the files that it read and of the code
that read them.  Whatever has changed is loaded anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from gstlib import files
from gstlib.errors import InputError, check_choice
from gstlib.spec import DATASETS, DataSpec

_CIFAR10 = ("cifar-10-batches-py", "cifar-10-python.tar.gz")


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
    home = Path(os.environ.get("GSTLIB_DATA", "data"))
    if text in ("digits", "cifar10"):
        return text, home
    path = home / text if text == "cifar10-folder" else Path(text)
    if not path.exists():
        if os.sep in text or text.startswith("."):
            raise InputError(f"data {text!r} does not exist; give a folder with train/<class>/* and test/<class>/*")
        check_choice("data set", text, (*DATASETS, "the path of a folder or archive"))
        raise InputError(f"data 'cifar10-folder' is looked for at {path}, which does not exist; give its path instead")
    if path.is_dir() and any((path / name).exists() for name in _CIFAR10):
        return "cifar10", path
    return "cifar10-folder", path


def cache() -> Path:
    """The folder of what can be made again: decoded images and what is known of them."""
    return Path(os.environ.get("GSTLIB_CACHE", Path.home() / ".cache" / "gstlib"))


def listing(folder: str | os.PathLike, depth: int = 3, below: str = "") -> list[tuple[str, int, int]]:
    """(path, size in bytes, time of change in ns) of the files of train/<class>/* and test/<class>/*, sorted."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                found += listing(entry.path, depth - 1, f"{below}{entry.name}/") if depth > 1 else []
            elif entry.is_file():
                known = entry.stat()
                found.append((below + entry.name, known.st_size, known.st_mtime_ns))
    return sorted(found)


def images_file(path: Path) -> Path:
    """Where the decoded images of a folder or an archive are kept for as long as it stays the same."""
    if path.is_file():
        with open(path, "rb") as file:
            key = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        key = hashlib.sha256(json.dumps(listing(path)).encode()).hexdigest()
    return cache() / f"images-{key[:32]}.npz"


def recall(source: str | os.PathLike) -> Known | None:
    """What `data.load(source)` would find, where that is known and nothing has changed since.

    Raises `InputError` as `locate` does.
    """
    place = _memory(*locate(source))
    with suppress(OSError, KeyError, TypeError, ValueError, RecursionError):
        values = json.loads(place.read_text())
        images, known = values.pop("images"), Known(**values)
        DataSpec(*known)  # raises where no set can be like this
        # the fingerprint of a folder is that of its decoded images, once they are gone it is not known
        if images is None or images == [images[0], *_stamp(cache() / Path(images[0]).name)]:
            return known
    return None


def remember(source: str | os.PathLike, known: Known, images: Path | None = None) -> None:
    """Keep what `data.load(source)` found, for `recall`; `images` is the file of decoded images that it rests on."""
    place = _memory(*locate(source))
    with suppress(OSError):
        values = known._asdict() | {"images": images and [images.name, *_stamp(images)]}
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(place, lambda file: file.write(json.dumps(values).encode()))


def identify(source: str | os.PathLike) -> Known:
    """What `data.load(source)` finds: recalled, or else by loading, which imports torch."""
    known = recall(source)
    if known is None:
        from gstlib import data

        images = data.load(source)
        known = Known(images.name, images.fingerprint, images.classes)
    return known


def _stamp(place: Path) -> list[int]:
    known = place.stat()
    return [known.st_size, known.st_mtime_ns]


def _memory(kind: str, path: Path) -> Path:
    """Where it is kept what is known of a set as it is now."""
    code = hashlib.sha256(Path(__file__).with_name("sources.py").read_bytes()).hexdigest()
    files_now: object = None
    with suppress(OSError):
        if kind == "digits":
            package = importlib.util.find_spec("sklearn")  # finds it without importing it, which takes a second
            place = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
            files_now = [str(place), *_stamp(place)]
        elif kind == "cifar10":
            files_now = [str(path.resolve()), listing(path / _CIFAR10[0])]
        elif path.is_file():
            known = path.stat()
            # not even who sets the time of change back can do so with st_ctime
            files_now = [str(path.resolve()), *_stamp(path), known.st_ctime_ns, known.st_ino]
        else:
            files_now = [str(path.resolve()), listing(path)]
    key = hashlib.sha256(json.dumps([kind, files_now, code]).encode()).hexdigest()
    return cache() / f"known-{key[:32]}.json"

"""Which data set a name or a path means, and what is known of it without decoding it or importing torch.

What was found is kept in a cache, under a key that cannot stay the same when
the files change (path, inode, size, times) or what read them does.
"""

import hashlib
import json
import os
import stat
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from gstlib import files
from gstlib.errors import InputError, check_choice
from gstlib.spec import DATASETS, DataSpec

# what torchvision reads and fetches below a folder, by which a folder is known to hold the set
PUBLISHED = {"cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
             "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
             "svhn": ("train_32x32.mat", "test_32x32.mat"),
             "fashion-mnist": ("FashionMNIST/raw",)}
_WHOLE = {"digits": (1_442, 355), "svhn": (73_257, 26_032), "fashion-mnist": (60_000, 10_000)}


class Known(NamedTuple):
    """A data set by name, fingerprint and number of classes."""

    name: str
    fingerprint: str
    classes: int


def whole(spec: DataSpec) -> tuple[int, int]:
    """Training and test images of the whole set; a folder, which may hold any number, is taken for CIFAR-10's."""
    return _WHOLE.get(spec.name, (50_000, 10_000))


def sizes(spec: DataSpec) -> tuple[int, int]:
    """Training and test images of a run; where the specification says "all", those of the whole set."""
    return tuple(asked or there for asked, there in zip((spec.train_size, spec.test_size), whole(spec)))


def locate(source: str | os.PathLike) -> tuple[str, Path]:
    """The data set's kind (one of `DATASETS`) and the folder or archive that `source` means.

    Raises `InputError` for an unknown name, for a path where nothing is and for a folder that holds several sets.
    """
    text = os.fspath(source)
    home = Path(os.environ.get("GSTLIB_DATA") or "data")
    if text in DATASETS and text != "cifar10-folder":
        return text, home
    path = home / text if text == "cifar10-folder" else Path(text)
    if not os.path.exists(path):  # a text that no path can be is none
        if os.sep in text or text.startswith("."):
            raise InputError(f"data {text!r} does not exist; give a folder with train/<class>/* and test/<class>/*")
        check_choice("data set", text, (*DATASETS, "the path of a folder or archive"))
        raise InputError(f"data 'cifar10-folder' is looked for at {path}, which does not exist; give its path instead")
    held = [kind for kind, names in PUBLISHED.items() if any(os.path.exists(path / name) for name in names)]
    if len(held) > 1:
        raise InputError(f"data {text!r} holds several sets; set GSTLIB_DATA to it and choose one: {', '.join(held)}")
    return (*held, "cifar10-folder")[0], path


def cache() -> Path:
    """The folder of what can be made again: decoded images and what is known of them."""
    if stated := os.environ.get("GSTLIB_CACHE"):
        return Path(stated)
    with suppress(RuntimeError):  # an account may have no home
        return Path.home() / ".cache" / "gstlib"
    return Path(tempfile.gettempdir()) / f"gstlib-{os.getuid()}"


def counts(name: str) -> bool:
    """Whether a file or folder of this name belongs to a set: what is hidden, or an index of thumbnails, does not."""
    return not name.startswith(".") and name.lower() not in ("thumbs.db", "desktop.ini")


def key(kind: str, path: Path) -> str | None:
    """What is never the same for two sets, nor for two states of one; None where there are no files to look at.

    Raises `InputError` for a file that cannot be looked at and for what is neither a file nor a folder.
    """
    if kind == "digits":
        now: object = version("scikit-learn")
    else:
        parts = (path / name for name in PUBLISHED.get(kind, ("train", "test") if path.is_dir() else ("",)))
        now = [_stamps(part) for part in parts if part.exists()]
    code = Path(__file__).with_name("sources.py").read_text("utf-8")
    whole = [kind, str(path.resolve()), now, code, version("pillow")]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:32] if now else None


def _stamps(top: Path) -> list:
    """What tells whether a file, or any file that counts in a folder, is what it was."""
    def failed(error: OSError):
        raise error

    try:
        found = [os.fspath(top)]
        if top.is_dir():
            found = []
            # as torchvision walks, except that a folder that cannot be read is not passed over
            for folder, folders, names in os.walk(top, followlinks=True, onerror=failed):
                folders[:] = sorted(filter(counts, folders))
                found += [os.path.join(folder, name) for name in sorted(filter(counts, names))]
        stamps = []
        for name in found:
            known = os.stat(name)  # not even who sets the time of change back can do so with st_ctime
            if not stat.S_ISREG(known.st_mode):
                raise InputError(f"data {name} is neither a file nor a folder; remove it")
            stamps.append([name, known.st_size, known.st_mtime_ns, known.st_ctime_ns, known.st_ino])
        return stamps
    except OSError as error:
        raise InputError(f"data {top} cannot be read: {error}") from error


def kept(key: str | None, ending: str) -> Path:
    """Where the cache keeps something of the set with this key. Raises `TypeError` where there is none."""
    return cache() / (key + f".{ending}")


def recall(source: str | os.PathLike) -> Known | None:
    """What `data.load(source)` found, where nothing has changed since. Raises `InputError` as `locate` and `key` do."""
    now = key(*locate(source))
    with suppress(OSError, TypeError, ValueError, RecursionError):  # also where there is no key
        known = Known(**json.loads(kept(now, "json").read_text()))
        DataSpec(*known)  # raises where no set can be like this
        return known
    return None


def remember(key: str | None, known: Known) -> None:
    """Keep what was found under `key`, for `recall`; a cache that cannot be written is done without."""
    with suppress(OSError, TypeError):  # also where there is no key
        place = kept(key, "json")
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(place, lambda file: file.write(json.dumps(known._asdict()).encode()))

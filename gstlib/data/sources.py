"""Data sets as uint8 tensors, proven by a fingerprint.

* `digits`: scikit-learn's 1,797 handwritten digits, scaled up to 32x32x3, every
  fifth image of each class for testing; ships with a package, needs no files.
* `cifar10`, `cifar100`, `svhn`: as published, under `root`, fetched by torchvision
  and checked against the checksums that it knows.  SVHN without its "extra" part.
* `fashion-mnist`: likewise, its four files in FashionMNIST/raw.  28x28 grey
  becomes 32x32x3 by two black pixels on every side (its ground is black) and
  three equal channels, so that every published pixel stays as it is.
* `cifar10-folder`: any tree `train/<class>/*` and `test/<class>/*` of images
  under `root`, or a tar archive of one.  Decoded once; the decoded arrays are
  kept in a cache for as long as the files stay the same.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import lzma
import os
import sys
import tarfile
import tempfile
import zipfile
import zlib
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gstlib import files
from gstlib.data import identity
from gstlib.errors import InputError, say
from gstlib.spec import DataSpec

SIDE = 32

# what an archive may claim, looked at before anything is unpacked; headers of long names are read into memory whole
_MEMBERS, _UNPACKED, _HEADER = 200_000, 8 * 2**30, 2**16
_IN_MEMORY = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
# what an archive that is damaged, or made to do harm, raises
_BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, LookupError, ArithmeticError, MemoryError, RecursionError,
           lzma.LZMAError, zlib.error)
# PostScript is a format too, and reading it would run a program
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_PARTS = ("train_x", "train_y", "test_x", "test_y")

# shown wherever a number from a set is: the published ones, and one whose origin is known by its pixels
TITLES = {
    "digits": "scikit-learn digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN",
    "fashion-mnist": "Fashion-MNIST",
    "ae3bcfea977962c9fbcb2ca53dcc6e063304f316ceb9236ed65ba13dd56c88d9": "CIFAR-10, JPEG re-encoding",
}


@dataclass(frozen=True)
class Images:
    """A data set in memory: uint8 images (n, 3, 32, 32), int64 labels (n,), fingerprint and title."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    name: str
    fingerprint: str
    title: str

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train_y.max()) + 1

    @property
    def known(self) -> identity.Known:
        """Name, fingerprint and number of classes."""
        return identity.Known(self.name, self.fingerprint, self.classes)

    def to(self, device: torch.device) -> Images:
        """The same images on `device`; the object itself where they are there already."""
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors there name it
        if self.train_x.device == device:
            return self
        moved = replace(self, **{name: getattr(self, name).to(device) for name in _PARTS})
        moved.__dict__["statistics"] = self.statistics  # computed where the sums are exact and cheap
        return moved

    @functools.cached_property
    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel over the training images, (1, 3, 1, 1) float32 each.

        From counts of the 256 pixel values: exact whatever the device or the order of summation.
        """
        values = torch.arange(256, dtype=torch.float64)
        counts = torch.stack([torch.bincount(channel.flatten().long(), minlength=256)
                              for channel in self.train_x.cpu().unbind(1)]).double()
        mean = (counts * values).sum(1) / counts.sum(1)
        sd = ((counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1)).sqrt()
        return mean.float().view(1, 3, 1, 1), sd.clamp(min=1.0).float().view(1, 3, 1, 1)

    def subset(self, spec: DataSpec) -> Images:
        """The class-balanced prefix that `spec` asks for. Raises `InputError` where the set is another or too small."""
        train, test = self._chosen(spec)
        return replace(self, train_x=self.train_x[train], train_y=self.train_y[train],
                       test_x=self.test_x[test], test_y=self.test_y[test])

    def unseen(self, spec: DataSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels that a run of `spec` is not trained on: all test images, then the unused training images."""
        rest = torch.ones(len(self.train_y), dtype=torch.bool)
        rest[self._chosen(spec)[0]] = False
        return torch.cat([self.test_x, self.train_x[rest]]), torch.cat([self.test_y, self.train_y[rest]])

    def _chosen(self, spec: DataSpec) -> tuple[torch.Tensor, torch.Tensor]:
        if spec.fingerprint != self.fingerprint:
            raise InputError(f"the run asks for data {spec.name} with fingerprint {spec.fingerprint[:12]}…, but what "
                             f"is here has {self.fingerprint[:12]}…; point --data at the set it was specified with")
        return (_balanced(self.train_y, spec.train_size, spec.classes, "training"),
                _balanced(self.test_y, spec.test_size, spec.classes, "test"))


def _balanced(labels: torch.Tensor, size: int | None, classes: int, part: str) -> torch.Tensor:
    if size is None:
        return torch.arange(len(labels))
    quota = [size // classes + (label < size % classes) for label in range(classes)]
    chosen = []
    for label, wanted in enumerate(quota):
        indices = (labels == label).nonzero().squeeze(1)
        if len(indices) < wanted:
            raise InputError(f"{size} {part} images need {wanted} of class {label}, but there are {len(indices)}; "
                             "use a larger data set or another profile")
        chosen.append(indices[:wanted])
    return torch.cat(chosen).sort().values


def fingerprint(train_x, train_y, test_x, test_y) -> str:
    """sha256 (hex) over shapes, pixels and labels of both parts, uint8 images and int64 labels."""
    digest = hashlib.sha256()
    for array, dtype in ((train_x, np.uint8), (train_y, np.int64), (test_x, np.uint8), (test_y, np.int64)):
        array = np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("<"))
        digest.update(repr(array.shape).encode())
        digest.update(array.data)
    return digest.hexdigest()


def load(source: str | os.PathLike = "digits", download: bool = True) -> Images:
    """A data set by name or path.

    `source` is "digits", "cifar10", "cifar100", "svhn" or "fashion-mnist"
    (files under the folder named by the environment variable GSTLIB_DATA,
    else ./data; fetched when absent and `download`), or the path of a folder
    or tar archive: one that holds the files of a published set counts as that
    set, any other as `cifar10-folder`.

    Raises `InputError` for an unknown name, for published files that are
    missing or damaged, for a folder that is missing, empty, lacks a part, has
    one class, or holds a file that is no image, and for files that change
    while they are read.
    """
    kind, path = identity.locate(source)
    key = identity.key(kind, path)
    if kind == "digits":
        arrays = _digits()
    elif kind == "cifar10-folder":
        arrays = _folder(path, key)
    else:
        arrays = _published(kind, path, download and os.fspath(source) == kind)
    proof = fingerprint(*arrays)
    title = TITLES.get(proof) or TITLES.get(kind) or f"images from {path.resolve().name}"
    images = Images(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays), kind, proof, title)
    if identity.key(kind, path) == key:  # else what was found is that of another state, or was fetched just now
        identity.remember(key, images.known)
    elif kind == "cifar10-folder":
        raise InputError(f"data {path} changed while it was read; try again when nothing writes there")
    return images


def _digits() -> list[np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 8x8 pixels of 0 … 16, each blown up to 4x4: exact integers, no interpolation to differ between versions
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    images = np.repeat(images[:, None], 3, axis=1)
    labels = bunch.target.astype(np.int64)
    rank = np.zeros_like(labels)
    for label in range(10):
        rank[labels == label] = np.arange((labels == label).sum())
    test = rank % 5 == 4
    return [images[~test], labels[~test], images[test], labels[test]]


def _published(kind: str, root: Path, download: bool) -> list[np.ndarray]:
    """A set as torchvision reads it. Raises `InputError` that names what is damaged, or what to put where."""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity, download_url

    cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}.get(kind)
    if cifar:
        wanted = {f"{cifar.base_folder}/{name}": md5 for name, md5 in cifar.train_list + cifar.test_list}
        wanted[f"{cifar.base_folder}/{cifar.meta['filename']}"] = cifar.meta["md5"]
        put = cifar.filename
    elif kind == "svhn":
        wanted = {datasets.SVHN.split_list[part][1]: datasets.SVHN.split_list[part][2] for part in ("train", "test")}
        put = " and ".join(wanted)
    else:
        wanted = {f"FashionMNIST/raw/{name}": md5 for name, md5 in datasets.FashionMNIST.resources}
        put = ", ".join(wanted)
    try:
        with redirect_stdout(sys.stderr):  # torchvision tells there what it fetches, and tables go to standard output
            if cifar:
                # an archive that is whole is only unpacked
                download = download or check_integrity(root / cifar.filename, cifar.tgz_md5)
                parts = [cifar(root, train, download=download and train) for train in (True, False)]
                pairs = [(part.data.transpose(0, 3, 1, 2), part.targets) for part in parts]
            elif kind == "svhn":
                parts = [datasets.SVHN(root, part, download=download) for part in ("train", "test")]
                pairs = [(part.data, part.labels) for part in parts]
            else:
                for name, md5 in wanted.items() if download else ():
                    place = root / name
                    download_url(datasets.FashionMNIST.mirrors[0] + place.name, place.parent, place.name, md5)
                if not all(check_integrity(root / name, md5) for name, md5 in wanted.items()):
                    raise RuntimeError("not all files are there")
                # images behind 16 bytes of magic number and sizes, labels behind 8
                flat = [np.frombuffer(gzip.decompress((root / name).read_bytes()), np.uint8) for name in wanted]
                pairs = [(np.pad(x[16:].reshape(-1, 1, 28, 28), ((0, 0), (0, 0), (2, 2), (2, 2))).repeat(3, axis=1), y[8:])
                         for x, y in (flat[:2], flat[2:])]
    except (RuntimeError, OSError, HTTPException) as error:
        known = wanted | ({cifar.filename: cifar.tgz_md5} if cifar else {})
        damaged = [name for name, md5 in known.items() if (root / name).exists() and not check_integrity(root / name, md5)]
        state = f"is damaged: {', '.join(damaged)}; remove that" if damaged else f"is not there: {error}; fetch it by hand"
        raise InputError(f"{TITLES[kind]} under {root.absolute()} {state} and put {put}, as published, there") from error
    return [array for x, y in pairs for array in (x, np.asarray(y, np.int64))]


def _folder(path: Path, key: str | None) -> list[np.ndarray]:
    """Images from a tree or an archive of one, through the cache of decoded arrays."""
    cached = identity.kept(key or "none", "npz")
    if os.path.exists(cached):  # also where no path can be like this
        try:
            with np.load(cached, allow_pickle=False) as arrays:
                return [arrays[name] for name in _PARTS]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
            say(f"cached images in {cached} are damaged; decoding anew")
    if path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            _unpack(path, Path(folder))
            arrays = _decode_tree(Path(folder), shown=path)
    else:
        arrays = _decode_tree(path, shown=path)
    if identity.key("cifar10-folder", path) == key:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(cached, lambda file: np.savez(file, **dict(zip(_PARTS, arrays))))
        except OSError as error:
            say(f"decoded images could not be cached in {cached.parent}: {error}")
    return arrays


class _Member(tarfile.TarInfo):
    """A member's header; those of long names and the like, which are read into memory whole, may not be large, and of
    sparse files, whose maps are, there are none. One that is damaged is an error, not the archive's end."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            header = super().frombuf(buf, encoding, errors)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:
            raise tarfile.ReadError(f"it is damaged or cut ({error})") from error
        if header.size > _HEADER and header.type in _IN_MEMORY:
            raise tarfile.HeaderError(f"a header claims {header.size} bytes")
        if header.type == tarfile.GNUTYPE_SPARSE:
            header._proc_gnusparse_10()
        return header

    def _proc_gnusparse_10(self, *_):
        raise tarfile.HeaderError("a file in it is sparse")


def _unpack(path: Path, folder: Path) -> None:
    """Unpack the files and folders of a tar archive into `folder`, each member judged before it is written."""
    try:
        opened = tarfile.open(path, tarinfo=_Member)
    except tarfile.ReadError as error:
        raise InputError(f"data {path} is neither a folder nor a tar archive") from error
    except _BROKEN as error:
        raise InputError(f"archive {path} cannot be unpacked safely: {error}") from error
    try:
        with opened as archive:
            size = 0
            for number, member in enumerate(archive):
                size += member.size
                if number >= _MEMBERS or size > _UNPACKED:
                    raise ValueError(f"it claims more than {_MEMBERS} members or {_UNPACKED // 2**30} GiB")
                if not (member.isreg() or member.isdir()):
                    raise ValueError(f"{member.name[:100]!r} is neither a file nor a folder")
                archive.extract(member, folder, filter="data")
                archive.members = []  # else every header read so far stays in memory
                archive.pax_headers.clear()
            while size <= _UNPACKED and (rest := archive.fileobj.read(2**20)):  # its compression's checksum is at the end
                size += len(rest)
    except _BROKEN as error:
        raise InputError(f"archive {path} cannot be unpacked safely: {error}") from error


def _decode_tree(root: Path, shown: Path) -> list[np.ndarray]:
    from torchvision.datasets.folder import make_dataset

    arrays: list[np.ndarray] = []
    known: list[str] = []
    for part in ("train", "test"):
        folder = root / part
        if not folder.is_dir():
            raise InputError(f"data {shown} has no folder {part!r}; it needs train/<class>/* and test/<class>/*")
        classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and identity.counts(p.name))
        if len(classes) < 2:
            raise InputError(f"data {shown} has {len(classes)} class folders under {part!r}, but needs at least two")
        if known and classes != known:
            raise InputError(f"data {shown}: train and test differ in classes {sorted(set(classes) ^ set(known))}")
        known = classes
        try:
            found = make_dataset(str(folder), {name: label for label, name in enumerate(classes)},
                                 is_valid_file=lambda file: all(map(identity.counts, Path(file).relative_to(folder).parts)))
        except FileNotFoundError as error:
            raise InputError(f"data {shown}, {part}: a class is empty ({error})") from error
        pixels = np.empty((len(found), 3, SIDE, SIDE), np.uint8)
        bar = tqdm(found, desc=f"decoding {part}", unit="image", leave=False, mininterval=1,
                   disable=None)  # no bar in a file
        for index, (file, _) in enumerate(bar):
            pixels[index] = _decode(Path(file), shown=shown / Path(file).relative_to(root))
        arrays += [pixels, np.asarray([label for _, label in found], np.int64)]
    return arrays


def _decode(file: Path, shown: Path) -> np.ndarray:
    """One image as uint8 (3, 32, 32), seen as a viewer shows it. Raises `InputError` by name for what is none.

    Of 16 bits the upper 8 are kept.  Refused is what would need a choice: transparent pixels, several frames, pixels
    that are signed, fractions or of 12 or 32 bits.  Colour profiles are not applied.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file, formats=_FORMATS) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a camera's previews follow the picture
                raise ValueError(f"it has {image.n_frames} frames")
            if image.format == "TIFF":
                tags = image.tag_v2
                depth, signs = tags.get(258, (1,)), tags.get(339, (1,))
                if {*depth} - {1, 2, 4, 8, 16} or {*signs} - {1} or depth == (16,) and tags.get(262) == 0:
                    raise ValueError(f"its pixels of {depth[0]} bits are not plain numbers from black to white")
            image = ImageOps.exif_transpose(image)
            # a palette says which of its colours is transparent; elsewhere the colour is named in the file's own depth
            if "transparency" in image.info and image.mode not in ("P", "RGBA"):
                raise ValueError("one of its colours is transparent")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                if image.getextrema()[3][0] < 255:
                    raise ValueError("it has transparent pixels, whose colour is not known")
            if image.mode.startswith("I"):  # 16 bits, be it in 32
                image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
            if image.mode == "F":
                raise ValueError("its pixels are fractions")
            image = image.convert("RGB")
            if image.size != (SIDE, SIDE):
                image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # decoders raise many kinds for bytes that are no image
        raise InputError(f"{shown} is no image that can be read ({error}); remove it or mend it") from error

import dataclasses
import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from gstlib import data
from gstlib.data import Images, Loader, crop_and_flip, sources
from gstlib.errors import InputError
from gstlib.spec import DataSpec

CPU = torch.device("cpu")


def picture(seed: int, size=(32, 32)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two classes, three training and two test images each."""
    root = tmp_path / "pictures"
    seed = 0
    for part, number in (("train", 3), ("test", 2)):
        for name in ("cat", "ant"):
            (root / part / name).mkdir(parents=True)
            for index in range(number):
                Image.fromarray(picture(seed)).save(root / part / name / f"{index}.png")
                seed += 1
    return root


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GSTLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def decoded(cache, monkeypatch) -> list[Path]:
    """The files decoded so far, as the loader calls them."""
    seen, decode = [], sources._decode
    monkeypatch.setattr(sources, "_decode", lambda file, shown: (seen.append(shown), decode(file, shown))[1])
    return seen


def undated(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mtime = 0
    return info


def pack(root: Path, place: Path, mode: str = "w:gz") -> Path:
    with tarfile.open(place, mode) as archive:
        for part in ("train", "test"):
            archive.add(root / part, part, filter=undated)
    return place


def synthetic(n: int = 23, test: int = 7) -> Images:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n + test, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(x[:n], torch.arange(n), x[n:], torch.arange(test), "digits", "f" * 64, "synthetic")


def epoch(loader: Loader) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader.begin_epoch()
    return [loader.next_batch(size) for size in loader.batch_sizes()]


def test_digits_are_pinned(digits):
    assert digits.fingerprint == "71ed16a5a51c73c5ed032e61f966409f38fd9270579c473ab59bdcdc5e4d992d"
    assert digits.train_x.shape == (1442, 3, 32, 32) and digits.test_x.shape == (355, 3, 32, 32)
    assert digits.train_x.dtype == torch.uint8 and digits.train_y.dtype == torch.int64
    assert digits.classes == 10 and digits.name == "digits" and digits.title == "scikit-learn digits"


def test_digits_are_enlarged_without_interpolation(digits):
    x = digits.train_x[:50]
    blocks = x.view(50, 3, 8, 4, 8, 4)
    assert (blocks == blocks[:, :, :, :1, :, :1]).all() and (x[:, 0] == x[:, 1]).all() and (x[:, 0] == x[:, 2]).all()
    assert int(digits.train_x.min()) == 0 and int(digits.train_x.max()) == 255


def test_every_fifth_digit_of_each_class_is_for_testing(digits):
    from sklearn.datasets import load_digits

    target = load_digits().target
    test_y = [label for label in range(10) for _ in range((target == label).sum() // 5)]
    assert sorted(digits.test_y.tolist()) == test_y
    assert len(digits.train_y) + len(digits.test_y) == len(target) == 1797


def test_fingerprint_knows_pixels_labels_shapes_and_parts():
    x, y = picture(0).reshape(3, 32, 32)[None], np.array([1])
    x2, y2 = picture(1).reshape(3, 32, 32)[None], np.array([0])
    base = data.fingerprint(x, y, x2, y2)
    changed = x.copy()
    changed[0, 2, 31, 31] ^= 1
    variants = [(changed, y, x2, y2), (x, y2, x2, y2), (x, y, x2, y), (x2, y2, x, y),
                (x.transpose(0, 2, 3, 1), y, x2, y2), (np.concatenate([x, x2]), np.array([1, 0]), x2[:0], y2[:0])]
    found = {base, *(data.fingerprint(*v) for v in variants)}
    assert len(found) == 1 + len(variants) and all(len(f) == 64 for f in found)


def test_fingerprint_is_pinned_whatever_the_memory_layout():
    x, y = (np.arange(2 * 3 * 4 * 4) % 251).astype(np.uint8).reshape(2, 3, 4, 4), np.array([0, 1])
    pinned = "16987d705f1a1b39"
    assert data.fingerprint(x, y, x, y)[:16] == pinned
    assert data.fingerprint(np.asfortranarray(x), y.astype(np.int32), torch.from_numpy(x), y)[:16] == pinned


def test_folder_is_read_in_sorted_order(tree, cache):
    images = data.load(tree)
    assert images.name == "cifar10-folder" and images.classes == 2 and "pictures" in images.title
    assert images.train_y.tolist() == [0, 0, 0, 1, 1, 1] and images.test_y.tolist() == [0, 0, 1, 1]
    expected = [np.asarray(Image.open(tree / "train" / name / f"{i}.png")) for name in ("ant", "cat") for i in range(3)]
    assert np.array_equal(images.train_x.numpy(), np.stack(expected).transpose(0, 3, 1, 2))
    assert images.fingerprint == data.fingerprint(images.train_x, images.train_y, images.test_x, images.test_y)


def test_other_sizes_and_modes_become_32_by_32_colour(tree, cache):
    Image.fromarray(np.full((20, 50, 3), 77, np.uint8)).save(tree / "train" / "ant" / "0.png")
    Image.fromarray(picture(3)[:, :, 0]).save(tree / "train" / "ant" / "1.png")
    images = data.load(tree)
    assert images.train_x.shape == (6, 3, 32, 32) and (images.train_x[0] == 77).all()
    assert np.array_equal(images.train_x[1], np.stack([picture(3)[:, :, 0]] * 3))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_archive_holds_the_same_images(tree, tmp_path, cache, mode):
    archive = data.load(pack(tree, tmp_path / "pictures.tar", mode))
    assert archive.fingerprint == data.load(tree).fingerprint
    assert torch.equal(archive.train_x, data.load(tree).train_x)


def test_a_copy_of_a_folder_is_another_folder(tree, tmp_path, decoded):
    """The same names, sizes and times are not the same pictures."""
    before = data.load(tree)
    other = tmp_path / "other"
    shutil.copytree(tree, other)
    file = other / "train" / "cat" / "1.png"
    known, content = file.stat(), bytearray(file.read_bytes())
    Image.fromarray(picture(99)).save(file)
    file.write_bytes(file.read_bytes().ljust(len(content), b"\0"))
    os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert data.load(other).fingerprint != before.fingerprint and len(decoded) == 20


def test_a_file_changed_under_its_old_time_is_seen(tree, decoded):
    before = data.load(tree)
    file = tree / "train" / "cat" / "1.png"
    known = file.stat()
    Image.fromarray(picture(99)).save(file)
    os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert data.load(tree).fingerprint != before.fingerprint


def test_second_load_decodes_nothing(tree, tmp_path, decoded, cache):
    first = data.load(tree)
    assert len(decoded) == 10 and len(list(cache.glob("*.npz"))) == 1
    again = data.load(tree)
    assert len(decoded) == 10 and again.fingerprint == first.fingerprint and again.name == first.name
    assert torch.equal(again.test_x, first.test_x) and torch.equal(again.train_y, first.train_y)
    archive = pack(tree, tmp_path / "a.tar")
    data.load(archive)
    assert len(decoded) == 20
    data.load(archive)
    assert len(decoded) == 20


@pytest.mark.parametrize("change", ["pixels", "added", "renamed"])
def test_changed_files_are_decoded_anew(tree, decoded, change):
    before = data.load(tree)
    file = tree / "train" / "cat" / "1.png"
    if change == "pixels":
        Image.fromarray(picture(99)).save(file)
        os.utime(file, ns=(1, 1))
    elif change == "added":
        Image.fromarray(picture(99)).save(file.with_name("7.png"))
    else:
        file.rename(file.with_name("9.png"))
    after = data.load(tree)
    assert len(decoded) == 20 + (change == "added")
    assert after.fingerprint != before.fingerprint


def test_changed_archive_is_decoded_anew(tree, tmp_path, decoded):
    archive = pack(tree, tmp_path / "a.tar")
    before = data.load(archive)
    Image.fromarray(picture(99)).save(tree / "test" / "ant" / "0.png")
    after = data.load(pack(tree, archive))
    assert len(decoded) == 20 and after.fingerprint != before.fingerprint


@pytest.mark.parametrize("broken", [b"", b"PK\x03\x04 no archive", None])
def test_a_damaged_cache_is_decoded_anew(tree, decoded, cache, broken):
    before = data.load(tree)
    (file,) = cache.glob("*.npz")
    file.write_bytes(file.read_bytes()[:1000] if broken is None else broken)
    again = data.load(tree)
    assert again.fingerprint == before.fingerprint and len(decoded) == 20


@pytest.mark.parametrize("name", ["file/cache", "c" * 300])
def test_a_cache_that_cannot_be_written_does_not_stop_loading(tree, tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GSTLIB_CACHE", str(tmp_path / name))
    assert len(data.load(tree).train_y) == 6


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere.*does not exist.*train/<class>"):
        data.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["cifar11", "Digits", "imagenet"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(InputError, match="digits, cifar10, cifar10-folder"):
        data.load(name)


def test_the_folder_by_name_says_where_it_looks():
    with pytest.raises(InputError, match=os.environ["GSTLIB_DATA"]):
        data.load("cifar10-folder")


def test_the_folder_by_name_is_under_the_data_home(tree, cache, monkeypatch):
    monkeypatch.setenv("GSTLIB_DATA", str(tree.parent))
    tree.rename(tree.with_name("cifar10-folder"))
    assert len(data.load("cifar10-folder").train_y) == 6


def idx(array: np.ndarray) -> bytes:
    """An array of bytes in the format of Fashion-MNIST's files, unpacked."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


PIXELS = {part: np.random.default_rng(seed).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
          for seed, part in enumerate(("train", "test"))}
LABELS = np.arange(40) % 10  # 40 images a part, as many of each class


def publish(kind: str, home: Path, patch) -> list[Path]:
    """A small set in the published format, whose checksums torchvision then takes for the published ones; its files."""
    from torchvision import datasets

    md5, files = lambda content: hashlib.md5(content).hexdigest(), {}
    if kind.startswith("cifar"):
        cifar = getattr(datasets, kind.upper())
        label, names = ("labels", "label_names") if kind == "cifar10" else ("fine_labels", "fine_label_names")
        for part, listed in (("train", "train_list"), ("test", "test_list")):
            rows = {"data": PIXELS[part].transpose(0, 3, 1, 2).reshape(40, -1), label: LABELS.tolist()}
            files[f"{cifar.base_folder}/{part}"] = pickle.dumps(rows)
            patch.setattr(cifar, listed, [[part, md5(pickle.dumps(rows))]])
        files[f"{cifar.base_folder}/meta"] = pickle.dumps({names: [f"class {n}" for n in range(10)]})
        patch.setattr(cifar, "meta", {"filename": "meta", "key": names, "md5": md5(files[f"{cifar.base_folder}/meta"])})
    elif kind == "svhn":
        for part in ("train", "test"):
            place = io.BytesIO()
            numbers = np.where(LABELS == 0, 10, LABELS)[:, None]
            scipy.io.savemat(place, {"X": PIXELS[part].transpose(1, 2, 3, 0), "y": numbers})
            files[f"{part}_32x32.mat"] = place.getvalue()
            patch.setitem(datasets.SVHN.split_list, part, ["http://nowhere", f"{part}_32x32.mat", md5(place.getvalue())])
    else:
        for part, name in (("train", "train"), ("test", "t10k")):
            for what, array in (("images-idx3", PIXELS[part][:, :28, :28, 0]), ("labels-idx1", LABELS.astype(np.uint8))):
                files[f"FashionMNIST/raw/{name}-{what}-ubyte.gz"] = gzip.compress(idx(array))
        patch.setattr(datasets.FashionMNIST, "resources", [(Path(f).name, md5(c)) for f, c in files.items()])
    for name, content in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content)
    return [home / name for name in files]


@pytest.fixture
def offline(monkeypatch):
    def fetch(url, *_, **__):
        raise URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", fetch)


PUBLISHED = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "fashion-mnist": "Fashion-MNIST"}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_published_set_is_read_as_published(kind, tmp_path, cache, monkeypatch, offline):
    monkeypatch.setenv("GSTLIB_DATA", str(tmp_path / "home"))
    publish(kind, tmp_path / "home", monkeypatch)
    for images in (data.load(kind), data.load(tmp_path / "home")):
        assert (images.name, images.title, images.classes) == (kind, PUBLISHED[kind], 10)
        assert images.train_y.tolist() == images.test_y.tolist() == LABELS.tolist()
        for x, part in ((images.train_x, "train"), (images.test_x, "test")):
            expected = PIXELS[part].transpose(0, 3, 1, 2)
            if kind == "fashion-mnist":
                grey, expected = expected[:, :1, :28, :28], np.zeros_like(expected)
                expected[:, :, 2:30, 2:30] = grey
            assert x.dtype == torch.uint8 and np.array_equal(x, expected)
    assert data.identify(kind) == images.known


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_published_set_that_is_damaged_or_missing_is_said_to_be_that(kind, tmp_path, cache, monkeypatch, offline):
    monkeypatch.setenv("GSTLIB_DATA", str(tmp_path / "home"))
    places = publish(kind, tmp_path / "home", monkeypatch)
    data.load(kind)
    content = places[0].read_bytes()
    places[0].write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    for spoilt in (f"damaged: [^,]*{places[0].name};", "not there"):
        for source in (kind, tmp_path / "home"):
            said = f"{PUBLISHED[kind]} under {tmp_path}/home is {spoilt}.*put .*, as published, there"
            with pytest.raises(InputError, match=said) as caught:
                data.load(source)
            assert "\n" not in str(caught.value)
            assert data.recall(source) is None
        places[0].unlink(missing_ok=True)


def test_the_archive_of_cifar_is_enough_without_a_network(tmp_path, cache, monkeypatch, offline):
    from torchvision.datasets import CIFAR10

    publish("cifar10", tmp_path, monkeypatch)
    with tarfile.open(tmp_path / CIFAR10.filename, "w:gz") as archive:
        archive.add(tmp_path / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((tmp_path / CIFAR10.filename).read_bytes()).hexdigest())
    shutil.rmtree(tmp_path / CIFAR10.base_folder)
    assert data.load(tmp_path).train_y.tolist() == LABELS.tolist()


def test_a_folder_with_several_published_sets_is_not_guessed_at(tmp_path, monkeypatch):
    publish("svhn", tmp_path, monkeypatch)
    publish("cifar100", tmp_path, monkeypatch)
    with pytest.raises(InputError, match="several sets.*cifar100, svhn"):
        data.load(tmp_path)


def spoil(tree: Path, how: str) -> None:
    if how == "empty":
        for file in sorted(tree.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
    elif how == "no test part":
        (tree / "test").rename(tree / "validation")
    elif how == "one class":
        (tree / "train" / "cat").rename(tree / "cat")
    elif how == "other classes":
        (tree / "test" / "cat").rename(tree / "test" / "dog")
    elif how == "empty class":
        for file in (tree / "train" / "cat").iterdir():
            file.unlink()
    elif how == "text":
        (tree / "train" / "cat" / "notes.txt").write_text("no image")
    elif how == "empty file":
        (tree / "test" / "ant" / "1.png").write_bytes(b"")
    elif how == "cut short":
        file = tree / "test" / "ant" / "1.png"
        file.write_bytes(file.read_bytes()[:400])
    elif how == "wrong bytes":
        file = tree / "test" / "ant" / "1.png"
        file.write_bytes(file.read_bytes()[:60] + bytes(100) + file.read_bytes()[160:])


BAD_TREES = [
    ("empty", "no folder 'train'"),
    ("no test part", "no folder 'test'"),
    ("one class", "1 class folders under 'train'"),
    ("other classes", "cat.*dog"),
    ("empty class", "empty.*cat"),
    ("text", "train/cat/notes.txt is no image"),
    ("empty file", "test/ant/1.png is no image"),
    ("cut short", "test/ant/1.png is no image"),
    ("wrong bytes", "test/ant/1.png is no image"),
    ]


@pytest.mark.parametrize(("how", "message"), BAD_TREES)
def test_a_bad_folder_is_refused_by_name(tree, cache, how, message):
    spoil(tree, how)
    with pytest.raises(InputError, match=message) as caught:
        data.load(tree)
    assert str(tree) in str(caught.value) and "\n" not in str(caught.value)
    assert not cache.exists() or not any(cache.iterdir())


@pytest.mark.parametrize(("how", "message"), [bad for bad in BAD_TREES if bad[0] in ("one class", "text", "cut short")])
def test_a_bad_archive_is_refused_by_its_own_name(tree, tmp_path, cache, how, message):
    spoil(tree, how)
    archive = pack(tree, tmp_path / "a.tar")
    with pytest.raises(InputError, match=message) as caught:
        data.load(archive)
    assert str(archive) in str(caught.value)


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"certainly no archive" * 100)
    with pytest.raises(InputError, match="a.tar is neither a folder nor a tar archive"):
        data.load(tmp_path / "a.tar")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_an_archive_cut_short_is_refused(tree, tmp_path, cache, mode, share):
    archive = pack(tree, tmp_path / "a.tar", mode)
    end = archive.stat().st_size if mode != "w" else 512 + archive.read_bytes().rindex(b"IEND")
    archive.write_bytes(archive.read_bytes()[:int(share * end)])
    with pytest.raises(InputError, match="a.tar"):
        data.load(archive)


@pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
def test_an_archive_with_a_flipped_byte_is_refused(tree, tmp_path, cache, mode):
    archive = pack(tree, tmp_path / "a.tar", mode)
    good, expected = archive.read_bytes(), data.load(archive).fingerprint
    for share in (0.2, 0.4, 0.6, 0.8):
        place = int(share * len(good))
        archive.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1:])
        try:
            assert data.load(archive).fingerprint == expected
        except InputError as error:
            assert "a.tar" in str(error)


@pytest.mark.parametrize("member", ["../escaped.png", "train/../../escaped.png", "link"])
def test_an_archive_that_reaches_outside_is_refused(tree, tmp_path, cache, monkeypatch, member):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    archive = pack(tree, tmp_path / "a.tar", "w")
    with tarfile.open(archive, "a") as opened:
        info = tarfile.TarInfo(member)
        if member == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc"
            opened.addfile(info)
        else:
            content = (tree / "train" / "ant" / "0.png").read_bytes()
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    with pytest.raises(InputError, match="a.tar.*safely"):
        data.load(archive)
    assert not list(tmp_path.rglob("escaped.png")) and not list((tmp_path / "temporary").iterdir())


def smuggle(archive: Path, header: tarfile.TarInfo) -> None:
    """Append a header, which may claim anything, and zeros after it."""
    with tarfile.open(archive, "a") as opened:
        opened.fileobj.seek(opened.offset)
        opened.fileobj.write(header.tobuf(tarfile.GNU_FORMAT) + bytes(2**22))


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


SMUGGLED = {
    "more than is unpacked": member("train/ant/large.png", 2**40),
    "a link inside": member("train/ant/link.png", 0, tarfile.SYMTYPE, "0.png"),
    "a hard link": member("train/ant/link.png", 0, tarfile.LNKTYPE, "train/ant/0.png"),
    "a pipe": member("train/ant/pipe.png", 0, tarfile.FIFOTYPE),
    "a device": member("train/ant/device.png", 0, tarfile.CHRTYPE),
    "an absolute name": member("/train/ant/outside.png"),
    "a name of two megabytes": member("name", 2**21, tarfile.GNUTYPE_LONGNAME),
    "a header of two megabytes": member("header", 2**21, tarfile.XHDTYPE),
    "a global header of two megabytes": member("header", 2**21, tarfile.XGLTYPE),
}


@pytest.mark.parametrize("what", SMUGGLED)
@pytest.mark.parametrize("first", [False, True])
def test_a_member_that_no_set_of_images_has_is_refused_unread(tree, tmp_path, cache, monkeypatch, what, first):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    archive = tmp_path / "a.tar"
    if first:
        archive.write_bytes(bytes(1024))
    else:
        pack(tree, archive, "w")
    smuggle(archive, SMUGGLED[what])
    # an absolute name loses its slash and stays inside, where it is no image
    with pytest.raises(InputError, match="a.tar" if what == "an absolute name" else "a.tar cannot be unpacked safely"):
        data.load(archive)
    assert not list((tmp_path / "temporary").iterdir()) and not Path("/train").exists()


def test_an_archive_of_too_many_members_is_refused(tree, tmp_path, cache, monkeypatch):
    archive = pack(tree, tmp_path / "a.tar", "w")
    monkeypatch.setattr(sources, "_MEMBERS", 15)
    with pytest.raises(InputError, match="claims more than 15 members"):
        data.load(archive)
    monkeypatch.setattr(sources, "_MEMBERS", 16)
    assert len(data.load(archive).train_y) == 6


def claim(place: Path, width: int, height: int) -> None:
    """Change a PNG's head to claim another size."""
    content = bytearray(place.read_bytes())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    place.write_bytes(content)


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_that_claims_to_be_huge_is_refused_undecoded(tree, monkeypatch, size):
    claim(tree / "test" / "ant" / "1.png", *size)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match="test/ant/1.png is no image"):
        sources._decode(tree / "test" / "ant" / "1.png", Path("test/ant/1.png"))


RAMP = np.linspace(0, 65535, 1024).reshape(32, 32)


@pytest.mark.parametrize(("ending", "pixels"), [("png", RAMP.astype(np.uint16)), ("tiff", RAMP.astype(np.uint16)),
                                                ("tiff", RAMP.astype(">u2")), ("png", (RAMP / 256).astype(np.uint8)),
                                                ("ppm", RAMP.astype(np.uint16))])
def test_images_of_more_than_eight_bits_keep_their_grey_levels(tree, cache, ending, pixels):
    (tree / "train" / "ant" / "0.png").unlink()
    Image.fromarray(pixels).save(tree / "train" / "ant" / f"0.{ending}")
    x = data.load(tree).train_x[0, 0]
    assert len(x.unique()) == 256 and float(x.float().mean()) == pytest.approx(127.5, abs=0.1)


def test_an_image_is_turned_as_its_camera_says(tree, cache):
    stored = np.zeros((32, 32, 3), np.uint8)
    stored[:16] = 255  # upside down
    image = Image.fromarray(stored)
    tag = image.getexif()
    tag[0x112] = 3
    image.save(tree / "train" / "ant" / "0.png", exif=tag)
    x = data.load(tree).train_x[0, 0]
    assert (int(x[4, 4]), int(x[28, 28])) == (0, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("ending", "kind"), [("png", np.uint8), ("webp", np.uint8), ("tiff", np.uint8), ("png", np.uint16)])
def test_every_orientation_is_followed_in_every_format(tmp_path, orientation, ending, kind):
    """The white corner of the first row and column goes where the tag says that row and column are."""
    stored = np.zeros((32, 32), kind)
    stored[:8, :8] = np.iinfo(kind).max
    image, tag = Image.fromarray(stored), Image.Exif()
    tag[0x112] = orientation
    image.save(tmp_path / f"a.{ending}", exif=tag)
    x = sources._decode(tmp_path / f"a.{ending}", Path("a"))[0]
    corners = [[int(x[row, column]) > 200 for column in (4, 28)] for row in (4, 28)]
    first = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    assert corners == [[(row, column) == first for column in (0, 1)] for row in (0, 1)]


def png(depth: int, colour: int, rows, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 32x32 pixels, whose rows are given as bytes."""
    head = (b"IHDR", struct.pack(">IIBBBBB", 32, 32, depth, colour, 0, 0, 0))
    body = (b"IDAT", zlib.compress(b"".join(b"\0" + bytes(row) for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(content)) + name + content
                                          + struct.pack(">I", zlib.crc32(name + content))
                                          for name, content in (head, *chunks, body, (b"IEND", b"")))


def tiff(bits: int, kind: int, pixels: np.ndarray, photometric: int = 1) -> bytes:
    """A grey TIFF of 32x32 pixels; kind: 1 unsigned, 2 signed, 3 floating."""
    entries = {256: 32, 257: 32, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 32, 279: pixels.nbytes, 339: kind}
    return (b"II*\0" + struct.pack("<I", 8 + pixels.nbytes) + pixels.tobytes() + struct.pack("<H", len(entries))
            + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items()) + bytes(4))


def frames(ending: str, **options) -> bytes:
    place = io.BytesIO()
    Image.fromarray(picture(0)).save(place, ending, save_all=True, append_images=[Image.fromarray(picture(1))], **options)
    return place.getvalue()


GREY = (RAMP / 256).astype(np.uint8)
PALETTE = (b"PLTE", bytes(np.arange(256, dtype=np.uint8).repeat(3)))
ROWS16 = [row.tobytes() for row in RAMP.astype(">u2")]
FOURTHS = [bytes([0b00011011] * 8)] * 32
REFUSED = {
    "a shape in alpha alone": (png(8, 4, [np.stack([row * 0, row], 1).tobytes() for row in GREY]), "transparent pixels"),
    "a palette with a colour that is transparent": (
        png(8, 3, GREY, PALETTE, (b"tRNS", bytes([255] * 100 + [0]))), "transparent pixels"),
    "a transparent grey": (png(8, 0, GREY, (b"tRNS", struct.pack(">H", 77))), "colours is transparent"),
    "a transparent grey of 16 bits": (png(16, 0, ROWS16, (b"tRNS", struct.pack(">H", int(RAMP[3, 3])))), "is transparent"),
    "a transparent grey of 2 bits": (png(2, 0, FOURTHS, (b"tRNS", struct.pack(">H", 3))), "is transparent"),
    "fractions": (tiff(32, 3, (RAMP / 65535).astype(np.float32)), "32 bits"),
    "fractions beyond 1": (tiff(32, 3, RAMP.astype(np.float32)), "32 bits"),
    "fractions in a portable map": (b"Pf\n32 32\n-1.0\n" + RAMP.astype("<f4").tobytes(), "fractions"),
    "32 bits": (tiff(32, 1, RAMP.astype(np.uint32)), "32 bits"),
    "negative numbers": (tiff(32, 2, -RAMP.astype(np.int32)), "32 bits"),
    "numbers with a sign": (tiff(16, 2, RAMP.astype(np.int16)), "16 bits"),
    "bytes with a sign": (tiff(8, 2, GREY.astype(np.int8)), "8 bits"),
    "12 bits": (tiff(12, 1, np.zeros(32 * 48, np.uint8)), "12 bits"),
    "16 bits from white to black": (tiff(16, 1, RAMP.astype(np.uint16), 0), "16 bits"),
    "an animated GIF": (frames("GIF"), "2 frames"),
    "a TIFF of pages": (frames("TIFF"), "2 frames"),
    "an animated PNG": (frames("PNG"), "2 frames"),
    "an animated WebP": (frames("WEBP", lossless=True), "2 frames"),
    "nothing": (b"", "is no image"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_converted_rightly_is_refused_by_name(tmp_path, what):
    content, why = REFUSED[what]
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match=f"train/ant/5.*{why}"):
        sources._decode(tmp_path / "a", Path("train/ant/5"))


READ = {
    "16 bits": png(16, 0, ROWS16),
    "16 bits in colour": png(16, 2, [np.repeat(row, 3).astype(">u2").tobytes() for row in RAMP]),
    "16 bits, opaque": png(16, 4, [np.stack([row, row * 0 + 65535], 1).astype(">u2").tobytes() for row in RAMP]),
    "a palette without the colour that is transparent": png(
        8, 3, GREY, PALETTE, (b"tRNS", bytes([255] * 256))),
    "a TIFF from white to black": tiff(8, 1, 255 - GREY, 0),
    "a portable map of 16 bits": b"P5\n32 32\n65535\n" + b"".join(ROWS16),
    "a portable map of 12 bits": b"P5\n32 32\n4095\n" + (RAMP / 16).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("what", READ)
def test_what_can_be_converted_rightly_is(tmp_path, what):
    (tmp_path / "a").write_bytes(READ[what])
    x = sources._decode(tmp_path / "a", Path("a"))
    assert (x == GREY).all()


def test_a_photograph_cut_short_anywhere_is_refused(tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "a").write_bytes(whole[:length])
        with pytest.raises(InputError, match="is no image"):
            sources._decode(tmp_path / "a", Path("a"))


def test_what_desktops_leave_in_folders_is_no_part_of_a_set(tree, decoded):
    before = data.load(tree)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"):
        (tree / "train" / "ant" / name).write_text("no image")
    for folder in (tree / "train" / ".cache", tree / "train" / "ant" / ".ipynb_checkpoints"):
        folder.mkdir()
        Image.fromarray(picture(50)).save(folder / "0.png")
    assert data.load(tree).fingerprint == before.fingerprint and len(decoded) == 10, "nor of what it is known by"


def test_classes_that_differ_in_case_alone_are_two(tree, cache):
    for part in ("train", "test"):
        shutil.copytree(tree / part / "ant", tree / part / "Ant")
    assert data.load(tree).train_y.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    (tree / "test" / "Ant").rename(tree / "test" / "ANT")
    with pytest.raises(InputError, match="differ in classes.*'ANT', 'Ant'"):
        data.load(tree)


def test_images_in_deeper_folders_count_and_their_change_is_seen(tree, decoded):
    deep = tree / "train" / "ant" / "2024" / "may" / "first"
    deep.mkdir(parents=True)
    Image.fromarray(picture(50)).save(deep / "0.png")
    before = data.load(tree)
    assert before.train_y.tolist() == [0] * 4 + [1] * 3
    Image.fromarray(picture(51)).save(deep / "0.png")
    assert data.load(tree).fingerprint != before.fingerprint


def test_another_folder_in_a_folder_s_place_is_another_set(tree, decoded):
    """By renaming, behind a link, with the same names, sizes and times."""
    other = tree.with_name("other")
    shutil.copytree(tree, other)
    file = other / "train" / "cat" / "1.png"
    Image.fromarray(picture(99)).save(file)
    before, after = data.load(tree).fingerprint, data.load(other).fingerprint
    assert before != after
    link = tree.with_name("link")
    link.symlink_to(tree)
    assert data.load(link).fingerprint == before
    link.unlink()
    link.symlink_to(other)
    assert data.load(link).fingerprint == after
    tree.rename(tree.with_name("away"))
    other.rename(tree)
    assert data.load(tree).fingerprint == after


def test_a_set_that_changes_while_it_is_read_is_refused_and_not_remembered(tree, cache, monkeypatch):
    decode = sources._decode

    def changing(file, shown):
        pixels = decode(file, shown)
        Image.fromarray(picture(99)).save(tree / "test" / "cat" / "1.png")
        return pixels

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_decode", changing)
        with pytest.raises(InputError, match="pictures changed while it was read"):
            data.load(tree)
    assert data.recall(tree) is None and not cache.exists()
    assert data.load(tree).test_x[-1].equal(torch.from_numpy(picture(99)).permute(2, 0, 1))


@pytest.mark.parametrize("what", ["pipe", "nowhere", "."])
def test_what_is_no_file_among_the_images_is_refused_by_name(tree, cache, what):
    """A pipe, a link to nothing, a link that goes round in a circle."""
    place = tree / "train" / "ant" / "odd.png"
    os.mkfifo(place) if what == "pipe" else place.symlink_to(what)
    with pytest.raises(InputError, match="train/ant/odd.png|train cannot be read: .*links"):
        data.load(tree)


@pytest.mark.parametrize("mode", ["CMYK", "P", "1", "LA", "RGBA", "YCbCr"])
def test_other_colour_modes_are_read_as_colour(tree, cache, mode):
    (tree / "train" / "ant" / "0.png").unlink()
    image = Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).convert(mode)
    image.save(tree / "train" / "ant" / ("0.png" if mode not in ("CMYK", "YCbCr") else "0.tiff"))
    assert data.load(tree).train_x[0].min() >= 254


def test_a_text_in_an_image_that_unpacks_to_much_more_is_refused(tree, cache):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "a" * 10_000_000, zip=True)
    Image.fromarray(picture(0)).save(tree / "train" / "ant" / "0.png", pnginfo=info)
    with pytest.raises(InputError, match="train/ant/0.png is no image"):
        data.load(tree)


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n",
                                     b"%PDF-1.4\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_what_would_be_drawn_by_a_program_is_no_image(tree, cache, content):
    (tree / "train" / "ant" / "0.png").write_bytes(content)
    with pytest.raises(InputError, match="train/ant/0.png is no image"):
        data.load(tree)


@pytest.mark.parametrize("ending", ["jpeg", "bmp", "gif", "webp", "tiff", "ppm"])
def test_common_formats_are_read(tree, cache, ending):
    Image.fromarray(np.full((32, 32, 3), 64, np.uint8)).save(tree / "train" / "ant" / f"0.{ending}")
    (tree / "train" / "ant" / "0.png").unlink()
    assert (data.load(tree).train_x[0].int() - 64).abs().max() <= 2


def test_subset_is_a_balanced_prefix(digits):
    spec = DataSpec(*digits.known, train_size=25, test_size=10)
    part = digits.subset(spec)
    counts = [int((part.train_y == label).sum()) for label in range(10)]
    assert counts == [3] * 5 + [2] * 5 and len(part.test_y) == 10
    indices = sorted(int(i) for label in range(10) for i in (digits.train_y == label).nonzero()[:3 if label < 5 else 2])
    assert torch.equal(part.train_x, digits.train_x[indices]) and torch.equal(part.train_y, digits.train_y[indices])
    whole = digits.subset(DataSpec(*digits.known))
    assert torch.equal(whole.train_x, digits.train_x) and torch.equal(whole.test_y, digits.test_y)


def test_subset_refuses_other_data_and_too_many_images(digits):
    with pytest.raises(InputError, match="fingerprint.*--data"):
        digits.subset(dataclasses.replace(DataSpec(*digits.known), fingerprint="0" * 64))
    with pytest.raises(InputError, match="there are"):
        digits.subset(DataSpec(*digits.known, train_size=1442))
    with pytest.raises(InputError, match="at least one image a class"):
        DataSpec(*digits.known, test_size=9)


@pytest.mark.parametrize(("n", "batch_size", "sizes"), [
    (23, 8, [8, 8, 7]), (16, 8, [8, 8]), (5, 8, [5]), (9, 2, [2, 2, 2, 2, 1]),
])
def test_an_epoch_covers_every_image_once(n, batch_size, sizes):
    loader = Loader(synthetic(n), batch_size, augment=False, seed=0, device=CPU, channels_last=False)
    for _ in range(3):
        batches = epoch(loader)
        assert [len(y) for _, y in batches] == sizes
        assert sorted(torch.cat([y for _, y in batches]).tolist()) == list(range(n))
        for x, y in batches:
            assert torch.equal(x, loader.normalise(loader.x[y]))


def test_order_and_augmentation_follow_the_seed():
    def labels_and_pixels(seed):
        loader = Loader(synthetic(), 8, augment=True, seed=seed, device=CPU, channels_last=False)
        epochs = [epoch(loader) for _ in range(2)]
        return [torch.cat([y for _, y in e]) for e in epochs], [torch.cat([x for x, _ in e]) for e in epochs]

    (y, x), (y_same, x_same), (y_other, _) = labels_and_pixels(5), labels_and_pixels(5), labels_and_pixels(6)
    assert all(torch.equal(a, b) for a, b in zip(y + x, y_same + x_same))
    assert not torch.equal(y[0], y[1]) and not torch.equal(y[0], y_other[0])


def test_torch_s_generator_has_no_say_in_the_order():
    orders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loader = Loader(synthetic(), 8, augment=True, seed=5, device=CPU, channels_last=False)
        orders.append(torch.cat([x for x, _ in epoch(loader)]))
    assert torch.equal(*orders)


def test_augmented_images_are_crops_and_flips_of_their_own():
    loader = Loader(synthetic(), 8, augment=True, seed=0, device=CPU, channels_last=False)
    shifted = 0
    for x, y in epoch(loader):
        for image, label in zip(x, y):
            padded = torch.nn.functional.pad(loader.x[label], (4,) * 4)
            crops = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).reshape(81, 3, 32, 32)
            candidates = loader.normalise(torch.cat([crops, crops.flip(3)]))
            hits = (candidates == image).flatten(1).all(1).nonzero().flatten().tolist()
            assert len(hits) == 1
            shifted += hits != [40]
    assert shifted > 15


def test_training_images_have_zero_mean_and_unit_variance_per_channel():
    images = synthetic()
    loader = Loader(images, 8, augment=False, seed=0, device=CPU, channels_last=False)
    x = loader.normalise(images.train_x).double()
    assert x.mean((0, 2, 3)).abs().max() < 1e-5 and (x.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-5
    reference = images.train_x.double()
    assert loader.mean.shape == loader.sd.shape == (1, 3, 1, 1)
    torch.testing.assert_close(loader.mean.flatten().double(), reference.mean((0, 2, 3)), rtol=1e-6, atol=0)
    sd = reference.std((0, 2, 3), unbiased=False)
    torch.testing.assert_close(loader.sd.flatten().double(), sd, rtol=1e-6, atol=0)


def test_a_constant_channel_is_normalised_to_zero():
    images = synthetic()
    images.train_x[:, 1] = 9
    loader = Loader(images, 8, augment=False, seed=0, device=CPU, channels_last=False)
    x = loader.normalise(images.train_x)
    assert torch.isfinite(x).all() and (x[:, 1] == 0).all()


def test_test_images_come_in_order_and_whole(digits):
    loader = Loader(digits, 64, augment=True, seed=0, device=CPU, channels_last=False)
    for _ in range(2):
        loader.position.zero_()
        batches = [loader.next_test(size) for size in loader.test_sizes()]
    assert torch.equal(torch.cat([y for _, y in batches]), digits.test_y)
    assert torch.equal(torch.cat([x for x, _ in batches]), loader.normalise(digits.test_x))


def test_channels_last_is_the_memory_format_alone():
    plain, last = (Loader(synthetic(), 8, False, 0, CPU, channels_last=c) for c in (False, True))
    for (x, _), (x_last, _) in zip(epoch(plain), epoch(last), strict=True):
        assert x_last.is_contiguous(memory_format=torch.channels_last) and torch.equal(x, x_last)


@pytest.mark.parametrize("pad", [4, 1])
def test_crop_and_flip_agrees_with_a_plain_loop(pad):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 256, (12, 3, 6, 5), generator=generator, dtype=torch.uint8)
    shifts = torch.randint(0, 2 * pad + 1, (12, 2), generator=generator)
    flips = torch.arange(12) % 2 == 0
    found = crop_and_flip(x, shifts, flips, pad)
    for i in range(12):
        for r in range(6):
            for c in range(5):
                column = 4 - c if flips[i] else c
                row, column = r + int(shifts[i, 0]) - pad, column + int(shifts[i, 1]) - pad
                inside = 0 <= row < 6 and 0 <= column < 5
                expected = x[i, :, row, column] if inside else torch.zeros(3, dtype=torch.uint8)
                assert torch.equal(found[i, :, r, c], expected)


def test_crop_in_the_middle_without_flip_is_the_image():
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(crop_and_flip(x, torch.full((4, 2), 4), torch.zeros(4, dtype=torch.bool)), x)
    assert torch.equal(crop_and_flip(x, torch.full((4, 2), 4), torch.ones(4, dtype=torch.bool)), x.flip(3))

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gstlib import data
from gstlib.data import identify, identity
from gstlib.data.identity import Known, recall
from gstlib.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GSTLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path) -> Path:
    root = tmp_path / "pictures"
    for seed, name in enumerate(f"{part}/{label}/0.png" for part in ("train", "test") for label in ("ant", "cat")):
        (root / name).parent.mkdir(parents=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    return root


@pytest.fixture
def archive(tree) -> Path:
    subprocess.run(["tar", "-cf", "pictures.tar", "-C", "pictures", "train", "test"], cwd=tree.parent, check=True)
    return tree.parent / "pictures.tar"


def loaded(source) -> Known:
    images = data.load(source)
    return Known(images.name, images.fingerprint, images.classes)


@pytest.mark.parametrize("source", ["tree", "archive", "digits"])
def test_what_was_loaded_is_recalled(source, request):
    source = source if source == "digits" else request.getfixturevalue(source)
    assert recall(source) is None
    found = loaded(source)
    assert recall(source) == identify(source) == found


def test_what_is_not_known_is_loaded(tree):
    assert identify(tree) == loaded(tree)


@pytest.mark.parametrize("change", ["changed", "time", "added", "gone", "renamed"])
def test_a_changed_folder_is_not_recalled(tree, change):
    loaded(tree)
    file = tree / "train" / "ant" / "0.png"
    if change == "changed":
        file.write_bytes(file.read_bytes() + b" ")
    elif change == "time":
        os.utime(file, ns=(0, 0))
    elif change == "added":
        (file.parent / "1.png").write_bytes(file.read_bytes())
    elif change == "gone":
        file.unlink()
    else:
        file.rename(file.with_name("2.png"))
    assert recall(tree) is None


def test_images_behind_a_link_count(tree):
    (tree / "train" / "ant").rename(tree.parent / "elsewhere")
    (tree / "train" / "ant").symlink_to(tree.parent / "elsewhere")
    before = loaded(tree)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tree.parent / "elsewhere" / "0.png")
    assert recall(tree) is None and loaded(tree) != before


def test_a_changed_archive_is_not_recalled_though_its_time_is_set_back(archive):
    loaded(archive)
    known, content = archive.stat(), bytearray(archive.read_bytes())
    content[600] ^= 1
    archive.write_bytes(content)
    os.utime(archive, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert archive.stat().st_size == known.st_size and recall(archive) is None


def test_other_code_recalls_nothing(tree, tmp_path, monkeypatch):
    loaded(tree)
    (tmp_path / "sources.py").write_text("")
    monkeypatch.setattr(identity, "__file__", str(tmp_path / "identity.py"))
    assert recall(tree) is None


@pytest.mark.parametrize("content", [b"", b"nonsense", b"[]", b"{}", b"\xff", b"[" * 100_000, None,
                                     b'{"name": "mnist", "fingerprint": "f", "classes": 10}',
                                     b'{"name": "digits", "fingerprint": "f", "classes": "10"}'])
def test_a_damaged_memory_is_none(cache, content):
    found = loaded("digits")
    (place,) = cache.glob("*.json")
    place.unlink()
    if content is None:
        place.mkdir()
    else:
        place.write_bytes(content)
    assert recall("digits") is None and identify("digits") == found


def test_without_a_home_the_cache_is_a_temporary_folder(monkeypatch):
    for name in ("GSTLIB_CACHE", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert identity.cache().parent == Path(tempfile.gettempdir())
    monkeypatch.setenv("GSTLIB_CACHE", "")  # set but empty counts as not set
    assert identity.cache().parent == Path(tempfile.gettempdir())


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GSTLIB_CACHE", str(tmp_path / "file" / "cache"))
    assert identify("digits") == loaded("digits") and recall("digits") is None


@pytest.mark.parametrize("source", ["mnist", "./nowhere", "cifar10-folder"])
def test_what_is_nowhere_is_told(source, monkeypatch, tmp_path):
    monkeypatch.setenv("GSTLIB_DATA", str(tmp_path))
    for use in (recall, identify):
        with pytest.raises(InputError):
            use(source)


def test_recalling_imports_neither_torch_nor_what_reads_images():
    loaded("digits")
    code = ("import sys; from gstlib.data import identify; print(identify('digits').name, "
            "[m for m in ('torch', 'torchvision', 'sklearn', 'pandas') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "digits []\n"


def test_a_set_without_files_to_look_at_is_made_each_time_and_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("GSTLIB_CACHE", str(tmp_path))
    identity.remember(None, Known("digits", "f" * 64, 10))
    assert not list(tmp_path.iterdir())

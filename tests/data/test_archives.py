"""Small tar archives made to take much memory, or to end in a traceback."""

import gzip
import io
import tarfile
import tracemalloc

import pytest
import torchvision.datasets.folder  # noqa: F401  which takes memory itself
from PIL import Image

from gstlib import data
from gstlib.errors import InputError


def header(size: int, kind: bytes, content: bytes = b"", name: str = "train") -> bytes:
    """A member's header, and `content` filled up to whole blocks."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def global_headers():
    """Texts for all members that follow, another key in each."""
    for number in range(800):
        text = (b"50000 key%09d=" % number).ljust(49_999, b"a") + b"\n"
        yield header(len(text), tarfile.XGLTYPE, text) + header(0, tarfile.DIRTYPE)


def chained_headers():
    """Headers of headers."""
    for _ in range(2000):
        yield header(20, tarfile.XHDTYPE, b"20 comment=aaaaaaaa\n")


def sparse():
    """The map of a sparse file, which goes on and on."""
    block = bytearray(header(0, tarfile.GNUTYPE_SPARSE))
    block[482] = 1
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256)
    yield bytes(block)
    yield from [b"00000000001\0" * 42 + b"\1" + bytes(7)] * 50_000


def sparse_by_text():
    """The same as texts and a table of numbers in the content."""
    text = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
    yield header(len(text), tarfile.XHDTYPE, text)
    numbers = b"1000000\n" + b"1\n" * 2_000_000
    yield header(len(numbers), tarfile.REGTYPE, numbers)


@pytest.mark.parametrize("bomb", [global_headers, chained_headers, sparse, sparse_by_text])
def test_headers_take_little_memory_and_end_in_one_sentence(tmp_path, bomb):
    place = tmp_path / "images.tar.gz"
    with gzip.open(place, "wb", compresslevel=1) as file:
        file.writelines(bomb())
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            data.load(place)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and taken < 2**25


def images() -> bytes:
    """An archive of six images in two classes; each takes 4,096 bytes, its header 512 of them."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name in ("train/a/0", "train/a/1", "train/b/0", "test/a/0", "test/b/0", "test/b/1"):
            Image.new("RGB", (32, 32), (len(name), 9, 9)).save(picture := io.BytesIO(), "bmp")
            member = tarfile.TarInfo(f"{name}.bmp")
            member.size = len(picture.getvalue())
            archive.addfile(member, io.BytesIO(picture.getvalue()))
    return whole.getvalue()


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]


def compressed() -> bytes:
    """As gzip keeps what does not become smaller; behind its 10 bytes and 5 of deflate's the images begin."""
    return gzip.compress(images(), compresslevel=0)


@pytest.mark.parametrize("make", [
    lambda: images()[:5 * 4096], lambda: images()[:5 * 4096 + 100], lambda: flipped(images(), 5 * 4096 + 3),
    lambda: flipped(compressed(), 15 + 3000)], ids=["cut between", "cut within a header", "header", "compressed"])
def test_a_damaged_archive_is_not_taken_for_a_smaller_or_another_set(tmp_path, make):
    (place := tmp_path / "images.tar").write_bytes(images())
    assert len(data.load(place).train_y) == 3
    place.write_bytes(make())
    with pytest.raises(InputError, match="cannot be unpacked safely"):
        data.load(place)

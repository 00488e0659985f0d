import os
import stat

import pytest

from gstlib import files


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("there", [False, True])
def test_a_file_appears_whole_and_readable_by_others(tmp_path, there):
    place = tmp_path / "file"
    if there:
        place.write_bytes(b"first")
    files.write_whole(place, lambda file: file.write(b"second"))
    assert place.read_bytes() == b"second" and names(tmp_path) == ["file"]
    assert stat.S_IMODE(place.stat().st_mode) == 0o644


@pytest.mark.parametrize("name", ["a" * 255, "\u00e9" * 127, "\U0001f600" * 63])
def test_a_file_may_have_the_longest_name_that_a_file_can_have(tmp_path, name):
    files.write_whole(tmp_path / name, lambda file: file.write(b"new"))
    assert [place.name for place in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("call", ["fsync", "chmod", "replace", "write"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_changes_nothing(tmp_path, monkeypatch, call, error):
    def fails(*_):
        raise error

    place = tmp_path / "file"
    place.write_bytes(b"first")
    if call != "write":
        monkeypatch.setattr(os, call, fails)
    with pytest.raises(type(error)):
        files.write_whole(place, fails if call == "write" else lambda file: file.write(b"second"))
    assert place.read_bytes() == b"first" and names(tmp_path) == ["file"]


def make(place, kind: str) -> None:
    """Something at `place` that is no regular file."""
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("/dev/null" if kind == "link to a device" else "nowhere")


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device", "dangling link"])
def test_only_a_regular_file_is_replaced(tmp_path, kind):
    place = tmp_path / "place"
    make(place, kind)
    before = place.lstat()
    with pytest.raises(OSError, match="no regular file"):
        files.write_whole(place, lambda file: file.write(b"text"))
    assert place.lstat() == before and names(tmp_path) == ["place"]


def test_only_old_temporary_files_are_swept(tmp_path):
    now = (tmp_path / "clock").write_bytes(b"") or (tmp_path / "clock").stat().st_mtime
    for name, hours in ((".a-1.tmp", 25), (".a-2.tmp", 23), (".a-3.tmp", -48), ("a.tmp", 99), (".a", 99)):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (now - 3600 * hours,) * 2)
    files.sweep(tmp_path)
    assert names(tmp_path) == [".a", ".a-2.tmp", ".a-3.tmp", "a.tmp", "clock"]
    files.sweep(tmp_path / "nowhere")

import os
import stat

import pytest

from gstlib import files


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("replace", [True, False])
def test_a_file_appears_whole_and_readable_by_others(tmp_path, replace):
    place = tmp_path / "file"
    files.write_whole(place, lambda file: file.write(b"text"), replace)
    assert place.read_bytes() == b"text" and stat.S_IMODE(place.stat().st_mode) == 0o644 and names(tmp_path) == ["file"]


def test_what_is_there_is_replaced_only_where_that_is_asked_for(tmp_path):
    place = tmp_path / "file"
    place.write_bytes(b"first")
    with pytest.raises(FileExistsError):
        files.write_whole(place, lambda file: file.write(b"second"), replace=False)
    assert place.read_bytes() == b"first" and names(tmp_path) == ["file"]
    files.write_whole(place, lambda file: file.write(b"second"))
    assert place.read_bytes() == b"second" and names(tmp_path) == ["file"]


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


@pytest.mark.parametrize("there", [False, True])
def test_without_hard_links(tmp_path, monkeypatch, there):
    def fails(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", fails)
    place = tmp_path / "file"
    if there:
        place.write_bytes(b"first")
        with pytest.raises(FileExistsError):
            files.write_whole(place, lambda file: file.write(b"second"), replace=False)
    else:
        files.write_whole(place, lambda file: file.write(b"first"), replace=False)
    assert place.read_bytes() == b"first" and names(tmp_path) == ["file"]


def test_a_link_that_was_made_and_yet_refused(tmp_path, monkeypatch):
    def linked_and_refused(source, target, link=os.link):
        link(source, target)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(os, "link", linked_and_refused)
    files.write_whole(tmp_path / "file", lambda file: file.write(b"text"), replace=False)
    assert (tmp_path / "file").read_bytes() == b"text" and names(tmp_path) == ["file"]


def test_only_old_temporary_files_are_swept(tmp_path):
    now = (tmp_path / "clock").write_bytes(b"") or (tmp_path / "clock").stat().st_mtime
    for name, hours in ((".a-1.tmp", 25), (".a-2.tmp", 23), (".a-3.tmp", -48), ("a.tmp", 99), (".a", 99)):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (now - 3600 * hours,) * 2)
    (tmp_path / ".folder.tmp").mkdir()
    os.utime(tmp_path / ".folder.tmp", (now - 3600 * 99,) * 2)
    files.sweep(tmp_path)
    assert names(tmp_path) == [".a", ".a-2.tmp", ".a-3.tmp", ".folder.tmp", "a.tmp", "clock"]
    files.sweep(tmp_path / "nowhere")
    assert files.temporaries(tmp_path / "nowhere") == []

import os
import tracemalloc
import zipfile

import pytest
from test_runs import PROVENANCE, filled, leftovers, newer, spec, tables  # noqa: F401

from gstlib.errors import InputError
from gstlib.store import Store, export, import_, runs


@pytest.fixture
def archive(filled, tmp_path):  # noqa: F811
    """An archive of the runs of seeds 0 and 1."""
    filled.write(spec(1), PROVENANCE, tables())
    assert export(filled, tmp_path / "runs.zip") == 2
    return tmp_path / "runs.zip"


@pytest.fixture
def other(tmp_path) -> Store:
    return Store(tmp_path / "other")


def test_an_archive_takes_runs_elsewhere(filled, archive, other):  # noqa: F811
    other.write(spec(2), PROVENANCE, tables())
    added, known, refused = import_(other, archive)
    assert added == filled.ids() and known == [] and refused == {}
    for s in (spec(), spec(1)):
        assert other.file(s.id).read_bytes() == filled.file(s.id).read_bytes() and other.read(s.id).spec == s
    assert import_(other, archive) == ([], filled.ids(), {}) and not leftovers(other)


def test_files_without_a_date_are_packed(filled, other, tmp_path):  # noqa: F811
    os.utime(filled.file(spec().id), (0, 0))  # zip's years begin in 1980
    assert export(filled, tmp_path / "runs.zip") == 1
    assert import_(other, tmp_path / "runs.zip") == ([spec().id], [], {})


def test_chosen_runs_alone_are_exported_and_damaged_ones_left_out(filled, archive, capsys):  # noqa: F811
    assert export(filled, archive, [spec(1).id]) == 1
    filled.file(spec().id).write_bytes(b"nonsense")
    assert export(filled, archive) == 1 and "counts as missing" in capsys.readouterr().err
    with zipfile.ZipFile(archive) as packed:
        assert packed.namelist() == [f"runs/{spec(1).id}.parquet"]


@pytest.mark.parametrize("ids", [[], None])
def test_an_archive_of_nothing_is_not_written(filled, archive, ids):  # noqa: F811
    before = archive.read_bytes()
    for run_id in filled.ids() if ids is None else ():
        filled.file(run_id).unlink()
    with pytest.raises(InputError, match="no run to export"):
        export(filled, archive, ids)
    assert archive.read_bytes() == before and list(archive.parent.glob("*.tmp")) == []


def test_an_archive_mends_a_damaged_run(filled, archive):  # noqa: F811
    filled.file(spec().id).write_bytes(b"nonsense")
    assert import_(filled, archive) == ([spec().id], sorted([spec(1).id]), {})
    assert filled.read(spec().id).spec == spec()


@pytest.mark.parametrize(("column", "refused"), [("train_loss", True), ("seconds", False)])
def test_other_rows_of_a_stored_run_are_refused(archive, other, column, refused):
    changed = tables()
    changed["epoch"][0][column] = 9.0
    other.write(spec(), PROVENANCE, changed)
    added, known, why = import_(other, archive)
    assert added == [spec(1).id] and (list(why), known) == (([spec().id], []) if refused else ([], [spec().id]))
    assert other.read(spec().id).tables["epoch"][column][0] == 9.0


@pytest.mark.parametrize("kind", ["device", "link to a device", "pipe", "run", "run elsewhere", "among the runs", "below a file",
                                  "link to itself", "below a link to itself"])
def test_an_archive_is_a_new_or_regular_file_outside_the_runs(filled, tmp_path, kind):  # noqa: F811
    place = {"run": filled.file(spec().id), "run elsewhere": tmp_path / f"{spec().id}.parquet", "among the runs": filled.path / ".." / "results" / "runs" / "a.zip",
             "below a file": tmp_path / "file" / "runs.zip", "below a link to itself": tmp_path / "loop" / "runs.zip",
             "link to itself": tmp_path / "loop"}.get(kind, tmp_path / "place")
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    if kind == "device":
        place = tmp_path / "null"
        try:
            os.mknod(place, 0o20666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("making devices is for root")
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "link to a device":
        place.symlink_to("/dev/null")
    before = sorted((p, p.lstat().st_mode, p.lstat().st_ino) for p in tmp_path.rglob("*"))
    with pytest.raises(InputError, match="no regular file|stored run|Not a directory|levels of symbolic") as caught:
        export(filled, place)
    assert "\n" not in str(caught.value)
    assert sorted((p, p.lstat().st_mode, p.lstat().st_ino) for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", [None, b"", b"no archive at all", "pipe", "endless"])
def test_what_is_no_archive_is_refused(tmp_path, other, content):
    place = tmp_path / "runs.zip"
    if content == "pipe":
        os.mkfifo(place)
    elif content == "endless":
        place.symlink_to("/dev/zero")
    elif content is not None:
        place.write_bytes(content)
    with pytest.raises(InputError, match="runs.zip is no archive"):
        import_(other, place)
    assert not other.path.exists()


def test_foreign_members_are_refused_one_by_one(filled, archive, other, tmp_path):  # noqa: F811
    good = filled.file(spec().id).read_bytes()
    later = newer(filled, "field")
    names = {"runs/../../escaped.parquet": good, "/absolute.parquet": good, f"{spec().id}.parquet": good,
             "\x1b[2J\nname": b"", f"runs/{spec(1).id}.parquet": good, f"runs/{spec(2).id}.parquet": good[:500],
             f"runs/{later}.parquet": filled.file(later).read_bytes(), f"runs/{spec().id}.parquet": good}
    with zipfile.ZipFile(archive, "w") as packed:
        for name, content in names.items():
            packed.writestr(name, content)
    added, known, refused = import_(other, archive)
    assert added == other.ids() == [spec().id] and known == [] and len(refused) == len(names) - 1
    assert " [2J name" in refused and "does not know" in refused[f"runs/{later}.parquet"]
    assert not list(tmp_path.rglob("escaped*")) and not list(tmp_path.rglob("absolute*")) and not leftovers(other)


def test_a_newer_run_that_is_stored_here_stays_and_the_others_are_taken(filled, archive):  # noqa: F811
    later = newer(filled, "schema")
    before = filled.file(later).read_bytes()
    filled.file(spec(1).id).unlink()
    added, known, refused = import_(filled, archive)
    assert (added, known, list(refused)) == ([spec(1).id], [], [later]) and "schema 99" in refused[later]
    assert filled.file(later).read_bytes() == before


@pytest.mark.parametrize("damage", ["content", "method", "encrypted"])
def test_members_that_cannot_be_unpacked_are_refused(archive, other, damage):
    content = bytearray(archive.read_bytes())
    if damage == "content":
        content[1000] ^= 0xFF
    else:
        place, value = {"method": (8, 99), "encrypted": (6, 1)}[damage]
        content[place] = value
        content[content.index(b"PK\x01\x02") + place + 2] = value
    archive.write_bytes(content)
    added, known, refused = import_(other, archive)
    assert len(added) == 1 and known == [] and len(refused) == 1


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("claimed", ["what it is", "1,000 bytes"])
def test_a_member_that_unpacks_to_much_more_takes_no_memory(archive, other, method, claimed):
    number = 2**26  # bytes; four times a run's limit
    with zipfile.ZipFile(archive, "w", method) as packed:
        packed.writestr(f"runs/{spec(2).id}.parquet", bytes(number))
    if claimed == "1,000 bytes":
        size = number.to_bytes(4, "little")
        archive.write_bytes(archive.read_bytes().replace(size, (1000).to_bytes(4, "little")))
    tracemalloc.start()
    try:
        added, known, refused = import_(other, archive)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (added, known, list(refused)) == ([], [], [f"runs/{spec(2).id}.parquet"])
    assert taken < 3 * runs.LARGEST < number and other.ids() == []

import json
import subprocess
import sys
from pathlib import Path

import faults
import pytest


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the command saw; in a process of its own, because one with PyTorch's backward threads cannot fork."""
    file = tmp_path_factory.mktemp("faults") / "faults.json"
    ended = subprocess.run([sys.executable, str(Path(faults.__file__)), "--kills=3", f"--output={file}"],
                           capture_output=True, text=True, timeout=400)
    assert file.exists(), ended.stderr
    return json.loads(file.read_text())["faults"]


@pytest.mark.parametrize("number", range(1 + len(faults.CASES)),
                         ids=["killed again and again", *(case.__name__ for case in faults.CASES)])
def test_a_fault_loses_nothing(seen, number):
    assert seen[number]["held"], seen[number]


def test_a_child_that_fails_is_not_waited_for(capfd):
    child = faults.Child(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="failed"):
        child.until(lambda: False)
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.mark.parametrize("output", ["file/faults.json", "folder"])
def test_where_nothing_can_be_written_is_told_before_minutes_of_work(tmp_path, monkeypatch, capsys, output):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(sys, "argv", ["faults.py", f"--output={tmp_path / output}"])
    monkeypatch.setattr(faults, "run", lambda *_: pytest.fail("it went to work"))
    with pytest.raises(SystemExit, match="2"):
        faults.main()
    assert "cannot write to --output" in capsys.readouterr().err

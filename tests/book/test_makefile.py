"""What make does, with stand-ins that write down how they were called instead of tools."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gstlib.book.notebook import drawn_from
from gstlib.errors import InputError

ROOT = Path(__file__).parents[2]
TOOL = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
given = {{name: os.environ.get(name) for name in ("PROFILE", "RESULTS", "DATA", "SEEDS", "IPYTHONDIR")}}
with open("calls", "a") as calls:
    calls.write(json.dumps([Path(sys.argv[0]).name, sys.argv[1:], given]) + "\\n")
if "gstlib.book.notebook" in sys.argv:  # which says what the pages would be drawn from, or refuses
    print(Path("state").read_text() if os.path.exists("state") else sys.exit("gstlib: refused"))
if sys.argv[0].endswith("papermill"):
    Path(sys.argv[5]).write_text("executed")
if sys.argv[0].endswith("jupyter-book"):
    Path("book/_build/html").mkdir(parents=True)
    Path("book/_build/html/index.html").write_text("built")
"""
ODD = ["my runs", "2024", "1e3", "a$b;c", "$(shell touch x)", "`touch x`", "$(touch x)", "a'b\"c", "a:b", "#x", "-x", "~",
       "NAME {}", "a\\b", "résultats", "a ", "%", "a=b", "*", "a&b|c<d>e", "a\nb"]


@pytest.fixture
def project(tmp_path):
    """A project with two chapters, an executed page and tools that only write down how they were called."""
    place = tmp_path / "project"
    for name in ("chapters/a.ipynb", "chapters/b.ipynb", ".venv/bin/x", "book/chapters/old.ipynb", "pyproject.toml",
                 ".venv/.ready"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).touch()
    (place / "state").write_text("one")
    shutil.copy(ROOT / "Makefile", place)
    for tool in ("python", "papermill", "jupyter-book"):
        (place / ".venv/bin" / tool).write_text(TOOL)
        (place / ".venv/bin" / tool).chmod(0o755)
    return place


def make(project, *words, rc: int = 0, **environment) -> list:
    """The calls (tool, arguments, environment) that make made."""
    own = ("PROFILE", "RESULTS", "TRAIN", "DATA", "SEEDS", "FIGURES", "QUICK", "KILLS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    clean = {name: value for name, value in os.environ.items() if name not in own}
    (project / "calls").unlink(missing_ok=True)
    before = {place.name for place in project.iterdir()}
    done = subprocess.run(["make", *words], cwd=project, env=clean | environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (rc == 0), done.stderr
    assert {place.name for place in project.iterdir()} - before <= {"calls", "build"}, "nothing else was made"
    return [json.loads(line) for line in (project / "calls").read_text().splitlines()]


def tools(calls) -> list[str]:
    return [tool if tool != "python" else argv[1] for tool, argv, _ in calls]


def test_figures_up_to_date_are_not_drawn_again_for_the_book(project):
    assert tools(make(project, "book")) == ["gstlib.book.notebook", "papermill", "papermill", "jupyter-book"]
    assert sorted(p.name for p in (project / "book/chapters").iterdir()) == [".drawn", "a.ipynb", "b.ipynb"]
    assert tools(make(project, "book")) == ["gstlib.book.notebook", "jupyter-book"]
    asked = tools(make(project, "figures"))
    assert asked == ["gstlib.book.notebook", "papermill", "papermill"], "asked for by name they are"
    (project / "state").write_text("two")
    assert "papermill" in tools(make(project, "book"))


@pytest.mark.parametrize("number", range(len(ODD)))
def test_parameters_reach_every_tool_as_they_were_given(project, number):
    """Each odd text in each place, half of them on the command line and half from the environment."""
    words = {name: ODD[(number + shift) % len(ODD)] for shift, name in enumerate(("RESULTS", "DATA", "SEEDS"))}
    given = [f"{name}={value}" for name, value in words.items()]
    calls = make(project, "book", "TRAIN=1", *given) if number % 2 else make(project, "book", TRAIN="1", **words)
    assert tools(calls) == ["gstlib", "gstlib.book.notebook", "papermill", "papermill", "jupyter-book"]
    assert calls[0][1][3:] == ["all", "--profile=mini", *(f"--{n.lower()}={value}" for n, value in words.items())]
    assert calls[1][1][2:] == ["a", "b"] and all({n: env[n] for n in words} == words for _, _, env in calls)
    for name, (_, argv, environment) in zip("ba", sorted(calls[2:4], key=lambda call: call[1][3], reverse=True)):
        assert argv[3:7] == [f"chapters/{name}.ipynb", f"book/chapters/{name}.ipynb", "-k", "python3"]
        assert argv[7:] == ["-r", "profile", "mini", "-r", "results", words["RESULTS"], "-r", "output",
                            "book/chapters/figures", "-r", "data", words["DATA"], "-r", "seeds", words["SEEDS"]]
        assert environment["IPYTHONDIR"] == str(project / "build/ipython")


def test_nothing_is_removed_for_parameters_that_are_refused(project):
    (project / "state").unlink()
    for target in ("figures", "book"):
        assert tools(make(project, target, "PROFILE=nope", rc=2)) == ["gstlib.book.notebook"]
    assert (project / "book/chapters/old.ipynb").exists()


def test_a_chapter_that_fails_leaves_no_claim_to_be_drawn(project):
    (project / ".venv/bin/papermill").write_text("#!/bin/sh\nexit 1\n")
    make(project, "book", rc=2)
    assert not (project / "book/chapters/.drawn").exists()


def test_smoke_trains_every_experiment(project):
    calls = make(project, "smoke", "FIGURES=figure1-vgg11", "SEEDS=1", "DATA=/images", "RESULTS=a$b")
    assert tools(calls) == ["gstlib", "gstlib.book.notebook", "papermill", "papermill", "jupyter-book"]
    assert calls[0][1] == ["-m", "gstlib", "run", "all", "--profile=smoke", "--results=results"]
    assert calls[2][1][7:] == ["-r", "profile", "smoke", "-r", "results", "results", "-r", "output", "book/chapters/figures"]


def test_training_first_is_of_every_figure_unless_some_are_named(project):
    calls = make(project, "figures", "TRAIN=1", "PROFILE=quarter", "DATA=/images")
    assert calls[0][1][2:] == ["run", "all", "--profile=quarter", "--results=book/results", "--data=/images"]
    calls = make(project, "train", "FIGURES=figure2 figure3 *")
    assert calls[0][1][2:] == ["run", "figure2", "figure3", "*", "--profile=mini", "--results=book/results"]
    assert "gstlib" not in tools(make(project, "figures"))


def test_other_targets_take_their_variables_whole(project):
    assert make(project, "bench", "QUICK=1")[0][1][2:] == ["bench", "--quick", "--output", "build/bench.json"]
    assert make(project, "bench")[0][1][2:] == ["bench", "--output", "build/bench.json"]
    assert make(project, "faults", "KILLS=1; touch x", "RESULTS=my runs")[0][1] == [
        "tests/faults.py", "--kills=1; touch x", "--output=my runs/faults.json"]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Asks what would be drawn from, in a small copy of the project with this book's runs in two folders."""
    for name in ("chapters", "gstlib/room"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("pyproject.toml", "chapters/a.ipynb", "gstlib/room/b.py"):
        (tmp_path / name).write_text("")
    for name in ("book/results", "book-results"):
        shutil.copytree(ROOT / "book/results", tmp_path / name, ignore=shutil.ignore_patterns(".*"))
    monkeypatch.chdir(tmp_path)

    def ask(*chapters, profile="mini", results="book/results", data=None, seeds=None):
        return drawn_from(chapters or ["a"], profile, results, data, seeds)

    return ask


def test_what_figures_are_drawn_from_knows_parameters_sources_and_every_run(drawn, tmp_path):
    said = [drawn(), drawn("a", "b"), drawn(seeds="10"), drawn(results="book-results"),
            drawn(results=str(tmp_path / "book/results"))]
    (tmp_path / "pyproject.toml").touch()
    assert drawn() == said[0], "a time is no content"
    for name in ("pyproject.toml", "chapters/a.ipynb", "gstlib/room/b.py", "book/results/bench.json",
                 "book/results/new.json"):
        with (tmp_path / name).open("a") as file:
            file.write("[]" if "new" in name else " ")
        said.append(drawn())
    runs = sorted((tmp_path / "book/results/runs").iterdir())
    runs[0].unlink()
    said.append(drawn())
    next((tmp_path / "book/results/elsewhere/runs").iterdir()).unlink()  # which the engine's page reads
    said.append(drawn())
    assert len(set(said)) == len(said) == 12
    with pytest.raises(InputError, match=f"{tmp_path}/nowhere holds no run"):
        drawn(results="nowhere")
    for wrong in ({"profile": "nope"}, {"seeds": "many"}, {"results": ""}, {"data": "digits"}):
        with pytest.raises(InputError):
            drawn(**wrong)


def test_what_is_no_file_among_the_results_stops_no_drawing(drawn, tmp_path):
    before = drawn()
    (tmp_path / "book/results/a.json").mkdir()
    assert drawn() == before
    os.mkfifo(tmp_path / "book/results/pipe.json")
    os.mkfifo(tmp_path / f"book/results/elsewhere/runs/{16 * 'f'}.parquet")
    assert drawn() == before

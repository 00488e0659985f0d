"""What make would do, without doing it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[2] / "Makefile"
STAMP = "book/chapters/.drawn-mini-book-results--"
SOURCES = ("pyproject.toml", "chapters/figure1.ipynb", "gstlib/figures.py", "book/results/bench.json",
           "book/results/runs/0123456789abcdef.parquet", "book/results/runs/fedcba9876543210.parquet")
OLD, DRAWN, NEW = 1_000_000_000, 1_100_000_000, 1_200_000_000


@pytest.fixture
def project(tmp_path):
    """A project whose figures were drawn after the last change."""
    shutil.copy(MAKEFILE, tmp_path)
    for name in (*SOURCES, ".venv/.ready", STAMP):
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    for place in tmp_path.rglob("*"):
        os.utime(place, (OLD, OLD))
    os.utime(tmp_path / STAMP, (DRAWN, DRAWN))
    return tmp_path


def planned(project, *words) -> str:
    """The commands that make would run."""
    own = ("PROFILE", "RESULTS", "TRAIN", "DATA", "SEEDS", "FIGURES", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(["make", "-n", *words], cwd=project, env=environment, capture_output=True, text=True,
                          check=True).stdout


def test_figures_up_to_date_are_not_drawn_again_for_the_book(project):
    commands = planned(project, "book")
    assert "papermill" not in commands and "jupyter-book build" in commands
    removes = "rm -rf book/chapters"
    assert removes in planned(project, "figures") and removes not in commands, "asked for by name they are"


@pytest.mark.parametrize("name", SOURCES)
def test_a_newer_source_or_run_is_drawn(project, name):
    os.utime(project / name, (NEW, NEW))
    assert "papermill" in planned(project, "book")


def test_a_run_that_is_gone_is_noticed(project):
    (project / SOURCES[-1]).unlink()
    assert "papermill" in planned(project, "book")


@pytest.mark.parametrize("change", ["PROFILE=quarter", "RESULTS=results", "DATA=/images", "SEEDS=0,1"])
def test_figures_of_other_parameters_are_drawn(project, change):
    assert "papermill" in planned(project, "book", change)


def test_smoke_trains_every_experiment(project):
    commands = planned(project, "smoke", "FIGURES=figure1-vgg11", "SEEDS=1", "DATA=/images")
    assert "gstlib run all --profile smoke --results results" in commands
    assert "--seeds" not in commands and "/images" not in commands
    assert commands.index("gstlib run") < commands.index("papermill") < commands.index("jupyter-book build")


def test_training_first_is_of_every_figure_unless_some_are_named(project):
    commands = planned(project, "figures", "TRAIN=1", "PROFILE=quarter", "DATA=/images")
    assert "gstlib run all --profile quarter --results book/results" in commands and "--data /images" in commands
    commands = planned(project, "book", "TRAIN=1", "FIGURES=figure2 figure3")
    assert "gstlib run figure2 figure3 --profile mini" in commands
    assert "gstlib run" not in planned(project, "figures")

"""README's walk "Add a score, a network, a figure", followed step by step in a copy of the source."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WALK = (ROOT / "README.md").read_text().split("## Add a score, a network, a figure")[1].split("\n## ")[0]
# (file, lines of the change) of every diff
STEPS = [(name, lines.splitlines()) for block in re.findall(r"```diff\n(.*?)```", WALK, flags=re.S)
         for name, lines in re.findall(r"^--- (\S+)\n((?:[-+ ].*\n|\n)*?)(?=--- |\Z)", block, flags=re.M)]


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the source with every step of the walk taken."""
    top = tmp_path_factory.mktemp("walk")
    shutil.copytree(ROOT / "gstlib", top / "gstlib", ignore=shutil.ignore_patterns("__pycache__"))
    for name, lines in STEPS:
        old, new = ("\n".join(line[1:] for line in lines if line[:1] in ("", " ", sign)) for sign in "-+")
        text = (top / name).read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} places for:\n{old}"
        (top / name).write_text(text.replace(old, new))
    return top


def test_the_walk_touches_as_few_files_as_it_says():
    assert list(dict.fromkeys(name for name, _ in STEPS)) == [
        "gstlib/scores.py", "gstlib/pruning.py", "gstlib/models.py", "gstlib/spec.py", "gstlib/data/sources.py",
        "gstlib/experiments/figures.py"]


def test_a_score_a_network_and_an_experiment_added_so_work(changed):
    code = """
import gstlib
from gstlib import Pruner, Schedule, data, experiments, models, scores
from gstlib.spec import DataSpec, ModelSpec, OptimiserSpec, PruningSpec, RunSpec
from gstlib.training import train
images = data.load("digits")
spec = RunSpec(DataSpec(*images.known, train_size=40, test_size=20), ModelSpec("tiny", 0.5),
               OptimiserSpec(epochs=2, batch_size=20), PruningSpec(("conv1",), (0,), (1,), (0.5,), 1, score="peak"))
assert RunSpec.from_json(spec.to_json()) == spec
assert [row["removed_total"] for row in train.train(spec, images).tables["event"]] == [2, 4]
network = models.build("tiny")
largest = scores.peak(network.conv1.weight).argsort()[:8].tolist()
pruner = Pruner(network, Schedule(0, 0, 0.5, 1), ["conv1"], score="peak", target="S")
pruner.epoch(0, lambda: 0.5)
assert sorted(largest) == (~pruner.layers[0].present).nonzero().flatten().tolist()
profile = experiments.profile("smoke")
runs = experiments.experiment("peaks").runs(profile, experiments.data_spec(profile, *images.known), [0])
assert [(run.label, run.spec.pruning and run.spec.pruning.score) for run in runs] == [("none", None), ("S r=40 peak", "peak")]
print(gstlib.__file__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=changed, env=os.environ | {"PYTHONPATH": str(changed)},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(changed)


def test_a_data_set_added_so_is_listed_trained_on_and_read(changed, tmp_path):
    def command(*words):
        done = subprocess.run([sys.executable, "-m", "gstlib", *words, "--data", "noise", "--seeds", "1", "--results",
                               str(tmp_path / "results")], cwd=changed, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(changed), "GSTLIB_CACHE": str(tmp_path / "cache")})
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "False" in command("list", "figureA1")
    command("run", "figureA1", "--quiet")
    assert "False" not in command("list", "figureA1")
    code = ("from gstlib.store import Store; from gstlib.reading.study import study; from gstlib.reading import text; "
            "print(text.caption(study(Store('results'), 'figureA1', data='noise')))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(changed)},
                          capture_output=True, text=True)
    assert done.stdout.startswith("Data: random images."), done.stderr

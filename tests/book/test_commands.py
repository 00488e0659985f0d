"""Every command that the book, its chapters, the README and messages print, run as it is printed.

What would take long is run at a glance, and this is all of it: `run` is checked by the parser and then carried out as
`list` of the same runs, `bench` is checked by the parser alone, make by `make -n`, `pytest` by its marker.  `pip install`,
`ray start` and what SLURM's `srun` adds need a network, a cluster or a queue, and are looked at, not run.  Of images only
the name is taken, except where the set is `digits`, which is there.
"""

import ast
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from gstlib import __main__, data, experiments
from gstlib.data import Known
from gstlib.reading.study import command
from gstlib.store import Store, export
from gstlib.training import pace

ROOT = Path(__file__).parents[2]
BEGIN = r"(?:srun )?(?:\.venv/bin/)?python -m |make [a-z]|pip install|ray start"
PRINTED = re.compile(rf"`((?:{BEGIN})[^`]*)`|^(?: {{4}})?((?:{BEGIN})[^`\n]*)$|with: ((?:{BEGIN})[^`;]*)", flags=re.M)


def printed(text: str) -> list[str]:
    """The commands in a text, each on one line without its comment."""
    return [shlex.join(shlex.split(" ".join(next(filter(None, found)).split("#")[0].split())))
            for found in PRINTED.findall(text)]


def messages(file: Path):
    """The texts in a source file, with PLACE for what is put in when it runs."""
    nodes = [*ast.walk(ast.parse(file.read_text()))]
    whole = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in whole for part in node.values}
    for node in whole:
        yield "".join(part.value if isinstance(part, ast.Constant) else "PLACE" for part in node.values)
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


def commands() -> dict[str, str]:
    """Every command and a file that prints it."""
    found = {}
    for file in (ROOT / "README.md", *(ROOT / "book").glob("*.md")):
        found |= dict.fromkeys(printed(file.read_text()), file.name)
    for file in (ROOT / "chapters").glob("*.ipynb"):
        for cell in json.loads(file.read_text())["cells"]:
            found |= dict.fromkeys(printed("".join(cell["source"])), file.name)
    for file in (ROOT / "gstlib").rglob("*.py"):
        for text in messages(file):
            found |= dict.fromkeys((one for one in printed(text) if one != "python -m gstlib"), file.name)  # its name
    made = [command(figure, profile, experiments.profile(profile).data, "my results", seeds)
            for figure in experiments.EXPERIMENTS for profile in experiments.PROFILES for seeds in (None, [3], "2-5")]
    return found | dict.fromkeys(made, "study.py")


COMMANDS = commands()


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A folder as a reader has it, with results under every name that commands give them, and runs in an archive."""
    place = tmp_path_factory.mktemp("reader")
    some = sorted((ROOT / "book/results/runs").iterdir())[::10]
    for name in ("book/results", "results", "runs"):
        (place / name / "runs").mkdir(parents=True)
        for run in some:
            shutil.copy(run, place / name / "runs")
    export(Store(place / "results"), place / "runs.zip")
    return place


def run(words: list[str], monkeypatch) -> int:
    """The exit code of `python -m gstlib` with these words, what takes long replaced as the module says."""
    args = __main__.parser().parse_args(words)
    if args.command == "bench":
        return 0
    monkeypatch.setattr(pace, "seconds_per_run", lambda *_: 1.0)
    monkeypatch.setattr(data, "identify", lambda source: Known("digits" if source == "digits" else "cifar10", "f" * 64, 10))
    if args.command == "run":
        words = ["list", *args.figures, "--results", args.results]
        words += [word for name in ("profile", "data", "seeds", "device") if (value := getattr(args, name)) is not None
                  for word in (f"--{name}", value)] + ["--campaign"] * args.campaign
    return __main__.main(words)


def test_there_are_commands_from_everywhere():
    assert {"README.md", "machines.md", "how-to-read.md", "index.md", "figure1.ipynb", "cost.ipynb", "engine.ipynb",
            "faults.ipynb", "archive.py", "figures.py", "executors.py"} <= {*COMMANDS.values()}
    assert len(COMMANDS) > 60 and printed("`python -m gstlib run\nprecision`, then\n\n    make bench # long\n") == [
        "python -m gstlib run precision", "make bench"]


def test_every_printed_command_of_the_package_runs_as_printed(reader, monkeypatch, capsys):
    monkeypatch.chdir(reader)
    monkeypatch.setenv("DATA", "/shared/images")
    for text, file in COMMANDS.items():
        if "python -m gstlib" not in text:
            continue
        words = [word.replace("$DATA", "images").replace("$RESULTS", "results") for word in shlex.split(text)]
        words = words[words.index("gstlib") + 1:]
        try:
            code = run(words, monkeypatch)
        except SystemExit as refused:
            code = refused.code
        assert code == 0, f"{file}: {text}: {capsys.readouterr().err}"


def test_every_printed_target_of_make_is_there(monkeypatch):
    found = [shlex.split(text) for text in COMMANDS if text.startswith("make ")]
    for words in found:
        done = subprocess.run([*words, "-n", "-o", ".venv/.ready"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"
    known = re.search(r"GIVEN := (.*)", (ROOT / "Makefile").read_text())[1].split()
    assert {word.split("=")[0] for words in found for word in words[2:]} <= {*known}


def test_what_else_is_printed_asks_for_what_is_there():
    rest = [shlex.split(text) for text in COMMANDS if "python -m gstlib" not in text and not text.startswith("make ")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    markers = [marker.split(":")[0] for marker in project["tool"]["pytest"]["ini_options"]["markers"]]
    assert rest
    for words in rest:
        if words[:2] == ["pip", "install"]:
            assert re.fullmatch(r"(?:\.|gstlib)\[(\w+)\]", words[-1])[1] in project["project"]["optional-dependencies"]
        elif words[:3] == ["python", "-m", "pytest"]:
            assert words[3] == "-m" and words[4] in markers
        else:
            assert words[:2] == ["ray", "start"], words

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from IPython.display import Image, Markdown

from gstlib import experiments, notebook
from gstlib.spec import InputError
from gstlib.store import Store

from made_up import DATA, SMOKE, fill, write
from test_figures import stock

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
WITH_PANELS = [chapter for chapter in CHAPTERS if chapter.stem != "claims"]
EXPERIMENTS = ("figure1-vgg11", "figure1-resnet18", "figure2", "figure3", "figure4", "figure5", "figureA1")

every_chapter = pytest.mark.parametrize("chapter", WITH_PANELS, ids=lambda p: p.stem)


@every_chapter
def test_sources_store_no_output_and_have_parameters(chapter):
    cells = json.loads(chapter.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    (parameters,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    names = re.findall(r"^(\w+) = ", "".join(parameters["source"]), re.M)
    assert names == ["profile", "data", "seeds", "device", "results", "train", "output"]
    first = json.loads(CHAPTERS[0].read_text())["cells"]
    assert parameters["source"] == next(c for c in first if c["id"] == "parameters")["source"]


def execute(chapter, tmp_path, **parameters):
    place = tmp_path / "executed.ipynb"
    words = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(chapter), str(place), "-k", "python3", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done, place


def shown(place):
    """What an executed notebook displays as Markdown."""
    outputs = [out["data"].get("text/markdown", "") for cell in json.loads(place.read_text())["cells"]
               for out in cell.get("outputs", []) if "data" in out]
    return "\n".join("".join(out) for out in outputs)


@pytest.fixture
def run_here(monkeypatch):
    """Run a chapter's code cells in this process (no kernel to start): its Markdown and its pictures."""
    monkeypatch.chdir(ROOT)

    def run(chapter, **parameters):
        displayed = []
        monkeypatch.setattr(notebook, "display", displayed.append)
        names: dict = {}
        for cell in json.loads(chapter.read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{chapter.name}: {cell['id']}", "exec"), names)
                if "parameters" in cell["metadata"].get("tags", []):
                    names.update(parameters)
        return ("\n".join(d.data for d in displayed if isinstance(d, Markdown)),
                [d for d in displayed if isinstance(d, Image)])
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store with made-up runs of every experiment."""
    return stock(tmp_path_factory.mktemp("whole") / "results", *EXPERIMENTS)


def check_whole(text, output):
    """All panels drawn, nothing missing, every link to a file that is there."""
    assert "no run is stored" not in text and "Missing" not in text and "not run" not in text and "nan" not in text
    links = re.findall(r"\]\(figures/([^)]+)\)", text)
    assert links and all((output / link).stat().st_size > 0 for link in links)
    assert len({link.rpartition(".")[0] for link in links if link.endswith(".png")}) == text.count("[PNG]")


@every_chapter
def test_a_chapter_shows_every_panel_of_a_full_store(chapter, run_here, whole, tmp_path):
    text, pictures = run_here(chapter, profile="smoke", results=str(whole.path), output=str(tmp_path))
    check_whole(text, tmp_path)
    assert len(pictures) == text.count("[PNG]") > 0 and f"[notebook](path:{chapter.name})" in text


@every_chapter
def test_a_chapter_without_its_runs_names_the_command(chapter, run_here, tmp_path):
    store = Store(tmp_path / "results")
    other = "figure2" if chapter.stem in ("figure1", "figure1-run", "figure4", "figure5") else "figure1-vgg11"
    first = experiments.experiment(other).runs(SMOKE, DATA, [0])[1]
    write(store, first, 0.5, 0.1)
    text, _ = run_here(chapter, profile="smoke", results=str(store.path), output=str(tmp_path))
    assert "no run is stored at profile smoke" in text
    assert re.search(r"`python -m gstlib run figure\S+ --profile smoke`", text)


@pytest.mark.slow
@every_chapter
def test_a_chapter_executes_through_papermill(chapter, whole, tmp_path):
    done, place = execute(chapter, tmp_path, profile="smoke", results=whole.path, output=tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    check_whole(shown(place), tmp_path / "figures")


def stated_correlation(text):
    return float(re.search(r"have Pearson's \$r = ([-.\d]+)\$", text)[1])


def test_figure1_states_what_the_store_holds_and_nothing_stale(tmp_path, run_here):
    store, figures = fill(tmp_path / "results"), tmp_path / "figures"
    chapter, given = ROOT / "chapters/figure1.ipynb", {"profile": "smoke", "results": store.path, "output": figures}
    done, place = execute(chapter, tmp_path, **given)
    assert done.returncode == 0, done.stderr
    before, text = stated_correlation(shown(place)), shown(place)
    assert "3 runs per configuration" in text and "no run is stored at profile smoke" in text
    svg = (figures / "figure1-vgg11-instability.svg").read_text()
    for run in experiments.figure1_vgg11(SMOKE, DATA, range(3)):
        if run.label == "L r=40":
            write(store, run, 0.3, 0.2)
    text, _ = run_here(chapter, profile="smoke", results=str(store.path), output=str(figures))
    assert before > 0.9 and stated_correlation(text) < -0.5
    assert svg != (figures / "figure1-vgg11-instability.svg").read_text()


def test_the_claims_page_follows_the_store(tmp_path):
    store = fill(tmp_path / "results")
    done, place = execute(ROOT / "chapters/claims.ipynb", tmp_path, results=store.path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (C\d+) .* \*\*(.+?)\*\* \|", shown(place), re.M)
    assert [name for name, _ in rows] == [f"C{k}" for k in range(1, 20)]
    assert {verdict for _, verdict in rows} == {"not run"}, "smoke runs say nothing of the paper"
    assert "python -m gstlib run figure1-vgg11 --profile" in shown(place)


def test_an_empty_store_is_one_message_that_names_the_command(tmp_path):
    Store(tmp_path / "none").check_writable()
    done, place = execute(ROOT / "chapters/figure2.ipynb", tmp_path, profile="smoke", results=tmp_path / "none",
                          output=tmp_path)
    assert done.returncode != 0
    assert f"python -m gstlib run figure2 --profile smoke --results {tmp_path / 'none'}" in done.stderr
    (error,) = [out for cell in json.loads(place.read_text())["cells"] for out in cell.get("outputs", [])
                if out["output_type"] == "error"]
    assert error["ename"] == "InputError" and len(error["traceback"]) == 1, "the message, no traceback"


@pytest.mark.parametrize("name, value, words", [
    ("profile", "tiny", "unknown profile 'tiny'; choose from smoke, mini, quarter, paper"),
    ("device", "tpu", "unknown device 'tpu'; choose from auto, cpu, cuda"),
    ("seeds", "many", "seeds 'many' is neither a number"),
    ("seeds", 2.5, "seeds must be a number"),
    ("train", "yes", "train must be True or False, not 'yes'"),
    ("data", "", "data must be"),
    ("results", None, "results must name a folder"),
    ("output", 3, "output must name a folder"),
])
def test_a_bad_value_is_named(name, value, words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = {"profile": "smoke", "data": None, "seeds": None, "device": "auto", "results": str(tmp_path),
             "train": False, "output": str(tmp_path)}
    with pytest.raises(InputError, match=re.escape(words)):
        notebook.Chapter("figure1", ["figure1-vgg11"], **given | {name: value})

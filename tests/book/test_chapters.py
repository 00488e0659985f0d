import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
from IPython.display import HTML, Image, Markdown
from made_up import DATA, SMOKE, fill, stock, write

from gstlib import experiments
from gstlib.book import notebook, tables
from gstlib.campaign import executors, runner
from gstlib.claims import CLAIMS
from gstlib.errors import InputError
from gstlib.store import Store

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
WITH_PANELS = [chapter for chapter in CHAPTERS if "chapter.show(" in chapter.read_text()]
# Figure A2 is drawn from Figure 1's runs
EXPERIMENTS = [name for name in experiments.EXPERIMENTS if name != "figureA2"]

every_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
every_chapter_with_panels = pytest.mark.parametrize("chapter", WITH_PANELS, ids=lambda p: p.stem)


@every_chapter
def test_sources_store_no_output_and_have_parameters(chapter):
    cells = json.loads(chapter.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    (parameters,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    names = re.findall(r"^(\w+) = ", "".join(parameters["source"]), re.M)
    assert names == list(notebook.PARAMETERS)
    first = json.loads(CHAPTERS[0].read_text())["cells"]
    assert parameters["source"] == next(c for c in first if c["id"] == "parameters")["source"]


# what a claim's runs are trained for, and what was asked beyond the paper
OF_EXPERIMENTS = [chapter for chapter in CHAPTERS if re.match("figure|final|permanence|flatness|beyond|ebn|small", chapter.stem)]


@pytest.mark.parametrize("chapter", OF_EXPERIMENTS, ids=lambda p: p.stem)
def test_an_experiment_s_chapter_shows_its_code_ends_with_its_verdicts_and_has_three_exercises(chapter):
    cells = json.loads(chapter.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    tags = {cell["id"]: cell["metadata"].get("tags", []) for cell in code}
    assert {"spec", "frame", "plot"} <= {name for name in tags if not tags[name]}, "code that a reader sees"
    solutions = [name for name in tags if name.startswith("solution")]
    assert [name for name in tags if "hide-input" in tags[name]] == ["setup"], "one folded block"
    assert [name for name in tags if "hide-cell" in tags[name]] == solutions

    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert re.findall(r"^\*\*Exercise (\d)\.\*\*", prose, re.M) == ["1", "2", "3"]
    assert len(solutions) + prose.count(":::{dropdown} Solution") == 3
    assert re.search(r"^\*\*The question\.\*\* ", "".join(cells[0]["source"]), re.M)

    last = "".join(next(cell for cell in reversed(code) if cell["id"] not in solutions)["source"])
    page = f"chapters/{chapter.stem}"
    theirs = {claim.id for claim in CLAIMS if tables.PAGES.get(claim.id, tables.PAGES[claim.figure]) == page}
    judged = re.fullmatch(r"chapter\.verdicts\((.+)\)", last)
    assert theirs <= {*(re.findall(r"C\d+g?", judged[1]) if judged else ())}, "a box for every claim that leads here"


def glossary() -> list[str]:
    """The words of the glossary."""
    text = (ROOT / "book/glossary.md").read_text()
    return re.findall(r"^(\w.*)$", text.partition("{glossary}")[2], re.M)


@every_chapter
def test_the_first_use_of_a_word_leads_to_the_glossary(chapter):
    asked = re.compile(r"\*\*The question\.\*\* .+?\?(?=\s|$)", re.S)  # the front page lists it as it stands
    prose = "\n\n".join("".join(cell["source"]) for cell in json.loads(chapter.read_text())["cells"]
                        if cell["cell_type"] == "markdown")
    linked = [name for _, name in re.findall(r"\{term\}`(?:([^`<]+) <)?([^`>]+)>?`", prose)]
    assert {name.lower() for name in linked} <= {name.lower() for name in glossary()}
    no_words = r"(?ms)(\{term\}`[^`]+`)|^#.*?$|^```.*?^```|\[[^\]]*\]\([^)]*\)|`[^`]+`"
    plain = asked.sub("", re.sub(no_words, lambda found: found[1] or "", prose))
    for name in ("event", "instability", "E[BN]", "profile", "seed", "recovery"):  # which mean one thing everywhere
        if first := re.search(rf"({{term}}`)?\b{re.escape(name)}", plain, re.I):
            assert first[1], f"the first {name}: {plain[first.start() - 30:first.end() + 30]!r}"


def execute(chapter, tmp_path, **parameters):
    (done, place), = execute_all([chapter], tmp_path, **parameters)
    return done, place


def execute_all(chapters, tmp_path, **parameters):
    """Chapters through papermill, side by side: of each how it ended and the executed notebook."""
    words = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    places = [tmp_path / f"executed-{chapter.name}" for chapter in chapters]
    running = [subprocess.Popen([sys.executable, "-m", "papermill", "--no-progress-bar", str(chapter), str(place),
                                 "-k", "python3", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE) for chapter, place in zip(chapters, places)]
    ended = [(process, *process.communicate()) for process in running]
    return [(subprocess.CompletedProcess(process.args, process.returncode, out, err), place)
            for (process, out, err), place in zip(ended, places)]


def shown(place):
    """What an executed notebook displays as Markdown, and its boxes of what has no runs."""
    outputs = [out["data"].get("text/markdown", nothing("".join(out["data"].get("text/html", "")))) for cell in json.loads(place.read_text())["cells"]
               for out in cell.get("outputs", []) if "data" in out]
    return "\n".join("".join(out) for out in outputs)


def nothing(html):
    """The boxes that stand where no run is stored; verdicts and figures that move have their own tests."""
    return "".join(re.findall(r'<section class="box" aria-label="Nothing .*?</section>', html))


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
        return ("\n".join(nothing(d.data) if isinstance(d, HTML) else d.data for d in displayed
                          if isinstance(d, (HTML, Markdown))),
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


@every_chapter_with_panels
def test_a_chapter_shows_every_panel_of_a_full_store(chapter, run_here, whole, tmp_path):
    text, pictures = run_here(chapter, profile="smoke", results=str(whole.path), output=str(tmp_path))
    check_whole(text, tmp_path)
    assert len(pictures) == text.count("[PNG]") > 0 and f"[notebook](path:{chapter.name})" in text


@every_chapter_with_panels
def test_a_chapter_without_its_runs_names_the_command(chapter, run_here, tmp_path):
    store = Store(tmp_path / "results")
    other = "figure2" if chapter.stem in ("figure1", "figure1-run", "figure4", "figure5", "beyond-dose") else "figure1-vgg11"
    first = experiments.experiment(other).runs(SMOKE, DATA, [0])[1]
    write(store, first, 0.5, 0.1)
    text, _ = run_here(chapter, profile="smoke", results=str(store.path), output=str(tmp_path))
    assert "no run is stored at profile smoke" in text
    named = re.findall(r"[`>]python -m gstlib run (\S+) --profile smoke --data digits --results (\S+?)[`<]", text)
    assert named and {figure for figure, _ in named} <= set(experiments.EXPERIMENTS)
    assert {results for _, results in named} == {str(store.path)}


def test_what_figure_5_does_not_draw_is_named_once(run_here, tmp_path):
    store = Store(tmp_path / "results")
    write(store, experiments.experiment("figure5").runs(SMOKE, DATA, [0])[0], 0.5, 0.1)
    text, _ = run_here(ROOT / "chapters/figure5.ipynb", profile="smoke", results=str(store.path), output=str(tmp_path))
    assert re.search("Not drawn.*", text)[0].count("`L l2 weights`") == 1


def test_a_map_shows_and_counts_its_own_places_whether_or_not_the_profile_s_own_was_run(run_here, tmp_path):
    store = stock(tmp_path / "results", "beyond-when", seeds=1, but=("none",))
    text, pictures = run_here(ROOT / "chapters/beyond-when.ipynb", profile="smoke", results=str(store.path), output=str(tmp_path))
    widths, images = (line for line in text.splitlines() if line.startswith("**Panel"))
    assert "width 1/128 to width 1/16, 48 training images" in widths and "width 1/16, 24 to 96 training images" in images
    assert "Missing: 1 of 8 runs" in widths and "Missing: 1 of 12 runs" in images
    rows = {x: pd.read_csv(tmp_path / f"beyond-when-{x}.csv")["label"].tolist() for x in ("width", "images")}
    assert rows["width"] == [f"L r=40{where}" for where in (", steps/8", ", width/8", ", width/8, steps/8")]
    assert len(rows["images"]) == 5 and len(pictures) == 2


@pytest.mark.parametrize("name, left", [("beyond-when", 0), ("permanence", 1)])
def test_a_gain_without_an_unpruned_run_to_compare_with_is_no_empty_picture(name, left, run_here, whole, tmp_path):
    store = Store(tmp_path / "results")
    for run_id, run in whole.runs():
        if run.spec.pruning:
            store.write(run.spec, run.provenance, {table: rows.to_dict("records") for table, rows in run.tables.items()})
    text, pictures = run_here(ROOT / f"chapters/{name}.ipynb", profile="smoke", results=str(store.path), output=str(tmp_path))
    assert len(pictures) == left and "no run is stored at profile smoke of what this panel shows except of <code>L " in text


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("target", ["none", "L"])
@pytest.mark.parametrize("chapter", OF_EXPERIMENTS, ids=lambda p: p.stem)
def test_of_a_single_run_no_solution_tells_what_is_no_number(chapter, target, run_here, tmp_path, capsys):
    store = Store(tmp_path / "results")
    run = next(run for run in experiments.experiment("figure1-vgg11").runs(SMOKE, DATA, [0]) if run.label.startswith(target))
    write(store, run, 0.5, 0.1)
    text, _ = run_here(chapter, profile="smoke", results=str(store.path), output=str(tmp_path))
    printed = capsys.readouterr().out
    assert not re.search(r"\b(nan|inf)", text + printed, re.I), printed


def test_the_ways_of_pruning_say_over_how_many_seeds_they_are_means(run_here, tmp_path):
    store = stock(tmp_path / "results", "figure4", seeds=3)
    write(store, experiments.experiment("figure5").runs(SMOKE, DATA, [0])[1], 0.5, 0.1)  # a way of one seed alone
    text, _ = run_here(ROOT / "chapters/figure4.ipynb", profile="smoke", results=str(store.path), output=str(tmp_path))
    assert "(vgg11: 1 seed)" in text and "3 runs per configuration" in text


@pytest.mark.parametrize("name", ["flatness", "final"])
def test_a_network_is_shown_over_its_own_seeds_though_another_network_of_the_figure_lacks_them(name, run_here, tmp_path):
    store = stock(tmp_path / "results", "final-figure2", seeds=2)
    for run in experiments.experiment("final-figure2").runs(SMOKE, DATA, [1]):
        if run.label.startswith("ResNet18 "):
            store.file(run.spec.id).unlink()
    text, _ = run_here(ROOT / f"chapters/{name}.ipynb", profile="smoke", seeds=2, results=str(store.path), output=str(tmp_path))
    first = next(line for line in text.splitlines() if line.startswith("**Panel 1.**"))
    assert "2 runs per configuration" in first and "Left out" not in first


def test_the_row_of_what_is_removed_is_said_to_be_of_other_runs_than_are_counted(run_here, whole, tmp_path):
    given = {"profile": "smoke", "output": str(tmp_path)}
    chapter, said = ROOT / "chapters/permanence.ipynb", "does not count the runs of removing"
    assert run_here(chapter, results=str(whole.path), **given)[0].count(said) == 1
    without = stock(tmp_path / "results", "final-figure5", "final-figure3", seeds=1, but=("L r=40",))
    assert said not in run_here(chapter, results=str(without.path), **given)[0]


def test_the_engine_s_page_says_what_is_lacking_on_other_data(monkeypatch, whole, tmp_path):
    monkeypatch.chdir(ROOT)
    displayed, names = [], {}
    monkeypatch.setattr("IPython.display.display", lambda *shown: displayed.extend(shown))
    for cell in json.loads((ROOT / "chapters/engine.ipynb").read_text())["cells"]:
        if cell["id"] in ("parameters", "tables", "precisions"):
            exec("".join(cell["source"]), names)
            names |= {"profile": "smoke", "data": "svhn", "results": str(whole.path), "output": str(tmp_path)}
    assert "no run at profile 'smoke' on data 'svhn'.* Make them with `python -m gstlib run precision" in displayed[-1].data


@pytest.mark.slow
@every_chapter_with_panels
def test_a_chapter_executes_through_papermill(chapter, whole, tmp_path):
    done, place = execute(chapter, tmp_path, profile="smoke", results=whole.path, output=tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    check_whole(shown(place), tmp_path / "figures")


def stated_correlation(text):
    return float(re.search(r"Pearson's \$r = ([-.\d]+)\$", text)[1])


def claim(text, name):
    """What the claims page says of a claim: estimate with interval, and verdict."""
    row = re.search(rf"^\| {name} +\|.*$", text, re.M)[0].split("|")
    return row[4].strip(), re.search(r"\*\*(.+?)\*\*", row[6])[1]


def test_one_changed_row_changes_number_verdict_and_figure_and_nothing_stale_stays(tmp_path, run_here):
    profile = experiments.profile("quarter")
    store, output = fill(tmp_path / "results", "quarter"), tmp_path / "figures"
    pages = [ROOT / "chapters/figure1.ipynb", ROOT / "chapters/claims.ipynb"]
    given = {"profile": "quarter", "results": str(store.path), "output": str(output)}
    runs = {(run.label, run.spec.seed): run.spec
            for run in experiments.figures.figure1_vgg11(profile, next(store.about())[1].data, range(3))}

    def executed():
        chapter, _ = run_here(pages[0], **given)
        ((done, place),) = execute_all(pages[1:], tmp_path, **given)  # glue needs a kernel
        assert done.returncode == 0, done.stderr
        claims = shown(place)
        files = {place.name: place.read_bytes() for place in output.iterdir()}
        assert "3 runs per configuration" in chapter and "figure1-resnet18 --profile quarter" in chapter
        assert re.findall(r"^\| (C\d+g?) ", claims, re.M)[:len(CLAIMS)] == [claim.id for claim in CLAIMS]  # robustness follows
        assert f"python -m gstlib run figure4 --profile quarter --data cifar10 --results {store.path}" in claims
        return stated_correlation(chapter), claim(claims, "C1"), files

    correlation, (estimate, verdict), files = executed()
    assert correlation > 0.9 and verdict == "supported"
    found = store.read(runs["L r=40", 1].id)
    rows = {name: table.to_dict("records") for name, table in found.tables.items()}
    rows["epoch"][-1]["test_accuracy"] = rows["final"][0]["accuracy"] = 0.1
    store.file(found.spec.id).unlink()  # the store keeps what it has
    store.write(found.spec, found.provenance, rows)
    changed, (other, new_verdict), new_files = executed()
    assert changed < correlation - 0.1 and other != estimate and new_verdict != "supported"
    assert set(files) == set(new_files)
    # PNG, SVG and CSV of each panel, the list of its runs, and the picture for links; the banner speaks of no number
    assert files.pop("banner.html") == new_files["banner.html"]
    assert len(files) == 9 and all(files[name] != new_files[name] for name in files)

    for spec in runs.values():
        store.file(spec.id).unlink()
    resnet18 = experiments.figures.figure1_resnet18(profile, found.spec.data, [0])
    for run in resnet18:
        write(store, run, 0.6, 0.1, "quarter")
    text, pictures = run_here(pages[0], **given)
    # two of ResNet18; of its other readings there is the network that was never pruned alone, and of VGG11 nothing
    assert len(pictures) == 2 and text.count("no run is stored at profile quarter of what this panel shows") == 2
    assert "Figure 1 top" in text and "shows except of <code>none</code>; other panels" in text
    left = {place.name for place in output.iterdir()} - {"banner.html", "card.png"}  # those of the claims' page
    assert len(left) == 8 and all(name.startswith("figure1-resnet18") for name in left)


@pytest.mark.parametrize("name", ["runs", "engine"])
def test_a_page_that_reads_single_runs_passes_over_a_damaged_one(name, run_here, tmp_path, capsys):
    store = fill(tmp_path / "results")
    shutil.copytree(store.folder, store.path / "elsewhere/runs")
    store.file(store.ids()[0]).write_bytes(b"nonsense")
    run_here(ROOT / f"chapters/{name}.ipynb", profile="smoke", results=str(store.path), output=str(tmp_path))
    assert "counts as missing" in capsys.readouterr().err


def test_an_empty_store_is_one_message_that_names_the_command(tmp_path):
    Store(tmp_path / "none").check_writable()
    done, place = execute(ROOT / "chapters/figure2.ipynb", tmp_path, profile="smoke", results=tmp_path / "none",
                          output=tmp_path)
    assert done.returncode != 0
    assert f"python -m gstlib run figure2 --profile smoke --data digits --results {tmp_path / 'none'}" in done.stderr
    (error,) = [out for cell in json.loads(place.read_text())["cells"] for out in cell.get("outputs", [])
                if out["output_type"] == "error"]
    assert error["ename"] == "InputError" and len(error["traceback"]) == 1, "the message, no traceback"


def test_an_unknown_parameter_is_refused_with_the_known_ones(tmp_path):
    chapters = [ROOT / "chapters/figure1.ipynb", ROOT / "chapters/claims.ipynb"]
    for done, place in execute_all(chapters, tmp_path, profile="smoke", resutls=tmp_path):
        assert done.returncode != 0
        assert f"unknown parameter 'resutls'; choose from {', '.join(notebook.PARAMETERS)}" in done.stderr
        (error,) = [out for cell in json.loads(place.read_text())["cells"] for out in cell.get("outputs", [])
                    if out["output_type"] == "error"]
        assert error["ename"] == "InputError" and len(error["traceback"]) == 1


def test_a_folder_of_figures_that_cannot_be_written_is_one_message(whole, run_here, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(notebook, "get_ipython", lambda: shell)
    shell = mock.Mock(user_ns={})
    with pytest.raises(OSError, match="file"):
        run_here(ROOT / "chapters/figure1-run.ipynb", profile="smoke", results=str(whole.path), output=str(tmp_path / "file"))
    shell.InteractiveTB.set_mode.assert_called_with("Minimal")


def test_injected_parameters_are_those_of_papermill_s_cell_alone():
    history = ["", "profile = 'mini'  # an ordinary cell\nlabel = 3",
               "# Parameters\nprofil = \"mini\"\nseeds = [0, 1]\n"]
    assert notebook.injected(history) == ["profil", "seeds"]
    assert notebook.injected([]) == notebook.injected() == []


def test_a_chapter_trains_what_is_missing_as_it_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    asked = []

    def train_missing(store, names, *arguments, **options):
        asked.append((names, *arguments, options))
        fill(store.path)
        return runner.Outcome()

    monkeypatch.setattr(runner, "train_missing", train_missing)
    given = {"profile": "smoke", "data": "digits", "seeds": "0,2", "device": "cpu",
             "results": str(tmp_path / "results"), "executor": "processes", "output": str(tmp_path)}
    chapter = notebook.Chapter("figure1", ["figure1-vgg11"], **given, train=True)
    assert asked == [(["figure1-vgg11"], "smoke", "digits", "0,2", "cpu", {"quiet": True, "executor": "processes"})]
    assert len(chapter.studies[0].runs) == 10 and not chapter.studies[0].missing
    notebook.Chapter("figure1", ["figure1-vgg11"], **given, train=False)
    assert len(asked) == 1


def test_a_failed_run_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runner, "train_missing", lambda *_, **__: runner.Outcome(failed={"a" * 16: "it diverged"}))
    with pytest.raises(InputError, match="run a{16} failed: it diverged"):
        notebook.prepare(["figure3"], profile="smoke", data=None, seeds=None, device="auto", results=str(tmp_path),
                         train=True, executor=None, output=str(tmp_path))


def test_the_executors_are_the_runner_s():
    assert set(notebook._EXECUTORS) == set(executors.EXECUTORS)
    assert "executor" in inspect.signature(runner.train_all).parameters


def test_reading_imports_neither_torch_nor_training():
    code = ("import sys; from gstlib import claims; from gstlib.book import notebook, tables; "
            "sys.exit(any(name in sys.modules for name in ('torch', 'gstlib.training.train', 'gstlib.campaign.runner')))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name, value, words", [
    ("profile", "tiny", "unknown profile 'tiny'; choose from smoke, mini, quarter, paper"),
    ("device", "tpu", "unknown device 'tpu'; choose from auto, cpu, cuda"),
    ("seeds", "many", "seeds 'many' is neither a number"),
    ("seeds", 2.5, "seeds must be a number"),
    ("train", "yes", "train must be True or False, not 'yes'"),
    ("data", "", "data must be"),
    ("results", None, "results must name a folder"),
    ("output", 3, "output must name a folder"),
    ("executor", "slurm", "unknown executor 'slurm'; choose from local, processes, ray"),
])
def test_a_bad_value_is_named(name, value, words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = {"profile": "smoke", "data": None, "seeds": None, "device": "auto", "results": str(tmp_path),
             "train": False, "executor": None, "output": str(tmp_path)}
    with pytest.raises(InputError, match=re.escape(words)):
        notebook.Chapter("figure1", ["figure1-vgg11"], **given | {name: value})


def project(root):
    """A folder laid out like this project, with the committed results, in which chapters write what they make."""
    shutil.copytree(ROOT / "chapters", root / "chapters")
    (root / "book").mkdir()
    shutil.copy(ROOT / "book/_toc.yml", root / "book")  # whose chapters' questions the front page lists
    (root / "book/results").symlink_to(ROOT / "book/results")
    (root / "pytest.ini").write_text("[pytest]\n")
    return root


def start_nbval(option, root, notebooks):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", option, "--nbval-current-env"]
    return subprocess.Popen([*command, *map(str, notebooks)], cwd=root, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_chapters_run_as_they_stand_on_the_committed_results(tmp_path):
    root = project(tmp_path)
    # what reads no results is executed twice below
    copies = [root / "chapters" / chapter.name for chapter in CHAPTERS if chapter.stem not in ("one-event", "prune", "sure")]
    halves = [start_nbval("--nbval-lax", root, copies[half::2]) for half in (0, 1)]
    check_nbval(halves)


def check_nbval(running):
    said = [process.communicate()[0] for process in running]
    for text, process in zip(said, running):
        assert process.returncode == 0, text[-5000:]


def check_shows_the_same_twice(chapters, whole, root):
    executed = execute_all(chapters, project(root) / "chapters", profile="smoke", results=whole.path,
                           output=root / "figures")
    for done, _ in executed:
        assert done.returncode == 0, done.stderr
    check_nbval([start_nbval("--nbval", root, [place]) for _, place in executed])


MAKE_THEIR_OWN = ("ebn", "one-event", "prune", "sure")  # numbers that no stored run holds


@pytest.mark.slow
def test_chapters_that_make_their_own_numbers_show_the_same_twice(whole, tmp_path):
    check_shows_the_same_twice([ROOT / f"chapters/{name}.ipynb" for name in MAKE_THEIR_OWN], whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("chapter", [chapter for chapter in CHAPTERS if chapter.stem not in MAKE_THEIR_OWN],
                         ids=lambda p: p.stem)
def test_a_chapter_shows_the_same_twice(chapter, whole, tmp_path):
    check_shows_the_same_twice([chapter], whole, tmp_path)

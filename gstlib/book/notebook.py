"""What the book's chapters share: parameters checked, missing runs trained, a panel shown with its caption and files.

A chapter's `parameters` cell is followed by one that makes a `Chapter` (or, where it shows no panel, calls `prepare`);
the other cells call its methods and hold no machinery of their own.
"""

import ast
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path

import altair as alt
import pandas as pd
from IPython import get_ipython
from IPython.display import HTML, Image, Markdown, display
from matplotlib.figure import Figure

from gstlib import claims, experiments
from gstlib.book import boxes, moving
from gstlib.errors import InputError, check_choice
from gstlib.experiments import PROFILES
from gstlib.reading import figures, text
from gstlib.reading.interval import FEWEST
from gstlib.reading.study import Study, command
from gstlib.reading.study import study as read_study
from gstlib.spec import DataSpec
from gstlib.store import Store

PARAMETERS = ("profile", "data", "seeds", "device", "results", "train", "executor", "output")
_EXECUTORS = ("local", "processes", "ray")  # the runner's own list stands on torch, which a reader does without
_WIDTH = 600  # of a picture on a desktop; a narrower screen shrinks it


@contextmanager
def _without_traceback():
    """Let IPython show an `InputError` as its message alone, which says what to do, and so a file that cannot be written."""
    try:
        yield
    except (InputError, OSError):
        if shell := get_ipython():
            shell.InteractiveTB.set_mode("Minimal")
        raise


@_without_traceback()
def prepare(names: Sequence[str], *, profile: str, data: str | None, seeds, device: str, results: str, train: bool,
            executor: str | None, output: str) -> Store:
    """The store of a chapter whose parameters are good; trains if asked what the experiments `names` lack.

    Goes to the project's root.  Raises `InputError` for a parameter that chapters do not have, for a value that none
    can use and for a run that failed: one message, no traceback.
    """
    # whose paths the parameters name: Jupyter starts beside the notebook
    os.chdir(next((folder for folder in (Path.cwd(), *Path.cwd().parents)
                   if (folder / "chapters").is_dir() and (folder / "book").is_dir()), "."))
    for name in injected():
        check_choice("parameter", name, PARAMETERS)
    experiments.profile(profile)
    check_choice("device", device, ("auto", "cpu", "cuda"))
    if executor is not None:
        check_choice("executor", executor, _EXECUTORS)
    if train not in (False, True):
        raise InputError(f"train must be True or False, not {train!r}")
    if not isinstance(seeds, (int, str, list, type(None))):
        raise InputError(f"seeds must be a number, a range like 2-5 or a list like 0,4,7, not {seeds!r}")
    if seeds is not None:
        experiments.parse_seeds(seeds)
    if data is not None and not (isinstance(data, str) and data):
        raise InputError(f"data must be a data set's name, a folder, an archive or None, not {data!r}")
    for what, value in (("results", results), ("output", output)):
        if not (isinstance(value, str) and value):
            raise InputError(f"{what} must name a folder, not {value!r}")
    store = Store(results)
    if train and names:
        from gstlib.campaign import runner

        outcome = runner.train_missing(store, names, profile, data, seeds, device, quiet=True, executor=executor)
        if outcome.failed:
            raise InputError("; ".join(f"run {run_id} failed: {why}" for run_id, why in outcome.failed.items()))
    return store


class Chapter:
    """A chapter's studies, one for each experiment in `names`, and the ways in which it shows them.

    `whole` is all that is stored, which judges and is compared; `studies`, which are shown, are of seeds that all
    configurations of a network have.

    `name` is the notebook's file name without its ending; the other arguments are the notebook's parameters, see
    `prepare`.  Raises what that raises, and `InputError` when `results` holds no run at all at the profile.
    """

    @_without_traceback()
    def __init__(self, name: str, names: Sequence[str], *, profile: str, data: str | None, seeds, results: str,
                 output: str, **how):
        self.store = prepare(names, profile=profile, data=data, seeds=seeds, results=results, output=output, **how)
        self.name, self.output, self.profile, self.data, self.seeds = name, Path(output), profile, data, seeds
        if not any(about["profile"] == profile for _, _, about in self.store.about()):
            made_by = command(names, profile, data or experiments.profile(profile).data, self.store.path, seeds)
            raise InputError(f"{self.store.path.absolute()} holds no run at profile {profile!r}; make them with: {made_by}")
        self.whole = [read_study(self.store, figure, profile, data, seeds) for figure in names]
        self.studies = [study.comparable() for study in self.whole]
        self._told: set[str] = set()  # experiments whose box of nothing is shown
        self._panels = 0  # how many are shown

    def on(self, data: str, figure: str) -> Study | None:
        """What the store holds of `figure` on the data set `data`; where that is nothing, None, and the command is shown."""
        try:
            return read_study(self.store, figure, self.profile, data, self.seeds)
        except InputError:
            made_by = command(figure, self.profile, data, self.store.path, self.seeds)
            self.say(f"*On `{data}` nothing is there yet. Make the runs with* `{made_by}`.")
            return None

    def larger(self, study: Study) -> Study | None:
        """The same experiment at the largest profile above the chapter's that has at least three seeds of every
        configuration, else at the one with most; where none has one, None, and a box says what the next full-width
        one would take."""
        what, above = study.experiment, [*PROFILES][[*PROFILES].index(self.profile) + 1:]
        found, enough = {}, {}
        for name in reversed(above):
            with suppress(InputError):  # no run at that profile
                found[name] = read_study(self.store, what.name, name, self.data, self.seeds)
                seeds = found[name].runs.groupby("label")["seed"].nunique()
                enough[name] = min(FEWEST, seeds.reindex(found[name].labels, fill_value=0).min())
        if any(enough.values()):
            return found[max(enough, key=enough.get)].comparable()
        if wide := next((name for name in above if PROFILES[name].size.width == 1), None):
            size, there = PROFILES[wide], found.get(wide)
            lacks = f"profile {wide} has no seed of every configuration yet."
            runs = there.missing if there else what.runs(size, DataSpec(size.data, "any"), range(what.seeds(size)))
            made_by = command(what.name, wide, self.data or size.data, self.store.path, self.seeds)
            display(HTML(boxes.nothing(what, wide, runs, there.command if there else made_by, self.store, lacks)))
        return None

    @_without_traceback()
    def show(self, study: Study | None, draw: Callable[[Study], Figure], name: str, seen: str,
             rows: Callable[[Study], pd.DataFrame] = lambda study: study.runs, confidence: float = 0.95) -> None:
        """Draw and save one panel with its caption and links, or show one box a figure that says what its runs take.

        `name` names its files, `seen` says what is seen, `rows` gives the table behind it.  A panel without runs, or with
        none that `rows` can be made of (a gain takes two), leaves no file, not even that of an earlier time when there
        were some.  None (see `larger`) shows nothing.
        """
        table = pd.DataFrame() if _nothing(study) else rows(study)
        if self._lacks(study, table.empty):
            for ending in ("-runs.csv", ".png", ".svg", ".csv"):
                (self.output / f"{name}{ending}").unlink(missing_ok=True)
            return
        self.show_figure(draw(study), name, table, seen, text.caption(study, confidence),
                         {"runs": f"figures/{name}-runs.csv"}, text.outcome(study))
        text.runs_table(study).to_csv(self.output / f"{name}-runs.csv", index=False, float_format="%.6g",
                                      lineterminator="\n")

    def _lacks(self, study: Study | None, empty: bool = False) -> bool:
        """Whether nothing is stored of what `study` is about, or its panel is `empty`; the first time that this is said,
        with what it takes."""
        if not (empty or _nothing(study)):
            return False
        if study and (what := study.experiment).name not in self._told:
            self._told.add(what.name)
            held = ", ".join(f"<code>{escape(label)}</code>" for label in study.runs["label"].unique())
            lacks = (f"no run is stored at profile {study.profile.name} of what this panel shows"
                     + f" except of {held}" * bool(held) + "; other panels without runs are left out.")
            display(HTML(boxes.nothing(what, study.profile.name, self.all_of(study).missing, study.command, self.store, lacks)))
        return True

    def all_of(self, study: Study) -> Study:
        """All that is stored where `study` is the part of it that is shown: seeds that not every configuration has, too."""
        return next((each for each in self.whole if (each.experiment, each.profile) == (study.experiment, study.profile)), study)

    @_without_traceback()
    def show_figure(self, figure: Figure, name: str, rows: pd.DataFrame, seen: str, caption: str = "",
                    more: dict[str, str] | None = None, outcome: str = "") -> None:
        """Save and display `figure`; beneath it number, `seen`, `caption`, links to PNG, SVG, CSV, `more` and the notebook.

        Who does not see it reads `seen`, `outcome` and the panels' titles, which state what was found.
        """
        figures.save(figure, self.output, name, rows)
        titles = "; ".join(title for ax in figure.axes if (title := ax.get_title(loc="left")))
        told = " ".join(filter(None, (seen, outcome, titles)))
        display(Image(str(self.output / f"{name}.png"), width=_WIDTH, alt=told))
        links = {kind: f"figures/{name}.{kind.lower()}" for kind in ("PNG", "SVG", "CSV")} | (more or {})
        links["notebook"] = f"path:{self.name}.ipynb"
        listed = " · ".join(f"[{kind}]({target})" for kind, target in links.items())
        self.say(f"{self._number()} *{seen}* {caption} {listed}")

    def _number(self) -> str:
        self._panels += 1
        return f"**Panel {self._panels}.**"

    def move(self, study: Study | None, draw: Callable[[Study], alt.TopLevelMixin], name: str, seen: str,
             confidence: float = 0.95) -> None:
        """Display a figure that moves (`moving`) with its number and caption; nothing where no run is stored."""
        if not _nothing(study):
            display(moving.html(draw(study), name))
            self.say(f"{self._number()} *{seen}* {text.caption(study, confidence)}")

    @_without_traceback()
    def verdicts(self, *ids: str) -> None:
        """Display a box for each of these claims, as all that is stored answers it: `boxes.verdict`.

        Raises `InputError` for a claim that is not there.
        """
        by_id = {claim.id: claim for claim in claims.CLAIMS}
        for name in ids:
            check_choice("claim", name, by_id)
        made_of: dict[str, dict[str, None]] = {}
        for _, _, about in self.store.about():
            made_of.setdefault(about["profile"], {})[about["data_title"]] = None
        rows = claims.evaluate(self.store, data=self.data, seeds=self.seeds).set_index("id", drop=False)
        display(HTML("".join(boxes.verdict(by_id[name], rows.loc[name], made_of) for name in ids)))

    def say(self, words: str) -> None:
        """Display Markdown."""
        display(Markdown(words))

    def state(self, study: Study | None, sentence: Callable[..., str], *details) -> None:
        """Display what `sentence(study, *details)` computes, or what that takes (see `show`)."""
        if not self._lacks(study) and (words := sentence(study, *details)):
            self.say(words)

    def compare(self, study: Study | None, pairs: Sequence[tuple[str, str]], column: str = "final_accuracy") -> None:
        """Display how configurations differ, each pair over all seeds that both have: `text.comparison`."""
        self.state(study and self.all_of(study).restrict({label for pair in pairs for label in pair}), text.comparison, pairs,
                   column)


def _nothing(study: Study | None) -> bool:
    """Whether nothing is stored of what a study is about: of two pruned configurations, where it compares several."""
    if study is None or study.runs.empty:
        return True
    pruned = [label for label in study.labels if study.spec(label).pruning]
    return study.runs.loc[study.runs["label"].isin(pruned), "label"].nunique() < min(2, len(pruned))


def injected(history: Iterable[str] | None = None) -> list[str]:
    """Names that papermill set in this notebook; it takes any name and only prints a warning for one not known.

    It puts them into a cell of their own, which begins with the comment "# Parameters".  `history` is the text of every
    cell run so far (None: as IPython keeps it).
    """
    if history is None:
        history = shell.user_ns.get("In", []) if (shell := get_ipython()) else []
    cells = [ast.parse(text) for text in history if text.startswith("# Parameters\n")]
    return [target.id for cell in cells for line in cell.body if isinstance(line, ast.Assign)
            for target in line.targets if isinstance(target, ast.Name)]


def drawn_from(chapters: Iterable[str], profile: str, results: str, data: str | None, seeds: str | None) -> str:
    """A digest of what these chapters are drawn from: parameters, sources, and all that `results` holds.

    Raises `InputError` for parameters with which no chapter can be drawn, before one is tried.
    """
    store = Chapter("", ["figure1-vgg11"], profile=profile, data=data, seeds=seeds, results=results, output="x",
                    device="auto", train=False, executor=None).store
    # in the project's root, where making a chapter leads
    digest = hashlib.sha256(repr([profile, results, data, seeds, *chapters]).encode())
    for folder, pattern in ((Path(), "pyproject.toml"), (Path(), "chapters/*.ipynb"), (Path(), "gstlib/**/*.py"),
                            (store.path, "[!.]*.json"), (store.path, "**/runs/*.parquet")):
        for place in filter(Path.is_file, sorted(folder.glob(pattern))):  # a pipe is not waited for
            digest.update(repr([place.name, hashlib.sha256(place.read_bytes()).hexdigest()]).encode())
    return digest.hexdigest()


if __name__ == "__main__":  # what the Makefile asks before it removes the pages that are there
    given = {name: os.environ.get(name.upper()) or None for name in ("data", "seeds")}
    try:
        print(drawn_from(sys.argv[1:], os.environ["PROFILE"], os.environ["RESULTS"], **given))
    except InputError as error:
        sys.exit(f"gstlib: {error}")

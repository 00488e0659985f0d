"""What the book's chapters share: parameters checked, missing runs trained, a panel shown with its caption and files.

A chapter's `parameters` cell is followed by one that makes a `Chapter`; the
other cells call its methods and hold no machinery of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from IPython import get_ipython
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure

from gstlib import analysis, experiments, figures
from gstlib.analysis import Study
from gstlib.spec import InputError, check_choice
from gstlib.store import Store

_WIDTH = 600  # of a picture on a desktop; a narrower screen shrinks it


class Chapter:
    """A chapter's studies (one for each experiment in `names`), and the ways in which it shows them.

    `name` is the notebook's file name without its ending; the other arguments
    are the notebook's parameters.  Raises `InputError` for a bad value, and
    when `results` holds no run at all at the profile: one message, no traceback.
    """

    def __init__(self, name: str, names: Sequence[str], *, profile: str, data: str | None, seeds,
                 device: str, results: str, train: bool, output: str):
        find_root()
        try:
            check(profile, data, seeds, device, results, train, output)
            self.name, self.output, self.store = name, Path(output), Store(results)
            if train:
                from gstlib import runner

                runner.train_missing(self.store, names, profile, data, seeds, device, quiet=True)
            self._refuse_nothing(names, profile, data)
            self.studies = [analysis.study(self.store, figure, profile, data, seeds) for figure in names]
        except InputError:
            if shell := get_ipython():
                shell.InteractiveTB.set_mode("Minimal")  # the message says what to do
            raise

    def _refuse_nothing(self, names: Sequence[str], profile: str, data: str | None) -> None:
        if not any(about["profile"] == profile for _, _, about in self.store.about()):
            where = f"{f' --data {data}' if data else ''} --results {self.store.path}"
            raise InputError(f"{self.store.path} holds no run at profile {profile!r}; "
                             f"make them with: python -m gstlib run {' '.join(names)} --profile {profile}{where}")

    def show(self, study: Study, draw: Callable[[Study], Figure], name: str, text: str,
             rows: Callable[[Study], pd.DataFrame] = lambda study: study.runs, confidence: float = 0.95) -> None:
        """Draw and save one panel with its caption and links, or say which command makes its runs.

        `name` names its files, `text` says what is seen, `rows` gives the table behind it.
        """
        if study.runs.empty:
            self.say(f"*{study.experiment.title}: no run is stored at profile {study.profile.name}. "
                     f"Make them with* `{study.command}`.")
            return
        runs = f"{name}-runs"
        self.output.mkdir(parents=True, exist_ok=True)
        analysis.runs_table(study).to_csv(self.output / f"{runs}.csv", index=False, float_format="%.6g",
                                          lineterminator="\n")
        self.show_figure(draw(study), name, rows(study), text, analysis.caption(study, confidence),
                         {"runs": f"figures/{runs}.csv"})

    def show_figure(self, figure: Figure, name: str, rows: pd.DataFrame, text: str, caption: str = "",
                    more: dict[str, str] | None = None) -> None:
        """Save and display `figure`, beneath it `text`, `caption` and links to PNG, SVG, CSV, `more` and the notebook."""
        picture, *_ = figures.save(figure, self.output, name, rows)
        display(Image(str(picture), width=_WIDTH, alt=text))
        links = {kind: f"figures/{name}.{kind.lower()}" for kind in ("PNG", "SVG", "CSV")} | (more or {})
        links["notebook"] = f"path:{self.name}.ipynb"
        listed = " · ".join(f"[{kind}]({target})" for kind, target in links.items())
        self.say(f"*{text}* {caption} {listed}")

    def say(self, text: str) -> None:
        """Display Markdown."""
        display(Markdown(text))

    def state(self, study: Study, sentence: Callable[..., str], *details) -> None:
        """Display what `sentence(study, *details)` computes; nothing where no run is stored."""
        if not study.runs.empty:
            self.say(sentence(study, *details))


def find_root() -> None:
    """Go to the project's root, whose paths the parameters name: Jupyter starts beside the notebook."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / "chapters").is_dir() and (folder / "book").is_dir():
            os.chdir(folder)
            return


def check(profile, data, seeds, device, results, train, output) -> None:
    """Raise `InputError` for a parameter's value that no chapter can use."""
    experiments.profile(profile)
    check_choice("device", device, ("auto", "cpu", "cuda"))
    if train not in (False, True):
        raise InputError(f"train must be True or False, not {train!r}")
    if not isinstance(seeds, (int, str, list, type(None))):
        raise InputError(f"seeds must be a number, a range like 2-5 or a list like 0,4,7, not {seeds!r}")
    if seeds is not None:
        experiments.parse_seeds(seeds)
    if not (data is None or isinstance(data, str) and data):
        raise InputError(f"data must be a data set's name, a folder, an archive or None, not {data!r}")
    for what, value in (("results", results), ("output", output)):
        if not (isinstance(value, str) and value):
            raise InputError(f"{what} must name a folder, not {value!r}")

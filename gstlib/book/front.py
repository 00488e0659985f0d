"""The book's first screen: the answer as of today, its picture, verdicts counted, and each chapter's question."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path

import pandas as pd
from IPython.display import HTML

from gstlib.book import moving
from gstlib.claims import CONTRADICTED, INCONCLUSIVE, NOT_RUN, SUPPORTED, verdicts
from gstlib.errors import InputError
from gstlib.reading import text
from gstlib.reading.interval import LEVEL, t_interval
from gstlib.reading.study import Study, study
from gstlib.store import Store

_QUESTION = "C1"  # the claim that the paper is named for
_ANSWERS = {
    SUPPORTED: "less stable pruning leaves VGG11 more accurate",
    CONTRADICTED: "less stable pruning leaves VGG11 less accurate",
    INCONCLUSIVE: "these runs cannot tell whether less stable pruning leaves VGG11 more accurate",
}
_TILES = ((SUPPORTED, "supported"), (CONTRADICTED, "contradicted"), (INCONCLUSIVE, "open"), (NOT_RUN, "not run"))


def answer(table: pd.DataFrame) -> str:
    """What the runs say today of the paper's first claim, in a sentence with its uncertainty.

    `table` as `claims.evaluate` gives it; full width speaks where it was run, small scale otherwise.
    """
    row = table.set_index("id").loc[_QUESTION]
    for prefix, verdict, where in (("", row["verdict"], f"at full width (profile {row['profile']})"),
                                   ("small_", row["small_scale"], "at small scale, where no verdict on the paper can be had")):
        if verdict != NOT_RUN:
            found = text.number(*(row[prefix + name] for name in ("estimate", "low", "high")), "", form="+.2f").strip()
            return (f"As of today, {where}, {_ANSWERS[verdict]}: a tenfold instability goes with {found} points of final test "
                    f"accuracy (95% interval, {row[prefix + 'n']:.0f} seeds).")
    return "As of today there is no answer: three complete seeds of Figure 1's VGG11 are needed at full width, or at mini."


def tiles(table: pd.DataFrame) -> str:
    """Verdicts counted in tiles (HTML), full width and small scale apart.

    A verdict that Holm's p over all claims that were run does not uphold counts as open; one that rests on no test
    stands as it is.
    """
    rows = []
    for column, prefix, heading in (("verdict", "", "Full width"), ("small_scale", "small_", f"Small scale ({verdicts.SMALL})")):
        decided = table[column].isin([SUPPORTED, CONTRADICTED])
        lost = decided & table[f"{prefix}p"].notna() & (table[f"{prefix}p_holm"] >= LEVEL)
        counts = table[column].mask(lost, INCONCLUSIVE).value_counts()
        boxes = "".join(f'<span class="tile {verdict.replace(" ", "-")}"><strong>{counts.get(verdict, 0)}</strong> {word}</span>'
                        for verdict, word in _TILES)
        rows.append(f'<p class="tiles"><span class="of">{heading}</span>{boxes}</p>')
    return "".join(rows) + ('<p class="tiles-note">Claims by verdict, by <a href="chapters/claims.html">Holm\'s adjusted p</a> '
                            "over all that were run: what it does not uphold is open.</p>")


def questions(root: Path) -> str:
    """Each chapter's question with a link to it (HTML), in the order of the book's table of contents."""
    lines = []
    for name in re.findall(r"file: (chapters/\S+)", (root / "book" / "_toc.yml").read_text()):
        first = "".join(json.loads((root / f"{name}.ipynb").read_text())["cells"][0]["source"])
        title = re.search(r"^# (.+)$", first, re.M)[1]
        asked = re.search(r"\*\*The question\.\*\* (.+?\?)(?=\s|$)", first, re.S)
        if asked:
            lines.append(f'<li><a href="{name}.html" title="{escape(title)}">{escape(" ".join(asked[1].split()))}</a></li>')
    return f'<details class="questions"><summary>Each chapter answers a question</summary><ul>{"".join(lines)}</ul></details>'


def pruned_or_not(runs: Study) -> str:
    """How far pruned runs end above unpruned ones, in a sentence with its interval over seeds."""
    accuracy = 100 * runs.runs.pivot(index="seed", columns="label", values="final_accuracy").dropna()
    found = t_interval(accuracy.drop(columns="none", errors="ignore").mean(axis=1) - accuracy.get("none", float("nan")))
    return (f"Pruned networks and those left whole differ by {found:+.2f} points of final test accuracy." if found.n > 1 else "")


def picture(table: pd.DataFrame, store: Store, profile: str, data: str | None, seeds) -> str:
    """Figure 1 with its runs linked (HTML) at the profile that `answer` speaks of, else at `profile`; "" without runs."""
    row = table.set_index("id").loc[_QUESTION]
    name = row["profile"] if row["verdict"] != NOT_RUN else verdicts.SMALL if row["small_scale"] != NOT_RUN else profile
    try:
        runs = study(store, "figure1-vgg11", name, data, seeds)
    except InputError:  # no run at that profile
        return ""
    if runs.runs.empty:
        return ""
    caption = (f"A dot is a training run, a bar a way of pruning with its 95% interval. {pruned_or_not(runs)} Point at a run, "
               f'or choose it, to see its curve. Profile {name}; <a href="chapters/figure1.html">Figure 1</a> has all of it.')
    return moving.html(moving.linked(runs), "moving-first", caption).data


def first_screen(table: pd.DataFrame, store: Store, profile: str, data: str | None = None, seeds=None) -> HTML:
    """The whole of it, for a chapter to hand to the front page; the working directory is the project's root."""
    return HTML(f'<p class="answer">{escape(answer(table))}</p>{picture(table, store, profile, data, seeds)}{tiles(table)}'
                f"{questions(Path.cwd())}")

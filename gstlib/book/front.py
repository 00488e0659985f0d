"""The book's first screen: the answer as of today, its picture, verdicts counted, and each chapter's question."""

import json
import re
from html import escape
from pathlib import Path

import pandas as pd
from IPython.display import HTML

from gstlib.book import moving
from gstlib.claims import CONTRADICTED, INCONCLUSIVE, NOT_RUN, SUPPORTED, VERDICTS, upheld, verdicts
from gstlib.errors import InputError
from gstlib.reading.interval import FEWEST, t_interval
from gstlib.reading.study import Study, study
from gstlib.store import Store

_QUESTION = "C1"  # the claim that the paper is named for
_ANSWERS = {
    SUPPORTED: "less stable pruning left VGG11 more accurate",
    CONTRADICTED: "less stable pruning left VGG11 less accurate",
    INCONCLUSIVE: "these runs cannot tell whether less stable pruning leaves VGG11 more accurate",
}


def answer(table: pd.DataFrame) -> str:
    """What the runs say today of the paper's first claim, with its uncertainty, in two sentences.

    `table` as `claims.evaluate` gives it; full width comes first where it was run, small scale second or alone.
    """
    row = table.set_index("id").loc[_QUESTION]
    scales = [(verdict, where, profile, *(row[prefix + name] for name in ("estimate", "low", "high", "n")))
              for prefix, verdict, profile, where in (("", row["verdict"], row["profile"], "at full width"),
                                                      ("small_", row["small_scale"], verdicts.SMALL, "at small scale"))
              if verdict != NOT_RUN]
    if not scales:
        return ("As of today there is no answer: three complete seeds of Figure 1's VGG11 are needed at full width, or "
                "at mini.")
    found = " and ".join(
        f"{abs(value):.2f} points {'lower' if value < 0 else 'higher'} {where} (95% interval {low:+.2f} to {high:+.2f}, "
        f"{n:.0f} seeds, profile {profile})" for _, where, profile, value, low, high, n in scales).replace("-", "−")
    verdict, where, profile, *_ = scales[0]
    judges = "" if profile in verdicts.FULL_WIDTH else " Small scale cannot judge the paper."
    return (f"As of today, {where}, {_ANSWERS[verdict]}. Where one of Figure 1's ways of pruning is ten times less stable "
            f"than another, final test accuracy is on average {found}.{judges}")


def tiles(table: pd.DataFrame) -> str:
    """Verdicts as `claims.upheld` gives them counted in tiles (HTML), full width and small scale apart."""
    rows = []
    for prefix, heading in (("", "Full width"), ("small_", f"Small scale ({verdicts.SMALL})")):
        counts = upheld(table, prefix).value_counts()
        boxes = "".join(f'<span class="tile {verdict.replace(" ", "-")}"><strong>{counts.get(verdict, 0)}</strong> '
                        f"{verdict}</span>" for verdict in VERDICTS)
        rows.append(f'<p class="tiles"><span class="of">{heading}</span>{boxes}</p>')
    return "".join(rows) + ('<p class="tiles-note"><a href="chapters/claims.html">The claims</a> by verdict and by Holm\'s p '
                            "over all that were run: what it does not uphold counts as inconclusive.</p>")


def questions(root: Path) -> str:
    """Each chapter's question with a link to it (HTML), in the order of the book's table of contents; nothing without one."""
    if not (contents := root / "book" / "_toc.yml").exists():  # a chapter that is run outside the project
        return ""
    lines = []
    for name in re.findall(r"file: (chapters/\S+)", contents.read_text()):
        first = "".join(json.loads((root / f"{name}.ipynb").read_text())["cells"][0]["source"])
        title = re.search(r"^# (.+)$", first, re.M)[1]
        asked = re.search(r"\*\*The question\.\*\* (.+?\?)(?=\s|$)", first, re.S)
        if asked:
            lines.append(f'<li><a href="{name}.html" title="{escape(title)}">{escape(" ".join(asked[1].split()))}</a></li>')
    return ('<details class="questions"><summary>Each chapter answers a question</summary>'
            f'<ul>{"".join(lines)}</ul></details>')


def pruned_or_not(runs: Study) -> str:
    """How far pruned runs end above unpruned ones, in a sentence with its interval over seeds."""
    accuracy = 100 * runs.runs.pivot(index="seed", columns="label", values="final_accuracy").dropna()
    if len(accuracy) < FEWEST or "none" not in accuracy:
        return ""
    found = t_interval(accuracy.drop(columns="none").mean(axis=1) - accuracy["none"])
    low, high = (f"{number:+.2f}".replace("-", "−") for number in found[1:3])
    return (f"Pruned networks end {abs(found.value):.2f} points {'above' if found.value > 0 else 'below'} those left whole "
            f"({low} to {high}).")


def figure1(table: pd.DataFrame, store: Store, profile: str, data: str | None, seeds) -> Study | None:
    """Figure 1's VGG11 at the profile that `answer` speaks of, else at `profile`; None without runs."""
    row = table.set_index("id").loc[_QUESTION]
    name = row["profile"] if row["verdict"] != NOT_RUN else verdicts.SMALL if row["small_scale"] != NOT_RUN else profile
    try:
        found = study(store, "figure1-vgg11", name, data, seeds).comparable()
    except InputError:  # no run at that profile
        return None
    return None if found.runs.empty else found


def picture(runs: Study) -> str:
    """Figure 1 with its runs linked and a caption (HTML)."""
    caption = (f"A dot is a training run, a bar a way of pruning with its 95% interval: point at a run to see its curve. "
               f'{pruned_or_not(runs)} Profile {runs.profile.name}; more in <a href="chapters/figure1.html">Figure 1</a>.')
    return moving.html(moving.linked(runs), "moving-first", caption).data


def first_screen(table: pd.DataFrame, store: Store, profile: str, data: str | None = None, seeds=None) -> HTML:
    """The whole of it, for a chapter to hand to the front page. Chapters are listed where the working
    directory is the project's root."""
    runs = figure1(table, store, profile, data, seeds)
    return HTML(f'<p class="answer">{escape(answer(table))}</p>{picture(runs) if runs else ""}{tiles(table)}'
                f"{questions(Path.cwd())}")


def banner(store: Store, profile: str) -> str:
    """What every page says of the size behind it: profile, data and device (HTML); empty at the paper's own scale."""
    about = [about for _, _, about in store.about()]
    own = [each for each in about if each["profile"] == profile]
    if profile == "paper" or not own:
        return ""
    size = f"profile {escape(profile)}; " + "; ".join(
        escape(", ".join(dict.fromkeys(each[what] for each in own))) for what in ("data_title", "device"))
    if profile == "smoke":
        return f"This build proves that the machinery works, and nothing about the paper: {size}"
    wider = " unless a caption names another" * any(each["profile"] in {*verdicts.FULL_WIDTH} - {profile} for each in about)
    return f"Not the paper's own scale{wider}: {size}"


def write_head(table: pd.DataFrame, store: Store, profile: str, data: str | None, seeds, output: str) -> None:
    """Write to `output` what `book/_ext/page_head.py` puts at the head of every page: banner.html, and card.png, the
    picture that a link to the book is shown with (where there are runs)."""
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "banner.html").write_text(banner(store, profile))
    if runs := figure1(table, store, profile, data, seeds):
        (folder / "card.png").write_bytes(moving.png(moving.linked(runs)))
    else:  # none of an earlier time
        (folder / "card.png").unlink(missing_ok=True)

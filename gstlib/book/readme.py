"""The README's part that the stored runs write, `make readme`: the answer, the verdicts in short, and a moving picture."""

import re
import sys
from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure

from gstlib import claims
from gstlib.book import front
from gstlib.claims import NOT_RUN, verdicts
from gstlib.errors import InputError
from gstlib.reading import figures
from gstlib.reading.study import Study, study
from gstlib.reading.text import markdown
from gstlib.store import Store

README, PICTURE = Path("README.md"), Path("book/_static/fall-and-recovery.gif")
BEGIN, END = "<!-- written by make readme -->", "<!-- end of what make readme writes -->"
_LEFT, _GONE = figures.BLUE, "#d9d9d9"
_SECONDS, _REST = 0.12, 20  # of an epoch; frames for which the end stays


def one_run(store: Store) -> Study | None:
    """The run that the picture shows: Figure 1's least stable way of pruning VGG11 at the largest profile stored, its
    first seed.  None where no run is stored."""
    held = {about["profile"] for _, _, about in store.about()}
    for profile in (*verdicts.FULL_WIDTH, verdicts.SMALL, "smoke"):
        if profile in held and not (found := study(store, "figure1-vgg11", profile)).events.empty:
            least_stable = found.runs.groupby("label")["mean_instability"].mean().idxmax()
            part = found.restrict([least_stable])
            return part.restrict([least_stable], int(part.runs["seed"].min()))
    return None


def caption(run: Study) -> str:
    """What the picture shows, and of which run."""
    (row,) = run.runs.itertuples()
    deepest = 100 * (run.events["t_post"] - run.events["t_pre"]).min()
    fell = f"at its deepest event test accuracy fell by {-deepest:.1f} points" if deepest < 0 else "no event lowered accuracy"
    return (f"One run of {row.model} ({figures.legend_name(run, row.label)}, profile {run.profile.name}, seed {row.seed}): "
            f"{fell}, and training ended at {100 * row.final_accuracy:.1f}%. Filters go grey as they are removed.")


def animate(run: Study, place: Path) -> None:
    """Write the run as a GIF, a frame an epoch: accuracy, the change at each event, and each layer's filters."""
    figures.style()
    epochs, events = run.epochs, run.events.assign(change=lambda rows: 100 * (rows["t_post"] - rows["t_pre"]))
    trace, last = figures.traces(run), int(epochs["epoch"].max())
    # a row a layer, a filter a column in the order of removal: the epoch after which it is gone
    layers = {layer: np.r_[rows["epoch"].repeat(rows["removed"]), np.full(rows["units"].iloc[0], last + 1)]
              [:rows["units"].iloc[0]] for layer, rows in events.groupby("layer")}
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    accuracy, change, strip = figure.subplots(3, height_ratios=[5, 2, 3])
    accuracy.plot(trace["epoch"], 100 * trace["accuracy"], color=_GONE)
    line, = accuracy.plot([], [], color=_LEFT, linewidth=2)
    bars = change.vlines(events["epoch"], 0, events["change"], color=_GONE, linewidth=3)
    change.axhline(0, color="#222", linewidth=0.8)
    widest = max(map(len, layers.values()))
    gone = np.array([np.pad(each.astype(float), (0, widest - len(each)), constant_values=np.nan) for each in layers.values()])
    picture = strip.imshow(gone > last, aspect="auto", cmap="Blues_r", vmin=0, vmax=1, interpolation="nearest")
    accuracy.set(ylabel="test accuracy (%)", xlim=(0, last))
    change.set(ylabel="at events\n(points)", xlim=(0, last), xlabel="epoch")
    strip.set(yticks=range(len(layers)), yticklabels=layers, xlabel="filters in the order of their removal")
    strip.grid(False)
    figure.align_ylabels([accuracy, change])

    def draw(epoch: int) -> None:
        now = trace[trace["epoch"] < epoch + 1]
        line.set_data(now["epoch"], 100 * now["accuracy"])
        bars.set_color(np.where(events["epoch"] <= epoch, figures.VERMILION, _GONE))
        picture.set_data(np.where(np.isnan(gone), np.nan, np.where(gone <= epoch, 0.85, 0.15)))
        accuracy.set_title(f"epoch {epoch}: {100 * now['accuracy'].iloc[-1]:.1f}%, "
                           f"{(gone <= epoch).sum()} of {np.isfinite(gone).sum()} filters removed")

    step = max(1, last // 80)  # a longer run in larger steps
    frames = [*range(int(epochs["epoch"].min()), last, step), *[last] * _REST]
    place.parent.mkdir(parents=True, exist_ok=True)
    FuncAnimation(figure, draw, frames).save(place, PillowWriter(fps=1 / _SECONDS), dpi=100)


def short(table: pd.DataFrame) -> str:
    """The claims that were run with their verdicts, full width and small scale apart, and how many are left (Markdown)."""
    full, small = (claims.upheld(table, prefix) for prefix in ("", "small_"))
    run = (full != NOT_RUN) | (small != NOT_RUN)
    rows = [(row.id, row.statement, f"**{full[row.Index]}**", small[row.Index])
            for row in table[run].itertuples()]
    left = (f"Of {len(table)} claims {(~run).sum()} are not run yet." if not run.all() else
            f"All {len(table)} claims were run, {(full == NOT_RUN).sum()} of them at small scale alone.")
    return (markdown(rows, ["", "claim", "full width", f"small scale (`{verdicts.SMALL}`)"])
            + f"\n\n{left} What Holm's p over all that were run does not uphold counts as inconclusive.")


def words(table: pd.DataFrame, run: Study | None) -> str:
    """What stands between the README's markers (Markdown)."""
    parts = [fill(f"**{front.answer(table)}**", 116)]
    if run:
        parts += [f"![{caption(run)}]({PICTURE})", fill(f"*{caption(run)}*", 116)]
    return "\n\n".join([*parts, short(table)])


def replaced(text: str, new: str) -> str:
    """The README with `new` between its markers."""
    return re.sub(f"(?<={BEGIN}\n).*?(?={END})", lambda _: f"\n{new}\n\n", text, count=1, flags=re.S)


if __name__ == "__main__":  # what `make readme` calls, with the folder of results
    try:
        from_runs = Store(sys.argv[1])
        if not from_runs.ids():
            raise InputError(f"{from_runs.path.absolute()} holds no run that the README could tell of; name another folder")
        shown, table = one_run(from_runs), claims.evaluate(from_runs)
    except InputError as error:
        sys.exit(f"gstlib: {error}")
    README.write_text(replaced(README.read_text(), words(table, shown)))
    if shown:
        animate(shown, PICTURE)

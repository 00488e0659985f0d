"""A study in, a Matplotlib `Figure` out. Never trains, reads no file; `save` writes PNG, SVG and CSV.

One panel a picture, small enough that its type can be read on a telephone.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from scipy import stats

from gstlib.reading import measures
from gstlib.reading.interval import FEWEST, Estimate, half_width, t_interval
from gstlib.reading.study import Study, once
from gstlib.reading.text import firsts, legend_name, number, pooled, seed_slopes, way
from gstlib.spec import RunSpec

# one colour a method, the same in every figure: Okabe and Ito's set for the targets, told apart by every
# common colour vision, and Paul Tol's muted set for what is not pruning for good
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#4d4d4d", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
COLOURS = {"S": BLUE, "R": GREEN, "L": VERMILION}
_LIGHTER = {"S": SKY, "L": ORANGE}
_NOISES = {("zero", 0): "#999933", ("zero", 50): "#44AA99", ("zero", 1105): "#6699CC", ("zero", 1500): "#332288",
           ("gaussian", 0): "#B79F45", ("gaussian", 50): "#117733", ("gaussian", 1105): "#AA4499",
           ("gaussian", 1500): "#882255", ("gaussian-transient", 50): "#88CCEE",
           ("gaussian-transient", 1105): "#DDCC77", ("gaussian-transient", 1500): "#CC6677",
           ("zero", 1): "#999933", ("gaussian", 1): "#B79F45", ("zero-cumulative", 89): "#44AA99",
           ("zero-cumulative", 630): "#6699CC", ("zero-cumulative", 1220): "#AA4499", ("zero-cumulative", 2480): "#332288"}
DIVERGING = sns.color_palette("vlag_r", as_cmap=True)  # red below, blue above
_ONE_SHOT = "#661100"
_BY_SCORE = ("S r=4", "S r=4 l2")  # whose instabilities Figure A2 compares
_PER_CENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")  # 10% and 91.5%, no needless decimals
_SLIGHT = 0.002  # a fall
_STABLE = (1, 0.99, 0.9, 0.5, 0.98, 0.995, 0.95, 1.01, 1.005, 0.8, 0)  # ticks; of two that would touch the first
_POINTS = FuncFormatter(lambda value, _: f"{100 * value:.4g}".replace("-", "−"))  # of differences of shares


def style() -> None:
    """The look that all figures share: white ground (also on dark pages), thin frame, text as text in SVG."""
    sns.set_theme(context="notebook", style="ticks", rc={
        "figure.facecolor": "white", "savefig.facecolor": "white", "axes.facecolor": "white",
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
        "axes.titlesize": "medium", "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6,
        "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "gstlib", "figure.dpi": 100,
        "savefig.dpi": 200, "font.family": "DejaVu Sans"})


def axes(x: str = "", y: str = "", shares: bool = True) -> Axes:
    """An empty panel with the names of its axes; shares go up it as per cent."""
    style()
    ax = Figure(figsize=(5.2, 4.2), layout="constrained").subplots()
    ax.set(xlabel=x, ylabel=y)
    if shares:
        ax.yaxis.set_major_formatter(_PER_CENT)
    return ax


def pair(x: str, y: str) -> list[Axes]:
    """Two panels, one beneath the other, with the names of their axes; shares go up both as per cent."""
    style()
    both = [*Figure(figsize=(5.2, 6.6), layout="constrained").subplots(2, height_ratios=(3, 2))]
    for ax in both:
        ax.set(xlabel=x, ylabel=y)
        ax.yaxis.set_major_formatter(_PER_CENT)
    return both


def with_legend(ax: Axes, columns: int = 2, of: Axes | None = None) -> Figure:
    """The figure, its legend (that `of` another panel) beneath the panel `ax`, where it hides nothing."""
    ax.legend(*(of or ax).get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.44, 0), borderaxespad=4.4,
              ncols=columns, fontsize=10, handlelength=2.4, columnspacing=1.4)
    return ax.figure


def _same(value: float) -> float:
    return value


def _ten_to(value: float) -> float:
    return 10.0**value


def line(ax: Axes, points: pd.DataFrame, x: str, y: str, colour: str, label: str, confidence: float = 0.95,
         bars: bool = False, of=_same, **look) -> None:
    """The mean over seeds with its pointwise t interval, a band or bars, through `of`; the runs themselves where they are
    few."""
    points = points.groupby(["seed", x], as_index=False)[y].mean()  # layers struck after one epoch are no further seeds
    if points["seed"].nunique() < FEWEST:
        for number, (_, run) in enumerate(points.groupby("seed")):
            ax.plot(run[x], of(run[y]), color=colour, label=None if number else label, **look)
        return
    each = points.groupby(x)[y].agg(["mean", "std", "count"])
    half = half_width(each["std"], each["count"], confidence)
    mean, low, high = of(each["mean"]), of(each["mean"] - half), of(each["mean"] + half)
    if bars:
        ax.errorbar(each.index, mean, (mean - low, high - mean), color=colour, capsize=2, elinewidth=1.2, label=label, **look)
    else:
        ax.plot(each.index, mean, color=colour, label=label, **look)
        ax.fill_between(each.index, low, high, color=colour, alpha=0.18, linewidth=0)


def method_colour(printed: RunSpec) -> str:
    """The colour of a configuration by its specification as printed, the same at every profile.

    The target sets the hue, the smallest rate (r = 4, many small events) takes its lighter partner (S by l2: purple),
    one shot dark brown; every noise has its own.
    """
    p = printed.pruning
    if p is None:
        return BLACK
    if (p.effect, p.batches) in _NOISES:
        return _NOISES[p.effect, p.batches]
    if once(p):
        return _ONE_SHOT
    if (p.target, p.score, p.retrain) == ("S", "l2", 4):
        return PURPLE
    return (_LIGHTER if p.retrain == 4 else COLOURS).get(p.target, BLACK)


def drawn(study: Study, labels: Iterable[str]) -> list[str]:
    """Those of `labels` that have stored runs, each run once.

    At a reduced profile two labels can mean one run (1105 and 1500 batches are cut to 480, say); the first is drawn.
    """
    there = set(study.runs["label"])
    return firsts((label for label in labels if label in there), lambda label: study.spec(label).id)


def traces(study: Study, column: str = "test_accuracy") -> pd.DataFrame:
    """Accuracy over training with the fall at each strike: after an epoch's own value come its t_post, a hair later.

    There is no t_post with the noise switched off, hence no fall for the column `test_accuracy_clean`.
    """
    epochs = study.epochs.dropna(subset=column)[[*measures.KEYS, "epoch", column]]
    frames = [epochs.rename(columns={column: "accuracy"})]
    if len(study.events) and column == "test_accuracy":
        after = study.events[[*measures.KEYS, "epoch", "t_post"]].rename(columns={"t_post": "accuracy"})
        strike = after.groupby([*measures.KEYS, "epoch"]).cumcount() + 1
        frames.append(after.assign(epoch=after["epoch"] + 0.02 * strike))
    return pd.concat(frames, ignore_index=True).sort_values(["label", "run", "epoch"], ignore_index=True)


def accuracy_by_epoch(study: Study, labels: list[str] | None = None, confidence: float = 0.95,
                      column: str = "test_accuracy") -> Figure:
    """Mean test accuracy over training with intervals, falls at events drawn, arrows at the events of L in Figure 1;
    beneath it the last quarter of training, enlarged.

    `labels` picks configurations (default, as in Figure 1 left: all that score by E[BN]); what has no stored run is
    not drawn, and the caption says so.  Unstructured pruning is dashed.
    """
    above, below = pair("epoch", "test accuracy" + (", noise off" if column.endswith("clean") else ""))
    arrows = labels is None
    if arrows:
        labels = [label for label in study.labels if not ((p := study.spec(label).pruning) and p.score == "l2")]
    labels = drawn(study, labels)
    shown = study.restrict(labels)
    points, last = traces(shown, column), study.epochs["epoch"].max()
    for ax, label in ((ax, label) for ax in (above, below) for label in labels):
        p, colour = study.spec(label).pruning, method_colour(study.printed[label])
        large = p is not None and p.target == "L" and p.effect.startswith("remove")
        line(ax, points[points["label"] == label], "epoch", "accuracy", colour, legend_name(study, label), confidence,
             linewidth=1.6 if large else 1.2, linestyle=(0, (3, 1.2)) if p and p.structure == "weight" else "-")
        if arrows and large and ax is above:
            for epoch, low in study.events[study.events["label"] == label].groupby("epoch")["t_post"].mean().items():
                ax.annotate("", (epoch, low), (0, -16), textcoords="offset points",
                            arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkB": 2})
    lines = points[points["epoch"] > 0.05 * last].groupby(["label", "epoch"])["accuracy"].mean()  # without the first climb
    above.set(xlabel="", xlim=(0, last), ylim=(max(0, lines.min() - 0.03), min(1, points["accuracy"].max() + 0.03)))
    # what is left at the end is small beside the falls, so the second scale is that of the epochs' ends
    quarter = shown.epochs[shown.epochs["epoch"] >= last - last // 4].dropna(subset=column)
    few = quarter.groupby("label")["seed"].transform("nunique") < FEWEST  # whose runs are drawn, not their mean
    ends = pd.concat([quarter.loc[few, column], quarter[~few].groupby(["label", "epoch"])[column].mean()])
    room = max(0.005, 0.25 * np.ptp(ends))
    below.set(xlabel="epoch (the last quarter)", xlim=(last - last // 4, last), ylim=(ends.min() - room, ends.max() + room))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    return with_legend(below)


def single_run(study: Study, label: str, seed: int) -> Figure:
    """One run: training accuracy, test accuracy and the fall at each event."""
    ax, study = axes("epoch", "accuracy"), study.restrict([label], seed)
    epochs, events, points = study.epochs, study.events, traces(study)
    ax.plot(epochs["epoch"], epochs["train_accuracy"], color=BLACK, linewidth=1.2, linestyle="--", label="training")
    ax.plot(points["epoch"], points["accuracy"], color=method_colour(study.printed[label]), linewidth=1.6, label="test")
    for column, marker, face in (("t_pre", "^", BLACK), ("t_post", "v", "white")):
        ax.plot(events["epoch"] + 0.02 * (column == "t_post"), events[column], linestyle="none", color=BLACK,
                marker=marker, markerfacecolor=face, markersize=6, clip_on=False, zorder=3,
                label="$t_{%s}$" % column[2:])
    ax.set_xlim(0, epochs["epoch"].max())
    return with_legend(ax, 4)


def instability_by_epoch(study: Study) -> Figure:
    """Figure A2: instability of each event against its epoch, mean over runs with 95% intervals; beneath it, seed by
    seed, by how much removing small filters by l2 is less stable than by E[BN].

    The first scale is logarithmic above a tenth of a point and linear below, where an event may change nothing.
    """
    above, below = pair("epoch of the event", "instability (points)")
    points = measures.instability(study.events)
    for label in drawn(study, points["label"].unique()):
        line(above, points[points["label"] == label], "epoch", "instability", method_colour(study.printed[label]),
             legend_name(study, label), marker="o", markersize=4, markeredgewidth=0, linewidth=1,
             linestyle="--" if study.spec(label).pruning.score == "l2" else "-")
    above.set_yscale("symlog", linthresh=0.001, linscale=0.4)
    above.yaxis.set_minor_locator(NullLocator())
    above.set(xlabel="", xlim=(0, None), ylim=(0, None))
    wide = points.pivot_table(index=["seed", "epoch"], columns="label", values="instability").reindex(columns=[*_BY_SCORE])
    less = wide.diff(axis=1)[_BY_SCORE[1]].rename("less").dropna().reset_index()
    line(below, less, "epoch", "less", PURPLE, "", marker="o", markersize=4, markeredgewidth=0, linewidth=1)
    below.axhline(0, color=BLACK, linestyle=":", linewidth=1.4)
    below.set(xlim=above.get_xlim(), ylabel="difference (points)")
    found = t_interval(less.groupby("seed")["less"].mean())
    below.set_title("S at the smallest rate, l2 less E[BN]" + (
        f": {number(*(100 * each for each in found[:3]), 'points')}" * (found.n >= FEWEST)), fontsize="small")
    for ax in (above, below):  # a scale brings its own
        ax.yaxis.set_major_formatter(_POINTS)
    return with_legend(below, of=above)


def accuracy_by_instability(study: Study) -> Figure:
    """Figure 1 right: final test accuracy against mean instability, a point a run, means with 95% intervals.

    Instability on a logarithmic scale, as the claims compute with it.  The title states the paper's description,
    Pearson's r pooled over the runs pruned in training with its p; what no event struck in training is a dotted line.
    """
    ax = axes("mean instability (points)", "final test accuracy")
    by_tens(ax.set_xscale, ax.xaxis, _POINTS)
    struck = []
    for label, runs in study.runs.groupby("label", sort=False):
        pruning, colour, name = study.spec(label).pruning, method_colour(study.printed[label]), legend_name(study, label)
        if pruning is None or pruning.scratch:
            _level(ax, runs["final_accuracy"], colour, name)
            continue
        struck.append(label)
        ax.scatter(10 ** runs["log_instability"], runs["final_accuracy"], s=18, color=colour, alpha=0.55, linewidths=0)
        _diamond(ax, runs["log_instability"], runs["final_accuracy"], colour, x_of=_ten_to, markersize=6, linewidth=1.2,
                 zorder=3, markerfacecolor="white" if pruning.score == "l2" else colour, label=name)
    r, p, n = pooled(study.runs[study.runs["label"].isin(struck)])
    if np.isfinite(r):
        sure = f", p = {p:.2g}" * (study.runs["seed"].nunique() >= FEWEST)
        ax.set_title(f"pooled r = {r:.2f}{sure}, n = {n}", fontsize="small")
    return with_legend(ax)


def accuracy_by_stability(study: Study, by: str = "target") -> Figure:
    """Figures 3 and 4 of the final version: final accuracy against stability, a mark a configuration (means, intervals).

    One colour for each value of the column `by`, "target" or "model", joined in the order of r, whose first and last as
    printed are written at the ends.  The scale is that of the falls, logarithmic but for the smallest, for most events
    leave nearly all.
    """
    ax = axes("stability (mean share of accuracy that an event leaves)", "final test accuracy")
    ax.set_xscale("function", functions=(lambda stable: np.arcsinh((stable - 1) / _SLIGHT), lambda x: 1 + _SLIGHT * np.sinh(x)))
    names = {"target": {"S": "prune S", "R": "prune R", "L": "prune L"},
             "model": {"resnet18": "ResNet18", "resnet20": "ResNet20", "resnet56": "ResNet56"}}[by]
    for (value, name), colour in zip(names.items(), (BLUE, GREEN, VERMILION)):
        runs = measures.stability(study.runs[study.runs[by] == value]) if len(study.runs) else study.runs
        period = {label: study.printed[label].pruning.retrain for label in drawn(study, runs["label"].unique())}
        at = {}
        for label in sorted(period, key=period.get):
            part = runs[runs["label"] == label]
            at[label] = _diamond(ax, part["stability"], part["final_accuracy"], colour, markersize=6, linewidth=1, zorder=3,
                                 label=None if at else name)
        ax.plot(*zip(*at.values()), color=colour, linewidth=1, alpha=0.5)
        for label in dict.fromkeys([*at][:1] + [*at][-1:]):
            ax.annotate(f"{period[label]}", at[label], (5, 5), fontsize=9, textcoords="offset points",
                        path_effects=[withStroke(linewidth=3, foreground="white")], zorder=5)
    plain = study.runs.loc[study.runs["target"] == "none", "final_accuracy"]
    if len(plain):
        _level(ax, plain)
    scale, ticks = ax.xaxis.get_transform().transform, []
    low, high = scale(np.array(ax.get_xlim()))
    for tick in _STABLE:
        if low <= scale(tick) <= high and all(abs(scale(tick) - scale(other)) > 0.115 * (high - low) for other in ticks):
            ticks.append(tick)
    ax.xaxis.set(major_locator=FixedLocator(sorted(ticks)), major_formatter=_PER_CENT)
    return with_legend(ax)


def gains(rows: pd.DataFrame, names: dict[str, str]) -> Figure:
    """What each configuration gains over no pruning: a dot a run, means with 95% intervals, one below the other.

    `rows` as `measures.gains` gives them; `names` says in words, top first, what the labels that are shown mean.
    """
    ax = axes(shares=False)
    ax.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
    ax.set_xlabel("gain over no pruning (points)", loc="right")  # beneath long names, not beyond the picture
    ax.set_yticklabels(names.values())
    ax.axvline(0, color=BLACK, linestyle=":", linewidth=1.4)
    for place, label in enumerate(names):
        each = 100 * rows.loc[rows["label"] == label, "gain"]
        ax.scatter(each, [place] * len(each), s=18, color=BLUE, alpha=0.45, linewidths=0)
        if len(each):
            found = t_interval(each)
            ax.errorbar(found.value, place, xerr=bar(found), color=BLUE, marker="D", markersize=7, capsize=4,
                        linewidth=1.6)
    return ax.figure


def by_tens(set_scale, axis, form) -> None:
    """Make an axis logarithmic, with ticks at 1, 2 and 5 of each ten."""
    set_scale("log")
    axis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter=form)


def _diamond(ax: Axes, x: pd.Series, y: pd.Series, colour, x_of=_same, y_of=_same, **look) -> tuple[float, float]:
    """Draw two means as one point with their intervals, through `x_of` and `y_of`, and return the point."""
    at, bars = [], []
    for values, of in ((x, x_of), (y, y_of)):
        found = t_interval(values.dropna())
        at.append(of(found.value))
        bars.append([[at[-1] - of(found.low)], [of(found.high) - at[-1]]] if found.n >= FEWEST else None)
    ax.errorbar(*at, xerr=bars[0], yerr=bars[1], color=colour, marker="D", capsize=2, **look)
    return tuple(at)


def bar(found: Estimate) -> float | None:
    return found.high - found.value if found.n >= FEWEST else None


def _level(ax: Axes, values: pd.Series, colour=BLACK, name: str = "no pruning", of=_same) -> None:
    """The mean of what no event struck in training as a dotted line with its 95% interval, through `of`."""
    found = t_interval(values.dropna())
    ax.axhline(of(found.value), color=colour, linestyle=":", linewidth=1.4, label=name, zorder=1)
    if found.n >= FEWEST:
        ax.axhspan(of(found.low), of(found.high), color=colour, alpha=0.08, linewidth=0, zorder=0)


def sharpness_by_instability(study: Study, rows: pd.DataFrame, column: str, name: str) -> Figure:
    """Figure 6 of the final version: a measure of sharpness against mean instability, a dot a run, means with intervals.

    `rows` as `measures.flatness` gives them, merged with the runs; where they have its logarithm, scale and means are
    logarithmic.  What no event struck in training (no pruning, or pruning before it) is a dotted line.
    """
    ax = axes("mean instability (points)", name, shares=False)
    by_tens(ax.set_xscale, ax.xaxis, _POINTS)
    logs, of = (f"log_{column}", _ten_to) if f"log_{column}" in rows else (column, _same)
    if logs != column:
        by_tens(ax.set_yscale, ax.yaxis, "{x:g}")
    for label in drawn(study, rows["label"].unique()):
        runs, colour, pruning = rows[rows["label"] == label], method_colour(study.printed[label]), study.spec(label).pruning
        if pruning is None or pruning.scratch:
            _level(ax, runs[logs], colour, legend_name(study, label), of)
            continue
        ax.scatter(10 ** runs["log_instability"], runs[column], s=18, color=colour, alpha=0.55, linewidths=0)
        _diamond(ax, runs["log_instability"], runs[logs], colour, _ten_to, of, markersize=6, linewidth=1.2, zorder=3,
                 label=legend_name(study, label))
    return with_legend(ax)


def along_eigenvectors(study: Study, column: str) -> Figure:
    """Figures E of the final version: "loss" or "accuracy" after moves along the leading Hessian eigenvectors, mean over them.

    Pointwise 95% intervals over seeds.
    """
    loss = column == "loss"
    ax = axes("distance along the eigenvector", "test loss (nats)" if loss else "test accuracy", shares=not loss)
    for label in drawn(study, study.directions["label"].unique()):
        line(ax, study.directions[study.directions["label"] == label], "step", column, method_colour(study.printed[label]),
             legend_name(study, label), linewidth=1.4)
    return with_legend(ax)


# small magnitudes dark, large ones bright
_TARGETS = dict(zip(measures.DECILES, sns.color_palette("viridis_r", 13)[2:][::-1]))


def gap_by_decile(rows: pd.DataFrame, structure: str) -> Figure:
    """Figure 2: generalization gap against the decile that is pruned, a dot a run, means with 95% intervals.

    `rows` as `measures.by_decile` gives them; `structure`: "weight" (left in the paper) or "filter" (whole neurons,
    right). Both have one vertical scale.
    """
    part = rows[rows["structure"] == structure]
    ax = _gap_axes("pruned decile (D0 smallest, D10 the very largest)", rows)
    sns.stripplot(part, x="target", y="gap", order=[*_TARGETS], hue="target", hue_order=[*_TARGETS], palette=_TARGETS,
                  legend=False, ax=ax, size=4, alpha=0.45, jitter=0.12)
    for target, runs in part.groupby("target"):
        found = t_interval(runs["gap"])
        ax.errorbar(measures.DECILES.index(target), found.value, bar(found), color=_TARGETS[target], marker="D",
                    markersize=7, capsize=4, linewidth=1.6, zorder=3)
    for some, name, dashes in ((part, "D0 to D10", "-"), (part[part["target"] != measures.DECILES[-1]],
                                                                  "without D10", "--")):
        if some["decile"].nunique() > 1:
            slope = seed_slopes(some.assign(points=100 * some["gap"]), "decile", "points")
            said = f": {number(*slope[:3], 'points a decile')}" * (slope.n >= FEWEST)
            ends = np.array([some["decile"].min(), some["decile"].max()])
            ax.plot(ends, np.polyval(np.polyfit(some["decile"], some["gap"], 1), ends), color=BLACK, linestyle=dashes,
                    linewidth=1.2, label=name + said, zorder=2)
    return with_legend(ax, 1)


def gap_by_magnitude(rows: pd.DataFrame, structure: str) -> Figure:
    """Figure 2: generalization gap against the mean magnitude pruned at epoch 35, means with 95% intervals."""
    what = "magnitude of the pruned weights" if structure == "weight" else "l2 norm of the pruned neurons"
    ax = _gap_axes(f"mean {what} at epoch 35", rows)
    part = rows[rows["structure"] == structure].dropna(subset=["gap", "magnitude"])
    for target, runs in part.groupby("target", sort=False):
        ax.scatter(runs["magnitude"], runs["gap"], s=16, color=_TARGETS[target], alpha=0.45, linewidths=0)
        _diamond(ax, runs["magnitude"], runs["gap"], _TARGETS[target], markersize=7, linewidth=1.4, label=target)
    return with_legend(ax, 4)


def _gap_axes(x: str, rows: pd.DataFrame) -> Axes:
    """A panel with the same scale for both structures, so that their effects can be compared by eye; no interval is cut."""
    ax = axes(x, "test − train accuracy (points)")
    ax.yaxis.set_major_formatter(_POINTS)
    if len(rows):
        found = [t_interval(runs) for _, runs in rows.groupby(["structure", "target"])["gap"]]
        ends = [*rows["gap"], *(end for each in found if each.n >= FEWEST for end in (each.low, each.high))]
        room = 0.06 * max(np.ptp(ends), 0.01)
        ax.set_ylim(min(ends) - room, max(ends) + room)
    return ax


def magnitude_deciles(rows: pd.DataFrame) -> Figure:
    """Claim C7: mean magnitude in each tenth of the weights and of the neurons, over that of the fifth.

    `rows` as `measures.decile_magnitudes` gives them; a seed's mean over all targets counts once.  As in the claim, means
    are those of logarithms, in which the heights are.
    """
    ax = axes("tenth of the units present", "mean magnitude (fifth tenth = 1)", shares=False)
    by_tens(ax.set_yscale, ax.yaxis, "{x:g}")
    rows = rows.assign(log=np.log10(rows["relative"]))
    for structure, name, colour, marker in (("weight", "single weights", PURPLE, "o"),
                                            ("filter", "neurons (l2 norm)", BLUE, "s")):
        line(ax, rows[rows["structure"] == structure], "tenth", "log", colour, name, of=_ten_to, marker=marker,
             markersize=7)
    exponential = measures.exponential_deciles()
    ax.plot(range(1, 11), exponential / exponential[4], color=BLACK, linestyle=":", label="exponential distribution")
    ax.set_xticks(range(1, 11))
    return with_legend(ax)


def by_rate(study: Study, column: str) -> Figure:
    """Figure 4: `column` of the runs, "mean_instability" or "final_accuracy", against the iterative rate.

    Means with 95% intervals; l2 dashed, open markers. Random selection looks at no score and is one line.
    """
    names = {"mean_instability": "mean instability (points)", "final_accuracy": "final test accuracy"}
    ax = axes("iterative pruning rate", names[column])
    if column == "mean_instability":
        ax.yaxis.set_major_formatter(_POINTS)
    runs = study.runs[study.runs["target"] != "none"].drop_duplicates("run")
    for target, score in (("S", "ebn"), ("S", "l2"), ("R", "ebn"), ("L", "ebn"), ("L", "l2")):
        part = runs[(runs["target"] == target) & (runs["score"] == score)].sort_values("rate")
        colour = PURPLE if (target, score) == ("S", "l2") else COLOURS[target]
        line(ax, part, "rate", column, colour, way(target, score), bars=True, marker="o", markersize=7,
             markerfacecolor="white" if score == "l2" else colour, markeredgewidth=1.3,
             linestyle="--" if score == "l2" else "-")
    plain = study.runs.loc[study.runs["target"] == "none", column].dropna()
    if len(plain):
        _level(ax, plain)
    ticks = sorted(runs["rate"].unique())
    if ticks and ticks[-1] > 0.5:  # up to a single event that takes all: the small rates would lie in a heap
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.set_xlim(0, None)
    ax.set_xticks(ticks, [f"{100 * rate:.0f}%" for rate in ticks], fontsize=9 if len(ticks) > 5 else None)
    return with_legend(ax, 3)


def activation_histograms(rows: pd.DataFrame) -> Figure:
    """Figure A1: normalised activations by layer, before and after training, against the standard normal density.

    `rows` as `measures.last_layers` gives them; runs are averaged. Titles state the mean Kolmogorov-Smirnov distance.
    """
    style()
    layers = sorted(rows["number"].unique())
    figure = Figure(figsize=(5.2, 1.75 * ((len(layers) + 1) // 2)), layout="constrained")
    axes = figure.subplots((len(layers) + 1) // 2, 2, sharex=True, sharey=True, squeeze=False)
    grid = np.linspace(-4, 4, 161)
    for ax, number in zip(axes.flat, layers):
        layer = rows[rows["number"] == number]
        distances = layer.groupby("when")["ks"].mean()
        for when, colour, fill in (("before", SKY, True), ("after", BLUE, False)):
            part = layer[layer["when"] == when]
            if part.empty:
                continue
            share = part["count"] / part.groupby("run")["count"].transform("sum") / part["run"].nunique()
            edges = [*np.unique(part["left"]), part["right"].max()]
            sns.histplot(x=(part["left"] + part["right"]) / 2, weights=share, bins=edges, stat="density",
                         element="step", color=colour, fill=fill, alpha=0.55 if fill else 1,
                         linewidth=0 if fill else 1.5, ax=ax, label=f"{when} training")
        ax.plot(grid, stats.norm.pdf(grid), color=VERMILION, linestyle="--", linewidth=1.3, label="standard normal")
        shown = " → ".join(f"{distances[when]:.2f}" if distances[when] == distances[when] else "refused"
                           for when in ("before", "after") if when in distances)
        ax.set_title(f"conv {number}: KS {shown}", fontsize=11)
        ax.set(xlim=(-4, 4), xlabel="", ylabel="")
    figure.supxlabel("normalised activation", fontsize=12)
    figure.supylabel("density", fontsize=12)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=10,
                  columnspacing=1.2)
    return figure


def distance_by_layer(layers: pd.DataFrame) -> Figure:
    """Claim C18: Kolmogorov-Smirnov distance to the standard normal by layer, before and after training."""
    ax = axes("convolution, counted from the input", "KS distance to the normal", shares=False)
    for when, colour, dashes in (("before", SKY, "--"), ("after", BLUE, "-")):
        line(ax, layers[layers["when"] == when].dropna(subset="ks"), "number", "ks", colour, f"{when} training",
             bars=True, linestyle=dashes, marker="o")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(0, None)
    return with_legend(ax)


def score_against_activation(table: pd.DataFrame, score: str, name: str) -> Figure:
    """How well a score predicts a channel's mean activation: columns `score` and `activation`, a dot a channel."""
    ax = axes(name, "mean activation after the ReLU", shares=False)
    sns.scatterplot(table, x=score, y="activation", color={"ebn": BLUE, "l2": PURPLE}[score], s=28, alpha=0.7,
                    linewidth=0, ax=ax)
    rho = stats.spearmanr(table[score], table["activation"]).statistic
    ax.set_title(f"Spearman's rho = {rho:.2f}", fontsize="small")
    return ax.figure


def save(figure: Figure, folder: Path, name: str, rows: pd.DataFrame) -> None:
    """Write `name`.png, .svg and .csv (the rows behind it) into `folder`; the same input gives the same SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()  # which lays it out
    whole = Bbox.union([figure.bbox_inches, figure.get_tightbbox()])  # a picture grows where a word would be cut off
    figure.savefig(folder / f"{name}.png", metadata={"Software": None}, bbox_inches=whole)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None}, bbox_inches=whole)
    rows.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")

"""A study in, a Matplotlib `Figure` out. Never trains, reads no file; `save` writes PNG, SVG and CSV."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from gstlib import analysis
from gstlib.analysis import Study
from gstlib.spec import RunSpec

# one colour a method, the same in every figure: Okabe and Ito's set, told apart by every common colour vision
_BLACK, _ORANGE, _SKY, _GREEN, _BLUE, _VERMILION, _PURPLE = (
    "#4d4d4d", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
_COLOURS = {"none": _BLACK, "S": _BLUE, "R": _GREEN, "L": _VERMILION}
_LIGHTER = {"S": _SKY, "L": _ORANGE}


def style() -> None:
    """The look that all figures share: white ground (also on dark pages), thin frame, text as text in SVG."""
    sns.set_theme(context="notebook", style="ticks", rc={
        "figure.facecolor": "white", "savefig.facecolor": "white", "axes.facecolor": "white",
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
        "axes.titlesize": "medium", "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6,
        "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "gstlib", "figure.dpi": 100, "savefig.dpi": 160,
        "font.family": "DejaVu Sans",
    })


def method_name(spec: RunSpec) -> str:
    """What readers call a configuration: target, score and iterative rate (the largest over the layers, rounded)."""
    p = spec.pruning
    if p is None:
        return "no pruning"
    score = {"ebn": "E[BN]", "l2": "l2", "l1": "l1", "magnitude": "weights"}[p.score]
    return f"prune {p.target}, {score}, {100 * p.schedule.iterative_rate:.0f}%"


def method_colour(label: str) -> str:
    """The colour of a configuration by its label, the same at every profile.

    The target sets the hue, the smallest rate (r = 4, many small events)
    takes its lighter partner, and S by l2 is purple.
    """
    target, *details = label.split()
    if target == "S" and "l2" in details:
        return _PURPLE
    return (_LIGHTER if "r=4" in details else _COLOURS).get(target, _BLACK)


def traces(study: Study) -> pd.DataFrame:
    """Accuracy over training with each event's drop: after an epoch's own value comes t_post, a hair later."""
    epochs = study.epochs.dropna(subset="test_accuracy")[["label", "run", "epoch", "test_accuracy"]]
    frames = [epochs.rename(columns={"test_accuracy": "accuracy"})]
    if len(study.events):
        after = analysis.instability(study.events)[["label", "run", "epoch", "t_post"]].rename(columns={"t_post": "accuracy"})
        frames.append(after.assign(epoch=after["epoch"] + 0.02))
    return pd.concat(frames, ignore_index=True).sort_values(["label", "run", "epoch"], ignore_index=True)


def accuracy_by_epoch(study: Study, labels: list[str] | None = None) -> Figure:
    """Figure 1 left: mean test accuracy over training with 95% intervals, falls at events drawn, arrows at L's events.

    `labels` picks configurations (default, as in the paper: all that score
    by E[BN]); what has no stored run is not drawn, and the caption says so.
    """
    style()
    if labels is None:
        labels = [label for label in study.labels if not label.endswith("l2")]
    ax = Figure(figsize=(7, 4.2), layout="constrained").subplots()
    labels = [label for label in labels if label in set(study.runs["label"])]
    points = traces(study)
    points = points[points["label"].isin(labels)]
    for label in labels:
        spec = study.spec(label)
        part = points[points["label"] == label]
        sns.lineplot(part, x="epoch", y="accuracy", color=method_colour(label), label=method_name(spec), ax=ax,
                     errorbar=("ci", 95), n_boot=1000, seed=0, linewidth=1.6 if label.startswith("L") else 1.2,
                     err_kws={"alpha": 0.18, "linewidth": 0})
    for label in labels:
        if not label.startswith("L"):
            continue
        each = analysis.instability(study.events[study.events["label"] == label])
        for epoch, low in each.groupby("epoch")["t_post"].mean().items():
            ax.annotate("", (epoch, low), (0, -16), textcoords="offset points",
                        arrowprops={"arrowstyle": "-|>", "color": method_colour(label), "shrinkB": 2})
    last = points["epoch"].max()
    bottom = points.loc[points["epoch"] > 0.05 * last, "accuracy"].quantile(0.01)
    ax.set_ylim(max(0, bottom - 0.07), min(1, points["accuracy"].max() + 0.03))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set(xlabel="epoch", ylabel="test accuracy", xlim=(0, last))
    ax.legend(fontsize="small", loc="lower right")
    return ax.figure


def accuracy_by_instability(study: Study) -> Figure:
    """Figure 1 right: final test accuracy against mean instability, a point a run, configuration means with 95% intervals.

    The title states Pearson's r over the pruned runs with its interval and
    p-value (C1, C2); the unpruned mean is a dotted line.
    """
    style()
    ax = Figure(figsize=(7, 4.6), layout="constrained").subplots()
    for label in study.labels:
        runs = study.runs[study.runs["label"] == label]
        if len(runs) == 0:
            continue
        spec = study.spec(label)
        colour = method_colour(label)
        if spec.pruning is None:
            estimate = analysis.mean_interval(runs["final_accuracy"])
            ax.axhline(estimate.value, color=colour, linestyle=":", linewidth=1.2, label=method_name(spec), zorder=1)
            if np.isfinite(estimate.low):
                ax.axhspan(estimate.low, estimate.high, color=colour, alpha=0.08, linewidth=0, zorder=0)
            continue
        ax.scatter(runs["mean_instability"], runs["final_accuracy"], s=18, color=colour, alpha=0.55, linewidths=0)
        x, y = (analysis.mean_interval(runs[column]) for column in ("mean_instability", "final_accuracy"))
        ax.errorbar(x.value, y.value, xerr=_bars(x), yerr=_bars(y), color=colour, marker="D", markersize=6,
                    capsize=2, linewidth=1.2, label=method_name(spec), zorder=3)
    found = analysis.correlation(study.runs)
    if np.isfinite(found.r):
        ax.set_title(f"r = {found.r:.2f} [{found.low:.2f}, {found.high:.2f}], p = {found.p:.2g}, n = {found.n}", fontsize="small")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    ax.set(xlabel="mean instability (points of test accuracy)", ylabel="final test accuracy")
    ax.legend(fontsize="x-small", loc="best")
    return ax.figure


def _bars(estimate: analysis.Estimate) -> np.ndarray | None:
    if not np.isfinite(estimate.low):
        return None
    return np.array([[estimate.value - estimate.low], [estimate.high - estimate.value]]).clip(min=0)


def save(figure: Figure, folder: str | Path, name: str, rows: pd.DataFrame) -> list[Path]:
    """Write `name`.png, .svg and .csv (the rows behind it) into `folder`; the same input gives the same SVG."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    places = [folder / f"{name}.{kind}" for kind in ("png", "svg", "csv")]
    figure.savefig(places[0], metadata={"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": "gstlib"}):
        figure.savefig(places[1], metadata={"Date": None, "Creator": None})
    rows.to_csv(places[2], index=False, float_format="%.6g", lineterminator="\n")
    return places

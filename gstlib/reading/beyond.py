"""What the chapters beyond the paper draw and compute: maps of gains, memory of labels, dose and response."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pandas as pd
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from scipy import stats

from gstlib.experiments.beyond import WHOLE
from gstlib.reading import figures, measures, text
from gstlib.reading.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, VERMILION
from gstlib.reading.interval import FEWEST, LEVEL, Estimate, t_interval
from gstlib.reading.measures import KEYS
from gstlib.reading.study import Study

_KINDS = {"true": (BLUE, "labels that are true"), "wrong": (VERMILION, "labels that are wrong")}


def places(study: Study) -> pd.DataFrame:
    """A row a place of the map that has runs: its gain (mean over seeds, in points, with low, high and n), width, images,
    `steps` between two events of a layer, and `back`, the mean share of clusters of events made good in training
    (`measures.back`)."""
    pruned = study.runs[study.runs["target"] != "none"]
    at = pruned.assign(images=pruned["train_size"].where(pruned["train_size"] > 0, WHOLE),
                       steps=lambda r: r["retrain"] * r["images"] // r["batch_size"])
    back = measures.back(study.epochs, study.events).groupby("label")["back"].mean()
    each = at.drop_duplicates("label")[["label", "width", "images", "steps"]]
    gains = measures.gains(study.runs)
    found = pd.DataFrame([(label, *t_interval(100 * part["gain"])[:4])
                          for label, part in gains.groupby("label", sort=False)],
                         columns=["label", "gain", "low", "high", "n"])
    return each.merge(found, on="label").assign(back=lambda r: r["label"].map(back))


def maps(study: Study) -> dict[str, Study]:
    """What each map shows, by what lies along it: "width" at the profile's own images, "images" at its own width, for the
    steps between events at which images vary."""
    of, own = {label: study.spec(label) for label in study.labels}, study.spec("none")
    steps = {label: (spec.data.train_size or WHOLE) / spec.optimiser.batch_size for label, spec in of.items()}
    varied = {steps[label] for label, spec in of.items() if spec.data != own.data}
    return {"width": study.restrict(label for label, spec in of.items() if spec.data == own.data),
            "images": study.restrict(label for label, spec in of.items() if spec.model == own.model and steps[label] in varied)}


def gain_map(rows: pd.DataFrame, x: str) -> Figure:
    """Where pruning helps and where it hurts: gain by `x` ("width" or "images") and the steps between two events.

    Blue helps, red hurts, a bold number is clear of zero; the small one says after how many clusters of events training
    accuracy was back when the next came.
    """
    ax = figures.axes({"width": "width of the network", "images": "training images"}[x],
                      "training steps between events", shares=False)
    columns, lines = (sorted(rows[name].unique()) for name in (x, "steps"))
    most = max([0.1, *rows["gain"].abs()])
    ax.grid(False)
    for row in rows.itertuples():
        place, line = columns.index(getattr(row, x)), lines.index(row.steps)
        clear = row.n >= FEWEST and (row.low > 0 or row.high < 0)
        colour = figures.DIVERGING(TwoSlopeNorm(0, -most, most)(row.gain))
        ax.fill_between([place - 0.5, place + 0.5], line - 0.5, line + 0.5, color=colour, linewidth=0)
        ink = "white" if sum(colour[:3]) < 1.5 else "black"
        ax.text(place, line + 0.12, f"{row.gain:+.1f}".replace("-", "−"), ha="center", va="center", fontsize=13, color=ink,
                fontweight="bold" if clear else "normal")
        if row.back == row.back:
            ax.text(place, line - 0.26, f"back: {row.back:.0%}", ha="center", va="center", fontsize=8, color=ink)
    ax.set_xticks(range(len(columns)), [str(Fraction(value)) if x == "width" else f"{value:,}" for value in columns])
    ax.set_yticks(range(len(lines)), [f"{value:,}" for value in lines])
    ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-0.5, len(lines) - 0.5))
    ax.set_title("points of accuracy: blue, pruning helps; red, it hurts", fontsize="small")
    return ax.figure


def forgotten(study: Study) -> pd.DataFrame:
    """A row a run with wrong labels and a kind of label: `share` that its events made it forget (`measures.forgotten`)."""
    rows = measures.forgotten(study.events)
    wide = [rows[KEYS].assign(kind=kind, share=rows[f"forgotten_{kind}"]) for kind in _KINDS]
    return pd.concat(wide, ignore_index=True).merge(study.runs[["label", "wrong_labels"]].drop_duplicates(), on="label")


def forgotten_by_method(rows: pd.DataFrame) -> Figure:
    """What events forget, by way of disturbing: true labels beside wrong ones, a dot a run, means with 95% intervals."""
    ax, names = figures.axes("", "share forgotten at the events"), list(dict.fromkeys(rows["label"]))
    for shift, (kind, (colour, name)) in zip((-0.14, 0.14), _KINDS.items()):
        part = rows[rows["kind"] == kind]
        for label, runs in part.groupby("label"):
            _estimate(ax, names.index(label) + shift, runs["share"], colour, name if label == names[0] else None)
    ax.axhline(0, color=BLACK, linewidth=0.8)
    ax.set_xticks(range(len(names)), [name.partition(",")[0] for name in names])
    return figures.with_legend(ax)


def _estimate(ax, x: float, values: pd.Series, colour: str, name: str | None = None) -> None:
    """Runs as dots, their mean with its interval beside them."""
    found = t_interval(values)
    ax.scatter([x - 0.05] * len(values), values, s=12, color=colour, alpha=0.4, linewidths=0)
    ax.errorbar(x + 0.05, found.value, figures.bar(found), color=colour, marker="D", markersize=6, capsize=3, label=name)


def fitted_by_event(study: Study, label: str) -> Figure:
    """Training accuracy on true and on wrong labels just before each event and just after, mean over runs."""
    ax, events = figures.axes("epoch of the event", "training accuracy"), study.events[study.events["label"] == label]
    for kind, (colour, name) in _KINDS.items():
        sides = [events.assign(at=events["epoch"] + shift, accuracy=events[f"train_{kind}_{when}"])
                 for when, shift in (("pre", 0.0), ("post", 0.35))]
        figures.line(ax, pd.concat(sides), "at", "accuracy", colour, name, marker=".", linewidth=1.2)
    ax.set_ylim(0, 1.02)
    return figures.with_legend(ax)


def gain_by_wrong(study: Study) -> Figure:
    """Gain of prune L over no pruning by the share of wrong labels, a dot a seed, means with 95% intervals."""
    ax = figures.axes("share of wrong training labels", "gain of prune L, points of accuracy", shares=False)
    shares = sorted(study.runs["wrong_labels"].unique())
    rows = measures.gains(study.runs)
    for place, share in enumerate(shares):
        part = rows[(rows["wrong_labels"] == share) & (rows["target"] == "L") & (rows["effect"] == "remove")]
        if len(part):
            _estimate(ax, place, 100 * part["gain"], VERMILION)
    ax.axhline(0, color=BLACK, linewidth=0.8)
    ax.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
    return ax.figure


def labels_table(study: Study) -> str:
    """A row a configuration with wrong labels: test accuracy, training accuracy by kind of label, and training loss at the
    end, means with 95% intervals, as Markdown."""
    rows = []
    for label in dict.fromkeys(study.runs.loc[study.runs["wrong_labels"] > 0, "label"]):
        each = [text.by_seed(study, label, f"final_{name}")
                for name in ("accuracy", "train_true", "train_wrong")]
        loss = t_interval(text.by_seed(study, label, "log_train_loss"))[:3]
        rows.append([label, len(each[0]), *(text.number(*t_interval(values)[:3], "", form=".1f") for values in each),
                     text.number(*(10.0**bound for bound in loss), "", form=".2g")])
    return text.markdown(rows, ["method", "runs", "test accuracy, %", "true labels fitted, %", "wrong labels fitted, %",
                                "training loss"])


def by_way(study: Study) -> pd.DataFrame:
    """A row a run of the dose experiment: seed, way (target and score, or zeroing), label, x (log10 of mean instability) and
    y (points of final accuracy); as `mixed` takes it."""
    runs = study.runs
    way = (runs["target"] + " by " + runs["score"].map({"ebn": "E[BN]"}).fillna(runs["score"])).where(
        runs["target"] != "R", "R").where(runs["effect"] == "remove", "zeroing")
    return pd.DataFrame({"seed": runs["seed"], "run": runs["run"], "way": way, "label": runs["label"],
                         "x": runs["log_instability"], "y": 100 * runs["final_accuracy"]})


_WAYS = {"S by E[BN]": BLUE, "S by l2": PURPLE, "R": GREEN, "L by E[BN]": VERMILION, "L by l2": ORANGE, "zeroing": "#332288"}


def dose_response(rows: pd.DataFrame) -> Figure:
    """Final accuracy against mean instability: a dot a configuration, a line a way of pruning, the ways' means as crosses
    with the line between them dashed.  `rows` as `by_way` gives them."""
    ax = figures.axes("mean instability (points of test accuracy)", "final test accuracy, %", shares=False)
    each = rows.groupby(["way", "label"], sort=False)[["x", "y"]].mean().reset_index()
    for way, part in each.groupby("way"):
        ax.scatter(100 * 10 ** part["x"], part["y"], s=26, color=_WAYS[way], label=way, linewidths=0)
        _fit(ax, part, color=_WAYS[way], linewidth=1.6)
        ax.plot(100 * 10 ** part["x"].mean(), part["y"].mean(), marker="X", color=_WAYS[way], markersize=11,
                markeredgecolor="white")
    _fit(ax, each.groupby("way")[["x", "y"]].mean(), color=BLACK, linestyle="--", linewidth=1.4, label="between ways")
    figures.by_tens(ax.set_xscale, ax.xaxis, "{x:g}")
    return figures.with_legend(ax, 3)


def _fit(ax, part: pd.DataFrame, **look) -> None:
    if part["x"].nunique() > 1:
        slope, start = np.polyfit(part["x"], part["y"], 1)
        ends = np.array([part["x"].min(), part["x"].max()])
        ax.plot(100 * 10**ends, start + slope * ends, **look)


def dose_table(rows: pd.DataFrame) -> str:
    """The mixed-effects regression's slopes (`mixed`) as Markdown; a sentence where there are too few runs for one."""
    if (n := rows["seed"].nunique()) < FEWEST:
        return f"*Too few runs for a regression with the seed as a random effect ({text.seeds(n)}, {FEWEST} are asked for).*"
    try:
        found = mixed(rows)
    except (ValueError, np.linalg.LinAlgError) as error:
        return f"*Too few runs for a regression ({error}).*"
    lines = []
    for term, each in found.items():
        # as many parameters as configurations leave nothing to judge a slope by
        shown = ("too few to tell", "") if math.isnan(each.p) else (
            text.number(*each[:3], "points", form="+.2f"), f"{each.p:.2g}")
        lines.append([f"{term} ways of pruning", *shown, each.n])
    return text.markdown(lines, ["slope, for a tenfold instability", "estimate", "p", "configurations or ways"])


def mixed(rows: pd.DataFrame) -> dict[str, Estimate]:
    """Slopes of y on x "within" and "between" ways of pruning, from one linear mixed-effects regression (REML).

    `rows`: a run each, with seed, way, label (the configuration), x and y.  Fixed effects: x less its way's mean, and that
    mean; random effects: seed, way, configuration, which keep runs of one configuration from counting as several.
    Intervals are Student's t with the configurations less ways and one, or the ways less two, as degrees of freedom.
    """
    import statsmodels.formula.api as formulas  # a second to import, which no other page needs

    rows = rows.assign(between=rows.groupby("way")["x"].transform("mean"), everyone=1)
    rows["within"] = rows["x"] - rows["between"]
    model = formulas.mixedlm("y ~ within + between", rows, groups="everyone", re_formula="0",
                             vc_formula={name: f"0 + C({name})" for name in ("seed", "way", "label")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variance that is estimated as 0 lies on its bound
        fitted = model.fit(reml=True)
    n, ways = rows["label"].nunique(), rows["way"].nunique()
    found = {}
    for name, free in (("within", n - ways - 1), ("between", ways - 2)):
        value, error = float(fitted.params[name]), float(fitted.bse[name])
        half = error * stats.t.ppf(1 - LEVEL / 2, free)
        found[name] = Estimate(value, value - half, value + half, n if name == "within" else ways,
                               float(2 * stats.t.sf(abs(value / error), free)))
    return found

"""From a study to sentences, captions and Markdown tables; every interval is Student's t over seeds."""

import dataclasses
from collections.abc import Callable, Iterable
from fractions import Fraction

import numpy as np
import pandas as pd
from scipy import stats
from tabulate import tabulate

from gstlib.errors import InputError, plain
from gstlib.experiments import Labelled
from gstlib.reading import interval
from gstlib.reading.interval import Estimate, t_interval
from gstlib.reading.measures import DECILES, KEYS, SD_OFF, stability_and_accuracy
from gstlib.reading.study import Study, once

NONE = "–"
_MANY = 6  # configurations; of more not each is told
TRAINED = (100, 99.9)  # per cent of the training images that a small network must know, unpruned and pruned
RATIO = "log10 ratio"  # the unit of what is computed in logarithms and shown as a ratio


def way(target: str, score: str) -> str:
    """Target and score in words; random selection looks at no score."""
    name = {"ebn": "E[BN]", "ebn-signed": "signed E[BN]", "magnitude": "weights"}.get(score, score)
    return f"prune {target}" if target == "R" else f"prune {target}, {name}"


def legend_name(study: Study, label: str) -> str:
    """What readers call a configuration: target, score and iterative rate (the largest over the layers, rounded, but not to 0%).

    A noise goes by its label, whose batches are as printed, with those here where they were cut.
    """
    p = study.spec(label).pruning
    if p is None:
        return "no pruning"
    if p.effect.startswith("remove"):
        share = 100 * p.schedule.iterative_rate
        rate = "before training" if p.scratch else "one shot" if once(p) else f"{share:.{int(share < 0.5)}f}%"
        return f"{way(p.target, p.score)}, {rate}"
    return label if p.batches == study.printed[label].pruning.batches else f"{label} ({p.batches} here)"


def method(study: Study, label: str) -> str:
    """A configuration's name as figures have it, with the label that commands and lists of runs use where it differs."""
    name = legend_name(study, label) if label in study.labels else label
    return name if label in name else f"{name} (`{label}`)"


def number(value: float, low: float, high: float, unit: str, confidence: float = 0.95, form: str = ".2f") -> str:
    """An estimate with its interval (or, where its `confidence` is nan, its range) and unit, logarithms as ratios; a dash
    where there is none."""
    if unit == RATIO:
        value, low, high = (10.0 ** np.clip(bound, -300, 300) for bound in (value, low, high))
        unit, form = "times", ".0f" if value >= 100 else form
    if np.isnan(confidence):
        return f"{value:{form}} (range {low:{form}} to {high:{form}}) {unit}"
    other = "" if confidence == 0.95 else f" ({confidence:.0%} interval)"
    return NONE if np.isnan(value) else f"{Estimate(value, low, high, 0, 0):{form}} {unit}".strip() + other


def seeds(n: int) -> str:
    """A number of seeds in words."""
    return f"{n} seed{'s' * (n != 1)}"


def markdown(rows: Iterable[Iterable], headers: Iterable[str]) -> str:
    """Rows of texts as a Markdown table."""
    return tabulate([[*row] for row in rows], [*headers], tablefmt="github", disable_numparse=True)


def by_seed(study: Study, label: str, column: str) -> pd.Series:
    """A column of a configuration's runs by seed, in per cent or points; logarithms as they are."""
    runs = study.runs[study.runs["label"] == label] if len(study.runs) else pd.DataFrame(columns=["seed", column])
    values = runs.set_index("seed")[column].astype(float).dropna()
    return values if column.startswith("log_") else 100 * values


def distinct(study: Study) -> list[str]:
    """The configurations' labels, of those that mean one run at this profile the first."""
    return firsts(study.labels, lambda label: study.spec(label).id)


def firsts(each: Iterable, key: Callable) -> list:
    """Of those that are alike in `key` the first."""
    found: dict = {}
    for one in each:
        found.setdefault(key(one), one)
    return [*found.values()]


def markdown_table(study: Study) -> str:
    """One row a configuration (`distinct`): runs, events a run, means with 95% intervals (of the training loss the
    geometric one), the share of events that lowered accuracy, and how many took nothing."""
    rows = []
    for label in distinct(study):
        final, best, instability, loss = (by_seed(study, label, column) for column in (
            "final_accuracy", "best_accuracy", "mean_instability", "log_train_loss"))
        events = study.events[study.events["label"] == label] if len(study.events) else study.events
        took = events[events["removed"] > 0] if len(events) else events
        empty = f", {1 - len(took) / len(events):.0%} take nothing" if len(took) < len(events) else ""
        rows.append([method(study, label), len(final), f"{len(events) / len(final):.0f}" if len(final) else NONE,
                     *(number(*t_interval(each)[:3], "", form=".1f") for each in (final, best)),
                     number(*t_interval(instability)[:3], "", form=".2g"),
                     number(*(10.0**bound for bound in t_interval(loss)[:3]), "", form=".2g"),
                     f"{(took['t_post'] < took['t_pre']).mean():.0%}{empty}" if len(took) else NONE])
    return markdown(rows, ["method", "runs", "events", "final accuracy, %", "best after the last event, %",
                           "mean instability, points", "training loss, nats", "events that lower accuracy"])


def empty_events(study: Study) -> str:
    """A sentence on events that removed nothing, for their share was no whole filter; empty where there is none."""
    empty = study.events[study.events["removed"] == 0] if len(study.events) else study.events
    return "" if empty.empty else (
        f"{len(empty)} of {len(study.events)} events ({len(empty) / len(study.events):.0%}) took nothing, for what was due was no "
        "whole filter of so narrow a layer; they count in the mean instability with 0.")


def comparison(study: Study, pairs: Iterable[tuple[str, str]], column: str = "final_accuracy") -> str:
    """Differences of configurations, seed by seed, as a Markdown table: the first of each pair less the second.

    In points, or as a ratio for `log_instability`; seeds that have both.
    """
    what, unit, form = ("ratio", RATIO, ".2f") if column.startswith("log_") else ("difference, points", "", "+.2f")
    rows = []
    # a profile may cut two configurations to one run
    for pair in firsts(pairs, lambda pair: tuple(
            study.spec(label).id if label in study.labels else label for label in pair)):
        a, b = (by_seed(study, label, column) for label in pair)
        found = t_interval((a - b).dropna())
        shown = number(*found[:3], unit, form=form) if found.n else "not run"
        p = f"{found.p:.2g}" if found.p == found.p else NONE
        rows.append([*(method(study, label) for label in pair), shown, p, found.n])
    return markdown(rows, ["method", "against", what, "p", "seeds"])


def training_beside_test(study: Study) -> str:
    """Did what gained accuracy also train better? Each configuration less "none", seed by seed, a row each: final test
    accuracy in points, and final training loss as a ratio."""
    rows = []
    for label in distinct(study)[1:]:
        gain, loss = (t_interval((by_seed(study, label, column) - by_seed(study, "none", column)).dropna())
                      for column in ("final_accuracy", "log_train_loss"))
        rows.append([method(study, label), gain.n, number(*gain[:3], "points", form="+.2f"), number(*loss[:3], RATIO)])
    return markdown(rows, ["method", "seeds", "test accuracy less none's", "training loss over none's"])


def criteria(study: Study) -> str:
    """What a small profile must meet (`TRAINED`), a configuration a row: training accuracy at the end, the lowest."""
    rows = []
    for label in study.labels:
        each, asked = by_seed(study, label, "final_train_accuracy"), TRAINED[study.spec(label).pruning is not None]
        told = (f"{each.min():.2f}", "yes" if each.min() >= asked else "**no**") if len(each) else (NONE, NONE)
        rows.append([method(study, label), len(each), told[0], f"{asked:g}", told[1]])
    return markdown(rows, ["method", "runs", "training accuracy at the end, %, lowest", "asked for", "met"])


def not_learnt(studies: Iterable[Study]) -> str:
    """Which configurations end below what `criteria` asks for, by study, with the lowest training accuracy of each; empty
    without runs."""
    lines, studies = [], [study for study in studies if len(study.runs)]
    for study in studies:
        lowest = {label: by_seed(study, label, "final_train_accuracy").min() for label in study.labels}
        below = [f"{method(study, label)} {value:.1f}%" for label, value in lowest.items()
                 if value < TRAINED[study.spec(label).pruning is not None]]
        lines += [f"- {study.experiment.title}: {', '.join(below)}"] * bool(below)
    return ("Training accuracy at the end, the lowest of the runs, where it is below 100% (never pruned) or 99.9%:\n\n"
            + "\n".join(lines)) if lines else bool(studies) * (
        "Every configuration that was run learns its training images: 100% never pruned, 99.9% pruned.")


def outcome(study: Study) -> str:
    """What the runs of a study came to, for who does not see the figure: final test accuracy and mean instability, each
    configuration's mean over runs, or of many the extremes; empty where nothing is pruned."""
    words = []
    for column, name, form in (("final_accuracy", "Final test accuracy", "{:.1f}%"),
                               ("mean_instability", "Mean instability", "{:.2g} points")):
        each = {label: mean for label in distinct(study) if (mean := by_seed(study, label, column).mean()) == mean}
        if len(each) > _MANY:
            shown = min(each, key=each.get), max(each, key=each.get), "none"
            each = {label: mean for label, mean in each.items() if label in shown}
        words.append(f"{name}: " + "; ".join(f"{legend_name(study, label)} {form.format(each[label])}" for label in each))
    return ". ".join(words) + "." if any(study.spec(label).pruning for label in study.labels) else ""


def pooled(runs: pd.DataFrame) -> tuple[float, float, int]:
    """Pearson's r of mean instability and final accuracy over pruned runs, its p as printed in the paper, their number.

    A description: runs are not independent points.  nan where it is not defined.
    """
    runs = runs.dropna(subset=["mean_instability", "final_accuracy"])
    x, y = runs["mean_instability"], runs["final_accuracy"]
    if len(runs) < 3 or x.nunique() < 2 or y.nunique() < 2:
        return np.nan, np.nan, len(runs)
    return *stats.pearsonr(x, y), len(runs)


def stability_table(study: Study) -> str:
    """`measures.stability_and_accuracy` as a Markdown table, periods as this profile has them."""
    rows = [(row["retrain"], f"{100 * row['rate']:.0f}%", row["runs"],
             *(number(*(row[name + end] for end in ("", "_low", "_high")), "") for name in ("r", "tau")))
            for row in stability_and_accuracy(study.runs).to_dict("records")]
    return markdown(rows, ["epochs between events", "rate", "runs", "Pearson's r", "Kendall's tau"])


def accuracy_slopes(study: Study) -> Estimate:
    """Points of final accuracy for a tenfold mean instability: the slope within each seed, pruned runs alone."""
    runs = study.runs[study.runs["target"] != "none"].assign(points=100 * study.runs["final_accuracy"])
    return seed_slopes(runs, "log_instability", "points")


def seed_slopes(runs: pd.DataFrame, x: str, y: str) -> Estimate:
    """The mean over seeds of the least-squares slope of `y` on `x`; seeds that lack a configuration are left out."""
    wide = runs.drop_duplicates(KEYS).pivot(index="seed", columns="label", values=[x, y]).dropna()
    found = interval.slopes(wide[x].to_numpy(float), wide[y].to_numpy(float)) if wide.shape[1] > 2 else np.array([])
    return t_interval(found[np.isfinite(found)])


def correlation_sentence(study: Study) -> str:
    """Figure 1 right in words: the slope within seeds, and beside it the paper's pooled r, as a description."""
    found, (r, p, n) = accuracy_slopes(study), pooled(study.runs)
    if np.isnan(r) or not found.n:
        return f"Only {n} pruned runs are stored, too few for a slope."
    points = number(*found[:3], "points", form="+.2f")
    return (f"Among these ways of pruning, a tenfold mean instability goes with {points} of final accuracy "
            f"({seeds(found.n)}). Pooled over {n} pruned runs, which are not independent points, "
            f"Pearson's $r = {r:.2f}$, $p = {p:.2g}$.")


def trend(runs: pd.DataFrame, x: str, y: str, unit: str) -> str:
    """The slope within seeds in words: points of `y` (a share), `unit` as in "per decile", beside it the mean of Spearman's rho
    within them, as in the claims."""
    found = seed_slopes(runs.assign(**{y: 100 * runs[y]}), x, y)
    if not found.n:
        return "too few runs for a trend."
    each = [stats.spearmanr(part[x], part[y], nan_policy="omit").statistic for _, part in runs.groupby("seed")
            if part[y].nunique() > 1]  # a constant has none
    rank = f", Spearman's $\\rho = {np.mean(each):.2f}$" if each else ""
    return f"{number(*found[:3], 'points', form='+.2f')} {unit}{rank} ({seeds(found.n)})."


def decile_trend(rows: pd.DataFrame) -> str:
    """Figure 2's trends (C5): gap, test and training accuracy over the deciles, with D10 and without."""
    return "\n".join(
        f"  - {name}, {which}: {trend(part, 'decile', column, 'per decile')}"
        for which, part in (("D0 to D10", rows), ("without D10", rows[rows["target"] != DECILES[-1]]))
        for column, name in (("gap", "gap"), ("final_accuracy", "test accuracy"), ("final_train_accuracy", "training accuracy")))


def refused(layers: pd.DataFrame) -> str:
    """A sentence on Figure A1's layers whose values were not normalised (`measures.normality`); empty without any."""
    off = layers[layers["ks"].isna()]
    which = ", ".join(map(str, sorted(off["number"].unique())))
    return "" if off.empty else (
        f"Left out: {len(off)} of {len(layers)} measurements (convolution {which}), whose values have a standard "
        f"deviation that is off 1 by more than {SD_OFF:.0%} and so were not normalised.")


def flatness_table(rows: pd.DataFrame, labels: Iterable[str]) -> str:
    """How flat the minima of each configuration are, means with 95% intervals, as a Markdown table.

    `rows` as `measures.flatness` gives them; beneath it how sure the numbers of one run are over the choice of images.
    """
    columns = {"curvature": ".0f", "trace": ".0f", "trace_centred": ".0f", "takeuchi": ".1f", "rise_mean": ".3f",
               "rise_worst": ".3f", "loss": ".2f"}
    table = [[label, len(part), *(number(*t_interval(part[name])[:3], "", form=form) for name, form in columns.items())]
             for label in labels if len(part := rows[rows["label"] == label])]
    sure = {name: 100 * (rows[f"{name}_error"] / rows[name]).median() for name in ("trace", "curvature")}
    other = 100 * (rows["curvature_other"] / rows["curvature"]).median()
    return (markdown(table, ["method", "runs", "curvature", "trace", "centred trace", "trace / curvature", "mean rise",
                             "worst rise", "test loss"])
            + f"\n\nOver the choice of images the standard error of one run's trace is {sure['trace']:.0f}% of it, that of its "
              f"curvature {sure['curvature']:.0f}% (medians). On as many other images the loss curves {other:.0f}% as much along "
              "the same eigenvectors, which were the steepest on the first.")


def flatness_correlations(rows: pd.DataFrame) -> str:
    """As in the final version's Figure 6: Pearson's r and Kendall's tau of curvature and trace with stability and best
    accuracy over all runs that have both, as a Markdown table; a description, for runs are no independent points.

    `rows` as `measures.flatness` gives them, merged with the runs.
    """
    table = []
    for measure in ("curvature", "trace"):
        for name, column, sign in (("stability", "mean_relative_instability", -1), ("best accuracy", "best_accuracy", 1)):
            both = rows[[measure, column]].dropna()
            if len(both) > 2 and both[measure].nunique() > 1 and both[column].nunique() > 1:
                x, y = both[measure], sign * both[column]
                table.append([measure, name, len(both), f"{stats.pearsonr(x, y).statistic:.2f}",
                              f"{stats.kendalltau(x, y).statistic:.2f}"])
    return markdown(table, ["sharpness", "against", "runs", "Pearson's r", "Kendall's tau"])


def caption(study: Study, confidence: float = 0.95) -> str:
    """What a figure rests on, from the runs' own provenance: data, profile, runs, interval (if `confidence`), device, date.

    What is missing is named with the command that makes it.  Raises
    `InputError` when no run is stored, naming that command too.
    """
    if study.runs.empty:
        raise InputError(f"no run of {study.experiment.name} is stored at profile {study.profile.name!r}; "
                         f"make them with: {study.command}")
    counts, about = study.runs.groupby("label").size(), study.provenance
    wanted, missing = ({run.spec.id for run in runs} for runs in (study.wanted, study.missing))
    count = " to ".join(dict.fromkeys((f"{counts.min()}", f"{counts.max()}")))
    few = counts.max() < interval.FEWEST
    intervals = ", too few for intervals" if few else f"; intervals are {confidence:.0%} t intervals over seeds" * bool(confidence)
    days = about["finished"].str[:10]
    text = (f"Data: {_listed(about['data_title'])}. Profile: {study.profile.title}, {_sizes(study)}. "
            f"{count} run{'' if count == '1' else 's'} per configuration{intervals}. "
            f"Device: {_listed(about['device'])}. "
            f"Finished: {_prose(' to '.join(dict.fromkeys((days.min(), days.max()))))}. "
            f"Code: commit {_listed(about['commit'].map(short_commit))}.")
    mixed = about.groupby("seed")[["device", *{"instructions"} & {*about}]].nunique().max(axis=1) > 1
    if mixed.any():
        text += (f" On more than one kind of processor, so not on one course until the first event: seed "
                 f"{', '.join(map(str, mixed.index[mixed]))}.")
    if left_out := len(wanted) - len(missing) - study.runs["run"].nunique():
        text += f" Left out: {left_out} runs of seeds that not every configuration has yet."
    if missing:
        text += (f" **Missing: {len(missing)} of {len(wanted)} runs ({_which(study.missing)}).** "
                 f"Make them with `{study.command}`.")
    return text


def _sizes(study: Study) -> str:
    """What was trained, from the specifications: width, images and epochs of each network."""
    words = []
    for name in dict.fromkeys(run.spec.model.name for run in study.wanted):
        specs = [run.spec for run in study.wanted if run.spec.model.name == name]
        images = [spec.data.train_size or np.inf for spec in specs], [spec.data.test_size or np.inf for spec in specs]
        width, train, test, epochs = (
            " to ".join(dict.fromkeys(form(end) for end in (min(each), max(each)))) for each, form in (
                ([spec.model.width for spec in specs], lambda width: "full width" if width == 1 else f"width {Fraction(width)}"),
                *((each, lambda n: "all" if n == np.inf else f"{n:,}") for each in images),
                ([spec.optimiser.epochs for spec in specs], str)))
        words.append(f"{name}: {width}, {train} training images, {epochs} epochs, events tested on {test} images")
    return "; ".join(words)


def _which(missing: Iterable[Labelled]) -> str:
    """Which seeds of which configurations; of three and more that lack the same seeds the first, and how many there are."""
    lacks: dict[str, list[str]] = {}
    for run in missing:
        lacks.setdefault(run.label, []).append(str(run.spec.seed))
    alike: dict[str, list[str]] = {}
    for label, each in lacks.items():
        alike.setdefault(", ".join(each), []).append(label)
    return "; ".join(f"{' and '.join(labels if len(labels) < 3 else (labels[0], f'{len(labels) - 1} more'))}: seed {each}"
                     for each, labels in alike.items())


def _listed(values: pd.Series) -> str:
    return ", ".join(dict.fromkeys(map(_prose, values)))


def _prose(text: str) -> str:
    """A text from anyone's provenance as Markdown that holds no HTML, link, code or formula."""
    return plain(text).translate(str.maketrans("<>`[]{}$\\", "‹›'()()''"))


def short_commit(commit: str) -> str:
    """The first ten digits of a commit's hash, with the mark of uncommitted changes."""
    name, mark, rest = commit.partition("+")
    return name[:10] + mark + rest


def runs_table(study: Study) -> pd.DataFrame:
    """The runs behind a figure that has some, missing ones included: label, seed, id, stored, accuracy, provenance."""
    about = pd.DataFrame([(run.label, run.spec.seed, run.spec.id, run not in study.missing) for run in study.wanted],
                         columns=[*KEYS, "stored"])
    found = study.runs[[*KEYS, "final_accuracy", "mean_instability"]].merge(
        study.provenance[[*KEYS, "data_title", "device", "finished", "commit"]], on=KEYS)
    return about.merge(found, how="left", on=KEYS)


def precisions(study: Study) -> str:
    """What bf16 changes (experiment "precision"), as Markdown: final test accuracy and mean instability of each
    configuration in float32 and bf16 over the seeds that have both, and the difference seed by seed.

    Says how many of the accuracies differ by no more than 0.3 points, and how many mean instabilities of bf16 lie
    within the 95% interval of float32's.
    """
    rows, near, within = [], [], []
    pairs: dict[str, dict[str, str]] = {}
    for label in study.labels:
        spec = study.spec(label)
        pairs.setdefault(dataclasses.replace(spec, precision="float32").id, {})[spec.precision] = label
    for labels in pairs.values():
        for name, column in (("accuracy, %", "final_accuracy"), ("instability", "mean_instability")):
            both = pd.DataFrame({kind: by_seed(study, labels[kind], column) for kind in ("float32", "bf16")}).dropna()
            if both.empty:
                continue
            one, other, change = map(t_interval, (both["float32"], both["bf16"], both["bf16"] - both["float32"]))
            rows.append([labels[study.profile.precision], one.n, name,
                         *(number(*found[:3], "") for found in (one, other, change))])
            if column == "final_accuracy":
                near.append(abs(change.value) <= 0.3)
            elif one.n > 1:
                within.append(one.low <= other.value <= one.high)
    if not near:
        return (f"*No run is stored in both precisions at profile {study.profile.name}. "
                f"Make them with* `{study.command}`.")
    table = markdown(rows, ["configuration", "runs", "measure", "float32", "bf16", "bf16 minus float32"])
    return (f"{table}\n\n{sum(near)} of {len(near)} mean accuracies differ by no more than 0.3 points; "
            f"{sum(within)} of {len(within)} mean instabilities in bf16 lie within the interval of those in float32.")

"""From stored rows to what a figure or a sentence states: instability, run summaries, intervals, correlation.

Reads stored runs only; imports neither torch nor training.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from gstlib import experiments
from gstlib.errors import InputError
from gstlib.experiments import Labelled, Profile
from gstlib.reading.intervals import DRAWS, interval, pooled_pearson
from gstlib.spec import DATASETS, DataSpec
from gstlib.store import Store


@dataclass(frozen=True)
class Study:
    """What the store holds of one experiment at one profile.

    `epochs` and `events` are the stored rows, `runs` one row a run (see
    `summarise`); all carry `label`, `seed` and `run`.  `missing` lists the
    runs that were asked for and are not there, `command` makes them.
    """

    experiment: experiments.Experiment
    profile: Profile
    wanted: list[Labelled]
    missing: list[Labelled]
    epochs: pd.DataFrame
    events: pd.DataFrame
    runs: pd.DataFrame
    provenance: pd.DataFrame
    command: str = ""

    @property
    def labels(self) -> list[str]:
        """The configurations' labels, in the experiment's order."""
        return list(dict.fromkeys(run.label for run in self.wanted))

    def spec(self, label: str):
        """The specification of a configuration's first seed."""
        return next(run.spec for run in self.wanted if run.label == label)


class Estimate(NamedTuple):
    """A statistic with its interval and the number of runs behind it."""

    value: float
    low: float
    high: float
    n: int

    def __format__(self, form: str) -> str:
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def command(figures: str | Iterable[str], profile: str, data: str | None = None,
            results: str | os.PathLike | None = None, seeds=None) -> str:
    """The command that makes the runs of `figures`; `data`, `results` and `seeds` where they are known."""
    words = [figures] if isinstance(figures, str) else [*figures]
    words += ["--profile", profile]
    if data is not None:
        words += ["--data", data]
    if seeds is not None:
        # "3," is seed 3, "3" would be three seeds
        words += ["--seeds", str(seeds) if isinstance(seeds, (int, str)) else ",".join(map(str, seeds)) + ","]
    if results is not None:
        words += ["--results", os.fspath(results)]
    return "python -m gstlib run " + shlex.join(words)


def find_data(store: Store, profile: Profile, data: str | None, figure: str = "figure1-vgg11") -> DataSpec:
    """The data set that the store's runs at `profile` were trained on.

    `data` is a name, or a path (which can only be a `cifar10-folder` or
    `cifar10`), or None for the profile's own.  Raises `InputError` when there
    is none (naming the command that makes those of `figure`), or when there
    are several and results would be mixed.
    """
    name = data or profile.data
    names = {name} if name in DATASETS else {"cifar10", "cifar10-folder"}
    found = {spec.data.fingerprint: spec.data.name for _, spec, about in store.about()
             if about["profile"] == profile.name and spec.data.name in names}
    if not found:
        raise InputError(f"{store.path} holds no run at profile {profile.name!r} on data {name!r}; "
                         f"make them with: {command(figure, profile.name, name, store.path)}")
    if len(found) > 1:
        prints = ", ".join(f"{n} {f[:12]}" for f, n in sorted(found.items()))
        raise InputError(f"{store.path} holds runs at profile {profile.name!r} on several data sets ({prints}); "
                         "keep each in a results folder of its own")
    (fingerprint, name), = found.items()
    return experiments.data_spec(profile, name, fingerprint)


def study(store: Store, figure: str, profile: str = "smoke", data: str | None = None, seeds=None) -> Study:
    """Everything stored of `figure` at `profile`; `seeds` as in `experiments.parse_seeds`.

    With `seeds` None these are the profile's number of seeds, or as many as
    the store holds of this experiment when those are more.  Missing runs are
    listed, never passed over.
    """
    size, what = experiments.profile(profile), experiments.experiment(figure)
    source = find_data(store, size, data, figure)
    stored = set(store.ids())
    if seeds is None:
        number = size.seeds
        while any(run.spec.id in stored for run in what.runs(size, source, [number])):
            number += 1
        chosen = list(range(number))
    else:
        chosen = experiments.parse_seeds(seeds)
    wanted = what.runs(size, source, chosen)
    whole = dict(store.runs(run.spec.id for run in wanted))
    keys, epochs, events, about, missing = [], [], [], [], []
    for run in wanted:
        found = whole.get(run.spec.id)
        if found is None:
            missing.append(run)
            continue
        key = {"label": run.label, "seed": run.spec.seed, "run": run.spec.id}
        keys.append(key)
        epochs.append(found.tables["epoch"])
        events.append(found.tables["event"])
        about.append(found.provenance | key)

    def together(frames):
        if not frames:
            return pd.DataFrame()
        # the keys once for all runs: into each of hundreds of frames would take longer than reading them
        rows = np.repeat(np.arange(len(frames)), [len(frame) for frame in frames])
        columns = pd.DataFrame(keys).take(rows).reset_index(drop=True)
        return pd.concat([pd.concat(frames, ignore_index=True), columns], axis=1)

    struck = together(events)
    each = instability(struck).groupby(["label", "run"], sort=False) if len(struck) else ()
    falls = {key: rows for key, rows in each}
    summaries = [key | _summary(rows, falls.get((key["label"], key["run"]))) for key, rows in zip(keys, epochs)]

    asked = seeds if seeds is not None or len(chosen) == size.seeds else len(chosen)
    return Study(what, size, wanted, missing, together(epochs), struck,
                 pd.DataFrame(summaries), pd.DataFrame(about),
                 command(figure, profile, data or source.name, store.path, asked))


def instability(events: pd.DataFrame) -> pd.DataFrame:
    """Instability of each event (section 3): |t_pre - t_post| once per run and event epoch, whatever the layers hit.

    Adds `instability`, and `relative_instability` = (t_pre - t_post) / t_pre,
    the form of the paper's final version.  Both as shares (0 … 1).
    """
    # the label counts too: two configurations that come to the same run at a small profile each have their events
    keys = [key for key in ("label", "run", "epoch") if key in events]
    each = events.drop_duplicates(keys).reset_index(drop=True)
    drop = each["t_pre"] - each["t_post"]
    return each.assign(instability=drop.abs(), relative_instability=drop / each["t_pre"])


def summarise(epochs: pd.DataFrame, events: pd.DataFrame) -> dict:
    """One run in one row.

    final_accuracy: test accuracy after the last epoch (the paper's measure);
    best_accuracy: the best at or after the last event (its final version's);
    final_train_accuracy; mean_instability and mean_relative_instability over
    the run's events (nan without any); events: their number; parameters left.
    """
    return _summary(epochs, instability(events) if len(events) else None)


def _summary(epochs: pd.DataFrame, each: pd.DataFrame | None) -> dict:
    """`summarise`, of what `instability` made of the run's events."""
    # arrays, since pandas would take as long for a run's few sums as reading the run does
    accuracy = epochs["test_accuracy"].to_numpy(float)
    tested = ~np.isnan(accuracy)
    row = {
        "final_accuracy": float(accuracy[-1]),
        "best_accuracy": float(max(accuracy[tested], default=np.nan)),
        "final_train_accuracy": float(epochs["train_accuracy"].to_numpy()[-1]),
        "parameters": int(epochs["parameters"].to_numpy()[-1]),
        "mean_instability": float("nan"), "mean_relative_instability": float("nan"), "events": 0,
    }
    if each is not None:
        # the accuracy of the last event's own epoch was measured before it struck
        after = accuracy[tested & (epochs["epoch"].to_numpy() > each["epoch"].to_numpy().max())]
        row |= {
            "best_accuracy": float(max([*after, each["t_post"].to_numpy()[-1]])),
            "mean_instability": float(each["instability"].mean()),
            "mean_relative_instability": float(each["relative_instability"].mean()),
            "events": len(each),
        }
    return row


def mean_interval(values: Iterable[float], confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Mean with a bootstrap interval over runs: BCa from five runs on, percentile below; none for a single run."""
    values = np.asarray(list(values), dtype=float)
    n, mean = len(values), float(values.mean()) if len(values) else float("nan")
    if n < 2:
        return Estimate(mean, float("nan"), float("nan"), n)
    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean, n)
    result = stats.bootstrap((values,), np.mean, confidence_level=confidence, n_resamples=DRAWS,
                             method="BCa" if n >= 5 else "percentile", rng=np.random.default_rng(seed))
    return Estimate(mean, float(result.confidence_interval.low), float(result.confidence_interval.high), n)


class Correlation(NamedTuple):
    """Pearson's r with its two-sided p-value and a bootstrap interval."""

    r: float
    p: float
    low: float
    high: float
    n: int


def correlation(runs: pd.DataFrame, x: str = "mean_instability", y: str = "final_accuracy",
                confidence: float = 0.95, seed: int = 0) -> Correlation:
    """Pearson's correlation of two columns over runs (Figure 1 right; claims C1 and C2).

    The interval resamples runs within configurations (`label`), see
    `intervals.interval`; there is none (nan) where a configuration has a single run,
    which could only be drawn again.  Unpruned runs, which have no
    instability, do not count.  All nan with fewer than three runs or where a
    column does not vary.
    """
    table = runs.dropna(subset=[x, y])
    if len(table) < 3 or table[x].nunique() < 2 or table[y].nunique() < 2:
        return Correlation(*[float("nan")] * 4, len(table))
    test = stats.pearsonr(table[x], table[y])
    if table["label"].value_counts().min() < 2:
        return Correlation(float(test.statistic), float(test.pvalue), float("nan"), float("nan"), len(table))
    groups = [rows[[x, y]].to_numpy(float) for _, rows in table.groupby("label", sort=False)]
    found = interval(groups, pooled_pearson, confidence, seed)
    return Correlation(float(test.statistic), float(test.pvalue), found.low, found.high, len(table))


def table(study: Study) -> pd.DataFrame:
    """One row a configuration: label, runs, events, and means with 95% intervals in per cent."""
    rows = []
    for label in study.labels:
        runs = study.runs[study.runs["label"] == label] if len(study.runs) else study.runs
        if len(runs) == 0:
            rows.append({"label": label, "runs": 0})
            continue
        row = {"label": label, "runs": len(runs), "events": int(runs["events"].iloc[0])}
        for column in ("final_accuracy", "best_accuracy", "mean_instability"):
            estimate = mean_interval(100 * runs[column].dropna())
            row |= {column: estimate.value, f"{column}_low": estimate.low, f"{column}_high": estimate.high}
        rows.append(row)
    return pd.DataFrame(rows)


def markdown_table(study: Study) -> str:
    """`table` as a Markdown table, in per cent with 95% intervals."""
    lines = ["| method | runs | events | final accuracy, % | best after the last event, % | mean instability, points |",
             "|---|---|---|---|---|---|"]
    for row in table(study).to_dict("records"):
        cells = [row["label"], str(row["runs"]), f"{row['events']:.0f}" if row["runs"] else "–"]
        for column in ("final_accuracy", "best_accuracy", "mean_instability"):
            value = row.get(column, float("nan"))
            interval = f" [{row[column + '_low']:.1f}, {row[column + '_high']:.1f}]" if row["runs"] > 1 else ""
            cells.append("–" if np.isnan(value) else f"{value:.1f}{interval}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def correlation_sentence(study: Study) -> str:
    """The correlation of Figure 1 right in words, with its interval, p-value and number of runs."""
    found = correlation(study.runs)
    if np.isnan(found.r):
        return f"Only {found.n} pruned runs are stored, too few for a correlation."
    interval = ("no interval, since a configuration has a single run" if np.isnan(found.low)
                else f"95% interval {found.low:.2f} to {found.high:.2f}")
    return (f"Over {found.n} pruned runs, mean instability and final test accuracy have Pearson's "
            f"$r = {found.r:.2f}$, {interval}, $p = {found.p:.2g}$.")


def caption(study: Study, confidence: float = 0.95) -> str:
    """What a figure rests on, from the runs' own provenance: data, profile, runs, interval, device, date.

    What is missing is named with the command that makes it.  Raises
    `InputError` when no run is stored, naming that command too.
    """
    if study.runs.empty:
        raise InputError(f"no run of {study.experiment.name} is stored at profile {study.profile.name!r}; "
                         f"make them with: {study.command}")
    counts = study.runs.groupby("label").size()
    number = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    about = study.provenance
    intervals = ", hence no intervals" if number == "1" else (
        f"; intervals are {confidence:.0%} bootstrap intervals over runs")
    text = (
        f"Data: {_listed(about['data_title'])}. Profile: {study.profile.title}. "
        f"{number} run{'' if number == '1' else 's'} per configuration{intervals}. "
        f"Device: {_listed(about['device'])}. "
        f"Finished: {_span(about['finished'].str[:10])}. Code: commit {_listed(about['commit'].map(short_commit))}."
    )
    if study.missing:
        short: dict[str, list[int]] = {}
        for run in study.missing:
            short.setdefault(run.label, []).append(run.spec.seed)
        which = "; ".join(f"{label}: seed {', '.join(map(str, seeds))}" for label, seeds in short.items())
        text += (f" **Missing: {len(study.missing)} of {len(study.wanted)} runs ({which}).** "
                 f"Make them with `{study.command}`.")
    return text


def _listed(values: pd.Series) -> str:
    return ", ".join(dict.fromkeys(map(_prose, values)))


def _prose(text: str) -> str:
    """A text from anyone's provenance as Markdown that holds no HTML, link, code or formula."""
    return text.translate(str.maketrans("<>`[]{}$\\", "‹›'()()''"))


def short_commit(commit: str) -> str:
    """The first ten digits of a commit's hash, with the mark of uncommitted changes."""
    name, mark, rest = commit.partition("+")
    return name[:10] + mark + rest


def _span(days: pd.Series) -> str:
    return _prose(days.min() if days.min() == days.max() else f"{days.min()} to {days.max()}")


def generalization(study: Study, epoch: int = 35) -> pd.DataFrame:
    """Figure 2's measures, a row a run: label, target, structure, decile, seed, run, gap and magnitude.

    gap: test minus training accuracy after the last epoch run (the paper's
    epoch 54); magnitude: the mean score of what the last event at or before
    `epoch` removed, in which `epoch` counts as printed and is scaled like the
    schedule.  An event that removed nothing has no magnitude and is passed
    over.  Unpruned runs do not count.
    """
    events = _until(study, epoch).dropna(subset="mean_score") if len(study.events) else study.events
    rows = []
    for run in study.runs.to_dict("records"):
        pruning = study.spec(run["label"]).pruning
        if pruning is None:
            continue
        struck = events[events["run"] == run["run"]]
        rows.append({
            "label": run["label"], "target": pruning.target, "structure": pruning.structure,
            "decile": int(pruning.target[1:]), "seed": run["seed"], "run": run["run"],
            "gap": run["final_accuracy"] - run["final_train_accuracy"],
            "magnitude": struck["mean_score"].iloc[-1] if len(struck) else float("nan"),
        })
    return pd.DataFrame(rows, columns=["label", "target", "structure", "decile", "seed", "run", "gap", "magnitude"])


def decile_means(study: Study, epoch: int = 35) -> pd.DataFrame:
    """Mean score in each tenth of the units present (claim C7), at the last event at or before `epoch` as printed.

    A row a run and decile (0 … 9): label, structure, seed, run, decile, mean,
    and `relative`, the mean over that of the fifth decile (number 4).
    """
    last = _until(study, epoch).sort_values("epoch").drop_duplicates(["label", "run"], keep="last")
    long = last.melt(["label", "seed", "run"], [f"decile_{k}" for k in range(10)], "decile", "mean")
    long["decile"] = long["decile"].str.removeprefix("decile_").astype(int)
    long["relative"] = long["mean"] / long["run"].map(last.set_index("run")["decile_4"])
    long["structure"] = long["label"].map({label: study.spec(label).pruning.structure for label in last["label"]})
    return long.sort_values(["label", "seed", "decile"], ignore_index=True)


def _until(study: Study, epoch: int) -> pd.DataFrame:
    """Figure 2's events up to `epoch`, which counts as printed."""
    (here,), _, _ = experiments.scaled_schedule((epoch,), (epoch,), 1, study.profile.divisor_conv4)
    return study.events[study.events["epoch"] <= here]


def exponential_decile_means() -> np.ndarray:
    """Mean of each tenth of the exponential distribution with mean 1."""
    left = 1 - np.arange(11) / 10  # the share above each decile's lower end
    integral = np.where(left > 0, left * np.log(np.where(left > 0, left, 1)), 0) - left
    return 10 * np.diff(integral)


def histograms(store: Store, study: Study, last: int = 8) -> pd.DataFrame:
    """Figure A1's rows: histograms of the `last` batch normalisations, before (epoch -1) and after training."""
    whole, frames = dict(store.runs(run.spec.id for run in study.wanted)), []
    for run in study.wanted:
        rows = whole[run.spec.id].tables["histogram"] if run.spec.id in whole else ()
        if len(rows):
            frames.append(rows.assign(label=run.label, seed=run.spec.seed, run=run.spec.id))
    if not frames:
        return pd.DataFrame()
    rows = pd.concat(frames, ignore_index=True)
    rows["when"] = np.where(rows["epoch"] < 0, "before", "after")
    rows["number"] = rows["layer_index"] + 1
    return rows[rows["layer_index"] > rows["layer_index"].max() - last].reset_index(drop=True)


def recoveries(study: Study, label: str, seed: int) -> pd.DataFrame:
    """The events of one run: epoch, units removed, t_pre, t_post, instability, and epochs until t_pre is reached again.

    `recovery` counts from the event to the first tested epoch that ends at
    t_pre or above; nan where none does before the next event.
    """
    mine = (study.events["label"] == label) & (study.events["seed"] == seed)
    each = instability(study.events[mine])
    removed = study.events[mine].groupby("epoch")["removed"].sum()
    epochs = study.epochs[(study.epochs["label"] == label) & (study.epochs["seed"] == seed)]
    tested = epochs.dropna(subset="test_accuracy")
    rows = []
    for number, event in enumerate(each.to_dict("records")):
        end = each["epoch"].iloc[number + 1] if number + 1 < len(each) else np.inf
        back = tested[(tested["epoch"] > event["epoch"]) & (tested["epoch"] <= end)
                      & (tested["test_accuracy"] >= event["t_pre"])]
        rows.append({"epoch": int(event["epoch"]), "removed": int(removed[event["epoch"]]), "t_pre": event["t_pre"],
                     "t_post": event["t_post"], "instability": event["instability"],
                     "recovery": back["epoch"].iloc[0] - event["epoch"] if len(back) else float("nan")})
    return pd.DataFrame(rows)


def difference(a: Iterable[float], b: Iterable[float], confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Mean of `a` minus mean of `b` with a percentile bootstrap interval, runs resampled within each; n counts both."""
    a, b = (np.asarray(list(values), dtype=float) for values in (a, b))
    n, value = len(a) + len(b), float(a.mean() - b.mean()) if len(a) and len(b) else float("nan")
    if min(len(a), len(b)) < 2:
        return Estimate(value, float("nan"), float("nan"), n)
    rng = np.random.default_rng(seed)
    drawn = rng.choice(a, (DRAWS, len(a))).mean(1) - rng.choice(b, (DRAWS, len(b))).mean(1)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high), n)


def comparison(study: Study, pairs: Iterable[tuple[str, str]], column: str = "final_accuracy") -> str:
    """Differences of configurations' means as a Markdown table: the first of each pair minus the second, in points."""
    lines = ["| method | against | difference, points | 95% interval | runs |", "|---|---|---|---|---|"]
    for pair in pairs:
        values = [100 * study.runs.loc[study.runs["label"] == label, column].dropna() for label in pair]
        cells = [*pair, "not run", "–", "{} and {}".format(*map(len, values))]
        if all(len(v) for v in values):
            found = difference(*values)
            cells[2] = f"{found.value:+.2f}"
            if np.isfinite(found.low):
                cells[3] = f"{found.low:+.2f} to {found.high:+.2f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def slope(table: pd.DataFrame, x: str, y: str, confidence: float = 0.95, seed: int = 0) -> tuple[Estimate, float]:
    """Least-squares slope of `y` on `x` over runs, its interval (runs resampled within `label`), and Spearman's rho."""
    table = table.dropna(subset=[x, y]).reset_index(drop=True)
    if len(table) < 3 or table[x].nunique() < 2:
        return Estimate(*[float("nan")] * 3, len(table)), float("nan")
    rng = np.random.default_rng(seed)
    groups = table.groupby("label").indices.values()
    rows = np.concatenate([rng.choice(places, (DRAWS, len(places))) for places in groups], 1)
    a, b = table[x].to_numpy(float)[rows], table[y].to_numpy(float)[rows]
    a = a - a.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = (a * b).sum(1) / (a * a).sum(1)
    low, high = np.nanquantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    rho = float(stats.spearmanr(table[x], table[y]).statistic) if table[y].nunique() > 1 else float("nan")
    return Estimate(float(np.polyfit(table[x], table[y], 1)[0]), float(low), float(high), len(table)), rho


def precisions(study: Study) -> str:
    """What bf16 changes (experiment "precision"), as Markdown: a configuration a row, final test accuracy and mean
    instability in float32 and bf16 over the seeds that have both, and the difference run by run.

    Accuracies in per cent, instabilities in points.  Says how many of the
    accuracies differ by no more than 0.3 points and how many mean
    instabilities of bf16 lie within the 95% interval of float32's.
    """
    lines = ["| configuration | runs | measure | float32 | bf16 | bf16 minus float32 |", "|---|---:|---|---:|---:|---:|"]
    near: list[bool] = []
    within: list[bool] = []
    pairs: dict[str, dict[str, str]] = {}
    for label in study.labels if len(study.runs) else ():
        spec = study.spec(label)
        pairs.setdefault(dataclasses.replace(spec, precision="float32").id, {})[spec.precision] = label
    for labels in pairs.values():
        label = labels[study.profile.precision]
        exact, short = (study.runs[study.runs["label"] == labels[kind]].set_index("seed") for kind in ("float32", "bf16"))
        seeds = exact.index.intersection(short.index)
        for name, column in (("accuracy, %", "final_accuracy"), ("instability", "mean_instability")):
            a, b = (100 * runs.loc[seeds, column] for runs in (exact, short))
            if a.notna().any():
                one, other, change = mean_interval(a), mean_interval(b), mean_interval(b - a)
                lines.append(f"| {label} | {one.n} | {name} | {one:.2f} | {other:.2f} | {change:.2f} |")
                if column == "final_accuracy":
                    near.append(abs(change.value) <= 0.3)
                elif one.n > 1:
                    within.append(one.low <= other.value <= one.high)
    if not near:
        return f"*No run is stored in both precisions at profile {study.profile.name}. Make them with* `{study.command}`."
    return "\n".join(lines) + (
        f"\n\n{sum(near)} of {len(near)} mean accuracies differ by no more than 0.3 points; {sum(within)} of {len(within)} mean "
        "instabilities in bf16 lie within the interval of those in float32.")


def runs_table(study: Study) -> pd.DataFrame:
    """The runs behind a figure, missing ones included: label, seed, id, stored or not, accuracy, provenance."""
    missing = {run.spec.id for run in study.missing}
    about = pd.DataFrame([{"label": run.label, "seed": run.spec.seed, "run": run.spec.id,
                           "stored": run.spec.id not in missing} for run in study.wanted])
    if study.runs.empty:
        return about
    key = ["label", "seed", "run"]
    found = study.runs[[*key, "final_accuracy", "mean_instability"]].merge(
        study.provenance[[*key, "data_title", "device", "finished", "commit"]], on=key)
    return about.merge(found, how="left", on=key)


def restrict(study: Study, labels: Iterable[str], seed: int | None = None) -> Study:
    """The part of a study that a panel shows, so that its caption counts those runs and no others."""
    labels = set(labels)

    def chosen(frame):
        return frame if frame.empty else frame[frame["label"].isin(labels) & (seed is None or frame["seed"] == seed)]

    def listed(runs):
        return [run for run in runs if run.label in labels and seed in (None, run.spec.seed)]

    frames = {name: chosen(getattr(study, name)) for name in ("epochs", "events", "runs", "provenance")}
    return dataclasses.replace(study, wanted=listed(study.wanted), missing=listed(study.missing), **frames)


def rates(study: Study) -> pd.DataFrame:
    """The pruned runs with `target`, `score` and `rate` (the iterative rate, largest over the layers), each run once.

    Where two labels mean the same run at this profile, the first counts.
    """
    pruned = {label: pruning for label in study.labels if (pruning := study.spec(label).pruning)}
    runs = study.runs[study.runs["label"].isin(pruned)].drop_duplicates("run") if len(study.runs) else study.runs
    return runs.assign(
        target=[pruned[label].target for label in runs.get("label", ())],
        score=[pruned[label].score for label in runs.get("label", ())],
        rate=[pruned[label].schedule.iterative_rate for label in runs.get("label", ())])


def trend(table: pd.DataFrame, x: str, y: str, unit: str) -> str:
    """`slope` in words: points of `y` (a share), `unit` as in "per decile", with Spearman's rho."""
    found, rho = slope(table.assign(**{y: 100 * table[y]}), x, y)
    if not np.isfinite(found.value):
        return f"too few runs ({found.n}) for a trend."
    known = found.high > found.low
    interval = f" [{found.low:+.2f}, {found.high:+.2f}]" if known else " (too few runs for an interval)"
    return f"{found.value:+.2f}{interval} points {unit}, Spearman's $\\rho = {rho:.2f}$ over {found.n} runs."

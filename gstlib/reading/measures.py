"""Every measure, defined once: tidy frames in, tidy frames out; figures, sentences and claims use these alone.

Rows belong to a run and its configuration by the columns label, seed and run.  Accuracies are shares (0 … 1).
"""

import math

import numpy as np
import pandas as pd
from scipy import stats

KEYS = ["label", "seed", "run"]
FEW_EPOCHS = 5  # "within a few epochs" (C3): epochs of training, whatever the profile
MAGNITUDE_EPOCH, CONV4_EPOCHS = 35, 55  # Figure 2's magnitudes are those of epoch 35 of 55, as printed
_NO_LOSS = 1e-12  # what counts as a training loss of 0 where logarithms are taken
AS_UNPRUNED = 0.01  # a training accuracy less than a point below the unpruned network's counts as back at it
SD_OFF = 0.02  # Figure A1: a layer whose values have a standard deviation further from 1 was not normalised
LAST_LAYERS = 8  # Figure A1
DECILES = tuple(f"D{k}" for k in range(11))  # Figure 2's targets in order
SHARPNESS = ("log_curvature", "log_trace", "log_takeuchi", "rise_mean", "rise_worst")  # what C20 reads
NINTH, FIFTH = 9, 5  # tenths counted from 1: the columns decile_8 and decile_4


def instability(events: pd.DataFrame) -> pd.DataFrame:
    """Each (epoch, layer) row with `instability` = |t_pre - t_post| (section 3) and `relative_instability`.

    The latter is (t_pre - t_post) / t_pre, the form of the paper's final version.  Both as shares.
    """
    drop = events["t_pre"] - events["t_post"]
    return events.assign(instability=drop.abs(), relative_instability=drop / events["t_pre"])


def summary(tables: dict[str, pd.DataFrame], test_images: int | None) -> dict:
    """One run in one row; `test_images`: how many its events are measured on (None: all test images).

    final_accuracy, final_loss, final_train_accuracy, final_train_loss (table `final`), final_train_true and
    final_train_wrong (by kind of label; nan where all are true), log_train_loss, log10 of that loss; gap, test less train accuracy
    of these, which belong to the last epoch; best_accuracy, the best at or after the last event of the epochs' tests;
    mean_instability, mean_relative_instability over the events and log_instability, log10 of the former, in which 0
    counts as half the smallest mean that the test images can show (nan without events); events, their number;
    parameters left.
    """
    epochs, events, final = tables["epoch"], tables["event"], tables["final"].iloc[0]
    # arrays, since pandas would take as long for a run's few sums as reading the run does
    accuracy, at = epochs["test_accuracy"].to_numpy(float), epochs["epoch"].to_numpy()
    row = {f"final_{name}": final[name] for name in ("accuracy", "loss", "train_accuracy", "train_loss")}
    row |= {f"final_train_{kind}": final.get(f"train_{kind}", math.nan) for kind in ("true", "wrong")}
    row |= {"log_train_loss": math.log10(max(final["train_loss"], _NO_LOSS))}
    row |= {"gap": final["accuracy"] - final["train_accuracy"], "best_accuracy": np.nanmax(accuracy),
           "mean_instability": math.nan, "mean_relative_instability": math.nan, "log_instability": math.nan,
           "events": len(events), "parameters": int(epochs["parameters"].to_numpy()[-1])}
    if len(events):
        t_pre, t_post = (events[name].to_numpy(float) for name in ("t_pre", "t_post"))
        # the accuracy of the last event's own epoch was measured before it struck
        after = accuracy[at > events["epoch"].to_numpy().max()]
        mean = np.abs(t_pre - t_post).mean()
        smallest = 1 / ((test_images or final["images"]) * len(events))
        row |= {"best_accuracy": np.nanmax([*after, t_post[-1]]), "mean_instability": mean,
                # no share of nothing
                "mean_relative_instability": ((t_pre - t_post) / np.where(t_pre > 0, t_pre, np.nan)).mean(),
                "log_instability": math.log10(mean or smallest / 2)}
    return row


def recovery(epochs: pd.DataFrame, events: pd.DataFrame) -> pd.DataFrame:
    """A row a cluster of events whose epochs are at most one apart: how long until accuracy was back.

    first and last (epoch), removed, t_pre (of the first event), t_post (of the last), wait, recovered.  `wait` counts
    epochs from the last event to the first test that reaches t_pre; where the next cluster or the end comes before,
    `recovered` is False and `wait` what was seen of it (censored).
    """
    tested = {key: rows for key, rows in epochs.dropna(subset="test_accuracy").groupby(KEYS)}
    clusters = []
    for key, struck in events.groupby(KEYS, sort=False):
        epoch, accuracy = (tested[key][name].to_numpy() for name in ("epoch", "test_accuracy"))
        groups = [rows for _, rows in struck.groupby((struck["epoch"].diff() > 1).cumsum())]
        ends = [*(rows["epoch"].iloc[0] for rows in groups[1:]), epoch.max()]
        for rows, end in zip(groups, ends):
            last, t_pre, t_post = rows["epoch"].iloc[-1], rows["t_pre"].iloc[0], rows["t_post"].iloc[-1]
            back = epoch[(epoch > last) & (epoch <= end) & (accuracy >= t_pre)]
            recovered = t_post >= t_pre or len(back) > 0
            clusters.append((*key, rows["epoch"].iloc[0], last, rows["removed"].sum(), t_pre, t_post,
                             0 if t_post >= t_pre else (back.min() if len(back) else end) - last, recovered))
    return pd.DataFrame(clusters, columns=[*KEYS, "first", "last", "removed", "t_pre", "t_post", "wait", "recovered"])


def back(epochs: pd.DataFrame, events: pd.DataFrame) -> pd.DataFrame:
    """A row a run: `back`, the share of its clusters of events (see `recovery`) that it had made good in training.

    It had when, in the epoch that ends with the next cluster (or with training), training accuracy was within a point of
    what the network that is never pruned has in that epoch: same seed, same circumstances.  1 for that network
    itself, nan where there is none.
    """
    same = ["seed", "circumstances", "epoch"]
    whole = epochs[epochs["target"] == "none"].set_index(same)["train_accuracy"].rename("unpruned")
    now = epochs.join(whole, on=same)
    now = now.assign(back=(now["train_accuracy"] >= now["unpruned"] - AS_UNPRUNED).where(now["unpruned"].notna()))
    struck, rows = dict(list(events.groupby(KEYS))), []
    for key, run in now.groupby(KEYS, sort=False):
        at = struck[key]["epoch"] if key in struck else pd.Series([], dtype=int)
        ends = [*at[at.diff() > 1], run["epoch"].max()]
        rows.append((*key, run.set_index("epoch")["back"].loc[ends].astype(float).mean(skipna=False)))
    return pd.DataFrame(rows, columns=[*KEYS, "back"])


def forgotten(events: pd.DataFrame) -> pd.DataFrame:
    """A row a run with wrong labels: what its events make it forget of what it had fitted.

    forgotten_true, forgotten_wrong: the falls of training accuracy on either kind of label over all events, as a share of
    what these accuracies were before them; `forgotten`, the wrong ones' share less the true ones'.
    """
    if "train_wrong_pre" not in events:
        return pd.DataFrame(columns=[*KEYS, "forgotten_true", "forgotten_wrong", "forgotten"])
    sums = events.dropna(subset="train_wrong_pre").groupby(KEYS, sort=False)[
        [f"train_{kind}_{when}" for kind in ("true", "wrong") for when in ("pre", "post")]].sum()
    share = {f"forgotten_{kind}": 1 - sums[f"train_{kind}_post"] / sums[f"train_{kind}_pre"] for kind in ("true", "wrong")}
    return pd.DataFrame(share | {"forgotten": share["forgotten_wrong"] - share["forgotten_true"]}).reset_index()


def share_recovered(wait: np.ndarray, recovered: np.ndarray, epochs: int = FEW_EPOCHS) -> float:
    """The share of clusters back within so many epochs, by Kaplan and Meier (a wait cut off counts while seen)."""
    seen = stats.CensoredData.right_censored(np.asarray(wait), ~np.asarray(recovered, dtype=bool))
    return float(stats.ecdf(seen).cdf.evaluate(epochs))


def recovered_within(clusters: pd.DataFrame) -> pd.DataFrame:
    """A row a run: `recovered`, the share of its `recovery` clusters that were back within so many epochs."""
    return pd.DataFrame([(*key, share_recovered(rows["wait"], rows["recovered"]))
                         for key, rows in clusters.groupby(KEYS, sort=False)], columns=[*KEYS, "recovered"])


def magnitude_event(events: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """The last event of each run at or before epoch 35 of Figure 2, which scales with the run's length."""
    until = math.floor((epochs["epoch"].max() + 1) * MAGNITUDE_EPOCH / CONV4_EPOCHS + 0.5)
    return events[events["epoch"] <= until].sort_values("epoch").drop_duplicates(KEYS, keep="last")


def by_decile(runs: pd.DataFrame, events: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """Figure 2's pruned runs with `decile` (0 … 10) and `magnitude`, the mean score that the event at epoch 35 took.

    Targets that are no decile of the figure are left out; an event that took nothing has no magnitude.
    """
    taken = magnitude_event(events.dropna(subset="mean_score"), epochs)[[*KEYS, "mean_score"]]
    rows = runs[runs["target"].isin(DECILES)].merge(taken.rename(columns={"mean_score": "magnitude"}), "left", KEYS)
    return rows.assign(decile=rows["target"].map(DECILES.index))


def decile_magnitudes(events: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """Mean score in each tenth of the units present at the event of epoch 35 (C7), a row a run and tenth (1 … 10).

    `mean`, and `relative`, the mean over that of the fifth.  Of D0 to D10 alone, as the claim has them.
    """
    wide = magnitude_event(events[events["target"].isin(DECILES)], epochs).set_index([*KEYS, "structure"])
    wide = wide[[f"decile_{k}" for k in range(10)]].set_axis(range(1, 11), axis=1).rename_axis(columns="tenth")
    return pd.DataFrame({"mean": wide.stack(), "relative": wide.div(wide[FIFTH], axis=0).stack()}).reset_index()


def decile_shapes(events: pd.DataFrame, epochs: pd.DataFrame) -> pd.DataFrame:
    """A row a run: `ninth_over_fifth` (log10 of the ratio of tenths) and `exponential_fit` (R²), see C7."""
    wide = decile_magnitudes(events, epochs).pivot(index=[*KEYS, "structure"], columns="tenth", values="mean")
    return pd.DataFrame({"ninth_over_fifth": np.log10(wide[NINTH] / wide[FIFTH]),
                         "exponential_fit": exponential_fit(wide.to_numpy())}).reset_index()


def exponential_deciles() -> np.ndarray:
    """Mean of each tenth of the exponential distribution with mean 1."""
    left = 1 - np.arange(10) / 10  # the share above each tenth's lower end
    # its quantile function -log(1 - u), integrated
    return 10 * np.diff([*(left * np.log(left) - left), 0.0])


def exponential_fit(means: np.ndarray) -> np.ndarray:
    """R² of each row of ten tenths' means against an exponential's, of which the scale alone is fitted."""
    ideal = exponential_deciles()
    fitted = (means @ ideal / (ideal @ ideal))[:, None] * ideal
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - ((means - fitted) ** 2).sum(1) / ((means - means.mean(1, keepdims=True)) ** 2).sum(1)


def last_layers(histograms: pd.DataFrame) -> pd.DataFrame:
    """Figure A1's rows of the last eight normalised layers, with `when` ("before", "after" training) and `number`.

    `ks` of a layer is nan where its `sd` is off 1 by more than 2%: those values were not normalised.
    """
    if histograms.empty:
        return pd.DataFrame(columns=[*KEYS, "when", "number", "ks", "sd", "left", "right", "count"])
    rows = histograms[histograms["layer_index"] > histograms["layer_index"].max() - LAST_LAYERS]
    return rows.assign(when=np.where(rows["epoch"] < 0, "before", "after"), number=rows["layer_index"] + 1,
                       ks=rows["ks"].where((rows["sd"] - 1).abs() <= SD_OFF))


def normality(histograms: pd.DataFrame) -> pd.DataFrame:
    """A row a run, time and layer of Figure A1: when, number, ks (Kolmogorov-Smirnov), sd; see `last_layers`."""
    return last_layers(histograms).drop_duplicates([*KEYS, "when", "number"])[[*KEYS, "when", "number", "ks", "sd"]]


def normality_by_run(histograms: pd.DataFrame) -> pd.DataFrame:
    """A row a run: mean ks_before and ks_after, and ks_rho, Spearman's rho of the latter with depth; nan if one is."""
    rows = []
    for key, layers in normality(histograms).groupby(KEYS, sort=False):
        ks = {when: part.set_index("number")["ks"] for when, part in layers.groupby("when")}
        after = ks["after"]
        rho = 0.0 if after.nunique() < 2 else stats.spearmanr(after.index, after).statistic
        rows.append((*key, ks["before"].mean(skipna=False), after.mean(skipna=False), rho))
    return pd.DataFrame(rows, columns=[*KEYS, "ks_before", "ks_after", "ks_rho"])


def flatness(rows: pd.DataFrame, eigenvalues: pd.DataFrame) -> pd.DataFrame:
    """A row a run whose flatness was measured (C20), from the tables "flatness" and "eigenvalue".

    loss, trace (of the gradient covariance), trace_error, trace_centred, curvature (the sum of the leading
    eigenvalues), curvature_error, curvature_other; takeuchi, trace over curvature; log10 of these three as
    log_curvature, log_trace, log_takeuchi (nan where one is not above 0); rise_mean and rise_worst, by how much moves
    relative to each filter's norm raise the loss (nats).
    """
    if rows.empty:
        return pd.DataFrame(columns=[*KEYS, *SHARPNESS])
    curvature = eigenvalues.groupby(KEYS)["eigenvalue"].sum().rename("curvature").reset_index()
    found = rows.merge(curvature, on=KEYS)
    found["takeuchi"] = found["trace"] / found["curvature"]
    for name in ("curvature", "trace", "takeuchi"):
        found[f"log_{name}"] = np.log10(found[name].where(found[name] > 0))
    for name in ("mean", "worst"):
        found[f"rise_{name}"] = found[f"relative_{name}"] - found["loss"]
    return found


def pattern(events: pd.DataFrame, reference: str) -> pd.DataFrame:
    """A row a run: `pattern`, Pearson's r of its events' instabilities with those of `reference` at the same seed."""
    each = instability(events).set_index(["seed", "epoch", "layer"])
    base = each.loc[each["label"] == reference, "instability"].rename("base")
    both = each.join(base, how="inner").reset_index()
    rows = [(*key, part["instability"].corr(part["base"])) for key, part in both.groupby(KEYS, sort=False)]
    return pd.DataFrame(rows, columns=[*KEYS, "pattern"])


def gains(runs: pd.DataFrame) -> pd.DataFrame:
    """The pruned runs that have an unpruned one of the same seed in the same circumstances, with `gain`, their final
    accuracy less that run's."""
    same = ["seed", "circumstances"]
    plain = runs[runs["target"] == "none"].drop_duplicates(same).set_index(same)["final_accuracy"].rename("unpruned")
    rows = runs[runs["target"] != "none"].join(plain, on=same)
    return rows.assign(gain=rows["final_accuracy"] - rows["unpruned"]).dropna(subset="gain")


def stability(runs: pd.DataFrame) -> pd.DataFrame:
    """The pruned runs with `stability`, as the final version has it: 1 less the mean fall as a share of t_pre."""
    rows = runs.dropna(subset="mean_relative_instability")
    return rows.assign(stability=1 - rows["mean_relative_instability"])


def stability_and_accuracy(runs: pd.DataFrame) -> pd.DataFrame:
    """Figure C1 of the final version: of each period (`retrain`) Pearson's r and Kendall's tau of stability and final
    accuracy over its runs, with 95% intervals by Fisher's z; a description, for runs are no independent points.

    Columns: retrain, rate, runs, r, r_low, r_high, tau, tau_low, tau_high; nan where there are fewer than 5 runs or
    nothing varies.
    """
    rows = []
    for period, part in stability(runs).drop_duplicates("run").groupby("retrain"):
        x, y, n = part["stability"], part["final_accuracy"], len(part)
        found = [math.nan] * 6
        if n > 4 and x.nunique() > 1 and y.nunique() > 1:
            # the variances of Fisher's z: 1 / (n - 3) of r, .437 / (n - 4) of tau (Fieller, Hartley and Pearson 1957)
            found = [bound for value, error in ((stats.pearsonr(x, y).statistic, math.sqrt(1 / (n - 3))),
                                                (stats.kendalltau(x, y).statistic, math.sqrt(0.437 / (n - 4))))
                     for bound in (value, *np.tanh(np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12))
                                                   + stats.norm.ppf(0.975) * error * np.array([-1, 1])))]
        rows.append((period, part["rate"].max(), n, *found))
    return pd.DataFrame(rows, columns=["retrain", "rate", "runs", "r", "r_low", "r_high", "tau", "tau_low", "tau_high"])

"""From a store to the table of claims: which seeds are complete, what the runs say, and what is missing."""

import functools
import math
import shlex

import pandas as pd

from gstlib import experiments
from gstlib.claims.evaluations import PRUNE_L
from gstlib.claims.rules import CONTRADICTED, INCONCLUSIVE, NOT_RUN, SUPPORTED, adjusted
from gstlib.claims.statements import CLAIMS, Claim
from gstlib.errors import plain
from gstlib.reading import measures
from gstlib.reading.interval import FEWEST, LEVEL
from gstlib.reading.measures import KEYS
from gstlib.reading.study import Study, command, may_mean, meant, study
from gstlib.store import Store

FULL_WIDTH = ("paper", "quarter")  # the profiles that speak about the paper, the one nearest to it first
SMALL = "mini"
MOST = 100  # seeds; for an effect that needs more nobody is asked to train
_FOUND = ("estimate", "low", "high", "confidence", "n", "runs", "unit", "part", "p", "p_holm",
          "smallest_effect", "seeds_needed", "why", "note", "but", "command")
_SHARES = {"accuracy": "final_accuracy", "gap": "gap", "mean_instability": "mean_instability",
           "wrong_fitted": "final_train_wrong"}  # shown in points


class ReadOnce(Store):
    """A store that reads and verifies each run once: figures share runs."""

    def __init__(self, path):
        super().__init__(path)
        self._one = functools.cache(lambda run_id: next(Store.runs(self, [run_id]), None))

    def runs(self, ids=None):
        return filter(None, map(self._one, self.ids() if ids is None else ids))


def values(study: Study, column: str) -> pd.DataFrame:
    """A row a run with `column`, a measure that claims need, in their units."""
    if column == "recovered":
        return measures.recovered_within(measures.recovery(study.epochs, study.events))
    if column == "pattern":
        return measures.pattern(study.events, PRUNE_L)
    if column == "back":
        return measures.back(study.epochs, study.events)
    if column == "forgotten":
        return measures.forgotten(study.events).assign(forgotten=lambda rows: 100 * rows["forgotten"])
    if column in ("ninth_over_fifth", "exponential_fit"):
        return measures.decile_shapes(study.events, study.epochs)
    if column in measures.SHARPNESS:
        return measures.flatness(study.flatness, study.eigenvalues)
    if column.startswith("ks_"):
        return measures.normality_by_run(study.histograms)
    return study.runs[KEYS].assign(**{column: 100 * study.runs[_SHARES[column]] if column in _SHARES
                                      else study.runs[column]})


def by_seed(study: Study, needs) -> pd.DataFrame:
    """A row a seed asked for, columns (measure, configuration); nan where a run is missing or has no such value."""
    tables = {}
    for column, labels in needs.items():
        part = study.restrict(labels)
        rows = values(part, column) if len(part.runs) else pd.DataFrame(columns=[*KEYS, column])
        tables[column] = rows.pivot(index="seed", columns="label", values=column).reindex(columns=[*labels])
    seeds = sorted({run.spec.seed for run in study.wanted})
    return pd.concat(tables, axis=1).reindex(seeds).astype(float)


def lacking(table: pd.DataFrame) -> str:
    """Which seeds lack which configurations, in words; empty where every seed is complete."""
    seeds: dict[tuple[str, ...], list[str]] = {}
    for seed, row in table.iterrows():
        if labels := tuple(dict.fromkeys(row.index[row.isna()].get_level_values(1))):
            seeds.setdefault(labels, []).append(str(seed))
    words = [f"seed{'s' * (len(each) > 1)} {', '.join(each)} lack{'s' * (len(each) == 1)} {', '.join(labels[:2])}"
             + f" and {len(labels) - 2} more" * (len(labels) > 2) for labels, each in seeds.items()]
    return ", ".join(words[:3]) + f" and {len(words) - 3} more" * (len(words) > 3)


def evaluate(store: Store, profile: str | None = None, data: str | None = None, seeds=None) -> pd.DataFrame:
    """A row a claim with its verdict (section 5 of the paper's specification).

    With `profile` None the row is that of the full-width profile nearest to the paper that has a verdict; a profile
    that is not full-width leaves `verdict` at "not run".  `data` and `seeds` as in `reading.study`.

    Columns: id, statement, published, profile; estimate, low, high, in the unit in which the claim says "above
    zero" (`unit`; logarithms are printed as ratios), confidence, n (complete seeds; C1g: configurations, C19:
    networks), runs, part (of several the one that decides, which these numbers are of), p, p_holm (over all claims
    that were run), smallest_effect (found with 80% power), seeds_needed (for the effect seen), why (what is missing
    and the command that makes it), note (all parts), but (a reservation that must stand beside the verdict), command
    (makes what is missing, or as many seeds as an open claim needs, up to `MOST`), verdict; small_scale (the verdict
    at `mini`, or at the reduced profile asked for) and small_… for all of these; figure, statistic, test. Raises `InputError` for an unknown profile and mixed
    data.
    """
    if profile is not None:
        experiments.profile(profile)
    reduced = profile if profile not in (None, *FULL_WIDTH) else SMALL
    full = FULL_WIDTH if profile is None else [profile] if profile in FULL_WIDTH else []
    store = ReadOnce(store.path)
    rows, found = [], {}
    for name in (*full, reduced):
        studies, known = studies_at(store, name, seeds, data)
        found[name] = {claim.id: judge(claim, name, studies, store, known) for claim in CLAIMS}
    for claim in CLAIMS:
        small = found[reduced][claim.id]
        judged = next((name for name in full if found[name][claim.id]["verdict"] != NOT_RUN), None)
        # without any verdict: where most runs are, else the cheapest to make; runs that are of both are the paper's
        name = judged or max(reversed(full), key=lambda name: (n := found[name][claim.id]["n"], n and -full.index(name)),
                             default=reduced)
        row = found[name][claim.id]
        if not full:
            why = [row["why"]] * bool(row["why"]) + [f"{reduced} is no full-width profile"]
            row = row | {"verdict": NOT_RUN, "why": "; ".join(why)}
        rows.append({
            "id": claim.id, "statement": claim.statement, "published": claim.published, "profile": name,
            **{column: row[column] for column in (*_FOUND, "verdict")},
            "small_scale": small["verdict"], **{f"small_{c}": small[c] for c in _FOUND},
            "figure": claim.figure, "statistic": claim.statistic, "test": claim.test,
        })
    table = pd.DataFrame(rows)
    for which, verdict in (("", "verdict"), ("small_", "small_scale")):
        table[f"{which}p_holm"] = adjusted(table[f"{which}p"].where(table[verdict] != NOT_RUN))
    return table


def upheld(table: pd.DataFrame, prefix: str = "") -> pd.Series:
    """Each claim's verdict, at full width or (prefix "small_") at small scale, after all claims' tests together.

    A verdict that Holm's p over all claims that were run does not uphold counts as inconclusive; one that rests on no
    test stands as it is.
    """
    found = table["small_scale" if prefix else "verdict"]
    decided = found.isin([SUPPORTED, CONTRADICTED])
    return found.mask(decided & table[f"{prefix}p"].notna() & (table[f"{prefix}p_holm"] >= LEVEL), INCONCLUSIVE)


def studies_at(store: Store, profile: str, seeds, asked: str | None) -> tuple[dict[str, Study], str | None]:
    """The studies that claims need at a profile, by figure (none where no run is stored), and the data that they are of:
    what is `asked` for, else of what is held the profile's own."""
    held = {spec.data.name for _, spec, about in store.about() if about["profile"] == profile}
    data = meant(asked, experiments.profile(profile), held) if held else asked
    figures = dict.fromkeys(figure for claim in CLAIMS for figure in claim.needs)
    there = held and held & may_mean(data)
    return ({figure: study(store, figure, profile, data, seeds) for figure in figures} if there else {}), data


def judge(claim: Claim, profile: str, studies: dict[str, Study], store: Store, data: str | None = None) -> dict:
    """A claim's estimate, interval, number of seeds and verdict at one profile, and what is missing.

    A seed that lacks a configuration is left out, and said.  `data` is named in the command that makes it.
    """
    row = dict.fromkeys(_FOUND, math.nan) | {"confidence": 0.95, "n": 0, "runs": 0, "verdict": NOT_RUN,
                                             **dict.fromkeys(("unit", "part", "why", "note", "but", "command"), "")}
    given, gaps, commands = [], [], {}
    for figure, needs in claim.needs.items():
        table = by_seed(studies[figure], needs) if figure in studies else pd.DataFrame()
        complete = table.dropna()
        given.append(complete)
        if len(complete) < max(FEWEST, len(table)):
            gaps += [lacking(table) if table.notna().any(axis=None) else f"no run of {figure} is stored"]
            few = FEWEST if experiments.profile(profile).seeds < FEWEST else None
            commands[command(figure, profile, data, store.path, few)] = None
    if claim.counted == "configurations":  # points side by side, each a mean over seeds: the same ones, for none is luckier
        given = [table.loc[sorted(set.intersection(*(set(each.index) for each in given)))] for table in given]
    for table, needs in zip(given, claim.needs.values()):
        row["runs"] += len(table) * len({label for labels in needs.values() for label in labels})
    if not claim.needs:
        given = [_costs(store) if profile in FULL_WIDTH else pd.Series(dtype=float)]
        if given[0].empty:
            row["why"] = "no full-width network has been measured"
            commands[f"python -m gstlib bench --output {shlex.quote(str(store.path / 'bench.json'))}"] = None
    row["n"] = min(map(len, given))
    enough = row["n"] >= (FEWEST if claim.needs else 1)
    told = ", ".join(filter(None, gaps))
    if claim.needs and not row["runs"] and all(gap.startswith("no run") for gap in gaps):
        row["why"] = "none of its runs is stored"
    elif claim.needs and not enough:
        row["why"] = f"{FEWEST} complete seeds are needed, there are {row['n']}" + f": {told}" * bool(told)
    elif told:
        row["why"] = f"left out: {told}"
    if commands:
        row["command"] = " && ".join(commands)
        row["why"] += f"; make them with: {row['command']}"
    if not enough:
        return row
    verdict, p, part, note, but = claim.evaluate(*given)
    if verdict == INCONCLUSIVE and part.needed <= MOST:
        row["command"] = " && ".join(command(figure, profile, data, store.path, int(part.needed)) for figure in claim.needs)
    return row | {"estimate": part.found.value, "low": part.found.low, "high": part.found.high, "n": part.found.n,
                  "unit": part.unit, "part": part.name, "confidence": part.confidence, "verdict": verdict, "p": p, "note": note,
                  "but": but, "smallest_effect": part.smallest, "seeds_needed": part.needed}


def _costs(store: Store) -> pd.Series:
    """Scoring passes in per cent of a training step, by network and machine, from the benchmarks (`bench*.json`) beside the
    runs; of a network that several machines measured, that of the machine where it is dearest."""
    dearest: dict[str, tuple[float, str]] = {}
    for result in store.benchmarks("costs"):
        for row in (row for row in result["costs"] if row["cost"].startswith("E[BN]")):
            here = 100 * float(row["training_steps"]), plain(str(result.get("machine", {}).get("device", "?")))
            dearest[row["model"]] = max(here, dearest.get(row["model"], here))
    return pd.Series({f"{model} on {machine}": cost for model, (cost, machine) in dearest.items()}, dtype=float)

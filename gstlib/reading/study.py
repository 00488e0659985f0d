"""What the store holds of one experiment, as tidy frames whose columns say what each configuration is."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from gstlib import experiments
from gstlib.errors import InputError
from gstlib.experiments import PROFILES, Labelled, Profile
from gstlib.reading import measures
from gstlib.spec import DATASETS, DataSpec, FlatnessSpec, PruningSpec, RunSpec
from gstlib.store import Store


@dataclass(frozen=True)
class Study:
    """What the store holds of one experiment at one profile.

    `epochs`, `events`, `histograms`, `flatness`, `eigenvalues` and `directions` are the stored rows, `runs` one row a
    run (`measures.summary`), `provenance` one too; all carry label, seed, run and what the configuration is:
    `about_spec`.  `missing` lists the runs that were asked for and are not there, `command` makes them.
    """

    experiment: experiments.Experiment
    profile: Profile
    wanted: list[Labelled]
    missing: list[Labelled]
    epochs: pd.DataFrame
    events: pd.DataFrame
    histograms: pd.DataFrame
    flatness: pd.DataFrame
    eigenvalues: pd.DataFrame
    directions: pd.DataFrame
    runs: pd.DataFrame
    provenance: pd.DataFrame
    command: str = ""

    @property
    def labels(self) -> list[str]:
        """The configurations' labels, in the experiment's order."""
        return list(dict.fromkeys(run.label for run in self.wanted))

    def spec(self, label: str) -> RunSpec:
        """The specification of a configuration's first seed."""
        return next(run.spec for run in self.wanted if run.label == label)

    @cached_property
    def printed(self) -> dict[str, RunSpec]:
        """For each label the configuration as the paper prints it, whatever the profile made of it."""
        data = self.wanted[0].spec.data
        return {run.label: run.spec for run in self.experiment.runs(PROFILES["paper"], data, [0])}

    def restrict(self, labels: Iterable[str], seeds: int | Collection[int] | None = None) -> Study:
        """The part of one seed, of some or of all, that a panel shows, so that its caption counts those runs and no others."""
        labels, seeds = set(labels), None if seeds is None else set(np.atleast_1d(seeds).tolist())
        return self._part({(run.label, run.spec.seed) for run in self.wanted
                           if run.label in labels and (seeds is None or run.spec.seed in seeds)})

    def _part(self, shown: Collection[tuple[str, int]]) -> Study:
        def chosen(of):
            if isinstance(of, list):
                return [run for run in of if (run.label, run.spec.seed) in shown]
            return of if of.empty else of[pd.MultiIndex.from_frame(of[["label", "seed"]]).isin(shown)]

        return dataclasses.replace(self, **{name: chosen(of) for name, of in vars(self).items()
                                            if isinstance(of, (list, pd.DataFrame))})

    def comparable(self) -> Study:
        """The part in which a network's means are over the same seeds: see `same_seeds`; what was asked for and is missing
        stays."""
        if self.runs.empty:
            return self
        kept = pd.concat(same_seeds(runs, "label") for _, runs in self.runs.groupby("model"))
        return dataclasses.replace(self._part({*zip(kept["label"], kept["seed"])}), wanted=self.wanted, missing=self.missing)


def same_seeds(runs: pd.DataFrame, by: str) -> pd.DataFrame:
    """The runs of those seeds that every group has, so that no mean is over luckier seeds than another; all of them where
    there is no such seed."""
    common = set.intersection(*(set(seeds) for _, seeds in runs.groupby(by)["seed"]))
    return runs[runs["seed"].isin(common)] if common else runs


def command(figures: str | Iterable[str], profile: str, data: str | None = None,
            results: str | Path | None = None, seeds=None) -> str:
    """The command that makes the runs of `figures`; `data`, `results` and `seeds` where they are known."""
    if data == "cifar10-folder":
        data = "/path/to/images"  # which only the reader knows
    words = [figures] if isinstance(figures, str) else [*figures]
    if seeds is not None and not isinstance(seeds, (int, str)):
        seeds = ",".join(map(str, seeds)) + ","  # "3," is seed 3, "3" would be three seeds
    for option, value in (("profile", profile), ("data", data), ("seeds", seeds), ("results", results)):
        words += [f"--{option}", str(value)] if value is not None else []
    return "python -m gstlib run " + shlex.join(words)


def may_mean(data: str) -> set[str]:
    """The data sets that `data` may mean: itself, or for a path what is read from folders and archives."""
    return {data} if data in DATASETS else {*DATASETS} - {"digits"}


def meant(data: str | None, profile: Profile, held: Iterable[str]) -> str:
    """The data set `data`; for None the profile's own where its runs are `held`, else one that is, if any."""
    held = {*held}
    return data or (profile.data if profile.data in held else min(held, default=profile.data))


def find_data(store: Store, profile: Profile, data: str | None, figure: str = "figure1-vgg11") -> DataSpec:
    """The data set that the store's runs at `profile` were trained on, in its sizes, not augmented, all labels true.

    `data` is a name, or a path (which is never `digits`), or None: see `meant`.
    Raises `InputError` when there is none (naming the command that makes those of `figure`), or when there are several
    and results would be mixed.
    """
    held = [spec.data for _, spec, about in store.about() if about["profile"] == profile.name]
    name = meant(data, profile, (each.name for each in held))
    found = {each.fingerprint: each for each in held if each.name in may_mean(name)}
    if not found:
        raise InputError(f"{store.path} holds no run at profile {profile.name!r} on data {name!r}; "
                         f"make them with: {command(figure, profile.name, name, store.path)}")
    if len(found) > 1:
        prints = ", ".join(f"{d.name} {f[:12]}" for f, d in sorted(found.items()))
        raise InputError(f"{store.path} holds runs at profile {profile.name!r} on several data sets ({prints}); "
                         "keep each in a results folder of its own")
    (source,) = found.values()
    return experiments.data_spec(profile, source.name, source.fingerprint, source.classes)


def about_spec(spec: RunSpec) -> dict:
    """What a configuration is, as columns; an unpruned one has target "none", no text elsewhere and zeros.

    target, score, structure, effect, batches (of a noise), rate (the iterative rate, largest over the layers), retrain
    (epochs between events, as run), model; width, train_size (0: all images), batch_size, wrong_labels (a share); and
    circumstances, the id of the same run had it no pruning, no measures and seed 0.
    """
    about = {"target": "none", "score": "", "structure": "", "effect": "", "batches": 0, "rate": 0.0, "retrain": 0,
             "model": spec.model.name, "width": spec.model.width, "train_size": spec.data.train_size or 0,
             "batch_size": spec.optimiser.batch_size, "wrong_labels": spec.data.wrong_labels,
             "circumstances": dataclasses.replace(spec, pruning=None, measures=(), measured_at=None, flatness=FlatnessSpec(),
                                                  seed=0).id}
    if p := spec.pruning:
        about |= {name: getattr(p, name) for name in ("target", "score", "structure", "effect", "batches", "retrain")}
        about["rate"] = p.schedule.iterative_rate
    return about


def once(pruning: PruningSpec) -> bool:
    """Whether each layer is struck a single time, whatever its period."""
    return all(len(pruning.schedule.event_epochs(layer)) == 1 for layer in range(len(pruning.layers)))


def asked(store: Store, what: experiments.Experiment, size: Profile, source: DataSpec, seeds=None) -> tuple[list[Labelled], int]:
    """The runs of an experiment that `seeds` asks for, as `study` has it, and as how many seeds None counts."""
    number = what.seeds(size)
    if seeds is None:
        stored = set(store.ids())

        def ids(of: experiments.Experiment) -> set[str]:
            return {run.spec.id for run in of.runs(size, source, [size.first_seed + number])}

        def own() -> set[str]:
            others = (each for each in experiments.EXPERIMENTS.values() if what.one_seed and each is not what)
            return ids(what).difference(*map(ids, others))

        # of experiments that share runs with those of more seeds, a seed counts when it is whole or a run of no other is there
        while (held := ids(what) & stored) and (held == ids(what) or held & own()):
            number += 1
    return what.runs(size, source, experiments.parse_seeds(number if seeds is None else seeds, size.first_seed)), number


def study(store: Store, figure: str, profile: str = "smoke", data: str | None = None, seeds=None) -> Study:
    """Everything stored of `figure` at `profile`; `seeds` as in `experiments.parse_seeds`.

    With `seeds` None these are the profile's own, or as many as the store holds of this experiment when those are
    more.  Missing runs are listed, never passed over.
    """
    size, what = experiments.profile(profile), experiments.experiment(figure)
    source = find_data(store, size, data, figure)
    wanted, number = asked(store, what, size, source, seeds)
    held = dict(store.runs({run.spec.id for run in wanted}))
    found = [(run, held[run.spec.id]) for run in wanted if run.spec.id in held]
    keys = pd.DataFrame([(run.label, run.spec.seed, run.spec.id) for run, _ in found], columns=measures.KEYS)
    columns = pd.concat([keys, pd.DataFrame([about_spec(run.spec) for run, _ in found])], axis=1)

    def together(table: str) -> pd.DataFrame:
        if not found:
            return pd.DataFrame()
        frames = [rows.tables[table] for _, rows in found]
        # the keys once for all runs: into each of hundreds of frames would take longer than reading them
        places = np.repeat(np.arange(len(frames)), [len(frame) for frame in frames])
        rows = pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)
        return pd.concat([rows, columns.take(places).reset_index(drop=True)], axis=1)

    runs = pd.DataFrame([measures.summary(rows.tables, run.spec.data.test_size) for run, rows in found])
    return Study(what, size, wanted, [run for run in wanted if run.spec.id not in held],
                 *map(together, ("epoch", "event", "histogram", "flatness", "eigenvalue", "direction")),
                 pd.concat([columns, runs], axis=1),
                 pd.DataFrame([rows.provenance for _, rows in found]).assign(**keys),
                 command(figure, profile, data or source.name, store.path,
                         seeds if seeds is not None or number == what.seeds(size) else number))

"""What is missing, in the order in which it is worth most."""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import count
from typing import NamedTuple

from gstlib import data, experiments
from gstlib.spec import RunSpec
from gstlib.store import DamagedRun, Store


class Task(NamedTuple):
    """A run to be trained: its label, what it is, the profile it is of, what `data.load` takes for its images, its figure."""

    label: str
    spec: RunSpec
    profile: str
    source: str
    figure: str = ""


def _once(tasks: Iterable[Task]) -> dict[str, Task]:
    first: dict[str, Task] = {}
    for task in tasks:
        first.setdefault(task.spec.id, task)
    return first


def missing(store: Store, tasks: Iterable[Task]) -> list[Task]:
    """Those of `tasks` that `store` lacks, each specification once, in the order given.

    Stored ones are read and verified: a damaged one is reported, and lacks. Raises `NewerSchema` where a newer
    gstlib's file is in a run's place.
    """
    once = _once(tasks)
    stored = {run_id for run_id, _ in store.runs(once)}
    for run_id in once.keys() - stored:
        with suppress(KeyError, DamagedRun):
            store.read(run_id)
    return [task for run_id, task in once.items() if run_id not in stored]


def plan(figures: Iterable[str], profile: str, source: str | None = None, seeds=None,
         identify: Callable[[str], data.Known] | None = None) -> list[Task]:
    """Every run of `figures` at `profile`; without torch where the data are known.

    source: what `data.load` takes; None: the profile's own data set.
    seeds: what `experiments.parse_seeds` takes; None: the profile's number.
    identify: `data.identify`, or one that remembers.
    """
    size, chosen = experiments.profile(profile), [experiments.experiment(figure) for figure in figures]
    experiments.parse_seeds(1 if seeds is None else seeds)  # wrong ones are told before the data are looked for
    source = source or size.data
    spec = experiments.data_spec(size, *(identify or data.identify)(source))
    return [Task(*run, profile, source, what.name) for what in chosen for run in what.runs(
        size, spec, experiments.parse_seeds(what.seeds(size) if seeds is None else seeds, size.first_seed))]


def campaign(device: str, source: str | None = None, elsewhere: Mapping[str, bool] = {}) -> list[Task]:
    """Every run of the campaign for this type of device (cpu, cuda), once, most valuable first.

    elsewhere: of every stored run by id, whether another kind of processor trained it.  Runs of a seed compare best
    where one kind did: of a seed that another has begun and not ended nothing is asked for, but of the next.
    """
    identify = functools.cache(data.identify)  # which looks at every file of a folder
    return list(_once(task for stage in experiments.CAMPAIGN[device]
                      for task in _stage(stage, source, elsewhere, identify)).values())


def _stage(stage: experiments.Stage, source: str | None, elsewhere: Mapping[str, bool],
           identify: Callable[[str], data.Known]) -> list[Task]:
    tasks, found = [], 0
    for seed in count(experiments.profile(stage.profile).first_seed):
        if found == stage.seeds:
            return tasks
        runs = [task for task in plan([stage.figure], stage.profile, source, [seed], identify)
                if task.label in stage.labels or not stage.labels]
        begun = [elsewhere[task.spec.id] for task in runs if task.spec.id in elsewhere]
        if len(begun) == len(runs) or not any(begun):
            tasks, found = tasks + runs, found + 1

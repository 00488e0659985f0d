"""What is missing, in the order in which it is worth most."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from gstlib import data, experiments
from gstlib.experiments import Labelled, Stage
from gstlib.spec import RunSpec
from gstlib.store import DamagedRun, Store


class Task(NamedTuple):
    """A run to be trained: its label, what it is, the profile it is of, what `data.load` takes for its images."""

    label: str
    spec: RunSpec
    profile: str
    source: str


def missing(store: Store, runs: Iterable) -> list:
    """Those of `runs` (anything with a `spec`) that `store` lacks, each specification once, in the order given.

    Stored ones are read and verified: a damaged one is reported, and lacks. Raises `NewerSchema` where a newer
    gstlib's file is in a run's place.
    """
    once: dict = {}
    for run in runs:
        once.setdefault(run.spec.id, run)
    stored = {run_id for run_id, _ in store.runs(once)}
    for run_id in once.keys() - stored:
        with suppress(KeyError, DamagedRun):
            store.read(run_id)
    return [run for run_id, run in once.items() if run_id not in stored]


def plan(figures: Iterable[str], profile: str, source: str | None = None,
         seeds=None) -> tuple[list[tuple[str, Labelled]], data.Known]:
    """Every run of `figures` at `profile` as (figure, run), and the data; without torch where those are known.

    source: what `data.load` takes; None: the profile's own data set.
    seeds: what `experiments.parse_seeds` takes; None: the profile's number.
    """
    return experiments.listed(figures, profile, seeds, lambda own: data.identify(source or own))


def campaign(device: str, source: str | None = None) -> list[tuple[Stage, Labelled]]:
    """Every run of the campaign for this type of device (cpu, cuda), with its stage, most valuable first."""
    once: dict[str, tuple[Stage, Labelled]] = {}
    for stage in experiments.CAMPAIGN[device]:
        for _, run in plan([stage.figure], stage.profile, source, stage.seeds)[0]:
            once.setdefault(run.spec.id, (stage, run))
    return list(once.values())

"""The paper's experiments as data: profiles (sizes), figures (which runs), the campaign (in what order)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gstlib.errors import check_choice
from gstlib.experiments.beyond import BEYOND
from gstlib.experiments.campaign import CAMPAIGN, Stage
from gstlib.experiments.figures import EARLY, Experiment, Labelled
from gstlib.experiments.final import FINAL
from gstlib.experiments.profiles import PROFILES, Profile, Size, data_spec, parse_seeds, profile, scaled_schedule

__all__ = ["CAMPAIGN", "EXPERIMENTS", "PROFILES", "Experiment", "Labelled", "Profile", "Size", "Stage", "data_spec",
           "every", "experiment", "listed", "parse_seeds", "profile", "scaled_schedule"]

EXPERIMENTS = {what.name: what for what in (*EARLY, *FINAL, *BEYOND)}


def experiment(name: str) -> Experiment:
    """The experiment `name`. Raises `InputError` for one that is not there."""
    check_choice("figure", name, EXPERIMENTS)
    return EXPERIMENTS[name]


def every(name: str, data: str | None) -> list[str]:
    """The figures that "all" means at the profile `name`: at full width none that is about other data than `data`."""
    reduced = profile(name).size.width < 1
    return [figure for figure, what in EXPERIMENTS.items() if reduced or what.data in ("", data)]


def listed(figures: Iterable[str], name: str, seeds, find: Callable[[str], Any]) -> tuple[list[tuple[str, Labelled]], Any]:
    """Every run of `figures` at the profile `name` as (figure, run), and the data that `find` gave.

    `seeds` as in `parse_seeds`, None: the profile's number.  `find(data)` is
    called with the profile's own data set once all names are known to be
    right, and gives anything with `name`, `fingerprint` and `classes`.
    """
    size, chosen = profile(name), [experiment(figure) for figure in figures]
    parse_seeds(1 if seeds is None else seeds)  # wrong ones are told before the data are looked for
    found = find(size.data)
    spec = data_spec(size, found.name, found.fingerprint, found.classes)
    return [(what.name, run) for what in chosen for run in what.runs(
        size, spec, parse_seeds(what.seeds(size) if seeds is None else seeds, size.first_seed))], found

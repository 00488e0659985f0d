"""The experiments as data, the paper's and ours: profiles (sizes), figures (which runs), campaign (order)."""

from gstlib.errors import check_choice
from gstlib.experiments.beyond import BEYOND
from gstlib.experiments.campaign import CAMPAIGN, Stage
from gstlib.experiments.figures import EARLY, Experiment, Labelled
from gstlib.experiments.final import FINAL
from gstlib.experiments.profiles import PROFILES, Profile, Size, data_spec, parse_seeds, profile, scaled_schedule

__all__ = ["CAMPAIGN", "EXPERIMENTS", "PROFILES", "Experiment", "Labelled", "Profile", "Size", "Stage", "data_spec",
           "every", "experiment", "parse_seeds", "profile", "scaled_schedule"]

EXPERIMENTS = {what.name: what for what in (*EARLY, *FINAL, *BEYOND)}


def experiment(name: str) -> Experiment:
    """The experiment `name`. Raises `InputError` for one that is not there."""
    check_choice("figure", name, EXPERIMENTS)
    return EXPERIMENTS[name]


def every(name: str, data: str | None) -> list[str]:
    """The figures that "all" means at the profile `name`: at full width none that is about other data than `data`."""
    reduced = profile(name).size.width < 1
    return [figure for figure, what in EXPERIMENTS.items() if reduced or what.data in ("", data)]

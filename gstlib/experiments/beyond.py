"""Questions that the paper leaves open, each an experiment in data of VGG11; predictions in `gstlib.claims.beyond`.

The circumstances in which a network is trained vary here, and the ways of pruning are Figure 1's and Figure 5's: what
those figures run already is not run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gstlib.experiments.figures import Experiment, Labelled, each_seed, vgg11
from gstlib.experiments.profiles import Profile, Size
from gstlib.spec import DataSpec

# batch sizes with half, a quarter and an eighth of the profile's own steps in an epoch; at full width about so, for they
# divide the number of images as well
_BATCHES = {"smoke": (96,), "mini": (32, 64, 128), "quarter": (256, 480, 960), "paper": (256, 480, 960)}


class Cell(NamedTuple):
    """A place on the map of `when`: a name for it (empty: the profile's own) and the size at which VGG11 is run there."""

    name: str
    size: Size


def cells(profile: Profile) -> Iterator[Cell]:
    """Where `when` prunes: width x steps between events at the profile's own images, images x steps at its own width.

    Steps change with the batch size alone: epochs, hence passes over the images between two events, stay.  Where the
    images change, the batch size changes with them, so that the steps do not.  At reduced profiles there are half and
    twice the images; at full width, where there are no more, a quarter and a half.  `smoke` has the map's ends alone.
    """
    own, whole = profile.of("vgg11"), 50_000
    slower = {f", steps/{2 ** k}" if profile.name != "smoke" else ", steps/8": batch
              for k, batch in enumerate(_BATCHES[profile.name], start=1)}
    steps = {"": own.batch_size} | slower
    for part in (1, 8) if profile.name == "smoke" else (1, 2, 4, 8):
        for name, batch in steps.items():
            width = f", width/{part}" if part > 1 else ""
            yield Cell(width + name, own._replace(width=own.width / part, batch_size=batch))
    for word, share in zip(("fewer", "more"), (1 / 2, 2) if own.width < 1 else (1 / 4, 1 / 2)):
        for name in ("", ", steps/8"):
            yield Cell(f", {word} images{name}", own._replace(train_size=int((own.train_size or whole) * share),
                                                              batch_size=int(steps[name] * share)))


def when(profile: Profile, data: DataSpec, seeds: Iterable[int]) -> list[Labelled]:
    """When does the benefit appear? Prune L at 13% and no pruning, by width, training images and steps between events.

    Command: `python -m gstlib run beyond-when --profile mini`; 20 cells x 2, of which one is Figure 1's.
    """
    return [Labelled(run.label + cell.name, run.spec) for seed in seeds for cell in cells(profile)
            for at in [dataclasses.replace(profile, sizes={"vgg11": cell.size})]
            for run in each_seed(at, data, [seed], "vgg11", {"none": None, "L r=40": vgg11(at, 40, target="L")})]


BEYOND = (
    Experiment("beyond-when", "When does the benefit appear? VGG11", when),
)

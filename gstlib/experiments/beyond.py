"""Questions that the paper leaves open, each an experiment in data of VGG11; predictions in `gstlib.claims.beyond`.

The circumstances in which a network is trained vary here, and the ways of pruning are Figure 1's and Figure 5's: what
those figures run already is not run again.  What is new takes about 11 hours of one core at `mini` with three seeds: 5 for
`when`, 2 for `labels`, 1 for `dose`, 3 for `regularisers`.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gstlib.experiments.figures import Experiment, Labelled, by_rate, each_seed, struck, vgg11
from gstlib.experiments.profiles import Profile, Size
from gstlib.spec import DataSpec, RunSpec

WHOLE = 50_000  # training images where a profile takes all of them
# batch sizes with half, a quarter and an eighth of the profile's own steps in an epoch; at full width about so, for they
# divide the number of images as well
_BATCHES = {"smoke": (48,), "mini": (32, 64, 128), "quarter": (256, 480, 960), "paper": (256, 480, 960)}
_GROUP_LAST = ("conv3", "conv4", "conv5", "conv6")


def _brief(profile: Profile) -> Profile:
    """The profile itself; `smoke` with a narrower network, less to train: its runs are many and show nothing."""
    short = Size(20, 1 / 16, 48, 6)
    sizes = {"vgg11": short, "conv6-gn": short} if profile.name == "smoke" else {}
    return dataclasses.replace(profile, sizes={**profile.sizes, **sizes})


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
    own = _brief(profile).of("vgg11")
    slower = {f", steps/{2 ** k}" if profile.name != "smoke" else ", steps/8": batch
              for k, batch in enumerate(_BATCHES[profile.name], start=1)}
    steps = {"": own.batch_size} | slower
    for part in (1, 8) if profile.name == "smoke" else (1, 2, 4, 8):
        for name, batch in steps.items():
            width = f", width/{part}" if part > 1 else ""
            yield Cell(width + name, own._replace(width=own.width / part, batch_size=batch))
    for word, share in zip(("fewer", "more"), (1 / 2, 2) if own.width < 1 else (1 / 4, 1 / 2)):
        for name in ("", ", steps/8"):
            yield Cell(f", {word} images{name}", own._replace(train_size=int((own.train_size or WHOLE) * share),
                                                              batch_size=int(steps[name] * share)))


def when(profile: Profile, data: DataSpec, seeds: Iterable[int]) -> list[Labelled]:
    """When does the benefit appear? Prune L at 13% and no pruning, by width, training images and steps between events."""
    return [Labelled(run.label + cell.name, run.spec) for seed in seeds for cell in cells(profile)
            for at in [dataclasses.replace(profile, sizes={"vgg11": cell.size})]
            for run in each_seed(at, data, [seed], "vgg11", {"none": None, "L r=40": vgg11(at, 40, target="L")})]


WRONG = (0.0, 0.2, 0.4)  # shares of the training labels, of which the middle one is looked at closely


def labels(profile: Profile, data: DataSpec, seeds: Iterable[int]) -> list[Labelled]:
    """Whose labels does an event forget? Ways to disturb VGG11 where some training labels are wrong.

    Which labels are wrong, and what they became, is drawn from the run's seed: the runs of a seed share them, and seeds
    stay independent.  With true labels all runs are Figure 1's and 5's.
    """
    profile = _brief(profile)
    few = {"none": None, "L r=40": vgg11(profile, 40, target="L")}
    every = few | {"S r=40": vgg11(profile, 40, target="S"), "zeroing 50": struck(profile, "zero", 50),
                   "gaussian 1500": struck(profile, "gaussian", 1500)}
    return [Labelled(run.label + f", {share:.0%} wrong" * (share > 0), run.spec) for seed in seeds for share in WRONG
            for run in each_seed(profile, dataclasses.replace(data, wrong_labels=share), [seed], "vgg11",
                                 every if share <= WRONG[1] else few)]


def dose(profile: Profile, data: DataSpec, seeds: Iterable[int]) -> list[Labelled]:
    """Dose and response: six ways of striking the same filters in all, each at several doses.

    S, R and L by E[BN] and by l2 at five rates are Figure 4's; filters held at zero and let go are struck at four rates
    for 50 batches, and at one rate for five durations.
    """
    return each_seed(profile, data, seeds, "vgg11", {
        **by_rate(profile),
        **{f"zeroing {k}": struck(profile, "zero", k) for k in (0, 5, 15, 50, 1500)},
        **{f"zeroing 50 r={r}": struck(profile, "zero", 50, r) for r in (20, 60, 100)},
    })


def regularisers(profile: Profile, data: DataSpec, seeds: Iterable[int]) -> list[Labelled]:
    """Is it only that other regularisers were missing? Each with and without prune L at 13%, and all of them together.

    Under SGD the rate is 0.1 for 128 images, as in the final version, and in proportion for other batches.  A network
    with group normalisation, where E[BN] has no meaning, is pruned by l2, as VGG11 is beside it.  `--data svhn` or another
    set of its own has the same on that.
    """
    profile = _brief(profile)
    sgd = {"name": "sgd", "lr": 0.1 * profile.of("vgg11").batch_size / 128, "momentum": 0.9}
    decay, smooth, augmented = {"weight_decay": 5e-4}, {"label_smoothing": 0.1}, dataclasses.replace(data, augment=True)
    pair = {"none": None, "L r=40": vgg11(profile, 40, target="L")}
    by_l2 = {"L r=40 l2": vgg11(profile, 40, target="L", score="l2")}
    group = {"none": None, "L r=40 l2": dataclasses.replace(by_l2["L r=40 l2"], layers=_GROUP_LAST)}

    def trained(spec: RunSpec, how: dict) -> RunSpec:
        return dataclasses.replace(spec, optimiser=dataclasses.replace(spec.optimiser, **how))

    return [Labelled(run.label + name, trained(run.spec, how))
            for seed in seeds for name, images, model, methods, how in (
                ("", data, "vgg11", pair | by_l2, {}), (", decay", data, "vgg11", pair, decay),
                (", augmented", augmented, "vgg11", pair, {}), (", smoothed", data, "vgg11", pair, smooth),
                (", SGD", data, "vgg11", pair, sgd), (", all", augmented, "vgg11", pair, decay | smooth | sgd),
                (", GroupNorm", data, "conv6-gn", group, {}))
            for run in each_seed(profile, images, [seed], model, methods)]


BEYOND = (
    Experiment("beyond-when", "When does the benefit appear? VGG11", when),
    Experiment("beyond-labels", "Whose labels does an event forget? VGG11", labels),
    Experiment("beyond-dose", "Dose and response, VGG11", dose),
    Experiment("beyond-regularisers", "With other regularisers, VGG11 and a network with GroupNorm", regularisers),
)

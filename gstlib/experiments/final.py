"""What the paper's final version (arXiv 1906.03728v4) adds, as data: its figures 2 to 5, B2 and C3, tables C1 and F1.

Figure 6 and E1 to E6 are read from `final-figure2`, figure C1's and D2's numbers from `final-figure3` and
`final-figure5`.  A configuration that an earlier figure has is that figure's run.  Each is trained by its name in `FINAL`,
for instance `python -m gstlib run final-figure2 --profile paper`, with ten seeds a configuration.
"""

import dataclasses
from collections.abc import Iterable

from gstlib.experiments.figures import (
    RESNET18_LAST, VGG11_LAST, Experiment, Labelled, each_seed, pruning_spec, resnet18, struck, vgg11)
from gstlib.experiments.profiles import Profile, rounded
from gstlib.spec import DataSpec, PruningSpec

CUMULATIVE = (89, 630, 1220, 2480)  # figure D2's durations, in training batches
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
_SGD_EPOCHS = {"epochs": 165, "milestones": (83, 125), "optimiser": SGD}
# every convolution of every block, which figures 4 and C3 prune, in forward order
BLOCKS = {name: tuple(f"stage{stage}.{block}.conv{number}" for stage in range(1, stages + 1)
                      for block in range(blocks) for number in (1, 2))
          for name, stages, blocks in (("resnet18", 4, 2), ("resnet20", 3, 3), ("resnet56", 3, 9))}


def _scratch(layers, fraction, score: str) -> PruningSpec:
    """The units that score least at initialisation, removed before the first step, the whole share at once."""
    now = (0,) * len(layers)
    return PruningSpec(layers, now, now, fraction, 1, target="S", score=score, scratch=True)


def _resnet18(profile, fraction=(0.25, 0.4, 0.25, 0.95), start=(7, 8, 9, 10), score="activation"):
    return {"none": None, **{
        f"{target} r={r}": resnet18(profile, r, start=start, fraction=fraction, target=target, score=score)
        for target, r in (("S", 4), ("S", 40), ("L", 40))}}


def _vgg11(profile, score: str, ways=(("S", 4), ("S", 40), ("R", 40), ("L", 40))) -> dict[str, PruningSpec | None]:
    # random selection looks at no score: by any it is the same run
    return {"none": None, **{f"{target} r={r}": vgg11(profile, r, target=target, score="ebn" if target == "R" else score)
                             for target, r in ways}}


def _both(profile, data, seeds, vgg: dict, resnet: dict, **fields) -> list[Labelled]:
    """Seed by seed VGG11's configurations, with `fields`, and ResNet18's, whose labels say so."""
    resnet = {f"ResNet18 {label}": pruning for label, pruning in resnet.items()}
    return [run for seed in seeds for run in (*each_seed(profile, data, [seed], "vgg11", vgg, **fields),
                                              *each_seed(profile, data, [seed], "resnet18", resnet))]


def figure2(profile: Profile, data: DataSpec, seeds: Iterable[int]) -> list[Labelled]:
    """Figure 2 of the final version: VGG11 by l2 with filters removed before training ("scratch"), ResNet18 by its
    activations (C24).  VGG11's flatness after epoch 314 (Figure 6, C20) makes them runs of their own.
    """
    scratch = {"scratch": _scratch(VGG11_LAST, (0.3, 0.3, 0.3, 0.9), "l2")}
    return _both(profile, data, seeds, _vgg11(profile, "l2") | scratch, _resnet18(profile), measures=("flatness",),
                 measured_at=rounded(314, profile.of("vgg11").divisor))


def figure3(profile: Profile, data: DataSpec, seeds: Iterable[int]) -> list[Labelled]:
    """Figure 3 of the final version, and its C1: VGG11 over targets and rates up to a single event, by l2 (C22).

    Published: accuracies of 85.3 to 86.4%, stabilities of 98.3 to 100%.
    """
    every = [(target, r) for r in (40, 4, 300, 100, 20, 200, 60) for target in "SRL"]
    return each_seed(profile, data, seeds, "vgg11", _vgg11(profile, "l2", every))


def _by_sgd(profile: Profile, model: str, retrain: int, start: int, share: float = 0.1) -> PruningSpec:
    layers = BLOCKS[model]
    return pruning_spec(profile, f"{model}, SGD", layers, (start,) * len(layers), (100,) * len(layers),
                        (share,) * len(layers), retrain, target="S", score="l1")


def figure4(profile: Profile, data: DataSpec, seeds: Iterable[int]) -> list[Labelled]:
    """Figure 4 of the final version: two rates in ResNet18, 20 and 56 under SGD, all block convolutions by l1 (C23)."""
    data = dataclasses.replace(data, augment=True)
    return [run for seed in seeds for model in BLOCKS for run in each_seed(
        profile, data, [seed], model, {f"{model.replace('resnet', 'ResNet')} S r={r}": _by_sgd(profile, model, r, 40)
                                       for r in (30, 60)}, size=f"{model}, SGD", **_SGD_EPOCHS)]


def figure5(profile: Profile, data: DataSpec, seeds: Iterable[int]) -> list[Labelled]:
    """Figures 5 and D2 of the final version: filters zeroed for a while, the last time with all they had given back (C21).

    Cumulative zeroing holds at zero every filter that an event has targeted so far, and then restores their weights,
    scale, shift and running statistics.
    """
    return each_seed(profile, data, seeds, "vgg11", {
        "none": None, "L l2 weights": struck(profile, "remove-weights"),
        **{f"{name} {k}": struck(profile, effect, k) for name, effect in (("zeroing", "zero"), ("gaussian", "gaussian"))
           for k in (1, 50, 1105)},
        **{f"cumulative {k}": struck(profile, "zero-cumulative", k) for k in CUMULATIVE}})


def figure_b2(profile: Profile, data: DataSpec, seeds: Iterable[int]) -> list[Labelled]:
    """Figure B2 of the final version: its figure 2 by E[BN], ResNet18's with gamma's sign and the early start epochs.

    Without scratch, for before training every filter has the same E[BN].
    """
    return _both(profile, data, seeds, _vgg11(profile, "ebn"), _resnet18(profile, start=(3, 4, 5, 6), score="ebn-signed"))


def figure_c3(profile: Profile, data: DataSpec, seeds: Iterable[int]) -> list[Labelled]:
    """Figure C3 of the final version: ResNet18 under SGD, a little of every block convolution after each epoch."""
    return each_seed(profile, dataclasses.replace(data, augment=True), seeds, "resnet18", {
        "none": None, **{f"S r=1 {share:.0%}": _by_sgd(profile, "resnet18", 1, 24, share) for share in (0.1, 0.06)}},
        size="resnet18, SGD", **_SGD_EPOCHS)


def table_c1(profile: Profile, data: DataSpec, seeds: Iterable[int]) -> list[Labelled]:
    """Table C1 of the final version: ResNet18 as in its figure 2, with more removed of one layer."""
    return each_seed(profile, data, seeds, "resnet18", _resnet18(profile, (0.25, 0.8, 0.25, 0.95)))


def table_f1(profile: Profile, data: DataSpec, seeds: Iterable[int]) -> list[Labelled]:
    """Table F1 of the final version: long training of ResNet18 on CIFAR-100 (`--data cifar100`), pruned or not."""
    def pruned(target: str) -> PruningSpec:
        return pruning_spec(profile, "resnet18, long", RESNET18_LAST[3:], (2500,), (3500,), (0.7,), 750, target=target,
                            score="l1")

    return each_seed(profile, dataclasses.replace(data, augment=True), seeds, "resnet18", {
        "none": None, "L r=750": pruned("L"), "S r=750": pruned("S"), "scratch": _scratch(RESNET18_LAST[3:], (0.7,), "l1")},
        size="resnet18, long", epochs=4000, milestones=(2000,), optimiser={"lr": 1e-4})


FINAL = (
    Experiment("final-figure2", "Figure 2 of the final version: pruning in training and before it", figure2),
    Experiment("final-figure3", "Figure 3 of the final version: targets and rates, VGG11", figure3),
    Experiment("final-figure4", "Figure 4 of the final version: two rates under SGD, ResNets", figure4),
    Experiment("final-figure5", "Figure 5 of the final version: zeroing, restored or not, VGG11", figure5),
    Experiment("final-figureB2", "Figure B2 of the final version: its figure 2 by E[BN]", figure_b2),
    Experiment("final-figureC3", "Figure C3 of the final version: an event an epoch under SGD, ResNet18", figure_c3),
    Experiment("final-tableC1", "Table C1 of the final version: more removed of ResNet18", table_c1),
    Experiment("final-tableF1", "Table F1 of the final version: long training, ResNet18", table_f1, "cifar100"),
)

"""What the replication needs, most valuable first: one list for a CPU, one for a GPU."""

from typing import NamedTuple


class Stage(NamedTuple):
    """A step of the campaign: so many seeds of a figure at a profile, of the configurations `labels` or of all (none)."""

    figure: str
    profile: str
    seeds: int
    labels: tuple[str, ...] = ()


_MINI = ("figure1-vgg11", "figure5", "figure1-resnet18", "figure4", "figure2", "figure3", "figure1-resnet18-v4",
         "final-figure2", "final-figure3", "final-figure5", "final-figure4")
_BEYOND = ("beyond-when", "beyond-labels", "beyond-dose", "beyond-regularisers")
_NEW = ("final-figure5", "final-figure3", "beyond-labels", "final-figure2", "final-figure4", "final-figureC3",
        "final-figureB2", "final-tableC1", "final-tableF1", "beyond-dose", "beyond-regularisers", "beyond-when", "figure2",
        "figure3")
# what claims and predictions read that few runs decide: a dozen verdicts for the price of one whole figure
_FEW = tuple(Stage(figure, "mini", 3, labels) for figure, labels in (
    ("figure5", ("none", "L l2 weights", "zeroing 0", "zeroing 50", "gaussian 1500")),
    ("final-figure5", ("none", "L l2 weights", "cumulative 2480")),
    ("final-figure2", ("none", "scratch", "S r=4", "S r=40", "R r=40", "L r=40")),
    ("figure1-resnet18", ()),
    ("beyond-when", tuple(f"{way}{where}" for where in ("", ", width/8", ", steps/8") for way in ("none", "L r=40"))),
    ("beyond-labels", tuple(f"{way}{share}" for share in ("", ", 20% wrong", ", 40% wrong") for way in ("none", "L r=40"))),
    ("beyond-labels", ()),
    ("beyond-regularisers", ("none", "L r=40 l2", "none, GroupNorm", "L r=40 l2, GroupNorm")),
    ("beyond-regularisers", ()),
))

# The order in which runs are worth most, by the type of device at hand.  A verdict needs three seeds in every
# configuration, the sooner where more claims rest on them, and seeds come in whole rounds.
CAMPAIGN = {
    "cpu": (
        Stage("figure1-vgg11", "mini", 5),
        Stage("figureA1", "mini", 3),
        *(Stage(figure, "mini", 1) for figure in _NEW),  # one look at what was added last
        *_FEW,
        Stage("figure3", "mini", 3),
        Stage("final-figure4", "mini", 3),
        Stage("figure4", "mini", 3),
        Stage("final-figure3", "mini", 3),
        Stage("figure2", "mini", 3),
        Stage("figure5", "mini", 5),
        Stage("figure1-resnet18", "mini", 5),
        Stage("final-figure2", "mini", 5),
        *(Stage(figure, "mini", 5) for figure in _MINI),
        *(Stage(figure, "mini", 3) for figure in ("final-figureB2", "final-figureC3", "final-tableC1", "final-tableF1")),
        *(Stage(figure, "mini", 3) for figure in _BEYOND),
        *(Stage(figure, "mini", 10) for figure in _MINI),
        Stage("precision", "mini", 5),
        Stage("figure2", "paper", 3),
        Stage("figure2", "paper", 5),
    ),
    "cuda": (
        Stage("figure1-vgg11", "quarter", 5),
        *(Stage(figure, "mini", 3) for figure in dict.fromkeys((*_MINI, *_NEW, *_BEYOND))),  # hours that a CPU is spared
        Stage("figure2", "paper", 3),
        Stage("precision", "quarter", 3),
        Stage("figure5", "quarter", 5),
        Stage("figure4", "quarter", 3),
        Stage("figure1-resnet18", "quarter", 5),
        *(Stage(f"final-figure{number}", "quarter", 3) for number in (2, 3, 5)),
        Stage("figure3", "quarter", 3),
        Stage("final-figure4", "quarter", 3),
        Stage("figureA1", "quarter", 3),
        Stage("figure4", "quarter", 5),
        Stage("figure1-vgg11", "paper", 10),
        Stage("figure1-resnet18-v4", "quarter", 3),
        *(Stage(f"final-figure{number}", "quarter", 5) for number in (2, 3, 4, 5)),
        *(Stage(figure, "quarter", 3) for figure in ("final-figureB2", "final-figureC3", "final-tableC1")),
        *(Stage(figure, "quarter", 10) for figure in ("figure4", "figure5")),
        *(Stage(figure, "paper", 10) for figure in ("figure1-resnet18", "figure2", "figure4", "figure5")),
        Stage("figure3", "paper", 3),
        *(Stage(figure, "quarter", 3) for figure in _BEYOND),
    ),
}

"""The paper's claims as data: what is said, what is estimated, which runs it needs, and which function judges it.

To add a claim, add an entry here and its function in `evaluations`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gstlib.claims import evaluations as e
from gstlib.claims.rules import Finding
from gstlib.reading.measures import SHARPNESS


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and how it is judged.

    `published`: the paper's number or place; `figure`: the experiment that bears on it; `statistic`: what is computed
    within each seed; `test`: the rule in words; `evaluate`: gets a table for each figure in `needs`, which maps a
    figure to measures to the configurations that must be there; `counted`: what the finding's `n` counts.
    """

    id: str
    statement: str
    published: str
    figure: str
    statistic: str
    test: str
    evaluate: Callable[..., Finding]
    needs: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    counted: str = "seeds"


_ABOVE = "the 95% interval above zero"
_BOTH = "each part's 95% interval above zero"
_SLOPE = ("slope of final accuracy on log10 of mean instability over the figure's pruned configurations, in "
          "points for a tenfold instability")
_AROUND = ("effect above zero (95% interval), difference within a quarter of it on either side (90% intervals)")
_LARGEST = "final accuracy at r = 100 (30%) and at each other rate, for "
_TREND = ("least-squares slope over the targets D0 to D10 of the gap (test less train accuracy after the last "
         "epoch, 54), ")
_OF_CONFIGURATIONS = ("log_instability", "accuracy")
_OF_SLOPES = (*_OF_CONFIGURATIONS, "mean_instability")
_ZEROED = (e.PRUNE_L, "zeroing 50")
_TENTHS = (*e.TENTHS["weight"], *e.TENTHS["filter"])
_RISING = sum(e.RISING.values(), ())
_FIGURE3 = (*e.FIGURE3["filter"], *e.FIGURE3["weight"])

CLAIMS = (
    Claim("C1", "In VGG11, among Figure 1's ways of pruning, the less stable, the more accurate the pruned network.",
          "r = .84, p = 1.3e-11", "figure1-vgg11", _SLOPE, _ABOVE, e.mean_log_slope,
          {"figure1-vgg11": dict.fromkeys(_OF_SLOPES, e.VGG11)}),
    Claim("C1g", "In VGG11, the less stable a way of pruning, the more accurate the pruned network.",
          "r = .84 (Figure 1's four)", "figure4",
          "Pearson's r of log10 mean instability and final accuracy, one point a configuration (its mean over "
          "seeds), over Figure 4's ways of pruning, which include Figure 1's, and Figure 5's permanent one",
          "the interval by Fisher's z over configurations above zero; p by permutation", e.over_configurations,
          {"figure4": dict.fromkeys(_OF_CONFIGURATIONS, e.FIGURE4),
           "figure5": dict.fromkeys(_OF_CONFIGURATIONS, (e.PRUNE_L,))}, "configurations"),
    Claim("C2", "In ResNet18, among Figure 1's ways of pruning, the less stable, the more accurate the pruned "
          "network.", "r = .65, p = 5.2e-5", "figure1-resnet18", _SLOPE, _ABOVE, e.mean_log_slope,
          {"figure1-resnet18": dict.fromkeys(_OF_SLOPES, e.RESNET18)}),
    Claim("C3", "Removing the largest filters of VGG11, 13% at a time, is by far the least stable, and the network "
          "recovers within a few epochs to a higher accuracy than without pruning.", "Figure 1 left", "figure1-vgg11",
          "log ratio of mean instability, L at 13% over each other way; share of its clusters of events recovered "
          f"within {e.FEW_EPOCHS} epochs (Kaplan-Meier) less one half; final accuracy less that of no pruning", _BOTH,
          e.recovers,
          {"figure1-vgg11": {"log_instability": e.VGG11, "recovered": e.VGG11[2:3], "accuracy": ("none", e.VGG11[2])}}),
    Claim("C4", "Ways of pruning that remove the same number of parameters differ in final accuracy.", "Figure 1",
          "figure1-vgg11",
          "range of the pruned configurations' mean final accuracies, VGG11 and ResNet18 (a description, without "
          "interval)",
          "F test on configurations with seeds as blocks, p < .05 in both networks; finding no difference "
          "contradicts nothing", e.same_number,
          {"figure1-vgg11": {"accuracy": e.VGG11}, "figure1-resnet18": {"accuracy": e.RESNET18}}),
    Claim("C5", "The larger the weights or neurons that are removed, the better the generalization gap.", "Figure 2",
          "figure2", _TREND + "single weights and whole neurons; without D10 and with test accuracy in the note",
          _BOTH, e.larger_is_better, {"figure2": {"gap": _TENTHS, "accuracy": _TENTHS}}),
    Claim("C6", "The size of what is removed matters much more for single weights than for whole neurons.",
          "Figure 2", "figure2",
          _TREND + "single weights less whole neurons; without D10 and with test accuracy in the note", _ABOVE,
          e.matters_more, {"figure2": {"gap": _TENTHS, "accuracy": _TENTHS}}),
    Claim("C7", "Neurons' norms differ little beyond the middle, while single weights' deciles are about "
          "exponential.", "text of section 4.2", "figure2",
          "at the last event up to epoch 35, mean over the targets: log ratio of the ninth tenth's mean magnitude "
          "to the fifth's, single weights over whole neurons; R² of single weights' ten tenths against an "
          f"exponential's, its scale fitted, less {e.EXPONENTIAL_FIT}", _BOTH, e.magnitudes,
          {"figure2": {"ninth_over_fifth": _TENTHS, "exponential_fit": e.TENTHS["weight"]}}),
    Claim("C8", "Removing whole filters leaves a more accurate ResNet18 than removing as many single weights.",
          "Figure 3", "figure3",
          "final accuracy, filters less weights at the same rate, mean over r = 4, r = 40 and one shot", _ABOVE,
          e.structured, {"figure3": {"accuracy": _FIGURE3}}),
    Claim("C9", "At the same total, removing more at a time is less stable.", "Figure 4 left", "figure4",
          "slope of log mean instability on log2 of the iterative rate within a target, mean over S and L by each "
          "score, and R", _ABOVE, e.larger_steps, {"figure4": {"log_instability": e.FIGURE4, "rate": e.FIGURE4}}),
    Claim("C10", "Removing small or random filters works best at the largest rate.", "Figure 4 right (30%)",
          "figure4", _LARGEST + "S by E[BN], S by l2 and R",
          "ahead of each other rate by its 95% interval; contradicted where another leads, by Holm; r = 60 in the "
          "note", e.best_at_largest,
          {"figure4": {"accuracy": e.CURVES["S by E[BN]"] + e.CURVES["S by l2"] + e.CURVES["R"]}}),
    Claim("C11", "By E[BN], removing small filters is more stable than random ones, and random ones than large ones.",
          "Figure 4 left", "figure4",
          "log ratio of mean instability, R over S and L over R, mean over the five rates", _BOTH, e.ordered,
          {"figure4": {"log_instability": e.CURVES["S by E[BN]"] + e.CURVES["R"] + e.CURVES["L by E[BN]"]}}),
    Claim("C12", "By l2, removing small filters is less stable than random ones and nearly as unstable as large "
          "ones.", "Figure 4 left", "figure4",
          "log ratio of mean instability by l2, mean over the five rates: S over R; S over L, against L over R",
          "S over R: " + _ABOVE + "; " + _AROUND, e.l2_misleads,
          {"figure4": {"log_instability": e.CURVES["S by l2"] + e.CURVES["R"] + e.CURVES["L by l2"]}}),
    Claim("C13", "Removing large filters does not work best at the largest rate.", "Figure 4 right (30%)", "figure4",
          _LARGEST + "L by E[BN] and by l2",
          "for each score another rate ahead, by Holm; contradicted where r = 100 leads each; r = 60 in the note",
          e.not_best_at_largest, {"figure4": {"accuracy": e.CURVES["L by E[BN]"] + e.CURVES["L by l2"]}}),
    Claim("C14", "Holding filters at zero for 50 batches gives the accuracy and instability that removing them "
          "gives.", "Figure 5 left", "figure5",
          "final accuracy, zeroing 50 less prune L, against prune L less no pruning; ratio of their mean "
          "instabilities; Pearson's r of their instabilities over the events",
          "accuracy: " + _AROUND + "; instability: a ratio within 3/4 and 5/4 (90% intervals); r: " + _ABOVE,
          e.zeroing_is_pruning,
          {"figure5": {"accuracy": ("none", *_ZEROED), "log_instability": _ZEROED, "pattern": _ZEROED}}),
    Claim("C15", "Setting filters to zero once, free to grow back, does not help.", "Figure 5 left", "figure5",
          "a quarter of prune L's gain in final accuracy less the gain of zeroing 0, both over no pruning",
          _ABOVE + "; contradicted where the gain of zeroing 0 is above zero", e.zeroing_once,
          {"figure5": {"accuracy": ("none", e.PRUNE_L, "zeroing 0")}}),
    Claim("C16", "Gaussian noise for 1500 batches helps, but less than pruning.", "Figure 5 right", "figure5",
          "final accuracy, Gaussian 1500 less no pruning and prune L less Gaussian 1500", _BOTH, e.noise_helps_less,
          {"figure5": {"accuracy": ("none", e.PRUNE_L, "gaussian 1500")}}),
    Claim("C17", "Removing small filters is more stable by E[BN] than by l2.", "Figure A2", "figureA2",
          "log ratio of mean instability of S at r = 4, by l2 over by E[BN]", _ABOVE, e.ebn_is_stabler,
          {"figure1-vgg11": {"log_instability": ("S r=4", "S r=4 l2")}}),
    Claim("C18", "Normalised activations are near normal before training and less so after, least near the output.",
          "Figure A1", "figureA1",
          "Kolmogorov-Smirnov distance to the standard normal, mean over VGG19's last eight convolutions: after "
          f"training less before; {e.NEAR_NORMAL} less before; Spearman's rho of the distance after training and "
          "depth", _BOTH, e.normality, {"figureA1": dict.fromkeys(("ks_before", "ks_after", "ks_rho"), ("none",))}),
    Claim("C19", "Computing E[BN] costs next to nothing.", "section 3.1.1", "bench",
          "time of one scoring pass of all pruned layers over that of one training step, on the machine where that is "
          "most, median and range over the networks", "below one training step in every network; contradicted when above in every one", e.cheap,
          counted="networks"),
    # of the final version: C20 and C21 in its abstract's words, C22 to C24 in ours, for what its scripts compare and draw
    Claim("C20", "The less stable the pruning, the flatter the minimum that training ends in.", "final version, abstract and "
          "Figure 6", "final-figure2",
          "slope, its sign turned, of log10 of curvature (sum of the leading Hessian eigenvalues) and of log10 of the trace "
          "of the gradient covariance on log10 of mean instability over VGG11's four configurations pruned in training, shown "
          "as a ratio for a tenfold instability; measures relative to the filters' norms in the note", _BOTH, e.flatter,
          {"final-figure2": dict.fromkeys(("log_instability", *SHARPNESS), e.IN_TRAINING)}),
    Claim("C21", "The benefit of pruning does not need anything to be removed for good.", "final version, abstract and "
          "Figure D2", "final-figure5",
          "final accuracy of the filters held at zero longest and then restored: less prune L, against prune L less no "
          "pruning; less no pruning", "restored less prune L: " + _AROUND + "; restored less no pruning: " + _ABOVE,
          e.needs_no_removal, {"final-figure5": {"accuracy": ("none", e.PRUNE_L, e.RESTORED)}}),
    Claim("C22", "Over small, random and large filters in VGG11 accuracy rises as stability falls, and falls again at the "
          "extreme rates.", "final version, Figure 3", "final-figure3",
          "slope of final accuracy on log10 of mean instability over S, R and L at r = 4 to 100, in points for a tenfold "
          "instability; final accuracy at r = 40, 60 and 100 less that at 200 and 300, mean over the three targets", _BOTH,
          e.rises_and_falls,
          {"final-figure3": {"log_instability": _RISING, "accuracy": _RISING + sum(e.EXTREME.values(), ())}}),
    Claim("C23", "Under SGD with momentum, decay and augmentation, the less stable of two rates generalises better in "
          "ResNet18, 20 and 56.", "final version, Figure 4", "final-figure4",
          "final accuracy of the rate (r = 30 or 60) with the larger mean instability in that seed and network less that of "
          "the other, mean over the three networks", _ABOVE, e.less_stable_by_sgd,
          {"final-figure4": dict.fromkeys(_OF_CONFIGURATIONS, sum(e.BY_SGD.values(), ()))}),
    Claim("C24", "Removing as many small filters before training does not give the benefit of removing them in training.",
          "final version, Figure 2 (scratch)", "final-figure2",
          "a quarter of the gain in final accuracy of S at r = 40 in VGG11 less the gain of the same share removed before "
          "the first step, both over no pruning; the gain of S at r = 40",
          _BOTH + "; contradicted where the gain before training is above zero; without a gain in training it stays open",
          e.not_before_training, {"final-figure2": {"accuracy": ("none", "S r=40", "scratch")}}),
)

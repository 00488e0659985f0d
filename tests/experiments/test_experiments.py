import pytest

from gstlib import experiments, models
from gstlib.claims import CLAIMS
from gstlib.claims.beyond import PREDICTIONS
from gstlib.errors import InputError
from gstlib.experiments import CAMPAIGN, EXPERIMENTS, PROFILES, parse_seeds, scaled_schedule
from gstlib.network.surroundings import Surroundings
from gstlib.spec import DataSpec, RunSpec
from gstlib.training import train

CONFIGURATIONS = {
    "figure1-vgg11": 5, "figure1-resnet18": 4, "figure1-resnet18-v4": 10, "figure2": 24, "figure3": 7, "figure4": 26,
    "figure5": 13, "figureA1": 1, "figureA2": 5, "precision": 4, "final-figure2": 10, "final-figure3": 22,
    "final-figure4": 6, "final-figure5": 12, "final-figureB2": 9, "final-figureC3": 3, "final-tableC1": 4, "final-tableF1": 4,
    "beyond-when": 40, "beyond-labels": 12, "beyond-dose": 33, "beyond-regularisers": 15,
}
AT_SMOKE = {"beyond-when": 16}  # of a map its ends alone
EARLY = [figure for figure in CONFIGURATIONS if not figure.startswith(("final", "beyond"))]
SGD = ("final-figure4", "final-figureC3")


def runs(figure: str, profile: str, seeds=(0,)) -> dict[str, RunSpec]:
    chosen = experiments.profile(profile)
    data = experiments.data_spec(chosen, chosen.data, "f" * 64)
    return {run.label: run.spec for run in experiments.experiment(figure).runs(chosen, data, seeds)}


def events(spec: RunSpec) -> list[range]:
    return [spec.pruning.schedule.event_epochs(layer) for layer in range(len(spec.pruning.layers))]


def test_every_figure_of_the_paper_is_there():
    assert set(EXPERIMENTS) == set(CONFIGURATIONS) and all(name == e.name for name, e in EXPERIMENTS.items())
    assert set(PROFILES) == {"smoke", "mini", "quarter", "paper"}
    assert all(name == p.name for name, p in PROFILES.items())


@pytest.mark.parametrize("figure", EXPERIMENTS)
@pytest.mark.parametrize("profile", PROFILES)
def test_each_configuration_comes_once_a_seed(figure, profile):
    chosen = experiments.profile(profile)
    data = experiments.data_spec(chosen, chosen.data, "f" * 64)
    listed = EXPERIMENTS[figure].runs(chosen, data, [4, 1])
    number = (profile == "smoke" and AT_SMOKE.get(figure)) or CONFIGURATIONS[figure]
    assert [run.spec.seed for run in listed] == [4] * number + [1] * number
    assert [run.label for run in listed[:number]] == [run.label for run in listed[number:]]
    assert len({run.label for run in listed}) == number


@pytest.mark.parametrize("figure", EXPERIMENTS)
def test_labels_of_one_figure_are_different_runs_in_the_paper(figure):
    ids = [spec.id for spec in runs(figure, "paper").values()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("profile", PROFILES)
def test_shared_baselines_are_one_run(profile):
    assert len({runs(f, profile)["none"].id for f in ("figure1-vgg11", "figure4", "figure5")}) == 1
    assert len({runs(f, profile)["none"].id for f in ("figure1-resnet18", "figure1-resnet18-v4", "figure3")}) == 1
    first, fourth = runs("figure1-vgg11", profile), runs("figure4", profile)
    assert all(first[label].id == fourth[label].id for label in ("S r=4", "S r=40", "L r=40", "S r=4 l2"))
    assert runs("figureA2", profile) == first


@pytest.mark.parametrize("profile", PROFILES)
def test_the_final_version_shares_what_the_early_one_has(profile):
    early = {spec.id for figure in EARLY for spec in runs(figure, profile).values()}
    shared = {figure: {label for label, spec in runs(figure, profile).items() if spec.id in early}
              for figure in CONFIGURATIONS if figure not in EARLY}
    assert shared["final-figure3"] == {"none", *(f"{t} r={r}" for t in "SRL" for r in (4, 20, 40, 60, 100))}
    assert shared["final-figure5"] >= {"none", "L l2 weights", *(f"{kind} {k}" for kind in ("zeroing", "gaussian")
                                                                 for k in (50, 1105))}
    assert shared["final-figureB2"] == set(runs("final-figureB2", profile))
    assert shared["final-tableC1"] == {"none"} and not shared["final-figure4"]


@pytest.mark.parametrize("figure", SGD)
def test_the_final_version_s_residual_networks_are_trained_by_sgd(figure):
    for spec in runs(figure, "paper").values():
        o = spec.optimiser
        assert (o.name, o.lr, o.momentum, o.weight_decay, o.epochs, o.milestones) == ("sgd", 0.1, 0.9, 1e-4, 165, (83, 125))
        assert spec.data.augment and (p := spec.pruning) is None or (p.target, p.score, p.structure) == ("S", "l1", "filter")


def test_every_block_convolution_is_pruned_under_sgd():
    wanted = {"resnet18": 16, "resnet20": 18, "resnet56": 54}
    for spec in runs("final-figure4", "paper").values():
        layers = [name for name in Surroundings(models.build(spec.model.name)).layers
                  if name.startswith("stage") and "shortcut" not in name]
        assert list(spec.pruning.layers) == layers and len(layers) == wanted[spec.model.name]
        assert [len(e) for e in events(spec)] == [3 if spec.pruning.retrain == 30 else 2] * len(layers)


def test_the_final_version_s_schedules_are_as_printed():
    final = {figure: runs(figure, "paper") for figure in CONFIGURATIONS if figure not in EARLY}
    p = final["final-figure2"]["ResNet18 L r=40"].pruning
    assert (p.start, p.end, p.fraction, p.score) == ((7, 8, 9, 10), (150, 150, 170, 275), (0.25, 0.4, 0.25, 0.95), "activation")
    p = final["final-figure2"]["scratch"].pruning
    assert (p.target, p.score, p.fraction) == ("S", "l2", (0.3, 0.3, 0.3, 0.9)) and [list(e) for e in events(
        final["final-figure2"]["scratch"])] == [[-1]] * 4
    assert final["final-tableC1"]["S r=4"].pruning.fraction == (0.25, 0.8, 0.25, 0.95)
    assert final["final-figureB2"]["ResNet18 S r=40"].pruning.score == "ebn-signed"
    p = final["final-figureC3"]["S r=1 6%"].pruning
    assert (p.start[0], p.end[0], p.retrain, set(p.fraction)) == (24, 100, 1, {0.06})
    long = final["final-tableF1"]
    assert {(s.optimiser.epochs, s.optimiser.lr, s.optimiser.milestones, s.data.augment) for s in long.values()} == {
        (4000, 1e-4, (2000,), True)}
    p = long["L r=750"].pruning
    assert (p.layers, p.start, p.end, p.fraction, p.retrain, p.score) == (
        ("stage4.1.conv2",), (2500,), (3500,), (0.7,), 750, "l1")
    held = {s.pruning.batches for s in final["final-figure5"].values() if s.pruning and s.pruning.effect == "zero-cumulative"}
    assert held == {89, 630, 1220, 2480}
    rates = {s.pruning.retrain: [len(e) for e in events(s)] for s in final["final-figure3"].values() if s.pruning}
    assert rates[200] == [1, 1, 1, 2] and rates[300] == [1, 1, 1, 1]


def test_all_leaves_out_at_full_width_what_is_about_other_data():
    assert set(EXPERIMENTS) - set(experiments.every("paper", None)) == {"final-tableF1"}
    assert experiments.every("paper", "cifar100") == experiments.every("mini", None) == list(EXPERIMENTS)


@pytest.mark.parametrize("figure", EARLY)
def test_training_is_that_of_section_3(figure):
    for label, spec in runs(figure, "paper").items():
        o = spec.optimiser
        assert (o.name, o.lr, o.batch_size, o.weight_decay, o.decay) == ("adam", 0.001, 128, 0, 0.1)
        assert spec.model.width == 1 and spec.data.train_size is None and spec.data.test_size is None
        if figure == "figure2":
            assert (o.epochs, o.milestones, spec.data.augment, spec.model.name) == (55, (30, 60), True, "conv4")
        else:
            assert (o.epochs, o.milestones, spec.data.augment) == (325, (150, 300), False)
            assert (spec.pruning is None) == label.startswith("none")


@pytest.mark.parametrize(("figure", "label", "start", "end", "fraction", "retrain", "target", "score"), [
    ("figure1-vgg11", "S r=4", (3, 4, 5, 6), (150, 150, 150, 275), (0.3, 0.3, 0.3, 0.9), 4, "S", "ebn"),
    ("figure1-vgg11", "L r=40", (3, 4, 5, 6), (150, 150, 150, 275), (0.3, 0.3, 0.3, 0.9), 40, "L", "ebn"),
    ("figure1-vgg11", "S r=4 l2", (3, 4, 5, 6), (150, 150, 150, 275), (0.3, 0.3, 0.3, 0.9), 4, "S", "l2"),
    ("figure1-resnet18", "S r=40", (3, 4, 5, 6), (150, 150, 170, 275), (0.25, 0.4, 0.25, 0.95), 40, "S", "ebn"),
    ("figure1-resnet18-v4", "L r=40 later", (7, 8, 9, 10), (150, 150, 170, 275), (0.25, 0.4, 0.25, 0.95), 40,
     "L", "ebn"),
    ("figure1-resnet18-v4", "S r=4 more", (3, 4, 5, 6), (150, 150, 170, 275), (0.25, 0.8, 0.25, 0.95), 4, "S", "ebn"),
    ("figure2", "D7 filter", (4,), (52,), (0.1,), 3, "D7", "l2"),
    ("figure2", "D10 weight", (4,), (52,), (0.1,), 3, "D10", "magnitude"),
    ("figure3", "L r=40 weight", (3, 4, 5, 6), (150, 150, 150, 275), (0.1, 0.1, 0.1, 0.9), 40, "L", "magnitude"),
    ("figure3", "L r=4 filter", (3, 4, 5, 6), (150, 150, 150, 275), (0.1, 0.1, 0.1, 0.9), 4, "L", "ebn"),
    ("figure3", "L one-shot filter", (246,) * 4, (246,) * 4, (0.1, 0.1, 0.1, 0.9), 1, "L", "ebn"),
    ("figure4", "R r=100", (3, 4, 5, 6), (150, 150, 150, 275), (0.3, 0.3, 0.3, 0.9), 100, "R", "ebn"),
    ("figure4", "L r=20 l2", (3, 4, 5, 6), (150, 150, 150, 275), (0.3, 0.3, 0.3, 0.9), 20, "L", "l2"),
])
def test_schedules_as_printed(figure, label, start, end, fraction, retrain, target, score):
    p = runs(figure, "paper")[label].pruning
    assert (p.start, p.end, p.fraction, p.retrain, p.target, p.score) == (start, end, fraction, retrain, target, score)
    assert (p.effect, p.batches) == ("remove", 0)
    assert p.structure == ("weight" if score == "magnitude" else "filter")


def test_figure4_crosses_targets_scores_and_rates():
    found = {(p.target, p.score, p.retrain) for s in runs("figure4", "paper").values() if (p := s.pruning)}
    # random selection looks at no score: one run stands for both
    methods = {(t, s) for t in "SL" for s in ("ebn", "l2")} | {("R", "ebn")}
    assert found == {(*method, r) for method in methods for r in (4, 20, 40, 60, 100)}


def test_figure5_disturbs_as_long_as_printed():
    disturbed = [s.pruning for s in runs("figure5", "paper").values() if s.pruning]
    temporary = {(effect, k) for effect in ("zero", "gaussian", "gaussian-transient") for k in (0, 50, 1500, 1105)}
    temporary.remove(("gaussian-transient", 0))  # noise that is gone at once is none
    assert {(p.effect, p.batches) for p in disturbed} == {("remove-weights", 0)} | temporary
    assert {(p.target, p.score, p.retrain) for p in disturbed} == {("L", "l2", 40)}


def test_figure2_covers_all_deciles_of_weights_and_neurons():
    found = {(s.pruning.target, s.pruning.structure) for s in runs("figure2", "paper").values()}
    assert found == {(target, s) for target in [*(f"D{k}" for k in range(11)), "D9-remaining"] for s in ("weight", "filter")}
    assert all(s.pruning.layers == ("fc1",) for s in runs("figure2", "paper").values())


def test_figure_a1_measures_histograms():
    (spec,) = runs("figureA1", "paper").values()
    assert spec.model.name == "vgg19" and spec.measures == ("bn-histogram",) and spec.pruning is None


@pytest.mark.parametrize("profile", ["quarter", "mini"])
@pytest.mark.parametrize("figure", [f for f in EXPERIMENTS if f not in ("figureA1", "final-figureC3")])
def test_a_quarter_of_the_epochs_keeps_every_event(figure, profile):
    printed = runs(figure, "paper")
    for label, spec in runs(figure, profile).items():
        if spec.pruning:
            assert [len(e) for e in events(spec)] == [len(e) for e in events(printed[label])]
            assert spec.pruning.schedule.iterative_rate == printed[label].pruning.schedule.iterative_rate


def test_a_quarter_divides_the_epochs_between_events():
    quarter = runs("figure4", "quarter")
    assert [quarter[f"S r={r}"].pruning.retrain for r in (4, 20, 40, 60, 100)] == [1, 5, 10, 15, 25]
    assert quarter["none"].optimiser.epochs == 81 and quarter["none"].optimiser.milestones == (38, 75)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("figure", EXPERIMENTS)
def test_every_event_falls_into_training(figure, profile):
    for label, spec in runs(figure, profile).items():
        if spec.pruning:
            assert all((0 <= e[0] or label.endswith("scratch")) and e[-1] < spec.optimiser.epochs for e in events(spec))


@pytest.mark.parametrize(("divisor", "retrain", "expected"), [
    (1, 40, ((3, 4, 5, 6), (150, 150, 150, 275), 40)),
    (4, 40, ((1, 2, 3, 4), (37, 38, 39, 71), 10)),
    (4, 4, ((1, 2, 3, 4), (37, 38, 39, 71), 1)),
    (13, 4, ((0, 1, 2, 3), (11, 12, 13, 23), 1)),
])
def test_scaled_schedule(divisor, retrain, expected):
    assert scaled_schedule((3, 4, 5, 6), (150, 150, 150, 275), retrain, divisor) == expected


@pytest.mark.parametrize("profile", ["quarter", "mini"])
@pytest.mark.parametrize("figure", [f for f in EXPERIMENTS if f not in ("figure2", "figureA1", *SGD)])
def test_no_two_layers_are_struck_after_the_same_epoch_where_the_paper_s_are_not(figure, profile):
    for label, spec in runs(figure, profile).items():
        if spec.pruning and spec.pruning.retrain >= 5:
            struck = [epoch for layer in events(spec) for epoch in layer]
            assert len(struck) == len(set(struck)), label


@pytest.mark.parametrize(("profile", "label", "expected"), [
    ("paper", "zeroing 1500", 1500), ("paper", "gaussian 0", 0), ("quarter", "gaussian 1500", 1500),
    ("quarter", "zeroing 50", 50), ("mini", "zeroing 50", 50), ("mini", "gaussian 1500", 480),
    ("mini", "transient 1105", 480), ("smoke", "zeroing 50", 18), ("smoke", "gaussian 0", 0),
])
def test_a_noise_lasts_as_printed_or_three_quarters_of_the_time_between_events(profile, label, expected):
    spec = runs("figure5", profile)[label]
    assert spec.pruning.batches == expected
    if spec.data.train_size:
        assert expected <= 0.75 * spec.pruning.retrain * spec.data.train_size / spec.optimiser.batch_size


@pytest.mark.parametrize("figure", EXPERIMENTS)
@pytest.mark.parametrize("profile", ["smoke", "mini", "quarter"])
def test_batches_divide_the_images_at_reduced_profiles(figure, profile):
    for spec in runs(figure, profile).values():
        assert spec.data.train_size is None or spec.data.train_size % spec.optimiser.batch_size == 0
        assert spec.data.train_size or (profile, spec.model.name) == ("quarter", "conv4")  # which is the paper's own run


def test_mini_s_networks_have_sizes_of_their_own():
    vgg, conv4 = runs("figure1-vgg11", "mini")["none"], runs("figure2", "mini")["D0 weight"]
    assert (vgg.model.width, vgg.data.train_size, vgg.optimiser.batch_size, vgg.optimiser.epochs) == (0.5, 1024, 16, 81)
    assert vgg.optimiser.decay == pytest.approx(10**-0.5) and vgg.data.test_size == 4000
    assert (conv4.model.width, conv4.data.train_size, conv4.optimiser.epochs) == (0.5, 10240, 55)
    assert runs("figure2", "quarter") == runs("figure2", "paper")


@pytest.mark.parametrize("profile", PROFILES)
def test_every_figure_has_an_image_of_each_of_many_classes(profile):
    data = experiments.data_spec(experiments.profile(profile), "cifar100", "f" * 64, 100)
    for figure in EXPERIMENTS.values():
        assert all((run.spec.data.test_size or 100) >= 100 for run in figure.runs(experiments.profile(profile), data, [0]))


def test_data_spec_takes_the_profile_s_share():
    data = experiments.data_spec(experiments.profile("mini"), "cifar10-folder", "f" * 64, 7)
    assert data == DataSpec("cifar10-folder", "f" * 64, 7, 1024, 4000, False)


@pytest.mark.parametrize("device", CAMPAIGN)
def test_the_campaign_ends_with_every_figure_at_no_less_than_three_seeds(device):
    stages = CAMPAIGN[device]
    assert all(stage.figure in EXPERIMENTS and stage.profile in PROFILES for stage in stages)
    assert all(seeds >= 3 for seeds in {stage.figure: stage.seeds for stage in stages}.values())
    assert {stage.figure for stage in stages} == set(EXPERIMENTS) - {"figureA2"}  # which is drawn from Figure 1's runs
    assert {"cpu": "mini", "cuda": "quarter"}[device] == stages[0].profile and stages[0].figure == "figure1-vgg11"


@pytest.mark.parametrize("stage", [stage for stage in CAMPAIGN["cpu"] if stage.labels])
def test_a_stage_of_some_configurations_gives_three_seeds_of_all_that_a_claim_or_prediction_reads(stage):
    assert set(stage.labels) <= set(runs(stage.figure, stage.profile)) and stage.seeds >= 3
    read = [{label for labels in claim.needs[stage.figure].values() for label in labels}
            for claim in (*CLAIMS, *PREDICTIONS) if stage.figure in claim.needs]
    served = [labels for labels in read if labels <= set(stage.labels)]
    assert served and set().union(*served) | {"none"} >= set(stage.labels), "no configuration that none of them reads"


@pytest.mark.parametrize("figure", EXPERIMENTS)
def test_every_run_can_be_trained(figure):
    for spec in {(s.model, s.pruning and s.pruning.score, s.pruning and s.pruning.effect): s
                 for s in runs(figure, "smoke").values()}.values():
        train.check(spec)


@pytest.mark.parametrize(("text", "seeds"), [
    (3, [0, 1, 2]), ("3", [0, 1, 2]), (" 2 ", [0, 1]), ("2-5", [2, 3, 4, 5]), ("7-7", [7]), ("0,4,7", [0, 4, 7]),
    ("5,", [5]), ([3, 1], [3, 1]), (range(2), [0, 1]), ("0,0,1", [0, 1]), ([2, 2], [2]),
])
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


def test_a_number_of_seeds_counts_from_the_first():
    assert parse_seeds(3, 10) == parse_seeds("3", 10) == [10, 11, 12] and parse_seeds("0-1", 10) == [0, 1]


@pytest.mark.parametrize("text", [
    "", "0", 0, "-3", "x", "1.5", "5-2", "1-2-3", ",", "1,x", "-1,2", "3,-1", "2-", "1 2",
    "99999999999999999999", "0-99999999999999999999", "٣", "1_0", "+3",
])
def test_bad_seeds_are_refused(text):
    with pytest.raises(InputError, match="seeds"):
        parse_seeds(text)


def test_unknown_names_are_told_with_the_known_ones():
    with pytest.raises(InputError, match="figure9.*figure1-vgg11"):
        experiments.experiment("figure9")
    with pytest.raises(InputError, match="huge.*smoke, mini, quarter, paper"):
        experiments.profile("huge")


@pytest.mark.parametrize(("name", "epoch", "of"), [("smoke", 24, 25), ("mini", 79, 81), ("quarter", 79, 81), ("paper", 314, 325)])
def test_flatness_is_measured_in_vgg11_near_the_end_on_images_that_are_there(name, epoch, of):
    profile = experiments.profile(name)
    measured = [spec for spec in runs("final-figure2", name).values() if spec.measures]
    assert len(measured) == 6 and {spec.model.name for spec in measured} == {"vgg11"}
    for spec in measured:
        assert (spec.measures, spec.flatness_epoch, spec.optimiser.epochs) == (("flatness",), epoch, of)
        assert spec.flatness == profile.flatness
        assert (spec.data.test_size or 10_000) >= max(spec.flatness.images, 2 * spec.flatness.hessian_images)

import numpy as np
import pytest
import torch

from gstlib import models
from gstlib.errors import InputError
from gstlib.pruner import Pruner
from gstlib.pruning import TARGETS, Schedule, select

VGG11 = {"start": (3, 4, 5, 6), "end": (150, 150, 150, 275), "fraction": (0.3, 0.3, 0.3, 0.9)}
RESNET18 = {"start": (3, 4, 5, 6), "end": (150, 150, 170, 275), "fraction": (0.25, 0.4, 0.25, 0.95)}
FIGURE3 = {"start": (3, 4, 5, 6), "end": (150, 150, 150, 275), "fraction": (0.1, 0.1, 0.1, 0.9)}


def increments(schedule: Schedule, sizes, epochs: int):
    counts = [schedule.removed(sizes, epoch) for epoch in range(epochs)]
    steps = zip([[0] * len(sizes)] + counts, counts)
    return counts, [[b - a for a, b in zip(before, after)] for before, after in steps]


@pytest.mark.parametrize(("settings", "retrain", "events"), [
    (VGG11, 4, (37, 37, 37, 68)),
    (VGG11, 20, (8, 8, 8, 14)),
    (VGG11, 40, (4, 4, 4, 7)),
    (VGG11, 60, (3, 3, 3, 5)),
    (VGG11, 100, (2, 2, 2, 3)),
    (RESNET18, 4, (37, 37, 42, 68)),
    (RESNET18, 40, (4, 4, 5, 7)),
    (FIGURE3, 4, (37, 37, 37, 68)),
    (FIGURE3, 40, (4, 4, 4, 7)),
])
def test_number_of_events_of_each_layer(settings, retrain, events):
    schedule = Schedule(**settings, retrain=retrain)
    assert tuple(len(schedule.event_epochs(layer)) for layer in range(4)) == events
    for layer in range(4):
        epochs = schedule.event_epochs(layer)
        assert epochs[0] == settings["start"][layer] and epochs[-1] <= settings["end"][layer] < epochs[-1] + retrain


@pytest.mark.parametrize(("settings", "retrain", "rate"), [
    (VGG11, 4, 0.013), (VGG11, 40, 0.129), (VGG11, 60, 0.18), (VGG11, 100, 0.30),
    (RESNET18, 4, 0.014), (RESNET18, 40, 0.136),
])
def test_iterative_rate_as_the_legends_print_it(settings, retrain, rate):
    assert round(Schedule(**settings, retrain=retrain).iterative_rate, 3) == rate


def test_cumulative_counts_of_the_specification():
    schedule = Schedule(**VGG11, retrain=40)
    counts = [schedule.removed([512] * 4, epoch)[0] for epoch in (2, 3, 42, 43, 82, 83, 122, 123, 324)]
    assert counts == [0, 38, 38, 76, 76, 114, 114, 153, 153]


@pytest.mark.parametrize("settings", [VGG11, RESNET18, FIGURE3])
@pytest.mark.parametrize("retrain", [4, 20, 40, 60, 100])
@pytest.mark.parametrize("size", [512, 256, 32, 7])
def test_counts_change_at_events_alone_and_end_at_the_total(settings, retrain, size):
    schedule = Schedule(**settings, retrain=retrain)
    counts, steps = increments(schedule, [size] * 4, 325)
    for layer in range(4):
        events = list(schedule.event_epochs(layer))
        taken = [step[layer] for step in steps]
        assert all(epoch in events for epoch, k in enumerate(taken) if k)
        assert min(taken) == 0 and max(taken[e] for e in events) - min(taken[e] for e in events) <= 1
    # in whole hundredths, so that the expectation does not depend on binary fractions
    assert counts[-1] == [round(100 * p) * size // 100 for p in settings["fraction"]]


def test_event_i_of_n_leaves_the_floor_of_its_share():
    schedule = Schedule(2, 30, 0.37, 5)
    events = list(schedule.event_epochs(0))
    assert events == [2, 7, 12, 17, 22, 27]
    for i, epoch in enumerate(events, start=1):
        assert schedule.removed([100], epoch) == [37 * i // 6]


def test_figure2_removes_a_tenth_in_seventeen_events():
    schedule = Schedule((4,), (52,), (0.1,), 3)
    assert len(schedule.event_epochs(0)) == 17 and schedule.event_epochs(0)[-1] == 52
    assert schedule.removed([512], 51) == [48] and schedule.removed([512], 52) == [51]
    assert schedule.removed([2304 * 512], 52) == [117_964]


def test_one_shot_takes_everything_at_once():
    schedule = Schedule((246,) * 4, (246,) * 4, (0.1, 0.1, 0.1, 0.9), 1)
    assert schedule.removed([512] * 4, 245) == [0, 0, 0, 0]
    assert schedule.removed([512] * 4, 246) == [51, 51, 51, 460]
    assert [epoch for epoch in range(325) if schedule.struck(epoch)] == [246]
    assert schedule.iterative_rate == 0.9


@pytest.mark.parametrize(("fraction", "size", "total"), [
    (0.29, 100, 29), (0.3, 10, 3), (0.57, 100, 57), (0.0, 512, 0), (1.0, 512, 512), (0.9, 512, 460), (0.95, 512, 486),
])
def test_total_is_the_floor_of_the_decimal_product(fraction, size, total):
    assert Schedule(0, 9, fraction, 3).removed([size], 9) == [total]


def test_struck_counts_the_layers_that_have_an_event():
    schedule = Schedule((1, 4), (7, 9), (0.5, 0.5), 3)
    assert {epoch: n for epoch in range(12) if (n := schedule.struck(epoch))} == {1: 1, 4: 2, 7: 2}


def test_before_the_first_epoch_nothing_is_removed():
    assert Schedule(0, 3, 0.5, 1).removed([8], -1) == [0]


@pytest.mark.parametrize("fields", [
    {"fraction": 1.1}, {"fraction": -0.1}, {"fraction": float("nan")}, {"end": 1}, {"start": -1}, {"retrain": 0},
    {"retrain": -2}, {"start": (2, 3)}, {"fraction": (0.1, 0.2)}, {"start": (), "end": (), "fraction": ()},
])
def test_schedule_refuses(fields):
    with pytest.raises(InputError):
        Schedule(**{"start": 2, "end": 9, "fraction": 0.5, "retrain": 1, **fields})


@pytest.mark.parametrize("numbers", [
    (np.array([0, 1]), np.array([4, 4]), np.array([0.5, 0.25]), 2), ([0.0, 1.0], (4, 4.0), [0.5, 0.25], 2.0),
    (range(2), torch.tensor([4, 4]), torch.tensor([0.5, 0.25]), np.int64(2)),
])
def test_schedules_take_whole_numbers_of_every_kind(numbers):
    schedule = Schedule(*numbers)
    assert schedule == Schedule((0, 1), (4, 4), (0.5, 0.25), 2)
    assert {type(n) for n in (*schedule.start, *schedule.end, schedule.retrain)} == {int}
    assert Schedule(np.int64(0), np.array(4), np.float64(0.5), 1.0) == Schedule(0, 4, 0.5, 1)


@pytest.mark.parametrize("numbers", [
    (0, 10, 0.5, 2.5), (0.5, 10, 0.5, 1), (0, float("inf"), 0.5, 1), (True, 10, 0.5, 1), (0, 1, True, 1), (0, 1, "0.5", 1),
    ("0", "1", 0.5, 1), (None, 1, 0.5, 1), ([[0]], [1], [0.5], 1), (0, 1, 0.5, np.nan), (0, 1, 0.5, None), (0, 1, 0.5, [1]),
])
def test_schedules_refuse_what_is_no_number_of_the_kind(numbers):
    with pytest.raises(InputError, match="must be a (whole )?number"):
        Schedule(*numbers)


def test_removed_refuses_another_number_of_layers():
    with pytest.raises(InputError, match="2 layers, but 1 sizes"):
        Schedule((0, 0), (1, 1), (0.5, 0.5), 1).removed([8], 0)


@pytest.mark.parametrize(("model", "settings", "shortcut", "percent"), [
    ("vgg11", VGG11, False, 42.2),
    ("resnet18", RESNET18, False, 36.4),
    ("resnet18", {**RESNET18, "fraction": (0.25, 0.8, 0.25, 0.95)}, False, 44.9),
    ("resnet18", {**RESNET18, "fraction": (0.25, 0.8, 0.25, 0.95)}, True, 45.8),
])
def test_share_of_the_network_that_is_removed(model, settings, shortcut, percent):
    """Own weights of the removed filters; with the shortcut, also the rows of the projection that feeds their sums."""
    net = models.build(model)
    total = sum(p.numel() for p in net.parameters())
    pruner = Pruner(net, schedule := Schedule(**settings, retrain=100))
    for epoch in (e for e in range(325) if schedule.struck(e)):
        pruner.epoch(epoch, lambda: 0.0)
    sizes = [layer.parameter[0].numel() for layer in pruner.layers]
    removed = sum(layer.gone * layer.parameter[0].numel() for layer in pruner.layers)
    if shortcut:
        block = net.get_submodule("stage4.0")
        row = block.shortcut.conv.weight[0].numel()
        removed += int((block.silent_units > 0).sum()) * row
        sizes[1] += row
    # the printed shares are p times the layer; what goes is less by the part of a filter that floor(512 p) drops
    printed = sum(512 * p * size for p, size in zip(settings["fraction"], sizes))
    assert round(100 * printed / total, 1) == percent
    assert removed == sum(int(512 * p) * size for p, size in zip(settings["fraction"], sizes))
    assert abs(100 * removed / total - percent) < 0.2


@pytest.mark.parametrize("structure", ["filter", "weight"])
def test_conv4_loses_a_tenth_of_its_largest_layer(structure):
    net = models.build("conv4")
    pruner = Pruner(net, Schedule(4, 52, 0.1, 48), ["fc1"], score="l2" if structure == "filter" else "ebn",
                    structure=structure, target="D3")
    for epoch in (4, 52):
        pruner.epoch(epoch, lambda: 0.0)
    biases = 51 if structure == "filter" else 0
    assert pruner.parameters_removed() == (51 * 2304 if structure == "filter" else 117_964) + biases
    assert net.fc1.weight.numel() > 0.9 * 1_250_858


def expected_choice(values: list[float], present: list[bool], k: int, target: str) -> set[int]:
    order = sorted((i for i, alive in enumerate(present) if alive), key=lambda i: (values[i], i))
    n = len(order)
    if target in ("L", "D10"):
        begin = n - k
    else:
        starts = {"S": 0, "D9-remaining": n * 9 // 10} | {f"D{d}": len(values) * d // 10 for d in range(10)}
        begin = min(starts[target], n - k)
    return set(order[begin:begin + k])


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "R"])
@pytest.mark.parametrize("ties", [False, True])
def test_select_agrees_with_sorting(target, ties):
    generator = torch.Generator().manual_seed(3)
    for n in (1, 7, 20, 53):
        scores = torch.randn(n, generator=generator)
        if ties:
            scores = (scores * 2).round()
        present = torch.rand(n, generator=generator) < 0.7
        present[0] = True
        for k in {0, 1, int(present.sum()) // 3, int(present.sum())}:
            taken = select(scores, present, k, target)
            assert taken.dtype == torch.bool and taken.shape == scores.shape
            expected = expected_choice(scores.tolist(), present.tolist(), k, target)
            assert set(taken.nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scores", [torch.zeros(40), torch.arange(40.0), torch.arange(40.0) // 7])
def test_select_takes_exactly_k_of_those_present(target, scores):
    present = torch.ones(40, dtype=torch.bool)
    present[::3] = False
    for k in range(int(present.sum()) + 1):
        taken = select(scores, present, k, target)
        assert int(taken.sum()) == k and not (taken & ~present).any()


@pytest.mark.parametrize(("target", "ranks"), [
    ("S", [0, 1, 2]), ("L", [97, 98, 99]), ("D0", [0, 1, 2]), ("D1", [10, 11, 12]), ("D5", [50, 51, 52]),
    ("D9", [90, 91, 92]), ("D10", [97, 98, 99]),
])
def test_select_takes_the_ranks_of_its_target(target, ranks):
    scores = torch.arange(100.0)[torch.randperm(100)]
    taken = select(scores, torch.ones(100, dtype=torch.bool), 3, target)
    assert sorted(scores[taken].tolist()) == ranks


def test_deciles_are_those_of_the_original_units():
    scores, present = torch.arange(100.0), torch.ones(100, dtype=torch.bool)
    present[:20] = False
    assert select(scores, present, 2, "D5").nonzero().flatten().tolist() == [70, 71]
    assert select(scores, present, 2, "D9-remaining").nonzero().flatten().tolist() == [92, 93]
    assert select(scores, present, 2, "D10").nonzero().flatten().tolist() == [98, 99]


def taken_by_17_events(target, size=1000, total=100):
    """Ranks removed by Figure 2's schedule, 17 events and ten per cent in all, from a layer that does not train."""
    scores, present = torch.randn(size, generator=torch.Generator().manual_seed(1)), torch.ones(size, dtype=torch.bool)
    schedule = Schedule(4, 52, total / size, 3)
    assert len(schedule.event_epochs(0)) == 17
    for epoch in schedule.event_epochs(0):
        k = schedule.removed([size], epoch)[0] - int((~present).sum())
        present &= ~select(scores, present, k, target)
    return sorted(scores.argsort().argsort()[~present].tolist())


@pytest.mark.parametrize("k", range(10))
def test_ten_per_cent_by_17_events_remove_just_the_decile(k):
    assert taken_by_17_events(f"D{k}") == list(range(100 * k, 100 * k + 100))


def test_d9_and_d10_remove_the_same_units_by_17_events_and_the_other_reading_others():
    assert taken_by_17_events("D9") == taken_by_17_events("D10")
    drifted = taken_by_17_events("D9-remaining")
    assert sum(rank >= 900 for rank in drifted) < 50 and len(drifted) == 100


def test_a_window_past_the_largest_ends_there():
    taken = select(torch.arange(100.0), torch.ones(100, dtype=torch.bool), 15, "D9")
    assert taken.nonzero().flatten().tolist() == list(range(85, 100))


def test_d9_and_d10_meet_when_the_whole_decile_goes():
    scores, present = torch.randn(60), torch.ones(60, dtype=torch.bool)
    assert torch.equal(select(scores, present, 6, "D9"), select(scores, present, 6, "D10"))
    assert not torch.equal(select(scores, present, 5, "D9"), select(scores, present, 5, "D10"))


def test_equal_scores_go_by_index():
    scores, present = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]), torch.ones(5, dtype=torch.bool)
    assert select(scores, present, 3, "S").tolist() == [True, True, False, True, False]
    assert select(scores, present, 2, "L").tolist() == [False, False, True, False, True]


def test_select_works_on_single_weights():
    scores = torch.tensor([[3.0, 1.0], [0.5, 2.0]])
    assert select(scores, torch.ones(2, 2, dtype=torch.bool), 2, "S").tolist() == [[False, True], [True, False]]


def test_random_choice_follows_its_generator():
    scores, present = torch.arange(50.0), torch.ones(50, dtype=torch.bool)

    def draw(seed):
        return select(scores, present, 10, "R", torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    draw(1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_random_choice_ignores_scores_and_covers_all():
    present = torch.ones(20, dtype=torch.bool)
    present[:4] = False
    generator = torch.Generator().manual_seed(0)
    hits = sum(select(torch.arange(20.0), present, 4, "R", generator).long() for _ in range(2000))
    assert hits[:4].sum() == 0
    assert ((hits[4:] - 500).abs() < 5 * (2000 * 0.25 * 0.75) ** 0.5).all()


def test_absent_units_may_have_any_score():
    scores = torch.tensor([float("nan"), 2.0, 1.0, float("inf")])
    present = torch.tensor([False, True, True, False])
    assert select(scores, present, 1, "S").tolist() == [False, False, True, False]


@pytest.mark.parametrize("bad", [
    {"target": "T"}, {"target": "D11"}, {"target": "D-1"}, {"target": "s"}, {"k": 5}, {"k": -1},
    {"scores": torch.zeros(3)}, {"scores": torch.tensor([0.0, float("nan"), 1.0, 2.0])},
    {"scores": torch.tensor([0.0, float("inf"), 1.0, 2.0])}, {"present": torch.zeros(4, dtype=torch.bool)},
])
def test_select_refuses(bad):
    good = {"scores": torch.arange(4.0), "present": torch.ones(4, dtype=torch.bool), "k": 2, "target": "S"}
    with pytest.raises(InputError):
        select(**{**good, **bad})


def test_select_changes_nothing_it_was_given():
    scores, present = torch.randn(9), torch.ones(9, dtype=torch.bool)
    before = scores.clone(), present.clone()
    select(scores, present, 4, "L")
    assert torch.equal(scores, before[0]) and torch.equal(present, before[1])

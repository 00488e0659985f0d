"""Training labels replaced at random, or smoothed: what is changed, what is not, and what the rows say of it."""

import dataclasses

import pytest
import torch

from gstlib import experiments
from gstlib.data import Loader, mislabelled
from gstlib.errors import InputError
from gstlib.spec import DataSpec, ModelSpec, OptimiserSpec, PruningSpec
from gstlib.store import Store
from gstlib.training import train
from gstlib.training.engine import Replica, train_pass

STRUCK = PruningSpec(("conv5", "conv7", "conv8"), (0, 1, 1), (1, 1, 1), (0.5, 0.5, 0.0), 1, "L")


@pytest.fixture(scope="module")
def trained(digits, tiny_spec):
    spec = tiny_spec(pruning=STRUCK, data=DataSpec(*digits.known, train_size=64, test_size=40, wrong_labels=0.3))
    return spec, train.train(spec, digits)


def test_as_many_labels_are_replaced_as_asked_each_by_any_other_class():
    y = torch.arange(30_000) % 10
    labels, wrong = mislabelled(y, 0.2, 10, seed=3)
    assert int(wrong.sum()) == 6_000 and torch.equal(labels != y, wrong)
    shifts = torch.bincount((labels - y)[wrong] % 10, minlength=10)
    assert shifts[0] == 0 and shifts[1:].min() > 550 and shifts[1:].max() < 790  # 667, binomial
    assert set(labels.tolist()) == set(range(10)) and torch.equal(y, torch.arange(30_000) % 10)


def test_the_draw_is_that_of_its_seed():
    y = torch.arange(640) % 10
    first, again, other = (mislabelled(y, 0.5, 10, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("share", "number"), [(1e-9, 1), (0.999, 9), (0.26, 3)])
def test_some_labels_are_wrong_and_some_are_true_whatever_the_share(share, number):
    assert int(mislabelled(torch.arange(10) % 2, share, 2, 0)[1].sum()) == number


def test_runs_of_one_seed_share_their_wrong_labels_and_test_labels_stay(digits, tiny_spec):
    data = DataSpec(*digits.known, train_size=64, test_size=40, wrong_labels=0.3)
    images = digits.subset(data)

    def labels(**fields):
        return train.Run(tiny_spec(data=data, **fields), images, torch.device("cpu")).replica.loader

    plain, pruned, other = labels(), labels(pruning=STRUCK), labels(seed=1)
    assert torch.equal(plain.y, pruned.y) and not torch.equal(plain.y, other.y)
    assert int((plain.y != images.train_y).sum()) == 19  # of 64
    assert torch.equal(plain.test_y, images.test_y) and torch.equal(plain.x, images.train_x)


def test_rows_tell_true_labels_from_wrong_ones(trained):
    _, result = trained
    (final,), events = result.tables["final"], result.tables["event"]
    assert 64 * final["train_accuracy"] == pytest.approx(45 * final["train_true"] + 19 * final["train_wrong"])
    for one, after in zip(events[1:], events[2:]):  # struck after one epoch, one after the other
        assert all(one[f"train_{kind}_post"] == after[f"train_{kind}_pre"] for kind in ("true", "wrong"))
    idle = [event for event in events if not event["removed"]]
    assert len(idle) == 1 and idle[0]["train_true_pre"] == idle[0]["train_true_post"]
    assert idle[0]["train_wrong_pre"] == idle[0]["train_wrong_post"]
    # nothing is trained after the last event
    assert all(events[-1][f"train_{kind}_post"] == final[f"train_{kind}"] for kind in ("true", "wrong"))
    assert any(event[f"train_{kind}_pre"] != event[f"train_{kind}_post"] for event in events for kind in ("true", "wrong"))


def test_measuring_labels_changes_nothing_else(trained, digits, monkeypatch):
    spec, result = trained
    monkeypatch.setattr(train.Run, "fitted", lambda self: {})
    blind = train.train(spec, digits)
    for table in ("epoch", "event", "final"):
        for seen, unseen in zip(result.tables[table], blind.tables[table], strict=True):
            assert {name: seen[name] for name in unseen if name != "seconds"} == pytest.approx(
                {name: value for name, value in unseen.items() if name != "seconds"}, abs=0, nan_ok=True)


def test_without_wrong_labels_no_row_speaks_of_them(digits, tiny_spec):
    tables = train.train(tiny_spec(pruning=STRUCK), digits).tables
    assert not [name for rows in (tables["event"], tables["final"]) for name in rows[0] if "true" in name or "wrong" in name]


def test_such_a_run_is_stored_and_refused_without_its_columns(trained, tmp_path):
    spec, result = trained
    store = Store(tmp_path)
    for table in ("event", "final"):
        lacking = result.tables | {table: [{name: value for name, value in row.items() if "wrong" not in name}
                                           for row in result.tables[table]]}
        with pytest.raises(InputError, match=f"{table} rows lack train_wrong"):
            store.write(spec, result.provenance, lacking)
    store.write(spec, result.provenance, result.tables)
    assert store.read(spec.id).tables["final"]["train_wrong"][0] == result.tables["final"][0]["train_wrong"]


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan")])
def test_a_share_outside_its_bounds_is_refused(share):
    with pytest.raises(InputError, match="wrong_labels"):
        DataSpec("digits", "f" * 64, wrong_labels=share)
    with pytest.raises(InputError, match="label_smoothing"):
        OptimiserSpec(label_smoothing=share)


def test_smoothed_labels_are_trained_on_and_not_measured_by(digits):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    loaders = [Loader(digits, 32, augment=False, seed=0, device=torch.device("cpu"), channels_last=False) for _ in range(2)]
    plain, smoothed = (Replica(model, OptimiserSpec(label_smoothing=share), loader)
                       for share, loader in zip((0.0, 0.1), loaders))
    x, y = loaders[0].normalise(digits.train_x[:32]), digits.train_y[:32]
    logs = torch.log_softmax(model(x), 1)
    entropy = -logs[range(32), y].mean().item()
    by_hand = 0.9 * entropy - 0.1 * logs.mean().item()
    for replica, expected in ((plain, entropy), (smoothed, by_hand)):  # before an epoch begins the order is the set's own
        assert replica.run(train_pass, 32).item() == pytest.approx(expected, rel=1e-5)
        assert replica.measure(digits.train_x[:32], y).loss == pytest.approx(entropy, rel=1e-5)


def test_e_bn_is_refused_where_there_is_group_normalisation_and_l2_is_not(tiny_spec):
    layers = ("conv3", "conv4", "conv5", "conv6")
    pruning = PruningSpec(layers, (0,) * 4, (1,) * 4, (0.3,) * 4, 1, "L")
    spec = tiny_spec(model=ModelSpec("conv6-gn", 1 / 8), pruning=pruning)
    with pytest.raises(InputError, match="followed by batch normalisation|E\\[BN\\] is undefined"):
        train.check(spec)
    train.check(dataclasses.replace(spec, pruning=dataclasses.replace(pruning, score="l2")))


@pytest.mark.parametrize("name", ["beyond-labels", "beyond-regularisers"])
def test_runs_that_differ_in_what_is_varied_here_may_not_share_a_lockstep_group_unless_they_can(name):
    size = experiments.profile("smoke")
    runs = experiments.experiment(name).runs(size, experiments.data_spec(size, "digits", "f" * 64), [0])
    shapes = {run.label: train.shape(run.spec) for run in runs}
    apart = {"beyond-labels": ("none", "none, 20% wrong"), "beyond-regularisers": ("none", "none, SGD")}[name]
    assert shapes[apart[0]] != shapes[apart[1]]

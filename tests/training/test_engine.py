import dataclasses

import pandas as pd
import pytest
import torch

from gstlib.data import Loader
from gstlib.errors import InputError
from gstlib.models import build
from gstlib.spec import DataSpec, OptimiserSpec, PruningSpec
from gstlib.training import train
from gstlib.training.engine import Engine, Replica, pick_device

PRUNING = PruningSpec(("conv7", "conv8"), (0, 0), (1, 1), (0.5, 0.5), 1, target="L")


def rows(result, table):
    return pd.DataFrame(result.tables[table]).drop(columns="seconds", errors="ignore")


def replica(digits, batch_size=32, precision="float32", size=64, device="cpu", name="adam"):
    images = digits.subset(DataSpec(*digits.known, train_size=size, test_size=40))
    loader = Loader(images, batch_size, False, 0, torch.device(device), False)
    spec = OptimiserSpec(name=name, momentum=0.9 if name == "sgd" else 0.0, epochs=2, batch_size=batch_size, milestones=(1,))
    torch.manual_seed(0)
    return Replica(build("vgg11", 10, 1 / 16).to(device), spec, loader, precision)


def test_rows_do_not_depend_on_company(digits, tiny_spec):
    company = [
        tiny_spec(),
        tiny_spec(pruning=PRUNING, seed=1),
        tiny_spec(pruning=dataclasses.replace(PRUNING, effect="gaussian", batches=3), seed=2),
        tiny_spec(pruning=dataclasses.replace(PRUNING, target="R", effect="zero", batches=2), seed=1),
    ]
    together = train.train_group(company, digits)
    for spec, result in zip(company, together):
        alone = train.train(spec, digits)
        for table in ("epoch", "event"):
            pd.testing.assert_frame_equal(rows(result, table), rows(alone, table), check_exact=True)
    assert together[0].provenance["replicas"] == 4


@pytest.mark.parametrize("change", [
    {"precision": "bf16"}, {"channels_last": True}, {"optimiser": OptimiserSpec(epochs=3, batch_size=32)},
    {"optimiser": OptimiserSpec(epochs=2, batch_size=16)}, {"optimiser": OptimiserSpec(name="sgd", epochs=2, batch_size=32)},
])
def test_group_of_different_shapes_is_refused_by_name(digits, tiny_spec, change):
    one, other = tiny_spec(), tiny_spec(**change)
    with pytest.raises(InputError, match=f"{one.id}.*{other.id}.*lockstep"):
        train.train_group([one, other], digits)


@pytest.mark.parametrize("what, other", [("batch size", {"batch_size": 16}), ("precision", {"precision": "bf16"}),
                                         ("training images", {"size": 50})])
def test_engine_names_what_replicas_differ_in(digits, what, other):
    with pytest.raises(InputError, match=what):
        Engine([replica(digits), replica(digits, **other)])


def test_learning_rate_falls_at_milestones(digits):
    one = replica(digits)
    assert [one.learning_rate(epoch) for epoch in (0, 1, 2)] == pytest.approx([1e-3, 1e-4, 1e-4])
    one.begin_epoch(1)
    assert one.optimiser.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_epoch_equals_a_plain_loop(digits):
    engine = Engine([replica(digits, size=72)])
    measured = engine.train_epoch(0)[0]
    plain = replica(digits, size=72)
    plain.model.train()
    order = torch.randperm(72, generator=torch.Generator().manual_seed(0))
    loss_sum, right = 0.0, 0
    for chosen in order.split(32):
        x, y = plain.loader.normalise(plain.loader.x[chosen]), plain.loader.y[chosen]
        plain.optimiser.zero_grad()
        logits = plain.model(x)
        loss = torch.nn.functional.cross_entropy(logits, y)
        loss.backward()
        plain.optimiser.step()
        loss_sum += loss.item() * len(y)
        right += (logits.argmax(1) == y).sum().item()
    assert measured.loss == pytest.approx(loss_sum / 72, rel=1e-6)
    assert measured.accuracy == pytest.approx(right / 72)
    for ours, theirs in zip(engine.replicas[0].model.state_dict().values(), plain.model.state_dict().values()):
        assert torch.equal(ours, theirs)


def test_a_test_changes_nothing_that_is_learned(digits):
    engine = Engine([replica(digits)])
    engine.train_epoch(0)
    before = {name: value.clone() for name, value in engine.replicas[0].model.state_dict().items()}
    first, second = engine.test(), engine.test()
    assert first == second
    for name, value in engine.replicas[0].model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bf16_is_close_to_float32(digits):
    losses = [Engine([replica(digits, precision=precision)]).train_epoch(0)[0].loss for precision in ("float32", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps"])
def test_devices_that_are_not_there(name):
    with pytest.raises(InputError, match="device"):
        pick_device(name)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_captured_steps_equal_eager_ones(digits, name):
    results = []
    for capture in (False, True):
        engine = Engine([replica(digits, size=72, device="cuda", name=name) for _ in range(2)], capture=capture)
        measured = [engine.train_epoch(epoch) for epoch in range(2)]
        results.append([(m.loss, m.accuracy) for pair in measured for m in pair] + [engine.test(1).loss])
    for place, (eager, captured) in enumerate(zip(*results)):
        assert captured == pytest.approx(eager, rel=1e-3 if place < 2 else 5e-2)


@pytest.mark.cuda
def test_masks_rewritten_in_place_reach_the_captured_graph(digits, tiny_spec):
    spec = tiny_spec(pruning=PRUNING)
    on_gpu, on_cpu = (train.train(spec, digits, device) for device in ("cuda", "cpu"))
    assert rows(on_gpu, "event")["removed_total"].tolist() == rows(on_cpu, "event")["removed_total"].tolist()
    # the first epoch differs by rounding, which Adam makes larger afterwards
    for epoch, tolerance in ((0, 1e-3), (1, 5e-2)):
        losses = [rows(one, "epoch")["train_loss"][epoch] for one in (on_gpu, on_cpu)]
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)

"""What the final version adds to pruning: an event before training, the activation score, zeroing that is taken back."""

import pytest
import torch
from torch import nn

from gstlib import Pruner, Schedule, models
from gstlib.errors import InputError

PARTS = ("weight", "bias", "running_mean", "running_var")


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Flatten(), nn.Linear(360, 3))
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    nn.init.normal_(model[1].bias)
    return model


def stored(model, units) -> list[torch.Tensor]:
    """Everything that the convolution and its norm have of `units`, as a plain checkpoint would."""
    state = model.state_dict()
    return [state[f"{module}.{part}"][units].clone() for module in (0, 1) for part in PARTS if f"{module}.{part}" in state]


def train(model, optimiser, pruner, batches, size=8):
    model.train()
    for _ in range(batches):
        optimiser.zero_grad()
        x = torch.randn(16, 3, size, size)
        nn.functional.cross_entropy(model(x), torch.randint(0, 3, (16,))).backward()
        optimiser.step()
        pruner.batch()


def silent(model) -> torch.Tensor:
    """Which filters give the same number everywhere, whatever the image."""
    y = model[0](torch.randn(4, 3, 8, 8)).detach()
    return (y - y.mean((0, 2, 3), keepdim=True)).abs().amax((0, 2, 3)) < 1e-6


@pytest.mark.parametrize("optimiser", [lambda p: torch.optim.Adam(p, 0.01),
                                       lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=0.01)], ids=["adam", "sgd"])
def test_cumulative_zeroing_holds_all_units_so_far_and_gives_back_all_they_had(optimiser):
    model = net()
    pruner = Pruner(model, Schedule(0, 4, 0.6, 2), ["0"], score="l2", effect="zero-cumulative", target="L", batches=5)
    steps = optimiser(model.parameters())
    for event, gone in ((0, 2), (2, 4), (4, 6)):
        train(model, steps, pruner, 3)
        at_once = {}
        units = pruner.epoch(event, lambda: at_once.update(before=stored(model, slice(None))) or 0.5
                             if not at_once else 0.5) and ~pruner.layers[0].present
        assert int(units.sum()) == gone and torch.equal(silent(model), units)
        train(model, steps, pruner, 4)
        assert torch.equal(silent(model), units)
        train(model, steps, pruner, 1)
        assert not silent(model).any()
        for now, then in zip(stored(model, slice(None)), at_once["before"], strict=True):
            assert torch.equal(now[units], then[units])
            assert not torch.equal(now[~units], then[~units])
        train(model, steps, pruner, 1)
        assert not torch.equal(stored(model, units)[0], at_once["before"][0][units]), "they train on"


def test_cumulative_zeroing_outlasts_the_next_event_and_gives_back_what_the_first_one_found():
    model = net()
    pruner = Pruner(model, Schedule(0, 1, 0.6, 1), ["0"], "l2", "L", "zero-cumulative", batches=5)
    steps = torch.optim.Adam(model.parameters(), 0.01)
    train(model, steps, pruner, 2)
    whole = stored(model, slice(None))
    pruner.epoch(0, lambda: 0.5)
    first = ~pruner.layers[0].present
    train(model, steps, pruner, 3)
    during = {name: value.clone() for name, value in model.state_dict().items()}
    answers = iter([0.5])
    with pytest.raises(StopIteration):  # the strike is undone
        pruner.epoch(1, lambda: next(answers))
    assert all(torch.equal(during[name], value) for name, value in model.state_dict().items())
    before = stored(model, slice(None))
    pruner.epoch(1, lambda: 0.5)
    both = ~pruner.layers[0].present
    train(model, steps, pruner, 4)
    assert torch.equal(silent(model), both), "the first ones are held as long as the others"
    train(model, steps, pruner, 1)
    assert not silent(model).any()
    for now, then, at_first in zip(stored(model, slice(None)), before, whole, strict=True):
        assert torch.equal(now[first], at_first[first])
        assert torch.equal(now[both & ~first], then[both & ~first])


def test_cumulative_zeroing_goes_on_from_a_checkpoint():
    ends = []
    for cut in (False, True):
        torch.manual_seed(0)
        model = net()
        arguments = {"layers": ["0"], "score": "l2", "effect": "zero-cumulative", "batches": 6}
        pruner = Pruner(model, Schedule(0, 2, 0.6, 2), **arguments)
        train(model, torch.optim.SGD(model.parameters(), 0.05), pruner, 2)
        pruner.epoch(0, lambda: 0.5)
        train(model, torch.optim.SGD(model.parameters(), 0.05), pruner, 3)
        if cut:
            states, generator = (model.state_dict(), pruner.state_dict()), torch.get_rng_state()
            model = net()
            pruner = Pruner(model, Schedule(0, 2, 0.6, 2), **arguments)
            torch.set_rng_state(generator)
            model.load_state_dict(states[0])
            pruner.load_state_dict(states[1])
        train(model, torch.optim.SGD(model.parameters(), 0.05), pruner, 5)
        ends.append(stored(model, slice(None)))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(("layer", "speaks"), [("stage4.1.conv2", "stage4.1"), ("stage4.0.conv1", "stage4.0.bn1")])
def test_the_activation_score_is_the_running_mean_of_every_tenth_batch(layer, speaks):
    model = models.build("resnet18", 3, 1 / 16)
    pruner = Pruner(model, Schedule(0, 2, 0.4, 2), [layer], score="activation")
    seen = []
    model.get_submodule(speaks).register_forward_hook(lambda m, _, y: seen.append(y.detach().clamp(min=0).sum((0, 2, 3))))
    steps = torch.optim.SGD(model.parameters(), 0.01)
    train(model, steps, pruner, 34, 32)
    model.eval()(torch.randn(40, 3, 32, 32))  # a test is no training batch
    expected = torch.zeros(32)
    for number in (10, 20, 30):
        expected = 0.9 * expected + 0.1 * seen[number - 1]
    (row,) = pruner.epoch(0, lambda: 0.5)
    lowest = expected.argsort()[:row["removed"]]
    assert row["removed"] == 6 and row["mean_score"] == pytest.approx(float(expected[lowest].mean()), rel=1e-5)
    assert torch.equal((~pruner.layers[0].present).nonzero().squeeze(1), lowest.sort().values)
    train(model, steps, pruner, 6, 32)  # the 40th: what is removed is silent
    expected = 0.9 * expected + 0.1 * seen[-1]
    assert seen[-1][lowest].abs().max() == 0
    (row,) = pruner.epoch(2, lambda: 0.5)
    assert row["decile_9"] == pytest.approx(float(expected[~torch.isin(torch.arange(32), lowest)].sort().values[23:].mean()),
                                            rel=1e-5)


def test_what_the_activation_score_keeps_leaves_no_trace():
    model = models.build("resnet18", 3, 1 / 16)
    plain, hooks = set(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    pruner = Pruner(model, Schedule((0, 0), (0, 0), (0.4, 0.4), 1), ["stage4.0.conv2", "stage4.0.shortcut.conv"], score="activation")
    assert sum("active_units" in name for name in model.state_dict()) == 1, "one sum, one mean"
    train(model, torch.optim.SGD(model.parameters(), 0.01), pruner, 12, 32)
    pruner.epoch(0, lambda: 0.5)
    pruner.finish()
    assert set(model.state_dict()) == plain and [len(m._forward_hooks) for m in model.modules()] == hooks


def test_scratch_is_one_event_before_the_first_step():
    schedule = Schedule((3, 4), (9, 9), (0.3, 0.5), 2, scratch=True)
    assert [list(schedule.event_epochs(i)) for i in (0, 1)] == [[-1], [-1]]
    assert schedule.removed([10, 10], -1) == schedule.removed([10, 10], 99) == [3, 5]
    assert schedule.struck(-1) and not any(map(schedule.struck, range(20))) and schedule.iterative_rate == 0.5
    model = net()
    lowest = model[0].weight.detach().flatten(1).norm(dim=1).argsort()[:3]
    pruner = Pruner(model, Schedule(0, 0, 0.3, 1, scratch=True), ["0"], score="l2")
    (row,) = pruner.epoch(-1, lambda: 0.1)
    assert (row["epoch"], row["removed"], row["removed_total"]) == (-1, 3, 3)
    y = model.eval()[:2](torch.randn(4, 3, 8, 8)).abs().amax((0, 2, 3))
    assert torch.equal((y == 0).nonzero().squeeze(1), lowest.sort().values)
    assert pruner.epoch(0, lambda: 0.1) == [], "nothing is left to do"


def test_a_schedule_without_scratch_has_nothing_before_the_first_step():
    model = net()
    assert Pruner(model, Schedule(0, 4, 0.6, 2), ["0"], score="l2").epoch(-1, lambda: 1 / 0) == []


def test_there_is_no_activation_before_training():
    with pytest.raises(InputError, match="activation"):
        Pruner(net(), Schedule(0, 0, 0.3, 1, scratch=True), ["0"], score="activation")


class Channels(nn.Module):
    """A convolution whose norm reads its channels last, or shuffled."""

    def __init__(self, width: int, shuffled: bool):
        super().__init__()
        self.conv, self.shuffle = nn.Conv2d(3, width, 3, padding=1), nn.ChannelShuffle(2)
        self.fc = nn.Linear(width, 3)
        self.norm = nn.BatchNorm2d(width) if shuffled else nn.LayerNorm(width)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.shuffled = shuffled

    def forward(self, x):
        if self.shuffled:
            return self.fc(self.norm(self.shuffle(self.conv(x))).mean((2, 3)))
        return self.fc(self.norm(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))


class Tokens(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body, self.head = nn.Linear(3 * 8, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x.permute(0, 2, 1, 3).flatten(2)).relu()).mean(1)


class Swish(nn.Module):
    def __init__(self):
        super().__init__()
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return x * self.sigmoid(x)


def test_the_activation_score_is_no_gate_s():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), Swish(), nn.Flatten(), nn.Linear(512, 3))
    pruner, seen = Pruner(model, Schedule(0, 0, 0.5, 1), ["0"], "activation"), []
    model[1].register_forward_hook(lambda m, i, y: seen.append(y.detach().clamp(min=0).sum((0, 2, 3))))
    train(model, torch.optim.SGD(model.parameters(), 0.01), pruner, 10)
    torch.testing.assert_close(pruner.layers[0].scores().float(), 0.1 * seen[9])


@pytest.mark.parametrize("width", [6, 8])  # images are 8 x 8: a wrong axis may fit
@pytest.mark.parametrize("build", [lambda n: Channels(n, False), lambda n: Channels(n, True), Tokens])
def test_the_activation_score_is_each_unit_s_wherever_its_channel_lies(build, width):
    model = build(width)
    layer, speaks = ("body", "body") if isinstance(model, Tokens) else ("conv", "norm")
    pruner = Pruner(model, Schedule(0, 0, 0.5, 1), [layer], "activation", example=torch.randn(2, 3, 8, 8))
    seen = []
    model.get_submodule(speaks).register_forward_hook(lambda m, i, y: seen.append(y.detach().clamp(min=0)))
    train(model, torch.optim.SGD(model.parameters(), 0.01), pruner, 10)
    if getattr(model, "shuffled", False):
        order = model.shuffle(torch.arange(width).view(1, width, 1, 1)).flatten()
        expected = torch.empty(width).index_copy(0, order, seen[9].sum((0, 2, 3)))
    else:
        expected = seen[9].flatten(0, -2).sum(0)
    torch.testing.assert_close(pruner.layers[0].scores().float(), 0.1 * expected)
    assert sum(len(m._forward_hooks) for m in pruner.finish().modules()) == 1, "this test's own"

import numpy as np
import pytest
import torch
from torch import nn

from gstlib.effects import Effect
from gstlib.errors import InputError
from gstlib.network.masking import MaskedLayer, check_layer
from gstlib.network.surroundings import Surroundings
from gstlib.pruner import Pruner
from gstlib.pruning import EFFECTS, Schedule

OPTIMISERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
}


def in_force(module: nn.Module) -> torch.Tensor:
    return module.weight_in_force(module.weight) if hasattr(module, "weight_in_force") else module.weight


class Bench:
    """A two-layer network with one effect on its first layer, stepped a batch at a time."""

    def __init__(self, kind: str, batches: int = 0, optimiser: str = "adam", inputs=20, units=12, lr=None):
        self.model = nn.Sequential(nn.Linear(inputs, units), nn.Tanh(), nn.Linear(units, 3))
        self.effect = Effect(kind, batches, torch.Generator().manual_seed(4))
        unit = check_layer(Surroundings(self.model), "0", "filter", "l2", kind)
        self.layer = MaskedLayer(self.model, unit, "filter", "l2", kind, held=batches > 0)
        self.optimiser = OPTIMISERS[optimiser](self.model.parameters())
        if lr is not None:
            self.optimiser.param_groups[0]["lr"] = lr
        self.inputs, self.units = inputs, units

    @property
    def stored(self) -> torch.Tensor:
        return self.layer.parameter.detach()

    @property
    def seen(self) -> torch.Tensor:
        """The weights that the forward pass computes with."""
        with torch.no_grad():
            return in_force(self.model[0]).clone()

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One training batch; the weights that its forward pass saw, and the stored weights' gradient."""
        x, y = torch.randn(16, self.inputs), torch.randint(0, 3, (16,))
        self.optimiser.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        seen, gradient = self.seen.clone(), self.model[0].weight.grad.clone()
        self.optimiser.step()
        self.effect.tick()
        return seen, gradient

    def batches(self, number: int) -> None:
        for _ in range(number):
            self.batch()

    def strike(self, *chosen: int) -> torch.Tensor:
        units = torch.zeros(self.units, dtype=torch.bool)
        units[list(chosen)] = True
        self.effect.apply(self.layer, units)
        return units


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("k", [1, 2, 7])
def test_zeros_are_held_for_exactly_k_batches(k, optimiser):
    bench = Bench("zero", k, optimiser)
    bench.batches(5)
    units = bench.strike(1, 4)
    held = 0
    while held < 50:
        seen, gradient = bench.batch()
        if gradient[units].abs().max() > 0:
            break
        assert seen[units].abs().max() == 0 and seen[~units].abs().min() > 0 and gradient[~units].abs().max() > 0
        held += 1
    assert held == k
    assert seen[units].abs().max() == 0, "training goes on from zero"
    assert bench.seen[units].abs().min() > 0 and not bench.effect.active


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_held_zeros_are_zero_when_released_whatever_momentum_did(optimiser):
    bench = Bench("zero", 4, optimiser)
    bench.batches(6)
    units = bench.strike(0, 5, 11)
    momentum = bench.optimiser.state[bench.model[0].weight]["exp_avg" if optimiser == "adam" else "momentum_buffer"]
    assert momentum[units].abs().min() > 0
    for _ in range(4):
        assert bench.stored[units].abs().max() == 0 and bench.effect.active
        bench.batches(1)
    assert bench.stored[units].abs().max() == 0 and not bench.effect.active
    assert torch.equal(bench.seen, bench.stored)


@pytest.mark.parametrize("kind", ["zero", "zero-restore"])
@pytest.mark.parametrize(("optimiser", "rest"), [(torch.optim.Adam, {}), (torch.optim.SGD, {"momentum": 0.9})])
def test_weights_held_at_zero_do_not_decay_into_the_moments(kind, optimiser, rest):
    bench = Bench(kind, 5)
    bench.optimiser = optimiser(bench.model.parameters(), lr=0.01, weight_decay=0.1, **rest)
    units = bench.strike(0, 5)
    bench.batches(5)
    assert not bench.effect.active
    moments = bench.optimiser.state[bench.model[0].weight].values()
    assert all(moment[units].abs().max() == 0 for moment in moments if torch.is_tensor(moment) and moment.dim() > 1)


@pytest.mark.parametrize("k", [np.array(3), torch.tensor(3), 3.0])
def test_every_event_lasts_whatever_kind_of_number_says_how_long(k):
    bench = Bench("zero", k)
    for unit in (1, 4):
        bench.strike(unit)
        bench.batches(2)
        assert bench.effect.active
        bench.batches(1)
        assert not bench.effect.active


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_zero_batches_set_the_weights_once(optimiser):
    bench = Bench("zero", 0, optimiser)
    bench.batches(5)
    others = bench.stored.clone()
    units = bench.strike(2, 3)
    assert bench.stored[units].abs().max() == 0 and torch.equal(bench.stored[~units], others[~units])
    assert not bench.effect.active and not bench.effect.active
    seen, gradient = bench.batch()
    assert seen[units].abs().max() == 0 and gradient[units].abs().max() > 0
    assert bench.seen[units].abs().min() > 0


def test_zeroing_leaves_the_bias_alone():
    bench = Bench("zero", 3)
    bias = bench.model[0].bias.detach().clone()
    bench.strike(0, 1)
    assert torch.equal(bench.model[0].bias, bias)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("k", [1, 5])
def test_restored_weights_are_exactly_what_they_were(k, optimiser):
    bench = Bench("zero-restore", k, optimiser)
    bench.batches(6)
    before = bench.stored.clone()
    units = bench.strike(0, 7, 8)
    for _ in range(k):
        seen, gradient = bench.batch()
        assert seen[units].abs().max() == 0 and gradient[units].abs().max() == 0
    assert torch.equal(bench.seen[units], before[units]) and torch.equal(bench.stored[units], before[units])
    assert not torch.equal(bench.stored[~units], before[~units])
    bench.batches(1)
    assert not torch.equal(bench.stored[units], before[units])


@pytest.mark.parametrize("k", [1, 3, 10])
def test_noise_is_there_for_exactly_k_batches_and_fresh_in_each(k):
    bench = Bench("gaussian-transient", k)
    bench.batches(3)
    units = bench.strike(1, 9)
    noises = []
    for _ in range(k + 3):
        stored = bench.stored.clone()
        noises.append(bench.batch()[0] - stored)
    for noise in noises[:k]:
        assert noise[units].abs().min() > 0 and noise[~units].abs().max() == 0
    assert all(noise.abs().max() == 0 for noise in noises[k:])
    for i in range(k):
        for j in range(i):
            assert (noises[i] - noises[j])[units].abs().min() > 0
    assert not bench.effect.active and bench.layer.noise.abs().max() == 0


def test_noise_is_as_wide_as_an_untouched_filter():
    bench = Bench("gaussian-transient", 5, inputs=5000, units=8, lr=0.0)
    with torch.no_grad():
        bench.layer.parameter.copy_(torch.randn(8, 5000) * torch.arange(1.0, 9.0)[:, None] + 3)
    expected = bench.stored[[0, 1, 3, 4, 5, 7]].std(dim=1).mean()
    units = bench.strike(2, 6)
    for _ in range(5):
        noise = bench.layer.noise[units]
        assert noise.std() == pytest.approx(float(expected), rel=0.04)
        assert abs(float(noise.mean())) < 5 * float(expected) / 100
        bench.batches(1)


def test_noise_where_every_filter_was_touched_takes_all_filters_width():
    bench = Bench("gaussian-transient", 2, inputs=5000, units=2)
    expected = bench.stored.std(dim=1).mean()
    bench.strike(0, 1)
    assert bench.layer.noise.std() == pytest.approx(float(expected), rel=0.04)


def test_noise_on_filters_of_one_weight_is_finite_or_refused():
    bench = Bench("gaussian-transient", 2, inputs=1)
    try:
        bench.strike(0, 1)
    except InputError:
        return
    assert torch.isfinite(bench.seen).all()


def test_passing_noise_never_reaches_the_stored_weights():
    bench = Bench("gaussian-transient", 4, "sgd", lr=0.0)
    before = bench.stored.clone()
    bench.strike(0, 3)
    bench.batches(6)
    assert torch.equal(bench.stored, before) and torch.equal(bench.seen, before)


def test_weights_beneath_noise_train_on():
    bench = Bench("gaussian-transient", 4)
    bench.batches(2)
    units = bench.strike(0, 3)
    before = bench.stored.clone()
    _, gradient = bench.batch()
    assert gradient[units].abs().max() > 0 and not torch.equal(bench.stored[units], before[units])


def test_noise_for_zero_batches_is_added_once_for_good():
    bench = Bench("gaussian", 0, inputs=5000, lr=0.0)
    before = bench.stored.clone()
    units = bench.strike(0, 3)
    change = bench.stored - before
    assert change[~units].abs().max() == 0
    assert change[units].std() == pytest.approx(float(before[~units].std(dim=1).mean()), rel=0.04)
    assert not bench.effect.active and bench.layer.noise is None
    after = bench.stored.clone()
    bench.batches(3)
    assert torch.equal(bench.stored, after)


@pytest.mark.parametrize(("kind", "k"), [("zero", 3), ("zero-restore", 3), ("gaussian", 3), ("gaussian-transient", 3)])
def test_evaluations_use_no_duration_up(kind, k):
    bench = Bench(kind, k)
    bench.batches(2)
    bench.strike(0, 5)
    for left in (3, 2, 1):
        state = {name: value.clone() for name, value in bench.model.state_dict().items()}
        for _ in range(5):
            with torch.no_grad():
                bench.model.eval()(torch.randn(4, bench.inputs))
            bench.model.train()(torch.randn(4, bench.inputs))
        assert [d.batches for d in bench.effect.active] == [left]
        assert all(torch.equal(state[name], value) for name, value in bench.model.state_dict().items())
        bench.batches(1)
    assert not bench.effect.active


def test_silence_switches_noise_off_and_the_same_noise_on_again():
    bench = Bench("gaussian-transient", 3)
    bench.strike(0, 5)
    x = torch.randn(4, bench.inputs)
    noise, noised = bench.layer.noise.clone(), bench.model(x)
    assert noise.abs().max() > 0
    with bench.effect.silenced():
        assert torch.equal(bench.seen, bench.stored) and not torch.equal(bench.model(x), noised)
    assert torch.equal(bench.layer.noise, noise) and torch.equal(bench.model(x), noised)
    with pytest.raises(KeyError), bench.effect.silenced():
        raise KeyError
    assert torch.equal(bench.layer.noise, noise) and [d.batches for d in bench.effect.active] == [3]


@pytest.mark.parametrize("kind", ["zero", "remove"])
def test_silence_leaves_everything_but_noise(kind):
    bench = Bench(kind, 2 if kind == "zero" else 0)
    units = bench.strike(0, 5)
    left = bench.model[0].bias if kind == "zero" else torch.zeros(bench.units)
    with bench.effect.silenced():
        assert torch.equal(bench.model[0](torch.randn(4, bench.inputs))[:, units], left[units].expand(4, -1))


def test_noise_does_not_depend_on_torch_s_generator():
    noises = []
    for seed in (1, 2):
        torch.manual_seed(0)
        bench = Bench("gaussian-transient", 3)
        torch.manual_seed(seed)
        bench.strike(0, 5)
        bench.effect.tick()
        noises.append(bench.layer.noise.clone())
    assert torch.equal(*noises)


@pytest.mark.parametrize("kind, where", [
    *((kind, torch.float64) for kind in ("zero", "zero-restore", "zero-cumulative", "gaussian", "gaussian-transient")),
    *((kind, "meta") for kind in ("zero", "zero-restore", "zero-cumulative"))])
def test_a_network_may_be_moved_while_an_effect_is_in_force(kind, where):
    bench = Bench(kind, 2)
    before = bench.stored.clone()
    bench.strike(0, 3)
    bench.model.to(where)
    bench.effect.tick()
    bench.effect.tick()
    if kind in ("zero-restore", "zero-cumulative") and where != "meta":
        assert torch.equal(bench.stored, before.to(where)) and not bench.layer.held.any()


@pytest.mark.parametrize("kind", ["zero", "zero-restore", "gaussian-transient"])
def test_overlapping_events_end_one_after_the_other(kind):
    bench = Bench(kind, 5)
    bench.batches(2)
    groups, lasted = [], []
    for batch in range(12):
        if batch in (0, 2, 4):
            groups.append(bench.strike(batch, batch + 1))
            lasted.append(0)
        stored = bench.stored.clone()
        seen, gradient = bench.batch()
        for index, units in enumerate(groups):
            noised, held = (seen - stored)[units].abs().max() > 0, gradient[units].abs().max() == 0
            disturbed = bool(noised if kind == "gaussian-transient" else held)
            lasted[index] += int(disturbed)
            assert disturbed == (2 * index <= batch < 2 * index + 5)
    assert lasted == [5, 5, 5]


@pytest.mark.parametrize("kind", ["zero", "gaussian-transient"])
def test_two_layers_are_disturbed_independently(kind):
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    pruner = Pruner(model, Schedule((0, 1), (0, 1), (0.5, 0.25), 1), ["0", "2"], score="l2", effect=kind, batches=3)
    before = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]

    def touched():
        return [int((in_force(model[i]) != w).any(1).sum()) for i, w in zip((0, 2), before)]

    pruner.epoch(0, lambda: 0.0)
    assert touched() == [6, 0]
    pruner.batch()
    pruner.epoch(1, lambda: 0.0)
    assert touched() == [6, 3]
    pruner.batch()
    pruner.batch()
    assert touched() == [6 if kind == "zero" else 0, 3]
    pruner.batch()
    assert touched() == ([6, 3] if kind == "zero" else [0, 0])
    assert not pruner.effect.active


def test_units_with_noise_are_not_struck_again():
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 3))
    pruner = Pruner(model, Schedule(0, 3, 1.0, 1), ["0"], score="l2", target="L", effect="gaussian-transient", batches=50)
    seen = torch.zeros(12, dtype=torch.long)
    for n in range(4):
        before = pruner.layers[0].present.clone()
        pruner.epoch(n, lambda: 0.0)
        seen += (before & ~pruner.layers[0].present).long()
    assert seen.tolist() == [1] * 12


@pytest.mark.parametrize(("effect", "normed"), [("remove", 0.0), ("remove-weights", 0.5)])
def test_prune_by_weights_alone_leaves_the_batch_norm(effect, normed):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 2))
    with torch.no_grad():
        model[1].bias.fill_(0.5)
    pruner = Pruner(model, Schedule(0, 0, 0.5, 1), score="l2", target="L", effect=effect)
    pruner.epoch(0, lambda: 0.0)
    gone = ~pruner.layers[0].present
    z = model[0](torch.randn(5, 3, 4, 4))
    # what is left of a filter without its weights is its bias
    left = torch.zeros(8) if effect == "remove" else model[0].bias
    assert int(gone.sum()) == 4 and torch.equal((z == left.view(-1, 1, 1)).all(-1).all(-1).all(0), gone)
    y = model[1](z)
    # the bias that stays is centred away, up to rounding
    torch.testing.assert_close(y[:, gone], torch.full_like(y[:, gone], normed), rtol=0, atol=1e-4 if normed else 0)
    assert model[1].weight.tolist() == [1.0] * 8


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_weights_removed_alone_stay_away(optimiser):
    bench = Bench("remove-weights", 0, optimiser)
    bench.batches(5)
    units = bench.strike(2, 6)
    bench.batches(10)
    assert bench.seen[units].abs().max() == 0 and bench.model[0].bias[units].abs().min() > 0


@pytest.mark.parametrize(("kind", "batches"), [
    ("erase", 0), ("remove", 1), ("remove-weights", 5), ("zero", -1), ("gaussian", -3), ("zero-restore", 0), ("gaussian-transient", 0),
])
def test_effects_refuse(kind, batches):
    with pytest.raises(InputError):
        Effect(kind, batches)


def test_only_passing_noise_needs_a_noise_term():
    assert [kind for kind in EFFECTS if Effect(kind, 0 if kind.startswith("remove") else 2).noisy] == ["gaussian-transient"]


@pytest.mark.parametrize("k", [0, 1, 4, 25])
def test_lasting_noise_has_root_k_of_one_draw_s_deviation(k):
    """Fresh noise on each of k batches adds up in the stored weights: sqrt(k) times one draw's standard deviation."""
    bench = Bench("gaussian", k, inputs=5000, lr=0.0)
    before = bench.stored.clone()
    units = bench.strike(0, 3)
    sd = float(before[~units].std(dim=1).mean())
    for batch in range(k + 3):
        draws = min(batch + 1, max(k, 1))
        change = bench.stored - before
        assert change[~units].abs().max() == 0 and torch.equal(bench.seen, bench.stored)
        assert change[units].std() == pytest.approx(sd * draws**0.5, rel=0.04)
        bench.batches(1)
    assert not bench.effect.active and bench.layer.noise is None


def test_weights_under_lasting_noise_train_on_from_where_it_put_them():
    bench = Bench("gaussian", 3)
    units = bench.strike(0, 3)
    before = bench.stored.clone()
    _, gradient = bench.batch()
    assert gradient[units].abs().max() > 0 and not torch.equal(bench.stored[units], before[units])

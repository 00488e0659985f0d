"""`Pruner`: schedule, scores, selection, masks and effects behind two calls."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from gstlib.effects import Effect
from gstlib.errors import InputError, plain
from gstlib.network import masking, proof
from gstlib.network.compact import Compact, Compaction
from gstlib.network.masking import MaskedLayer
from gstlib.network.surroundings import Surroundings, on_cpu
from gstlib.pruning import Schedule, check_method, deciles, number, select


class Pruner:
    """Prunes (or disturbs) `model` by `schedule` while anyone's loop trains it.

    Call `batch()` after every optimiser step and `epoch(n, evaluate)` after
    every epoch, counted from 0.  The optimiser may be made before or after.

        pruner = Pruner(model, Schedule((3, 4), (60, 60), (0.3, 0.9), retrain=10), layers=["conv1", "conv2"])
        for n in range(epochs):
            for x, y in batches:
                ...                      # forward, backward, optimiser.step()
                pruner.batch()
            rows += pruner.epoch(n, lambda: accuracy(model, test_set))

    `layers` names the layers (or the one layer) in the schedule's order; None takes the last
    batch-normalised convolutions, as many as the schedule has (the paper's
    last four); in a network without any the last convolutions, or else linear layers.  `score`: "ebn", "ebn-signed",
    "l2", "l1" or "activation" with `structure` "filter", "magnitude" with "weight" (which is taken
    when `structure` is "weight" and the score was left at its default).
    `target`, see `gstlib.pruning.select`; `effect` and `batches`, see
    `gstlib.effects.Effect`.  Random choices and noise are drawn from `seed`.
    `example`: a batch that the network takes, or a tuple of its arguments,
    where none can be guessed; what it leaves out is followed at its default
    (give a mask, say, that is always passed).  Hooks that change values are
    not followed: what they do belongs into a module.

    Raises `InputError` for an unknown layer, score, target, structure or
    effect, for a network without batch normalisation when E[BN] is asked for,
    for a network that torch.fx cannot trace, for a schedule that takes more
    than is left, and for a layer whose removed units could not be silent.  A
    refused network is left as it was.
    """

    @on_cpu()
    def __init__(self, model: nn.Module, schedule: Schedule, layers: Sequence[str] | None = None, score: str = "ebn",
                 target: str = "S", effect: str = "remove", structure: str = "filter", seed: int = 0, batches: int = 0,
                 example=None):
        if structure == "weight" and score == "ebn":
            score = "magnitude"
        check_method(target, score, structure, effect, batches)
        if not isinstance(schedule, Schedule):
            raise InputError(f"schedule must be a gstlib.Schedule, not {plain(repr(schedule))}")
        if schedule.scratch and "activation" in masking.needs(score):
            raise InputError(f"score {score!r} is taken in training, and nothing is trained before the first step")
        self.schedule, self.target = schedule, target
        self.generator = torch.Generator().manual_seed(number("seed", seed, whole=True))
        self.effect = Effect(effect, batches, self.generator)
        if not isinstance(model, nn.Module):
            raise InputError(f"a network is a torch.nn.Module, not {plain(repr(model))}")
        self.model, self._example = model, example
        around = Surroundings(model, example)
        if layers is None:
            layers = masking.default_layers(around, len(schedule.start), structure, score, effect)
        layers = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
        for name in layers:
            if name not in around.layers:
                raise InputError("the network's forward pass calls no convolution or linear layer "
                                 f"{plain(repr(name))}; it has {', '.join(around.layers)}")
        if len(layers) != len(schedule.start):
            raise InputError(f"the schedule has {len(schedule.start)} layers, but {len(layers)} were named")
        if len(set(layers)) != len(layers):
            raise InputError("a layer is named twice")
        # judge every layer before the first is touched: a refused network is left as it was
        units = [masking.check_layer(around, name, structure, score, effect) for name in layers]
        self.layers: list[MaskedLayer] = []
        try:
            for unit in units:
                self.layers.append(MaskedLayer(model, unit, structure, score, effect, held=batches > 0))
            proof.prove(around, units)
            self._before = [layer.before for layer in self.layers]  # by others, when this Pruner was made
            totals = schedule.removed([layer.size for layer in self.layers], max(schedule.end))
            for layer, total, gone in zip(self.layers, totals, self._before):
                if total > layer.size - gone:
                    raise InputError(f"the schedule takes {total} of layer {layer.name!r}'s {layer.size} units, "
                                     f"of which only {layer.size - gone} are left")
        except BaseException:
            for layer in reversed(self.layers):
                layer.detach()
            raise
        for layer in self.layers:
            layer.keep()
        masking.compile_anew()
        self._example = vars(around).get("inputs", example)  # found once
        self._last = -2  # the last epoch whose end has been told; epoch -1 ends before the first step
        self._forward = sorted(range(len(layers)), key=lambda i: around.layers.index(layers[i]))

    def batch(self) -> None:
        """Count one training batch, after the optimiser's step."""
        self.effect.tick()

    def due(self, n: int) -> list[tuple[MaskedLayer, int]]:
        """The layers struck after epoch `n` (from 0), in forward order, each with the number of units to be taken.

        That is what the schedule wants gone by then, less what is: events that were missed are made up for, and an epoch
        that has been told is over.
        """
        if not self.layers:
            raise InputError("this Pruner has finished; make another one to go on")
        for layer in self.layers:
            layer.check_carried(self.model)
        if (n := number("an epoch", n, whole=True)) <= self._last:
            return []
        wanted, due = self.schedule.removed([layer.size for layer in self.layers], n), []
        for i in self._forward:
            k = max(0, wanted[i] - (self.layers[i].gone - self._before[i]))
            if k or n in self.schedule.event_epochs(i):
                due.append((self.layers[i], k))
        return due

    @torch.no_grad()
    def epoch(self, n: int, evaluate: Callable[[], float]) -> list[dict]:
        """Do what the schedule has for the end of epoch `n` (from 0); returns one row per layer struck.

        Where several layers have their turn they are struck one after the
        other in forward order with a test pass between, so that each row has
        its own t_pre and t_post.  `evaluate()` gives the test accuracy
        (0 … 1); it is called before the first strike and after every strike
        that took something, and not at all without an event.  Should it raise,
        all is as before this call.  Columns: epoch, layer, units, removed,
        removed_total, mean_score, negative_scales (filters present whose gamma
        is below 0), t_pre, t_post and decile_0 … decile_9, the mean score in
        each tenth of the units present before.  Raises `InputError` where
        `evaluate` gives no number.
        """
        rows: list[dict] = []
        due, n = self.due(n), int(n)
        self.effect.check_known(self.layers)
        before = [(tensor, tensor.clone()) for layer, k in due if k for tensor in layer.state()]
        generator, effect = self.generator.get_state(), self.effect.state_dict(self.layers)
        try:
            accuracy = number("what evaluate returns", evaluate()) if due else None
            for layer, k in due:
                scores, present, gone = layer.scores(), layer.present, layer.gone
                units = select(scores, present, k, self.target, self.generator)
                means = deciles(scores[present])
                row = {"epoch": n, "layer": layer.name, "units": layer.size,
                       "mean_score": float(scores[units].mean()) if k else float("nan"),
                       "negative_scales": layer.negative_scales(), "t_pre": accuracy}
                if k:
                    self.effect.apply(layer, units)
                    accuracy = number("what evaluate returns", evaluate())
                rows.append(row | {"removed": layer.gone - gone, "removed_total": layer.gone, "t_post": accuracy,
                                   **{f"decile_{i}": mean for i, mean in enumerate(means)}})
        except BaseException:
            for tensor, value in before:
                tensor.copy_(value)
            self.generator.set_state(generator)
            self.effect.load_state_dict(effect, self.layers)
            raise
        self._last = max(n, self._last)
        return rows

    @property
    def noise_in_force(self) -> bool:
        """Whether the forward pass carries noise now."""
        return self.effect.noisy and bool(self.effect.active)

    def silenced(self):
        """Context in which noise in force is switched off, to measure the network beneath it."""
        return self.effect.silenced()

    def state_dict(self) -> dict:
        """What goes into a checkpoint beside the network's own `state_dict`, which has the masks: what was gone before,
        the last epoch told, effects in force, the random generator. Safe for `torch.load(..., weights_only=True)`."""
        return {"before": self._before, "last": self._last, "effect": self.effect.state_dict(self.layers),
                "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave, on a `Pruner` made with the same arguments."""
        self._before, self._last = list(state["before"]), state["last"]
        self.effect.load_state_dict(state["effect"], self.layers)
        self.generator.set_state(state["generator"])

    @on_cpu()
    def finish(self, compact: bool = False) -> nn.Module | Compact:
        """The plain network: what is removed is 0 in its parameters, and no mask, hook or buffer of ours is left.

        Its state dict loads into a network never pruned, which then has the
        same outputs.  Effects still in force end.  With `compact` what comes
        back is a `gstlib.network.compact.Compact`: a copy without the removed
        channels, equal in evaluation within rounding, and what it saves
        (needs the extra `gstlib[compact]`).  Raises `InputError`, with
        nothing changed, where no plain network has these outputs: behind an
        identity shortcut that goes on into a further sum, before a norm across
        channels.
        """
        around = Surroundings(self.model, self._example)
        try:
            zeros = proof.zeros_for_plain(around)
        except InputError:
            for layer in self.layers:  # masks that are gone are the reason then
                layer.check_carried(self.model)
            raise
        compaction = Compaction(around, zeros) if compact else None
        self.effect.end()
        masking.unmask(self.model, zeros)
        self.layers = []
        return compaction.of(self.model) if compaction else self.model

    def parameters_removed(self) -> int:
        """How many parameters the masks hold at 0 now."""
        return sum(layer.parameters_removed() for layer in self.layers)

"""`Pruner`: schedule, scores, selection, masks and effects behind two calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from gstlib import masking
from gstlib.effects import Effect
from gstlib.errors import InputError
from gstlib.masking import MaskedLayer
from gstlib.pruning import Schedule, check_method, deciles, select


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

    `layers` names the layers in the schedule's order; None takes the last
    batch-normalised convolutions, as many as the schedule has (the paper's
    last four), or the last layers of whatever kind the network has.  `score`: "ebn", "l2",
    "l1" or "activation" with `structure` "filter", "magnitude" with "weight" (which is taken
    when `structure` is "weight" and the score was left at its default).
    `target`, see `gstlib.pruning.select`; `effect` and `batches`, see
    `gstlib.effects.Effect`.  Random choices and noise are drawn from `seed`.

    Raises `InputError` for an unknown layer, score, target, structure or
    effect, for a network without batch normalisation when E[BN] is asked for,
    and for a network that torch.fx cannot trace.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        layers: Sequence[str] | None = None,
        score: str = "ebn",
        target: str = "S",
        effect: str = "remove",
        structure: str = "filter",
        seed: int = 0,
        batches: int = 0,
    ):
        if structure == "weight" and score == "ebn":
            score = "magnitude"
        check_method(target, score, structure, effect, batches)
        if score == "activation" and schedule.scratch:
            raise InputError("score 'activation' is taken in training, and nothing is trained before the first step")
        self.schedule, self.target = schedule, target
        self.generator = torch.Generator().manual_seed(seed)
        self.effect = Effect(effect, batches, self.generator)
        units = masking.trace(model)
        if layers is None:
            layers = _default_layers(model, units, len(schedule.start), score)
        for name in layers:
            if name not in units:
                raise InputError(f"the network has no convolution or linear layer {name!r}; it has {', '.join(units)}")
        if len(layers) != len(schedule.start):
            raise InputError(f"the schedule has {len(schedule.start)} layers, but {len(layers)} were named")
        if len(set(layers)) != len(layers):
            raise InputError("a layer is named twice")
        # judge every layer before the first is touched: a refused network is left as it was
        for name in layers:
            masking.check_score(model, units[name], score)
        self.layers = [MaskedLayer(model, units[name], structure, score, self.effect.noisy) for name in layers]
        order = list(units)
        self._forward = sorted(range(len(layers)), key=lambda i: order.index(layers[i]))

    def batch(self) -> None:
        """Count one training batch, after the optimiser's step."""
        self.effect.tick()

    def due(self, n: int) -> list[tuple[MaskedLayer, int]]:
        """The layers struck after epoch `n` (from 0), in forward order, each with the number of units to be taken."""
        sizes = [layer.size for layer in self.layers]
        before, after = self.schedule.removed(sizes, n - 1), self.schedule.removed(sizes, n)
        return [(self.layers[i], after[i] - before[i]) for i in self._forward if n in self.schedule.event_epochs(i)]

    @torch.no_grad()
    def epoch(self, n: int, evaluate: Callable[[], float]) -> list[dict]:
        """Do what the schedule has for the end of epoch `n` (from 0); returns one row per layer struck.

        Where several layers have their turn they are struck one after the
        other in forward order with a test pass between, so that each row has
        its own t_pre and t_post.  `evaluate()` gives the test accuracy
        (0 … 1); it is called before the first strike and after every strike
        that took something, and not at all without an event.  Columns: epoch,
        layer, units, removed, removed_total, mean_score, negative_scales
        (filters present whose gamma is below 0), t_pre, t_post and decile_0 …
        decile_9, the mean score in each tenth of the units present before.
        """
        rows: list[dict] = []
        accuracy = None
        for layer, k in self.due(n):
            accuracy = float(evaluate()) if accuracy is None else accuracy
            scores = layer.scores()
            units = select(scores, layer.present, k, self.target, self.generator)
            means = deciles(scores[layer.present])
            row = {"epoch": n, "layer": layer.name, "units": layer.size, "removed": k,
                   "mean_score": float(scores[units].mean()) if k else float("nan"),
                   "negative_scales": layer.negative_scales(), "t_pre": accuracy}
            layer.present &= ~units
            if k:
                self.effect.apply(layer, units)
                accuracy = float(evaluate())
            rows.append(row | {"removed_total": layer.size - int(layer.present.sum()), "t_post": accuracy,
                               **{f"decile_{i}": mean for i, mean in enumerate(means)}})
        return rows

    @property
    def noise_in_force(self) -> bool:
        """Whether the forward pass carries noise now."""
        return self.effect.noisy and bool(self.effect.active)

    def silenced(self):
        """Context in which noise in force is switched off, to measure the network beneath it."""
        return self.effect.silenced()

    def state_dict(self) -> dict:
        """What goes into a checkpoint beside the network's own `state_dict`, which has the masks: units targeted so
        far, effects in force, the random generator. Safe for `torch.load(..., weights_only=True)`."""
        return {"present": [layer.present for layer in self.layers], "effect": self.effect.state_dict(self.layers),
                "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` gave, on a `Pruner` made with the same arguments."""
        for layer, present in zip(self.layers, state["present"], strict=True):
            layer.present.copy_(present)
        self.effect.load_state_dict(state["effect"], self.layers)
        self.generator.set_state(state["generator"])

    def parameters_removed(self) -> int:
        """How many parameters the masks hold at 0 now."""
        return sum(layer.parameters_removed() for layer in self.layers)


def _default_layers(model: nn.Module, units: dict[str, masking.Unit], number: int, score: str) -> list[str]:
    """The last `number` convolutions, or linear layers where there are none, never the network's last layer.

    Where some layers are batch-normalised only those count (others are gates
    and classifiers), and of layers that feed the same sum only the first in
    forward order, which leaves projection shortcuts out.
    """
    names, sums = [], set()
    for name in list(units)[:-1]:
        block = units[name].block
        if block is None or block not in sums:
            names.append(name)
            sums.add(block)
    names = [name for name in names if isinstance(model.get_submodule(name), nn.Conv2d)] or names
    normalised = [name for name in names if units[name].batch_norm]
    if score == "ebn" and not normalised:
        raise InputError(f"{type(model).__name__} has no batch normalisation, so E[BN] is undefined; "
                         "use score 'l2' or 'l1'")
    names = normalised or names
    if len(names) < number:
        raise InputError(f"the schedule has {number} layers, but only {len(names)} can be pruned by {score!r}")
    return names[-number:]

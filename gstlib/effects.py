"""What happens to the units that an event targets: gone for good, or disturbed for some batches.

Durations count training batches (`tick` is called once after each), so that
no evaluation, however many there are, uses a duration up or changes a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gstlib.masking import MaskedLayer
from gstlib.spec import check_effect


@dataclass
class Disturbance:
    """Units of one layer that stay disturbed for `batches` more training batches."""

    layer: MaskedLayer
    units: torch.Tensor
    batches: int
    sd: float = 0.0
    saved: torch.Tensor | None = None


class Effect:
    """Applies one kind of effect and carries the temporary ones through training (sections 4.4 and A.3.5).

    * "remove": units masked with bias, scale, shift and shortcut, for good;
    * "remove-weights": weights masked for good, batch normalisation left alone (Figure 5's prune L);
    * "zero": weights set to 0 and held there for `batches` batches, then trained on from 0;
    * "zero-restore": the same, then set back to what they were;
    * "gaussian": normal noise on the weights, mean 0, standard deviation that
      of an untouched filter of the same layer (the mean over the filters no
      event has targeted yet).  `batches` = 0 adds it once to the stored
      weights; otherwise the forward pass sees fresh noise in each of
      `batches` batches and the stored weights train on beneath it.
    """

    def __init__(self, kind: str, batches: int = 0, generator: torch.Generator | None = None):
        check_effect(kind, batches)
        self.kind, self.batches, self.generator = kind, batches, generator
        self.active: list[Disturbance] = []

    @property
    def noisy(self) -> bool:
        """Whether layers must carry a noise term in their forward pass."""
        return self.kind == "gaussian" and self.batches > 0

    @torch.no_grad()
    def apply(self, layer: MaskedLayer, units: torch.Tensor) -> None:
        """Strike `units` (bool, one entry a unit) of `layer`; `layer.present` is already updated."""
        if self.kind == "remove":
            layer.remove(units)
        elif self.kind == "remove-weights":
            layer.remove(units, weights_only=True)
        elif self.kind == "gaussian":
            self._strike_gaussian(layer, units)
        else:
            self._strike_zero(layer, units)

    def _strike_zero(self, layer: MaskedLayer, units: torch.Tensor) -> None:
        saved = layer.parameter[units].clone() if self.kind == "zero-restore" else None
        if self.batches == 0:
            layer.parameter[units] = 0
            return
        layer.weight_mask[units] = 0
        self.active.append(Disturbance(layer, units, self.batches, saved=saved))

    def _strike_gaussian(self, layer: MaskedLayer, units: torch.Tensor) -> None:
        untouched = layer.present if layer.present.any() else torch.ones_like(layer.present)
        weights = layer.parameter[untouched].flatten(1)
        # a filter of one weight has no deviation of its own; the layer's stands in
        sd = float(weights.std(dim=1).mean() if weights.shape[1] > 1 else weights.std(correction=0))
        if self.batches == 0:
            layer.parameter[units] += self._draw(layer, units, sd)
            return
        self.active.append(Disturbance(layer, units, self.batches, sd=sd))
        layer.noise[units] = self._draw(layer, units, sd)

    def _draw(self, layer: MaskedLayer, units: torch.Tensor, sd: float) -> torch.Tensor:
        shape = layer.parameter[units].shape
        # drawn where the generator lives, so that a run's noise does not depend on the device
        device = "cpu" if self.generator is None else self.generator.device
        return (sd * torch.randn(shape, generator=self.generator, device=device)).to(layer.parameter)

    @torch.no_grad()
    def tick(self) -> None:
        """Count one training batch, after the optimiser's step: refresh noise, release what is over."""
        still = []
        for disturbance in self.active:
            disturbance.batches -= 1
            if disturbance.batches > 0:
                still.append(disturbance)
                if self.kind == "gaussian":
                    layer, units = disturbance.layer, disturbance.units
                    layer.noise[units] = self._draw(layer, units, disturbance.sd)
            else:
                self._release(disturbance)
        self.active = still

    def _release(self, disturbance: Disturbance) -> None:
        layer, units = disturbance.layer, disturbance.units
        if self.kind == "gaussian":
            layer.noise[units] = 0
            return
        # Adam's moments moved the stored weights while the mask hid them
        layer.parameter[units] = 0 if disturbance.saved is None else disturbance.saved
        layer.weight_mask[units] = 1

    def state_dict(self, layers: list[MaskedLayer]) -> list[dict]:
        """What is in force, layers by their place in `layers`; masks and noise themselves are the network's buffers."""
        return [{"layer": layers.index(d.layer), "units": d.units, "batches": d.batches, "sd": d.sd, "saved": d.saved}
                for d in self.active]

    def load_state_dict(self, state: list[dict], layers: list[MaskedLayer]) -> None:
        """Take up what `state_dict` gave."""
        self.active = []
        for entry in state:
            layer = layers[entry["layer"]]
            saved = None if entry["saved"] is None else entry["saved"].to(layer.parameter.device)
            self.active.append(Disturbance(layer, entry["units"].to(layer.parameter.device), entry["batches"],
                                           entry["sd"], saved))

    @torch.no_grad()
    def silenced(self) -> _Silence:
        """Context in which the forward pass carries no noise; the noise in force comes back unchanged."""
        return _Silence(self.active if self.noisy else [])


class _Silence:
    def __init__(self, active: list[Disturbance]):
        self.layers = {id(d.layer): d.layer for d in active}.values()

    def __enter__(self):
        self.saved = [layer.noise.clone() for layer in self.layers]
        for layer in self.layers:
            layer.noise.zero_()

    def __exit__(self, *_):
        for layer, noise in zip(self.layers, self.saved):
            layer.noise.copy_(noise)

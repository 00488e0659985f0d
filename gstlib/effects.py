"""What happens to the units that an event targets: gone for good, or disturbed for some batches.

Durations count training batches (`tick` is called once after each), so that
no evaluation, however many there are, uses a duration up or changes a weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from gstlib.errors import InputError
from gstlib.network.masking import MaskedLayer
from gstlib.pruning import check_effect, number


@dataclass
class Disturbance:
    """Units of one layer that stay disturbed for `batches` more training batches."""

    layer: MaskedLayer
    units: torch.Tensor
    batches: int
    sd: float = 0.0
    saved: list[torch.Tensor] = field(default_factory=list)
    places: torch.Tensor = field(init=False)  # the units' indices, found once: to look for them makes a GPU wait

    def __post_init__(self):
        self.places = self.units.nonzero().squeeze(1)


class Effect:
    """Applies one kind of effect and carries the temporary ones through training (sections 4.4 and A.3.5).

    * "remove": units masked with bias, scale, shift and shortcut, for good;
    * "remove-weights": weights masked for good, batch normalisation left alone (Figure 5's prune L);
    * "zero": weights set to 0 and held there for `batches` batches, then trained on from 0;
    * "zero-restore": the same, then set back to what they were;
    * "zero-cumulative": the same for all units that any event of the layer has targeted so far, which then get back bias,
      scale, shift and running statistics as well (final version, Figure D2);
    * "gaussian": normal noise added to the stored weights, where it stays and
      trains on: once for `batches` = 0, else fresh noise for each of
      `batches` training batches, the first at the event, so that in the end
      the disturbance has sqrt(batches) times one draw's standard deviation;
    * "gaussian-transient": noise that overlays the weights, fresh for each of
      `batches` batches, and is gone afterwards; the stored weights train on
      beneath it (the other reading of section 4.4).

    Noise has mean 0 and the standard deviation of an untouched filter of the
    same layer (the mean over the filters no event has targeted yet), taken
    when the event strikes.

    Random numbers come from `generator` (None: torch's own).  Noise that
    lasts is drawn where the weights are, on a GPU from a generator there that
    begins with the same seed: a step must not wait for the processor.
    """

    def __init__(self, kind: str, batches: int = 0, generator: torch.Generator | None = None):
        check_effect(kind, batches)
        self.kind, self.batches, self.generator = kind, number("batches", batches, whole=True), generator
        self.active: list[Disturbance] = []
        self._on_device: torch.Generator | None = None

    @property
    def noisy(self) -> bool:
        """Whether layers must carry a noise term in their forward pass."""
        return self.kind == "gaussian-transient"

    @torch.no_grad()
    def apply(self, layer: MaskedLayer, units: torch.Tensor) -> None:
        """Strike `units` (bool, one entry a unit) of `layer`."""
        if self.kind.startswith("remove"):
            layer.remove(units)
            return
        layer.target(units)
        if self.kind.startswith("gaussian"):
            self._strike_gaussian(layer, units)
        else:
            self._strike_zero(layer, units)

    def _strike_zero(self, layer: MaskedLayer, units: torch.Tensor) -> None:
        if self.kind == "zero-cumulative":
            self.end(layer)  # what an earlier event holds yet is put back, and held anew
            units = ~layer.present
        saved = [tensor[units].clone() for tensor in self._kept(layer)]
        layer.parameter[units] = 0
        if self.batches == 0:
            return
        layer.held[units] = 1
        self.active.append(Disturbance(layer, units, self.batches, saved=saved))

    def _kept(self, layer: MaskedLayer) -> list[torch.Tensor]:
        """What the units get back in the end."""
        return {"zero-restore": layer.stored[:1], "zero-cumulative": layer.stored}.get(self.kind, [])

    def _strike_gaussian(self, layer: MaskedLayer, units: torch.Tensor) -> None:
        untouched = layer.present if layer.present.any() else torch.ones_like(layer.present)
        weights = layer.parameter[untouched].flatten(1)
        # a filter of one weight has no deviation of its own; the layer's stands in
        sd = float(weights.std(dim=1).mean() if weights.shape[1] > 1 else weights.std(correction=0))
        disturbance = Disturbance(layer, units, self.batches, sd=sd)
        if self.batches:
            self.active.append(disturbance)
        self._draw(disturbance)

    def _draw(self, disturbance: Disturbance) -> None:
        """Fresh noise on the disturbed units, over their weights or into them; asks the device nothing."""
        stored = disturbance.layer.parameter
        places = disturbance.places.to(stored.device)
        shape = (len(places), *stored.shape[1:])
        draw = torch.randn(shape, generator=self._generator(stored.device), device=stored.device)
        draw = (disturbance.sd * draw).to(stored.dtype)
        if self.noisy:
            disturbance.layer.noise.index_copy_(0, places, draw)
        else:
            stored.index_add_(0, places, draw)

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if self.generator is None or device == self.generator.device:
            return self.generator
        if self._on_device is None:
            self._on_device = torch.Generator(device).manual_seed(self.generator.initial_seed())
        return self._on_device

    @torch.no_grad()
    def tick(self) -> None:
        """Count one training batch, after the optimiser's step: refresh noise, release what is over."""
        still = []
        for disturbance in self.active:
            disturbance.batches -= 1
            if disturbance.batches > 0:
                still.append(disturbance)
                if self.kind.startswith("gaussian"):
                    self._draw(disturbance)
                else:  # what is hidden is 0 as well: else weight decay would fill the optimiser's moments with it
                    stored = disturbance.layer.parameter
                    stored.index_fill_(0, disturbance.places.to(stored.device), 0)
            else:
                self._release(disturbance)
        self.active = still

    def _release(self, disturbance: Disturbance) -> None:
        layer = disturbance.layer
        places = disturbance.places.to(layer.parameter.device)  # the network may have been moved since
        if self.kind.startswith("gaussian"):
            if self.noisy:
                layer.noise.index_fill_(0, places, 0)
            return
        # the optimiser's moments moved the stored weights while the mask hid them
        layer.parameter.index_fill_(0, places, 0)
        for tensor, saved in zip(self._kept(layer), disturbance.saved):
            tensor.index_copy_(0, places, saved.to(tensor))
        layer.held.index_fill_(0, places, 0)

    @torch.no_grad()
    def end(self, layer: MaskedLayer | None = None) -> None:
        """Let everything in force (in `layer`, if given) be over."""
        for disturbance in self.active:
            if layer in (None, disturbance.layer):
                self._release(disturbance)
        self.active = [d for d in self.active if layer not in (None, d.layer)]

    def check_known(self, layers: list[MaskedLayer]) -> None:
        """Raise `InputError` when the network is disturbed by an effect whose end nobody knows."""
        for layer in layers:
            known = torch.zeros(layer.units, dtype=torch.bool, device=layer.parameter.device)
            for disturbance in self.active:
                if disturbance.layer is layer:
                    known |= disturbance.units.to(known.device)
            held, noise = layer.held, layer.noise
            disturbed = known & False if held is None else held > 0.5
            if noise is not None:
                disturbed = disturbed | noise.flatten(1).any(1)
            if (disturbed & ~known).any():
                raise InputError(f"units of layer {layer.name!r} are disturbed for a time that this Pruner does not know; "
                                 "load its state (load_state_dict) together with the network's")

    def state_dict(self, layers: list[MaskedLayer]) -> dict:
        """What is in force, layers by their place in `layers`, and the state of a generator on the device; masks and
        noise themselves are the network's buffers."""
        active = [{"layer": layers.index(d.layer), "units": d.units, "batches": d.batches, "sd": d.sd, "saved": d.saved}
                  for d in self.active]
        return {"active": active, "on_device": None if self._on_device is None else self._on_device.get_state()}

    def load_state_dict(self, state: dict, layers: list[MaskedLayer]) -> None:
        """Take up what `state_dict` gave."""
        self.active = []
        for entry in state["active"]:
            layer = layers[entry["layer"]]
            device = layer.parameter.device
            saved = [tensor.to(device) for tensor in entry["saved"]]
            self.active.append(Disturbance(layer, entry["units"].to(device), entry["batches"], entry["sd"], saved))
        if state["on_device"] is not None:
            self._generator(layers[0].parameter.device).set_state(state["on_device"])

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Context in which the forward pass carries no noise; the noise in force comes back unchanged."""
        carried = {d.layer.name: d.layer.noise for d in self.active} if self.noisy else {}
        saved = [noise.clone() for noise in carried.values()]
        for noise in carried.values():
            noise.zero_()
        try:
            yield
        finally:
            for noise, before in zip(carried.values(), saved):
                noise.copy_(before)

"""What can be pruned in networks of torchvision and timm, and why not the rest: python tests/architectures.py --help.

For three layers of each network half the units are removed, and hooks of this
program's own look whether the next convolutions and linear layers are given
zeros there.  The book's page "Prune your own network" shows the file that --output writes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torchvision
from torch import nn
from tqdm import tqdm

from gstlib import Pruner, Schedule, data
from gstlib.errors import InputError
from gstlib.network.masking import check_layer
from gstlib.network.surroundings import Surroundings
from gstlib.training import train

TORCHVISION = ("resnet18", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "efficientnet_v2_s",
               "convnext_tiny", "densenet121", "regnet_y_400mf", "vgg11_bn", "squeezenet1_0", "googlenet", "inception_v3")
TIMM = ("resnet26d", "vit_tiny_patch16_224")


def build(name: str) -> nn.Module:
    """The network with random parameters, norms' included."""
    torch.manual_seed(0)
    if name in TIMM:
        import timm

        model = timm.create_model(name, pretrained=False)
    else:
        model = getattr(torchvision.models, name)(
            weights=None, **({"init_weights": False} if name in ("googlenet", "inception_v3") else {}))
    for module in model.modules():
        if hasattr(module, "running_mean") or isinstance(module, nn.LayerNorm):
            for tensor in (module.weight, module.bias, getattr(module, "running_mean", None)):
                if tensor is not None:
                    tensor.data.normal_()
    return model.eval()


def reasons(around: Surroundings) -> tuple[list[str], dict[str, int]]:
    """The layers whose units can be removed, and why how many others cannot."""
    can, why = [], Counter()
    for layer in around.layers:
        try:
            check_layer(around, layer, "filter", "l2", "remove")
            can.append(layer)
        except InputError as error:
            why[re.sub(r"^layer '[^']*' cannot be pruned by units: ", "", str(error))] += 1
    return can, dict(why)


@torch.no_grad()
def zeros_reach_readers(model: nn.Module, layer: str, removed: torch.Tensor, readers: dict, x: torch.Tensor) -> bool:
    """Whether every layer that reads `layer` is given exactly 0 in its removed units, in a pass on noise."""
    heard, handles = [], []
    for path, labels in readers.items():
        module = model.get_submodule(path)
        gone = torch.cat([torch.zeros(1, dtype=torch.bool), removed])[labels]

        def look(module, inputs, gone=gone):
            axis = inputs[0].dim() - 1 - len(getattr(module, "kernel_size", ()))
            heard.append(bool((inputs[0].movedim(axis, 0)[gone] != 0).any()))
        handles.append(module.register_forward_pre_hook(look))
    model(x)
    for handle in handles:
        handle.remove()
    return not any(heard)


def judge(name: str) -> dict:
    """What the table says of one network."""
    model, began = build(name), time.process_time()
    around = Surroundings(model)
    can, why = reasons(around)
    seconds = time.process_time() - began
    plain, silent = 0, 0
    tried = [can[i * (len(can) - 1) // 2] for i in range(3)]
    x = torch.randn(around.inputs[0].shape)
    for layer in tried:
        model = build(name)
        pruner = Pruner(model, Schedule(0, 0, 0.5, 1), [layer], score="l2", example=x)
        pruner.epoch(0, lambda: 0.0)
        silent += zeros_reach_readers(model, layer, ~pruner.layers[0].present, around.unit(layer).readers, x)
        try:
            pruner.finish()
            plain += 1
        except InputError:
            pass
    return {"network": name, "layers": len(around.layers), "prunable": len(can), "refused": why, "tried": tried,
            "silent": silent, "plain": plain, "seconds": round(seconds, 2)}


def main() -> int:
    """The command: writes the file; 1 where a removed unit was heard."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("networks", nargs="*", default=(*TORCHVISION, *TIMM), help="names (default: all)")
    asked.add_argument("--output", type=Path, help="also write the table there, as JSON")
    options = asked.parse_args()
    torch.set_num_threads(1)
    began, rows = time.monotonic(), []
    for name in tqdm(options.networks, unit="network", disable=None):
        rows.append(judge(name))
        print(json.dumps(rows[-1]), flush=True)
    if options.output:
        about = train.provenance(data.load("digits"), torch.device("cpu"), "architectures", time.monotonic() - began)
        options.output.write_text(json.dumps({"about": about, "networks": rows}, indent=1) + "\n")
    return 0 if all(row["silent"] == len(row["tried"]) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

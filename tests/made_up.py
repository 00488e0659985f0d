"""A store of made-up runs of Figure 1 (VGG11) with known accuracies and falls; nothing in it was trained."""

from gstlib import experiments
from gstlib.store import Store

SMOKE = experiments.profile("smoke")
DATA = experiments.data_spec(SMOKE, "digits", "f" * 64)
ABOUT = {"data": "digits", "data_title": "scikit-learn digits", "fingerprint": "f" * 64, "profile": "smoke",
         "device": "a processor", "device_type": "cpu", "finished": "2026-01-02T03:04:05+00:00", "commit": "c" * 40}


def write(store, labelled, final, fall, profile="smoke"):
    """Store a made-up run in place of any: accuracy .5 until the end, where it is `final`; events fall by `fall`."""
    spec = labelled.spec
    epochs = [{"epoch": e, "lr": 1e-3, "train_loss": 0.1, "train_accuracy": 0.9, "test_loss": 1.0, "test_accuracy": 0.5,
               "test_accuracy_clean": 0.5, "parameters": 100, "seconds": 1.0} for e in range(spec.optimiser.epochs)]
    epochs[-1]["test_accuracy"] = final
    events = []
    if spec.pruning:
        schedule = spec.pruning.schedule
        events = [{"epoch": e, "layer": name, "units": 64, "removed": 1, "removed_total": 1, "mean_score": 1.0,
                   "t_pre": 0.5, "t_post": 0.5 - fall}
                  for e in range(spec.optimiser.epochs) for i, name in enumerate(spec.pruning.layers)
                  if e in schedule.event_epochs(i)]
    store.file(spec.id).unlink(missing_ok=True)  # the store itself keeps what it has
    store.write(spec, ABOUT | {"profile": profile, "data": spec.data.name}, {"epoch": epochs, "event": events})


def fill(path, profile="smoke"):
    """A store with three seeds of every configuration; L r=40 falls by 20 points and ends best."""
    store, size = Store(path), experiments.profile(profile)
    data = experiments.data_spec(size, size.data, "f" * 64)
    for number, run in enumerate(experiments.figures.figure1_vgg11(size, data, range(3))):
        fall = {"S r=4": 0.01, "S r=40": 0.05, "L r=40": 0.2, "S r=4 l2": 0.02}.get(run.label, 0.0)
        write(store, run, 0.6 + fall + 0.002 * (number % 4), fall + 0.001 * run.spec.seed, profile)
    return store


SHIFT = {"S": 0.0, "R": 0.1, "L": 0.2}


def effect(spec) -> float:
    """The made-up effect of a configuration: on the final accuracy, and the fall at its events."""
    p = spec.pruning
    if p is None:
        return 0.0
    base = 0.01 * int(p.target[1:]) if p.target[0] == "D" else SHIFT[p.target]
    return base + 0.1 * p.schedule.iterative_rate + 0.01 * (p.score == "l2") + 0.02 * (p.effect == "zero")


def stock(path, *names, seeds=2, but=()):
    """A store with made-up runs of the experiments `names` but for some configurations; nothing was trained."""
    store = Store(path)
    for name in names:
        for label, spec in experiments.experiment(name).runs(SMOKE, DATA, range(seeds)):
            if label in but or spec.id in store:
                continue
            last, fall = spec.optimiser.epochs - 1, effect(spec)
            epochs = [{"epoch": e, "lr": 1e-3, "train_loss": 0.1, "train_accuracy": 0.9, "test_loss": 1.0,
                       "test_accuracy": 0.5 + (0.1 + fall + 0.002 * spec.seed) * (e == last),
                       "test_accuracy_clean": 0.55, "parameters": 100, "seconds": 1.0} for e in range(last + 1)]
            events, bars = [], []
            if p := spec.pruning:
                deciles = {f"decile_{k}": (1.0 + k) * (1 if p.structure == "weight" else 0.1) for k in range(10)}
                events = [{"epoch": e, "layer": layer, "units": 64, "removed": 1, "removed_total": 1, "t_pre": 0.5,
                           "t_post": 0.5 - fall - 0.001 * spec.seed, **deciles,
                           "mean_score": 100.0 * int(p.target[1:] or 0) + e}
                          for e in range(last + 1) for i, layer in enumerate(p.layers)
                          if e in p.schedule.event_epochs(i)]
            if spec.measures:
                bars = [{"epoch": when, "layer": f"bn{n}", "layer_index": n, "ks": 0.01 * n + 0.1 * (when > 0),
                         "left": left, "right": left + 1, "count": 10 + n}
                        for when in (-1, last) for n in range(16) for left in range(-5, 5)]
            store.write(spec, ABOUT, {"epoch": epochs, "event": events, "histogram": bars})
    return store

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
    for number, run in enumerate(experiments.figure1_vgg11(size, data, range(3))):
        fall = {"S r=4": 0.01, "S r=40": 0.05, "L r=40": 0.2, "S r=4 l2": 0.02}.get(run.label, 0.0)
        write(store, run, 0.6 + fall + 0.002 * (number % 4), fall + 0.001 * run.spec.seed, profile)
    return store

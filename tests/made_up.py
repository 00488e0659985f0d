"""Stores of made-up runs with known accuracies and falls; nothing in them was trained."""

from gstlib import experiments
from gstlib.store import Store

SMOKE = experiments.profile("smoke")
DATA = experiments.data_spec(SMOKE, "digits", "f" * 64)
ABOUT = {"data": "digits", "data_title": "scikit-learn digits", "fingerprint": "f" * 64, "profile": "smoke",
         "device": "a processor", "device_type": "cpu", "finished": "2026-01-02T03:04:05+00:00", "commit": "c" * 40}


def rows(spec, final, fall, train=0.9, lift=0.0, score=0.0):
    """A run's tables: test accuracy .5 at each epoch and .5 + `lift` at the last, events that fall by `fall`, and the
    accuracy `final` on all images that were not trained on."""
    last = spec.optimiser.epochs - 1
    epochs = [{"epoch": e, "lr": 1e-3, "train_loss": 0.1, "train_accuracy": train, "test_loss": 1.0,
               "test_accuracy": 0.5 + lift * (e == last), "test_accuracy_clean": 0.55, "parameters": 100,
               "seconds": 1.0}
              for e in range(last + 1)]
    events, bars = [], []
    if p := spec.pruning:
        deciles = {f"decile_{k}": (1.0 + k) * (1 if p.structure == "weight" else 0.1) for k in range(10)}
        events = [{"epoch": e, "layer": layer, "units": 64, "removed": 1, "removed_total": 1, "t_pre": 0.5,
                   "t_post": 0.5 - fall, **deciles, "mean_score": score + e, "negative_scales": 0}
                  for e in range(-1, last + 1) for i, layer in enumerate(p.layers) if e in p.schedule.event_epochs(i)]
    fitted = {"train_true": train, "train_wrong": train - fall} if spec.data.wrong_labels else {}
    for event in events if fitted else ():
        event |= {"train_true_pre": 0.9, "train_true_post": 0.9 - fall, "train_wrong_pre": 0.8,
                  "train_wrong_post": 0.8 - 1.5 * fall}
    flat = made_up_flatness(spec, fall) if "flatness" in spec.measures else {}
    if "bn-histogram" in spec.measures:
        bars = [{"epoch": when, "layer": f"bn{n}", "layer_index": n, "ks": 0.005 * n + 0.1 * (when > 0), "sd": 1.0,
                 "left": left, "right": left + 1, "count": 10 + n}
                for when in (-1, last) for n in range(16) for left in range(-5, 5)]
    ended = [{"images": 1000, "accuracy": final, "loss": 1.0, "train_accuracy": train, "train_loss": 0.1} | fitted]
    return {"epoch": epochs, "event": events, "histogram": bars, "final": ended} | flat


def made_up_flatness(spec, fall):
    """Tables of a minimum the flatter, the more a run's events make its accuracy fall; curves are parabolas."""
    how, sharp = spec.flatness, 1 / (1 + 5 * fall)
    row = {"epoch": spec.flatness_epoch, "images": how.images, "hessian_images": how.hessian_images, "loss": 1.0,
           "accuracy": 0.5, "trace": 2000 * sharp, "trace_error": 100.0, "trace_centred": 1900 * sharp,
           "curvature_error": 20.0, "curvature_other": 250 * sharp, "curvature_other_error": 25.0,
           "relative_mean": 1 + 0.1 * sharp, "relative_worst": 1 + 0.2 * sharp, "seconds": 0.5}
    values = [100 * sharp / number for number in range(1, how.eigenvalues + 1)]
    return {"flatness": [row], "eigenvalue": [{"number": n, "eigenvalue": value} for n, value in enumerate(values, 1)],
            "direction": [{"number": n, "step": step, "loss": 1 + values[n - 1] * step**2 / 2,
                           "accuracy": max(0.1, 0.5 - sharp * abs(step))}
                          for n in range(1, how.directions + 1) for step in how.steps]}


def write(store, labelled, final, fall, profile="smoke", **more):
    """Store a made-up run (see `rows`) in place of any."""
    spec = labelled.spec
    store.file(spec.id).unlink(missing_ok=True)  # the store itself keeps what it has
    store.write(spec, ABOUT | {"profile": profile, "data": spec.data.name}, rows(spec, final, fall, **more))


FALLS = {"S r=4": 0.01, "S r=40": 0.05, "L r=40": 0.2, "S r=4 l2": 0.02}


def noise(number):
    """A small deviation, another for each run."""
    return 0.006 * (0.618 * number % 1)


def fill(path, profile="smoke"):
    """A store with three seeds of Figure 1 (VGG11); L r=40 falls by 20 points and ends best."""
    store, size = Store(path), experiments.profile(profile)
    data = experiments.data_spec(size, size.data, "f" * 64)
    seeds = range(size.first_seed, size.first_seed + 3)
    for number, run in enumerate(experiments.figures.figure1_vgg11(size, data, seeds)):
        fall = FALLS.get(run.label, 0.0)
        write(store, run, 0.6 + fall + noise(number), fall + 0.001 * (run.spec.seed - size.first_seed), profile)
    return store


SHIFT = {"S": 0.0, "R": 0.1, "L": 0.2}


def effect(spec) -> float:
    """The made-up effect of a configuration: on the final accuracy, and the fall at its events."""
    p = spec.pruning
    if p is None:
        return 0.0
    base = 0.01 * int(p.target[1:].partition("-")[0]) if p.target[0] == "D" else SHIFT[p.target]
    return base + 0.1 * p.schedule.iterative_rate + 0.01 * (p.score == "l2") + 0.02 * (p.effect == "zero")


def stock(path, *names, seeds=3, but=()):
    """A store with made-up runs of the experiments `names` but for some configurations; nothing was trained."""
    store = Store(path)
    for name in names:
        for number, (label, spec) in enumerate(experiments.experiment(name).runs(SMOKE, DATA, range(seeds))):
            if label not in but and not store.file(spec.id).exists():
                fall = effect(spec)
                score = 100.0 * int(spec.pruning.target[1:].partition("-")[0] or 0) if spec.pruning else 0
                store.write(spec, ABOUT, rows(spec, 0.6 + fall + noise(number), fall + 0.001 * spec.seed, score=score,
                                              lift=0.1))
    return store

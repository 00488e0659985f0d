"""Each prediction on made-up seeds whose verdict is known by construction."""

import pytest
from made_up import DATA, stock
from test_claims import by, table

from gstlib import experiments
from gstlib.claims import CONTRADICTED, INCONCLUSIVE, SUPPORTED, beyond
from gstlib.reading.study import study

BY_ID = {claim.id: claim for claim in beyond.PREDICTIONS}


def made(prediction: str, sign: int):
    """Five seeds that support a prediction (sign 1), contradict it (-1), or say nothing (0)."""
    (need,) = BY_ID[prediction].needs.values()
    match prediction:
        case "W1":
            return table(need, accuracy=by({"L r=40": 2 * sign, "L r=40, width/8": -sign}))
        case "W2":
            return table(need, accuracy=by({"L r=40": sign, "L r=40, steps/8": -2 * sign}))
        case "W3":
            return table(need, accuracy=lambda label: sign * (label.startswith("L") and "steps" not in label),
                         back=lambda label: float("steps" not in label))
        case "W4":
            return table(need, accuracy=by({"L r=40, fewer images": sign}))
        case "N1":
            return table(need, forgotten=by({"L r=40, 20% wrong": 2 * sign}))
        case "N2":
            return table(need, accuracy=by({"L r=40, 20% wrong": sign, "L r=40, 40% wrong": 3 * sign}))
        case "N3":
            return table(need, wrong_fitted=by({"L r=40, 20% wrong": -sign}))
        case "N4":
            return table(need, log_train_loss=by({"L r=40, 20% wrong": -sign}))
        case "D1":
            return table(need, 5, 0.1 if sign else 0.5, log_instability=dose, accuracy=lambda label: sign * dose(label))
        case "D2":
            return table(need, 5, 0.1 if sign else 0.5, log_instability=way, accuracy=lambda label: sign * way(label))
        case "R1" | "R4":
            return table(need, accuracy=lambda label: sign * label.startswith("L"))
        case "R2":
            return table(need, accuracy=by({"L r=40": sign}))
        case "R3":
            return table(need, accuracy=by({"L r=40 l2, GroupNorm": sign}))
    raise KeyError(prediction)


def dose(label):
    return next(labels.index(label) for labels in beyond.WAYS.values() if label in labels)


def way(label):
    return next(k for k, labels in enumerate(beyond.WAYS.values()) if label in labels)


@pytest.mark.parametrize(("sign", "verdict"), [(1, SUPPORTED), (-1, CONTRADICTED), (0, INCONCLUSIVE)])
@pytest.mark.parametrize("prediction", BY_ID)
def test_verdict_known_by_construction(prediction, sign, verdict):
    found = BY_ID[prediction].evaluate(made(prediction, sign))
    assert found.verdict == verdict, found.note


@pytest.mark.parametrize("prediction", BY_ID.values(), ids=BY_ID)
@pytest.mark.parametrize("profile", experiments.PROFILES)
def test_a_prediction_names_configurations_that_its_experiment_runs(prediction, profile):
    size = experiments.profile(profile)
    data = experiments.data_spec(size, size.data, "f" * 64)
    for figure, needs in prediction.needs.items():
        runs = {run.label for run in experiments.experiment(figure).runs(size, data, [0])}
        assert {label for labels in needs.values() for label in labels} <= runs


def test_what_lacks_is_said_once_with_a_command_that_names_the_images(tmp_path):
    store = stock(tmp_path / "results", "beyond-labels", seeds=1)
    why = beyond.answers([study(store, "beyond-labels", seeds=3)], store).set_index("id").loc["N3", "why"]
    assert why.startswith("3 complete seeds are needed, there are 1: seeds 1, 2 lack none, 20% wrong, L r=40, 20% wrong; ")
    assert f"--data {DATA.name}" in why

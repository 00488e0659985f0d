import architectures
import pytest


@pytest.mark.parametrize(("name", "layers", "prunable"), [("squeezenet1_0", 26, 25), ("mobilenet_v3_small", 54, 44)])
def test_networks_of_others_are_judged_and_removed_units_are_not_heard(name, layers, prunable):
    # all but the head, and in mobilenet_v3_small but the nine gates
    row = architectures.judge(name)
    assert (row["layers"], row["prunable"], sum(row["refused"].values())) == (layers, prunable, layers - prunable)
    assert row["silent"] == len(row["tried"]) == 3 and 0 < row["plain"] <= 3

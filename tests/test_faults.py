import faults
import pytest


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return faults.Whole(tmp_path_factory.mktemp("whole"))


def test_a_campaign_killed_again_and_again_loses_nothing(tmp_path, whole):
    seen = faults.killed(tmp_path, whole, kills=3)
    assert seen.held, seen


@pytest.mark.parametrize("case", faults.CASES, ids=lambda case: case.__name__)
def test_fault(tmp_path, whole, case):
    seen = case(tmp_path / "case", whole)
    assert seen.held, seen

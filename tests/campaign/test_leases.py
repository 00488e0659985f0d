import errno
import fcntl
import multiprocessing
import os
import signal
import time

import pytest

from gstlib.campaign.leases import Leases
from gstlib.errors import InputError

RUN, OTHER = "0123456789abcdef", "fedcba9876543210"


def test_one_alone_holds_a_run(tmp_path):
    one, two = Leases(tmp_path), Leases(tmp_path)
    assert one.take(RUN) and not two.take(RUN) and two.take(OTHER)
    one.release(RUN)
    assert two.take(RUN) and not one.take(RUN)


def test_leaving_the_context_releases_everything(tmp_path):
    with Leases(tmp_path) as leases:
        assert leases.take(RUN) and leases.take(OTHER)
        leases.release("no such run")
    assert list(tmp_path.iterdir()) == []


def _hold(folder, ready):
    with Leases(folder) as leases:
        leases.take(RUN)
        ready.send(True)
        time.sleep(600)


def test_a_suspended_process_keeps_its_run_and_a_killed_one_frees_it_at_once(tmp_path):
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    owner = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path, theirs), daemon=True)
    owner.start()
    assert ours.poll(120)
    heir = Leases(tmp_path)
    os.kill(owner.pid, signal.SIGSTOP)
    assert not heir.take(RUN)
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    assert heir.take(RUN)


def test_what_a_dead_process_or_an_older_version_left_stops_nobody(tmp_path):
    (tmp_path / f"{RUN}.lock").write_text("")
    (tmp_path / f"{RUN}.0").write_text('{"owner": "another"}')
    assert Leases(tmp_path).take(RUN)


def dangling(place):
    place.symlink_to("nowhere")


def zero(place):
    place.symlink_to("/dev/zero")


def file(place):
    place.write_text("")


@pytest.mark.parametrize("make", [file, dangling])
def test_a_folder_that_is_none_is_told(tmp_path, make):
    make(tmp_path / "leases")
    with pytest.raises(InputError, match="cannot be locked in .*leases"):
        Leases(tmp_path / "leases")


@pytest.mark.parametrize("make", [os.mkdir, dangling, zero])
def test_a_lease_that_is_no_file_is_told(tmp_path, make):
    make(tmp_path / f"{RUN}.lock")
    with pytest.raises(InputError, match=f"{RUN}.lock cannot be locked"):
        Leases(tmp_path).take(RUN)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_where_no_file_can_be_locked_every_run_is_free(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with Leases(tmp_path) as one, Leases(tmp_path) as two:
        assert one.take(RUN) and two.take(RUN) and set(one.held) == set(two.held) == {RUN}
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_in_a_lease_s_place_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / f"{RUN}.lock")
    one, two = Leases(tmp_path), Leases(tmp_path)
    assert one.take(RUN) and not two.take(RUN)


def _scramble(folder, gate, won):
    gate.wait()
    leases, kept = Leases(folder), 0
    for n in range(200):
        if leases.take(f"{n:016x}"):
            if n % 2:
                kept += 1
            else:
                leases.release(f"{n:016x}")
    won.put(kept)
    gate.wait()  # the leases of a process that ended would be free to take


def test_many_at_once_share_without_overlap(tmp_path):
    context = multiprocessing.get_context("fork")
    gate, won = context.Barrier(4), context.Queue()
    crew = [context.Process(target=_scramble, args=(tmp_path, gate, won), daemon=True) for _ in range(4)]
    for process in crew:
        process.start()
    assert sum(won.get(timeout=120) for _ in crew) == 100
    for process in crew:
        process.join()

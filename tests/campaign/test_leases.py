import json
import multiprocessing
import os
import signal
import time

import pytest

from gstlib.campaign.leases import Leases
from gstlib.errors import InputError

RUN, OTHER = "0123456789abcdef", "fedcba9876543210"


class Clock:
    """A monotonic clock that goes on when told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def from_elsewhere(leases, run_id=RUN, number=0):
    """Make a lease look as if an unknown machine held it."""
    place = leases.folder / f"{run_id}.{number}"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"machine": "another"}))


def test_one_alone_holds_a_run(tmp_path):
    one, two = Leases(tmp_path), Leases(tmp_path)
    assert one.take(RUN) and one.take(RUN)
    assert not two.take(RUN) and two.take(OTHER)
    one.release(RUN)
    assert two.take(RUN) and not one.take(RUN)


def test_leaving_the_context_releases_everything(tmp_path):
    with Leases(tmp_path) as leases:
        assert leases.take(RUN) and leases.take(OTHER)
    assert list(tmp_path.iterdir()) == []


def test_a_lease_without_a_sign_of_life_is_taken_over(tmp_path, clock):
    dead, heir = Leases(tmp_path, patience=60), Leases(tmp_path, patience=60)
    dead.take(RUN)
    from_elsewhere(dead)
    assert not heir.take(RUN)
    clock.now += 59
    assert not heir.take(RUN)
    clock.now += 1
    assert heir.take(RUN)
    heir.release(RUN)
    assert list(tmp_path.iterdir()) == []


def test_every_sign_of_life_starts_the_watch_anew(tmp_path, clock):
    alive, heir = Leases(tmp_path, patience=60), Leases(tmp_path, patience=60)
    alive.take(RUN)
    from_elsewhere(alive)
    for _ in range(5):
        assert not heir.take(RUN)
        clock.now += 59
        (tmp_path / f"{RUN}.0").write_bytes(alive._text())
        from_elsewhere(alive)


def test_the_clock_on_the_wall_does_not_matter(tmp_path, clock, monkeypatch):
    alive, heir = Leases(tmp_path, patience=60), Leases(tmp_path, patience=60)
    alive.take(RUN)
    from_elsewhere(alive)
    assert not heir.take(RUN)
    for moved in (-1e9, 0, 1e9, 4e9):
        os.utime(tmp_path / f"{RUN}.0", (max(0, moved), max(0, moved)))
        monkeypatch.setattr(time, "time", lambda moved=moved: moved)
        assert not heir.take(RUN)


def test_a_sleeper_that_wakes_sees_that_it_lost_the_run(tmp_path, clock):
    sleeper, heir = Leases(tmp_path, patience=0.1), Leases(tmp_path, patience=0.1)
    sleeper.take(RUN)
    from_elsewhere(sleeper)
    heir.take(RUN)
    clock.now += 1
    assert heir.take(RUN) and not sleeper.lost(RUN)
    with sleeper:
        deadline = time.perf_counter() + 30
        while not sleeper.lost(RUN) and time.perf_counter() < deadline:
            time.sleep(0.01)
        assert sleeper.lost(RUN)
        sleeper.release(RUN)
        assert not Leases(tmp_path).take(RUN)  # the heir's lease is untouched


def test_a_new_count_begun_meanwhile_is_not_taken_for_the_old_one(tmp_path, clock, monkeypatch):
    dead, late, quick = (Leases(tmp_path, patience=1) for _ in range(3))
    dead.take(RUN)
    from_elsewhere(dead)
    assert not late.take(RUN) and not quick.take(RUN)
    clock.now += 2
    judged = late._abandoned

    def slow(*what):
        verdict = judged(*what)
        # between the late one's verdict and its move: taken over, done, and begun again by somebody else
        assert quick.take(RUN)
        quick.release(RUN)
        assert dead.take(RUN) or True
        dead._held.clear()
        assert quick.take(RUN)
        return verdict

    monkeypatch.setattr(late, "_abandoned", slow)
    assert not late.take(RUN)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [f"{RUN}.0"] and quick.take(RUN)


def _hold(folder, ready):
    with Leases(folder, patience=3600) as leases:
        leases.take(RUN)
        ready.send(True)
        time.sleep(600)


def test_a_killed_process_of_this_machine_is_noticed_at_once(tmp_path):
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    owner = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path, theirs), daemon=True)
    owner.start()
    assert ours.poll(120)
    heir = Leases(tmp_path, patience=3600)
    assert not heir.take(RUN)
    os.kill(owner.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while not (taken := heir.take(RUN)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert taken
    owner.join()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": "1; rm"}', "\x00\xff"])
def test_a_garbled_lease_is_waited_for_and_taken_over(tmp_path, clock, text):
    (tmp_path / f"{RUN}.3").write_text(text)
    leases = Leases(tmp_path, patience=60)
    assert not leases.take(RUN)
    clock.now += 61
    assert leases.take(RUN) and (tmp_path / f"{RUN}.4").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="leases cannot be written"):
        Leases(tmp_path / "file" / "leases").take(RUN)


def _scramble(folder, gate, won):
    gate.wait()
    leases = Leases(folder)
    won.put(sum(leases.take(f"{n:016x}") for n in range(200)))
    won.put(None)
    gate.wait()  # the leases of a process that ended would be free to take


def test_many_at_once_share_without_overlap(tmp_path):
    context = multiprocessing.get_context("fork")
    gate, won = context.Barrier(4), context.Queue()
    crew = [context.Process(target=_scramble, args=(tmp_path, gate, won), daemon=True) for _ in range(4)]
    for process in crew:
        process.start()
    taken, ended = 0, 0
    while ended < 4:
        news = won.get(timeout=120)
        ended, taken = (ended + 1, taken) if news is None else (ended, taken + news)
    for process in crew:
        process.join()
    assert taken == 200

"""Tries to break what keeps runs, and says what came of it: `make faults`, or python tests/faults.py --help.

Every case damages, kills, fills or forges something for real, lets gstlib go
on, and compares what is stored in the end with what was expected.  The book's
page "What was tried to break it" shows the file this writes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from gstlib import data
from gstlib.campaign import runner
from gstlib.campaign.leases import Leases
from gstlib.errors import InputError
from gstlib.experiments import Labelled
from gstlib.spec import DataSpec, ModelSpec, OptimiserSpec, PruningSpec, RunSpec
from gstlib.store import Store, export, import_
from gstlib.training import checkpoint, train
from gstlib.training.checkpoint import Checkpoints

EVENTS = PruningSpec(("conv7", "conv8"), (1, 1), (11, 11), (0.5, 0.5), 3)


digits = functools.cache(lambda: data.load("digits"))


class Seen(NamedTuple):
    """What a case expected and what it saw."""

    fault: str
    expected: str
    seen: str
    tries: int
    held: bool


def campaign(first_seed: int = 0, number: int = 4) -> list[Labelled]:
    """Runs of about half a second: every kind of effect, so that every kind of state is in their checkpoints."""
    kinds = [None, EVENTS, dataclasses.replace(EVENTS, effect="gaussian", batches=5),
             dataclasses.replace(EVENTS, target="R", effect="zero-restore", batches=5)]
    spec = RunSpec(DataSpec(*digits().known, train_size=64, test_size=40), ModelSpec("vgg11", 1 / 16),
                   OptimiserSpec(epochs=12, batch_size=32, milestones=(6,)))
    return [Labelled(f"run {i}", dataclasses.replace(spec, pruning=kinds[i % 4], seed=first_seed + i))
            for i in range(number)]


def go(results: Path, runs: list[Labelled], **options) -> runner.Outcome:
    """Train what is missing, in this process unless told otherwise, with a checkpoint every 100 ms."""
    options = {"workers": 1, "executor": "local", "quiet": True, "checkpoint_every": 0.1} | options
    return runner.run(Store(results), runs, "digits", "faults", "cpu", **options)


def rows(results: Path, labelled: Labelled) -> dict[str, str]:
    """A stored run's tables as text, every digit of every number, seconds aside."""
    tables = Store(results).read(labelled.spec.id).tables
    return {name: table.drop(columns="seconds", errors="ignore").to_json(double_precision=15) + str(
        table.drop(columns="seconds", errors="ignore").select_dtypes("float").to_numpy().tobytes().hex())
        for name, table in tables.items()}


class Whole:
    """The rows of runs never interrupted, trained once each."""

    def __init__(self, folder: Path):
        self.folder = folder

    def equal(self, results: Path, runs: list[Labelled]) -> int:
        """How many of `runs` are stored under `results` with the rows of runs never interrupted."""
        go(self.folder, runs)
        store = Store(results)
        return sum(store.file(x.spec.id).exists() and rows(results, x) == rows(self.folder, x) for x in runs)


@contextlib.contextmanager
def hushed():
    """What gstlib says of a fault, kept from the terminal; the text is in the yielded buffer."""
    text = io.StringIO()
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
        yield text


def killed(folder: Path, whole: Whole, kills: int = 100, seed: int = 0) -> Seen:
    """SIGKILL to a working campaign, again and again, each time begun again from what it left."""
    moments = random.Random(seed)
    whole.equal(folder, campaign(number=1))  # loads what torch loads late, which every child would else do again
    done = finished = equal = resumed = midway = 0
    with tqdm(total=kills, desc="kills", unit="kill", disable=None) as bar:
        while done < kills:
            runs, results = campaign(first_seed=100 * finished), folder / f"campaign-{finished}"
            replicas = (1, 4)[finished % 2]
            while True:
                child = Child(lambda: go(results, runs, replicas=replicas))
                time.sleep(moments.uniform(0, 1.5))
                over = child.ended(wait=False) is not None
                if not over:
                    child.kill()
                    midway += any((results / "checkpoints").glob("*"))
                    done += 1
                    bar.update()
                if over or done >= kills:
                    break
            go(results, runs, replicas=replicas)
            equal += whole.equal(results, runs)
            store = Store(results)
            resumed += sum(store.read(x.spec.id).provenance["resumed"] > 0 for x in runs)
            clean = not list((results / "checkpoints").glob("*")) and not list((results / "leases").glob("*"))
            finished += 1
            if not clean:
                break
    total = 4 * finished
    return Seen(f"campaign killed with SIGKILL at {done} random moments", "every final table equal to the uninterrupted one's",
                f"{equal} of {total} runs equal in every digit; {midway} kills struck with a run under way, {resumed} runs went "
                f"on from a checkpoint; {finished} campaigns; "
                + ("nothing left behind" if clean else "checkpoints or leases left behind"),
                done, equal == total and clean and done >= kills and resumed > 0)


class Child:
    """`act` in a forked process of its own, whose progress nobody sees; what it raises is printed."""

    def __init__(self, act: Callable[[], object]):
        ready, theirs = os.pipe()
        self.number = os.fork()
        if self.number:
            os.close(theirs)
            os.read(ready, 1)  # until it has begun
            os.close(ready)
            return
        said, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, 1), os.dup2(null, 2)
            os.close(theirs)
            act()
            os._exit(0)
        except BaseException:
            os.write(said, traceback.format_exc().encode())
            os._exit(1)

    def ended(self, wait: bool = True) -> int | None:
        """How it ended: its exit code, a signal's number negated, or None where it works on.

        Raises:
            RuntimeError: it failed, so that there is nothing to wait for.
        """
        number, status = os.waitpid(self.number, 0 if wait else os.WNOHANG)
        if number and os.waitstatus_to_exitcode(status) == 1:
            raise RuntimeError("a child failed")
        return os.waitstatus_to_exitcode(status) if number else None

    def until(self, reached: Callable[[], bool]) -> None:
        """Waits until `reached`, as long as the child works on it."""
        while not reached():
            if self.ended(wait=False) is not None:
                raise RuntimeError("a child ended before its time")
            time.sleep(0.002)

    def kill(self) -> None:
        os.kill(self.number, signal.SIGKILL)
        self.ended()


def _places(length: int, tries: int) -> list[int]:
    """Places all over a file of `length` bytes, both ends included."""
    return sorted({round(i * (length - 1) / (tries - 1)) for i in range(tries)})


def table_flipped(folder: Path, whole: Whole, tries: int = 40) -> Seen:
    """A bit of a stored table flipped, in every part of the file."""
    return _tables(folder, whole, tries, "flipped", lambda raw, at: raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1:])


def table_cut(folder: Path, whole: Whole, tries: int = 20) -> Seen:
    """A stored table cut off."""
    return _tables(folder, whole, tries, "cut off", lambda raw, at: raw[:at])


def _tables(folder: Path, whole: Whole, tries: int, how: str, damage: Callable[[bytes, int], bytes]) -> Seen:
    runs = campaign(number=1)
    go(folder, runs)
    place = Store(folder).file(runs[0].spec.id)
    raw = place.read_bytes()
    found, unchanged = [], 0
    for at in _places(len(raw), tries):
        place.write_bytes(damage(raw, at))
        with hushed() as said:
            if runner.missing(Store(folder), runs):
                found += [at] if "counts as missing" in said.getvalue() else []
            else:  # where the file repeats itself, a flip changes nothing that is read
                unchanged += whole.equal(folder, runs)
        place.write_bytes(raw)
    place.write_bytes(damage(raw, found[len(found) // 2]))
    with hushed():
        again = go(folder, runs).trained == [runs[0].spec.id] and whole.equal(folder, runs) == 1
    return Seen(f"stored table {how} at {tries} places", "found on reading, trained again to the same rows",
                f"{len(found)} found, {unchanged} where nothing that is read had changed; "
                f"trained again: {'same' if again else 'other'} rows", tries, len(found) + unchanged == tries and again)


def checkpoint_damaged(folder: Path, whole: Whole, tries: int = 40) -> Seen:
    """A checkpoint with a flipped bit, or cut off."""
    runs = campaign(number=1)
    run_id = runs[0].spec.id
    _stopped_midway(folder, runs)
    kept = Checkpoints(folder / "checkpoints", "cpu")
    raw, found = kept.file(run_id).read_bytes(), 0
    for number, at in enumerate(_places(len(raw), tries)):
        kept.file(run_id).write_bytes(raw[:at] if number % 2 else raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:])
        with hushed() as said:
            anew = Checkpoints(folder / "checkpoints", "cpu")  # each says a reason once
            found += anew.position(run_id) == (0, 0) and "passed over" in said.getvalue()
    kept.file(run_id).write_bytes(raw[:len(raw) // 2])
    with hushed():
        go(folder, runs)
    same = whole.equal(folder, runs) == 1
    return Seen(f"checkpoint flipped or cut off at {tries} places", "passed over, the run begun anew, same rows",
                f"{found} of {tries} passed over; {'same' if same else 'other'} rows", tries, found == tries and same)


def _stopped_midway(folder: Path, runs: list[Labelled], calls: int = 14) -> None:
    asked = []
    kept = Checkpoints(folder / "checkpoints", "cpu")
    with contextlib.suppress(train.Stopped):
        train.train_group([x.spec for x in runs], digits(), "cpu", lambda _: None, "faults", kept,
                          lambda: asked.append(True) or len(asked) >= calls)


class _Trap:
    """Unpickled, it would make the folder that it names."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickle_planted(folder: Path, whole: Whole) -> Seen:
    """A pickle that runs code, under a checkpoint's name and with a right digest."""
    runs = campaign(number=1)
    kept, trap = Checkpoints(folder / "checkpoints", "cpu"), folder / "sprung"
    run_id = runs[0].spec.id
    kept.save(run_id, 3, 0, {})
    buffer = io.BytesIO()
    torch.save({"run": _Trap(trap)}, buffer)
    head = {"gstlib.checkpoint": checkpoint.SCHEMA, "id": run_id, "epoch": 3, "step": 0, "kind": kept.kind}
    head["sha256"] = checkpoint.digest(head, buffer.getvalue())
    kept.file(run_id).write_bytes(json.dumps(head).encode() + b"\n" + buffer.getvalue())
    with hushed():
        go(folder, runs)
    same, sprung = whole.equal(folder, runs) == 1, trap.exists()
    return Seen("pickle planted under a checkpoint's name", "no code run, passed over, begun anew, same rows",
                f"code {'RUN' if sprung else 'not run'}; {'same' if same else 'other'} rows", 1, same and not sprung)


def disk_full(folder: Path, whole: Whole) -> Seen:
    """No space left: on a small file system of its own where one can be mounted, else by a limit on file size."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = campaign(number=3)
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True).returncode == 0
    try:
        go(folder, runs[:1], checkpoint_every=1e9)
        before = rows(folder, runs[0])
        if mounted:
            with contextlib.suppress(OSError), open(folder / "filler", "wb") as filler:
                while True:
                    filler.write(bytes(4096))
                    filler.flush()
        refused = Child(lambda: _limited(folder, runs, limit=not mounted)).ended() == 2
        store = Store(folder)
        kept = rows(folder, runs[0]) == before and store.ids() == [runs[0].spec.id]
        halves = [p for p in store.folder.iterdir() if p.suffix != ".parquet"
                  and p.name.startswith(tuple(f".{x.spec.id}" for x in runs))]
        (folder / "filler").unlink(missing_ok=True)
        go(folder, runs)
        same = whole.equal(folder, runs)
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=False)
    return Seen("disk full" + ("" if mounted else " (limit on file size)"),
                "one clear error, nothing finished lost, nothing half-written; with space again, all done",
                f"{'one error' if refused else 'NO clear error'}; finished run {'kept' if kept else 'LOST'}; "
                f"{len(halves)} half-written files; afterwards {same} of 3 equal", 1,
                refused and kept and not halves and same == 3)


def _limited(folder: Path, runs: list[Labelled], limit: bool) -> None:
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
    try:
        go(folder, runs)
    except InputError:
        os._exit(2)


def clock_moved(folder: Path, whole: Whole) -> Seen:
    """The wall clock set a year back and forth while runs are trained and leases held."""
    runs, real = campaign(number=2), time.time
    stolen = 0
    with Leases(folder / "leases") as holder:
        holder.take("0" * 16)
        try:
            for days in (-365, 365, 0):
                time.time = lambda days=days: real() + 86400 * days
                os.utime(folder / "leases" / f"{'0' * 16}.lock", (time.time(), time.time()))
                stolen += Leases(folder / "leases").take("0" * 16)
                go(folder, runs[:1] if days < 0 else runs)
        finally:
            time.time = real
    same = whole.equal(folder, runs)
    return Seen("wall clock moved by a year, back and forth", "no lease expires by it, same rows",
                f"{stolen} leases taken wrongly; {same} of 2 runs equal", 3, not stolen and same == 2)


def two_campaigns(folder: Path, whole: Whole) -> Seen:
    """Two processes with the same work and the same results folder."""
    runs = campaign(number=4)
    folder.mkdir(parents=True)
    rivals = [Child(lambda number=number: (folder / f"told-{number}").write_text(
        "\n".join(go(folder / "results", runs).trained))) for number in range(2)]
    for child in rivals:
        child.ended()
    trained = [run_id for number in range(2) for run_id in (folder / f"told-{number}").read_text().split()]
    same = whole.equal(folder / "results", runs)
    return Seen("two campaigns in one folder at once", "no run trained twice, every table whole",
                f"{len(trained)} trainings of {len(set(trained))} runs; {same} of 4 equal", 1,
                len(trained) == len(set(trained)) == 4 and same == 4)


def survivor(folder: Path, whole: Whole) -> Seen:
    """Campaigns suspended at different epochs, then killed together while another waits for their runs."""
    runs, kept = campaign(number=4), Checkpoints(folder / "results" / "checkpoints", "cpu")
    whole.equal(folder, runs[:1])  # loads what torch loads late
    dead, held = [], [(0, 0)]
    for x in runs[:2]:  # each stops at a place of its own, however fast this machine is now
        dead.append(Child(lambda x=x: go(folder / "results", [x], checkpoint_every=0.01)))
        dead[-1].until(lambda x=x: kept.position(x.spec.id) not in held)
        os.kill(dead[-1].number, signal.SIGSTOP)
        held.append(kept.position(x.spec.id))
    held = held[1:]
    store, told = Store(folder / "results"), folder / "told"
    alive = Child(lambda: told.write_text(json.dumps(dataclasses.asdict(go(folder / "results", runs)))))
    alive.until(lambda: all(store.file(x.spec.id).exists() for x in runs[2:]))
    time.sleep(2)  # it finds the others' runs locked, and waits
    waited = not any(store.file(x.spec.id).exists() for x in runs[:2])
    for child in dead:
        child.kill()
    alive.ended()
    outcome = json.loads(told.read_text())
    same = whole.equal(folder / "results", runs)
    resumed = [store.read(x.spec.id).provenance["resumed"] for x in runs[:2]]
    return Seen("two of three campaigns suspended, then killed", "the third waits, then trains all that is left from where it stood",
                f"held at {held[0]} and {held[1]}; {'waited' if waited else 'did NOT wait'}; {len(outcome['trained'])} of 4 "
                f"trained by it, {len(outcome['left'])} left; resumed {resumed} times; {same} of 4 equal", 1,
                waited and held[0] != held[1] and sorted(outcome["trained"]) == sorted(x.spec.id for x in runs)
                and resumed == [1, 1] and same == 4)


def owner_killed(folder: Path, whole: Whole) -> Seen:
    """The process that holds a run's lease killed in the midst of it."""
    runs = campaign(number=1)
    child, kept = Child(lambda: go(folder, runs)), Checkpoints(folder / "checkpoints", "cpu")
    child.until(kept.file(runs[0].spec.id).exists)
    child.kill()
    held = len(list((folder / "leases").iterdir()))
    go(folder, runs)
    same, left = whole.equal(folder, runs), len(list((folder / "leases").iterdir()))
    resumed = Store(folder).read(runs[0].spec.id).provenance["resumed"]
    return Seen("owner of a lease killed", "the lease falls to the next, who goes on from the checkpoint",
                f"{held} lease left by the dead, {left} in the end; resumed {resumed} time; {same} of 1 equal", 1,
                held == 1 and not left and resumed == 1 and same == 1)


def import_conflict(folder: Path, whole: Whole) -> Seen:
    """An archive whose run has this id and other rows."""
    runs = campaign(number=1)
    go(folder / "here", runs)
    found = Store(folder / "here").read(runs[0].spec.id)
    forged = {name: table.to_dict("records") for name, table in found.tables.items()}
    forged["epoch"][-1]["test_accuracy"] += 0.25
    Store(folder / "there").write(found.spec, found.provenance, forged)
    export(Store(folder / "there"), folder / "archive.zip")
    added, known, refused = import_(Store(folder / "here"), folder / "archive.zip")
    same = whole.equal(folder / "here", runs)
    return Seen("import of a known id with other rows", "refused and reported, the stored run kept",
                f"{len(refused)} refused, {len(added)} added; {same} of 1 unchanged", 1,
                list(refused) == [runs[0].spec.id] and not added and same == 1)


def archive_escapes(folder: Path, whole: Whole) -> Seen:
    """An archive with names that lead out of the folder."""
    runs = campaign(number=1)
    go(folder / "here", runs)
    content = Store(folder / "here").file(runs[0].spec.id).read_bytes()
    names = ["../out.parquet", "/tmp/out.parquet", f"runs/../../{runs[0].spec.id}.parquet",
             f"runs/..\\{runs[0].spec.id}.parquet", "runs/" + "a" * 300 + ".parquet"]
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        for name in names:
            archive.writestr(name, content)
    before = {p for p in folder.rglob("*")}
    added, _, refused = import_(Store(folder / "there"), folder / "archive.zip")
    made = {p for p in folder.rglob("*")} - before - {folder / "there", folder / "there" / "runs"}
    return Seen("archive with names that lead out of it", "every name refused, nothing written",
                f"{len(refused)} of {len(names)} refused, {len(added)} added, {len(made)} files made", len(names),
                len(refused) == len(names) and not added and not made)


CASES = (table_flipped, table_cut, checkpoint_damaged, pickle_planted, disk_full, clock_moved, two_campaigns, survivor,
         owner_killed, import_conflict, archive_escapes)


def run(kills: int, folder: Path) -> list[Seen]:
    """All cases, the kills first, in folders of their own under `folder`."""
    torch.set_num_threads(1)  # before any child is forked: threads do not survive that
    whole = Whole(folder / "whole")
    seen = [killed(folder / "kills", whole, kills)]
    for case in tqdm(CASES, desc="faults", unit="fault", disable=None):
        seen.append(case(folder / case.__name__, whole))
    return seen


def main() -> int:
    """The command: prints the table, writes the file; 1 where something did not hold."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--kills", type=int, default=100, help="SIGKILLs to a working campaign (default: %(default)s)")
    asked.add_argument("--output", type=Path, help="also write what was seen there, as JSON")
    options = asked.parse_args()
    if options.output:
        try:  # before minutes of work, not after
            options.output.parent.mkdir(parents=True, exist_ok=True)
            if options.output.is_dir():
                raise IsADirectoryError(f"{options.output} is a folder")
        except OSError as error:
            asked.error(f"cannot write to --output: {error}; name a file in a folder")
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    began = time.monotonic()
    try:
        seen = run(options.kills, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for one in seen:
        print(f"{'held' if one.held else 'FAILED':7}{one.fault}\n       expected: {one.expected}\n       seen:     {one.seen}")
    print(f"{sum(one.held for one in seen)} of {len(seen)} faults held")
    if options.output:
        about = train.provenance(digits(), torch.device("cpu"), "faults", time.monotonic() - began)
        options.output.write_text(json.dumps({"about": about, "faults": [one._asdict() for one in seen]}, indent=1) + "\n")
    return 0 if all(one.held for one in seen) else 1


if __name__ == "__main__":
    sys.exit(main())

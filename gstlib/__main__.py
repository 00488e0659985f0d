"""The command line: python -m gstlib list | run | status | verify | audit | export | import | bench, each with --help."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gstlib import experiments, files
from gstlib.errors import Forgiving, InputError, plain
from gstlib.spec import DATASETS

if TYPE_CHECKING:  # what takes a second to import is imported where an interrupt is one line
    import pandas as pd

    from gstlib.store import Store


def _runs(args, store: Store, profile: str) -> list[tuple[str, experiments.Labelled]]:
    """(figure, run) for every run asked for at a profile: of the data named, or of those whose runs the folder holds, or of
    the profile's own."""
    from gstlib import data
    from gstlib.reading.study import asked, find_data

    size, chosen = experiments.profile(profile), [experiments.experiment(name) for name in _figures(args, profile)]
    experiments.parse_seeds(1 if args.seeds is None else args.seeds)  # wrong ones are told before the data are looked for
    if args.data is None and profile in _held(store):
        source = find_data(store, size, None)
    else:
        source = experiments.data_spec(size, *data.identify(args.data or size.data))
    return [(what.name, run) for what in chosen for run in asked(store, what, size, source, args.seeds)[0]]


def _held(store: Store) -> list[str]:
    """The profiles that the folder holds runs of."""
    found = {about["profile"] for _, _, about in store.about()}
    return [name for name in experiments.PROFILES if name in found]


def _stored(store: Store) -> set[str]:
    """The ids of all stored runs but those that `run` would train again, like damaged ones."""
    return {run_id for run_id, _, _ in store.about()}


def _profile(args) -> str:
    return "smoke" if args.profile is None else args.profile


def _figures(args, profile: str) -> list[str]:
    if "all" in args.figures and {*args.figures} != {"all"}:
        raise InputError("'all' stands for every figure; name it alone")
    named = list(dict.fromkeys(args.figures))
    return experiments.every(profile, args.data) if named in ([], ["all"]) else named


def _check_campaign(args) -> None:
    """A campaign has its own figures, profiles and seeds; none that is named is passed over."""
    if args.figures or args.profile is not None or args.seeds is not None:
        raise InputError("--campaign has figures, profiles and seeds of its own; leave FIGURE, --profile and --seeds out")


def _print(rows: pd.DataFrame | list[dict], as_json: bool) -> None:
    import pandas as pd

    frame = pd.DataFrame(rows)
    if as_json:
        print(frame.to_json(orient="records", indent=1))
    elif frame.empty:
        print("nothing to show")
    else:
        print(frame.to_string(index=False))


def command_list(args) -> int:
    """Every run of the figures named (all, when none is) at a profile: figure, label, seed, id, stored or not."""
    store = _store(args.results)
    if args.campaign:
        _check_campaign(args)
        return _list_campaign(args, store)
    runs, stored = _runs(args, store, _profile(args)), _stored(store)
    _print([{
        "figure": figure, "label": label, "seed": spec.seed, "id": spec.id,
        "model": spec.model.name, "epochs": spec.optimiser.epochs,
        "rate": f"{100 * spec.pruning.schedule.iterative_rate:.1f}%" if spec.pruning else "",
        "stored": spec.id in stored} for figure, (label, spec) in runs], args.json)
    return 0


def _list_campaign(args, store: Store) -> int:
    """What the campaign lacks, in order, with seconds a run here: on a GPU its share of a lockstep group's."""
    from gstlib.campaign import runner, todo
    from gstlib.training import pace
    from gstlib.training.engine import pick_device

    device, stored = pick_device(args.device), _stored(store)
    rows = [{
        "figure": task.figure, "profile": task.profile, "label": task.label, "seed": task.spec.seed, "id": task.spec.id,
        "model": task.spec.model.name, "seconds": round(pace.seconds_per_run(task.spec, device, runner.REPLICAS), 1)}
        for task in todo.campaign(device.type, args.data, runner.elsewhere(store, device)) if task.spec.id not in stored]
    _print(rows, args.json)
    if not args.json and rows:
        print(f"{len(rows)} runs, {sum(row['seconds'] for row in rows) / 3600:.1f} hours one after the other on {device} "
              "(measured on a few steps)")
    return 0


def command_run(args) -> int:
    """Train what is missing of the figures named and store each run as it ends."""
    from gstlib.campaign import runner
    from gstlib.training.engine import switch_off

    switch_off(args.without)
    store = _store(args.results)
    options = {name: getattr(args, name) for name in (
        "workers", "replicas", "time_limit", "quiet", "executor", "address", "gpus_per_group", "checkpoint_every")}
    if args.campaign:
        _check_campaign(args)
        outcome = runner.run_campaign(store, args.data, args.device, **options)
    else:
        outcome = runner.train_missing(store, _figures(args, _profile(args)), _profile(args), args.data, args.seeds, args.device,
                                       **options)
    for run_id, why in outcome.failed.items():
        print(f"failed: {run_id}: {plain(why, 1000)}", file=sys.stderr)
    print(f"{len(outcome.trained)} runs trained, {outcome.stored} were stored already, "
          f"{len(outcome.left)} left for lack of time, {len(outcome.failed)} failed; results in {plain(store.path, 5000)}")
    return 1 if outcome.failed else 0


def command_status(args) -> int:
    """For every configuration of the figures named: runs stored, runs missing; of no figure and no profile named, a line a
    figure, with runs stored of runs wanted at every profile that the folder holds."""
    import pandas as pd

    store = _store(args.results)
    stored, profiles = _stored(store), [args.profile] if args.profile is not None else _held(store) or [_profile(args)]
    frame = pd.DataFrame([{"profile": profile, "figure": figure, "label": label, "stored": spec.id in stored}
                          for profile in profiles for figure, (label, spec) in _runs(args, store, profile)])
    table = frame.groupby(["profile", "figure", "label"], sort=False)["stored"].agg(stored="sum", wanted="size").reset_index()
    if args.profile is None and not args.figures and not args.json:
        table = table.groupby(["figure", "profile"], sort=False)[["stored", "wanted"]].sum()
        counted = table["stored"].astype(str) + "/" + table["wanted"].astype(str)
        _print(counted.unstack(fill_value="").reindex(frame["figure"].unique())[profiles].reset_index(), False)
    else:
        _print(table.assign(missing=table["wanted"] - table["stored"]), args.json)
    return 0


def command_verify(args) -> int:
    """Read every stored run and check it against its digest and its id; exit code 1 when one fails; changes nothing."""
    from gstlib.store import NewerSchema

    store, rows, nothing = _existing(args.results), [], {"model": "", "profile": "", "epochs": 0,
                                                         "final_accuracy": None, "commit": "", "problem": ""}
    for run_id in store.ids():
        try:
            run = store.read(run_id)
            epochs = run.tables["epoch"]
            found = {"ok": True, "model": run.spec.model.name, "profile": plain(run.provenance["profile"]),
                     "epochs": len(epochs), "final_accuracy": round(float(run.tables["final"]["accuracy"].iloc[0]), 4),
                     "commit": plain(run.provenance["commit"])[:12]}
        except InputError as error:
            found = {"ok": None if isinstance(error, NewerSchema) else False, "problem": plain(error, 1000)}
        except KeyError:
            found = {"ok": False, "problem": "it is a link to nothing, or was removed just now"}
        rows.append({"id": run_id} | nothing | found)
    _print(rows, args.json)
    whole, bad, newer = (sum(row["ok"] is ok for row in rows) for ok in (True, False, None))
    if not args.json:
        print(f"{whole} runs are as they were written, {bad} are not"
              + (f"; {newer} are of a newer gstlib" if newer else ""))
    return 1 if bad else 0


def command_audit(args) -> int:
    """Train a stored run again and compare its rows; exit code 1 where they differ by more than they may."""
    from gstlib.campaign.audit import FINAL_ACCURACY, FIRST_LOSS, audit

    profile = _profile(args)
    found = audit(_existing(args.results), profile, args.data or experiments.profile(profile).data, args.run, args.device,
                  args.quiet)
    _print([found._asdict()], args.json)
    if not args.json:
        print("the same bit for bit" if found.same else "not the same bit for bit, "
              + ("as it must be on a CPU of the same type with the same versions and techniques" if found.alike else
                 "on a GPU, another machine or with other versions or techniques; allowed are "
                 f"{FIRST_LOSS:.0%} of the first epoch's training loss, "
                 f"{100 * FINAL_ACCURACY:g} points of final accuracy and no other removals"))
    return 0 if found.ok else 1


def command_export(args) -> int:
    """Pack stored runs into one archive (all of them; or those of the figures, profile, data and seeds named)."""
    from gstlib.store import export

    store, named = _existing(args.results), args.figures or (args.profile, args.data, args.seeds) != (None, None, None)
    ids = {run.spec.id for _, run in _runs(args, store, _profile(args))} & set(store.ids()) if named else None
    print(f"{export(store, args.archive, ids)} runs packed into {plain(args.archive, 5000)}")
    return 0


def command_import(args) -> int:
    """Take the runs of an archive into the results folder; exit code 1 when one is refused."""
    from gstlib.store import import_

    store = _store(args.results)
    added, known, refused = import_(store, args.archive)
    print(f"{len(added)} runs added to {plain(store.path, 5000)}, {len(known)} were there already, {len(refused)} refused")
    for name, why in refused.items():
        print(f"refused: {plain(name)}: {plain(why, 1000)}", file=sys.stderr)
    return 1 if refused else 0


def command_bench(args) -> int:
    """Measure steps per second against a plain PyTorch loop, what each technique gives, what events and scores cost."""
    from gstlib.bench import measure
    from gstlib.training.engine import pick_device, switch_off

    switch_off(args.without)

    def keep(result: dict) -> None:
        if args.output:
            place = Path(args.output)
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                files.write_output(place, lambda file: file.write(f"{json.dumps(result, indent=1)}\n".encode()))
            except OSError as error:
                raise InputError(f"the figures cannot be written to {place} ({error.strerror}); "
                                 "name a file in a folder that can be written to") from error

    result = measure.run(pick_device(args.device), args.quick, args.models, args.replicas, args.techniques, keep)
    print(json.dumps(result, indent=1) if args.json else measure.report(result))
    return 0


def _store(results: str) -> Store:
    from gstlib.store import Store

    return Store(results)


def _existing(results: str) -> Store:
    if not os.path.exists(results):
        raise InputError(f"results folder {results} does not exist; name one with --results")
    return _store(results)


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(prog="python -m gstlib",
                                  description="Replicate arXiv:1906.03728: list, train and check its runs.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(function, figures: bool = True, as_json: bool = True) -> argparse.ArgumentParser:
        name, text = function.__name__.removeprefix("command_"), function.__doc__ or ""  # none under python -OO
        sub = commands.add_parser(name, help=text.split(";")[0].rstrip("."), description=text)
        sub.set_defaults(function=function)
        sub.add_argument("--results", default=os.environ.get("GSTLIB_RESULTS") or "results", metavar="DIR",
                         help="folder of stored runs (default: %(default)s)")
        if figures:
            sub.add_argument("figures", nargs="*", metavar="FIGURE",
                             help=f"which figures: {', '.join(experiments.EXPERIMENTS)}; default all")
            sub.add_argument("--profile", help=f"{', '.join(experiments.PROFILES)}; default: smoke; status: all stored")
            sub.add_argument("--data", help=f"{', '.join(DATASETS)}, or the path of a folder or archive of images; "
                                            "default: the profile's; list, status and export: that of the stored runs")
            sub.add_argument("--seeds", help="a number of seeds, a range 2-5 or a list 0,4,7; default: the profile's")
        if as_json:
            sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    listing, run, _ = add(command_list), add(command_run, as_json=False), add(command_status)
    _, measure = add(command_verify, figures=False), add(command_bench, figures=False)
    check = add(command_audit, figures=False)
    check.add_argument("--profile", help="whose runs to choose from; default: smoke")
    check.add_argument("--data", help="the images that they were trained on, as for run; default: the profile's")
    check.add_argument("--run", metavar="ID", help="which run; default: any")
    for sub in (run, check):
        sub.add_argument("--quiet", action="store_true", help="no progress bar")
    for sub in (listing, run, measure, check):
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    for sub in (run, measure):
        sub.add_argument("--without", metavar="NAMES", help="of capture, streams, compile, autotune, fused-optimiser, with "
                         "commas between: what the engine is not to use, as GSTLIB_WITHOUT")
    for sub in (listing, run):
        sub.add_argument("--campaign", action="store_true",
                         help="what is missing of this type of device's list, most valuable first; no FIGURE")
    run.add_argument("--workers", type=int, help="runs at a time on a CPU (default: one a core), GPUs (default: all)")
    run.add_argument("--replicas", type=int, help="runs in lockstep on one GPU (default: 10, or what memory holds)")
    run.add_argument("--time-limit", type=float, metavar="MINUTES",
                     help="stop then: what cannot end in time is begun last, and goes on from its checkpoint next time")
    run.add_argument("--checkpoint-every", type=float, default=300.0, metavar="SECONDS",
                     help="time between two checkpoints of a run (default: %(default)s)")
    run.add_argument("--executor", help="local (this process), processes (a worker a core or GPU) or ray (a cluster); "
                                        "default: processes where there are several cores or GPUs")
    run.add_argument("--address", help="of a running Ray cluster, or auto; default: a cluster made of this machine")
    run.add_argument("--gpus-per-group", type=float, default=1.0, metavar="PART", help="of a GPU on Ray; default: 1")
    for sub in (add(command_export, as_json=False), add(command_import, figures=False, as_json=False)):
        sub.add_argument("--archive", required=True, metavar="FILE", help="the archive, a zip file")
    measure.add_argument("--quick", action="store_true", help="few steps a figure; minutes instead of tens of them")
    measure.add_argument("--models", nargs="+", metavar="NAME", help="of conv4, vgg11 and resnet18; default: all")
    measure.add_argument("--replicas", nargs="+", type=int, metavar="N",
                         help="numbers of runs in lockstep; default: 1 2 5 10 20; quick: 1 and 5, or 1 and all cores")
    measure.add_argument("--techniques", nargs="*", metavar="NAME",
                         help="what to leave off, one after the other, of bf16, channels-last, capture, streams, fuse, "
                              "autotune; default: all that are in use, no name: none")
    measure.add_argument("--output", metavar="FILE", help="write the JSON there, anew after every measurement")
    return top


def _open_streams() -> None:
    """Let what is written to a closed stream go nowhere, not into a file that happens to get its number; and let a
    terminal of few characters show the others by their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    with suppress(AttributeError):  # closed, or a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list of the SIGINTs so far: a module in the midst of its import may swallow the exception, and fail for it."""
    numbers: list[int] = []

    def asked(number: int, frame) -> None:
        numbers.append(number)
        signal.default_int_handler(number, frame)

    ours = (threading.current_thread() is threading.main_thread()  # nowhere else can handlers be set
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler)  # nohup's stays
    if ours:
        signal.signal(signal.SIGINT, asked)
    try:
        yield numbers
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (2: bad input, 130 or 143: interrupted by SIGINT or SIGTERM,
    141: nobody read to the end)."""
    _open_streams()
    args = parser().parse_args(argv)
    with redirect_stderr(Forgiving(sys.stderr)), _interrupts() as interrupts:
        try:
            for option, value in vars(args).items():  # of an unset variable, as a rule
                if value == "":
                    raise InputError(f"--{option} is empty; give it a value or leave it out")
            code = args.function(args)
            print(end="", flush=True)
            return code
        except InputError as error:
            print(f"gstlib: {plain(error, 5000)}", file=sys.stderr)
            return 2
        except OSError as error:
            with suppress(OSError):  # what is left to be written would fail again at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            # `print` has no frame of its own, and nothing else here raises one
            printing = traceback.extract_tb(error.__traceback__)[-1].filename == __file__
            if printing and isinstance(error, BrokenPipeError):
                return 128 + signal.SIGPIPE
            said = f"standard output cannot be written: {error.strerror}" if printing else error
            print(f"gstlib: {plain(said, 5000)}", file=sys.stderr)
            return 2 if error.filename else 1
        except BaseException as error:
            if not (interrupts or isinstance(error, KeyboardInterrupt)):
                raise
            print("gstlib: interrupted" + ("; finished runs are stored, runs in progress keep their checkpoints, the same "
                                           "command goes on from there" if args.command == "run" else ""), file=sys.stderr)
            return 128 + getattr(error, "signum", signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())

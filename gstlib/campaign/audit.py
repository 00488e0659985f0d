"""Trains a stored run again, from its specification, and compares its rows."""

import random
import tempfile
from typing import NamedTuple

from tqdm import tqdm

from gstlib import data
from gstlib.errors import InputError
from gstlib.store import Run, Store
from gstlib.store.runs import same_rows
from gstlib.training import train
from gstlib.training.engine import pick_device

# what another processor may change: rounding, which training makes larger.  In the first epoch's training loss it has
# not yet grown; in the end two runs differ by no more than three of their standard deviations over seeds, a point each
FIRST_LOSS, FINAL_ACCURACY = 0.05, 0.03


class Audit(NamedTuple):
    """Of a run trained again: whether its rows are the same bit for bit, as they must be on a CPU of the same type
    with the same versions and techniques (`alike`); else the first epoch's training loss (relative) and the final
    accuracy (0 … 1) less the stored ones, and whether events removed the same numbers.  `ok`: as it must be, or
    within tolerance where that is allowed.
    """

    id: str
    model: str
    profile: str
    alike: bool
    same: bool
    first_loss: float
    final_accuracy: float
    same_removals: bool
    ok: bool


def audit(store: Store, profile: str, source: str, run_id: str | None = None, device: str = "auto",
          quiet: bool = False) -> Audit:
    """Train run `run_id` (None: a random one of `profile` on these images) on `source` again and compare.

    Changes nothing in `store`.  Raises `InputError` where there is no such run or the images are others.
    """
    images, there = data.load(source), {name: (spec, about) for name, spec, about in store.about()}
    fitting = [name for name, (spec, about) in there.items()
               if about["profile"] == profile and spec.data.fingerprint == images.fingerprint]
    if not fitting or run_id not in (None, *fitting):
        raise InputError(f"{store.path} holds no run {run_id or ''} at profile {profile!r} on these images; "
                         "name the profile and the images that it was trained on with --profile and --data")
    stored = store.read(run_id or random.choice(fitting))
    with (tempfile.TemporaryDirectory() as folder,
          tqdm(total=stored.spec.optimiser.epochs, desc=stored.spec.id, unit="epoch", disable=quiet) as bar):
        result = train.train(stored.spec, images, pick_device(device), lambda _: bar.update(), profile)
        Store(folder).write(stored.spec, result.provenance, result.tables)  # so that both have been through a file
        return compare(stored, Store(folder).read(stored.spec.id))


def compare(stored: Run, again: Run) -> Audit:
    """What `audit` says of a run and its repetition."""
    before, now, same = stored.tables, again.tables, same_rows(stored, again)
    # a GPU's own kernels may add up in another order each time
    alike = again.provenance["device_type"] == "cpu" and all(
        stored.provenance.get(what) == again.provenance[what] for what in ("device", "instructions", "versions", "techniques"))
    loss, accuracy = (float(now[table][column].iloc[0] - before[table][column].iloc[0])
                      for table, column in (("epoch", "train_loss"), ("final", "accuracy")))
    loss /= float(before["epoch"]["train_loss"].iloc[0])
    counts = ["epoch", "layer", "removed", "removed_total"]
    removed = before["event"].reindex(columns=counts).equals(now["event"].reindex(columns=counts))  # none: no columns
    near = removed and abs(loss) <= FIRST_LOSS and abs(accuracy) <= FINAL_ACCURACY
    return Audit(stored.spec.id, stored.spec.model.name, stored.provenance["profile"], alike, same, loss, accuracy, removed,
                 same or (near and not alike))

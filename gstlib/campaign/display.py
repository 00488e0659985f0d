"""What a campaign shows while it works."""

from __future__ import annotations

import sys

from tqdm import tqdm

from gstlib.campaign.todo import Task
from gstlib.training.train import Progress


class Display:
    """One bar over all epochs of all runs; its text shows the run, its epoch and its accuracy."""

    def __init__(self, tasks: list[Task], quiet: bool):
        self.tasks, self.epochs = {task.spec.id: task for task in tasks}, {}
        self.bar = tqdm(total=sum(task.spec.optimiser.epochs for task in tasks), unit="epoch", disable=quiet,
                        dynamic_ncols=True, smoothing=0.05, mininterval=0.5, desc=f"{len(tasks)} runs")

    def __call__(self, p: Progress) -> None:
        task = self.tasks[p.run_id]
        self.bar.set_postfix_str(f"{task.label} seed {task.spec.seed}, epoch {p.epoch + 1}/{p.epochs}, "
                                 f"test {100 * p.test_accuracy:.1f}%", refresh=False)
        self.stands(p.run_id, p.epoch + 1)

    def stands(self, run_id: str, epochs: int) -> None:
        """So many epochs of a run are done, here or elsewhere."""
        self.bar.update(epochs - self.epochs.get(run_id, 0))
        self.epochs[run_id] = epochs

    def say(self, text: str, always: bool = False) -> None:
        """A line above the bar; without a bar, only what must be said."""
        if always or not self.bar.disable:
            self.bar.write(text, file=sys.stderr)

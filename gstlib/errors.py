"""What is raised for bad input, with the one check that every room needs, and what is said about everything else."""

import os
import sys
from contextlib import suppress


class InputError(ValueError):
    """Bad input, in one sentence: what was wrong and what to do. Exit code 2 on the command line."""


def check_choice(what: str, value: object, choices) -> None:
    """Raise `InputError` that names the choices when `value` is not one of them."""
    if value not in tuple(choices):  # of what has no hash neither
        raise InputError(f"unknown {what} {value!r}; choose from {', '.join(choices)}")


def plain(text: object, most: int = 200) -> str:
    """A text of unknown origin, fit for a message: one line of at most `most` characters, no control codes."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:most])


class Forgiving:
    """A stream (None: none) whose reader may be gone: what cannot be said is dropped, and work goes on."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            return self.stream.write(text)
        return 0

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()


def say(text: str) -> None:
    """Say `text` on standard error, above a progress bar; where nobody can read it, work goes on."""
    from tqdm import tqdm

    with suppress(OSError, ValueError):
        tqdm.write(text, file=sys.stderr)

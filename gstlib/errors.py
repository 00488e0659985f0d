"""What is raised for bad input, with the one check that every room needs."""


class InputError(ValueError):
    """Bad input, in one sentence: what was wrong and what to do. Exit code 2 on the command line."""


def check_choice(what: str, value: object, choices) -> None:
    """Raise `InputError` that names the choices when `value` is not one of them."""
    if value not in choices:
        raise InputError(f"unknown {what} {value!r}; choose from {', '.join(choices)}")


def plain(text: object) -> str:
    """A text of unknown origin, fit for a message: one line of at most 200 characters, no control codes."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:200])

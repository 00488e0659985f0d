"""Data sets: where they come from, what proves which one it is, and batches of them.

`identity` imports no torch; the rest is looked up when it is asked for.
"""

_ROOMS = {"Images": "sources", "SIDE": "sources", "fingerprint": "sources", "load": "sources",
          "Loader": "batches", "crop_and_flip": "batches"}


def __getattr__(name: str):
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)

"""Data sets: where they come from, what proves which one it is, and batches of them.

`identity` imports no torch; the rest is looked up when it is asked for.
"""

from importlib import import_module

from gstlib.data.identity import Known, recall, sizes, whole

_ROOMS = {"Images": "sources", "SIDE": "sources", "fingerprint": "sources", "load": "sources",
          "Loader": "batches", "crop_and_flip": "batches", "mislabelled": "batches"}


def __getattr__(name: str):
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)


def identify(source) -> Known:
    """Name, fingerprint and classes of what `load(source)` finds: recalled, or else by loading, which imports torch."""
    return recall(source) or import_module(f"{__name__}.sources").load(source).known

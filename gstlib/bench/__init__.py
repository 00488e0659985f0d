"""How fast training is (`run`, `report`), and what the figures cost (`cost`).

What needs torch is looked up when asked for.
"""

from importlib import import_module

from gstlib.bench.cost import FIGURES, benchmarks, paper_spec

_ROOMS = {"run": "measure", "report": "measure", "TECHNIQUES": "measure", "count": "operations"}


def __getattr__(name: str):
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)

"""gstlib: pruning during training, its instability, and what that does to generalization (arXiv:1906.03728)."""

__version__ = "0.1.0"
__all__ = ["Pruner", "Schedule"]


def __getattr__(name: str):
    # looked up late so that redrawing a figure does not import torch
    if name == "Pruner":
        from gstlib.pruner import Pruner

        return Pruner
    if name == "Schedule":
        from gstlib.pruning import Schedule

        return Schedule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Finished runs on disk, one verified file a run."""

from gstlib.store.runs import DamagedRun, NewerSchema, Other, Run, Store

__all__ = ["DamagedRun", "NewerSchema", "Other", "Run", "Store"]

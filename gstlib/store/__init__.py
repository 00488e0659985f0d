"""Finished runs on disk, one verified file a run, and archives that carry them elsewhere."""

from gstlib.store.archive import export, import_
from gstlib.store.runs import DamagedRun, NewerSchema, Run, Store

__all__ = ["DamagedRun", "NewerSchema", "Run", "Store", "export", "import_"]

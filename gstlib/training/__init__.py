"""One run, from its specification to its rows: the engine, checkpoints, provenance."""

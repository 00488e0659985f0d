"""One run, from its specification to its rows: the engine, measures, checkpoints, pace, provenance."""

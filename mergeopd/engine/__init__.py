"""The engine: schedule, rounds, updates, evaluation. `build` is the only composition root."""

"""The engine: preflight, the schedule, the loop, evaluation. `build` is the only composition root."""
